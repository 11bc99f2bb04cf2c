"""ReFT against its formulas written out, against pyreft's own classes, and its promises."""

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F

from modules.adapters import adapter_state, count_parameters
from modules.kv_cache import KVCache
from modules.reft import (
    INTERVENTIONS,
    Positions,
    ReFTConfig,
    add_reft,
    orthonormalize,
    orthonormalize_,
)
from modules.settings import UserError
from tests.conftest import pyreft_interventions

C, R = 12, 3
BOTH = ("attention", "ffn")
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


def reference(kind, p, h, act, scale):
    """The paper's formulas for one state h [C], with column vectors, as they are printed."""
    h = h[:, None]  # [C,1]
    if kind == "adapter":
        return (h + scale * p["W_up"] @ act(p["W_down"] @ h))[:, 0]
    b = p["b"][:, None]
    if kind == "loreft":
        return (h + p["R"].T @ (act(p["W"] @ h + b) - p["R"] @ h))[:, 0]
    if kind == "noreft":
        return (h + p["W2"].T @ (act(p["W1"] @ h + b) - p["W2"] @ h))[:, 0]
    if kind == "direft":
        return (h + p["R"].T @ act(p["W"] @ h + b))[:, 0]
    return (h + p["W2"].T @ act(p["W1"] @ h + b))[:, 0]


