"""Fine-tune GPT-2 with ReFT on Shakespeare's sonnets and let it continue others.

python reft_sonnet_generation.py --demo             # bundled model and data, on a CPU
python reft_sonnet_generation.py --use_gpu          # gpt2
python reft_sonnet_generation.py --use_gpu --predict_only --temperature 0.9 --num_samples 5
"""

import argparse

import torch

import datasets
from finetune import arguments, ending, loop, metrics, outputs, runtime
from finetune.early_stopping import EarlyStopper, EarlyStoppingConfig
from finetune.generation import SonnetGenerator
from finetune.run import Run
from finetune.sampling import SamplingConfig
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT, sonnet_loss
from models.tokenizer import load_tokenizer, unused_ids
from modules.adapters import trainable
from modules.reft import ReFTConfig, add_reft

DEFAULTS = {"epochs": 10, "batch_size": 4, "lr": 1.5e-4, "weight_decay": 0.01}
DEFAULTS |= {"reft_rank": 4, "reft_alpha": 16.0, "reft_dropout": 0.1}
DEFAULTS |= {"temperature": 1.2, "top_p": 0.9}
DEMO = {"model_size": "gpt2-nano", "epochs": 4, "lr": 3e-3, "lr_schedule": "linear"}
DEMO |= {"warmup_ratio": 0.1, "temperature": 0.9}


def get_args() -> argparse.Namespace:
    return arguments.parse(__doc__, task="sonnet", adapter=ReFTConfig, defaults=DEFAULTS, demo=DEMO)


def main(args: argparse.Namespace) -> None:
    machine = runtime.start(arguments.config(runtime.RuntimeConfig, args), args.seed)
    reft = arguments.config(ReFTConfig, args, prefix="reft_")
    run = Run.open(vars(args), task="sonnet", adapter=reft, runtime=machine)

    # Load
    gpt = GPT2Model.from_pretrained(run.base_folder)
    tokenizer = load_tokenizer(run.base_folder, gpt.config.vocab_size)
    sonnets = datasets.load_sonnets(
        train=args.sonnet_path,
        dev=args.dev_sonnet_path,
        gold=args.dev_gold_path,
        held_out=args.held_out_sonnet_path,
        limit_train=args.limit_train,
        limit_dev=args.limit_dev,
        seed=args.seed,
        tokenizer=tokenizer,
        max_length=gpt.config.n_positions,
    )

    # Build
    add_reft(gpt, reft)
    gpt.suppress_tokens(unused_ids(tokenizer, gpt.config.vocab_size))
    model = SonnetGPT(gpt)
    machine.prepare(model)
    sampling = arguments.config(SamplingConfig, args)
    generator = SonnetGenerator(gpt, tokenizer, sampling, args.seed, machine)
    scorer = metrics.SonnetScorer(model, generator, sonnets)

    # Fit
    untrained = {} if args.predict_only else scorer.before_training()
    fitted = None if args.predict_only else fit(args, run, model, sonnets, scorer)

    # Predict
    best_epoch = run.load_adapter(model)
    final = untrained | scorer.final()
    samples = [generator.write(sonnets.held_out, sample) for sample in range(args.num_samples)]

    # Write
    if machine.is_main:
        record = run.record(reft, best_epoch, fitted, final)
        contents = outputs.sonnet_files(record, samples, dev=scorer.poems, gold=sonnets.gold)
        files = run.write(record, contents)
        run.finish()
        print(outputs.format_table(record, files))


def fit(
    args: argparse.Namespace,
    run: Run,
    model: SonnetGPT,
    sonnets: datasets.SonnetData,
    scorer: metrics.SonnetScorer,
) -> loop.Fitted:
    """Train the adapter; validation loss decides which epoch is saved and when to stop."""

    def save_best(record: dict) -> None:
        run.save_adapter(model, record)
        print(*map(outputs.format_sonnet, scorer.poems[:2]), sep="")

    optimizer = torch.optim.AdamW(
        trainable(model), lr=args.lr, weight_decay=args.weight_decay, eps=1e-6, fused=True
    )
    early_stopping = arguments.config(EarlyStoppingConfig, args)
    return loop.fit(
        model=model,
        loss_function=sonnet_loss,
        optimizer=optimizer,
        batches=datasets.SonnetBatches(sonnets.train_ids, args.batch_size, args.seed),
        evaluate=scorer,
        stopper=EarlyStopper("val_loss", "min", early_stopping),
        save_best=save_best,
        config=arguments.config(loop.FitConfig, args),
        runtime=run.runtime,
        resume=run.resume,
        log=run.log,
    )


if __name__ == "__main__":
    args = get_args()
    advice = "" if args.predict_only else ending.RESUME_ADVICE
    ending.run(lambda: main(args), debug=args.debug, advice=advice)
