"""Exact units of timm's towers and of attention pooling, and that the whole library works on them."""

import copy
import json
import re
from functools import partial
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from open_clip.model import _build_vision_tower
from open_clip.timm_model import TimmModel
from test_towers import RELATIVE, assert_exact, build, relative
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos

import residual_kernels as rk
from residual_kernels import towers
from residual_kernels.towers import edit as stream
from residual_kernels.towers import transformer

SIZE = (32, 48)  # of the small towers: 2 x 3 patches


def unsettled(tower: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The tower in eval mode with random norms, biases, LayerScale, tokens and position tables:
    no hidden identity.

    Classifiers, which timm initialises to nearly nothing, get weights too: behind a bias alone no mistake
    would show.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in tower.named_parameters():
        spread, mean = 0.2, float(name.endswith("weight") or "gamma" in name)
        if name.endswith("head.weight"):
            spread, mean = p.shape[1] ** -0.5, 0.0
        elif p.ndim > 3 or (p.ndim > 1 and not re.search("embed|token|table|latent", name)):
            continue
        with torch.no_grad():
            p.copy_(mean + spread * torch.randn(p.shape, generator=generator))
    return tower.eval()


def small(family, seed=0, **options) -> torch.nn.Module:
    """A tower of 2 layers of 3 heads of 16 with random weights in float64."""
    settings = {
        "img_size": SIZE,
        "patch_size": 16,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 0,
    }
    torch.manual_seed(seed)
    tower = unsettled(family(**settings | options), seed).double()
    tower.image_size = SIZE  # where the shared helpers look for it
    return tower


# One name for every distinct timm trunk of open_clip: resolutions differ in position tables, embed_dim in the
# last map.
def configurations() -> dict[str, dict]:
    found = {}
    for path in sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json")):
        config = json.loads(path.read_text())
        vision = config["vision_cfg"]
        name = vision.get("timm_model_name")
        if name and not re.match("convnext|fastvit|swin", name):
            key = re.sub(r"_\d+$", "", name), vision["timm_pool"], vision["timm_proj"]
            found.setdefault(key, (path.stem, config))
    return dict(found.values())


CONFIGURATIONS = configurations()


def test_there_are_24_distinct_trunks():
    assert len(CONFIGURATIONS) >= 24  # a newer open_clip may have more; every one is tested below


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_open_clip_configuration(name, monkeypatch):
    """At its true width, with two layers and few patches."""
    config = CONFIGURATIONS[name]
    size = (
        64
        if name.startswith("ViTamin")
        else 2 * int(re.search(r"patch(\d+)|$", config["vision_cfg"]["timm_model_name"])[1] or 16)
    )
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=2, img_size=size))
    torch.manual_seed(0)
    tower = _build_vision_tower(config["embed_dim"], config["vision_cfg"])
    tower.image_size = (size, size)
    parts = assert_exact(unsettled(tower), RELATIVE, count=2)
    attention = towers.view(tower).pooling == transformer.ATTENTION
    assert (parts.terms.z["head"].shape[2] == config["embed_dim"]) == attention


