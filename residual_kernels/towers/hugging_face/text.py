"""How does a transformers model embed text? As open_clip's models do, for what is written for those."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from residual_kernels.towers.foreign import Foreign


class TextSide:
    """`encode_text` and a tokenizer of open_clip's kind, of CLIPModel,
    SiglipModel or BlipForImageTextRetrieval.

    `tokenizer` is the model's own, or its processor.
    """

    def __init__(self, model: Foreign, tokenizer: Callable):
        self.model = model
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.length = model.config.text_config.max_position_embeddings
        # SigLIP reads its last token, whatever stands there: it has learned from padded texts
        self.padding = "max_length" if hasattr(getattr(model, "text_model", None), "head") else True

    def tokenize(self, texts: Sequence[str]) -> Any:
        return self.tokenizer(
            list(texts), padding=self.padding, truncation=True, max_length=self.length, return_tensors="pt"
        )

    def encode_text(self, tokens: Any, normalize: bool = False) -> Tensor:
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}
        if hasattr(self.model, "get_text_features"):
            features = self.model.get_text_features(**inputs)
            features = getattr(features, "pooler_output", features)
        else:
            features = self.model.text_proj(self.model.text_encoder(**inputs).last_hidden_state[:, 0])
        return F.normalize(features, dim=-1) if normalize else features


def has_text_side(model: nn.Module) -> bool:
    """Whether `model` is a transformers model that embeds text beside images."""
    return hasattr(model, "get_text_features") or (
        hasattr(model, "text_proj") and hasattr(model, "text_encoder")
    )
