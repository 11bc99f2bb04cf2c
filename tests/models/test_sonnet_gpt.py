"""The next-token loss against PyTorch's cross-entropy and `transformers`' own loss."""

import pytest
import torch
import torch.nn.functional as F

from datasets import TokenizedSonnet, sonnet_batch
from models.sonnet_gpt import SonnetGPT, sonnet_loss
from modules.kernels import ChunkedNextTokenLoss, accelerate
from modules.lora import LoRAConfig, add_lora
from modules.next_token_loss import NextTokenLoss
from tests.models.test_gpt2 import with_unused_rows

POEMS = [[5, 9, 2, 7, 100], [3, 100], [8, 8, 4, 1, 6, 2, 100]]


@pytest.mark.parametrize("kind", [NextTokenLoss, ChunkedNextTokenLoss])
def test_a_large_common_logit_costs_no_precision_under_autocast(kind):
    h, weight = torch.randn(8, 6), torch.randn(50, 6)
    h[:, 0], weight[:, 0] = 10, -12  # all logits are near -120, where bfloat16 steps by a half
    targets = torch.randint(0, 50, (8,))
    expected = F.cross_entropy(h @ weight.T, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = kind()(h, weight, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_loss_is_transformers_own_whatever_stands_in_the_padding(hf_model, gpt):
    add_lora(gpt, LoRAConfig(rank=2))
    batch = sonnet_batch([TokenizedSonnet(ids, 2) for ids in POEMS])
    # Labels for transformers: all tokens, end of text too, and -100 where there is none.
    ids, labels = (torch.full((3, 7), fill) for fill in (0, -100))
    for row, poem in enumerate(POEMS):
        ids[row, : len(poem)] = labels[row, : len(poem)] = torch.tensor(poem)
    with torch.no_grad():
        theirs = hf_model(ids, attention_mask=(labels >= 0).long(), labels=labels).loss
        ours = sonnet_loss(SonnetGPT(gpt), batch)
        batch["input_ids"][batch["attention_mask"] == 0] = 77
        assert sonnet_loss(SonnetGPT(gpt), batch) == ours
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_suppressed_ids_have_no_part_in_loss_and_gradient(gpt, fast, autocast):
    add_lora(gpt, LoRAConfig(rank=2, dropout=0.0))
    models = [SonnetGPT(gpt), SonnetGPT(with_unused_rows(gpt))]
    batch = sonnet_batch([TokenizedSonnet(ids, 2) for ids in POEMS])
    losses, gradients = [], []
    for model in models:
        if fast:
            accelerate(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses.append(sonnet_loss(model, batch))
        gradients.append(torch.autograd.grad(losses[-1], trained))
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    tolerance = 1e-2 if autocast else 1e-4
    for found, expected in zip(*reversed(gradients), strict=True):
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    models[1].gpt.suppress_tokens(())
    assert sonnet_loss(models[1], batch) > 5 * losses[0]


def test_an_embedding_that_trains_gets_no_gradient_in_suppressed_rows(gpt):
    model = SonnetGPT(with_unused_rows(gpt))
    sonnet_loss(model, sonnet_batch([TokenizedSonnet(ids, 2) for ids in POEMS])).backward()
    gradient = model.gpt.word_embedding.weight.grad
    assert (gradient[101:] == 0).all()
    assert gradient.isfinite().all()
    assert gradient[:101].abs().max() > 0


def test_a_step_changes_the_adapter_alone_and_lowers_the_loss(gpt):
    torch.manual_seed(0)
    add_lora(gpt, LoRAConfig(rank=2, dropout=0.0))
    model = SonnetGPT(gpt)
    batch = sonnet_batch([TokenizedSonnet(ids, 2) for ids in POEMS])
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        losses.append(sonnet_loss(model, batch))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}
