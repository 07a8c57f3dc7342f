"""What are this ViT's units? The only place that knows a model's internals.

Every supported family is one module that offers a :class:`Tower` view of an image tower: it names the units,
gives the constants that map a unit's coordinates to the output space, and runs the tower while collecting
those coordinates at the pooled token. Families are told apart by structure, never by version.

How to write a view of another family:

1. A file here with `LOOKED_FOR` (what tells the family, for the error about unknown towers),
   `recognises(tower)` (true for unsupported members too, so that they get a reason) and a subclass of
   `transformer.TransformerTower`; an entry in the table `families` of
   :func:`~residual_kernels.towers.families.view`. The class's abstract members are what you write; the steps
   below say what is not plain from their docstrings.
2. `__init__` checks the structure against the parts it knows, refuses with UnsupportedTowerError and the
   reason, and sets module, name, layout, width, head_width, dim and pooling. It reads shapes only, so it
   works on the meta device.
3. `embed` runs everything before the first block with the model's own code: the unit `emb`, convolutions
  included.
4. `block` runs one block with the model's own norms, MLP, LayerScale and position tables, but writes out the
   attention, because z is what enters its output projection: after inner norms, gates and head scales, [N,
   tokens, heads, C]. With `first_only` only the first token's query is computed. The MLP's term is all that
   its branch adds. `edit`, where there is one, changes what attention adds. `blocks` are the modules that it
   runs, whose gradient checkpointing and sharding (FSDP2) are honoured.
5. `out_projection` names the projection's parameters, LayerScale as `gamma`. Where a norm stands behind the
   projection (post-norm blocks) it is named too, and z is `norm.coordinates(z, attended)`.
6. `norm`, `projection` and `finish` (the model's own code again) end it: output = norm(pooled) P + p.
   Attention pooling (pooling = ATTENTION) is told by `pooler`, with `outer_norm` and `pool_mlp` where
   something stands behind it.
7. Whatever makes the sum inexact is refused: a norm or an MLP behind the sum, max pooling, tokens that are
  merged.
8. `constant_parameters` lists what `norm`, `projection` and `out_projection` read.
9. `drops` names what training mode drops before the blocks (patches): units would not repeat. `inexact` names
   dropout and drop path behind a branch or the final norm: they would spoil the sum.

The test is one line for every variant: with random norms, biases and LayerScale, units must sum to the
output.
"""

from residual_kernels.towers.checksum import checksum
from residual_kernels.towers.families import unwrap, view, view_inside
from residual_kernels.towers.layout import KINDS, Unit, UnitLayout, check_kinds
from residual_kernels.towers.view import Terms, Tower, UnitMaps, UnsupportedTowerError

__all__ = [
    "KINDS",
    "Terms",
    "Tower",
    "Unit",
    "UnitLayout",
    "UnitMaps",
    "UnsupportedTowerError",
    "check_kinds",
    "checksum",
    "unwrap",
    "view",
    "view_inside",
]
