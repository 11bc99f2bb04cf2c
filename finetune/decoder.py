"""Next-token logits for a batch of growing texts, with a key/value cache."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from finetune.runtime import Runtime
from models.gpt2 import GPT2Model
from modules.cuda_graphs import CUDAGraphs
from modules.kv_cache import KVCache


class Decoder:
    """Runs the model on a batch of texts, then on one new token per text at a time."""

    removes_finished = True  # finished texts leave the batch

    def __init__(self, gpt: GPT2Model, prompts: list[list[int]], max_length: int, runtime: Runtime):
        self.gpt, self.runtime, self.max_length = gpt, runtime, max_length
        device = runtime.device
        rows = [torch.tensor(prompt, device=device) for prompt in prompts]
        self.input_ids = pad_sequence(rows, batch_first=True)
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        fixed = not self.removes_finished
        # In fixed shapes a multiple of 16: otherwise each layer copies the attention bias.
        size = -(-max_length // 16) * 16 if fixed else max_length
        self.cache = KVCache(gpt.config.n_layer, len(prompts), size, device, fixed_shapes=fixed)

    def prefill(self) -> Tensor:
        """Logits [B,V] for the first new token of each text."""
        column = torch.arange(self.input_ids.shape[1], device=self.lengths.device)
        return self.logits(self.input_ids, (column < self.lengths[:, None]).long())

    def read(self, tokens: Tensor) -> Tensor:
        """Logits [B,V] for the token after `tokens` [B]."""
        return self.logits(tokens[:, None])

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        self.cache.keep(rows)
        self.lengths = self.lengths[rows]

    def logits(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B,V] after T more tokens per text, `input_ids` [B,T]."""
        with self.runtime.autocast():
            states = self.gpt(
                input_ids,
                mask,
                cache=self.cache,
                prompt_lengths=self.lengths,  # to ReFT, the whole given text is the prompt
                last_only=True,
            )
        return self.gpt.hidden_state_to_token(states["last_token"])


class GPUDecoder(Decoder):
    """The same in fixed shapes: each token launches the same kernels, as a CUDA graph requires.

    Finished texts stay in the batch; what they produce is ignored.
    """

    removes_finished = False

    def __init__(self, gpt: GPT2Model, prompts: list[list[int]], max_length: int, runtime: Runtime):
        super().__init__(gpt, prompts, max_length, runtime)
        self.position = self.lengths  # of the next token; finished texts stay at their last one
        self.step = self.next_logits
        if runtime.decodes_with_graphs:
            self.step = CUDAGraphs(self.next_logits, "decoding")

    def read(self, tokens: Tensor) -> Tensor:
        (logits,) = self.step(input_ids=tokens[:, None], position=self.position)
        self.position = (self.position + 1).clamp(max=self.max_length - 1)
        return logits

    def next_logits(self, input_ids: Tensor, position: Tensor) -> tuple[Tensor]:
        """`logits` after one more token per row, `input_ids` [B,1], at `position` [B]."""
        self.cache.lengths, self.cache.longest = position, 1  # independent of previous calls
        return (self.logits(input_ids),)
