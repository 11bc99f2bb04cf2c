"""Fine-tune all weights, as a baseline for the adapters.

    python -m tests.benchmarks.full lora_paraphrase_detection --runs_dir runs-full --lr 3e-5 ...

This runs the LoRA script with the whole model in place of the adapter. Its runs need a folder of
their own, because they are named as those of LoRA.
"""

import importlib
import sys
from typing import Any
from unittest import mock

from torch import nn


def keep_all(gpt: nn.Module, config: Any, folder: Any) -> Any:
    """Replaces `start_lora`: every weight is trained."""
    gpt.requires_grad_(True)
    return config


def main() -> None:
    sys.argv = sys.argv[1:]
    script = importlib.import_module(sys.argv[0])
    with (
        mock.patch("finetune.peft_format.start_lora", keep_all),
        mock.patch("modules.adapters.is_adapter", return_value=True),
    ):
        script.main(script.get_args())


if __name__ == "__main__":
    main()
