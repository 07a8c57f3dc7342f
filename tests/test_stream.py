"""placement="stream": against a dense reference that edits the untouched tower's own blocks;
and in others' code."""

import copy
import pickle

import pytest
import torch
from test_towers import CUSTOM, build, images_for, plain, relative
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import residual_kernels as rk

SMALL = {"layers": 3}


def fitted(tower, tokens="all", count=12, **options):
    dtype = next(tower.parameters()).dtype
    return rk.fit_bases(
        tower, images_for(tower, count, dtype, seed=7).split(5), placement="stream", tokens=tokens, **options
    )


def heads_in_the_stream(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """[N, tokens, H, width]: what each head of an open_clip block adds to the stream, written out in full."""
    attn = block.attn
    heads = attn.num_heads
    q, k, v = (
        part.unflatten(2, (heads, -1)).transpose(1, 2)
        for part in F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
    )
    z = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v  # [N, H, tokens, C]
    W = attn.out_proj.weight.unflatten(1, (heads, -1))
    h = torch.einsum("nhtc,dhc->nthd", z, W) + attn.out_proj.bias / heads
    return h * block.ls_1.gamma if isinstance(getattr(block.ls_1, "gamma", None), nn.Parameter) else h


class Dense:
    """The formula on the untouched tower: forward hooks add Phi^T diag(weight - 1) Phi
    (h - mu) of full-width heads."""

    def __init__(self, tower, residual, bases, tokens="all", layers=None):
        self.tower, self.seen, self.hooks = tower, {}, []
        run = {"all": slice(None), "class": slice(0, 1), "patches": slice(1, None)}[tokens]
        for layer, block in enumerate(tower.transformer.resblocks):
            if layers is not None and layer not in layers:
                continue
            self.hooks.append(block.ln_1.register_forward_hook(self.keep(layer)))
            self.hooks.append(block.ls_1.register_forward_hook(self.edit(layer, block, residual, bases, run)))

    def keep(self, layer):
        def hook(module, inputs, output):
            self.seen[layer] = output

        return hook

    def edit(self, layer, block, residual, bases, run):
        def hook(module, inputs, output):
            h = heads_in_the_stream(block, self.seen[layer])
            assert relative(h.sum(2), output) < 1e-9
            changed = output.clone()
            for head in range(block.attn.num_heads):
                phi, mu = bases.components((layer, head)), bases.mean((layer, head))
                weight = residual.weight_of((layer, head))
                c = (h[:, run, head] - mu) @ phi.T
                changed[:, run] = changed[:, run] + (c * (weight - 1)) @ phi
            return changed

        return hook

    def __call__(self, images):
        out = self.tower(images)
        for hook in self.hooks:
            hook.remove()
        return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("tokens", ["all", "class", "patches"])
@pytest.mark.parametrize(
    "name",
    ["class token", "LayerScale", "average, norm after", "average, norm before", "tokens returned"],
)
def test_against_the_dense_edit(name, tokens):
    tower = build(**SMALL, **CUSTOM[name]).double().requires_grad_(False)
    images = images_for(tower, 3, torch.float64)
    for layers in (None, [1]):
        bases = fitted(tower, tokens).truncate(components=9)
        residual = rk.ResiDual(tower, bases, placement="stream", layers=layers, init="normal", seed=2)
        with torch.no_grad():
            y = residual(images)
            y = y[0] if isinstance(y, tuple) else y
            expected = Dense(tower, residual, bases, tokens, layers)(images)
            assert relative(y, expected) < 1e-11
            assert relative(y, plain(tower, images)) > 1e-5  # and it is not the tower
        assert len(residual.weight) == 9 * 3 * (1 if layers else 3)


def test_bases_are_an_svd_of_the_heads_over_tokens():
    tower = build(**CUSTOM["LayerScale"]).double()
    images = images_for(tower, 12, torch.float64, seed=7)
    held = []
    hooks = [
        b.ln_1.register_forward_hook(lambda *seen: held.append(seen[2])) for b in tower.transformer.resblocks
    ]
    tower(images)
    for hook in hooks:
        hook.remove()
    for tokens, run in (("all", slice(None)), ("class", slice(0, 1)), ("patches", slice(1, None))):
        bases = fitted(tower, tokens)
        for (layer, block), head in (
            (pair, head) for pair in enumerate(tower.transformer.resblocks) for head in range(3)
        ):
            x = heads_in_the_stream(block, held[layer])[:, run, head].flatten(0, 1).detach()
            assert bases.count == len(x)
            assert relative(bases.mean((layer, head)), x.mean(0)) < 1e-12
            _, singular, vectors = torch.linalg.svd(x - x.mean(0), full_matrices=False)
            rank = min(16, len(x) - 1)  # C, not C + 2
            variance, phi = bases.explained_variance((layer, head)), bases.components((layer, head))
            assert phi.shape == (16, 48)
            assert relative(variance[:rank], singular[:rank].square() / (len(x) - 1)) < 1e-10
            assert len(singular) == rank + 1 or singular[16:].max() < 1e-10
            assert relative(phi[:4].T @ phi[:4], vectors[:4].T @ vectors[:4]) < 1e-8


def test_weight_one_is_the_tower_to_the_bit():
    for name in ("class token", "average, norm before"):
        tower = build(**CUSTOM[name])
        images = images_for(tower)
        residual = rk.ResiDual(tower, fitted(tower), placement="stream")
        with torch.no_grad():
            assert torch.equal(residual(images), rk.decompose(tower, images).output)
            residual.weight[5] += 1e-2
            assert not torch.equal(residual(images), rk.decompose(tower, images).output)


def test_bases_merge_save_load_and_refuse(tmp_path):
    tower = build().double()
    images = images_for(tower, 12, torch.float64, seed=7)
    one, other, both = (
        rk.fit_bases(tower, [part], placement="stream") for part in (images[:5], images[5:], images)
    )
    merged = one.merge(other)
    assert merged.count == both.count == 12 * 7
    assert relative(merged.explained_variance((1, 2)), both.explained_variance((1, 2))) < 1e-10
    both.save(tmp_path / "bases.safetensors", moments=True, dtype=torch.float64)
    again = rk.SpectralBases.load(tmp_path / "bases.safetensors")
    assert (again.placement, again.tokens, again.count) == ("stream", "all", 84)
    assert torch.equal(again.components((0, 1)), both.components((0, 1)))
    assert again.merge(one).count == 84 + 35
    assert "tokens (all)=84" in repr(again)
    output = rk.fit_bases(tower, [images])
    cases = [
        (lambda: one.merge(fitted(tower, "class")), "two placements"),
        (lambda: rk.fit_bases(tower, [images], ("mlp",), placement="stream"), "adapts heads"),
        (lambda: rk.fit_bases(tower, [images], placement="inside"), "placement must be one of"),
        (lambda: rk.fit_bases(tower, [images], tokens="class"), "belongs to placement"),
        (lambda: rk.fit_bases(tower, [images], placement="stream", tokens="cls"), "tokens must be one of"),
        (lambda: rk.fit_bases(tower, rk.encode(tower, [images]), placement="stream"), "loader of images"),
        (lambda: rk.fit_bases(tower, [], placement="stream"), "at least 2 tokens"),
        (lambda: rk.ResiDual(tower, output, placement="stream"), "fitted with placement='output'"),
        (lambda: rk.ResiDual(tower, both), "fitted with placement='stream'"),
        (lambda: rk.OutputSpectral(tower, both), "fitted with placement='stream'"),
        (lambda: rk.CoarseHeads(tower, "mean", bases=both), "fitted with placement='stream'"),
        (lambda: rk.ResiDual(tower, both, "sum", placement="stream"), "leave rest='sum' out"),
        (lambda: rk.ResiDual(tower, both, placement="stream", layers=[2]), "layers 0 to 1"),
        (lambda: rk.ResiDual(tower, both, placement="stream", layers=[]), "layers 0 to 1"),
        (lambda: rk.ResiDual(tower, both, placement="stream", layers=1), r"such as \[1\]"),
        (lambda: rk.ResiDual(tower, both, placement="stream", tokens="some"), "tokens must be one of"),
        (lambda: rk.ResiDual(tower, output, layers=[0]), "layers belongs"),
        (lambda: rk.ResiDual(tower, output, tokens="all"), "belongs to placement"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()
        assert all(p.requires_grad for p in tower.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_through_the_frozen_tower_to_the_weight_alone(checkpointing):
    """Against autograd through the dense edit, and against finite differences."""
    tower = build(**SMALL).double()
    images = images_for(tower, 2, torch.float64)
    bases = fitted(tower).truncate(components=5)
    residual = rk.ResiDual(tower, bases, placement="stream", init="normal")
    upstream = torch.randn(2, 32, dtype=torch.float64)
    (expected,) = torch.autograd.grad(Dense(tower, residual, bases)(images), residual.weight, upstream)
    tower.set_grad_checkpointing(checkpointing)
    (residual(images) * upstream).sum().backward()
    assert relative(residual.weight.grad, expected) < 1e-9
    assert [name for name, p in residual.named_parameters() if p.grad is not None] == ["weight"]
    step, j = 1e-6, 3
    with torch.no_grad():
        residual.weight[j] += step
        high = (residual(images) * upstream).sum()
        residual.weight[j] -= 2 * step
        low = (residual(images) * upstream).sum()
    assert abs(float((high - low) / (2 * step)) - float(residual.weight.grad[j])) < 1e-6


def test_copies_casts_and_state_dicts():
    tower = build()
    bases = fitted(tower).truncate(energy=0.9)
    residual = rk.ResiDual(tower, bases, placement="stream", init="normal")
    images = images_for(tower)
    with torch.no_grad():
        expected = residual(images)
        for twin in (copy.deepcopy(residual), pickle.loads(pickle.dumps(residual))):
            assert torch.equal(twin(images), expected)
            twin.weight.fill_(1.0)
            assert not torch.equal(twin(images), expected)
        empty = copy.deepcopy(residual).to("meta").to_empty(device="cpu")
        empty.load_state_dict(residual.state_dict())
        assert torch.equal(empty(images), expected)
        own = copy.deepcopy(tower.state_dict())
        residual.load_state_dict(own)  # the bare tower's checkpoint
        assert torch.equal(residual(images), expected)
        low = copy.deepcopy(residual).to(torch.bfloat16)
        assert low.weight.dtype == torch.float32
        y = low(images.bfloat16())
        assert y.dtype == torch.bfloat16
        plain_error = relative(plain(low.tower, images.bfloat16()).float(), plain(tower, images))
        assert relative(y.float(), expected) < 2 * plain_error + 1e-3
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(residual(images).float(), expected) < 2 * plain_error + 1e-3
        wide = copy.deepcopy(residual).double()
        assert relative(wide(images.double()).float(), expected) < 1e-5


def test_compiled_training_step_in_one_graph():
    tower = build()
    bases = fitted(tower).truncate(components=4)
    residual, twin = (rk.ResiDual(tower, bases, placement="stream", init="normal") for _ in range(2))
    images = images_for(tower)
    (expected,) = torch.autograd.grad(twin(images).square().mean(), twin.weight)
    compiled = torch.compile(lambda x: residual(x).square().mean(), fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(images), residual.weight)
    assert relative(grad, expected) < 1e-4


def test_kept_on_disk_and_attached(tmp_path):
    tower = build()
    images = images_for(tower)
    for tokens, layers in (("all", None), ("class", (1,))):
        bases = fitted(tower, tokens).truncate(energy=0.9)
        residual = rk.ResiDual(tower, bases, placement="stream", layers=layers, init="normal")
        with torch.no_grad():
            expected = residual(images)
        rk.save_adapter(residual, tmp_path / tokens)
        residual.detach()
        again = rk.load_adapter(tower, tmp_path / tokens)
        assert again.placement == "stream"
        with torch.no_grad():
            assert relative(again(images), expected) < 1e-6
        again.detach()
    clip = nn.Module()
    clip.visual = tower
    with torch.no_grad(), rk.attach(clip, bases, placement="stream", tokens="class", init="normal"):
        assert relative(clip.visual(images), plain(tower, images)) > 1e-3
    assert clip.visual is tower


def test_fit_evaluate_and_predict_with_loaders():
    """Cached units do not tell what a change inside the tower does, so a cache is refused.

    A loader is taken.
    """
    tower = build()
    images, labels = images_for(tower, 24), torch.arange(24) % 3
    loader = DataLoader(list(zip(images, labels.tolist(), strict=True)), batch_size=8)
    head = rk.ZeroShotHead(
        torch.randn(32, 3, generator=torch.Generator().manual_seed(0)), ["a", "b", "c"], 3.0
    )
    residual = rk.ResiDual(tower, fitted(tower).truncate(energy=0.9), placement="stream")
    cache = rk.encode(tower, loader)
    start = residual.weight.detach().clone()
    for call in (
        lambda: rk.fit(residual, head, cache),
        lambda: rk.evaluate(residual, head, cache),
        lambda: rk.predict(residual, head, cache),
        lambda: residual.from_units(cache.terms(slice(None))),
    ):
        with pytest.raises(ValueError, match="loader of"):
            call()
    assert torch.equal(residual.weight, start)
    before = rk.evaluate(residual, head, loader)
    result = rk.fit(residual, head, loader, lr=0.05, epochs=4)
    after = rk.evaluate(residual, head, loader)
    assert result.parameters == len(start)
    assert after.loss < before.loss
    labels = rk.predict(residual, head, images).labels
    assert len(labels) == 24
