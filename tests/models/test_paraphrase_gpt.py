"""The cloze head: which logit is which, and that the rest of the vocabulary does not matter."""

import torch
import torch.nn.functional as F

from models.paraphrase_gpt import ParaphraseGPT, paraphrase_loss

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
