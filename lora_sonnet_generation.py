"""Fine-tune GPT-2 with LoRA on Shakespeare's sonnets and let it continue others.

python lora_sonnet_generation.py --demo             # bundled model and data, on a CPU
python lora_sonnet_generation.py --use_gpu          # gpt2
python lora_sonnet_generation.py --use_gpu --predict_only --temperature 0.9 --num_samples 5
"""

import argparse
from dataclasses import asdict
from itertools import chain

from datasets import SonnetBatches, load_sonnets
from finetune.arguments import (
    DATA,
    add_fit_arguments,
    add_lora_arguments,
    add_model_arguments,
    add_run_arguments,
    add_sampling_arguments,
    add_sonnet_data_arguments,
    checkpoint_path,
    config_from,
    model_name,
    parse_args,
)
from finetune.checkpoint import load_adapter, save_adapter
from finetune.early_stopping import EarlyStopper, EarlyStoppingConfig
from finetune.loop import FitConfig, fit
from finetune.predictions import (
    format_sonnet,
    format_table,
    sonnet_table,
    write_metrics,
    write_sonnets,
)
from finetune.runtime import make_runtime, run, seed_everything
from finetune.sampling import Poet, SamplingConfig
from finetune.sonnet_metrics import SonnetScorer, next_token_loss, sonnet_form
from models.pretrained import find_checkpoint, load_gpt2, load_tokenizer
from models.sonnet_gpt import SonnetGPT, sonnet_loss
from modules.adapters import describe_parameters
from modules.lora import LoRAConfig, add_lora

DEMO = {
    "model_size": "gpt2-nano",
    "sonnet_path": DATA / "sonnets.txt",
    "held_out_sonnet_path": DATA / "sonnets_held_out.txt",
    "dev_sonnet_path": DATA / "sonnets_held_out_dev.txt",
    "dev_gold_path": DATA / "TRUE_sonnets_held_out_dev.txt",
    "epochs": 4,
    "lr": 2e-3,
    "lr_schedule": "linear",
    "warmup_ratio": 0.1,
    "temperature": 0.9,
}


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sonnet_data_arguments(parser, "lora")
    add_model_arguments(parser)
    add_lora_arguments(parser)
    add_fit_arguments(parser, batch_size=4)
    add_sampling_arguments(parser)
    add_run_arguments(parser)
    parser.set_defaults(epochs=10, lr=1.5e-4, lora_rank=4)
    return parse_args(parser, DEMO)


def main() -> None:
    args = get_args()
    runtime = make_runtime(args.use_gpu, args.precision)
    seed_everything(args.seed)

    # Load
    folder = find_checkpoint(args.model_path or args.model_size)
    gpt = load_gpt2(folder)
    tokenizer = load_tokenizer(folder)
    paths = (args.sonnet_path, args.dev_sonnet_path, args.dev_gold_path, args.held_out_sonnet_path)
    limits = (args.limit_train, args.limit_dev)
    data = load_sonnets(*paths, limits, args.seed, tokenizer, gpt.config.n_positions)
    print(data.summary())

    # Build
    lora = config_from(LoRAConfig, args, "lora_")
    add_lora(gpt, lora)
    model = SonnetGPT(gpt).to(runtime.device)
    if args.compile:
        model.compile(dynamic=True)
    print(f"{describe_parameters(model)}, on {runtime.device}")
    checkpoint = checkpoint_path(args, "lora", lora.rank, "sonnet")
    same = {"method": "lora", "model": model_name(args), "rank": lora.rank, "alpha": lora.alpha}
    poet = Poet(gpt, tokenizer, config_from(SamplingConfig, args), args.seed, runtime)
    score = SonnetScorer(model, poet, data)

    # Fit
    def keep(record: dict) -> None:
        save_adapter(checkpoint, model, asdict(lora) | same | record)
        print(*map(format_sonnet, score.poems[:2]), sep="")

    if not args.predict_only:
        untrained = next_token_loss(model, data.validation_ids, runtime)
        print(f"validation loss before training {untrained:.4f}")
        history, measured = fit(
            model,
            sonnet_loss,
            SonnetBatches(data.train_ids, args.batch_size, args.seed),
            score,
            keep,
            config_from(FitConfig, args),
            EarlyStopper("val_loss", "min", config_from(EarlyStoppingConfig, args)),
            runtime,
        )

    # Predict
    best = load_adapter(checkpoint, model, same)
    metrics = score()
    form, gold_form = (sonnet_form(poems, data.train) for poems in (score.poems, data.gold))
    samples = [poet.write(data.held_out, sample) for sample in range(args.num_samples)]

    # Write
    write_sonnets(args.sonnet_out, samples[0])
    table = sonnet_table(best["epoch"], metrics, form, gold_form)
    if not args.predict_only:
        path = args.sonnet_out.parent / "lora-sonnet-metrics.json"
        final = {"val_loss_before_training": untrained} | metrics | form
        write_metrics(path, vars(args), history, final | {"shakespeare": gold_form}, measured)
        table = {"val loss before training": f"{untrained:.4f}"} | table | measured
        table["metrics"] = path
    table |= {"checkpoint": checkpoint, "sonnets": args.sonnet_out}
    if args.num_samples > 1:
        table["samples"] = args.sonnet_out.with_stem(f"{args.sonnet_out.stem}_samples")
        write_sonnets(table["samples"], chain(*zip(*samples, strict=True)))
    print(format_table(table))


if __name__ == "__main__":
    run(main)
