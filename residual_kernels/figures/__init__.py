"""How does it look?

Every figure of the library, drawn by matplotlib in one style: for demo, report, sweeps and Python.

`style.py` is the palette and what all figures share. `fits.py` draws fits and learned weights, `heads.py` a
tower's heads, `accuracies.py` how images were labelled, `images.py` images themselves, `overview.py` the
method in one picture. A figure is a `matplotlib.figure.Figure`; :func:`save` writes it.
"""

from residual_kernels.figures.accuracies import accuracy_bars, accuracy_table, class_changes, confusion
from residual_kernels.figures.fits import candidates, epochs, strengths, weight_line
from residual_kernels.figures.heads import (
    dimensions,
    selection,
    similarity,
    spectra,
    spectra_and_counts,
    unit_map,
)
from residual_kernels.figures.images import End, component_ends, rereadings
from residual_kernels.figures.overview import overview
from residual_kernels.figures.style import save

__all__ = [
    "End",
    "accuracy_bars",
    "accuracy_table",
    "candidates",
    "class_changes",
    "component_ends",
    "confusion",
    "dimensions",
    "epochs",
    "overview",
    "rereadings",
    "save",
    "selection",
    "similarity",
    "spectra",
    "spectra_and_counts",
    "strengths",
    "unit_map",
    "weight_line",
]
