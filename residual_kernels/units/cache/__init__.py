"""What is encoded once? The backbone is frozen, so its work is done once and kept: in memory, or in a folder.

`unit_cache.py` is what a cache is, `shards.py` how it lies on disk, `folder.py` whose a folder is,
`loading.py` which images go through the tower together, `encoding.py` the pass that makes one.
"""

from residual_kernels.units.cache.encoding import encode
from residual_kernels.units.cache.resume import kept_images
from residual_kernels.units.cache.shards import DTYPES, MANIFEST
from residual_kernels.units.cache.unit_cache import HELD_OUT, UnitCache

__all__ = ["DTYPES", "HELD_OUT", "MANIFEST", "UnitCache", "encode", "kept_images"]
