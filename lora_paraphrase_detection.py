"""Fine-tune GPT-2 with LoRA to tell whether two questions ask the same thing.

python lora_paraphrase_detection.py --demo          # bundled model and data, on a CPU
python lora_paraphrase_detection.py --use_gpu       # gpt2 on the Quora files in data/
python lora_paraphrase_detection.py --use_gpu --predict_only
"""

import argparse

import torch

import datasets
from finetune import arguments, ending, loop, metrics, outputs, peft_format, runtime
from finetune.early_stopping import EarlyStopper, EarlyStoppingConfig
from finetune.run import Run
from models.gpt2 import GPT2Model
from models.paraphrase_gpt import ParaphraseGPT, paraphrase_loss
from models.tokenizer import load_tokenizer
from modules.adapters import trainable
from modules.lora import LoRAConfig

DEFAULTS = {"epochs": 3, "batch_size": 12, "lr": 1e-4, "weight_decay": 0.01}
DEFAULTS |= {"lora_rank": 8, "lora_alpha": 16.0, "lora_dropout": 0.1}
DEMO = {"model_size": "gpt2-nano", "epochs": 4, "lr": 2e-3, "lr_schedule": "linear"}
DEMO |= {"warmup_ratio": 0.1}
DEMO |= {
    "para_train": arguments.project_path("data/sample-pairs-train.csv"),
    "para_dev": arguments.project_path("data/sample-pairs-dev.csv"),
    "para_test": arguments.project_path("data/sample-pairs-test.csv"),
}


def get_args() -> argparse.Namespace:
    return arguments.parse(
        __doc__, task="paraphrase", adapter=LoRAConfig, defaults=DEFAULTS, demo=DEMO
    )


def main(args: argparse.Namespace) -> None:
    machine = runtime.start(arguments.config(runtime.RuntimeConfig, args), args.seed)
    lora = arguments.config(LoRAConfig, args, prefix="lora_")
    run = Run.open(vars(args), task="paraphrase", adapter=lora, runtime=machine)

    # Load
    gpt = GPT2Model.from_pretrained(run.base_folder)
    tokenizer = load_tokenizer(run.base_folder, gpt.config.vocab_size)
    n_positions = gpt.config.n_positions
    train = datasets.load_pairs(args.para_train, tokenizer, n_positions, limit=args.limit_train)
    dev = datasets.load_pairs(args.para_dev, tokenizer, n_positions, limit=args.limit_dev)
    test = datasets.load_pairs(
        args.para_test, tokenizer, n_positions, limit=args.limit_dev, has_labels=False
    )

    # Build
    lora = peft_format.start_lora(gpt, lora, args.import_peft)
    model = ParaphraseGPT(gpt, datasets.answer_ids(tokenizer))
    machine.prepare(model)
    scorer = metrics.ParaphraseScorer(model, dev, machine)

    # Fit
    fitted = None if args.predict_only else fit(args, run, model, train, scorer)

    # Predict
    best_epoch = run.load_adapter(model)
    final = scorer.final()
    test_logits = metrics.paraphrase_logits(model, test, machine, "test")

    # Write
    if machine.is_main:
        record = run.record(lora, best_epoch, fitted, final)
        contents = outputs.paraphrase_files(
            record, dev=dev, dev_logits=scorer.logits, test=test, test_logits=test_logits
        )
        files = run.write(record, contents)
        files |= peft_format.write_exports(run, gpt, lora, tokenizer)
        run.finish()
        print(outputs.format_table(record, files))


def fit(
    args: argparse.Namespace,
    run: Run,
    model: ParaphraseGPT,
    train: datasets.TokenizedPairs,
    scorer: metrics.ParaphraseScorer,
) -> loop.Fitted:
    """Train the adapter; dev accuracy decides which epoch is saved and when to stop."""
    optimizer = torch.optim.AdamW(
        trainable(model), lr=args.lr, weight_decay=args.weight_decay, eps=1e-6, fused=True
    )
    early_stopping = arguments.config(EarlyStoppingConfig, args)
    return loop.fit(
        model=model,
        loss_function=paraphrase_loss,
        optimizer=optimizer,
        batches=datasets.PairBatches(train, args.batch_size, args.seed),
        evaluate=scorer,
        stopper=EarlyStopper("dev_accuracy", "max", early_stopping),
        save_best=lambda record: run.save_adapter(model, record),
        config=arguments.config(loop.FitConfig, args),
        runtime=run.runtime,
        resume=run.resume,
        log=run.log,
    )


if __name__ == "__main__":
    args = get_args()
    advice = "" if args.predict_only else ending.RESUME_ADVICE
    ending.run(lambda: main(args), debug=args.debug, advice=advice)
