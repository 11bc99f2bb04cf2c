"""Import and export LoRA as PEFT adapters, and export merged Hugging Face checkpoints."""

import contextlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.files import new_folder
from finetune.run import Run
from models.config import read_json
from models.gpt2 import GPT2Model
from models.pretrained import BUNDLED, HF_NAMES, read_tensors, save_gpt2
from modules.adapters import adapter_state, load_adapter_state
from modules.lora import FUSED, TARGETS, LoRAConfig, LoRALinear, add_lora, merge_lora
from modules.settings import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HF_TARGETS = {  # layer of a Hugging Face block -> its targets here, in row order
    "attn.c_attn": FUSED,
    "attn.c_proj": ("attention_dense",),
    "mlp.c_fc": ("interm_dense",),
    "mlp.c_proj": ("out_dense",),
}
KEY = re.compile(  # groups: adapted module, block, layer in the block, A or B
    r"base_model\.model\.((?:transformer\.)?h\.(\d{1,4})\."
    rf"({'|'.join(map(re.escape, HF_TARGETS))}))\.lora_([AB])\.weight"
)
ALLOWED_VALUES = {  # key of adapter_config.json -> its values for plain LoRA
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal", "mica"),  # others change the base
}
# Keys that are read, or that do not change the effect of given tensors.
IGNORED_KEYS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "merge_weights",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """scale * B A, with A [R,in] and B [out,R]: the update to one target of one layer."""

    A: Tensor
    B: Tensor
    scale: float


def export_peft(gpt: GPT2Model, config: LoRAConfig, base: str | Path, folder: Path) -> None:
    """Write the adapter of a GPT-2 with LoRA so that PEFT can load it into `GPT2LMHeadModel`.

    The adapters of query, key and value become one adapter of `c_attn` with two or three times the
    rank: the A matrices are stacked, and B is block-diagonal.
    """
    tensors, n_parts = {}, {}
    for layer, name, module in _lora_layers(gpt):
        key = f"base_model.model.transformer.h.{layer}.{name}"
        tensors[f"{key}.lora_A.weight"] = module.lora_A.detach().cpu().contiguous()
        tensors[f"{key}.lora_B.weight"] = module.block_B().detach().cpu().contiguous()
        n_parts[name] = sum(module.parts)
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(BUNDLED if base == "gpt2-nano" else base),
        "target_modules": list(n_parts),
        "layers_to_transform": config.layers,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "rank_pattern": {name: n * config.rank for name, n in n_parts.items()},
        "alpha_pattern": {name: n * config.alpha for name, n in n_parts.items()},
        "lora_dropout": config.dropout,
        "fan_in_fan_out": True,
    }
    with new_folder(folder) as temporary:
        (temporary / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})


def export_merged(
    gpt: GPT2Model,
    config: LoRAConfig,
    base: str | Path,
    tokenizer: "PreTrainedTokenizerFast",
    folder: Path,
) -> None:
    """Write base and LoRA merged as a Hugging Face checkpoint in float32, with the tokenizer.

    The base is read again, because the run's copy may have been rounded to a lower precision.
    """
    merged = GPT2Model.from_pretrained(base)
    add_lora(merged, config)
    load_adapter_state(merged, adapter_state(gpt))
    merge_lora(merged)
    with new_folder(folder) as temporary:
        save_gpt2(merged, temporary, tokenizer.eos_token_id, torch.float32)
        tokenizer.save_pretrained(temporary)


def write_exports(
    run: Run, gpt: GPT2Model, config: LoRAConfig, tokenizer: "PreTrainedTokenizerFast"
) -> dict[str, Path]:
    """Write the formats that the run's flags ask for; returns their folders."""
    base = run.flags["model_path"]
    base = base.absolute() if base else run.flags["model_size"]
    peft_folder, merged_folder = run.flags["export_peft"], run.flags["export_merged"]
    if peft_folder:
        export_peft(gpt, config, base, peft_folder)
    if merged_folder:
        export_merged(gpt, config, base, tokenizer, merged_folder)
    folders = {"PEFT adapter": peft_folder, "merged model": merged_folder}
    return {name: folder for name, folder in folders.items() if folder}


@torch.no_grad()
def start_lora(gpt: GPT2Model, config: LoRAConfig, peft_folder: Path | None) -> LoRAConfig:
    """Add LoRA to a loaded GPT-2, either freshly initialized or read from a PEFT adapter.

    A PEFT adapter's rank, alpha, targets and layers replace those of `config`; returns the config
    that was used.
    """
    if peft_folder is None:
        add_lora(gpt, config)
        return config
    parts = read_peft(peft_folder)
    rank = max(len(part.A) for part in parts.values())
    layers, targets = map(set, zip(*parts, strict=True))
    config = replace(
        config,
        rank=rank,
        alpha=next(iter(parts.values())).scale * rank,
        targets=tuple(target for target in TARGETS if target in targets),
        layers=None if layers == {*range(len(gpt.gpt_layers))} else tuple(sorted(layers)),
    )
    add_lora(gpt, config)
    for layer, name, module in _lora_layers(gpt):
        targets = compress(HF_TARGETS[name], module.parts)
        _fill(module, [parts.get((layer, target)) for target in targets], f"block {layer}, {name}")
    return config


