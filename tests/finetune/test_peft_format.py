"""Adapters to PEFT and from it, and merged checkpoints, against PEFT and transformers."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from finetune.peft_format import export_merged, export_peft, start_lora
from models.gpt2 import GPT2Model
from models.pretrained import load_tokenizer
from modules.adapters import adapter_state
from modules.lora import TARGETS, LoRAConfig, LoRALinear, add_lora
from modules.settings import UserError
from tests.conftest import Evil, narrow_hf_model

IDS = torch.randint(0, 100, (3, 17), generator=torch.Generator().manual_seed(0))
CONV1D = {"fan_in_fan_out": True, "task_type": "CAUSAL_LM"}


def set_adapters(model, names=("lora_A", "lora_B")):
    """Random adapters, so that none is the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(gpt):
    return gpt.eval().hidden_state_to_token(gpt(IDS)["last_hidden_state"])


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=2),
        LoRAConfig(rank=3, alpha=5.0, targets=("query", "value")),
        LoRAConfig(rank=2, targets=("key",), layers=(1,)),
        LoRAConfig(rank=4, targets=("attention_dense",), layers=(0, 2)),
        LoRAConfig(rank=1, targets=("out_dense", "query", "interm_dense"), layers=(2,)),
    ],
)
def test_peft_loads_what_is_exported_and_it_comes_back_as_it_was(gpt, hf_folder, tmp_path, config):
    base = logits(gpt)
    add_lora(gpt, config)
    set_adapters(gpt)
    expected = logits(gpt)
    assert (expected - base).abs().max() > 0.1
    export_peft(gpt, config, hf_folder, tmp_path / "adapter")
    model = transformers.GPT2LMHeadModel.from_pretrained(hf_folder)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, expected, atol=1e-4)
    again = GPT2Model.from_pretrained(hf_folder)
    imported = start_lora(again, LoRAConfig(rank=7), tmp_path / "adapter")
    assert set(imported.targets) == set(config.targets)
    assert (imported.rank, imported.layers) == (config.rank, config.layers)
    assert imported.alpha == pytest.approx(config.alpha)
    state, was = adapter_state(again), adapter_state(gpt)
    assert state.keys() == was.keys()
    assert all(torch.allclose(state[name], was[name], rtol=1e-6) for name in was)


def test_peft_finds_the_base_by_itself_and_trains_on(gpt, hf_folder, tmp_path):
    config = LoRAConfig(rank=2)
    add_lora(gpt, config)
    set_adapters(gpt)
    export_peft(gpt, config, hf_folder, tmp_path / "adapter")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    model(IDS, labels=IDS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 4 * 3
    assert all(p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.parametrize(
    ("settings", "rank", "targets", "layers"),
    [
        ({"r": 4, "target_modules": ["c_attn"]}, 4, TARGETS[:3], None),
        ({"r": 2, "target_modules": ["c_attn", "c_proj"]}, 2, {*TARGETS} - {"interm_dense"}, None),
        ({"r": 2, "target_modules": ["c_attn", "c_proj", "c_fc"]}, 2, TARGETS, None),
        ({"r": 4, "target_modules": ["c_fc"], "use_rslora": True}, 4, {"interm_dense"}, None),
        ({"r": 2, "target_modules": ["mlp.c_proj"], "layers_to_transform": [1]},
         2, {"out_dense"}, (1,)),
        ({"r": 2, "target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 5},
          "alpha_pattern": {"h.1.mlp.c_fc": 3, "c_attn": 40}}, 5,
         {*TARGETS[:3], "interm_dense"}, None),
        ({"r": 3, "target_modules": r"transformer\.h\.[02]\.attn\.c_.*", "use_rslora": True,
          "rank_pattern": {"h.0.attn.c_attn": 6}}, 6, TARGETS[:4], (0, 2)),
    ],
)  # fmt: skip
def test_adapters_that_peft_saves_are_read_in(hf_folder, tmp_path, settings, rank, targets, layers):
    model = transformers.GPT2LMHeadModel.from_pretrained(hf_folder)
    config = peft.LoraConfig(lora_alpha=12, lora_dropout=0.2, **CONV1D, **settings)
    model = peft.get_peft_model(model, config).eval()
    set_adapters(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(IDS).logits
    gpt = GPT2Model.from_pretrained(hf_folder)
    imported = start_lora(gpt, LoRAConfig(rank=7, dropout=0.3), tmp_path)
    assert (logits(gpt) - expected).abs().max() < 1e-4
    assert (logits(GPT2Model.from_pretrained(hf_folder)) - expected).abs().max() > 0.01
    assert (imported.rank, set(imported.targets), imported.layers) == (rank, set(targets), layers)
    assert imported.dropout == 0.3
    export_peft(gpt, imported, hf_folder, tmp_path / "out")
    base = transformers.GPT2LMHeadModel.from_pretrained(hf_folder)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(again(IDS).logits, expected, atol=1e-4)


def test_a_fresh_adapter_of_peft_is_one_here_and_every_weight_of_it_trains(hf_folder, tmp_path):
    model = transformers.GPT2LMHeadModel.from_pretrained(hf_folder)
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], **CONV1D)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    gpt = GPT2Model.from_pretrained(hf_folder)
    base = logits(gpt)
    start_lora(gpt, LoRAConfig(), tmp_path)
    assert torch.equal(logits(gpt), base)
    gpt(IDS)["last_hidden_state"].square().sum().backward()
    layers = [module for module in gpt.modules() if isinstance(module, LoRALinear)]
    assert len(layers) == 3
    assert all(layer.lora_B.grad.abs().min(1).values.max() > 0 for layer in layers)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"use_dora": True}, "use_dora is True: this LoRA cannot represent DoRA"),
        ({"bias": "lora_only"}, "bias is 'lora_only': this LoRA cannot represent trained biases"),
        ({"modules_to_save": ["wte"]}, r"\['wte'\]: .* whole layers that were trained and saved"),
        ({"trainable_token_indices": [3]}, r"\[3\]: .* trained embeddings"),
        ({"init_lora_weights": "pissa"}, "'pissa': .* changed base weights"),
        ({"target_modules": ["c_attn", "wte"]}, "wte.lora_embedding_A is no LoRA of a linear"),
    ],
)
def test_what_cannot_be_represented_is_refused_in_one_sentence(
    hf_folder, tmp_path, settings, sentence
):
    model = transformers.GPT2LMHeadModel.from_pretrained(hf_folder)
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["c_attn"]} | CONV1D | settings)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=sentence) as error:
        start_lora(GPT2Model.from_pretrained(hf_folder), LoRAConfig(), tmp_path)
    assert "\n" not in str(error.value)


