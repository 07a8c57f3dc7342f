"""What is folded into constants may not train by any door.

What an adapter stands in tells the truth about it.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from test_hugging_face import clip, pooled
from test_hugging_face import images_for as pictures_for
from test_inject import TinyClip
from test_timm_towers import small
from test_towers import build, images_for, relative
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import residual_kernels as rk

FOLDED = "transformer.resblocks.0.attn.out_proj.weight"


def made(**options):
    tower = build()
    images = images_for(tower, 8)
    bases = rk.fit_bases(tower, [images]).truncate(energy=0.9)
    return rk.ResiDual(tower, bases, **options), images


def step(residual, images, optimizer):
    optimizer.zero_grad()
    residual(images).square().mean().backward()
    optimizer.step()


def test_thawed_parameters_are_refused_when_they_would_train():
    residual, images = made()
    residual.requires_grad_(True)
    with pytest.raises(ValueError, match=r"parameters that are folded .* would train \(.*proj"):
        residual(images)
    with torch.no_grad():
        residual(images)  # nothing trains here
    residual.freeze()
    residual(images)


def test_an_optimizer_that_was_given_the_parameters_before():
    tower = build()
    images = images_for(tower, 8)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-3)
    tower(images).square().mean().backward()
    residual = rk.ResiDual(tower, rk.fit_bases(tower, [images]).truncate(energy=0.9))
    residual(images)
    optimizer.step()  # gradients of before
    with pytest.raises(ValueError, match="have changed since it was made .*fit bases of this tower"):
        residual(images)


@pytest.mark.parametrize("tokens", ["output", "stream"])
def test_in_place_edits_and_loads(tokens):
    tower = build()
    images = images_for(tower, 8)
    bases = rk.fit_bases(tower, [images], placement=tokens).truncate(energy=0.9)
    residual = rk.ResiDual(tower, bases, placement=tokens)
    expected, state = residual(images), copy.deepcopy(tower.state_dict())
    with torch.no_grad():
        tower.get_parameter(FOLDED).mul_(1.001)
    with pytest.raises(ValueError, match=f"1 parameters .*{FOLDED} by 1.0e-03"):
        residual(images)
    tower.load_state_dict(state)  # versions rise, values are the old ones
    assert torch.equal(residual(images), expected)
    tower.load_state_dict(build(seed=1).state_dict())
    with pytest.raises(ValueError, match="have changed since"):
        residual(images)
    with torch.no_grad():
        tower.load_state_dict(state)
        tower.get_parameter("proj").copy_(tower.get_parameter("proj"))
        tower.transformer.resblocks[0].attn.out_proj.weight = nn.Parameter(
            2 * tower.transformer.resblocks[0].attn.out_proj.weight
        )
    with pytest.raises(ValueError, match="have changed since|would train"):
        residual(images)


def test_what_may_change():
    """Casts, copies, the whole module's own state, merging and unmerging, and what is not folded."""
    residual, images = made(train_tower=False)
    expected = residual(images)
    assert torch.equal(copy.deepcopy(residual)(images), expected)
    other, _ = made()
    other.load_state_dict(residual.state_dict())
    assert torch.equal(other(images), expected)
    assert relative(residual.double()(images.double()).float(), expected) < 1e-5
    residual.float()
    with torch.no_grad():
        residual.tower.transformer.resblocks[1].mlp.c_fc.weight.mul_(1.1)
        residual.weight.mul_(1.1)
    residual(images)
    tower = build()
    stream = rk.ResiDual(
        tower, rk.fit_bases(tower, [images], placement="stream"), placement="stream", init="normal"
    )
    expected = stream(images)
    stream.merge()
    assert relative(stream(images), expected) < 1e-5
    stream.unmerge()
    assert torch.equal(stream(images), expected)