def random_intervention(kind, activation="linear", **settings):
    """One whose weights are all random, so that none of its terms vanishes."""
    config = ReFTConfig(kind, rank=R, activation=activation, **settings)
    module = INTERVENTIONS[kind](C, config)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name != "reft_R":
                parameter.copy_(torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("edited", [None, "some"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", INTERVENTIONS)
def test_forward_and_gradients_equal_the_formula(kind, activation, edited):
    module = random_intervention(kind, activation, alpha=5.0)
    h = torch.randn(2, 4, C, requires_grad=True)
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]]).bool() if edited else torch.ones(2, 4).bool()
    out = module(h, mask[..., None] if edited else None)
    p = {name.removeprefix("reft_"): parameter for name, parameter in module.named_parameters()}
    act = ACTIVATIONS[activation]
    rows = [
        reference(kind, p, state, act, 5.0 / R) if edit else state
        for state, edit in zip(h.flatten(0, 1), mask.flatten(), strict=True)
    ]
    expected = torch.stack(rows).view(2, 4, C)
    assert torch.allclose(out, expected, atol=1e-5)
    weights = torch.randn_like(out)
    inputs = [h, *module.parameters()]
    ours, theirs = (torch.autograd.grad((y * weights).sum(), inputs) for y in (out, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.fixture(scope="module")
def pyreft():
    """pyreft's interventions."""
    if importlib.util.find_spec("pyreft") is None:
        pytest.skip("pyreft is not installed")
    return pyreft_interventions()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["loreft", "noreft", "direft", "nodireft"])
def test_outputs_and_gradients_equal_pyrefts(kind, activation, pyreft):
    ours = random_intervention(kind, activation)
    theirs = getattr(pyreft, f"{kind.capitalize()}Intervention")(
        embed_dim=C, low_rank_dimension=R, dtype=torch.float32, act_fn=activation, add_bias=False
    )
    p = {name.removeprefix("reft_"): parameter for name, parameter in ours.named_parameters()}
    with torch.no_grad():
        theirs.learned_source.weight.copy_(p.get("W", p.get("W1")))
        theirs.learned_source.bias.copy_(p["b"])
        if "R" in p:
            theirs.rotate_layer.weight = p["R"].T
        else:
            theirs.proj_layer.weight.copy_(p["W2"])
    h = torch.randn(2, 4, C, requires_grad=True)
    weights = torch.randn(2, 4, C)
    gradients = []
    for module in (ours, theirs):
        out = module(h)
        gradients.append(torch.autograd.grad((out * weights).sum(), h)[0])
    assert torch.allclose(ours(h), theirs(h), atol=1e-5)
    assert torch.allclose(*gradients, atol=1e-5)


FRESH = [(kind, act) for kind in INTERVENTIONS for act in ACTIVATIONS]
FRESH = [(kind, act) for kind, act in FRESH if kind not in ("loreft", "noreft") or act == "linear"]


@pytest.mark.parametrize(("kind", "activation"), FRESH)
def test_a_fresh_intervention_is_the_identity_and_can_learn(gpt, kind, activation):
    ids = torch.randint(0, 101, (2, 9))
    before = gpt(ids)["last_hidden_state"].detach()
    add_reft(gpt, ReFTConfig(kind, activation=activation, locations=BOTH))
    after = gpt(ids)["last_hidden_state"]
    assert torch.allclose(before, after, atol=1e-5)
    (after * torch.randn_like(after)).sum().backward()
    modules = [m for m in gpt.modules() if isinstance(m, INTERVENTIONS[kind])]
    assert len(modules) == 6  # three layers, two places
    assert all(any(p.grad.abs().max() > 0 for p in m.parameters()) for m in modules)


def test_the_default_activation_is_the_papers_but_for_our_own_form():
    assert ReFTConfig().activation == "relu"
    assert {ReFTConfig(kind).activation for kind in INTERVENTIONS if kind != "adapter"} == {
        "linear"
    }


@pytest.mark.parametrize("kind", ["loreft", "direft"])
def test_rows_of_R_stay_orthonormal_through_training_and_saving(gpt, kind):
    add_reft(gpt, ReFTConfig(kind, rank=5, locations=BOTH))
    optimizer = torch.optim.AdamW([p for p in gpt.parameters() if p.requires_grad], lr=0.03)
    for _ in range(20):
        state = gpt(torch.randint(0, 101, (2, 9)))["last_token"]
        (state * torch.randn_like(state)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        orthonormalize(gpt)
        matrices = [p for name, p in adapter_state(gpt).items() if name.endswith("reft_R")]
        assert len(matrices) == 6
        for matrix in matrices:
            assert torch.allclose(matrix @ matrix.T, torch.eye(5), atol=1e-5)
    assert all(32 * 32 > tensor.numel() for tensor in adapter_state(gpt).values())  # no C x C


def test_orthonormalizing_is_gram_schmidt_and_leaves_what_is_orthonormal():
    matrix = torch.randn(4, 30)
    q, r = torch.linalg.qr(matrix.T)
    expected = (q * r.diagonal().sign()).T
    orthonormalize_([matrix])
    assert torch.allclose(matrix, expected, atol=1e-5)
    again = matrix.clone()
    orthonormalize_([again])
    assert torch.allclose(matrix, again, atol=1e-6)


def test_only_the_layers_and_places_listed_are_trained_and_changed(gpt):
    ids = torch.randint(0, 101, (2, 9))
    states = {}
    for i, layer in enumerate(gpt.gpt_layers):
        layer.register_forward_hook(
            lambda module, args, out, i=i: states.setdefault(i, []).append(out)
        )
    gpt(ids)
    add_reft(gpt, ReFTConfig("loreft", rank=2, layers=(1,), locations=("ffn",)))
    gpt(ids)
    assert count_parameters(gpt)[0] == 2 * 2 * 32 + 2  # R, W and b
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if name.endswith("reft_b"):
                parameter.add_(3.0)
    gpt(ids)
    assert torch.equal(states[0][0], states[0][2])
    assert not torch.allclose(states[1][0], states[1][2], atol=1e-2)
    assert {name.split(".")[1] for name in adapter_state(gpt)} == {"1"}


@pytest.mark.parametrize(
    ("kind", "n"), [("adapter", 8 * 32), ("loreft", 8 * 32 + 4), ("nodireft", 8 * 32 + 4)]
)
@pytest.mark.parametrize("locations", [("attention",), ("attention", "ffn")])
def test_parameters_are_counted_at_each_location_of_every_layer(gpt, kind, n, locations):
    add_reft(gpt, ReFTConfig(kind, rank=4, locations=locations))
    assert count_parameters(gpt)[0] == 3 * len(locations) * n


def test_the_default_location_is_attention_alone():
    assert ReFTConfig().locations == ("attention",)


def test_dropout_works_on_the_edit_alone_and_in_training_alone():
    module = random_intervention("adapter", dropout=0.5)
    h = torch.randn(50, 40, C)
    full = module.eval()(h) - h
    edit = module.train()(h) - h
    dropped = edit == 0
    assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.allclose(edit[~dropped], 2 * full[~dropped], atol=1e-3)


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [
        ("f2", 9, [0, 1]),
        ("l2", 9, [7, 8]),
        ("f1+l2", 9, [0, 7, 8]),
        ("f9+l9", 7, [0, 1, 2, 4, 5, 6]),  # each at most half of the prompt
        ("f5", 1, []),
    ],
)
def test_positions_are_counted_from_both_ends_of_the_prompt(text, length, expected):
    positions = torch.arange(12)  # some of them after the prompt
    intervened = Positions.parse(text).of(positions, torch.tensor([length]).expand(12))
    assert intervened.shape == (12, 1)
    assert intervened[:, 0].nonzero().flatten().tolist() == expected


def test_all_is_every_position():
    assert Positions.parse("all") is None


@pytest.mark.parametrize(
    "text", ["", "f", "f0", "l0", "f0+l0", "l1+f1", "f1l1", "f1+", "+l1", "f-1", "x"]
)
def test_other_positions_are_refused(text):
    with pytest.raises(UserError, match=r"must be all, fN\+lM, fN or lM, not"):
        ReFTConfig(positions=text)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"type": "lora"}, "ReFTConfig.type: 'lora' is not one of adapter, loreft"),
        ({"activation": "selu"}, "is not one of relu, gelu, tanh, linear"),
        ({"locations": ("mlp",)}, "is not one of attention, ffn"),
        ({"locations": ()}, "is not one of attention, ffn"),
        ({"rank": 0}, "ReFTConfig.rank: 0 is not a whole number of 1 or more"),
        ({"dropout": 1.0}, "dropout: 1 is not a number of 0 or more and below 1"),
    ],
)
def test_other_settings_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        ReFTConfig(**settings)


