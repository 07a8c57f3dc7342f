"""Exact units: every open_clip tower that is supported, at its true width, against the untouched tower."""

import copy
import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import _build_vision_tower

import residual_kernels as rk
from residual_kernels import towers

RELATIVE = 1e-5  # float32, sum of units against the tower's output


def configurations() -> dict[str, tuple[int, dict, bool]]:
    """open_clip's own ViTs without attentional pooling: one name for each distinct tower."""
    found = {}
    for path in sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json")):
        config = json.loads(path.read_text())
        vision = config["vision_cfg"]
        if (
            vision.get("timm_model_name")
            or isinstance(vision.get("layers"), list)
            or vision.get("attentional_pool")
        ):
            continue
        key = json.dumps([config["embed_dim"], vision, config.get("quick_gelu", False)], sort_keys=True)
        found.setdefault(key, path.stem)
    return {name: tuple(json.loads(key)) for key, name in found.items()}


CONFIGURATIONS = configurations()


def build(embed_dim=32, quick_gelu=False, seed=0, **vision) -> torch.nn.Module:
    """A small tower with random weights."""
    settings = {"layers": 2, "width": 48, "head_width": 16, "patch_size": 8, "image_size": [16, 24]} | vision
    torch.manual_seed(seed)
    return unsettled(_build_vision_tower(embed_dim, settings, quick_gelu).eval())


def unsettled(tower: torch.nn.Module) -> torch.nn.Module:
    """The tower with random norms, biases and LayerScale, so that nothing in it is a hidden identity."""
    for name, p in tower.named_parameters():
        if p.ndim == 1 and name != "class_embedding":
            torch.nn.init.normal_(p, 1.0 if name.endswith("weight") or "gamma" in name else 0.0, 0.2)
    return tower


def images_for(tower, count=3, dtype=torch.float32, seed=1, size=None):
    """Random images of `size` (height, width), or of the tower's own `image_size` where it is such a pair."""
    return torch.randn(
        count, 3, *(size or tower.image_size), generator=torch.Generator().manual_seed(seed)
    ).to(dtype)


def plain(tower, images):
    with torch.no_grad():
        out = tower(images)
    return out[0] if isinstance(out, tuple) else out


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


def assert_exact(tower, bound, dtype=torch.float32, count=3, size=None):
    """The units of every image sum to the tower's own output, within `bound`; a wrong unit would not."""
    images = images_for(tower, count, dtype, size=size)
    state = copy.deepcopy(tower.state_dict())
    expected = plain(tower, images)
    with torch.no_grad():
        parts = rk.decompose(tower, images)
    units = parts.units()
    assert units.shape == (count, len(parts.layout), expected.shape[1])
    assert relative(units.sum(1), expected) < bound
    assert relative(parts.output, expected) < bound
    # one head of another image is noticed: the bound is not met by accident
    mixed = torch.cat([units[:, :1], units[:, 1:2].roll(1, 0), units[:, 2:]], dim=1)
    assert relative(mixed.sum(1), expected) > 10 * bound
    after = tower.state_dict()
    assert all(torch.equal(state[name], after[name]) for name in state)
    return parts


def test_there_are_41_distinct_towers():
    assert len(CONFIGURATIONS) >= 41  # a newer open_clip may have more; every one is tested below


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_open_clip_tower(name):
    embed_dim, vision, quick_gelu = CONFIGURATIONS[name]
    patch = vision.get("patch_size", 16)
    size = 2 * patch if vision.get("pos_embed_type") == "sin_cos_2d" else [2 * patch, patch]
    torch.manual_seed(0)
    tower = _build_vision_tower(embed_dim, vision | {"layers": 2, "image_size": size}, quick_gelu).eval()
    assert_exact(unsettled(tower), RELATIVE, count=2)


CUSTOM = {
    "class token": {},
    "no ln_pre": {"no_ln_pre": True},
    "LayerScale": {"ls_init_value": 0.1},
    "average, norm after": {"pool_type": "avg", "final_ln_after_pool": True},
    "average, norm before": {"pool_type": "avg", "final_ln_after_pool": False},
    "tokens returned": {"output_tokens": True},
    "average, tokens returned": {"pool_type": "avg", "output_tokens": True},
    "own Attention": {"block_type": "custom"},
    "q and k norm": {"qk_norm": True},
    "head scales": {"scale_heads": True},
    "inner norm": {"scale_attn_inner": True},
    "MLP norm": {"scale_fc": True},
    "norm eps": {"norm_kwargs": {"eps": 1e-3}},
}


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_tower_in_float64(name):
    tower = build(**CUSTOM[name]).double()
    if name == "head scales":
        with torch.no_grad():
            for block in tower.transformer.resblocks:
                block.attn.head_scale.mul_(torch.rand_like(block.attn.head_scale) + 0.5)
    assert_exact(tower, 1e-12, torch.float64)


def test_both_attentions_give_the_same_units():
    """nn.MultiheadAttention and open_clip's own Attention share parameter names,
    so they share a state_dict too."""
    one, other = build(block_type="default"), build(block_type="custom")
    other.load_state_dict(one.state_dict())
    assert type(one.transformer.resblocks[0].attn) is not type(other.transformer.resblocks[0].attn)
    images = images_for(one)
    with torch.no_grad():
        a, b = rk.decompose(one, images), rk.decompose(other, images)
    assert torch.equal(a.units(), b.units())


