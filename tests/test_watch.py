"""A tower that is changed after an adapter was made or images ran: named at the next use,
whatever was changed."""

import types

import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from test_hugging_face import clip
from test_hugging_face import images_for as pictures_for
from test_inject import TinyClip
from test_towers import build, images_for, relative
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import residual_kernels as rk
from residual_kernels.towers import agreement
from residual_kernels.towers.watch import Watch


def small_timm(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2, "init_values": 0.5}
    return timm.create_model("vit_tiny_patch16_224", **(sizes | {"num_classes": 0} | options)).eval()


def without_bias():
    tower = small_timm()
    for block in tower.blocks:
        block.attn.proj.register_parameter("bias", None)
    return tower


def add_bias(linear):
    linear.bias = nn.Parameter(torch.ones(linear.out_features), requires_grad=False)


def lora(tower, name):
    get_peft_model(tower, LoraConfig(r=2, target_modules=[name]))


def longer(blocks, block):
    blocks.append(block)


TIMM = lambda _: torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))  # noqa: E731
OURS = lambda tower: images_for(tower, 4)  # noqa: E731
CLIP = lambda tower: pictures_for(tower, 4)  # noqa: E731

STRUCTURE = {  # tower, its images, what is done to it, and what is said
    "bias added": (
        without_bias,
        TIMM,
        lambda t: add_bias(t.blocks[1].attn.proj),
        "blocks.1.attn.proj.bias has been added",
    ),
    "bias taken away": (
        small_timm,
        TIMM,
        lambda t: t.blocks[0].attn.proj.register_parameter("bias", None),
        "proj.bias has been taken away",
    ),
    "LayerScale taken away": (
        small_timm,
        TIMM,
        lambda t: setattr(t.blocks[0], "ls1", nn.Identity()),
        "blocks.0.ls1.gamma has been taken away",
    ),
    "LoRA on proj": (small_timm, TIMM, lambda t: lora(t, "attn.proj"), r"merge_and_unload\(\)"),
    "LoRA on out_proj": (build, OURS, lambda t: lora(t, "out_proj"), r"merge_and_unload\(\)"),
    "LoRA on visual_projection": (
        clip,
        CLIP,
        lambda m: lora(m, "visual_projection"),
        r"merge_and_unload\(\)",
    ),
    "LoRA on transformers' out_proj": (clip, CLIP, lambda m: lora(m, "out_proj"), r"merge_and_unload\(\)"),
    "num_heads": (
        small_timm,
        TIMM,
        lambda t: [setattr(block.attn, "num_heads", 4) for block in t.blocks],
        "number of heads is 4 now, and was 2",
    ),
    "block appended": (
        build,
        OURS,
        lambda t: t.transformer.resblocks.append(build().transformer.resblocks[0]),
        "it has 3 blocks now, and had 2",
    ),
    "block removed": (small_timm, TIMM, lambda t: t.blocks.__delitem__(1), "it has 2 blocks now, and had 3"),
    "layers cut": (
        clip,
        CLIP,
        lambda m: setattr(m.vision_model.encoder, "layers", m.vision_model.encoder.layers[:1]),
        r"has other parts than it had \(layers\)",
    ),
    "pool_type": (
        build,
        OURS,
        lambda t: setattr(t, "pool_type", "avg"),
        "pooling is 'average, norm before' now, and was 'class token'",
    ),
    "global_pool": (
        small_timm,
        TIMM,
        lambda t: setattr(t, "global_pool", "avg"),
        "pooling is 'average, norm before' now",
    ),
    "reset_classifier": (
        small_timm,
        TIMM,
        lambda t: t.reset_classifier(10),
        r"embedding \(D\) is 10 now, and was 64",
    ),
    "prune_intermediate_layers": (
        small_timm,
        TIMM,
        lambda t: t.prune_intermediate_layers([1], prune_norm=False, prune_head=False),
        "it has 2 blocks now",
    ),
    "pruned with its norm": (
        small_timm,
        TIMM,
        lambda t: t.prune_intermediate_layers([2]),
        "there is no pooled embedding",
    ),
    "projection taken off": (build, OURS, lambda t: setattr(t, "proj", None), r"embedding \(D\) is 48 now"),
    "projection replaced": (
        clip,
        CLIP,
        lambda m: setattr(m, "visual_projection", nn.Linear(48, 32, bias=False)),
        r"other parts than it had \(projection\)",
    ),
}


