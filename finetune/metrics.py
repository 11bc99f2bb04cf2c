"""Scores of paraphrase predictions."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score
from tqdm import tqdm

from datasets import ANSWERS, TokenizedPairs, pair_batch, prediction_rows
from finetune.runtime import Runtime
from models.paraphrase_gpt import ParaphraseGPT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PREDICTION_BATCH = 64  # rows; without gradients a batch takes little memory


@torch.inference_mode()
def paraphrase_logits(
    model: ParaphraseGPT, data: TokenizedPairs, runtime: Runtime, name: str
) -> torch.Tensor:
    """Float32 logits [N,2] on the CPU in the order of the file."""
    model.eval()
    batches = prediction_rows(data, PREDICTION_BATCH)
    own = []
    for rows in tqdm(runtime.mine(batches), name, leave=False, disable=not runtime.is_main):
        batch = runtime.to_device(pair_batch(data, rows))
        with runtime.autocast():
            own.append(model(batch["input_ids"], batch["attention_mask"], batch["token_index"]))
    logits = torch.empty(len(data), 2)
    for rows, answers in zip(batches, runtime.gather([x.cpu() for x in own]), strict=True):
        logits[rows] = answers
    return logits


def paraphrase_metrics(logits: torch.Tensor, labels: np.ndarray) -> dict[str, float]:
    """Mean loss in nats, accuracy, and F1 averaged over the two classes."""
    predicted = logits.argmax(1).numpy()
    return {
        "dev_loss": F.cross_entropy(logits, torch.from_numpy(labels)).item(),
        "dev_accuracy": float(accuracy_score(labels, predicted)),
        "dev_macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
    }


def surest_mistakes(
    logits: torch.Tensor, data: TokenizedPairs, tokenizer: "PreTrainedTokenizerFast", n: int = 10
) -> list[dict[str, Any]]:
    """The n wrong predictions of highest probability, with their prompts as the model read them."""
    probabilities, predicted = logits.softmax(1).max(1)
    wrong = (predicted.numpy() != data.labels).nonzero()[0]
    wrong = wrong[np.argsort(-probabilities.numpy()[wrong], kind="stable")][:n]
    return [
        {
            "id": data.ids[i],
            "prompt": tokenizer.decode(data.tokens[data.starts[i] :][: data.lengths[i]].tolist()),
            "label": ANSWERS[data.labels[i]],
            "predicted": ANSWERS[predicted[i]],
            "probability": round(float(probabilities[i]), 4),
        }
        for i in wrong
    ]
