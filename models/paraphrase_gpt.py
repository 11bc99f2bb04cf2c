"""GPT-2 that answers the paraphrase cloze: is the next token "no" or "yes"?"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.gpt2 import GPT2Model


class ParaphraseGPT(nn.Module):
    """Returns the logits of two answers, class 0 "no" and class 1 "yes", for each prompt."""

    def __init__(self, gpt: GPT2Model, answer_ids: tuple[int, int]):
        super().__init__()
        self.gpt = gpt
        self.register_buffer("answer_ids", torch.tensor(answer_ids), persistent=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_index: Tensor | None = None
    ) -> Tensor:
        """Float32 logits [B,2], for the two answers only. Arguments as in `GPT2Model.forward`."""
        h = self.gpt(input_ids, attention_mask, token_index, last_only=True)["last_token"]  # [B,C]
        answers = self.gpt.word_embedding(self.answer_ids)  # [2,C]
        # Not a matmul, because autocast would round its result: near -100, say, bfloat16 logits are
        # half a nat apart.
        return (h.float()[:, None] * answers).sum(-1)


def paraphrase_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy over the two answers, in nats, for a batch from `datasets.pair_batch`."""
    logits = model(batch["input_ids"], batch["attention_mask"], batch.get("token_index"))
    return F.cross_entropy(logits, batch["labels"])