@pytest.mark.parametrize("case", STRUCTURE)
def test_a_changed_structure_is_named_wherever_the_tower_is_used_next(case, tmp_path):
    make, pictures, change, said = STRUCTURE[case]
    tower = make()
    images = pictures(tower)
    cache = rk.encode(tower, [(images, torch.tensor([0, 1, 0, 1]))])
    head = rk.ZeroShotHead.from_prototypes(cache)
    bases = rk.fit_bases(tower, [images]).truncate(energy=0.9)
    residual, unchecked = rk.ResiDual(tower, bases), rk.ResiDual(tower, bases, check=False)
    with torch.no_grad():
        residual(images)
        parts = rk.decompose(tower, images)
    change(tower)
    uses = {
        "forward": lambda: residual(images),
        "forward without the check": lambda: unchecked(images),
        "units": parts.units,
        "fit": lambda: rk.fit(residual, head, cache, epochs=1),
        "save": lambda: rk.save_adapter(residual, tmp_path / "a"),
        "merge": residual.merge,
        "check": residual.check,
    }
    for name, use in uses.items():
        with pytest.raises(ValueError, match="decompose" if name == "units" else said):
            use()
    assert not list(tmp_path.iterdir())


def louder(function):
    def call(*args, **kwargs):
        found = function(*args, **kwargs)
        return found * 1.1 if isinstance(found, torch.Tensor) else found

    return call


def of_ones_own(module, query, key, value, mask, **options):
    return value.transpose(1, 2), None


def patch_class(kind, name, monkeypatch):
    monkeypatch.setattr(kind, name, louder(getattr(kind, name)))


def _louder(features):
    """1.1 times what get_image_features returns: a tensor before transformers 5, then a record."""
    if isinstance(features, torch.Tensor):
        return 1.1 * features
    features.pooler_output = 1.1 * features.pooler_output
    return features


def features(model):
    """get_image_features of this one model, made louder."""
    own = model.get_image_features

    def get_image_features(self, pixel_values, **options):
        return _louder(own(pixel_values=pixel_values, **options))

    model.get_image_features = types.MethodType(get_image_features, model)


def features_of_a_subclass(model):
    class Louder(type(model)):
        def get_image_features(self, pixel_values, **options):
            return _louder(super().get_image_features(pixel_values=pixel_values, **options))

    model.__class__ = Louder


def hooked_everywhere(tower, monkeypatch):
    kind = type(tower.transformer.resblocks[0])
    return register_module_forward_hook(lambda m, args, output: 1.1 * output if isinstance(m, kind) else None)


def fed_everywhere(tower, monkeypatch):
    kind = type(tower.transformer.resblocks[0])

    def feed(module, args):
        return (1.1 * args[0], *args[1:]) if isinstance(module, kind) else None

    return register_module_forward_pre_hook(feed)