def test_units_are_selected_by_kind_layer_and_head():
    tower = build()
    with torch.no_grad():
        parts = rk.decompose(tower, images_for(tower))
    every, layout = parts.units(), parts.layout
    assert [unit.kind for unit in layout] == ["emb"] + ["head"] * 6 + ["mlp"] * 2
    assert (layout[5].layer, layout[5].head, layout[0].layer, layout[8].layer) == (1, 1, None, 1)
    assert torch.allclose(parts.units(kind="head", layer=1, head=1), every[:, 5:6], atol=1e-6)
    assert torch.allclose(parts.units(layer=1), every[:, [4, 5, 6, 8]], atol=1e-6)
    assert layout.index((1, 1)) == layout.index(layout[5]) == 5
    with pytest.raises(ValueError, match="layer=7"):
        parts.units(layer=7)
    with pytest.raises(IndexError, match="outside"):
        layout.index((2, 0))
    with torch.no_grad():
        heads = rk.decompose(tower, images_for(tower), kinds=("head",))
    with pytest.raises(ValueError, match="was not collected"):
        heads.units(kind="mlp")


def test_micro_batches_of_norm_before_pooling_agree(monkeypatch):
    tower = build(pool_type="avg", output_tokens=True)
    images = images_for(tower, 5)
    view = towers.view(tower)
    with torch.no_grad():
        whole = view.terms(images, view.layout.kinds)
        monkeypatch.setattr("residual_kernels.towers.transformer.TOKEN_BYTES", 1)
        parts = view.terms(images, view.layout.kinds)
    for kind in view.layout.kinds:
        assert torch.allclose(whole.z[kind], parts.z[kind], atol=1e-6)
    assert torch.allclose(whole.output, parts.output, atol=1e-6)
    assert parts.tokens.shape == whole.tokens.shape == (5, 6, 48)


def test_gradients_reach_images_and_survive_checkpointing():
    tower = build()
    images = images_for(tower).requires_grad_()
    direct = torch.autograd.grad(tower(images).square().sum(), images)[0]
    ours = torch.autograd.grad(rk.decompose(tower, images).units().sum(1).square().sum(), images)[0]
    assert relative(ours, direct) < 1e-4
    tower.set_grad_checkpointing(True)
    again = torch.autograd.grad(rk.decompose(tower, images).units().sum(1).square().sum(), images)[0]
    assert relative(again, ours) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_towers(dtype):
    """Units in half precision are as near the float64 tower as the half-precision tower itself is,
    times four."""
    tower = build()
    images = images_for(tower)
    truth = plain(copy.deepcopy(tower).double(), images.double())
    low = copy.deepcopy(tower).to(dtype)
    with torch.no_grad():
        parts = rk.decompose(low, images.to(dtype))
    own = relative(plain(low, images.to(dtype)).double(), truth)
    assert parts.units().dtype == torch.float32
    assert relative(parts.units().sum(1).double(), truth) < 4 * own + 1e-3


REFUSED = {
    "norm after attention": ({"scale_attn": True}, "pre-norm"),
    "no pooling": ({"pool_type": "none"}, "pool_type"),
    "convolutions": ({"layers": [1, 1, 1, 1], "width": 16, "image_size": 32}, "convolutional"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_towers_say_why_and_what_is_supported(name):
    vision, reason = REFUSED[name]
    tower = _build_vision_tower(
        32, {"layers": 2, "width": 48, "head_width": 16, "patch_size": 8, "image_size": 16} | vision
    )
    with pytest.raises(rk.UnsupportedTowerError, match=reason) as error:
        towers.view(tower)
    assert "supported are" in str(error.value)


def test_other_modules_are_refused():
    with pytest.raises(rk.UnsupportedTowerError, match="none of conv1"):
        towers.view(torch.nn.Linear(2, 2))
    model, _, _ = rk.load_bundled()
    with pytest.raises(rk.UnsupportedTowerError, match=r"model\.visual"):
        rk.decompose(model, torch.zeros(1, 3, 32, 32))


BAD_IMAGES = {
    "rank": (lambda x: x[0], r"\[N, 3, 16, 24\]"),
    "channels": (lambda x: x[:, :1], r"\[N, 3, 16, 24\]"),
    "size": (lambda x: x[..., :16], "16 x 24 pixels; got 16 x 16"),
    "dtype": (lambda x: x.double(), "cast them"),
    "integers": (lambda x: x.to(torch.uint8), "floating point"),
    "device": (lambda x: x.to("meta"), "meta"),
    "NaN": (lambda x: x.index_fill(0, torch.tensor([1]), float("nan")), "index 1"),
    "Inf": (lambda x: x.index_fill(0, torch.tensor([0, 2]), float("inf")), "index 0, 2"),
    "none": (lambda x: x[:0], "holds no images"),
    "no tensor": (lambda x: x.tolist(), "list"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_named(name):
    tower = build()
    spoil, message = BAD_IMAGES[name]
    with pytest.raises(ValueError, match=message):
        rk.decompose(tower, spoil(images_for(tower)))


def test_checksum_sees_values_and_survives_a_cast():
    tower = build()
    before = towers.checksum(tower)
    assert towers.checksum(copy.deepcopy(tower).to(torch.bfloat16)) == before
    with torch.no_grad():
        tower.transformer.resblocks[1].mlp.c_fc.bias[3] += 0.1
    assert towers.checksum(tower) != before
    assert towers.checksum(build(seed=1)) != before


def test_kinds_are_checked():
    tower = build()
    wrong = ((("heads",), "must name"), (("pool",), "this tower has"), ("head", "string"), ((), "must name"))
    for kinds, message in wrong:
        with pytest.raises(ValueError, match=message):
            rk.decompose(tower, images_for(tower), kinds=kinds)
