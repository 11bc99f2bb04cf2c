"""Fine-tune GPT-2 with LoRA on Shakespeare's sonnets and let it continue others.

python lora_sonnet_generation.py --demo             # bundled model and data, on a CPU
python lora_sonnet_generation.py --use_gpu          # gpt2
python lora_sonnet_generation.py --use_gpu --predict_only --temperature 0.9 --num_samples 5
"""

import argparse

from datasets import SonnetBatches, load_sonnets
from finetune.arguments import (
    DEMO_SONNETS,
    add_fit_arguments,
    add_lora_arguments,
    add_model_arguments,
    add_output_arguments,
    add_run_arguments,
    add_sampling_arguments,
    add_sonnet_data_arguments,
    config_from,
    fit_settings,
    make_parser,
    parse_args,
    run_files,
)
from finetune.ending import run
from finetune.loop import fit
from finetune.peft_format import start_lora, write_exports
from finetune.predictions import format_sonnet, format_table, sonnet_table, write_samples
from finetune.report import write_sonnet_record
from finetune.runtime import make_runtime, seed_everything
from finetune.sampling import Poet, SamplingConfig
from finetune.sonnet_metrics import SonnetScorer
from models.gpt2 import GPT2Model
from models.pretrained import find_checkpoint, load_tokenizer
from models.sonnet_gpt import SonnetGPT, sonnet_loss
from modules.lora import LoRAConfig


def get_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_sonnet_data_arguments(parser, "lora")
    add_model_arguments(parser)
    add_lora_arguments(parser)
    add_fit_arguments(parser, batch_size=4)
    add_sampling_arguments(parser)
    add_run_arguments(parser)
    add_output_arguments(parser, "lora")
    parser.set_defaults(epochs=10, lr=1.5e-4, lora_rank=4)
    return parse_args(parser, DEMO_SONNETS | {"lr": 2e-3})


def main() -> None:
    args = get_args()
    runtime = make_runtime(args.use_gpu, args.precision, args.deterministic)
    seed_everything(args.seed)

    # Load
    folder = find_checkpoint(args.model_path or args.model_size)
    gpt = GPT2Model.from_pretrained(folder)
    tokenizer = load_tokenizer(folder, gpt.config.vocab_size)
    paths = (args.sonnet_path, args.dev_sonnet_path, args.dev_gold_path, args.held_out_sonnet_path)
    limits = (args.limit_train, args.limit_dev)
    data = load_sonnets(*paths, limits, args.seed, tokenizer, gpt.config.n_positions)

    # Build
    lora = start_lora(gpt, config_from(LoRAConfig, args, "lora_"), args.import_peft)
    model = SonnetGPT(gpt)
    runtime.prepare(model, args.compile, args.gradient_checkpointing)
    checkpoint, unfinished = run_files(args, "sonnet", lora, model, runtime)
    poet = Poet(gpt, tokenizer, config_from(SamplingConfig, args), args.seed, runtime)
    score = SonnetScorer(model, poet, data)

    # Fit
    def keep(record: dict) -> None:
        checkpoint.save(record)
        print(*map(format_sonnet, score.poems[:2]), sep="")

    if not args.predict_only:
        batches = SonnetBatches(data.train_ids, args.batch_size, args.seed, *runtime.place)
        untrained = score.validation_loss()
        print(f"validation loss before training {untrained:.4f}")
        settings = fit_settings(args, "val_loss", "min", unfinished, runtime)
        fitted = fit(model, sonnet_loss, batches, score, keep, *settings)

    # Predict
    imported = args.import_peft if args.predict_only else None
    best = {"epoch": "imported"} if imported else checkpoint.load()
    final = score.final()
    samples = [poet.write(data.held_out, sample) for sample in range(args.num_samples)]
    if not runtime.is_main:
        return

    # Write
    files = {"adapter": imported or checkpoint.path} | write_samples(args.sonnet_out, samples)
    if not args.predict_only:
        final = {"val_loss_before_training": untrained} | final
        record = write_sonnet_record(args.sonnet_out.parent, vars(args), lora, fitted, final)
        files = record | files
    exports = args.export_peft, args.export_merged
    files |= write_exports(gpt, lora, args.model_path or args.model_size, tokenizer, *exports)
    if unfinished:
        unfinished.remove()
    print(format_table(sonnet_table(best["epoch"], final) | files))


if __name__ == "__main__":
    run(main)
