"""The cloze head: which logit is which, and that the rest of the vocabulary does not matter."""

import torch
import torch.nn.functional as F

from data.pairs import read_pairs
from datasets import PairBatches, answer_ids, tokenize_pairs
from finetune.loop import FitConfig, Trainer
from finetune.runtime import Runtime
from models.gpt2 import GPT2Model
from models.paraphrase_gpt import ParaphraseGPT, paraphrase_loss
from models.pretrained import BUNDLED
from modules.kernels import accelerate
from modules.lora import LoRAConfig, add_lora
from tests.benchmarks.plain import PlainParaphrase
from tests.conftest import ROOT, adamw

NO, YES = 7, 40
IDS = torch.tensor([[3, 5, 8, 9], [6, 2, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def test_logits_are_the_columns_no_and_yes_after_the_last_token(hf_model, gpt):
    model = ParaphraseGPT(gpt, (NO, YES)).eval()
    with torch.no_grad():
        whole = hf_model(IDS, attention_mask=MASK).logits
        answer = model(IDS, MASK)
    expected = torch.stack([whole[0, 3, [NO, YES]], whole[1, 1, [NO, YES]]])
    assert torch.allclose(answer, expected, atol=1e-4)


def test_class_1_is_yes(gpt):
    model = ParaphraseGPT(gpt, (NO, YES)).eval()
    norm = gpt.final_layer_norm
    with torch.no_grad():  # a state that points to "yes", whatever was read
        norm.weight.zero_()
        norm.bias.copy_(gpt.word_embedding.weight[YES] - gpt.word_embedding.weight[NO])
        assert model(IDS, MASK).argmax(1).tolist() == [1, 1]


def test_logits_are_float32_under_autocast_too(gpt):
    model = ParaphraseGPT(gpt, (NO, YES)).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        answer = model(IDS, MASK)
    assert answer.dtype == torch.float32
    assert (answer != answer.bfloat16()).all()


def test_loss_is_cross_entropy_of_the_labels(gpt):
    model = ParaphraseGPT(gpt, (NO, YES)).eval()
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([1, 0])}
    with torch.no_grad():
        expected = F.cross_entropy(model(IDS, MASK), batch["labels"])
        assert torch.equal(paraphrase_loss(model, batch), expected)


def test_training_steps_are_those_of_the_plain_way(library, nano_tokenizer):
    """Everything that makes our step quick, against an implementation that has none of it."""
    gpt, answers = GPT2Model.from_pretrained(BUNDLED), answer_ids(nano_tokenizer)
    add_lora(gpt, LoRAConfig(dropout=0.0))
    pairs = read_pairs(ROOT / "data" / "sample-pairs-train.csv", has_labels=True, limit=100)
    batches = PairBatches(tokenize_pairs(pairs, nano_tokenizer, 512), 4, seed=0)
    losses = []
    for model in (PlainParaphrase(gpt, answers), ParaphraseGPT(gpt, answers)):
        accelerate(model)
        config, cpu = FitConfig(lr=1e-3), Runtime(torch.device("cpu"))
        trainer = Trainer(model.train(), paraphrase_loss, adamw(model, config), config, 25, cpu)
        losses.append([])
        for batch, _ in batches.epoch(0):
            losses[-1].append(trainer.backward(batch, 1).item())
            trainer.step()
    plain, ours = map(torch.tensor, losses)
    assert len(ours) == 25
    assert (plain[:10] - plain[-10:]).abs().max() > 0.1  # so they have gone somewhere
    assert torch.allclose(ours, plain, atol=1e-4)