def damage_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def narrow(tensors):
    """Without the others, all of c_fc cut to two inputs."""
    return {key: t[:, :2].clone() for key, t in tensors.items() if "mlp.c_fc" in key}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "is no PEFT adapter: no adapter_config"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "no lora_alpha in it"),
        (lambda f: damage_config(f, peft_type="IA3"), "'IA3': .* another method than LoRA"),
        (lambda f: damage_config(f, alpha_pattern={"(": 2}), "alpha_pattern"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "cannot be read"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x80\x04"), "cannot be read"),
        (lambda f: torch.save(Evil(f / "harm"), f / "adapter_model.safetensors"), "cannot be read"),
        (lambda f: damage_weights(f, lambda t: dict(list(t.items())[1:])), "do not belong toge"),
        (lambda f: damage_weights(f, narrow), "changes a weight of"),
        (lambda f: damage_weights(f, lambda t: {k.replace("h.1", "h.9"): v for k, v in t.items()}),
         "has a layer 9, the model 0 to 2"),
        (lambda f: damage_weights(f, lambda t: {}), "holds no adapter"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_in_one_sentence(gpt, hf_folder, tmp_path, damage, sentence):
    config = LoRAConfig(rank=2)
    add_lora(gpt, config)
    folder = tmp_path / "adapter"
    export_peft(gpt, config, hf_folder, folder)
    damage(folder)
    with pytest.raises(UserError, match=sentence) as error:
        start_lora(GPT2Model.from_pretrained(hf_folder), LoRAConfig(), folder)
    assert "\n" not in str(error.value)
    assert not (folder / "harm").exists()


def test_an_adapter_of_another_width_is_refused(gpt, hf_folder, tmp_path):
    config = LoRAConfig(rank=2)
    add_lora(gpt, config)
    export_peft(gpt, config, hf_folder, tmp_path / "adapter")
    narrow_hf_model(n_head=2).save_pretrained(tmp_path / "narrow")
    with pytest.raises(UserError, match=r"changes a weight of \[32, 32\], .* is \[16, 16\]"):
        start_lora(
            GPT2Model.from_pretrained(tmp_path / "narrow"), LoRAConfig(), tmp_path / "adapter"
        )


def test_a_merged_checkpoint_is_complete_and_gives_the_same_logits(
    gpt, hf_folder, nano_tokenizer, tmp_path
):
    config = LoRAConfig(rank=2, targets=("value", "out_dense"))
    add_lora(gpt, config)
    set_adapters(gpt)
    expected = logits(gpt)
    export_merged(gpt, config, hf_folder, nano_tokenizer, tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert model.dtype == torch.float32
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, expected, atol=1e-4)
    assert torch.allclose(
        logits(GPT2Model.from_pretrained(tmp_path / "merged")), expected, atol=1e-4
    )
    for tokenizer in (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "merged"),
        load_tokenizer(tmp_path / "merged"),
    ):
        text = "Shall I compare thee\nto a summer's day?"
        assert tokenizer(text)["input_ids"] == nano_tokenizer(text)["input_ids"]


def test_weights_that_a_run_rounded_are_not_exported(gpt, hf_folder, nano_tokenizer, tmp_path):
    add_lora(gpt, LoRAConfig(rank=2))
    expected = logits(gpt)
    for layer in gpt.modules():
        if isinstance(layer, LoRALinear):
            layer.weight.data = layer.weight.data.bfloat16()
    export_merged(gpt, LoRAConfig(rank=2), hf_folder, nano_tokenizer, tmp_path / "merged")
    assert torch.allclose(
        logits(GPT2Model.from_pretrained(tmp_path / "merged")), expected, atol=1e-5
    )


def test_a_folder_with_something_in_it_is_never_replaced(gpt, hf_folder, tmp_path):
    config = LoRAConfig(rank=2)
    add_lora(gpt, config)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(OSError, match="not empty"):
        export_peft(gpt, config, hf_folder, tmp_path / "mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "letter.txt"]
