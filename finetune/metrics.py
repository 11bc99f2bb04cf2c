"""Scores of paraphrase predictions."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score
from tqdm import tqdm

from datasets import TokenizedPairs, prediction_batches
from finetune.runtime import Runtime
from models.paraphrase_gpt import ParaphraseGPT

PREDICTION_BATCH = 64  # rows; without gradients a batch takes little memory


@torch.inference_mode()
def paraphrase_logits(
    model: ParaphraseGPT, data: TokenizedPairs, runtime: Runtime, name: str
) -> torch.Tensor:
    """Float32 logits [N,2] on the CPU in the order of the file."""
    model.eval()
    logits = torch.empty(len(data), 2, device=runtime.device)
    steps = -(-len(data) // PREDICTION_BATCH)
    for batch in tqdm(prediction_batches(data, PREDICTION_BATCH), name, steps, leave=False):
        batch = runtime.to_device(batch)
        with runtime.autocast():
            answer = model(batch["input_ids"], batch["attention_mask"], right_padded=True)
        logits[batch["rows"]] = answer
    return logits.cpu()


def paraphrase_metrics(logits: torch.Tensor, labels: np.ndarray) -> dict[str, float]:
    """Mean loss in nats, accuracy, and F1 averaged over the two classes."""
    predicted = logits.argmax(1).numpy()
    return {
        "dev_loss": F.cross_entropy(logits, torch.from_numpy(labels)).item(),
        "dev_accuracy": float(accuracy_score(labels, predicted)),
        "dev_macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
    }