PLAIN = {
    "class token": (VisionTransformer, {}),
    "classes": (VisionTransformer, {"num_classes": 7}),
    "average, norm after": (VisionTransformer, {"global_pool": "avg"}),
    "average, norm before": (VisionTransformer, {"global_pool": "avg", "fc_norm": False}),
    "average of all tokens": (VisionTransformer, {"global_pool": "avg", "pool_include_prefix": True}),
    "no class token": (VisionTransformer, {"global_pool": "avg", "class_token": False}),
    "class token and fc_norm": (VisionTransformer, {"fc_norm": True}),
    "no final norm": (VisionTransformer, {"final_norm": False}),
    "registers": (VisionTransformer, {"reg_tokens": 4, "global_pool": "avg"}),
    "DINOv2": (VisionTransformer, {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5}),
    "CLIP": (VisionTransformer, {"pre_norm": True}),
    "no positions": (VisionTransformer, {"pos_embed": "none"}),
    "any image size": (VisionTransformer, {"dynamic_img_size": True}),
    "q and k norm": (VisionTransformer, {"qk_norm": True}),
    "inner norms": (VisionTransformer, {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "RMS norms": (VisionTransformer, {"norm_layer": "rmsnorm", "global_pool": "avg", "fc_norm": False}),
    "norms behind branches": (VisionTransformer, {"block_fn": ResPostBlock, "init_values": 0.1}),
    "RMS norms behind branches": (VisionTransformer, {"block_fn": ResPostBlock, "norm_layer": "rmsnorm"}),
    "attention pooling": (VisionTransformer, {"global_pool": "map"}),
    "attention pooling, no class token": (VisionTransformer, {"global_pool": "map", "class_token": False}),
    "attention pooling of all tokens": (
        VisionTransformer,
        {"global_pool": "map", "pool_include_prefix": True},
    ),
    "attention pooling, two norms": (VisionTransformer, {"global_pool": "map", "fc_norm": True}),
    "attention pooling, classes": (VisionTransformer, {"global_pool": "map", "num_classes": 7}),
    "distilled": (VisionTransformerDistilled, {}),
    "EVA01": (Eva, {"qkv_bias": True, "init_values": 0.1}),
    "EVA02": (
        Eva,
        {
            "qkv_fused": False,
            "use_rot_pos_emb": True,
            "swiglu_mlp": True,
            "scale_mlp": True,
            "scale_attn_inner": True,
            "global_pool": "token",
        },
    ),
    "EVA02-E": (Eva, {"use_post_norm": True, "global_pool": "token"}),
    "gates": (Eva, {"attn_type": "rope", "use_rot_pos_emb": True, "rope_rotate_half": True}),
    "DINOv3": (
        Eva,
        {
            "use_rot_pos_emb": True,
            "rope_type": "dinov3",
            "num_reg_tokens": 4,
            "use_abs_pos_emb": False,
            "use_fc_norm": False,
            "init_values": 0.1,
        },
    ),
    "mixed rotary positions": (Eva, {"use_rot_pos_emb": True, "rope_type": "mixed", "attn_type": "rope"}),
    "grouped queries": (
        Eva,
        {
            "use_rot_pos_emb": True,
            "attn_type": "rope",
            "num_kv_heads": 1,
            "qkv_fused": False,
            "qk_norm": True,
        },
    ),
    "PE-Core": (
        Eva,
        {
            "use_rot_pos_emb": True,
            "attn_type": "rope",
            "global_pool": "map",
            "attn_pool_num_heads": 4,
            "use_pre_transformer_norm": True,
            "num_classes": 7,
        },
    ),
    "BEiT": (Beit, {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.1}),
    "BEiT, shared positions": (
        Beit,
        {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": True, "global_pool": "token"},
    ),
    "relative positions": (VisionTransformerRelPos, {"class_token": True, "global_pool": "token"}),
    "shared relative positions": (VisionTransformerRelPos, {"shared_rel_pos": True, "rel_pos_type": "bias"}),
    "relative positions, norms behind": (
        VisionTransformerRelPos,
        {"block_fn": ResPostRelPosBlock, "fc_norm": True},
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_tower_in_float64(name):
    family, options = PLAIN[name]
    assert_exact(small(family, **options), 1e-12, torch.float64)


def test_gated_attention():
    tower = small(Eva, attn_type="rope")
    for index, block in enumerate(tower.blocks):
        torch.manual_seed(index)
        block.attn.gate = torch.nn.Linear(48, 48).double()
    assert_exact(tower, 1e-12, torch.float64)


def test_a_linear_head_of_open_clip_follows_the_trunks_own():
    tower = TimmModel("test_vit", 24, image_size=160, pool="avg", proj="linear", proj_bias=True).eval()
    tower.trunk = small(VisionTransformer, num_classes=64)
    tower.image_size = SIZE
    assert_exact(unsettled(tower).double(), 1e-12, torch.float64)


def test_coca_pools_by_attention():
    for options in ({}, {"output_tokens": True, "ls_init_value": 0.1}):
        tower = build(attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=5, **options).double()
        parts = assert_exact(tower, 1e-12, torch.float64)
        assert parts.layout.kinds == ("emb", "head", "mlp")  # no MLP behind its pooler
        assert parts.terms.z["head"].shape == (3, 6, 32)  # x_u itself


def test_another_image_size_where_the_tower_takes_any():
    tower = small(VisionTransformer, dynamic_img_size=True)
    images = torch.randn(2, 3, 48, 64, dtype=torch.float64)
    with torch.no_grad():
        assert relative(rk.decompose(tower, images).units().sum(1), tower(images)) < 1e-12
    with pytest.raises(ValueError, match="multiples of 16 x 16 pixels; got 48 x 60"):
        rk.decompose(tower, images[..., :60])


# The structures on which the rest of the library is tried: pooled by attention, one more coordinate, another
# stem.
WHOLE = ("attention pooling", "EVA02-E", "BEiT", "average, norm before")


@pytest.fixture(scope="module", params=WHOLE)
def tower(request):
    family, options = PLAIN[request.param]
    return small(family, **options)


@pytest.fixture(scope="module")
def images():
    return torch.randn(60, 3, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(scope="module")
def bases(tower, images):
    return rk.fit_bases(tower, images.split(16), kinds=towers.view(tower).layout.kinds)


def test_all_components_at_weight_one_give_the_output_back(tower, images, bases):
    """... less the means, which are not added back: everything in between is exact too."""
    means = sum(part.mean.sum(0) for kind, part in bases.parts.items() if kind != "output")
    with torch.no_grad():
        expected = tower(images)
        assert relative(rk.ResiDual(tower, bases)(images) + means, expected) < 1e-10
        heads = rk.ResiDual(tower, bases.of("head"), rest="sum")
        assert relative(heads(images) + bases.parts["head"].mean.sum(0), expected) < 1e-10
        assert relative(rk.CoarseHeads(tower, rest="sum")(images), expected) < 1e-10
    assert relative(bases.parts["output"].mean[0], expected.mean(0)) < 1e-12


def test_bases_are_those_of_the_units(tower, images, bases):
    with torch.no_grad():
        units = rk.decompose(tower, images).units()
    for row in [bases.layout[1], bases.layout[-1]]:
        x = units[:, row.index] - units[:, row.index].mean(0)
        singular = torch.linalg.svdvals(x)[:20].square() / (len(x) - 1)
        found = bases.explained_variance(row)[:20]
        assert (found - singular[: len(found)]).abs().max() < 1e-12 * max(1.0, float(singular[0]))
        assert bases.components(row).shape == (
            min(bases.dim, bases.parts[row.kind].components.shape[0] // len(bases.parts[row.kind].mean)),
            bases.dim,
        )


def test_cached_units_and_files(tower, images, bases, tmp_path):
    bases.save(tmp_path / "bases.safetensors", dtype=torch.float64)
    loaded = rk.SpectralBases.load(tmp_path / "bases.safetensors")
    assert repr(loaded.layout) == repr(bases.layout)
    cache = rk.encode(tower, images.split(20), kinds=loaded.kinds)
    residual = rk.ResiDual(tower, loaded.truncate(energy=0.9).of("head"), rest="sum", init="normal")
    with torch.no_grad():
        direct = residual(images)
        assert relative(residual.from_units(cache.terms(slice(None))), direct) < 1e-10
        without_others = rk.encode(tower, images.split(20), kinds=("head",))
        assert relative(residual.from_units(without_others.terms(slice(None))), direct) < 1e-10


def test_gradients_through_units_and_checkpointing(tower, images):
    few = images[:3].clone().requires_grad_()
    direct = torch.autograd.grad(tower(few).square().sum(), few)[0]
    ours = torch.autograd.grad(rk.decompose(tower, few).units().sum(1).square().sum(), few)[0]
    assert relative(ours, direct) < 1e-10
    tower.set_grad_checkpointing(True)
    try:
        again = torch.autograd.grad(rk.decompose(tower, few).units().sum(1).square().sum(), few)[0]
    finally:
        tower.set_grad_checkpointing(False)
    assert relative(again, ours) < 1e-10


def test_weights_learn_and_the_tower_stays(tower, images, bases):
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    residual = rk.ResiDual(tower, bases.of("head"))
    residual(images[:4]).square().sum().backward()
    assert 0 < residual.weight.grad.abs().max() < float("inf")
    residual.detach()
    assert all(torch.equal(before[name], value) for name, value in tower.state_dict().items())
    assert all(p.grad is None for p in tower.parameters())


def test_outputs_alone_need_no_units(tower, images, monkeypatch):
    """Nothing is taken apart where no unit is asked for."""
    monkeypatch.setattr(transformer, "attended", None)
    cache = rk.encode(tower, [images[:4]], kinds=())
    assert not cache.z
    with torch.no_grad():
        assert relative(cache.output, tower(images[:4])) < 1e-12


def test_groups_of_images_agree(tower, images, monkeypatch):
    view = towers.view(tower)
    with torch.no_grad():
        whole = view.terms(images[:5], view.layout.kinds)
        monkeypatch.setattr(transformer, "TOKEN_BYTES", 1)
        parts = view.terms(images[:5], view.layout.kinds)
    for kind in view.layout.kinds:
        assert (whole.z[kind] - parts.z[kind]).abs().max() < 1e-12
    assert (whole.output - parts.output).abs().max() < 1e-12


def test_heads_add_up_to_what_attention_adds(tower, images):
    """In the stream: z A + b of a layer's heads, summed, is the attention's term at every token."""
    view = towers.view(tower)
    seen = []

    def look(layer, z, attended):
        maps = stream.stream_maps(view, layer)
        heads = torch.einsum("ntrc,rcw->ntrw", z, maps.A) + maps.b
        seen.append(relative(heads.sum(2), attended))
        return attended

    with torch.no_grad():
        output = view.terms(images[:2], (), look, every_token=True).output
        assert relative(output, tower(images[:2])) < 1e-12
    assert len(seen) == 2
    assert max(seen) < 1e-12


@pytest.mark.parametrize("name", WHOLE[:2])
def test_in_other_code(name, images):
    """A copy in float32 compiles whole, runs in half precision, and merges into torch layers."""
    tower = small(PLAIN[name][0], **PLAIN[name][1], depth=1)
    single = copy.deepcopy(tower).float()
    few = images[:3].float()
    fitted = rk.fit_bases(single, [images.float()]).truncate(energy=0.9)
    residual = rk.ResiDual(single, fitted, rest="sum", init="normal")
    expected = residual(few).detach()
    compiled = torch.compile(residual, backend="eager", fullgraph=True)
    assert relative(compiled(few), expected) < 1e-6
    with torch.no_grad():
        assert relative(residual.merge()(few), expected) < RELATIVE
        own = relative(copy.deepcopy(single).bfloat16()(few.bfloat16()).double(), tower(images[:3]))
        low = copy.deepcopy(residual).bfloat16()(few.bfloat16())
        assert low.dtype == torch.bfloat16
        assert relative(low.float(), expected) < 4 * own


def test_views_need_no_values():
    with torch.device("meta"):
        tower = timm.create_model("vit_so400m_patch14_siglip_378")
    view = towers.view(tower)
    assert repr(view.layout) == "UnitLayout(layers=27, heads=16, pool=True, units=461)"
    assert (view.pooling, view.width, view.dim, view.name) == (
        "attention",
        1152,
        1152,
        "timm.VisionTransformer",
    )


TRAINING = {
    "drop path": (VisionTransformer, {"drop_path_rate": 0.5}, "drop path.*not a sum of units"),
    "dropout": (VisionTransformer, {"proj_drop_rate": 0.5}, "dropout behind attention"),
    "head dropout": (Eva, {"drop_rate": 0.5}, "dropout behind attention or the final norm"),
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_mode_is_refused_where_the_sum_would_not_hold(name):
    family, options, reason = TRAINING[name]
    tower, images = small(family, **options), torch.randn(2, 3, *SIZE, dtype=torch.float64)
    assert relative(rk.decompose(tower, images).units().sum(1), tower(images)) < 1e-12
    with pytest.raises(ValueError, match=reason):
        rk.decompose(tower.train(), images)


def test_training_mode_is_refused_where_units_would_not_repeat():
    images = torch.randn(4, 3, 64, 64)
    for tower, reason in (
        (small(VisionTransformer, patch_drop_rate=0.5).train(), r"drops parts \(PatchDropout\) at random"),
        (
            small(Eva, use_rot_pos_emb=True, rope_type="dinov3", rope_jitter_coords=2.0).train(),
            "moves its positions",
        ),
        (timm.create_model("vit_base_mci_224", depth=1, img_size=64).train(), "by the batch"),
    ):
        with pytest.raises(ValueError, match=reason):
            rk.fit_bases(tower, [images])


def quantised():
    """As bitsandbytes leaves a tower: a linear layer of integers that mean nothing without scales kept
    elsewhere."""
    tower = small(VisionTransformer)
    proj = tower.blocks[1].attn.proj
    proj.weight = torch.nn.Parameter(proj.weight.detach().mul(100).to(torch.int8), requires_grad=False)
    return tower


def wrapped_projection():
    tower = small(VisionTransformer)
    tower.blocks[0].attn.proj = torch.nn.Conv1d(48, 48, 1)
    return tower


def diff_attention():
    return timm.create_model("vit_dwee_patch16_reg1_gap_256", depth=1, img_size=32)


REFUSED = {
    "ConvNeXt": (lambda: timm.create_model("test_convnext"), r"ConvNeXt is hierarchical \(stages\)"),
    "Swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)),
        "Swin.* is hierarchical",
    ),
    "ResNet": (lambda: timm.create_model("test_resnet"), "is hierarchical"),
    "FastViT": (lambda: timm.create_model("fastvit_t8", layers=(1, 1, 1, 1)), "FastVit is hierarchical"),
    "EfficientNet": (lambda: timm.create_model("test_efficientnet"), "lacks patch_embed"),
    "SAM": (lambda: timm.create_model("samvit_base_patch16_224", depth=1, img_size=64), "unknown parts neck"),
    "NaFlex": (lambda: timm.create_model("naflexvit_base_patch16_gap", depth=1), "lacks patch_embed"),
    "CaiT": (lambda: timm.create_model("cait_xxs24_224", depth=1), "blocks_token_only"),
    "parallel": (lambda: timm.create_model("vit_pwee_patch16_reg1_gap_256", depth=1), "parallel branches"),
    "differential attention": (diff_attention, "sub_norm"),
    "maximum": (lambda: small(VisionTransformer, global_pool="max"), "a maximum is no sum"),
    "no pooling": (lambda: small(VisionTransformer, global_pool=""), "no pooled embedding"),
    "two norms": (lambda: small(Eva, use_fc_norm=True, use_post_transformer_norm=True), "normalises twice"),
    "parameter-free pooling": (lambda: small(VisionTransformer, global_pool="prr"), "AttentionPoolPrr"),
    "two classifiers": (lambda: small(VisionTransformerDistilled, num_classes=5), "reset_classifier"),
    "MLP head": (
        lambda: TimmModel("test_vit", 8, image_size=160, pool="avg", proj="mlp"),
        "its head is not linear",
    ),
    "quantised": (quantised, "proj of attention in block 1 is quantised \\(torch.int8\\)"),
    "another projection": (wrapped_projection, "proj of attention in block 0 is Conv1d"),
    "two poolings": (lambda: build(attentional_pool="parallel"), "pools twice"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_towers_say_why(name):
    make, reason = REFUSED[name]
    with pytest.raises(rk.UnsupportedTowerError, match=reason) as error:
        towers.view(make())
    assert "supported are" in str(error.value)


def test_an_unknown_tower_hears_what_was_looked_for():
    with pytest.raises(
        rk.UnsupportedTowerError, match="Linear is not an image tower.*resblocks.*forward_features"
    ):
        towers.view(torch.nn.Linear(2, 2))