def test_a_rank_above_the_width_is_refused_as_its_rows_cannot_be_orthonormal(gpt):
    with pytest.raises(UserError, match="rank 33 exceeds the model's width, 32"):
        add_reft(gpt, ReFTConfig("loreft", rank=33))


def with_large_edits(gpt, kind, positions):
    add_reft(gpt, ReFTConfig(kind, rank=R, positions=positions))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if "reft_" in name and not name.endswith("reft_R"):
                parameter.add_(torch.randn_like(parameter))
    return gpt


@pytest.mark.parametrize("positions", ["all", "f2+l3", "f1", "l2"])
@pytest.mark.parametrize("kind", INTERVENTIONS)
def test_rows_of_different_lengths_and_the_cache_give_what_a_row_alone_gives(gpt, kind, positions):
    """Padded on the right as in training, on the left and in parts as in generation."""
    with_large_edits(gpt, kind, positions)
    texts = [torch.randint(0, 101, (n,)) for n in (9, 6, 12)]
    prompts = torch.tensor([5, 4, 8])
    T = 12
    right, left = torch.zeros(2, 3, T, dtype=torch.long)
    for row, text in enumerate(texts):
        right[row, : len(text)] = left[row, T - len(text) :] = text
    lengths = torch.tensor([len(text) for text in texts])
    on_the_right = (torch.arange(T) < lengths[:, None]).long()
    on_the_left = on_the_right.flip(1)
    cache, parts = KVCache(3, 3, T), []
    with torch.no_grad():
        alone = [
            gpt(text[None], prompt_lengths=n[None])["last_hidden_state"][0]
            for text, n in zip(texts, prompts, strict=True)
        ]
        padded = gpt(right, on_the_right, prompt_lengths=prompts)["last_hidden_state"]
        for part in (slice(0, 8), slice(8, 9), slice(9, 12)):
            out = gpt(left[:, part], on_the_left[:, part], cache=cache, prompt_lengths=prompts)
            parts.append(out["last_hidden_state"])
    for row, text in enumerate(texts):
        assert torch.allclose(padded[row, : len(text)], alone[row], atol=1e-4)
        assert torch.allclose(torch.cat(parts, 1)[row, T - len(text) :], alone[row], atol=1e-4)


def test_without_prompt_lengths_the_whole_row_is_the_prompt(gpt):
    with_large_edits(gpt, "direft", "l1")
    ids, mask = torch.randint(0, 101, (2, 6)), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    with torch.no_grad():
        found = gpt(ids, mask)["last_hidden_state"]
        told = gpt(ids, mask, prompt_lengths=torch.tensor([6, 4]))["last_hidden_state"]
    assert torch.equal(found, told)
    cache = KVCache(3, 2, 9)
    gpt(ids, cache=cache)
    with pytest.raises(ValueError, match="needs prompt_lengths"):
        gpt(ids[:, :1], cache=cache)


def test_edits_are_float32_under_autocast():
    module = random_intervention("loreft")
    with torch.no_grad():
        module.reft_W.copy_(module.reft_R)  # what is left of two large numbers is b alone
    h = 1000 * torch.randn(3, 4, C)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        edit = module(h) - h
    assert torch.allclose(edit, (module.reft_b @ module.reft_R).expand_as(edit), atol=2e-3)
