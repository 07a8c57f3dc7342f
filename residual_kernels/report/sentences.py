"""What changed? The findings of a report in a few plain sentences, made from its numbers."""

import shlex

import torch

from residual_kernels.analysis.weights import Component
from residual_kernels.report.facts import ENERGY, Facts
from residual_kernels.report.names import component_name, percent, points, signed, unit_name

FEW_CHANGES = 20  # images whose label changed between right and wrong: below, a gain may be chance
MUCH = 0.03  # accuracy that a class may lose before the advice names it
CLASSES_NAMED = 3


def findings(facts: Facts) -> list[str]:
    """Three or four sentences: what was gained, by which classes, where, and by what."""
    said = [_gain(facts), _classes(facts)]
    if facts.unit_weight:
        said.append(_where(facts))
    return [sentence for sentence in said if sentence]


def advice(facts: Facts) -> list[str]:
    """What a reader may do next, the most urgent first."""
    gain, run = facts.after.accuracy - facts.before.accuracy, shlex.quote(facts.source.run)
    said = []
    if gain < 0:
        said.append(
            "Accuracy fell: on images like these, use the untouched model. To look for a better fit, run "
            "“fit” with “--method auto”, which keeps the untouched model where nothing is better by one "
            "standard error, or give it more labelled images."
        )
    elif gain == 0:
        said.append(
            "Nothing was gained, so the untouched model is the simpler choice. A fit with more labelled "
            "images may find more."
        )
    elif facts.mended + facts.broken < FEW_CHANGES:
        said.append(
            f"Only {_images(facts.mended + facts.broken)} changed between right and wrong: read the report "
            "on more images before you rely on this gain."
        )
    change = facts.after.class_accuracy - facts.before.class_accuracy
    lost = [k for k in range(len(change)) if float(change[k]) <= -MUCH]  # a class without images has NaN
    for k in sorted(lost, key=lambda k: float(change[k]))[:CLASSES_NAMED]:
        row = facts.after.confusion[k].clone()
        row[k] = 0
        taken = f", most often for “{facts.class_names[int(row.argmax())]}”" if int(row.max()) else ""
        said.append(
            f"“{facts.class_names[k]}” lost {points(-float(change[k])).lstrip('+')}. It is now misread in "
            f"{_images(int(row.sum()))}{taken}: give the next fit more labelled images of both."
        )
    if gain > 0:
        said += [
            f"To label new images: residual-kernels predict {run} --data FOLDER --out labels.csv, with the "
            "--model and --pretrained of the fit.",
            f"To deploy the adapted tower: residual-kernels merge {run} --out tower.onnx writes a file that "
            "does not need this library.",
        ]
    said.append(
        "To see whether the adapter holds elsewhere, write this report on images from another source: "
        f"residual-kernels report {run} --data FOLDER --out elsewhere.html."
    )
    return said


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"


def _gain(facts: Facts) -> str:
    before, after = facts.before.accuracy, facts.after.accuracy
    if not facts.learned and before == after:
        told = _images(facts.images)
        return f"The fit kept the untouched model: accuracy on these {told} is {percent(after)}."
    change = "stays at" if before == after else "rises from" if after > before else "falls from"
    where = percent(after) if before == after else f"{percent(before)} to {percent(after)}"
    return (
        f"With {facts.learned:,} learned numbers, accuracy on these {_images(facts.images)} {change} {where} "
        f"({points(after - before)}): {_images(facts.mended)} that were misread are now right, and "
        f"{facts.broken:,} that were right are now misread."
    )


def _classes(facts: Facts) -> str:
    change = facts.after.class_accuracy - facts.before.class_accuracy
    present = (~change.isnan()).nonzero().flatten().tolist()
    best, worst = max(present, key=lambda k: float(change[k])), min(present, key=lambda k: float(change[k]))

    def told(k: int) -> str:
        values = (percent(float(outcome.class_accuracy[k]), 0) for outcome in (facts.before, facts.after))
        return f"“{facts.class_names[k]}” ({' → '.join(values)})"

    said = []
    if change[best] > 0:
        said.append(f"{told(best)} gains most")
    if change[worst] < 0:
        said.append(f"{told(worst)} loses most")
    if not said:
        return "No class has changed."
    return f"Among the classes, {' and '.join(said)}."


def _where(facts: Facts) -> str:
    said = ""
    if facts.reading is not None:
        first = max((*facts.raised[:1], *facts.faded[:1]), key=lambda c: abs(c.effect), default=None)
        if first is not None:
            said = (
                f"The weight that changes the outputs most is that of {component_name(first)}: "
                f"{signed(first.weight).lstrip('+')}{_apart(facts, first)}."
            )
    heads = [unit for unit in facts.layout if unit.index in facts.unit_lost]
    if heads:
        worth = max(heads, key=lambda unit: facts.unit_lost[unit.index])
        if facts.unit_lost[worth.index] > 0:
            lost = points(facts.unit_lost[worth.index]).lstrip("+")
            said += (
                f" Setting all weights of {unit_name(worth)} back to 1 would cost {lost}, more than any "
                "other."
            )
    return said.strip()


