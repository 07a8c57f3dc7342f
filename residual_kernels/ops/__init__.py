"""The spectral operators: how the library computes fast.

Each is a custom op of its own, for any training stack.
"""

from residual_kernels.ops.explained import Plan, explain
from residual_kernels.ops.packing import PackedUnits, pack_units
from residual_kernels.ops.spectral_reweight import spectral_reweight, spectral_reweight_packed
from residual_kernels.ops.spectral_sum import spectral_sum
from residual_kernels.ops.triton.routes import set_workspace
from residual_kernels.ops.unit_moments import unit_moments

__all__ = [
    "PackedUnits",
    "Plan",
    "explain",
    "pack_units",
    "set_workspace",
    "spectral_reweight",
    "spectral_reweight_packed",
    "spectral_sum",
    "unit_moments",
]
