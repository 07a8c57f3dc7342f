"""Figures: one style whatever matplotlib is set to, the numbers that were given,
colours and text that stand out."""

import itertools

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from test_towers import build, images_for

import residual_kernels as rk
from residual_kernels import figures
from residual_kernels.analysis.selection import Curve
from residual_kernels.figures import style
from residual_kernels.figures.overview import Read, ShownEnds, Sum

# Machado, Oliveira and Fernandes (2009), severity 1.0; applied to linear RGB.
BLINDNESS = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


def linear(colour):
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE L*a*b* of linear RGB."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    t = np.clip(xyz / [0.9505, 1.0, 1.089], 0, None)
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def apart(a, b, blindness=None):
    """CIE76 difference of two colours as a colour-blind reader sees them."""
    matrix = np.eye(3) if blindness is None else np.array(BLINDNESS[blindness])
    return np.linalg.norm(lab(matrix @ linear(a)) - lab(matrix @ linear(b)))


@pytest.mark.parametrize("blindness", [None, *BLINDNESS])
def test_colours_are_told_apart(blindness):
    used_together = (
        [colour for colour, _ in style.SERIES],
        [style.BLUE, style.GREEN, style.ORANGE],
        [style.GREEN, style.ORANGE],
    )
    for colours in used_together:
        for a, b in itertools.combinations(colours, 2):
            assert apart(a, b, blindness) > 20, (a, b)
    assert apart("#00ff00", "#ffa000", "deuteranopia") < apart("#00ff00", "#ffa000")


@pytest.mark.parametrize(
    "scale, least",
    [(style.SEQUENTIAL, 4.5), (style.DIVERGING, 4.5), (style.CELLS, 7), (style.CELLS_FROM_ZERO, 7)],
)
def test_numbers_stand_out_from_their_cells(scale, least):
    def light(colour):
        return linear(colour) @ [0.2126, 0.7152, 0.0722]

    for share in np.linspace(0, 1, 201):
        pair = sorted((light(scale(share)), light(style.cell_ink(scale, share))))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= least


@pytest.fixture(scope="module")
def bases():
    tower = build()
    return rk.fit_bases(tower, [images_for(tower, 60)])


def test_values_stand_where_their_units_do(bases):
    layout = bases.layout
    values = {unit.index: unit.layer + unit.head / 10 for unit in layout.select("head")}
    figure = figures.unit_map(layout, values, centre=1.0, below=dict.fromkeys(values, 7))
    axes = figure.axes[0]
    assert np.allclose(axes.images[0].get_array(), [[0, 0.1, 0.2], [1, 1.1, 1.2]])
    assert axes.texts[4].get_text() == "1.10\n(7)"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2"]
    values |= {unit.index: 5.0 for unit in layout.select("mlp")}
    axes = figures.unit_map(layout, values).axes[0]
    assert np.allclose(axes.images[0].get_array()[:, 3], 5)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "MLP"]


def test_curves_and_shares(bases):
    curves = (
        Curve("by size", (1, 6), (0.2, 0.4)),
        Curve("at random", (1, 6), (0.1, 0.4), (0, 0.4), (0.2, 0.4)),
    )
    axes = figures.selection(curves, 6, 0.5).axes[0]
    assert np.allclose(axes.lines[0].get_xydata(), [[1 / 6, 0.2], [1, 0.4]])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["by size", "at random"]
    axes = figures.spectra(bases, 0.9).axes[0]
    assert len(axes.lines) == 6 + 1
    wanted = bases.explained_variance_ratio((1, 2)).cumsum(0)
    assert np.allclose(axes.lines[5].get_ydata(), wanted)
    axes = figures.confusion("ab", torch.tensor([[3, 1], [0, 0]])).axes[0]
    assert np.allclose(axes.images[0].get_array(), [[0.75, 0.25], [0, 0]])
    assert [text.get_text() for text in axes.texts] == ["75", "25"]
    axes = figures.class_changes(
        "abc", torch.tensor([0.5, float("nan"), 0.6]), torch.tensor([0.4, float("nan"), 0.9])
    ).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "c"]  # the largest gain on top


