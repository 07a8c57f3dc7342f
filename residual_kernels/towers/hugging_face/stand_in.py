"""Where does an adapter stand in a transformers model?

In the vision model's place, with no projection behind it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from residual_kernels.towers.foreign import Foreign
from residual_kernels.towers.hugging_face.image_tower import vision_model
from residual_kernels.towers.hugging_face.tower import recognises

_UNKNOWN = (
    "attention_mask",
    "bool_masked_pos",
    "interpolate_pos_encoding",
    "output_attentions",
    "output_hidden_states",
)


class StandIn(nn.Module):
    """A vision model whose embedding is an adapter's:
    it is called like the one it replaces and returns the same parts.

    `pooler_output` is y, and `last_hidden_state` the tower's own tokens. Where a classifier reads the class
    token (with `as_token`), y stands in its place. Until :meth:`release` the adapter returns (y, tokens).
    """

    residual: Foreign  # an adapter: towers know none

    def __init__(self, adapter: Foreign, replaced: Foreign, as_token: bool):
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        super().__init__()
        self.residual, self.config, self._output = adapter, replaced.config, BaseModelOutputWithPooling
        self.as_token = as_token
        self.pooler = getattr(replaced, "pooler", None) if as_token else None
        adapter._view.returns_tokens = True

    def release(self) -> None:
        vars(self.residual._view).pop("returns_tokens", None)

    def forward(self, pixel_values: Tensor, return_dict: bool | None = True, **options: Any) -> Any:
        asked = [name for name in _UNKNOWN if options.get(name) is not None and options[name] is not False]
        if asked:
            raise ValueError(
                f"{', '.join(asked)} are not available while a {type(self.residual).__name__} is attached; "
                "detach it first"
            )
        y, tokens = self.residual(pixel_values.to(self.residual._view.stem_weight.dtype))
        if self.as_token:
            tokens = torch.cat([y[:, None].to(tokens.dtype), tokens[:, 1:]], dim=1)
        pooled = y if self.pooler is None else self.pooler(tokens)
        output = self._output(last_hidden_state=tokens, pooler_output=pooled)
        return output.to_tuple() if return_dict is False else output


def has_place(model: nn.Module) -> bool:
    """Whether `model` is a transformers model around a vision model, in whose place an adapter can stand."""
    return recognises(model) and vision_model(model) is not model


def check_place(model: nn.Module) -> None:
    """Raises ValueError where `model` reads more of its vision model than an embedding."""
    if hasattr(model, "vision_proj"):
        raise ValueError(
            f"{type(model).__name__} matches text with all image tokens, so an embedding has no place in "
            "it; use residual = ResiDual(model, bases) beside it, with class vectors of "
            "ZeroShotHead.from_text(model, ...)"
        )


def places(model: Foreign, adapter: nn.Module) -> dict[str, nn.Module]:
    """What is to stand at which attribute of `model`, so that it embeds images by `adapter`."""
    wrapped = hasattr(model, "vision_model")
    found: dict[str, nn.Module] = (
        {"visual_projection": nn.Identity()} if hasattr(model, "visual_projection") else {}
    )
    name = "vision_model" if wrapped else model.base_model_prefix
    return found | {name: StandIn(adapter, vision_model(model), as_token=not wrapped)}
