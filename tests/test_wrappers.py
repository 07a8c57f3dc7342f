"""Towers as people use them: wrapped, averaged, cast, quantised, tied, dispatched.

Exact, or refused by name.
"""

import copy
import json
import sys
import types

import accelerate
import pytest
import timm
import torch
import torch.distributed as dist
from accelerate.big_modeling import attach_layerwise_casting_hooks
from open_clip.model import convert_weights_to_lp
from peft import LNTuningConfig, LoraConfig, get_peft_model
from test_agreement import lora
from test_frozen import TinyClip
from test_hugging_face import clip, pooled
from test_hugging_face import images_for as pictures_for
from test_towers import build, images_for, plain, relative
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, weight_norm
from torch.optim.swa_utils import AveragedModel

import residual_kernels as rk
from residual_kernels import cli, towers


def changed(change):
    """A tower after `change(tower)`."""

    def make():
        tower = build()
        change(tower)
        return tower

    return make


def changed_clip(change):
    def make():
        model = clip()
        change(model)
        return model

    return make


def each_out_proj(change):
    return changed(lambda tower: [change(block.attn.out_proj) for block in tower.transformer.resblocks])


def tie(tower):
    tower.transformer.resblocks[1] = tower.transformer.resblocks[0]


def compile_block(tower):
    tower.transformer.resblocks[0] = torch.compile(tower.transformer.resblocks[0], backend="eager")


def quantise_dynamically():
    return torch.ao.quantization.quantize_dynamic(build(), {nn.Linear}, torch.qint8)


class Integers(torch.Tensor):
    """A weight kept as integers and a scale, as a quantising library's tensors are."""

    @staticmethod
    def __new__(cls, whole, scale):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype)

    def __init__(self, whole, scale):
        self.whole, self.scale = whole, scale

    def __tensor_flatten__(self):
        return ["whole", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, kinds, arguments=(), keywords=None):
        if function is torch.ops.aten.detach.default:
            return Integers(arguments[0].whole, arguments[0].scale)
        plain = [a.whole * a.scale if isinstance(a, Integers) else a for a in arguments]
        return function(*plain, **(keywords or {}))


def quantise(linear):
    scale = linear.weight.detach().abs().max() / 127
    integers = Integers((linear.weight.detach() / scale).round().to(torch.int8), scale)
    linear.weight = nn.Parameter(integers, requires_grad=False)


def shard_like_fsdp1(tower):
    """The shape of FSDP1's wrapper, which itself needs an accelerator."""

    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self._fsdp_wrapped_module = module

    tower.transformer.resblocks[0] = FullyShardedDataParallel(tower.transformer.resblocks[0])


class Packed(torch.Tensor):
    """A weight as torchao keeps it: integers and a scale, with the operations of a linear layer alone."""

    @staticmethod
    def __new__(cls, whole, scale):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype)

    def __init__(self, whole, scale):
        self.whole, self.scale = whole, scale

    def __tensor_flatten__(self):
        return ["whole", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, kinds, arguments=(), keywords=None):
        if function is torch.ops.aten.detach.default:
            return Packed(arguments[0].whole, arguments[0].scale)
        if function not in (
            torch.ops.aten.t.default,
            torch.ops.aten.linear.default,
            torch.ops.aten.addmm.default,
        ):
            raise NotImplementedError(f"{function} of a packed weight")
        plain = [a.whole * a.scale if isinstance(a, Packed) else a for a in arguments]
        return function(*plain, **(keywords or {}))


def packed(linear):
    scale = linear.weight.detach().abs().max() / 127
    whole = (linear.weight.detach() / scale).round().to(torch.int8)
    linear.weight = nn.Parameter(Packed(whole, scale), requires_grad=False)


class Linear8bit(nn.Linear):
    """A layer that rounds its weight in its call,
    as those of quantising libraries do that subclass nn.Linear."""

    def forward(self, x):
        step = self.weight.abs().max() / 127
        return nn.functional.linear(x, (self.weight / step).round() * step, self.bias)


def in_8_bits(tower, *names):
    """Layers of these names replaced by ones that compute in 8 bits."""
    for name, part in list(tower.named_modules()):
        if isinstance(part, nn.Linear) and name.rpartition(".")[2] in names:
            part.__class__ = Linear8bit


def tie_weights(tower):
    first, second = tower.transformer.resblocks
    second.attn.out_proj.weight, second.ln_1, tower.ln_post.weight = (
        first.attn.out_proj.weight,
        first.ln_1,
        tower.ln_pre.weight,
    )


