"""How does an adapter travel?

To and from the Hugging Face hub, by huggingface_hub's own mixin, with a model card.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData, ModelHubMixin, snapshot_download
from torch import nn

from residual_kernels import schema
from residual_kernels.adapters.folder import (
    BASE_HEAD,
    BASES,
    CLASSES,
    CONFIG,
    HEAD,
    WEIGHTS,
    AdapterFolder,
    save_adapter,
)
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.bases.spectral_bases import SpectralBases
from residual_kernels.files import atomic_path, write_json
from residual_kernels.zeroshot import ZeroShotHead

LIBRARY = "residual-kernels"
CARD, HUB_CONFIG = "README.md", "config.json"
TASK = "zero-shot-image-classification"
# As an adapter saved over another has them.
_HASHED = [name.replace(".", "-*.") for name in (WEIGHTS, BASES, HEAD, BASE_HEAD, CLASSES)]


class HubAdapter(ModelHubMixin):
    """An adapter with what its card says: `save_pretrained`, `push_to_hub` and `from_pretrained` of
    huggingface_hub.

    Attributes:
        adapter: the module; head: its :class:`ZeroShotHead`, or None.
        details: what :func:`push_adapter` was told, for the card.
        class_names: what the classes are called in the data, where not as in the head.
        base_head: how the untouched model is read, where a fit moved the class vectors of `head`; or None.
    """

    def __init__(
        self,
        adapter: TowerAdapter,
        head: ZeroShotHead | None = None,
        details: dict[str, Any] | None = None,
        class_names: Sequence[str] | None = None,
        base_head: ZeroShotHead | None = None,
    ):
        self.adapter, self.head, self.details = adapter, head, dict(details or {})
        self.class_names, self.base_head = class_names, base_head

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **more: Any,
    ) -> str | None:
        """Writes adapter, head, card and the hub's config to a folder; a card that is there already stays.

        As huggingface_hub's own, which would remove a `config.json` of somebody else and can leave half a
        card. Raises FileExistsError, before anything is written, when the folder holds such a config.
        """
        folder = Path(save_directory)
        _check_hub_config(folder / HUB_CONFIG)
        self._save_pretrained(folder)
        if not (folder / CARD).exists():
            with atomic_path(folder / CARD) as temporary:
                self.generate_model_card(**(model_card_kwargs or {})).save(temporary)
        if not push_to_hub:
            return None
        more.pop("config", None)
        return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **more)

    def _save_pretrained(self, save_directory: Path) -> None:
        from residual_kernels import __version__

        save_adapter(
            self.adapter,
            save_directory,
            head=self.head,
            base_head=self.base_head,
            class_names=self.class_names,
            bases=self.details.get("bases", True),
        )
        # what the hub counts downloads by, and what from_pretrained of huggingface_hub looks for
        write_json(save_directory / HUB_CONFIG, {"library_name": LIBRARY, "library_version": __version__})

    @classmethod
    def _from_pretrained(  # type: ignore[override]  # its caller hands on what from_pretrained was given, `tower` too
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | os.PathLike | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        tower: nn.Module,
        bases: SpectralBases | str | os.PathLike | None = None,
        **unused: Any,
    ) -> "HubAdapter":
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    cache_dir=_path(cache_dir),
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                    allow_patterns=[CONFIG, WEIGHTS, BASES, HEAD, BASE_HEAD, CLASSES, *_HASHED],
                )
            )
        kept = AdapterFolder.open(folder)
        return cls(
            kept.adapter(tower, bases=bases),
            kept.head,
            class_names=kept.class_names,
            base_head=kept.base_head,
        )

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        data = ModelCardData(
            library_name=LIBRARY,
            pipeline_tag=TASK,
            **{"tags": ["residual", "clip", "vision", "adapter"], **self.details.get("card", {})},
        )
        if self.details.get("accuracy") is not None:
            task = _line(self.details.get("task", "unnamed"))
            data.model_name = self.details.get("repo_id", LIBRARY).split("/")[-1]
            data.eval_results = [
                EvalResult(
                    task_type=TASK,
                    dataset_type=task.lower().replace(" ", "-"),
                    dataset_name=task,
                    metric_type="accuracy",
                    metric_value=round(float(self.details["accuracy"]), 4),
                )
            ]
        return ModelCard(f"---\n{data.to_yaml()}\n---\n{card_text(self.adapter, self.head, self.details)}")


def _check_hub_config(file: Path) -> None:
    """Raises FileExistsError when a `config.json` is not one that this module wrote."""
    if not os.path.lexists(file):
        return
    try:
        ours = schema.read(file, f"{file}")["library_name"] == LIBRARY
    except (ValueError, KeyError, TypeError, OSError):
        ours = False
    if not ours:
        raise FileExistsError(f"{file} belongs to another program; name another folder")


def _line(text: Any) -> str:
    """One line that a cell of a Markdown table can hold."""
    return " ".join(str(text).split()).replace("|", "\\|")


def card_text(adapter: TowerAdapter, head: ZeroShotHead | None, details: dict[str, Any]) -> str:
    """The card below its metadata: what the adapter is, what it rests on, how well it does,
    how to load it."""
    from residual_kernels import __version__

    options = ", ".join(f"{name} {value}" for name, value in adapter.options().items())
    count = sum(p.numel() for p in adapter.trainable())
    view = adapter._view
    rows = {
        "task": details.get("task", "not said"),
        "tower": f"{details.get('tower', 'not said')} "
        f"({view.name}: {view.layout.layers} layers, {view.dim} outputs)",
        "method": f"{type(adapter).__name__}{f' ({options})' if options else ''}, {count:,} learned numbers",
    }
    whole = details.get("bases", True)
    if adapter.bases is not None:
        kept = "in this repository" if whole else f"by reference, fingerprint {adapter.bases.fingerprint()}"
        rows["bases"] = f"{kept}; fitted on {adapter.bases.count:,} rows"
    if details.get("accuracy") is not None:
        rows["accuracy"] = f"{float(details['accuracy']):.4f}"
    if head is not None:
        names = head.class_names
        rows["classes"] = f"{len(names)}: {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}"
    rows["library"] = f"residual_kernels {__version__}, torch {torch.__version__}"
    table = "\n".join(f"| {name} | {_line(value)} |" for name, value in rows.items())
    more = "" if whole or adapter.bases is None else ', bases="bases.safetensors"'
    summary = (type(adapter).__doc__ or type(adapter).__name__).partition("\n\n")[0]
    repo = details.get("repo_id", "path/to/this/folder")
    return f"""
