"""CUDA graphs: launch all kernels of a function at once.

If a step's kernels are small, launching them one by one takes longer than running them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
Function = Callable[..., Outputs]

MOST_GRAPHS = 64
TOLERANCE = 0.02  # relative, in norm; 16-bit sums in a different order deviate less


class CUDAGraphs:
    """Runs a function of tensors as a CUDA graph, captured when a set of input shapes recurs.

    The function takes its tensors by name and returns tensors, which the next call overwrites. It
    may depend only on its inputs, weights and random numbers, and must not read values on the host.

    Each new graph is checked against the function itself. If the results differ or capture fails,
    a message is printed and the function runs without graphs from then on.
    """

    def __init__(self, function: Function, what: str):
        self.function, self.what = function, what
        self.graphs: dict[tuple, Callable[[dict[str, Tensor]], Outputs]] = {}
        self.seen: set[tuple] = set()
        self.pool = None  # memory shared by all graphs, since they never run at the same time
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
        """Compute the results for these inputs and keep a graph for their shapes."""
        stream, before = torch.cuda.current_stream(), torch.cuda.get_rng_state()
        expected = self.function(**inputs)
        after = torch.cuda.get_rng_state()
        reason = "the results differ"
        try:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            graph = capture(self.function, inputs, self.pool)
            torch.cuda.set_rng_state(before)  # to repeat the same dropout
            found = graph(inputs)
            self.works = results_match(found, expected)
        except RuntimeError as error:  # an operation cannot be captured, or out of memory
            torch.cuda.set_stream(stream)
            self.works, reason = False, str(error).partition("\n")[0]
        torch.cuda.set_rng_state(after)
        if self.works:
            self.graphs[shapes] = graph
            return found
        self.graphs.clear()
        print(f"{self.what} continues without CUDA graphs: {reason}")
        return expected


def capture(
    function: Function, inputs: dict[str, Tensor], pool: Any
) -> Callable[[dict[str, Tensor]], Outputs]:
    """Capture the function as a CUDA graph for inputs of these shapes."""
    own = {name: tensor.clone() for name, tensor in inputs.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = function(**own)

    def replay(inputs: dict[str, Tensor]) -> Outputs:
        torch._foreach_copy_(list(own.values()), list(inputs.values()))
        graph.replay()
        return outputs

    return replay


def results_match(found: Outputs, expected: Outputs) -> bool:
    """True if the results are equal up to rounding."""
    a, b = (torch.cat([tensor.flatten().float() for tensor in each]) for each in (found, expected))
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite):
        return False
    a, b = a[finite], b[finite]
    return bool((a - b).norm() <= TOLERANCE * b.norm())
