"""Find, read and write GPT-2 checkpoints in Hugging Face format: bundled, local or on the hub."""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.config import SIZES, GPT2Config, first_line, read_config, read_json
from models.tokenizer import TOKENIZER_FILES, has_tokenizer
from modules.adapters import is_adapter
from modules.settings import UserError

BUNDLED = Path(__file__).resolve().parent / "gpt2-nano"

HF_NAMES = {  # ours -> Hugging Face's, within a layer and outside
    "word_embedding": "wte",
    "pos_embedding": "wpe",
    "final_layer_norm": "ln_f",
    "attention_layer_norm": "ln_1",
    "self_attention.qkv": "attn.c_attn",
    "attention_dense": "attn.c_proj",
    "out_layer_norm": "ln_2",
    "interm_dense": "mlp.c_fc",
    "out_dense": "mlp.c_proj",
}
# Hugging Face stores these four as Conv1D: [in, out], the transpose of a linear layer's weight.
CONV1D_WEIGHT = re.compile(r"(c_attn|c_proj|c_fc)\.weight$")
# Causal masks in old checkpoints.
IGNORED = re.compile(r"^h\.\d+\.attn\.(masked_)?bias$")
# Heads of GPT2ForSequenceClassification, ...ForTokenClassification, ...ForQuestionAnswering,
# ...DoubleHeadsModel, and of TRL's models with a value head.
TASK_HEAD = re.compile(r"^(score|classifier|qa_outputs|multiple_choice_head|v_head)\.")
HUB_FILES = ["config.json", "model.safetensors", "vocab.json", "merges.txt"]


def find_checkpoint(name_or_folder: str | Path) -> Path:
    """The folder of a checkpoint, given the name of a size in SIZES or the folder itself.

    A Path is always a folder, even if it has the name of a size. Sizes other than the bundled one
    come from the Hugging Face cache or, failing that, the hub. Raises UserError if there is no such
    folder or size, or the hub does not answer.
    """
    if name_or_folder == "gpt2-nano":
        return BUNDLED
    if name_or_folder in SIZES:
        return _find_in_cache(name_or_folder) or _fetch(name_or_folder)
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    if str(name_or_folder) in SIZES:
        raise UserError(
            f"there is no folder {name_or_folder}; for the model of that name, use --model_size"
        )
    sizes = ", ".join(SIZES)
    raise UserError(
        f"{name_or_folder} is neither a folder nor one of the models {sizes}; for another model on "
        "the hub, run `hf download MODEL --local-dir FOLDER` and pass --model_path FOLDER"
    )


def _find_in_cache(name: str) -> Path | None:
    """The complete snapshot of a size in the Hugging Face cache, under either of its names."""
    from huggingface_hub import try_to_load_from_cache

    for repository in (name, f"openai-community/{name}"):
        config = try_to_load_from_cache(repository, "config.json")
        if isinstance(config, str):
            folder = Path(config).parent
            weights = _weight_files(folder)
            if weights and all(path.exists() for path in weights) and has_tokenizer(folder):
                return folder
    return None


