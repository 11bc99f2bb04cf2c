"""The language-modeling loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NextTokenLoss(nn.Module):
    """Mean cross-entropy of softmax(W h + b), in nats per token, computed in float32."""

    def forward(
        self, h: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """A scalar, from states h [N,C], the LM head's `weight` [V,C] and the ids `targets` [N].

        `bias` [V] is -inf for ids excluded from the softmax.
        """
        with torch.autocast(h.device.type, enabled=False):
            return F.cross_entropy(F.linear(h.float(), weight, bias), targets)
