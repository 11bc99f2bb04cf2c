"""GPT-2 trained to continue poems, with the next-token loss."""

from torch import Tensor, nn

from models.gpt2 import GPT2Model
from modules.next_token_loss import NextTokenLoss


class SonnetGPT(nn.Module):
    """Returns the mean next-token loss over the tokens of a batch of poems."""

    def __init__(self, gpt: GPT2Model):
        super().__init__()
        self.gpt = gpt
        self.loss = NextTokenLoss()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_index: Tensor,
        prompt_lengths: Tensor,
        targets: Tensor,
    ) -> Tensor:
        """The loss in nats per target, a scalar. `targets` [N] are the next tokens, row by row.
        The arguments together are a batch from `datasets.SonnetBatches`.
        """
        states = self.gpt(input_ids, attention_mask, token_index, prompt_lengths=prompt_lengths)
        h = states["token_states"][: len(targets)]  # without the padding positions
        return self.loss(h, self.gpt.word_embedding.weight, targets, self.gpt.logit_bias)


def sonnet_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a batch, in nats per token."""
    return model(**batch)