def _fetch(name: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    try:
        HfApi().model_info(name, timeout=5)  # offline, a download would retry for 30 s
        return Path([hf_hub_download(name, file) for file in HUB_FILES][0]).parent
    except Exception as error:  # an unusable proxy or address can raise anything
        raise UserError(
            f"{name} is not in the Hugging Face cache and could not be fetched from the hub "
            f"({type(error).__name__}: {first_line(error)}): pass the folder of a GPT-2 checkpoint "
            "(--model_path) or use the bundled model (--model_size gpt2-nano)"
        ) from error


def load_config(folder: Path) -> GPT2Config:
    """Read a checkpoint's `config.json`; raises UserError if the checkpoint cannot be used."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} is not a GPT-2 checkpoint: it has no config.json")
    config, weights = read_config(path), _weight_files(folder)
    if not weights:
        raise UserError(
            f"{folder} has no weights: no model.safetensors or pytorch_model.bin, whole or sharded"
        )
    for file in weights:
        _check_readable(file)
    layer = 12 * config.n_embd**2  # its matrices only
    least = config.n_layer * layer + (config.vocab_size + config.n_positions) * config.n_embd
    size = sum(file.stat().st_size for file in weights)
    if least > max(size, 10**8):  # before allocating memory that may not be there
        raise UserError(
            f"{path} describes over {least:,} parameters, but the weights have {size:,} bytes"
        )
    return config


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load weights into a GPT2Model on the meta device, in float32, checking all names and shapes.

    A task head is ignored, and its tensors' names are printed.
    """
    model.to_empty(device="cpu")
    parameters = {hf_name(name): parameter for name, parameter in model.named_parameters()}
    missing, unexpected, task_head = set(parameters), [], []
    for path in _weight_files(folder):
        for stored_name, tensor in read_tensors(path):
            name = stored_name.removeprefix("transformer.")
            name = "wte.weight" if name == "lm_head.weight" else name  # tied weights
            if name in parameters:
                weight = parameters[name].data
                tensor = _fitting(tensor, weight.shape, f"{path}: {stored_name}", name)
                if name in missing:
                    weight.copy_(tensor)
                    missing.remove(name)
                elif not torch.equal(weight, tensor):
                    raise UserError(f"{path}: wte.weight and lm_head.weight must be the same")
            elif TASK_HEAD.match(name):
                task_head.append(stored_name)
            elif not IGNORED.match(name):
                unexpected.append(stored_name)
    if missing or unexpected:
        raise UserError(
            f"{folder} does not match its config.json: missing {_some(missing)}, "
            f"unexpected {_some(unexpected)}"
        )
    if task_head:
        print(f"{folder}: ignored the task head, {_some(task_head)}")


def _fitting(tensor: Tensor, shape: torch.Size, where: str, name: str) -> Tensor:
    """A stored tensor in this model's layout and float32; raises UserError if it cannot be used."""
    if CONV1D_WEIGHT.search(name) and tensor.ndim == 2:
        tensor = tensor.T
    if tensor.shape != shape or not tensor.is_floating_point():
        raise UserError(
            f"{where} is {tensor.dtype} {list(tensor.shape)}, but config.json requires "
            f"a floating-point tensor of shape {list(shape)}"
        )
    tensor = tensor.float()
    if not tensor.sum().isfinite():
        raise UserError(f"{where} has values that are not finite")
    return tensor


def _some(names) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "none"


def fingerprint(folder: Path) -> str:
    """The hex SHA-256 of a base checkpoint's config, weights and tokenizer, whatever its path."""
    digest = hashlib.sha256(repr(load_config(folder)).encode())
    tokenizer = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    for path in _weight_files(folder) + tokenizer:
        digest.update(f"\n{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def save_gpt2(model: nn.Module, folder: Path, eos_token_id: int, dtype: torch.dtype) -> None:
    """Write `config.json` and `model.safetensors` for `transformers.GPT2LMHeadModel`.

    Adapter parameters are not saved: merge LoRA first.
    """
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_ctx": model.config.n_positions,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "tie_word_embeddings": True,
        "dtype": str(dtype).removeprefix("torch."),
    }
    tensors = {}
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        tensor = parameter.detach().to("cpu", dtype)
        stored = hf_name(name)
        tensor = tensor.T if CONV1D_WEIGHT.search(stored) else tensor
        tensors[f"transformer.{stored}"] = tensor.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config | asdict(model.config), indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def hf_name(name: str) -> str:
    """`gpt_layers.3.attention_dense.weight` -> `h.3.attn.c_proj.weight`."""
    layer, inner = re.fullmatch(r"(?:gpt_layers\.(\d+)\.)?(.+)", name).groups()
    module, kind = inner.rsplit(".", 1)
    return ("" if layer is None else f"h.{layer}.") + f"{HF_NAMES[module]}.{kind}"


def _weight_files(folder: Path) -> list[Path]:
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).exists():
            return [folder / single]
        if index.exists():
            shards = read_json(index).get("weight_map")
            shards = set(map(str, shards.values())) if isinstance(shards, dict) else {"/"}
            if any(Path(shard).name != shard for shard in shards):
                raise UserError(f"{index}: weight_map must name files in its own folder")
            return [folder / shard for shard in sorted(shards)]
    return []


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors, ordered so that file and model are never both fully in memory."""
    _check_readable(path)
    try:
        if path.suffix != ".safetensors":
            yield from _take_tensors(path, read_plain(path))
            return
        with safe_open(path, framework="pt") as file:
            sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        for name in sorted(sizes, key=sizes.get, reverse=True):
            # Reopened for each tensor, since closing the file releases its mapped pages.
            with safe_open(path, framework="pt") as file:
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error


def _check_readable(path: Path) -> None:
    """Raise UserError if a file cannot be opened or is a Git LFS pointer."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(24) == b"version https://git-lfs."
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if is_pointer:
        raise UserError(f"{path} is a Git LFS pointer: run git lfs pull to fetch the file")


def _take_tensors(path: Path, state: Any) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(state, dict):
        raise UserError(f"{path} does not hold a dict of named weights")
    for name in list(state):
        tensor = state.pop(name)
        if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.is_sparse:
            raise UserError(f"{path}: {name} is not a dense tensor")
        yield str(name), tensor


def read_plain(path: Path) -> Any:
    """Load a `torch.save` file of tensors and plain values; nothing else is ever unpickled."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can raise anything
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = "is damaged or was not written by torch.save"
        if code:
            reason = f"holds {code[1]}, which could run code: only tensors are allowed"
        raise UserError(f"{path} {reason}") from error