def made_in_inference_mode():
    with torch.inference_mode():
        return build()


def one_in_training_mode(tower, name):
    tower.get_submodule(name).train()
    return tower


def backbone():
    import transformers

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.Dinov2Config(image_size=24, patch_size=8, **sizes)
    return transformers.Dinov2Backbone(config).eval()


def siglip2():
    import transformers

    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 3}
    config = transformers.Siglip2VisionConfig(num_patches=16, patch_size=8, **sizes)
    return transformers.Siglip2VisionModel(config).eval()


def quantised_timm():
    tower = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    return torch.ao.quantization.quantize_dynamic(tower.eval(), {nn.Linear}, torch.qint8)


def naflex():
    return timm.create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=48, num_heads=3, num_classes=0)


EXACT = {
    "PeftModel": lambda: get_peft_model(build(), LoraConfig(r=2, target_modules=["c_fc"])).eval(),
    "torch.compile": lambda: torch.compile(build(), backend="eager"),
    "module.compile": changed(lambda tower: tower.compile(backend="eager")),
    "DataParallel": lambda: nn.DataParallel(build()),
    "AveragedModel": lambda: AveragedModel(build()),
    "timm EMA": lambda: ModelEmaV3(build()),
    "timm EMA of buffers too": lambda: ModelEmaV2(build()),
    "accelerate, one device": lambda: accelerate.dispatch_model(build(), {"": "cpu"}, force_hooks=True),
    "channels_last": lambda: build().to(memory_format=torch.channels_last),
    "patch dropout, eval": lambda: build(patch_dropout=0.5),
    "parametrised (weight_norm)": each_out_proj(parametrizations.weight_norm),
    "parametrised (spectral_norm)": each_out_proj(parametrizations.spectral_norm),
    "tied blocks": changed(tie),
    "tied weights": changed(tie_weights),
    "MLPs in 8 bits": changed(lambda tower: in_8_bits(tower, "c_fc", "c_proj")),
    "MLPs with packed weights": changed(
        lambda tower: [
            packed(layer) for b in tower.transformer.resblocks for layer in (b.mlp.c_fc, b.mlp.c_proj)
        ]
    ),
    "parametrised attention": changed(
        lambda tower: [
            parametrize.register_parametrization(b.attn, "in_proj_weight", nn.Identity())
            for b in tower.transformer.resblocks
        ]
    ),
    "an MLP of torch.jit": changed(
        lambda tower: setattr(
            tower.transformer.resblocks[0],
            "mlp",
            torch.jit.trace(tower.transformer.resblocks[0].mlp, torch.randn(1, 7, 48)),
        )
    ),
    "made in inference mode": made_in_inference_mode,
    "LoRA and a trained copy of the patches": lambda: get_peft_model(
        build(), LoraConfig(r=2, target_modules=["c_fc"], modules_to_save=["conv1", "ln_1"])
    ).eval(),
    "quantised MLPs": changed(lambda tower: [quantise(b.mlp.c_fc) for b in tower.transformer.resblocks]),
}
REFUSED = {
    "packed": (each_out_proj(packed), r"out_proj of block 0 is quantised \(its weight is a Packed\)"),
    "a trained copy of the final norm": (
        lambda: get_peft_model(
            build(), LoraConfig(r=2, target_modules=["c_fc"], modules_to_save=["ln_post"])
        ),
        r"final norm ln_post is wrapped by a tuner \(peft.utils.other\); call merge_and_unload\(\)",
    ),
    "a trained copy of an output projection": (
        lambda: get_peft_model(
            build(), LoraConfig(r=2, target_modules=["c_fc"], modules_to_save=["out_proj"])
        ),
        r"out_proj of block 0 is wrapped by a tuner \(peft.utils.other\); call merge_and_unload\(\)",
    ),
    "LayerNorm tuning": (
        lambda: get_peft_model(build(), LNTuningConfig(target_modules=["ln_post"])),
        r"final norm ln_post is wrapped by a tuner \(peft.tuners.ln_tuning.layer\)",
    ),
    "torch.jit": (
        lambda: torch.jit.trace(build(), images_for(build())),
        r"a compiled program of torch.jit \(VisionTransformer\)",
    ),
    "torch.fx": (
        lambda: torch.export.export(build(), (images_for(build()),)).module(),
        "a graph of torch.fx or torch.export",
    ),
    "one dropout in training mode": (
        lambda: one_in_training_mode(build(patch_dropout=0.5), "patch_dropout"),
        "^patch_dropout is in training mode and drops at random while the tower is in eval mode",
    ),
    "a forward that gives a dict": (
        changed(lambda tower: setattr(tower, "forward", lambda x: {"image": x})),
        r"the forward of VisionTransformer gives dict instead of an embedding",
    ),
    "a forward that takes more": (
        changed(lambda tower: setattr(tower, "forward", lambda x, mask: x)),
        r"takes other arguments than images \(missing a required argument: 'mask'\)",
    ),
    "weights of 8 bits between calls": (
        changed(lambda tower: attach_layerwise_casting_hooks(tower, torch.float8_e4m3fn, torch.float32)),
        "first layer is kept in torch.float8_e4m3fn between calls",
    ),
    "a backbone (transformers)": (backbone, "Dinov2Backbone gives BackboneOutput instead of an embedding"),
    "one block compiled": (
        changed(compile_block),
        r"block 0 is wrapped by torch.compile .*module.compile\(\)",
    ),
    "FSDP1 by block": (changed(shard_like_fsdp1), r"block 0 is wrapped by FSDP1 \(use fully_shard, FSDP2"),
    "weight_norm in a hook": (
        each_out_proj(weight_norm),
        r"out_proj of block 0 makes its weight in a hook before each call \(WeightNorm\)",
    ),
    "quantised": (each_out_proj(quantise), r"out_proj of block 0 is quantised \(its weight is a Integers\)"),
    "quantised dynamically": (
        quantise_dynamically,
        r"block 1 gives its first token other numbers.*is quantised",
    ),
    "accelerate, offloaded": (
        lambda: accelerate.cpu_offload(build(), execution_device="cpu"),
        r"weights are on meta \(offloaded by accelerate\)",
    ),
    "NaFlex (timm)": (naflex, "NaFlexVit lacks patch_embed"),
    "NaFlex (SigLIP 2)": (siglip2, r"embeds more than images \(spatial_shapes\)"),
    "quantised dynamically (timm)": (quantised_timm, "proj of attention in block 0 is Linear of torch.ao"),
    "projection in 8 bits (transformers)": (
        changed_clip(lambda model: in_8_bits(model, "visual_projection")),
        "the projection of CLIPModel is Linear8bit of test_wrappers, with a forward of its own",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXACT)
def test_exact(name):
    tower = EXACT[name]()
    images = images_for(build())
    with torch.no_grad():
        expected = plain(tower, images)
        assert relative(rk.decompose(tower, images).units().sum(1), expected) < 1e-5
    residual = rk.ResiDual(tower, rk.fit_bases(tower, [images_for(build(), 12)]).truncate(energy=0.9))
    residual(images)
    assert not any({"_orig_mod", "module"} & set(key.split(".")) for key in residual.state_dict())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    make, reason = REFUSED[name]
    with pytest.raises(rk.UnsupportedTowerError, match=reason):
        rk.decompose(make(), images_for(build()))


def test_a_quantised_weight_is_part_of_the_checksum():
    tower = build()
    packed(tower.transformer.resblocks[0].mlp.c_fc)
    images = images_for(tower, 12)
    bases = rk.fit_bases(tower, [images]).truncate(energy=0.9)
    residual = rk.ResiDual(tower, bases)
    assert residual.tower_checksum() == bases.checksum == towers.checksum(tower, afresh=True)
    tower.transformer.resblocks[0].mlp.c_fc.weight.whole[3, 5] += 1
    assert towers.checksum(tower) != bases.checksum
    assert residual.tower_checksum() != bases.checksum  # no rounding
    with pytest.raises(ValueError, match="other weights"):
        rk.ResiDual(tower, bases)


def test_what_is_made_in_inference_mode_never_merges():
    tower, images = made_in_inference_mode(), images_for(build(), 12)
    bases = rk.fit_bases(tower, [images], placement="stream")
    residual = rk.ResiDual(tower, bases, placement="stream", init="normal")
    with pytest.raises(ValueError, match="made in torch.inference_mode, so it can never"):
        residual.merge()
    residual.detach()
    assert relative(rk.decompose(tower, images).units().sum(1), plain(tower, images)) < 1e-5


def test_attention_in_training_mode_is_named():
    model = one_in_training_mode(clip(attention_dropout=0.5), "vision_model.encoder.layers.1")
    with pytest.raises(rk.UnsupportedTowerError, match=r"^layers.1.self_attn is in training mode and drops"):
        rk.decompose(model, pictures_for(model))


@pytest.mark.parametrize("wrap", ["LoRA", "compile"])
def test_a_wrapper_around_the_vision_model_alone(wrap):
    model = clip()
    images = pictures_for(model, 8)
    if wrap == "LoRA":
        model.vision_model = lora(model.vision_model, "q_proj", "fc1")
    else:
        model.vision_model = torch.compile(model.vision_model, backend="eager")
    with torch.no_grad():
        expected = pooled(model.get_image_features(images))
        assert relative(rk.decompose(model, images).units().sum(1), expected) < 1e-5
        keys = list(model.state_dict())
        with rk.attach(model, rk.fit_bases(model, [images]), rest="all", init="normal") as handle:
            inside = pooled(model.get_image_features(images))
            assert torch.equal(inside, handle.residual(images)[0])
            assert relative(inside, expected) > 1e-2
        assert torch.equal(pooled(model.get_image_features(images)), expected)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("meant", ["tower", "one block"])
def test_offloaded_weights_are_named_before_anything_is_read(meant):
    tower = build()
    part = tower if meant == "tower" else tower.transformer.resblocks[1]
    accelerate.cpu_offload(part, execution_device="cpu")
    images = images_for(build())
    for use in (
        lambda: rk.decompose(tower, images),
        lambda: rk.encode(tower, [images]),
        lambda: rk.fit_bases(tower, [images]),
        lambda: rk.fit_bases(tower, [images], placement="stream", check=False),
    ):
        with pytest.raises(rk.UnsupportedTowerError, match="meta .*offloaded by accelerate"):
            use()


def test_a_wrapped_tower_and_the_tower_are_one():
    tower = build()
    images = images_for(tower, 12)
    wrapped = torch.compile(tower, backend="eager")
    assert towers.checksum(wrapped) == towers.checksum(tower)
    bases = rk.fit_bases(wrapped, [images]).truncate(energy=0.9)
    residual = rk.ResiDual(tower, bases)
    cache = rk.encode(wrapped, [images])
    assert relative(residual.from_units(cache.terms(slice(0, 12))), residual(images)) < 1e-5
    with pytest.raises(ValueError, match="wrapped in a ResiDual already"):
        rk.ResiDual(torch.compile(residual, backend="eager"), bases)
    for name, p in tower.named_parameters():
        p.requires_grad_(name == "proj")
    with pytest.raises(ValueError, match="folded into the constants would train"):
        rk.ResiDual(wrapped, bases, train_tower=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pure", [True, False], ids=["pure", "mixed"])
def test_low_precision(dtype, pure):
    """open_clip's fp16 and bf16 (norms in float32) and pure modes: within the dtype's rounding of float64."""
    tower = build()
    images = images_for(tower)
    truth = plain(copy.deepcopy(tower).double(), images.double())
    convert_weights_to_lp(tower, dtype)
    tower = tower.to(dtype) if pure else tower
    with torch.no_grad():
        parts = rk.decompose(tower, images.to(dtype))
        own = relative(plain(tower, images.to(dtype)).double(), truth)
    assert relative(parts.units().sum(1).double(), truth) < 2 * own + 1e-3


def test_dynamic_sizes():
    tower = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0, dynamic_img_size=True
    ).eval()
    for size in ((32, 32), (48, 64)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            assert relative(rk.decompose(tower, images).units().sum(1), tower(images)) < 1e-5
    residual = rk.ResiDual(tower, rk.fit_bases(tower, [torch.randn(6, 3, 32, 32)]), rest="all")
    tower.set_input_size((64, 64))  # no weight that is folded changes
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(residual(images), tower(images))


def test_offloaded_to_disk(tmp_path):
    tower = accelerate.disk_offload(build(), str(tmp_path), execution_device="cpu")
    with pytest.raises(rk.UnsupportedTowerError, match=r"weights are on meta \(offloaded by accelerate\)"):
        rk.decompose(tower, images_for(build()))


def test_a_projection_that_was_taken_off():
    model = clip()
    images = pictures_for(model)
    model.visual_projection = nn.Identity()
    with torch.no_grad():
        expected = pooled(model.get_image_features(images))
        assert relative(rk.decompose(model, images).units().sum(1), expected) < 1e-5
    model.visual_projection = nn.Sequential(nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 32))
    with pytest.raises(rk.UnsupportedTowerError, match="the projection of CLIPModel is Sequential"):
        rk.decompose(model, images)


def test_tied_and_parametrised_projections_do_not_merge():
    images = images_for(build(), 12)
    for make, reason in (
        (changed(tie), "share \\(tie\\)"),
        (each_out_proj(parametrizations.weight_norm), "parametr"),
    ):
        tower = make()
        residual = rk.ResiDual(tower, rk.fit_bases(tower, [images], placement="stream"), placement="stream")
        state = copy.deepcopy(tower.state_dict())
        with pytest.raises(ValueError, match=reason):
            residual.merge()
        assert all(torch.equal(state[name], value) for name, value in tower.state_dict().items())


def test_process_groups():
    """DDP and FSDP2 around a tower; DDP around a set of adapters of which a batch uses one."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        images = images_for(build())
        expected = plain(build(), images)
        mesh = init_device_mesh("cpu", (1,))
        for tower in (DistributedDataParallel(build()), fully_shard(build(), mesh=mesh)):
            with torch.no_grad():
                assert relative(rk.decompose(tower, images).units().sum(1), expected) < 1e-5
    finally:
        dist.destroy_process_group()


def unused_adapters(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    tower = build()
    images = images_for(tower, 12)
    bases = rk.fit_bases(tower, images.split(12)).truncate(energy=0.9)
    adapters = rk.AdapterSet(tower, {name: rk.ResiDual(tower, bases) for name in ("a", "b")})
    both = DistributedDataParallel(adapters)
    for _ in range(3):
        both.zero_grad()
        both(images[:2], names=["a", None]).square().sum().backward()
    grads = {name: member.weight.grad for name, member in adapters.members.items()}
    assert grads["a"].abs().max() > 0
    assert torch.equal(grads["b"], torch.zeros_like(grads["b"]))
    dist.destroy_process_group()


def test_ddp_of_a_set_with_an_unused_adapter(tmp_path):
    torch.multiprocessing.spawn(unused_adapters, (str(tmp_path / "store"),), nprocs=2)


def command(*arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["residual-kernels", "towers", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_says_what_was_found(tmp_path, monkeypatch, capsys):
    code, said, _ = command("bundled", "--json", tmp_path / "t.json", monkeypatch=monkeypatch, capsys=capsys)
    assert not code
    assert "The units sum to the output" in said
    numbers = json.loads((tmp_path / "t.json").read_text())
    assert numbers["units apart"] < 1e-5
    assert numbers["pooling"] == "class token"
    assert numbers["parts at"] is None
    code, _, said = command("timm:swin_tiny_patch4_window7_224", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert "hierarchical" in said
    code, _, said = command("vit_tiny_patch16_224", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert "write timm:vit_tiny_patch16_224" in said
    code, _, said = command("timm:resnet18", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert "timm's ViTs" in " ".join(said.split())


def test_the_command_on_code_of_ones_own(monkeypatch, capsys):
    made = types.ModuleType("towers_of_my_own")

    def louder():
        model = TinyClip()
        model.visual.transformer.resblocks[0].register_forward_hook(lambda module, args, output: 1.1 * output)
        return model

    def broken():
        model = TinyClip()
        model.visual.proj.data[0, 0] = float("nan")
        return model

    def fails():
        raise RuntimeError("no checkpoint here")

    made.plain, made.louder, made.nothing = TinyClip, louder, lambda: 3
    made.broken, made.fails, made.needs = broken, fails, lambda size: size
    monkeypatch.setitem(sys.modules, "towers_of_my_own", made)
    code, said, _ = command("py:towers_of_my_own:plain", monkeypatch=monkeypatch, capsys=capsys)
    assert not code
    assert "nowhere" in said
    code, _, said = command("py:towers_of_my_own:louder", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert "the token streams diverge at block 0" in said
    code, _, said = command("py:towers_of_my_own:nothing", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert "returned int, not a model" in said
    for name, words in {
        "broken": "gives NaN or Inf on an image of noise: proj holds NaN or Inf",
        "fails": "towers_of_my_own:fails cannot be called: RuntimeError: no checkpoint here",
        "needs": "missing 1 required positional argument: 'size'",
        "absent": "has no attribute 'absent'",
    }.items():
        code, _, said = command(f"py:towers_of_my_own:{name}", monkeypatch=monkeypatch, capsys=capsys)
        assert code == 2
        assert words in " ".join(said.split())


def test_timm_quantised():
    tower = VisionTransformer(img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=3, num_classes=0)
    quantise(tower.eval().blocks[1].attn.proj)
    with pytest.raises(rk.UnsupportedTowerError, match="proj of attention in block 1 is quantised"):
        rk.decompose(tower, torch.randn(2, 3, 32, 32))
