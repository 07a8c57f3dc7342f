"""Principal bases of units: what they are, where they come from, and the moments they are fitted from."""

from residual_kernels.bases.pca import fit_bases
from residual_kernels.bases.spectral_bases import SpectralBases

__all__ = ["SpectralBases", "fit_bases"]