def _apart(facts: Facts, component: Component) -> str:
    pair = separated(facts, component.index)
    return "" if pair is None else f", and it separates “{pair[0]}” from “{pair[1]}”"


def separated(facts: Facts, index: int) -> tuple[str, str] | None:
    """The classes with the highest and the lowest mean coefficient; None when fewer than two have images."""
    scores = facts.of_components()[0].class_scores(index)
    present = (~scores.isnan()).nonzero().flatten()
    if len(present) < 2:
        return None
    order = present[scores[present].argsort(descending=True)].tolist()
    return facts.class_names[order[0]], facts.class_names[order[-1]]


def class_ends(
    facts: Facts, index: int, most: int = 3
) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """(classes at the high end, at the low end), each a name and its score, farthest first."""
    scores = facts.of_components()[0].class_scores(index)
    present = (~scores.isnan()).nonzero().flatten()
    order = present[scores[present].argsort(descending=True)].tolist()
    named = [(facts.class_names[k], float(scores[k])) for k in order]
    return [x for x in named if x[1] > 0][:most], [x for x in named[::-1] if x[1] < 0][:most]


def captions(facts: Facts) -> dict[str, str]:
    """What each figure says of these very numbers, one or two sentences each."""
    width = facts.bases.explained_variance_ratio(facts.heads[0]).numel()
    median = int(facts.linear.double().median())
    first = [float(facts.bases.explained_variance_ratio(unit)[:1].sum()) for unit in facts.heads]
    said = {
        "spectra": (
            f"A head here can use {width} of the output's {facts.bases.dim} dimensions. Half of the heads "
            f"have {ENERGY:.0%} of their variance on {median} components or fewer. The median head has "
            f"{percent(_median(first), 0)} on its first component alone."
        ),
        "dimension": _depth(facts),
        "similarity": _alike(facts),
    }
    if facts.curves:
        said["selection"] = _selection(facts)
    return said


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())


def _depth(facts: Facts) -> str:
    layers = facts.layout.layers
    grid = facts.nonlinear.view(layers, -1).nanmedian(1).values
    linear = facts.linear.double().view(layers, -1).median(1).values
    peak = int(linear.argmax())
    said = (
        f"The median head needs {linear[0]:.0f} components in layer 0, {linear[peak]:.0f} in layer {peak} "
        f"(the most) and {linear[-1]:.0f} in the last layer."
    )
    if grid.isnan().any():  # too few images, or too alike
        return said
    said += (
        f" TwoNN, which estimates the dimension of curved surfaces, gives {grid[0]:.1f} in layer 0 and "
        f"{grid[-1]:.1f} in the last"
    )
    fewer = bool((grid < linear).all())
    return said + (
        ". These numbers are smaller, so heads lie on curved surfaces inside their linear span."
        if fewer
        else "."
    )


def _alike(facts: Facts) -> str:
    matrix = facts.similarity.clone()
    matrix.fill_diagonal_(-1)
    size = len(matrix)
    flat = int(matrix.argmax())
    units = facts.heads[-size:]
    a, b = units[flat // size], units[flat % size]
    layer = torch.tensor([unit.layer for unit in units])
    same = (layer[:, None] == layer) & ~torch.eye(size, dtype=torch.bool)
    inside, across = facts.similarity[same], facts.similarity[layer[:, None] != layer]
    text = f"The two most alike are {unit_name(a)} and {unit_name(b)} ({matrix.max():.2f})."
    if len(inside) and len(across):
        text += (
            f" Two heads of one layer score {inside.mean():.2f} on average, two of different layers "
            f"{across.mean():.2f}."
        )
    return text


def _selection(facts: Facts) -> str:
    heads = len(facts.heads)
    named = [curve for curve in facts.curves if curve.low is None]
    control = [curve for curve in facts.curves if curve.low is not None]
    best = max(named, key=lambda curve: sum(curve.accuracy))
    place = min(range(len(best.kept)), key=lambda i: abs(best.kept[i] / heads - 0.1))
    kept = best.kept[place]
    text = f"With {kept} of {heads} heads, chosen by {best.name}, accuracy is {percent(best.accuracy[place])}"
    if control:
        text += f"; as many at random give {percent(control[0].accuracy[place])}"
    return f"{text}; the whole model, without the adapter, has {percent(facts.before.accuracy)}."