def test_a_tower_that_trains_may_train_what_is_not_folded():
    tower = build()
    images = images_for(tower, 8)
    for name, p in tower.named_parameters():
        p.requires_grad_("mlp" in name)
    residual = rk.ResiDual(tower, rk.fit_bases(tower, [images]).truncate(energy=0.9), train_tower=True)
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.1)
    for _ in range(3):
        step(residual, images, optimizer)
    tower.proj.requires_grad_(True)
    with pytest.raises(ValueError, match=r"would train \(proj\)"):
        residual(images)


@pytest.mark.parametrize("average", ["swa_utils", "timm"])
def test_the_rounding_of_a_weight_average_is_not_training(average, tmp_path):
    residual, images = made()
    if average == "timm":
        ema, update = ModelEmaV3(residual, decay=0.9, foreach=False), lambda: ema.update(residual)
    else:
        ema = AveragedModel(residual, avg_fn=get_ema_avg_fn(0.9))
        update = lambda: ema.update_parameters(residual)  # noqa: E731
    for _ in range(50):
        with torch.no_grad():
            residual.weight.add_(0.01)
        update()
    ours, theirs = ema.module.tower.state_dict(), residual.tower.state_dict()
    if average == "swa_utils":
        assert any(not torch.equal(ours[name], value) for name, value in theirs.items())
    rk.save_adapter(ema.module, tmp_path / "a")
    loaded = rk.load_adapter(residual.detach(), tmp_path / "a")
    assert relative(loaded(images), ema.module(images)) < 1e-5
    with torch.no_grad():
        ema.module.tower.transformer.resblocks[0].mlp.c_fc.weight.mul_(1.0001)
    with pytest.raises(ValueError, match="a weight average moved it beyond rounding"):
        rk.save_adapter(ema.module, tmp_path / "b")


def test_attach_inside_wrappers_leaves_no_key():
    images = images_for(build(), 8)

    def lora(model):
        return get_peft_model(model, LoraConfig(r=2, target_modules=["c_fc"])).eval()

    def compiled(model):
        return torch.compile(model, backend="eager")

    class PassesOn(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.clip = model

        @property
        def visual(self):
            return self.clip.visual

        def encode_image(self, images):
            return self.clip.encode_image(images)

    for wrap in (lora, compiled, PassesOn, nn.DataParallel):
        model = wrap(TinyClip())
        inside = model.module if wrap is nn.DataParallel else model
        bases = rk.fit_bases(inside.visual, [images]).truncate(energy=0.9)
        keys, before = list(model.state_dict()), inside.encode_image(images)
        with rk.attach(model, bases) as handle:
            assert torch.equal(inside.encode_image(images), handle.residual(images))
            assert relative(inside.encode_image(images), before) > 1e-2
            with pytest.raises(ValueError, match="attached to this model already"):
                rk.attach(model, bases)
        assert list(model.state_dict()) == keys
        assert torch.equal(inside.encode_image(images), before)
    twice = TinyClip()
    outer = PassesOn(twice)
    outer.also = twice.visual
    with pytest.raises(ValueError, match="registered in 2 places"):
        rk.attach(outer, bases)


def test_attach_to_a_transformers_model_with_a_lora():
    model = clip()
    images = pictures_for(model, 8)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    bases = rk.fit_bases(wrapped, [images]).truncate(energy=0.9)
    keys = list(wrapped.state_dict())
    with torch.no_grad():
        before = pooled(model.get_image_features(images))
        with rk.attach(wrapped, bases) as handle:
            assert torch.equal(pooled(wrapped.get_image_features(images)), handle.residual(images)[0])
        assert torch.equal(pooled(model.get_image_features(images)), before)
    assert list(wrapped.state_dict()) == keys


def test_other_doors_to_features_tell_the_truth():
    residual, images = made(init="normal")
    found = residual.forward_intermediates(images, indices=1)
    assert torch.equal(found["image_features"], residual(images))
    plain = residual.tower.forward_intermediates(images, indices=1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(found["image_intermediates"], plain["image_intermediates"], strict=True)
    )
    tower = build()
    stream = rk.ResiDual(tower, rk.fit_bases(tower, [images], placement="stream"), placement="stream")
    with pytest.raises(ValueError, match="StreamResiDual changes the tokens inside it"):
        stream.forward_intermediates(images, indices=1)
    timm = small(VisionTransformer).float()
    pictures = torch.randn(4, 3, 32, 48)
    standing = rk.ResiDual(timm, rk.fit_bases(timm, [pictures]))
    assert torch.equal(standing.forward_features(pictures), timm.forward_features(pictures))
    with pytest.raises(ValueError, match="forward_head is the plain tower's"):
        standing.forward_head(timm.forward_features(pictures))
    assert hasattr(standing, "forward_head")
    assert not hasattr(residual, "forward_head")


@pytest.mark.parametrize("where", ["attn.proj", "ls1"])
def test_a_folded_weight_that_is_computed_from_others_is_watched(where):
    import timm

    torch.manual_seed(0)
    tower = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=64,
        depth=2,
        num_heads=2,
        init_values=0.5,
        num_classes=16,
    ).eval()
    images = torch.randn(4, 3, 32, 32)
    part = tower.blocks[1].get_submodule(where)
    name = "weight" if where == "attn.proj" else "gamma"
    torch.nn.utils.parametrize.register_parametrization(part, name, torch.nn.Identity())
    residual = rk.ResiDual(tower, rk.fit_bases(tower, [images]))
    residual(images)
    with torch.no_grad():
        getattr(part.parametrizations, name).original.mul_(1.7)
    with pytest.raises(ValueError, match="have changed since it was made"):
        residual(images)


