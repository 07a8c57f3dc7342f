"""placement="stream" in every family of towers: against hooks on the model's own layers, and merged."""

import copy

import pytest
import test_hugging_face as hugging_face
import test_timm_towers as timm_towers
import torch
from test_towers import plain, relative
from timm.models.vision_transformer import VisionTransformer

import residual_kernels as rk
from residual_kernels import towers
from residual_kernels.towers.edit import stream_maps

TIMM = (
    "class token",
    "average, norm after",
    "average, norm before",
    "no class token",
    "registers",
    "DINOv2",
    "inner norms",
    "norms behind branches",
    "RMS norms behind branches",
    "attention pooling",
    "distilled",
    "EVA01",
    "EVA02",
    "EVA02-E",
    "DINOv3",
    "grouped queries",
    "PE-Core",
    "BEiT",
    "relative positions",
)
HUGGING_FACE = (
    "CLIPModel",
    "BlipForImageTextRetrieval",
    "ViTModel",
    "Dinov2Model",
    "Dinov2WithRegistersModel",
)


def made(name):
    """(the model, images, its embedding of images by its own forward)."""
    if name in HUGGING_FACE:
        model = hugging_face.TINY[name]().double()
        for p in model.parameters():  # BLIP's own start is 1e-10, which no change could be seen in
            if p.ndim == 2 and p.std() < 1e-3:
                torch.nn.init.normal_(p, 0.0, 0.1)
        return model, hugging_face.images_for(model, 3, torch.float64), hugging_face.embedding_of
    family, options = timm_towers.PLAIN[name]
    tower = timm_towers.small(family, **options)
    images = torch.randn(
        3, 3, *timm_towers.SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    return tower, images, plain


class Hooked:
    """Phi^T diag(weight - 1) Phi (h - mu) of full-width heads, added by hooks on the model's own modules.

    z is what the module with the output projection's weight is given. The change is added behind that module,
    divided by LayerScale, or behind the norm that stands there.
    """

    def __init__(self, model, residual, bases, run):
        self.hooks, self.z = [], {}
        view = towers.view(model)
        modules = list(view.module.modules())
        for layer in range(view.layout.layers):
            out = view.out_projection(layer)
            projection = next(m for m in modules if getattr(m, "weight", None) is out.weight)
            maps = stream_maps(view, layer)
            parts = [
                (
                    bases.components((layer, h)),
                    bases.mean((layer, h)),
                    residual.weight_of((layer, h)).detach(),
                )
                for h in range(view.layout.heads)
            ]
            change = self.change(layer, maps, parts, run, out)
            self.hooks.append(projection.register_forward_pre_hook(self.keep(layer)))
            behind = projection if out.norm is None else out.norm.module
            self.hooks.append(behind.register_forward_hook(change))

    def keep(self, layer):
        def hook(module, inputs):
            self.z[layer] = inputs[0]

        return hook

    def change(self, layer, maps, parts, run, out):
        def hook(module, inputs, output):
            z = self.z[layer].unflatten(2, (len(parts), -1))
            if out.norm is None:
                h = torch.einsum("nthc,hcd->nthd", z, maps.A) + maps.b
            else:  # each head's share of what the norm gives: linear in [s z, s], with the norm's own s
                x = inputs[0]
                scale = (output - getattr(module, "bias", 0.0)) / module.weight
                centred = x - x.mean(-1, keepdim=True) if "RMS" not in type(module).__name__ else x
                s = (scale * centred).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True)
                wide = torch.cat([z, torch.ones_like(z[..., :1])], -1) * s[..., None]
                h = torch.einsum("nthc,hcd->nthd", wide, maps.A) + maps.b
            delta = torch.zeros_like(output)
            for head, (phi, mu, weight) in enumerate(parts):
                delta[:, run] += (((h[:, run, head] - mu) @ phi.T) * (weight - 1)) @ phi
            return output + (delta if out.norm is not None else delta / out.gain())

        return hook

    def remove(self):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("name", [*TIMM, *HUGGING_FACE])
@torch.no_grad()
def test_stream(name):
    model, images, embedding = made(name)
    view = towers.view(model)
    data = [
        torch.randn(9, *images.shape[1:], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ]
    before = embedding(model, images)
    choices = {"all": slice(None), "patches": slice(view.prefix, None)}
    if view.class_token:
        choices["class"] = slice(0, 1)
    for tokens, run in choices.items():
        bases = rk.fit_bases(model, data, placement="stream", tokens=tokens).truncate(components=5)
        residual = rk.ResiDual(model, bases, placement="stream", init="normal", seed=4)
        y = residual(images)
        hooked = Hooked(model, residual, bases, run)
        expected = embedding(model, images)
        hooked.remove()
        assert relative(y, expected) < 1e-10, tokens
        if tokens != "patches" or view.pooling != "class token":
            assert relative(y, before) > 1e-9, tokens
        state = copy.deepcopy(view.module.state_dict())
        if (
            tokens == "all"
            and view.out_projection(0).norm is None
            and view.out_projection(0).bias is not None
        ):
            residual.merge()
            assert relative(embedding(model, images), y) < 1e-10
            residual.unmerge()
        else:
            with pytest.raises(ValueError, match=r"only tokens|post-norm|has no bias"):
                residual.merge()
        assert all(torch.equal(state[key], value) for key, value in view.module.state_dict().items())
        residual.detach()


def test_no_class_token():
    tower = timm_towers.small(VisionTransformer, global_pool="avg", class_token=False)
    images = [torch.randn(3, 3, *timm_towers.SIZE, dtype=torch.float64)]
    with pytest.raises(ValueError, match="this tower has no class token"):
        rk.fit_bases(tower, images, placement="stream", tokens="class")


def test_merged_and_exported(tmp_path):
    """timm's blocks keep the batch size open in a graph too: traced with three images, checked with one."""
    model, images, _ = made("EVA02-E")
    adapter = rk.ResiDual(model, rk.fit_bases(model, [images]).truncate(components=3), init="normal")
    with torch.no_grad():
        expected = adapter(images)
    assert rk.export.write(adapter.merge(), tmp_path / "encoder.pt2", images) < 1e-10
    assert relative(rk.export.run(tmp_path / "encoder.pt2", images), expected) < 1e-10
