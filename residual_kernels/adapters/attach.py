"""How does my model change? Attach an adapter to a CLIP-like model, and take it off again without a trace."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from residual_kernels import towers
from residual_kernels.adapters.residual import ResiDual
from residual_kernels.adapters.tower_adapter import AroundTower, TowerAdapter
from residual_kernels.bases.spectral_bases import SpectralBases
from residual_kernels.towers import agreement
from residual_kernels.towers.hugging_face import stand_in as standing_in
from residual_kernels.towers.hugging_face.image_tower import image_tower
from residual_kernels.towers.wrappers import inner


class Attachment:
    """An adapter standing where the model's image tower stood.

    A context manager; ends with :meth:`detach`.
    """

    def __init__(
        self, model: nn.Module, adapter: TowerAdapter, owner: nn.Module, places: dict[str, nn.Module]
    ):
        self.model, self.residual = model, adapter
        self._owner, self._places = owner, places
        self._originals = {name: getattr(owner, name) for name in places}
        self._attached = True
        adapter.freeze()  # it may have been detached before
        for name, module in places.items():
            setattr(owner, name, module)

    def detach(self) -> nn.Module:
        """Puts back the same objects, their flags restored, and returns the tower. Again does nothing."""
        if self._attached:
            swapped = [
                name for name, module in self._places.items() if getattr(self._owner, name) is not module
            ]
            if swapped:
                raise RuntimeError(
                    f"model.{swapped[0]} is no longer the module that was attached, so it cannot be "
                    f"detached; set model.{swapped[0]} yourself (residual.tower is the image tower)"
                )
            self.residual.detach()
            for name, module in self._places.items():
                if isinstance(module, standing_in.StandIn):
                    module.release()
                setattr(self._owner, name, self._originals[name])
            self._attached = False
        return self.residual.tower

    def __repr__(self) -> str:
        state = "attached to" if self._attached else "detached from"
        return f"Attachment({self.residual!r}, {state} {type(self.model).__name__})"

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.detach()


def attach(
    model: nn.Module,
    bases: SpectralBases | None = None,
    rest: str = "zero",
    *,
    adapter: TowerAdapter | None = None,
    **options: Any,
) -> Attachment:
    """Puts an adapter where a model's image tower stands, for a while or for good.

    In an open_clip model that is `model.visual`. In a transformers CLIP or image classifier it is the vision
    model (and CLIP's projection, which is part of the tower): get_image_features, image_embeds and logits
    then come from y. If the model is wrapped (PeftModel, torch.compile, data parallel), the tower is swapped
    inside the wrapper.

    Args:
        model: a CLIP-like model with the image tower at `.visual`, or a transformers model around a vision
            model.
        bases, rest, options: of a new :class:`ResiDual`.
        adapter: instead of bases: a module made before on this model's tower (ResiDual, CoarseHeads ...).

    Returns:
        An :class:`Attachment`: use it in ``with``, or call ``.detach()``; ``.residual`` is the module.

    Raises:
        ValueError: the model has no place for a tower, is attached already, or the adapter is of another
            tower. The model is then unchanged.
        UnsupportedTowerError: an `encode_image` of your own does more than call the tower. The model is then
            unchanged.
    """
    whole = inner(model)
    owner, name, tower = _place_of(whole)
    if (bases is None) == (adapter is None):
        raise ValueError("give either bases (for a new ResiDual) or adapter (a module made before)")
    if adapter is not None and (rest != "zero" or options):
        raise ValueError("rest and options are for a new ResiDual; this adapter was made with its own")
    if name is not None and (adapter.checks_tower if adapter is not None else options.get("check", True)):
        _check_entrance(whole, tower)
    if bases is not None:
        adapter = ResiDual(tower, bases, rest, **options)
    assert adapter is not None
    if bases is None and adapter.tower is not inner(tower):
        raise ValueError("this adapter wraps another tower than this model's")
    if name is not None:
        return Attachment(model, adapter, owner, {name: adapter})
    return Attachment(model, adapter, owner, standing_in.places(whole, adapter))


@torch.no_grad()
def _check_entrance(model: nn.Module, tower: nn.Module) -> None:
    """Raises UnsupportedTowerError where an `encode_image` of one's own does more than call the tower."""
    encode: Any = getattr(model, "encode_image", None)
    home = getattr(encode, "__module__", None) or ""
    if encode is None or (home.partition(".")[0] == "open_clip" and "encode_image" not in vars(model)):
        return
    view = towers.view(tower)
    weight = view.stem_weight
    size = view.image_size or [224 - 224 % side for side in weight.shape[-2:]]
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(
        weight.device, weight.dtype
    )
    try:
        inspect.signature(encode).bind(image)
    except (TypeError, ValueError):
        return  # it takes more than images, so it is no entrance to the tower
    if not agreement.eager(image) or (view.module.training and view.unsteady()):
        return
    theirs, ours = encode(image), view.own(image)
    if not isinstance(theirs, Tensor):
        return
    apart = [
        float((theirs - y).abs().max() / y.abs().max()) if theirs.shape == y.shape else float("inf")
        for y in (ours, nn.functional.normalize(ours, dim=-1))
    ]
    if not min(apart) <= agreement.AT_MOST:
        raise towers.UnsupportedTowerError(
            f"{type(model).__name__}.encode_image gives other numbers than the tower at .visual "
            f"({min(apart):.1e} apart, relative, on one image), so its own changes would be made to the "
            "adapter's embedding too. Use ResiDual(model.visual, bases) by itself, or attach(..., "
            "check=False) to accept that"
        )


def _place_of(model: nn.Module) -> tuple[nn.Module, str | None, nn.Module]:
    """(the module that holds the tower, the attribute there, the tower);
    no attribute in a transformers model."""
    visual, kind = getattr(model, "visual", None), type(model).__name__
    if isinstance(visual, nn.Module):
        if isinstance(inner(visual), AroundTower):
            raise ValueError(
                f"a {type(inner(visual)).__name__} is attached to this model already; detach it first"
            )
        return *_owner_of(visual, model), visual
    if not standing_in.has_place(model):
        raise ValueError(
            f"{kind} has no image tower at .visual and is no transformers model around one; wrap its tower "
            "with ResiDual instead"
        )
    standing_in.check_place(model)
    return model, None, image_tower(model)


def _owner_of(tower: nn.Module, model: nn.Module) -> tuple[nn.Module, str]:
    """The module in which `tower` is registered, and its name there: `model.visual` may only be passed on."""
    if model._modules.get("visual") is tower:
        return model, "visual"
    found = [
        (part, name) for part in model.modules() for name, child in part._modules.items() if child is tower
    ]
    if len(found) != 1:
        raise ValueError(
            f"the tower at {type(model).__name__}.visual is registered in {len(found)} places of this "
            "model, so there is no one place to swap it; attach to the module that holds it"
        )
    return found[0]
