"""CUDA graphs: the kernels of a function, launched as one.

Where a step's kernels are small, launching each of them takes longer than what they compute.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
Function = Callable[..., Outputs]

MOST_GRAPHS = 64
TOLERANCE = 0.02  # of a norm; sums of 16-bit numbers in another order differ by less


class CUDAGraphs:
    """A function of tensors, as a CUDA graph for each set of shapes that comes a second time.

    The function gets its tensors by name and returns tensors, which the next call overwrites. It
    may depend on nothing else but weights and random numbers, and may not read a value on the host.

    A new graph is compared with the function itself. If it gives other results or cannot be made, a
    line says so, and the function is called without graphs from then on.
    """

    def __init__(self, function: Function, what: str):
        self.function, self.what = function, what
        self.graphs: dict[tuple, Callable[[dict[str, Tensor]], Outputs]] = {}
        self.seen: set[tuple] = set()
        self.pool = None  # of memory, shared by all graphs, which never run at the same time
        self.works = True

    def __call__(self, **inputs: Tensor) -> Outputs:
        shapes = tuple(tensor.shape for tensor in inputs.values())
        if shapes in self.graphs:
            return self.graphs[shapes](inputs)
        is_second = shapes in self.seen
        self.seen.add(shapes)
        if is_second and self.works and len(self.graphs) < MOST_GRAPHS:
            return self._first_call(shapes, inputs)
        return self.function(**inputs)

    def _first_call(self, shapes: tuple, inputs: dict[str, Tensor]) -> Outputs:
        """The results for these inputs, and from now on a graph for such shapes."""
        stream, before = torch.cuda.current_stream(), torch.cuda.get_rng_state()
        expected = self.function(**inputs)
        after = torch.cuda.get_rng_state()
        reason = "it gives other results"
        try:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            graph = record(self.function, inputs, self.pool)
            torch.cuda.set_rng_state(before)  # the same dropout again
            found = graph(inputs)
            self.works = agree(found, expected)
        except RuntimeError as error:  # some operation cannot be recorded, or memory is short
            torch.cuda.set_stream(stream)
            self.works, reason = False, str(error).partition("\n")[0]
        torch.cuda.set_rng_state(after)
        if self.works:
            self.graphs[shapes] = graph
            return found
        self.graphs.clear()
        print(f"{self.what} continues without CUDA graphs: {reason}")
        return expected


def record(
    function: Function, inputs: dict[str, Tensor], pool: Any
) -> Callable[[dict[str, Tensor]], Outputs]:
    """The function as a CUDA graph, for inputs of these shapes."""
    own = {name: tensor.clone() for name, tensor in inputs.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = function(**own)

    def replay(inputs: dict[str, Tensor]) -> Outputs:
        torch._foreach_copy_(list(own.values()), list(inputs.values()))
        graph.replay()
        return outputs

    return replay


def agree(found: Outputs, expected: Outputs) -> bool:
    """Are these the same results, up to rounding?"""
    a, b = (torch.cat([tensor.flatten().float() for tensor in each]) for each in (found, expected))
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite):
        return False
    a, b = a[finite], b[finite]
    return bool((a - b).norm() <= TOLERANCE * b.norm())
