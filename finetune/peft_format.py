"""LoRA in the formats of others: PEFT adapters in and out, merged Hugging Face checkpoints out."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.files import new_folder
from models.gpt2 import GPT2Model
from models.pretrained import BUNDLED, HF_NAMES, read_json, read_tensors, save_gpt2
from modules.adapters import adapter_state, load_adapter_state
from modules.lora import FUSED, LoRAConfig, LoRALinear, add_lora, merge_lora
from modules.settings import UserError

if TYPE_CHECKING:
    from transformers import GPT2TokenizerFast

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QKV = "self_attention.qkv"
TARGETS_OF = {  # layer of a block -> its targets, in the order of its rows
    QKV: FUSED,
    "attention_dense": ("attention_dense",),
    "interm_dense": ("interm_dense",),
    "out_dense": ("out_dense",),
}
KEY = re.compile(r"base_model\.model\.(?:transformer\.)?h\.(\d+)\.(.+)\.lora_([AB])\.weight")
REFUSED = {  # key of adapter_config.json -> values that change nothing, and what others mean
    "peft_type": (("LORA",), "another method than LoRA"),
    "use_dora": ((False,), "DoRA"),
    "use_qalora": ((False,), "QALoRA"),
    "use_bdlora": ((None,), "block-diagonal LoRA"),
    "bias": (("none",), "trained biases"),
    "lora_bias": ((False,), "biases of its own"),
    "modules_to_save": ((None, []), "whole layers that were trained and saved"),
    "trainable_token_indices": ((None, [], {}), "trained embeddings"),
    "target_parameters": ((None, []), "adapters of single parameters"),
    "layer_replication": ((None, []), "replicated layers"),
    "alora_invocation_tokens": ((None, []), "activated LoRA"),
    "arrow_config": ((None,), "Arrow routing"),
    "kasa_config": ((None,), "KaSA"),
    "monteclora_config": ((None,), "MonteCLoRA"),
    "init_lora_weights": ((True, False, "gaussian", "eva", "orthogonal"), "changed base weights"),
}


@dataclass(frozen=True)
class LowRank:
    """scale * B A, with A [R,in] and B [out,R]: the change of one target of one layer."""

    A: Tensor
    B: Tensor
    scale: float


def export_peft(gpt: GPT2Model, config: LoRAConfig, base: str | Path, folder: Path) -> None:
    """Write the adapter of a GPT-2 with LoRA so that PEFT loads it onto `GPT2LMHeadModel`.

    The adapters of query, key and value become one of `c_attn`, of two or three times the rank:
    their A one below the other, their B on the diagonal.
    """
    tensors, modules = {}, {}
    for i, layer in enumerate(gpt.gpt_layers):
        for name, module in layer.named_modules():
            if isinstance(module, LoRALinear):
                key = f"base_model.model.transformer.h.{i}.{HF_NAMES[name]}"
                A, B = module.lora_A.detach(), module.block_B().detach()
                tensors[f"{key}.lora_A.weight"] = A.cpu().contiguous()
                tensors[f"{key}.lora_B.weight"] = B.cpu().contiguous()
                modules[HF_NAMES[name]] = sum(module.parts)
    wider = {name: n for name, n in modules.items() if n > 1}
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(BUNDLED if base == "gpt2-nano" else base),
        "target_modules": list(modules),
        "layers_to_transform": None if config.layers is None else list(config.layers),
        "layers_pattern": None if config.layers is None else "h",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "rank_pattern": {name: n * config.rank for name, n in wider.items()},
        "alpha_pattern": {name: n * config.alpha for name, n in wider.items()},
        "lora_dropout": config.dropout,
        "fan_in_fan_out": True,
        "bias": "none",
        "inference_mode": True,
    }
    with new_folder(folder) as temporary:
        (temporary / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})


def export_merged(
    gpt: GPT2Model,
    config: LoRAConfig,
    base: str | Path,
    tokenizer: "GPT2TokenizerFast",
    folder: Path,
) -> None:
    """Write base and LoRA as one Hugging Face checkpoint in float32, with the tokenizer.

    The base is read again: the run's copy may have been rounded to its precision.
    """
    merged = GPT2Model.from_pretrained(base)
    add_lora(merged, config)
    load_adapter_state(merged, adapter_state(gpt))
    merge_lora(merged)
    with new_folder(folder) as temporary:
        save_gpt2(merged, temporary, tokenizer.eos_token_id, torch.float32)
        tokenizer.save_pretrained(temporary)


def write_exports(
    gpt: GPT2Model,
    config: LoRAConfig,
    base: str | Path,
    tokenizer: "GPT2TokenizerFast",
    peft_folder: Path | None,
    merged_folder: Path | None,
) -> dict[str, Path]:
    """Write the formats whose folder is given; returns the folders."""
    written = {}
    if peft_folder:
        export_peft(gpt, config, base, peft_folder)
        written["PEFT adapter"] = peft_folder
    if merged_folder:
        export_merged(gpt, config, base, tokenizer, merged_folder)
        written["merged model"] = merged_folder
    return written


def start_lora(gpt: GPT2Model, config: LoRAConfig, peft_folder: Path | None) -> LoRAConfig:
    """Put LoRA into a loaded GPT-2, fresh, or with the weights of a PEFT adapter.

    Of an adapter read in, rank, alpha, targets and layers replace those of `config`; the config
    of what was put in is returned.
    """
    if peft_folder is None:
        add_lora(gpt, config)
        return config
    parts = dict(_parts(gpt, read_peft(peft_folder)))
    first = next(iter(parts.values()))
    rank = max(part.A.shape[0] for part in parts.values())
    layers = tuple(sorted({layer for layer, _, _ in parts}))
    targets = {target for _, _, target in parts}
    config = replace(
        config,
        rank=rank,
        alpha=first.scale * rank,
        targets=tuple(t for group in TARGETS_OF.values() for t in group if t in targets),
        layers=None if len(layers) == len(gpt.gpt_layers) else layers,
    )
    add_lora(gpt, config)
    for (layer, name, target), part in parts.items():
        _fill(gpt.gpt_layers[layer].get_submodule(name), TARGETS_OF[name].index(target), part)
    return config


def read_peft(folder: Path) -> dict[tuple[int, str], LowRank]:
    """The adapters of a PEFT LoRA folder, by layer and name in it.

    Raises UserError for what is no such folder, and for what this project's LoRA is not.
    """
    config = _read_config(folder)
    matrices: dict[tuple[int, str], dict[str, Tensor]] = {}
    own_names = {stored: name for name, stored in HF_NAMES.items() if name in TARGETS_OF}
    for key, tensor in read_tensors(folder / WEIGHTS):
        match = KEY.fullmatch(key)
        if not match or match[2] not in own_names or tensor.ndim != 2:
            raise UserError(
                f"{folder / WEIGHTS}: {key} is no LoRA of a linear layer of a GPT-2 block, which "
                "is all that can be read"
            )
        if not tensor.isfinite().all():
            raise UserError(f"{folder / WEIGHTS}: {key} has values that are not finite")
        place = int(match[1]), own_names[match[2]]
        matrices.setdefault(place, {})[match[3]] = tensor.float()
    if not matrices:
        raise UserError(f"{folder / WEIGHTS} holds no adapter")
    adapters = {}
    for (layer, name), pair in sorted(matrices.items()):
        where = f"{folder / WEIGHTS}: layer {layer}, {HF_NAMES[name]}"
        rank = pair["A"].shape[0] if len(pair) == 2 else 0
        if not rank or pair["B"].shape[1] != rank:
            raise UserError(f"{where}: A and B do not belong together")
        alpha = _alpha(config, f"transformer.h.{layer}.{HF_NAMES[name]}", folder / CONFIG)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        adapters[layer, name] = LowRank(pair["A"], pair["B"], scale)
    return adapters


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.exists():
        raise UserError(f"{folder} is no PEFT adapter: no {CONFIG} in it")
    config = read_json(path)
    if not isinstance(config.get("lora_alpha"), int | float):
        raise UserError(f"{path} is no configuration of a LoRA adapter: no lora_alpha in it")
    for key, (allowed, meaning) in REFUSED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"{path}: {key} is {config[key]!r}: this LoRA cannot represent {meaning}"
            )
    return config


def _alpha(config: dict[str, Any], module: str, path: Path) -> float:
    """A module's alpha: PEFT takes the first pattern that is the end of its name."""
    patterns = config.get("alpha_pattern") or {}
    try:
        matching = (p for p in patterns if re.match(rf"(.*\.)?({p})$", module))
        alpha = float(patterns.get(next(matching, None), config["lora_alpha"]))
    except (re.error, AttributeError, TypeError, ValueError):
        raise UserError(f"{path}: {patterns!r} is no alpha_pattern") from None
    if not math.isfinite(alpha):
        raise UserError(f"{path}: an alpha is {alpha}")
    return alpha