def test_a_replaced_parameter_and_a_replaced_module_are_noticed():
    def made():
        model = rk.load_bundled()[0]
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return model.visual, rk.ResiDual(model.visual, rk.fit_bases(model.visual, [images])), images

    tower, residual, images = made()
    tower.proj = torch.nn.Parameter(tower.proj.detach().clone(), requires_grad=False)  # the same values
    residual(images)
    tower.proj = torch.nn.Parameter(tower.proj.detach().flip(0), requires_grad=False)
    with pytest.raises(ValueError, match=r"have changed since it was made \(proj"):
        residual(images)
    tower, residual, images = made()
    tower.ln_post = torch.nn.LayerNorm(tower.ln_post.normalized_shape).requires_grad_(False)
    with pytest.raises(ValueError, match="have changed since it was made"):
        residual(images)
    tower, residual, images = made()
    tower.ln_post = torch.nn.Identity()
    with pytest.raises(ValueError, match="ln_post is Identity, not LayerNorm"):
        residual(images)


@pytest.mark.parametrize("whole", [False, True], ids=["with breaks", "full graph"])
def test_compiled_code_refuses_to_train_what_is_folded(whole):
    residual, images = made()
    torch._dynamo.reset()
    compiled = torch.compile(residual, backend="eager", fullgraph=whole)
    expected = compiled(images)
    residual.requires_grad_(True)  # which compiled code traces anew
    refused = torch._dynamo.exc.Unsupported if whole else ValueError
    with pytest.raises(refused, match="folded into this adapter's constants would train"):
        compiled(images)
    residual.freeze()
    assert torch.equal(compiled(images), expected)


def test_saving_reads_every_value(tmp_path):
    residual, images = made()
    residual(images)
    rk.save_adapter(residual, tmp_path / "a")
    residual.tower.transformer.resblocks[0].mlp.c_fc.weight.data[5, 7] += 1.0
    residual(images)
    with pytest.raises(ValueError, match="has been trained since its bases were fitted"):
        rk.save_adapter(residual, tmp_path / "b")