CALLS = {
    "a method of the blocks' class": (
        build,
        OURS,
        lambda t, m: patch_class(type(t.transformer.resblocks[0]), "attention", m),
        r"ResidualAttentionBlock.attention was replaced",
    ),
    "a class's forward": (
        small_timm,
        TIMM,
        lambda t, m: patch_class(type(t.blocks[0]), "forward", m),
        "Block.forward was replaced",
    ),
    "forward_features of the class": (
        small_timm,
        TIMM,
        lambda t, m: patch_class(type(t), "forward_features", m),
        "VisionTransformer.forward_features was replaced",
    ),
    "forward_features of the tower": (
        small_timm,
        TIMM,
        lambda t, m: setattr(t, "forward_features", louder(t.forward_features)),
        "forward_features of the module itself was replaced",
    ),
    "forward_head of the tower": (
        small_timm,
        TIMM,
        lambda t, m: setattr(t, "forward_head", louder(t.forward_head)),
        "forward_head of the module itself was replaced",
    ),
    "a hook on all modules": (build, OURS, hooked_everywhere, "a hook stands on all modules"),
    "a hook before all modules": (build, OURS, fed_everywhere, "a hook stands on all modules"),
    "a function of torch": (
        build,
        OURS,
        lambda t, m: m.setattr(nn.functional, "layer_norm", louder(nn.functional.layer_norm)),
        "torch.nn.functional.layer_norm was replaced by louder",
    ),
    "an attention function of transformers": (
        clip,
        CLIP,
        lambda model, m: m.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", of_ones_own),
        "attention function 'sdpa' of transformers is of_ones_own",
    ),
    "get_image_features": (
        clip,
        CLIP,
        lambda model, m: features(model),
        "get_image_features of the CLIPModel was replaced",
    ),
    "get_image_features of a subclass": (
        clip,
        CLIP,
        lambda model, m: features_of_a_subclass(model),
        "the CLIPModel|Louder of test_watch",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_changed_call_is_found_at_the_next_forward(case, monkeypatch):
    make, pictures, change, said = CALLS[case]
    tower = make()
    images = pictures(tower)
    residual = rk.ResiDual(tower, rk.fit_bases(tower, [images]).truncate(energy=0.9))
    with torch.no_grad():
        before = residual(images)
        handle = change(tower, monkeypatch)
        try:
            if said is None:  # the model itself cannot run
                with pytest.raises(Exception):  # noqa: B017
                    residual(images)
                return
            for use in (lambda: residual(images), lambda: rk.decompose(tower, images)):
                with pytest.raises(ValueError, match=said):
                    use()
        finally:
            if handle is not None and hasattr(handle, "remove"):
                handle.remove()
        monkeypatch.undo()
        if hasattr(handle, "remove") or "function of" in case:
            assert torch.equal(residual(images), before)


def checks(monkeypatch):
    calls = []
    original = agreement.check
    monkeypatch.setattr(
        agreement, "check", lambda view, image: calls.append(len(image)) or original(view, image)
    )
    return calls


def test_a_counter_and_a_switch_do_not_run_the_check_again_and_again(monkeypatch):
    tower = build()
    images = images_for(tower, 4)
    tower.transformer.resblocks[0].calls = 0
    residual = rk.ResiDual(tower, rk.fit_bases(tower, [images]))
    residual(images)
    calls = checks(monkeypatch)
    for _ in range(10):
        tower.transformer.resblocks[0].calls += 1
        residual(images)
    assert len(calls) <= 3
    calls.clear()
    for _ in range(10):
        tower.output_tokens = not tower.output_tokens
        residual(images)
    assert len(calls) <= 1
    tower.transformer.resblocks[0].attn.num_heads = 6  # the other settings are watched as ever
    with pytest.raises(ValueError, match="number of heads is 6 now"):
        residual(images)


def test_modes_casts_and_what_a_module_remembers_are_no_change():
    tower = build()
    watch = Watch(tower)
    tower.train().eval().double().float().requires_grad_(False)
    with torch.no_grad():
        tower.proj.mul_(2)
    assert watch.unchanged()
    tower.seen = torch.zeros(3)
    assert not watch.unchanged()
    watch = Watch(tower)
    tower.seen = torch.ones(3)
    assert watch.unchanged()
    tower.scale = None
    watch = Watch(tower)
    tower.scale = torch.ones(3)
    assert not watch.unchanged()


def test_units_are_of_the_weights_that_ran():
    tower = build()
    images = images_for(tower)
    parts = rk.decompose(tower, images)
    with torch.no_grad():
        tower.transformer.resblocks[0].mlp.c_fc.weight.mul_(2)  # read by no map
        assert relative(parts.units().sum(1), parts.output) < 1e-5
        tower.transformer.resblocks[1].attn.out_proj.weight.mul_(2)
    with pytest.raises(ValueError, match=r"resblocks.1.attn.out_proj.weight, .*decompose them again"):
        parts.units()


def test_by_hand_what_no_counter_sees():
    tower = build()
    images = images_for(tower, 4)
    residual = rk.ResiDual(tower, rk.fit_bases(tower, [images]).truncate(energy=0.9))
    residual.check()
    residual.check(images)
    compiled = torch.compile(residual, backend="eager")
    compiled(images)
    residual(images)  # the first plain call compares all values, as after a change of structure
    tower.transformer.resblocks[1].attn.out_proj.weight.data[3, 5] += 1.0
    residual(images)
    compiled(images)
    with pytest.raises(
        ValueError, match=r"changed since it was made \(transformer.resblocks.1.attn.out_proj"
    ):
        residual.check()
    tower.transformer.resblocks[1].attn.out_proj.weight.data[3, 5] -= 1.0
    residual.check()
    tower.transformer.resblocks[0].forward = louder(tower.transformer.resblocks[0].forward)
    compiled(images)
    with pytest.raises(rk.UnsupportedTowerError, match="forward of the module itself was replaced"):
        residual.check(images)


def test_an_encode_image_that_adds_to_the_tower_is_refused_where_an_adapter_attaches():
    model = TinyClip()
    images = images_for(model.visual, 8)
    bases = rk.fit_bases(model.visual, [images]).truncate(energy=0.9)
    flags = [p.requires_grad for p in model.parameters()]

    class More(TinyClip):
        def encode_image(self, images, normalize=False):
            return self.visual(images) + 1.0

    class Normalised(TinyClip):
        def encode_image(self, images):
            return nn.functional.normalize(self.visual(images), dim=-1)

    model.__class__ = Normalised
    rk.attach(model, bases).detach()
    model.__class__ = More
    said = r"More.encode_image gives other numbers than the tower at .visual \(.* check=False\)"
    with pytest.raises(rk.UnsupportedTowerError, match=said):
        rk.attach(model, bases)
    adapter = rk.ResiDual(model.visual, bases)
    with pytest.raises(rk.UnsupportedTowerError, match=said):
        rk.attach(model, adapter=adapter)
    adapter.detach()
    assert flags == [p.requires_grad for p in model.parameters()]
    rk.attach(model, bases, check=False).detach()
    model.__class__ = TinyClip
    model.encode_image = lambda images: 2 * model.visual(images)
    with pytest.raises(rk.UnsupportedTowerError, match="encode_image gives other numbers"):
        rk.attach(model, bases)
