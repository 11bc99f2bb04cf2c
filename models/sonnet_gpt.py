"""GPT-2 that continues a poem: the next-token loss, without a matrix of tokens x vocabulary."""

import torch
from torch import Tensor, nn

from models.gpt2 import GPT2Model
from modules.linear import product

CHUNK = 128  # states whose logits exist at one time


class SonnetGPT(nn.Module):
    """Mean next-token loss of the states that have a target."""

    def __init__(self, gpt: GPT2Model):
        super().__init__()
        self.gpt = gpt

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        prompt_lengths: Tensor,
        positions: Tensor,
        targets: Tensor,
    ) -> Tensor:
        """Nats per target, a scalar, from a batch of `datasets.SonnetBatches`.

        `positions` [N] are places in the flattened [B,T], `targets` [N] the tokens that follow.
        """
        h = self.gpt(input_ids, attention_mask, right_padded=True, prompt_lengths=prompt_lengths)[
            "last_hidden_state"
        ]
        h = h.flatten(0, 1)[positions]  # [N,C]
        return NextTokenLoss.apply(h, self.gpt.word_embedding.weight, targets)


def sonnet_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a batch, in nats per token."""
    return model(**batch)


class NextTokenLoss(torch.autograd.Function):
    """Mean cross-entropy of softmax(h W^T), h [N,C], for a W [V,C] that is not trained.

    The gradient of h is made on the way forward, chunk by chunk, so that logits of a chunk are
    all there ever is in memory, and no matrix product more is done than by plain autograd.
    """

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if weight.requires_grad:
            raise ValueError("NextTokenLoss has no gradient for the embedding: freeze it")
        total, gradients = 0.0, []
        with torch.autocast(h.device.type, enabled=False):
            for h_part, target in zip(h.split(CHUNK), targets.split(CHUNK), strict=True):
                logits = product(h_part.float(), weight)  # [CHUNK,V]
                log_z = logits.logsumexp(1, keepdim=True)
                total = total + (log_z - logits.gather(1, target[:, None])).sum()
                if ctx.needs_input_grad[0]:
                    p = logits.sub_(log_z).exp_()
                    p.scatter_add_(1, target[:, None], p.new_full((len(p), 1), -1.0))
                    gradients.append(product(p, weight.T))
        if gradients:
            ctx.save_for_backward(torch.cat(gradients).div_(len(h)))
            ctx.dtype = h.dtype
        return total / len(h)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return (ctx.saved_tensors[0] * grad_output).to(ctx.dtype), None, None