def _parts(
    gpt: GPT2Model, adapters: dict[tuple[int, str], LowRank]
) -> Iterator[tuple[tuple[int, str, str], LowRank]]:
    """Layer, name and target with the adapter of this target only; checks the shapes."""
    for (layer, name), adapter in adapters.items():
        if layer >= len(gpt.gpt_layers):
            raise UserError(
                f"the PEFT adapter has a layer {layer}, the model 0 to {len(gpt.gpt_layers) - 1}"
            )
        shape = list(gpt.gpt_layers[layer].get_submodule(name).weight.shape)
        if [adapter.B.shape[0], adapter.A.shape[1]] != shape:
            raise UserError(
                f"the PEFT adapter of layer {layer}, {HF_NAMES[name]}, changes a weight of "
                f"{[adapter.B.shape[0], adapter.A.shape[1]]}, the model's is {shape}"
            )
        targets = TARGETS_OF[name]
        for target, part in zip(targets, _split(adapter, len(targets)), strict=True):
            if part:
                yield (layer, name, target), part


def _split(adapter: LowRank, n: int) -> list[LowRank | None]:
    """The adapters of the n layers that a fused one consists of; None for one without.

    Each has the same A and its rows of B; but where B is block-diagonal, as `export_peft` makes
    it, its own part of A, too.
    """
    blocks = adapter.B.chunk(n)
    used = [i for i, block in enumerate(blocks) if block.any()]
    if used and len(adapter.A) % len(used) == 0:
        own_A = adapter.A.chunk(len(used))
        grid = [blocks[i].chunk(len(used), 1) for i in used]
        if not any(grid[i][j].any() for i in range(len(used)) for j in range(len(used)) if i != j):
            own = {i: replace(adapter, A=own_A[k], B=grid[k][k]) for k, i in enumerate(used)}
            return [own.get(i) for i in range(n)]
    return [replace(adapter, B=block) for block in blocks]


@torch.no_grad()
def _fill(layer: LoRALinear, part: int, adapter: LowRank) -> None:
    """Put an adapter into one part of a layer whose rank may be larger and scale another."""
    index = sum(layer.parts[:part])
    rank = adapter.A.shape[0]
    layer.lora_A.chunk(sum(layer.parts))[index][:rank] = adapter.A
    B = adapter.B * (adapter.scale / layer.scale)
    layer.lora_B.chunk(sum(layer.parts))[index][:, :rank] = B
