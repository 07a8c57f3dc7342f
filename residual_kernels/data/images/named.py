"""Data sets that a library knows by name: torchvision's and Hugging Face's."""

from residual_kernels.data.images.hugging_face import HuggingFaceImages
from residual_kernels.data.images.torchvision_sets import DEFAULT_ROOT, TorchvisionImages

__all__ = ["DEFAULT_ROOT", "HuggingFaceImages", "TorchvisionImages"]
