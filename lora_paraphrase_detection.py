"""Fine-tune GPT-2 with LoRA to tell whether two questions ask the same thing.

python lora_paraphrase_detection.py --demo          # bundled model and data, on a CPU
python lora_paraphrase_detection.py --use_gpu       # gpt2 on the Quora files in data/
python lora_paraphrase_detection.py --use_gpu --predict_only
"""

import argparse
from pathlib import Path

from datasets import PairBatches, answer_ids, load_pairs
from finetune.arguments import (
    DEMO_PAIRS,
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
from finetune.checkpoint import adapter_identity, load_adapter, save_adapter
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
from models.pretrained import load_pretrained
from modules.lora import LoRAConfig, add_lora


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_paraphrase_data_arguments(parser, "lora")
    add_model_arguments(parser)
    add_lora_arguments(parser)
    add_fit_arguments(parser, batch_size=12)
    add_run_arguments(parser)
    return parse_args(parser, DEMO_PAIRS | {"lr": 2e-3})


def main() -> None:
    args = get_args()
    runtime = make_runtime(args.use_gpu, args.precision)
    seed_everything(args.seed)

    # Load
    gpt, tokenizer = load_pretrained(args.model_path or args.model_size)
    paths = (args.para_train, args.para_dev, args.para_test)
    limits = (args.limit_train, args.limit_dev)
    train, dev, test = load_pairs(*paths, limits, tokenizer, gpt.config.n_positions)

    # Build
    lora = config_from(LoRAConfig, args, "lora_")
    add_lora(gpt, lora)
    model = ParaphraseGPT(gpt, answer_ids(tokenizer))
    runtime.prepare(model, args.compile)
    checkpoint = checkpoint_path(args, "lora", lora.rank, "paraphrase")
    same = adapter_identity("lora", "paraphrase", model_name(args), lora)

    # Fit
    def score() -> dict[str, float]:
        return paraphrase_metrics(paraphrase_logits(model, dev, runtime, "dev"), dev.labels)

    def keep(record: dict) -> None:
        save_adapter(checkpoint, model, same | record)

    if not args.predict_only:
        batches = PairBatches(train, args.batch_size, args.seed)
        stopper = EarlyStopper("dev_accuracy", "max", config_from(EarlyStoppingConfig, args))
        config = config_from(FitConfig, args)
        history, measured = fit(
            model, paraphrase_loss, batches, score, keep, config, stopper, runtime
        )

    # Predict
    best = load_adapter(checkpoint, model, same)
    dev_logits = paraphrase_logits(model, dev, runtime, "dev")
    test_logits = paraphrase_logits(model, test, runtime, "test")
    final = paraphrase_metrics(dev_logits, dev.labels)

    # Write
    write_paraphrase_predictions(args.para_dev_out, dev.ids, dev_logits.argmax(1).tolist())
    write_paraphrase_predictions(args.para_test_out, test.ids, test_logits.argmax(1).tolist())
    files = {"checkpoint": checkpoint, "dev": args.para_dev_out, "test": args.para_test_out}
    if not args.predict_only:
        files["metrics"] = Path(args.para_dev_out).parent / "lora-paraphrase-metrics.json"
        write_metrics(files["metrics"], vars(args), history, final, measured)
        files = measured | files
    print(format_table(paraphrase_table(best["epoch"], final, dev.labels) | files))


if __name__ == "__main__":
    run(main)
