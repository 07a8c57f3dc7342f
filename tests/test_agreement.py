"""What is decomposed is what the model computes: compared on one image,
and refused with the place where it is not."""

import copy
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_hugging_face import clip
from test_hugging_face import images_for as pictures_for
from test_timm_towers import SIZE, small
from test_towers import build, images_for, plain, relative
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import residual_kernels as rk
from residual_kernels import towers
from residual_kernels.towers import agreement, watch


def blocks_of(tower):
    return towers.view(tower).blocks


def timm_images(count=3, dtype=torch.float64):
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1), dtype=dtype)


FAMILIES = {
    "open_clip": lambda: (tower := build(layers=3), images_for(tower)),
    "timm": lambda: (small(VisionTransformer, depth=3), timm_images()),
    "eva": lambda: (small(Eva, depth=3), timm_images()),
    "transformers": lambda: (model := clip(num_hidden_layers=3), pictures_for(model)),
}


def _amplified(output):
    """1.01 times a block's output, which is the first of a tuple in transformers 4."""
    return (output[0] * 1.01, *output[1:]) if isinstance(output, tuple) else output * 1.01


def louder(block):
    """A subclass with a forward of its own and no new parts."""

    class Louder(type(block)):
        def forward(self, *args, **kwargs):
            return _amplified(super().forward(*args, **kwargs))

    block.__class__ = Louder


def patched(block):
    original = block.forward

    def forward(self, *args, **kwargs):
        return _amplified(original(*args, **kwargs))

    block.forward = types.MethodType(forward, block)


def hooked(block):
    def amplify(module, args, output):
        return _amplified(output)

    block.register_forward_hook(amplify)


def fed_more(block):
    def feed(module, args, kwargs):
        return (args[0] * 1.01, *args[1:]), kwargs

    block.register_forward_pre_hook(feed, with_kwargs=True)


@pytest.mark.parametrize("change", [louder, patched, hooked, fed_more], ids=lambda f: f.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_that_computes_something_else_is_refused_and_named(family, change):
    tower, images = FAMILIES[family]()
    rk.decompose(tower, images)  # checked, and found in agreement
    change(blocks_of(tower)[1])
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tower.modules()]
    named = {"louder": "Louder", "patched": "patched", "hooked": "amplify", "fed_more": "feed"}[
        change.__name__
    ]
    with pytest.raises(rk.UnsupportedTowerError, match=f"at block 1, where .*{named}"):
        rk.decompose(tower, images)
    with pytest.raises(rk.UnsupportedTowerError, match="block 1"):
        rk.fit_bases(tower, [images])
    with pytest.raises(rk.UnsupportedTowerError, match="block 1"):
        rk.encode(tower, [images])
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tower.modules()]
    parts = rk.decompose(tower, images, check=False)  # for those who know
    assert parts.output.shape[0] == len(images)
    rk.fit_bases(tower, [images], check=False)
    rk.encode(tower, [images], check=False)


def test_an_attached_adapter_notices_a_change_at_its_next_forward():
    tower = build()
    images = images_for(tower, 8)
    residual = rk.ResiDual(tower, rk.fit_bases(tower, [images]))
    before = residual(images)
    handle = tower.transformer.resblocks[0].register_forward_hook(lambda module, args, output: 1.1 * output)
    with pytest.raises(rk.UnsupportedTowerError, match="block 0"):
        residual(images)
    handle.remove()
    assert torch.equal(residual(images), before)
    tower.transformer.resblocks[0].attention = lambda q_x, **more: torch.zeros_like(q_x)
    with pytest.raises(
        rk.UnsupportedTowerError, match="block 0, where attention of the module itself was replaced"
    ):
        residual(images)


def test_hooks_that_only_read_are_allowed():
    tower, seen = build(), []
    images = images_for(tower)
    for block in tower.transformer.resblocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    expected = plain(tower, images)
    assert relative(rk.decompose(tower, images).units().sum(1), expected) < 1e-5
    assert seen


def test_changes_outside_the_blocks_are_told_from_those_inside():
    tower = build()
    images = images_for(tower)
    tower.ln_pre.register_forward_hook(lambda module, args, output: output * 1.01)
    rk.decompose(tower, images)  # ln_pre is called, so its hook is part of the unit `emb`
    tower.conv1.forward = lambda x: 0.0 * nn.Conv2d.forward(tower.conv1, x)
    rk.decompose(tower, images)
    original = tower.forward
    tower.forward = lambda x: original(x) * 1.5
    with pytest.raises(
        rk.UnsupportedTowerError, match="after the last block, where .*forward of the module itself"
    ):
        rk.decompose(tower, images)


