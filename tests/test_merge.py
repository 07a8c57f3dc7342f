"""Adapters folded away: equal to what they replace, put back bit for bit,
and at home outside of this package."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_cli import run  # noqa: F401 (a fixture)
from test_modules import every_adapter
from test_stream import fitted
from test_towers import CUSTOM, build, images_for, plain, relative
from torch import nn

import residual_kernels as rk
from residual_kernels.adapters import export
from residual_kernels.adapters.residual import RESTS
from residual_kernels.towers.edit import OutProjection

TOWERS = ["class token", "LayerScale", "average, norm after", "average, norm before", "tokens returned"]
EVERY = ("emb", "head", "mlp")


def first(output):
    return output[0] if isinstance(output, tuple) else output


def adapters_of(tower, count=30):
    dtype = next(tower.parameters()).dtype
    bases = rk.fit_bases(tower, [images_for(tower, count, dtype, seed=7)], kinds=EVERY)
    yield from every_adapter(tower, bases)
    some = bases.truncate(energy=0.8)
    for kinds in (("mlp",), ("head", "mlp"), EVERY):
        yield from (rk.ResiDual(tower, some.of(*kinds), rest, init="normal", seed=3) for rest in RESTS)
        yield rk.CoarseHeads(tower, "sum", kinds=kinds, init="normal")


@pytest.mark.parametrize("name", TOWERS)
def test_output_merged_equals_attached(name):
    tower = build(**CUSTOM[name]).double()
    images = images_for(tower, 4, torch.float64)
    for adapter in adapters_of(tower):
        merged = adapter.merge()
        with torch.no_grad():
            got, expected = merged(images), adapter(images)
            assert relative(first(got), first(expected)) < 1e-11
            assert isinstance(got, tuple) == isinstance(expected, tuple)
            if isinstance(got, tuple):
                assert relative(got[1], expected[1]) < 1e-12
            for p in adapter.trainable():  # what is folded does not follow the weight any more
                p.mul_(1.5)
            assert relative(first(adapter(images)), first(expected)) > 1e-6
            assert torch.equal(first(merged(images)), first(got))
        assert not any(p.requires_grad for p in merged.parameters())
        assert sum(type(part) is nn.Linear for part in merged.children()) == 1  # one matrix product
        ours = {type(part).__module__.split(".")[0] for part in list(merged.modules())[1:]}
        assert "residual_kernels" not in ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_is_as_near_the_truth_as_attached(dtype):
    """1e-5 in float32; in bfloat16 no further from float64 than the attached module, times two."""
    tower = build()
    images = images_for(tower, 8)
    for adapter in list(adapters_of(tower))[::3]:
        with torch.no_grad():
            truth = copy.deepcopy(adapter).double()(images.double())
            low = copy.deepcopy(adapter).to(dtype)
            merged = low.merge()
            attached, got = low(images.to(dtype)), merged(images.to(dtype))
        assert got.dtype == dtype
        own = relative(attached.double(), truth)
        assert relative(got.double(), truth) < (1e-5 if dtype == torch.float32 else 2 * own + 1e-3)
        recast = adapter.merge().to(dtype)  # folded in float32, cast afterwards: constants stay wide
        assert {b.dtype for n, b in recast.named_buffers() if not n.startswith("tower.")} <= {torch.float32}
        with torch.no_grad():
            assert relative(recast(images.to(dtype)).double(), truth) < max(1e-5, 2 * own + 1e-3)


def test_merged_output_is_a_module_like_others():
    tower = build()
    tower.preprocess_cfg = {"size": (16, 24)}
    images = images_for(tower)
    bases = rk.fit_bases(tower, [images_for(tower, 20)])
    for adapter in (rk.ResiDual(tower, bases, "mean"), rk.OutputSpectral(tower, bases)):
        merged = adapter.merge()
        with torch.no_grad():
            expected = merged(images)
            for twin in (copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
                assert torch.equal(twin(images), expected)
            blank = copy.deepcopy(merged)
            for p in blank.parameters():
                p.zero_()
            blank.load_state_dict(merged.state_dict())
            assert torch.equal(blank(images), expected)
        assert merged.tower is tower
        assert merged.preprocess_cfg is tower.preprocess_cfg
        assert relative(rk.decompose(merged, images).units(), rk.decompose(tower, images).units()) == 0
        clip = nn.Module()
        clip.visual = merged
        with pytest.raises(ValueError, match="wrapped in a Merged.* already"):
            rk.ResiDual(merged, bases)
        with pytest.raises(ValueError, match="attached to this model already"):
            rk.attach(clip, bases)
        with torch.no_grad():
            adapter.weight[0] = float("nan")
        with pytest.raises(ValueError, match="folding gives NaN or Inf"):
            adapter.merge()


@pytest.mark.parametrize("name", TOWERS)
def test_stream_merged_into_a_plain_tower_and_back(name):
    tower = build(layers=3, **CUSTOM[name]).double()
    images = images_for(tower, 3, torch.float64)
    state = copy.deepcopy(tower.state_dict())
    for layers in (None, [0, 2]):
        residual = rk.ResiDual(
            tower, fitted(tower).truncate(components=9), placement="stream", layers=layers, init="normal"
        )
        with torch.no_grad():
            expected = first(residual(images))
            assert residual.merge() is tower
            assert residual.merged
            other = build(layers=3, seed=4, **CUSTOM[name]).double()
            other.load_state_dict(copy.deepcopy(tower.state_dict()))  # the same keys
            assert relative(plain(other, images), expected) < 1e-11
            assert relative(first(residual(images)), expected) < 1e-11
            changed = {key for key, value in tower.state_dict().items() if not torch.equal(value, state[key])}
        touched = [0, 1, 2] if layers is None else layers
        parts = ["attn.out_proj.weight", "attn.out_proj.bias"] + ["ls_1.gamma"] * (name == "LayerScale")
        assert changed == {f"transformer.resblocks.{i}.{part}" for i in touched for part in parts}
        if name == "LayerScale":
            assert all((tower.transformer.resblocks[i].ls_1.gamma == 1).all() for i in touched)
        for twin in (copy.deepcopy(residual), pickle.loads(pickle.dumps(residual))):
            twin.unmerge()
            assert all(torch.equal(value, state[key]) for key, value in twin.tower.state_dict().items())
        if layers is None:
            residual.unmerge()
        residual.detach()  # puts the weights back where unmerge was not called
        assert not residual.merged
        assert all(torch.equal(value, state[key]) for key, value in tower.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stream_merged_is_as_near_the_truth_as_attached(dtype):
    tower = build(**CUSTOM["LayerScale"])
    images = images_for(tower, 8)
    residual = rk.ResiDual(tower, fitted(tower), placement="stream", init="normal")
    with torch.no_grad():
        truth = copy.deepcopy(residual).double()(images.double())
        low = copy.deepcopy(residual).to(dtype)
        own = relative(low(images.to(dtype)).double(), truth)
        merged = plain(low.merge(), images.to(dtype)).double()
    assert relative(merged, truth) < (1e-5 if dtype == torch.float32 else 2 * own + 1e-3)


def test_stream_refusals_change_nothing(monkeypatch):
    tower = build()
    state = copy.deepcopy(tower.state_dict())
    class_tokens = rk.ResiDual(tower, fitted(tower, "class"), placement="stream")
    every = rk.ResiDual(tower, fitted(tower), placement="stream")

    def refused(adapter, message):
        with pytest.raises(ValueError, match=message):
            adapter.merge()
        assert all(torch.equal(value, state[key]) for key, value in tower.state_dict().items())
        assert not adapter.merged

    refused(every, "1 more adapters live on this tower")
    every.detach()
    refused(class_tokens, 'only tokens="all" can be merged')
    class_tokens.detach()
    with pytest.raises(ValueError, match="not merged"):
        every.unmerge()
    with torch.no_grad():
        every.weight[2] = float("inf")
    refused(every, "folding gives NaN or Inf")
    with torch.no_grad():
        every.weight[2] = 2.0
    real = type(every._view).out_projection
    for change, message in (({"bias": None}, "has no bias"), ({"norm": object()}, "post-norm")):

        def without(view, layer, change=change):
            out = real(view, layer)
            return OutProjection(**{**vars(out), **change}) if layer == 1 else out

        monkeypatch.setattr(type(every._view), "out_projection", without)
        refused(every, message)
    monkeypatch.setattr(type(every._view), "out_projection", real)
    every.merge()
    with pytest.raises(ValueError, match="merged already"):
        every.merge()
    with pytest.raises(ValueError, match="unmerge"):
        rk.save_adapter(every, "nowhere")


QUICK = {  # to compile, not to run
    "aot_inductor.precompile_headers": False,
    "cpp_cache_precompile_headers": False,
    "aot_inductor.compile_wrapper_opt_level": "O0",
}

# Outside of this package. The bundled model, batches of any size.


@pytest.fixture(scope="module")
def bundled():
    """(model, images, {name: (attached numbers, merged module)}) of the bundled model."""
    model, _, _ = rk.load_bundled()
    tower = model.visual
    images = images_for(tower, 5)
    data = [images_for(tower, 40, seed=7)]
    fine = rk.ResiDual(tower, rk.fit_bases(tower, data).truncate(energy=0.9), init="normal")
    copied = copy.deepcopy(tower)
    bases = rk.fit_bases(copied, data, placement="stream").truncate(energy=0.9)
    stream = rk.ResiDual(copied, bases, placement="stream")
    with torch.no_grad():
        stream.weight.add_(0.1 * torch.randn(stream.weight.shape, generator=torch.Generator().manual_seed(0)))
        numbers = {name: adapter(images) for name, adapter in (("fine", fine), ("stream", stream))}
        assert relative(numbers["stream"], tower(images)) > 1e-2
    return (
        model,
        images,
        {"fine": (numbers["fine"], fine.merge()), "stream": (numbers["stream"], stream.merge())},
    )


@pytest.mark.parametrize("name", ["fine", "stream"])
def test_onnx_gives_the_same_numbers(bundled, name, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    _, images, adapters = bundled
    expected, merged = adapters[name]
    path = tmp_path / "encoder.onnx"
    assert export.write(merged, path, images[:1]) < 1e-5  # traced with one image, any number goes in
    got = export.run(path, images)
    assert (got - expected).abs().max() <= 1e-4 + 1e-5 * expected.abs().max()
    assert relative(got, expected) < 1e-5
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert [entry.domain for entry in model.opset_import if entry.domain not in ("", "ai.onnx")] == []
    assert [entry.name for entry in model.graph.input] == ["images"]
    assert [entry.name for entry in model.graph.output] == ["embedding"]
    assert list(tmp_path.iterdir()) == [path]  # nothing is left beside it


def test_attached_modules_are_exported_too(tmp_path):
    """With our operator inside, so that they are read where this package is.

    What cannot be merged goes this way.
    """
    # Whose images are taken in groups, but not in a graph.
    tower = build(layers=1, pool_type="avg", final_ln_after_pool=False)
    images = images_for(tower, 5)
    fine = rk.ResiDual(tower, rk.fit_bases(tower, [images_for(tower, 20)]), "sum", init="normal")
    inside = rk.ResiDual(tower, fitted(tower, "patches"), placement="stream", init="normal")
    for adapter in (fine, inside):
        assert export.write(adapter, tmp_path / "encoder.pt2", images[:3]) < 1e-5
        with torch.no_grad():
            assert relative(export.run(tmp_path / "encoder.pt2", images), adapter(images)) < 1e-5
        assert adapter.training  # as it was


def test_ahead_of_time_compiled(tmp_path):
    """AOTInductor: a merged output and a merged stream in one package, for batches of any size."""
    tower = build(layers=1)
    images = images_for(tower, 6)
    fine = rk.ResiDual(tower, rk.fit_bases(tower, [images_for(tower, 20)]), "sum", init="normal")
    copied = copy.deepcopy(tower)
    stream = rk.ResiDual(copied, fitted(copied), placement="stream", init="normal")

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine, self.stream = fine.merge(), stream.merge()

        def forward(self, images):
            return self.fine(images), self.stream(images)

    with torch.no_grad():
        expected = fine(images), stream(images)
        both = Both().eval()
        program = torch.export.export(both, (images[:3],), dynamic_shapes=({0: torch.export.Dim("batch")},))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "both.pt2"), inductor_configs=QUICK
        )
        got = torch._inductor.aoti_load_package(path)(images)
    for mine, theirs in zip(got, expected, strict=True):
        assert relative(mine, theirs) < 1e-5


def test_export_refuses(tmp_path, monkeypatch):
    images = torch.randn(2, 3, 4, 4)
    merged = nn.Sequential(nn.Flatten(), nn.Linear(48, 8))
    with pytest.raises(ValueError, match=r"ends with \.onnx or \.pt2; got model\.pth"):
        export.write(merged, tmp_path / "model.pth", images)
    with pytest.raises(ValueError, match="bfloat16 models do not run"):
        export.write(merged, tmp_path / "model.onnx", images.bfloat16())
    with pytest.raises(ValueError, match="meta device hold no values"):
        export.write(merged, tmp_path / "model.onnx", images.to("meta"))
    with monkeypatch.context() as patch:
        patch.setattr(export, "run", lambda path, images: torch.zeros(len(images), 8))
        with pytest.raises(RuntimeError, match="other numbers than the module"):
            export.write(merged, tmp_path / "model.pt2", images)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnxruntime.*residual-kernels\[export\]"):
        export.run(tmp_path / "model.onnx", images)
    assert not list(tmp_path.iterdir())


def test_command_line(run, tmp_path):  # noqa: F811
    """merge writes what loads where this package is absent, and says how near its numbers are."""
    model, _, _ = rk.load_bundled()
    tower, images = model.visual, images_for(model.visual)
    data = [images_for(tower, 30, seed=7)]
    bases = rk.fit_bases(tower, data, placement="stream").truncate(components=4)
    stream = rk.ResiDual(tower, bases, placement="stream")
    with torch.no_grad():
        stream.weight.mul_(1.3)
        expected = stream(images)
    rk.save_adapter(stream, tmp_path / "stream")
    target = tmp_path / "clip.safetensors"
    code, out, err = run(
        "merge", "--adapter", tmp_path / "stream", "--out", target, "--json", tmp_path / "m.json"
    )
    assert code == 0, err
    assert "relative error" in out
    assert json.loads((tmp_path / "m.json").read_text())["relative_error"] < 1e-5
    fresh, _, _ = rk.load_bundled()
    fresh.load_state_dict(load_file(target))
    with torch.no_grad():
        assert relative(fresh.visual(images), expected) < 1e-5
    fine = rk.ResiDual(tower, rk.fit_bases(tower, data).truncate(components=4), init="normal")
    rk.save_adapter(fine, tmp_path / "fine")
    code, out, err = run("merge", "--adapter", tmp_path / "fine", "--out", tmp_path / "encoder.pt2")
    assert code == 0, err
    torch.save({"images": images, "expected": plain(fine, images)}, tmp_path / "numbers.pt")
    source = (  # torch alone reads it
        "import sys, torch\n"
        f"seen = torch.load({str(tmp_path / 'numbers.pt')!r}, weights_only=True)\n"
        f"encoder = torch.export.load({str(tmp_path / 'encoder.pt2')!r}).module()\n"
        "with torch.no_grad(): y = encoder(seen['images'])\n"
        "assert (y - seen['expected']).norm() < 1e-5 * y.norm()\n"
        "assert not any(name.startswith('residual_kernels') for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for arguments, message in (
        (("fine", "x.safetensors"), "works at the output"),
        (("fine", "x.bin"), "must end with .onnx, .pt2, .safetensors"),
        (("nothing", "x.onnx"), "no adapter at"),
    ):
        code, _, err = run("merge", "--adapter", tmp_path / arguments[0], "--out", tmp_path / arguments[1])
        assert code == 2
        assert message in err
    assert not list(tmp_path.glob("x.*"))