def _lora_layers(gpt: GPT2Model) -> Iterator[tuple[int, str, LoRALinear]]:
    """Yield the block index, Hugging Face name and module of each layer with LoRA."""
    for i, block in enumerate(gpt.gpt_layers):
        for name, module in block.named_modules():
            if isinstance(module, LoRALinear):
                yield i, HF_NAMES[name], module


def _fill(module: LoRALinear, parts: list[LowRank | None], where: str) -> None:
    """Copy adapters into the parts of a layer; rows that one lacks keep their initial values."""
    n = len(parts)
    for part, A, B in zip(parts, module.lora_A.chunk(n), module.lora_B.chunk(n), strict=True):
        if part is None:
            continue
        changed, shape = [len(part.B), part.A.shape[1]], [len(B), A.shape[1]]
        if changed != shape:
            raise UserError(
                f"the PEFT adapter of {where} fits a weight of {changed}, not the model's {shape}"
            )
        A[: len(part.A)] = part.A
        B[:, : len(part.A)] = part.B * (part.scale / module.scale)


def read_peft(folder: Path) -> dict[tuple[int, str], LowRank]:
    """The adapters of a PEFT LoRA folder, by block index and target.

    Raises UserError if it is not such a folder, or uses features that this project's LoRA lacks.
    """
    config = _read_config(folder)
    path = folder / WEIGHTS
    if not path.exists() and (old := path.with_suffix(".bin")).exists():  # PEFT before 0.7
        path = old
    modules: dict[tuple[int, str, str], dict[str, Tensor]] = {}
    for key, tensor in read_tensors(path):
        match = KEY.fullmatch(key.replace("_orig_mod.", ""))  # a prefix from torch.compile
        if not match:
            raise UserError(f"{path}: {key} is not a LoRA weight of a GPT-2 block's linear layer")
        module, layer, name, matrix = match.groups()
        pair = modules.setdefault((int(layer), name, module), {})
        pair[matrix] = tensor.float()
        if tensor.ndim != 2 or not tensor.numel() or not pair[matrix].isfinite().all():
            raise UserError(f"{path}: {key} must be a non-empty matrix of finite numbers")
    if not modules:
        raise UserError(f"{path} contains no adapter")
    parts = {}
    for (layer, name, module), pair in sorted(modules.items()):
        if len(pair) < 2 or len(pair["A"]) != pair["B"].shape[1]:
            raise UserError(f"{path}: {module} must have an A and a B of the same rank")
        rank = math.sqrt(len(pair["A"])) if config.get("use_rslora") else len(pair["A"])
        adapter = LowRank(**pair, scale=_alpha(config, module, folder / CONFIG) / rank)
        for target, part in _split(adapter, HF_TARGETS[name]).items():
            parts[layer, target] = part
    return parts


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.exists():
        raise UserError(f"{folder} is not a PEFT adapter: it has no {CONFIG}")
    config = read_json(path)
    if not isinstance(config.get("lora_alpha"), int | float):
        raise UserError(f"{path} does not configure a LoRA adapter: it has no numeric lora_alpha")
    for key, value in config.items():
        if value and key not in IGNORED_KEYS and value not in ALLOWED_VALUES.get(key, ()):
            raise UserError(f"{path}: {key} is {value!r:.60}, but only plain LoRA can be read")
    return config


def _alpha(config: dict[str, Any], module: str, path: Path) -> float:
    """A module's alpha: as in PEFT, the first pattern that matches the end of its name applies."""
    patterns = config.get("alpha_pattern") or {}
    with contextlib.suppress(Exception):  # an invalid pattern can raise many kinds of error
        matching = (p for p in patterns if re.match(rf"(.*\.)?({p})$", module))
        alpha = float(patterns.get(next(matching, None), config["lora_alpha"]))
        if math.isfinite(alpha) and alpha > 0:
            return alpha
    raise UserError(f"{path}: lora_alpha and alpha_pattern give {module} no finite, positive alpha")


def _split(adapter: LowRank, targets: tuple[str, ...]) -> dict[str, LowRank]:
    """Split a layer's adapter by target: each gets its rows of B without the all-zero columns.

    So each target gets its own rows of an A that `export_peft` stacked. A fresh adapter, whose B is
    zero, goes to all targets in full.
    """
    parts = {}
    blocks = dict(zip(targets, adapter.B.chunk(len(targets)), strict=False))
    for target, B in blocks.items():
        used = B.any(dim=0)
        if used.any():
            parts[target] = LowRank(adapter.A[used], B[:, used], adapter.scale)
    return parts or {target: replace(adapter, B=B) for target, B in blocks.items()}