def test_a_figure_is_the_same_whatever_matplotlib_is_set_to(bases, tmp_path):
    def made(name):
        paths = figures.save(figures.spectra(bases), tmp_path, name)
        assert [path.name for path in paths] == [f"{name}.png", f"{name}.svg"]
        return [path.read_bytes() for path in paths]

    first = made("a")
    with mpl.rc_context(
        {"font.size": 30, "axes.facecolor": "red", "text.color": "blue", "svg.fonttype": "path"}
    ):
        second = made("b")
    assert first == second


def test_images_at_the_ends_of_a_component():
    images = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(3)]
    figure = figures.component_ends(
        "$a$",
        figures.End(images, (3.0, 2.0, 1.0), ("zero", "six", "zero"), ("a $ring$",)),
        figures.End(images, (-3.0, -2.0, -1.0), (), ()),
    )
    said = [text.get_text() for text in figure.axes[0].texts]
    assert said == [
        "high end: 2 zero, 1 six; words: a $ring$",
        "+3.00",
        "+2.00",
        "+1.00",
        "low end",
        "−3.00",
        "−2.00",
        "−1.00",
        "$a$",
    ]
    assert len(figure.axes[0].images) == 6
    labels, before = torch.tensor([1, 2, 3]), torch.tensor([1, 3, 2])
    figure = figures.rereadings(images, labels, before, torch.tensor([1, 2, 2]))
    assert [axes.get_title() for axes in figure.axes[:3]] == ["3 → 2", "2 → 2", ""]
    assert [axes.get_xlabel() for axes in figure.axes[:3]] == ["truth: 2", "truth: 3", ""]
    colours = [to_rgb(axes.title.get_color()) for axes in figure.axes[:2]]
    assert colours == [to_rgb(style.GREEN), to_rgb(style.ORANGE)]


def test_a_caption_names_the_commonest_classes():
    end = figures.End((), (), ("a", "b", "b", "c", "d"), ())
    assert end.caption("low") == "low end: 2 b, 1 a, 1 c ..."


def luminance(colour):
    """Relative luminance, as WCAG defines it."""
    linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in colour]
    return sum(share * x for share, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_the_overview_says_what_it_was_given():
    image = Image.new("RGB", (8, 8), (40, 0, 0))
    reads = [Read(image, "two", "one", "two"), Read(image, "five", "six", "six")]
    parts = np.array([[0.5, -1.0, 0.25], [0.0, 0.5, -0.75]])
    sums = Sum(parts, -0.5), Sum(-parts, 0.5)
    ends = ShownEnds("layer 1, head 0, component 0", -1.5, [image] * 3, [image] * 2, "a ring", "a cross")
    figure = figures.overview(reads, (0.5, 0.75), 1200, reads[0], sums, 96, ends)
    said = [text.get_text() for text in figure.texts]
    for text in (
        "the first 2 of them; over all 1,200 test images, accuracy rises from 50.0% to 75.0%",
        "sum −1.0: “one”",
        "sum +1.0: “two”",
        "high end: “a ring”",
        "low end: “a cross”",
        "weight 1 before, −1.50 after",
        "one of 96: layer 1, head 0, component 0",
    ):
        assert text in said, text
    grids = [axes.images[0].get_array() for axes in figure.axes if axes.get_title() in ("before", "after")]
    assert np.allclose(grids[0], parts)
    assert np.allclose(grids[1], -parts)
    after = {text.get_text(): text.get_color() for text in figure.texts if text.get_weight() == "bold"}
    assert after["two"] == style.GREEN
    assert after["six"] == style.ORANGE
    assert sum(len(axes.images) for axes in figure.axes) == 2 + 1 + 2 + 5
    dark = figures.overview(reads, (0.5, 0.75), 1200, reads[0], sums, 96, ends, dark=True)
    assert [text.get_text() for text in dark.texts] == said
    assert to_rgb(dark.get_facecolor()[:3]) == to_rgb(style.ON_DARK.paper)
    inks = {to_rgb(text.get_color()) for text in dark.texts}
    labels = [
        label
        for axes in dark.axes
        for label in (axes.title, *axes.get_xticklabels(), *axes.get_yticklabels())
        if label.get_text()
    ]
    assert len(labels) == 2 + 2 * 2 + 2
    inks |= {to_rgb(label.get_color()) for label in labels}
    for ink in inks:  # readable on the dark page: 4.5 to 1
        assert (luminance(ink) + 0.05) / (luminance(to_rgb(style.ON_DARK.paper)) + 0.05) > 4.5
