"""How is an adapter shown?

One line that says what it is, its weights as rows, and its weights by layer and head.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from residual_kernels import display
from residual_kernels.bases.spectral_bases import OUTPUT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from residual_kernels.adapters.tower_adapter import TowerAdapter

COLUMNS = ("component", "unit", "kind", "layer", "head", "place", "weight", "explained")


def described(adapter: "TowerAdapter") -> str:
    """Class, method, rest, number of learned weights, tower, and whether they were fitted."""
    rest = adapter.rest_name
    numbers = sum(p.numel() for p in adapter.trainable())
    components = len(adapter.component_weight()) if adapter.constants() else None
    facts: dict[str, Any] = {
        "method": adapter.method or ("anchored" if rest == "all" else None),
        "rest": rest,
        "kinds": adapter.adapted or None,
        "J": components,
        "numbers": None if numbers == components else numbers,
        "tower": type(adapter.tower).__name__,
        "fitted": _fitted(adapter),
        "merged": adapter.merged or None,
    }
    told = ", ".join(f"{name}={value!r}" for name, value in facts.items() if value is not None)
    return f"{type(adapter).__name__}({told})"


def _fitted(adapter: "TowerAdapter") -> bool | None:
    """Whether a fit has run or the weights have moved; None where the values cannot be read
    (meta, sharded)."""
    own = adapter.trainable()
    if adapter.fitted or not own:
        return adapter.fitted if own else None
    if any(p.is_meta or hasattr(p, "full_tensor") for p in own):
        return None
    start = adapter._initial()
    return any(not torch.equal(_plain(p), _plain(value)) for p, value in zip(own, start, strict=True))


def _plain(value: Tensor) -> Tensor:
    return value.detach().cpu().float()


def table(adapter: "TowerAdapter") -> display.Table:
    """One row per component; see :meth:`TowerAdapter.table`."""
    weights = adapter.component_weight().detach().double().cpu()
    rows: list[dict[str, Any]] = []
    owners: list[tuple[int | None, str, int | None, int | None, int, Tensor | None]] = []
    ratio: Tensor | None
    if not adapter.adapted:
        assert adapter.bases is not None  # weights at the output are on its components
        owners.append((None, OUTPUT, None, None, len(weights), adapter.bases.parts[OUTPUT].ratio(0)))
    else:
        for kind in adapter.adapted:
            for unit in adapter.layout.select(kind):
                count, ratio = len(adapter.weight_of(unit)), None
                if adapter.bases is not None and kind in adapter.bases.parts:
                    ratio = adapter.bases.explained_variance_ratio(unit)
                owners.append((unit.index, kind, unit.layer, unit.head, count, ratio))
    for index, kind, layer, head, count, ratio in owners:
        shares = [None] * count if ratio is None or len(ratio) != count else ratio.tolist()
        for place, share in enumerate(shares):
            number = len(rows)
            values = (number, index, kind, layer, head, place, float(weights[number]), share)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return display.Table(rows, COLUMNS)


def plot(adapter: "TowerAdapter") -> "Figure":
    """See :meth:`TowerAdapter.plot`."""
    figures, rows = display.drawing(), table(adapter)
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["layer"] is not None:
            found.setdefault(row["unit"], []).append(row["weight"])
    if not found:
        return figures.weight_line([row["weight"] for row in rows])
    on_units = adapter.weights_on == "units"
    return figures.unit_map(
        adapter.layout,
        {unit: sum(values) / len(values) for unit, values in found.items()},
        "Weight" if on_units else "Mean weight (components)",
        centre=1.0,
        below=None if on_units else {unit: len(values) for unit, values in found.items()},
    )
