"""What is a thing called on the page? Units, components, classes, in words a reader has seen before."""

from residual_kernels.analysis.weights import Component
from residual_kernels.towers import Unit


def unit_name(unit: Unit) -> str:
    """layer 3, head 5; layer 3, MLP; token embedding. Counted from 0, as in the library."""
    if unit.kind == "head":
        return f"layer {unit.layer}, head {unit.head}"
    if unit.kind == "mlp":
        return f"layer {unit.layer}, MLP"
    return {"emb": "token embedding"}.get(unit.kind, unit.kind)


def unit_code(unit: Unit) -> str:
    """The same for an axis: L3 H5."""
    if unit.kind == "head":
        return f"L{unit.layer} H{unit.head}"
    return f"L{unit.layer} MLP" if unit.kind == "mlp" else unit.kind


def component_name(component: Component) -> str:
    return f"{unit_name(component.unit)}, component {component.place}"


def percent(value: float, digits: int = 1) -> str:
    """12.3%"""
    return f"{100 * value:.{digits}f}%"


def points(value: float) -> str:
    """+1.2 points, with a true minus sign."""
    text = f"{abs(100 * value):.1f}"
    sign = "" if float(text) == 0 else "+" if value > 0 else "−"
    return f"{sign}{text} points"


def signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def short(text: str, most: int = 28) -> str:
    """A long name cut for an axis."""
    return text if len(text) <= most else text[: most - 1] + "…"