@pytest.mark.parametrize("method", ["fine", "shared", "stream"])
def test_an_average_of_whole_numbers_is_put_back(method):
    """timm's ModelEmaV2 averages the buffers too, and cuts 7 x 0.9 + 7 x 0.1 down to 6."""
    tower = build()
    images = images_for(tower, 8)
    stream = method == "stream"
    kinds, placement = (("head",), "stream") if stream else (("head", "mlp"), "output")
    bases = rk.fit_bases(tower, [images], kinds=kinds, placement=placement)
    residual = rk.build(method, tower, bases.truncate(energy=0.9))
    with torch.no_grad():
        residual.weight.copy_(torch.linspace(0.5, 1.5, len(residual.weight)))
    ema = ModelEmaV2(residual, decay=0.9)
    whole = {name: value for name, value in ema.module.named_buffers() if not value.is_floating_point()}
    kept = {name: value.clone() for name, value in whole.items()}
    for _ in range(3):
        ema.update(residual)
        for value in whole.values():
            value.sub_(1).clamp_min_(0)  # what the cut does, whatever this machine rounds to
        assert relative(ema.module(images), residual(images)) < 1e-5
    assert whole
    assert all(torch.equal(value, kept[name]) for name, value in whole.items())


def test_blocks_that_change_places_are_noticed():
    residual, images = made()
    before = residual(images)
    blocks = residual.tower.transformer.resblocks
    blocks[0], blocks[1] = blocks[1], blocks[0]
    with pytest.raises(ValueError, match="have changed since it was made"):
        residual(images)
    blocks[0], blocks[1] = blocks[1], blocks[0]
    assert torch.equal(residual(images), before)


def test_another_tensor_put_into_data_is_noticed():
    """No version counter rises, but the address is another: what torch.nn.utils.prune.remove does."""
    residual, images = made()
    before = residual(images)
    layer = residual.tower.transformer.resblocks[0].attn.out_proj
    own = layer.weight.data
    layer.weight.data = own.clone()
    assert torch.equal(residual(images), before)  # the same numbers
    layer.weight.data = own * (own.abs() > own.abs().median())
    with pytest.raises(
        ValueError, match=r"have changed since it was made \(transformer.resblocks.0.attn.out_proj"
    ):
        residual(images)
    layer.weight.data = own
    assert torch.equal(residual(images), before)


@pytest.mark.parametrize("grad", [True, False])
def test_an_adapter_that_was_compiled_looks_when_its_mode_is_set(grad):
    residual, images = made()
    torch._dynamo.reset()
    compiled = torch.compile(residual, backend="eager")
    with torch.set_grad_enabled(grad):
        expected = compiled(images)
        compiled.eval()
        kept = residual.tower.proj.detach().clone()
        with torch.no_grad():
            residual.tower.proj.mul_(2)
        compiled(images)  # looks at nothing
        for change in (compiled.eval, compiled.train, residual.eval):
            with pytest.raises(ValueError, match=r"have changed since it was made \(proj"):
                change()
        with torch.no_grad():
            residual.tower.proj.copy_(kept)
        compiled.eval()
        assert torch.equal(compiled(images), expected)
    never = made()[0]
    with torch.no_grad():
        never.tower.proj.mul_(2)
    never.eval()  # its next forward says so


def inside_fsdp1(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=1)
    tower = build()
    images = images_for(tower, 8)
    bases = rk.fit_bases(tower, [images])
    device = torch.device("cpu")
    with pytest.raises(rk.UnsupportedTowerError, match=r"\(FSDP1\) flattens its module's weights"):
        rk.decompose(FullyShardedDataParallel(build(), device_id=device, use_orig_params=True), images)
    for wrap in (lambda residual: residual, nn.Sequential):
        residual = rk.ResiDual(build(), bases, rest="sum")
        sharded = FullyShardedDataParallel(wrap(residual), device_id=device, use_orig_params=True)
        with pytest.raises(
            ValueError, match=r"inside FSDP1 .*use fully_shard \(FSDP2\) or DistributedDataParallel"
        ):
            sharded(images)
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_fsdp1_around_an_adapter_is_refused_by_name(tmp_path):
    torch.multiprocessing.spawn(inside_fsdp1, (str(tmp_path / "store"),), nprocs=1)
