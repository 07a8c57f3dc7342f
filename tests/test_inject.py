"""attach and detach: for a while, then restored exactly."""

import pytest
import torch
from test_towers import build, images_for

import residual_kernels as rk


class TinyClip(torch.nn.Module):
    """What open_clip calls a CLIP, as far as attach is concerned."""

    def __init__(self):
        super().__init__()
        self.visual = build()

    def encode_image(self, images, normalize=False):
        features = self.visual(images)
        return torch.nn.functional.normalize(features, dim=-1) if normalize else features


@pytest.fixture
def model():
    return TinyClip()


@pytest.fixture
def bases(model):
    return rk.fit_bases(model.visual, [images_for(model.visual, 20)]).truncate(energy=0.9)


def test_for_a_while_then_restored_exactly(model, bases):
    tower, images = model.visual, images_for(model.visual)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.no_grad():
        before = model.encode_image(images, normalize=True)
        with rk.attach(model, bases, rest="mean", init="normal") as handle:
            assert model.visual is handle.residual
            assert handle.residual.tower is tower
            inside = model.encode_image(images, normalize=True)
            assert (inside - before).abs().max() > 1e-2
        assert model.visual is tower
        assert torch.equal(model.encode_image(images, normalize=True), before)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_restored_when_the_block_fails(model, bases):
    tower = model.visual
    with pytest.raises(ZeroDivisionError), rk.attach(model, bases):
        raise ZeroDivisionError
    assert model.visual is tower


def test_detach_twice_is_once(model, bases):
    handle = rk.attach(model, bases)
    tower = handle.detach()
    assert handle.detach() is tower is model.visual


def test_an_adapter_made_before_and_attached_again(model):
    adapter = rk.CoarseHeads(model.visual)
    for _ in range(2):
        handle = rk.attach(model, adapter=adapter)
        assert model.visual is adapter
        assert not any(p.requires_grad for p in adapter.tower.parameters())
        assert all(p.requires_grad for p in handle.detach().parameters())


def test_refusals_change_nothing(model, bases):
    tower = model.visual
    flags = [p.requires_grad for p in model.parameters()]
    foreign = rk.CoarseHeads(build(seed=8))
    cases = [
        (lambda: rk.attach(model), "either bases"),
        (lambda: rk.attach(model, bases, adapter=foreign), "either bases"),
        (lambda: rk.attach(model, adapter=foreign), "another tower"),
        (lambda: rk.attach(model, adapter=foreign, rest="mean"), "made with its own"),
        (lambda: rk.attach(tower, bases), "no image tower at .visual"),
        (lambda: rk.attach(model, bases, rest="none"), "rest must be"),
        (lambda: rk.attach(model, rk.fit_bases(build(seed=8), [images_for(tower)])), "other weights"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()
        assert model.visual is tower
        assert flags == [p.requires_grad for p in model.parameters()]
    with rk.attach(model, bases):
        with pytest.raises(ValueError, match="attached to this model already"):
            rk.attach(model, bases)
        model_visual = model.visual
    assert model_visual.tower is tower


def test_detach_after_someone_else_swapped(model, bases):
    handle = rk.attach(model, bases)
    model.visual = build(seed=3)
    with pytest.raises(RuntimeError, match="no longer the module that was attached"):
        handle.detach()


def test_in_a_real_open_clip_model():
    """encode_image, forward and open_clip's own zero-shot evaluation go on working."""
    model, _, tokenizer = rk.load_bundled()
    images = images_for(model.visual, 6)
    tower_bases = rk.fit_bases(model.visual, [images_for(model.visual, 40, seed=5)]).truncate(energy=0.9)
    with torch.no_grad(), rk.attach(model, tower_bases) as handle:
        features = model.encode_image(images, normalize=True)
        assert torch.allclose(features.norm(dim=-1), torch.ones(6), atol=1e-5)
        image_features, _, scale = model(images, tokenizer(["a circle", "the number 3"]))
        assert torch.allclose(image_features, features, atol=1e-6)
        logits = scale * features @ rk.ZeroShotHead.from_text(model, tokenizer, ["a", "b"]).class_vectors
        assert logits.shape == (6, 2)
        assert handle.residual.image_size == (32, 32)