def test_a_block_that_is_not_run_is_named():
    tower = build(layers=3)
    images = images_for(tower)
    transformer = tower.transformer

    def skipping(x, attn_mask=None):
        return transformer.resblocks[2](transformer.resblocks[0](x))

    transformer.forward = skipping
    with pytest.raises(rk.UnsupportedTowerError, match="does not run block 1.*forward of transformer was"):
        rk.decompose(tower, images)


def test_blocks_that_run_twice_or_in_another_order_are_named():
    tower = build(layers=3)
    images = images_for(tower)
    blocks, transformer = tower.transformer.resblocks, tower.transformer

    def twice(x, attn_mask=None):
        return blocks[2](blocks[1](blocks[1](blocks[0](x))))

    def backwards(x, attn_mask=None):
        return blocks[0](blocks[1](blocks[2](x)))

    replaced = ".*forward of transformer was replaced by"
    transformer.forward = twice
    with pytest.raises(
        rk.UnsupportedTowerError, match=r"runs block 1 \(Residual\w*\) 2 times for an image" + replaced
    ):
        rk.decompose(tower, images)
    transformer.forward = backwards
    with pytest.raises(rk.UnsupportedTowerError, match="runs its blocks in another order" + replaced):
        rk.decompose(tower, images)
    del transformer.forward
    whole = tower.forward
    tower.forward = lambda x: (whole(x) + whole(x.flip(-1))) / 2
    with pytest.raises(
        rk.UnsupportedTowerError, match="runs block 0 .* 2 times .*forward of the module itself"
    ):
        rk.decompose(tower, images)


def test_a_block_in_several_places_is_told_apart_by_the_order_of_calls(monkeypatch):
    """Where rounding asks for a second look, each of its calls is compared with its own."""
    monkeypatch.setattr(agreement, "ROUNDINGS", 0)
    tower = build(layers=3)
    tower.transformer.resblocks[1] = tower.transformer.resblocks[2] = tower.transformer.resblocks[0]
    rk.decompose(tower, images_for(tower))