# ResiDual adapter: {_line(details.get("task", "unnamed"))}

`{_line(summary)}`

From residual_kernels, after ResiDual (Basile et al., TMLR 2025, arXiv 2411.00246). The tower is not in here:
loading checks that yours has the very weights this was fitted on.

| | |
|---|---|
{table}

## How to load it

```python
import residual_kernels as rk

# model: a CLIP-like model with the image tower named above
residual, head = rk.pull_adapter(model.visual, "{repo}"{more})
rk.predict(residual, head, images)  # head is None where none was pushed: make one with rk.ZeroShotHead
model.visual = residual  # or use the tower's place in the model
```
"""


def push_adapter(
    adapter: TowerAdapter,
    repo_id: str,
    *,
    task: str,
    tower: str,
    accuracy: float | None = None,
    head: ZeroShotHead | None = None,
    base_head: ZeroShotHead | None = None,
    class_names: Sequence[str] | None = None,
    bases: bool = True,
    card: dict[str, Any] | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Pushes an adapter and a model card to the Hugging Face hub, in one commit.

    Args:
        adapter: what :func:`save_adapter` takes.
        repo_id: "name/repository"; made when it is not there.
        task, tower: for the card: what it was fitted to, and which model it belongs to ("open_clip ViT-B-16,
            openai").
        accuracy: measured on data that was not fitted to, in [0, 1].
        head: its classifier, kept beside it.
        base_head: how the untouched model is read, where the fit moved class vectors (see
            :func:`save_adapter`).
        class_names: what the classes are called in the data (see :func:`save_adapter`).
        bases: False pushes a reference to them alone (see :func:`save_adapter`).
        card: further metadata of the card (license, base_model, datasets, language ...), as ModelCardData
            takes it.
        private, token, revision: of the repository, as in huggingface_hub.

    Returns:
        The address of the commit.

    Raises:
        ValueError: what :func:`save_adapter` refuses, or an accuracy outside [0, 1]. Nothing is sent then.
    """
    if accuracy is not None and not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy is a share of images, in [0, 1]; got {accuracy}")
    if not isinstance(bases, bool):
        raise ValueError(f"bases is True (kept in the repository) or False (by reference); got {bases!r}")
    details = {"task": task, "tower": tower, "accuracy": accuracy, "bases": bases, "repo_id": repo_id}
    kept = HubAdapter(adapter, head, {**details, "card": dict(card or {})}, class_names, base_head)
    with tempfile.TemporaryDirectory() as rehearsal:  # push_to_hub makes the repository first, and saves then
        kept.save_pretrained(rehearsal)
    return kept.push_to_hub(
        repo_id,
        commit_message=f"{type(adapter).__name__}: {_line(task)}",
        private=private,
        token=token,
        branch=revision,
        delete_patterns=[HEAD, BASE_HEAD, BASES, CLASSES, *_HASHED],
    )


def pull_adapter(
    tower: nn.Module,
    repo_id: str | os.PathLike,
    *,
    bases: SpectralBases | str | os.PathLike | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> tuple[TowerAdapter, ZeroShotHead | None]:
    """The adapter in a repository of the Hugging Face hub, or in a local folder.

    Files are safetensors and JSON only.

    Args:
        tower: the image tower that it was fitted on.
        repo_id: "name/repository", or the path of a folder.
        bases: for an adapter by reference, as in :func:`load_adapter`.
        revision, cache_dir, token, local_files_only: as in huggingface_hub.

    Returns:
        The adapter around `tower`, and its head; None where none was pushed.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_adapter` does.
    """
    kept = HubAdapter.from_pretrained(
        os.fspath(repo_id),
        tower=tower,
        bases=bases,
        revision=revision,
        cache_dir=_path(cache_dir),
        token=token,
        local_files_only=local_files_only,
    )
    return kept.adapter, kept.head


def _path(folder: str | os.PathLike | None) -> Path | None:
    return None if folder is None else Path(folder)
