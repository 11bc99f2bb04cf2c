"""Fine-tune GPT-2 with LoRA to tell whether two questions ask the same thing.

python lora_paraphrase_detection.py --demo          # bundled model and data, on a CPU
python lora_paraphrase_detection.py --use_gpu       # gpt2 on the Quora files in data/
python lora_paraphrase_detection.py --use_gpu --predict_only
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from datasets import PairBatches, TokenizedPairs, answer_ids, read_pairs, tokenize_pairs
from finetune.arguments import (
    DATA,
    add_fit_arguments,
    add_lora_arguments,
    add_model_arguments,
    add_paraphrase_data_arguments,
    add_run_arguments,
    checkpoint_path,
    config_from,
    model_name,
    parse_args,
)
from finetune.checkpoint import load_adapter, save_adapter
from finetune.early_stopping import EarlyStopper, EarlyStoppingConfig
from finetune.loop import FitConfig, fit
from finetune.metrics import paraphrase_logits, paraphrase_metrics
from finetune.predictions import (
    format_table,
    paraphrase_table,
    write_metrics,
    write_paraphrase_predictions,
)
from finetune.runtime import make_runtime, run, seed_everything
from models.paraphrase_gpt import ParaphraseGPT, paraphrase_loss
from models.pretrained import find_checkpoint, load_gpt2, load_tokenizer
from modules.adapters import describe_parameters
from modules.lora import LoRAConfig, add_lora

DEMO = {
    "model_size": "gpt2-nano",
    "para_train": DATA / "sample-pairs-train.csv",
    "para_dev": DATA / "sample-pairs-dev.csv",
    "para_test": DATA / "sample-pairs-test.csv",
    "epochs": 4,
    "lr": 2e-3,
    "lr_schedule": "linear",
    "warmup_ratio": 0.1,
}


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_paraphrase_data_arguments(parser, "lora")
    add_model_arguments(parser)
    add_lora_arguments(parser)
    add_fit_arguments(parser, batch_size=12)
    add_run_arguments(parser)
    return parse_args(parser, DEMO)


def load_data(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, max_length: int
) -> tuple[TokenizedPairs, TokenizedPairs, TokenizedPairs]:
    """Train, dev and test pairs; says what was read and what was left out."""
    files = [
        (args.para_train, True, args.limit_train),
        (args.para_dev, True, args.limit_dev),
        (args.para_test, False, args.limit_dev),
    ]
    splits = []
    for path, labelled, limit in files:
        pairs = read_pairs(path, labelled, limit)
        splits.append(tokenize_pairs(pairs, tokenizer, max_length))
        shortened = splits[-1].shortened
        print(pairs.summary() + (f"; shortened {shortened}" if shortened else ""))
    return tuple(splits)


def main() -> None:
    args = get_args()
    runtime = make_runtime(args.use_gpu, args.precision)
    seed_everything(args.seed)

    # Load
    folder = find_checkpoint(args.model_path or args.model_size)
    gpt = load_gpt2(folder)
    tokenizer = load_tokenizer(folder)
    train, dev, test = load_data(args, tokenizer, gpt.config.n_positions)

    # Build
    lora = config_from(LoRAConfig, args, "lora_")
    add_lora(gpt, lora)
    model = ParaphraseGPT(gpt, answer_ids(tokenizer)).to(runtime.device)
    if args.compile:
        model.compile(dynamic=True)
    print(f"{describe_parameters(model)}, on {runtime.device}")
    checkpoint = checkpoint_path(args, "lora", lora.rank, "paraphrase")
    same = {"method": "lora", "model": model_name(args), "rank": lora.rank, "alpha": lora.alpha}

    # Fit
    if not args.predict_only:
        history, measured = fit(
            model,
            paraphrase_loss,
            PairBatches(train, args.batch_size, args.seed),
            lambda: paraphrase_metrics(paraphrase_logits(model, dev, runtime, "dev"), dev.labels),
            lambda record: save_adapter(checkpoint, model, asdict(lora) | same | record),
            config_from(FitConfig, args),
            EarlyStopper("dev_accuracy", "max", config_from(EarlyStoppingConfig, args)),
            runtime,
        )

    # Predict
    best = load_adapter(checkpoint, model, same)
    dev_logits = paraphrase_logits(model, dev, runtime, "dev")
    test_logits = paraphrase_logits(model, test, runtime, "test")
    dev_metrics = paraphrase_metrics(dev_logits, dev.labels)

    # Write
    write_paraphrase_predictions(args.para_dev_out, dev.ids, dev_logits.argmax(1).tolist())
    write_paraphrase_predictions(args.para_test_out, test.ids, test_logits.argmax(1).tolist())
    table = paraphrase_table(best["epoch"], dev_metrics, dev.labels)
    if not args.predict_only:
        path = Path(args.para_dev_out).parent / "lora-paraphrase-metrics.json"
        write_metrics(path, vars(args), history, dev_metrics, measured)
        table |= measured | {"metrics": path}
    table |= {"checkpoint": checkpoint, "dev": args.para_dev_out, "test": args.para_test_out}
    print(format_table(table))


if __name__ == "__main__":
    run(main)
