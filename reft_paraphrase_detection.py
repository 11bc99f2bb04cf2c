"""Fine-tune GPT-2 with ReFT to tell whether two questions ask the same thing.

python reft_paraphrase_detection.py --demo          # bundled model and data, on a CPU
python reft_paraphrase_detection.py --use_gpu       # gpt2 on the Quora files in data/
python reft_paraphrase_detection.py --use_gpu --predict_only
"""

import argparse

from datasets import PairBatches, answer_ids, load_pairs
from finetune.arguments import (
    DEMO_PAIRS,
    add_fit_arguments,
    add_model_arguments,
    add_output_arguments,
    add_paraphrase_data_arguments,
    add_reft_arguments,
    add_run_arguments,
    config_from,
    fit_settings,
    make_parser,
    parse_args,
    run_files,
)
from finetune.ending import run
from finetune.loop import fit
from finetune.metrics import paraphrase_logits, paraphrase_metrics
from finetune.predictions import format_table, paraphrase_table, write_paraphrase_predictions
from finetune.report import write_paraphrase_record
from finetune.runtime import make_runtime, seed_everything
from models.gpt2 import GPT2Model
from models.paraphrase_gpt import ParaphraseGPT, paraphrase_loss
from models.pretrained import find_checkpoint, load_tokenizer
from modules.reft import ReFTConfig, add_reft


def get_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_paraphrase_data_arguments(parser, "reft")
    add_model_arguments(parser)
    add_reft_arguments(parser)
    add_fit_arguments(parser, batch_size=8)
    add_run_arguments(parser)
    add_output_arguments(parser, "reft")
    return parse_args(parser, DEMO_PAIRS | {"lr": 3e-3})


def main() -> None:
    args = get_args()
    runtime = make_runtime(args.use_gpu, args.precision, args.deterministic)
    seed_everything(args.seed)

    # Load
    folder = find_checkpoint(args.model_path or args.model_size)
    gpt = GPT2Model.from_pretrained(folder)
    tokenizer = load_tokenizer(folder, gpt.config.vocab_size)
    paths = (args.para_train, args.para_dev, args.para_test)
    limits = (args.limit_train, args.limit_dev)
    train, dev, test = load_pairs(*paths, limits, tokenizer, gpt.config.n_positions)

    # Build
    reft = config_from(ReFTConfig, args, "reft_")
    add_reft(gpt, reft)
    model = ParaphraseGPT(gpt, answer_ids(tokenizer))
    runtime.prepare(model, args.compile, args.gradient_checkpointing)
    checkpoint, unfinished = run_files(args, "paraphrase", reft, model, runtime)

    # Fit
    def score() -> dict[str, float]:
        return paraphrase_metrics(paraphrase_logits(model, dev, runtime, "dev"), dev.labels)

    if not args.predict_only:
        batches = PairBatches(train, args.batch_size, args.seed, *runtime.place)
        settings = fit_settings(args, "dev_accuracy", "max", unfinished, runtime)
        fitted = fit(model, paraphrase_loss, batches, score, checkpoint.save, *settings)

    # Predict
    best = checkpoint.load()
    dev_logits = paraphrase_logits(model, dev, runtime, "dev")
    test_logits = paraphrase_logits(model, test, runtime, "test")
    final = paraphrase_metrics(dev_logits, dev.labels)
    if not runtime.is_main:
        return

    # Write
    write_paraphrase_predictions(args.para_dev_out, dev.ids, dev_logits.argmax(1).tolist())
    write_paraphrase_predictions(args.para_test_out, test.ids, test_logits.argmax(1).tolist())
    files = {"adapter": checkpoint.path, "dev": args.para_dev_out, "test": args.para_test_out}
    if not args.predict_only:
        about = args.para_dev_out.parent, vars(args), reft, fitted, final
        record = write_paraphrase_record(*about, dev, dev_logits, tokenizer)
        files = record | files
        unfinished.remove()
    print(format_table(paraphrase_table(best["epoch"], final, dev.labels) | files))


if __name__ == "__main__":
    run(main)
