"""Adapters to PEFT and from it, and merged checkpoints, against PEFT and transformers."""

import copy
import json
import shutil
from dataclasses import fields

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from finetune.peft_format import export_merged, export_peft, read_peft, start_lora
from models.gpt2 import GPT2Model
from models.tokenizer import load_tokenizer
from modules.adapters import adapter_state
from modules.lora import TARGETS, LoRAConfig, LoRALinear, add_lora
from modules.settings import UserError
from tests.conftest import Evil, narrow_hf_model

IDS = torch.randint(0, 100, (3, 17), generator=torch.Generator().manual_seed(0))
KEY = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
CONV1D = {"fan_in_fan_out": True, "task_type": "CAUSAL_LM"}


def set_adapters(model):
    """Random adapters, so that none is the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(gpt):
    return gpt.eval().hidden_state_to_token(gpt(IDS)["last_hidden_state"])


def save_peft(hf_folder, folder, model_class=transformers.GPT2LMHeadModel, save=None, **settings):
    """Save a random adapter by PEFT; returns the model with it, in evaluation mode."""
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["c_attn"]} | CONV1D | settings
    base = model_class.from_pretrained(hf_folder)
    model = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    set_adapters(model)
    model.save_pretrained(folder, **save or {})
    return model


def damage_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


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
        ({"r": 2, "target_modules": "all-linear"}, 2, TARGETS, None),
        ({"r": 2, "target_modules": ["c_proj"], "exclude_modules": r".*\.1\.mlp.*|.*attn.*"},
         2, {"out_dense"}, (0, 2)),
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
    model = save_peft(hf_folder, tmp_path, lora_alpha=12, lora_dropout=0.2, **settings)
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


def old_bin(hf_folder, folder):
    return save_peft(hf_folder, folder, save={"safe_serialization": False})(IDS).logits


def bin_beside_safetensors(hf_folder, folder):
    torch.save({}, folder / "adapter_model.bin")
    return save_peft(hf_folder, folder)(IDS).logits


def named_by_torch_compile(hf_folder, folder):
    expected = save_peft(hf_folder, folder)(IDS).logits
    damage_weights(folder, lambda t: {f"_orig_mod.{key}": tensor for key, tensor in t.items()})
    return expected


def of_the_model_without_a_head(hf_folder, folder):
    settings = {"task_type": "FEATURE_EXTRACTION", "alpha_pattern": {r"^h\.0\.attn\.c_attn": 31}}
    model = save_peft(hf_folder, folder, transformers.GPT2Model, **settings)
    head = transformers.GPT2LMHeadModel.from_pretrained(hf_folder).lm_head
    return head(model(IDS).last_hidden_state)


def added_by_transformers(hf_folder, folder):
    model = transformers.GPT2LMHeadModel.from_pretrained(hf_folder).eval()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["c_proj"], **CONV1D), "poet")
    set_adapters(model)
    model.save_pretrained(folder)
    return model(IDS).logits


@pytest.mark.parametrize(
    "kind",
    [
        old_bin,
        bin_beside_safetensors,
        named_by_torch_compile,
        of_the_model_without_a_head,
        added_by_transformers,
    ],
)
@torch.no_grad()
def test_folders_of_other_origin_are_read(hf_folder, tmp_path, kind):
    expected = kind(hf_folder, tmp_path)
    gpt = GPT2Model.from_pretrained(hf_folder)
    start_lora(gpt, LoRAConfig(), tmp_path)
    assert (logits(gpt) - expected).abs().max() < 1e-4


# Defaults of keys that PEFT has no longer, or does not save any more.
OLD = {"enable_lora": None, "merge_weights": True, "runtime_config": {"ephemeral_gpu_offload": 0}}


def test_every_default_of_peft_is_accepted_and_every_other_method_refused_by_its_key(
    hf_folder, tmp_path
):
    save_peft(hf_folder, tmp_path)
    defaults = {k: v for k, v in peft.LoraConfig().to_dict().items() if k != "lora_alpha"}
    damage_config(tmp_path, **defaults, **OLD)
    assert len(read_peft(tmp_path)) == 9
    variants = [f.name for f in fields(peft.LoraConfig) if f.metadata.get("is_lora_variant")]
    assert "use_dora" in variants
    for key in [*variants, "use_qalora", "lora_bias", "enable_lora", "a_method_to_come"]:
        folder = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-{key}"))
        damage_config(folder, **{key: [True]})
        with pytest.raises(UserError, match=rf"{key} is \[True\], but only plain LoRA"):
            read_peft(folder)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"use_dora": True}, "use_dora is True, but only plain LoRA can be read"),
        ({"bias": "lora_only"}, "bias is 'lora_only', but only plain LoRA"),
        ({"modules_to_save": ["wte"]}, r"modules_to_save is \['wte'\], but only plain LoRA"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices is \[3\], but only plain"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', but only plain LoRA"),
        ({"target_modules": ["c_attn", "wte"]}, "wte.lora_embedding_A is not a LoRA weight"),
    ],
)
def test_what_cannot_be_represented_is_refused_in_one_sentence(
    hf_folder, tmp_path, settings, sentence
):
    save_peft(hf_folder, tmp_path, **settings)
    with pytest.raises(UserError, match=sentence) as error:
        start_lora(GPT2Model.from_pretrained(hf_folder), LoRAConfig(), tmp_path)
    assert "\n" not in str(error.value)


def use_bin(folder, state):
    """Put what `torch.save` writes in the place of the safetensors file."""
    (folder / "adapter_model.safetensors").unlink()
    torch.save(state, folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "is not a PEFT adapter: it has no ada"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "no numeric lora_alpha"),
        (lambda f: damage_config(f, peft_type="IA3"), "peft_type is 'IA3', but only plain"),
        (lambda f: damage_config(f, alpha_pattern={"(": 2}), "alpha_pattern"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "cannot be read"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x80\x04"), "cannot be read"),
        (lambda f: torch.save(Evil(f / "harm"), f / "adapter_model.safetensors"), "cannot be read"),
        (lambda f: damage_weights(f, lambda t: dict(list(t.items())[1:])), "an A and a B of"),
        (lambda f: damage_weights(f, lambda t: {k.replace("h.1", "h.9"): v for k, v in t.items()}),
         "there is no block 9: the model has blocks 0 to 2"),
        (lambda f: damage_weights(f, lambda t: {k: v.new_zeros(0, 4) for k, v in t.items()}),
         "must be a non-empty matrix of finite numbers"),
        (lambda f: damage_weights(f, lambda t: {k: v / 0 for k, v in t.items()}), "of finite numb"),
        (lambda f: use_bin(f, Evil(f / "harm")), "adapter_model.bin holds .*could run code"),
        (lambda f: use_bin(f, {"a": IDS}), "a is not a LoRA weight of"),
        (lambda f: use_bin(f, {KEY: "text"}), "lora_A.weight is not a dense tensor"),
        (lambda f: damage_config(f, alpha_pattern={"attn.c_proj": 10**400}), "no finite, positive"),
        (lambda f: damage_config(f, alpha_pattern={"c_proj": float("inf")}), "no finite, positive"),
        (lambda f: damage_config(f, alpha_pattern={"c_proj": 0}), "no finite, positive alpha"),
        (lambda f: damage_weights(f, lambda t: {}), "contains no adapter"),
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
    with pytest.raises(UserError, match=r"fits a weight of \[32, 32\], not the model's \[16, 16\]"):
        start_lora(GPT2Model.from_pretrained(tmp_path / "narrow"), config, tmp_path / "adapter")


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


def test_a_merged_checkpoint_has_chat_templates(gpt, hf_folder, nano_tokenizer, tmp_path):
    add_lora(gpt, LoRAConfig(rank=2))
    tokenizer = copy.deepcopy(nano_tokenizer)
    tokenizer.chat_template = {"default": "{{ messages }}", "other": "{{ tools }}"}
    export_merged(gpt, LoRAConfig(rank=2), hf_folder, tokenizer, tmp_path / "merged")
    export_merged(gpt, LoRAConfig(rank=2), hf_folder, tokenizer, tmp_path / "merged")  # the same
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "merged").rglob("*")}
    assert modes.pop("additional_chat_templates") & 0o111
    assert modes["other.jinja"] == modes["model.safetensors"] == 0o644


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
