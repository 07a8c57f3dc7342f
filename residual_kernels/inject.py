"""How does my model change? Attach an adapter to a CLIP-like model, and take it off again without a trace."""

from typing import Any

from torch import nn

from residual_kernels.modules import ResiDual, TowerAdapter
from residual_kernels.pca import SpectralBases
from residual_kernels.wrapping import AroundTower


class Attachment:
    """An adapter standing where the model's image tower stood. A context manager; ends with :meth:`detach`."""

    def __init__(self, model: nn.Module, adapter: TowerAdapter):
        self.model, self.residual = model, adapter
        self._attached = True
        adapter.freeze()  # it may have been detached before
        model.visual = adapter

    def detach(self) -> nn.Module:
        """Puts the tower back, the same object with its flags restored, and returns it. Again does nothing."""
        if self._attached:
            if self.model.visual is not self.residual:
                raise RuntimeError(
                    "model.visual is no longer the module that was attached, so there is nothing here to take off; "
                    "set model.visual to residual.tower yourself"
                )
            self.model.visual = self.residual.detach()
            self._attached = False
        return self.residual.tower

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
    """Replaces `model.visual` by an adapter, for a while or for good.

    Args:
        model: a CLIP-like model with the image tower at `.visual`.
        bases, rest, options: handed to :class:`ResiDual`; or
        adapter: a module made before on this model's tower (ResiDual, CoarseHeads ...).

    Returns:
        An :class:`Attachment`: use it in ``with``, or call ``.detach()``; ``.residual`` is the module.

    Raises ValueError when the model has no `.visual`, is attached already, or the adapter is of another tower; the
    model is then unchanged.
    """
    visual = getattr(model, "visual", None)
    if not isinstance(visual, nn.Module):
        raise ValueError(
            f"{type(model).__name__} has no image tower at .visual; wrap its tower with ResiDual instead"
        )
    if isinstance(visual, AroundTower):
        raise ValueError(f"a {type(visual).__name__} is attached to this model already; detach it first")
    if (bases is None) == (adapter is None):
        raise ValueError("give either bases (for a new ResiDual) or adapter (a module made before)")
    if adapter is not None and (rest != "zero" or options):
        raise ValueError("rest and options are for a new ResiDual; this adapter was made with its own")
    if adapter is None:
        adapter = ResiDual(visual, bases, rest, **options)
    elif adapter.tower is not visual:
        raise ValueError("this adapter wraps another tower than model.visual")
    return Attachment(model, adapter)
