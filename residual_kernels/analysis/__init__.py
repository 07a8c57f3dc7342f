"""What do the heads know? The paper's analyses of units, their components and their learned weights."""

from residual_kernels.analysis.dimension import (
    linear_dimension,
    nearest_two,
    participation_ratio,
    two_nn,
    two_nn_dimension,
)
from residual_kernels.analysis.scores import correlations, own_accuracy, rank_correlations
from residual_kernels.analysis.similarity import similarity_matrix, spectral_cosine

__all__ = [
    "correlations",
    "linear_dimension",
    "nearest_two",
    "own_accuracy",
    "participation_ratio",
    "rank_correlations",
    "similarity_matrix",
    "spectral_cosine",
    "two_nn",
    "two_nn_dimension",
]
