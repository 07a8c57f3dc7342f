"""What do the heads know? The paper's analyses of units, their components and their learned weights."""

from residual_kernels.analysis.dimension import (
    linear_dimension,
    nearest_two,
    participation_ratio,
    two_nn,
    two_nn_dimension,
)
from residual_kernels.analysis.ends import chance_level, words_for_ends
from residual_kernels.analysis.findings import Analysis
from residual_kernels.analysis.scores import (
    component_correlations,
    correlations,
    own_accuracy,
    rank_correlations,
    variance_between_classes,
)
from residual_kernels.analysis.selection import SelectionCurves, ablate, selection_curves
from residual_kernels.analysis.similarity import similarity_matrix, spectral_cosine
from residual_kernels.analysis.summary import analyze
from residual_kernels.analysis.words import (
    Description,
    TextDictionary,
    component_words,
    unit_words,
    words_at_ends,
    words_of_units,
)

__all__ = [
    "Analysis",
    "Description",
    "SelectionCurves",
    "TextDictionary",
    "ablate",
    "analyze",
    "chance_level",
    "component_correlations",
    "component_words",
    "correlations",
    "linear_dimension",
    "nearest_two",
    "own_accuracy",
    "participation_ratio",
    "rank_correlations",
    "selection_curves",
    "similarity_matrix",
    "spectral_cosine",
    "two_nn",
    "two_nn_dimension",
    "unit_words",
    "variance_between_classes",
    "words_at_ends",
    "words_for_ends",
    "words_of_units",
]