def test_a_change_that_is_zero_at_first_is_seen_once_it_has_trained():
    tower = build(layers=3)
    images = images_for(tower)
    block = tower.transformer.resblocks[1]

    class Gated(type(block)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) * (1 + self.ln_1.gate)

    block.__class__ = Gated
    block.ln_1.gate = nn.Parameter(torch.zeros(()))
    rk.decompose(tower, images)
    with torch.no_grad():
        block.ln_1.gate.fill_(0.1)
    with pytest.raises(rk.UnsupportedTowerError, match="block 1, where the module itself is Gated"):
        rk.decompose(tower, images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rounding_of_every_dtype_is_told_from_a_change(dtype):
    tower = build(layers=8).to(dtype)
    images = images_for(tower, dtype=dtype)
    rk.decompose(tower, images)
    hooked_block = tower.transformer.resblocks[5]
    hooked_block.register_forward_hook(lambda module, args, output: output * 1.1)
    with pytest.raises(rk.UnsupportedTowerError, match="at block 5"):
        rk.decompose(tower, images)


def test_every_block_agrees_far_below_the_bound(monkeypatch):
    """The bound on one block has room for other machines: what is seen here is a fraction of it."""
    seen = []
    original = agreement._roundings

    def recorded(*args):
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(agreement, "_roundings", recorded)
    for family in FAMILIES.values():
        for dtype, bound in ((torch.float32, agreement.BLOCK), (torch.bfloat16, agreement.HALF_BLOCK)):
            tower, images = family()
            view = towers.view(tower.to(dtype))
            image = images[:1].to(dtype)
            with torch.no_grad():
                own, terms = view.own(image), view.run(image, view.layout.kinds)
                seen.clear()
                assert agreement._where_streams_part(view, image, own) is None
                assert (
                    agreement._where_sums_part(view, image, terms, *agreement._sum_of_units(view, terms))
                    is None
                )
            assert len(seen) >= 2 * view.layout.layers + 2
            assert max(seen) < bound / 3


def test_runs_once_until_something_changes(monkeypatch):
    calls = []
    original = agreement.check
    monkeypatch.setattr(
        agreement, "check", lambda view, image: calls.append(len(image)) or original(view, image)
    )
    tower = build()
    images = images_for(tower, 4)
    for _ in range(3):
        rk.decompose(tower, images)
        bases = rk.fit_bases(tower, [images, images])
        rk.encode(tower, [images, images])
    residual = rk.ResiDual(tower, bases)
    for _ in range(3):
        residual(images)
    assert calls == [1]
    tower.transformer.resblocks[0].register_forward_hook(lambda *_: None)
    residual(images)
    residual(images)
    assert calls == [1, 1]
    copied = copy.deepcopy(residual)
    copied(images)
    assert calls == [1, 1, 1]
    rk.ResiDual(build(seed=1), rk.fit_bases(build(seed=1), [images]), check=False)(images)


def test_leaves_random_numbers_gradients_and_training_parts_alone():
    tower = build(patch_dropout=0.5).train()
    images = images_for(tower)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tower.eval()
    rk.decompose(tower, images)
    assert torch.equal(torch.rand(1), expected)
    tower.train()
    torch.manual_seed(7)
    own = tower(images)
    torch.manual_seed(7)
    assert relative(rk.decompose(tower, images).units().sum(1), own) < 1e-5
    assert all(p.grad is None for p in tower.parameters())


def test_costs_nothing_in_compiled_and_exported_code(monkeypatch):
    tower = build()
    images = images_for(tower, 4)
    residual = rk.ResiDual(tower, rk.fit_bases(tower, [images]))
    expected = residual(images).detach()

    def never(*_):
        raise AssertionError("the check ran")

    monkeypatch.setattr(agreement, "check", never)
    monkeypatch.setattr(watch.Watch, "unchanged", never)
    compiled = torch.compile(residual, backend="eager", fullgraph=True)
    assert relative(compiled(images), expected) < 1e-6
    with torch.no_grad():
        exported = torch.export.export(residual, (images,)).module()
        assert relative(exported(images), expected) < 1e-6


def lora(model, *names):
    """The model with a LoRA that is not merged and not zero."""
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=list(names))).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return wrapped


def separate(tower):
    for block in tower.blocks:
        block.attn.qkv_bias_separate = True
    return tower


LORA = {  # what the LoRA is on, and whether its tower is exact with it
    "open_clip MLP": (build, images_for, ["c_fc", "c_proj"], True),
    "open_clip out_proj": (build, images_for, ["out_proj"], False),
    "open_clip attention": (build, images_for, ["attn"], False),
    "timm qkv": (lambda: small(VisionTransformer), lambda _: timm_images(), ["qkv"], True),
    "timm proj": (lambda: small(VisionTransformer), lambda _: timm_images(), ["attn.proj"], False),
    "timm head": (lambda: small(VisionTransformer, num_classes=7), lambda _: timm_images(), ["head"], False),
    "EVA qkv, biases apart": (
        lambda: separate(small(Eva, qkv_fused=True, qkv_bias=True)),
        lambda _: timm_images(),
        ["qkv"],
        True,
    ),
    "EVA qkv, biases in": (lambda: small(Eva, qkv_fused=True), lambda _: timm_images(), ["qkv"], False),
    "transformers q, v, MLP": (clip, pictures_for, ["q_proj", "v_proj", "fc1"], True),
    "transformers out_proj": (clip, pictures_for, ["out_proj"], False),
    "transformers projection": (clip, pictures_for, ["visual_projection"], False),
}


@pytest.mark.parametrize("case", LORA)
def test_a_lora_that_is_not_merged(case):
    """Exact where the layer is called; refused by name where its weight is what units are made of."""
    make, images, names, exact = LORA[case]
    tower = make()
    pictures = images(tower)
    wrapped = lora(tower, *names)
    own = towers.view(tower).own if exact else None
    for given in (tower, wrapped):
        if exact:
            with torch.no_grad():
                assert relative(rk.decompose(given, pictures).units().sum(1), own(pictures)) < 1e-5
        else:
            with pytest.raises(rk.UnsupportedTowerError, match=r"merge_and_unload\(\)"):
                rk.decompose(given, pictures)
    merged = wrapped.merge_and_unload()
    with torch.no_grad():
        assert (
            relative(rk.decompose(merged, pictures).units().sum(1), towers.view(merged).own(pictures)) < 1e-5
        )
