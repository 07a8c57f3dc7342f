"""Which route the Triton backend takes for a shape, with which tiles, and why: plain integers, no device, no clock.

Routes of `spectral_reweight` (N rows, R units of C coordinates, J components, D outputs):

fused      one kernel reads z, proj and basis once and writes partial sums of y; nothing of size N x J exists. Best
           while reading the constants is what takes the time (few rows).
two_pass   coefficients [rows, J] in a bounded workspace, then the vendor's matrix product over J. Best with many
           rows, where the vendor's product is the faster one and pays for the workspace's traffic.
folded     F[r] = sum_j proj[j]^T weight[j] basis[j] first, then one vendor product [N, R*C] x [R*C, D]. Best when
           the units keep about as many components as they have coordinates and the rows pay for the fold.
matmul     the calls of the torch backend: units wider than 128 coordinates where the fold does not pay, or cannot serve
           because rows choose their own weights.

The decision compares estimates: max(bytes / bandwidth, operations / rate) summed over the launches of a route. These
rates are nominal figures of an H100, CHOSEN FROM ITS DATA SHEET AND NOT MEASURED; `benchmarks/gpu.py` prints what each
route takes on a real device beside the estimate, and this table is where a correction goes.
"""

from dataclasses import dataclass
from functools import lru_cache

BANDWIDTH = 3.0e12  # bytes / s of device memory
CACHE_BANDWIDTH = 5.5e12  # bytes / s of the second-level cache
VENDOR_RATE = {"half": 6.5e14, "tf32": 3.3e14, "fp32": 4.8e13}  # operations / s of a vendor's matrix product
KERNEL_RATE = {"half": 3.5e14, "tf32": 1.7e14, "fp32": 2.4e13}  # the same for the products inside our kernels
LAUNCH = 3e-6  # s per launch inside a graph, drain and fill included
PROCESSORS = (
    132  # a nominal chip: partial sums follow the shape, never the device at hand, so that bits repeat
)

CACHED = 24 << 20  # bytes of a workspace that is meant to stay in the second-level cache
WORKSPACE = 32 << 20  # bytes of partial sums at most
NARROW = 128  # widest unit the fused kernels hold in one tile


@dataclass(frozen=True)
class Tiles:
    """What a launch compiles with: rows and columns of the tile, warps of a program, depth of the load pipeline."""

    block_n: int
    block_d: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Problem:
    """The shape a decision rests on. `kind` is half (bf16, fp16), tf32 or fp32: the matrix unit that may be used."""

    rows: int
    tasks: int
    indexed: bool
    units: int
    coordinates: int
    components: int
    dim: int
    chunks: int
    block_k: int
    kind: str
    plain: bool = False  # neither scale nor mean: the stream form
    hip: bool = False

    @property
    def itemsize(self) -> int:
        return 2 if self.kind == "half" else 4

    @property
    def pairs(self) -> int:
        """Rows of output: one per row, or one per (task, row)."""
        return self.rows if self.indexed else self.rows * self.tasks


@dataclass(frozen=True)
class Explanation:
    """The route a call takes, its tiles, the nominal estimate of every route considered, and why this one won."""

    operation: str
    route: str
    tiles: Tiles | None
    splits: int
    estimates: dict[str, float]  # seconds, nominal figures, not measurements
    reason: str

    def __str__(self) -> str:
        times = ", ".join(f"{name} {1e6 * value:.1f} us" for name, value in sorted(self.estimates.items()))
        parts = [f"{self.operation}: {self.route}"]
        if self.tiles is not None:
            parts.append(
                f"tile {self.tiles.block_n} x {self.tiles.block_d}, {self.tiles.warps} warps, "
                f"{self.tiles.stages} stages"
            )
        if self.splits > 1:
            parts.append(f"{self.splits} partial sums")
        return f"{'; '.join(parts)}. {self.reason}" + (f" (nominal: {times})" if times else "")


def pieces(width: int) -> tuple[int, int]:
    """Powers of two (main, tail) that cover `width` coordinates: 64 -> (64, 0), 80 -> (64, 16), 104 -> (128, 0)."""
    main = 16
    while main * 2 <= width:
        main *= 2
    if width <= main:
        return main, 0
    tail = 16
    while tail < width - main:
        tail *= 2
    return (main, tail) if tail < main else (2 * main, 0)


def block_components(sizes: list[int], itemsize: int) -> int:
    """Components in a chunk: 16, 32 or 64 (16-bit only), whichever pads these units' runs least.

    A chunk costs what about 16 components cost, because it reads its unit's z again.
    """

    def padded(block: int) -> int:
        return sum(-(-size // block) * (block + 16) for size in sizes)

    return min((16, 32, 64) if itemsize == 2 else (16, 32), key=padded)


def cut_runs(bounds: list[int], block: int) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Chunks (unit, first component, length) of at most `block` components, and each unit's first chunk [R+1].

    A run is cut evenly, in multiples of 8, so that every step of a loop over chunks moves about as many bytes.
    """
    chunks: list[tuple[int, int, int]] = []
    first = [0]
    for unit, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        eighths = -(-(high - low) // 8)
        count = -(-(high - low) // block)
        start = low
        for part in range(count):
            stop = min(low + 8 * (eighths * (part + 1) // count), high)
            chunks.append((unit, start, stop - start))
            start = stop
        first.append(len(chunks))
    return chunks, first


# --- tiles ------------------------------------------------------------------------------------------------------------


def forward_tiles(p: Problem) -> Tiles:
    """Tile of the fused forward: [rows, columns of y]. Wide in D: every column tile reads z and proj again."""
    if p.hip:  # 64 KB of shared memory
        rows, columns, warps, most = (64, 128, 4, 2) if p.kind == "half" else (32, 32, 4, 2)
    elif p.kind == "half":
        rows, columns, warps, most = (64, 256, 8, 4) if p.pairs <= 64 else (128, 256, 8, 3)
        columns = 512 if p.pairs <= 16 and p.dim > 256 else columns
    else:
        rows, columns, warps, most = (64, 64, 4, 3) if p.kind == "tf32" else (32, 64, 4, 2)
    if p.pairs <= 16:
        rows, warps = 16, 8 if columns > 256 else 4
    step = ((rows + p.block_k) * sum(pieces(p.coordinates)) + p.block_k * columns) * p.itemsize
    spare = 1 if rows == 16 else 0  # mma.sync needs one buffer fewer than wgmma
    return Tiles(rows, columns, warps, max(2, min(most, 150 * 1024 // step + spare)))


def coefficient_tiles(p: Problem) -> Tiles:
    """Tile of the coefficient pass: rows by one chunk."""
    rows = 16 if p.pairs <= 16 else 32 if p.kind == "fp32" else 64
    return Tiles(rows, 0, 4, 2)


def backward_tiles(p: Problem, *, given: bool) -> Tiles:
    """Tile of the backward kernel: rows by one chunk; block_d is the step along D where dy . basis is made inside."""
    rows = 16 if p.rows <= 16 else 32 if p.kind == "fp32" or (p.hip and p.kind == "tf32") else 64
    crowded = p.kind == "tf32" and rows > 16 and sum(pieces(p.coordinates)) > 96
    warps = 8 if p.block_k > 32 or crowded else 4  # fewer would spill
    if given:
        return Tiles(64 if p.block_k > 32 else rows, 0, warps, 2)
    columns = 16 if p.kind == "fp32" else (128 if p.kind == "half" else 64) // (2 if p.hip else 1)
    held = (rows + p.block_k) * sum(pieces(p.coordinates)) * p.itemsize
    step = (rows + p.block_k) * columns * p.itemsize
    return Tiles(
        rows, columns, warps, max(2, min(2 if p.hip or p.kind == "fp32" else 4, (110 * 1024 - held) // step))
    )


def fold_tiles(p: Problem) -> Tiles:
    """Tile of the fold F[r] [C, D] and of its gradient; rows are coordinates here."""
    return Tiles(32, 32, 4, 2) if p.kind == "fp32" else Tiles(64, 64, 4, 2 if p.hip else 3)


# --- estimates --------------------------------------------------------------------------------------------------------


def _launch(moved: float, operations: float, rate: float, cached: float = 0.0) -> float:
    """A launch that moves bytes from or to memory, and further bytes that stay in the cache."""
    return LAUNCH + max(moved / BANDWIDTH, (moved + cached) / CACHE_BANDWIDTH, operations / rate)


def _sizes(p: Problem) -> tuple[float, float, float]:
    """Bytes of z, proj and basis."""
    rows = float(p.rows)
    return (
        rows * p.units * p.coordinates * p.itemsize,
        float(p.components) * p.coordinates * p.itemsize,
        float(p.components) * p.dim * p.itemsize,
    )


def splits_of(p: Problem, tiles: Tiles) -> int:
    """Partial sums of the fused forward: enough programs to fill a nominal chip, few enough to add up cheaply."""
    programs = -(-p.pairs // tiles.block_n) * -(-p.dim // tiles.block_d)
    slots = PROCESSORS
    step_bytes = p.block_k * (tiles.block_d + p.coordinates) * p.itemsize
    step_flops = 2.0 * tiles.block_n * p.block_k * (tiles.block_d + sum(pieces(p.coordinates)))
    step = max(step_bytes / (BANDWIDTH / slots), step_flops / (KERNEL_RATE[p.kind] / slots))
    most = max(1, min(p.chunks, WORKSPACE // (4 * p.pairs * p.dim)))

    def cost(splits: int) -> float:
        waves = -(-programs * splits // slots)
        return waves * -(-p.chunks // splits) * step + _merge(splits, p)

    return min(range(1, min(most, 2 * slots) + 1), key=cost)


def _merge(splits: int, p: Problem) -> float:
    """Writing, reading and adding float32 partial sums of y."""
    return 0.0 if splits == 1 else LAUNCH + 8.0 * splits * p.pairs * p.dim / CACHE_BANDWIDTH


def _fused_forward(p: Problem) -> float:
    z, proj, basis = _sizes(p)
    tiles = forward_tiles(p)
    row_tiles, column_tiles = -(-p.pairs // tiles.block_n), -(-p.dim // tiles.block_d)
    splits = splits_of(p, tiles)
    operations = 2.0 * row_tiles * tiles.block_n * p.chunks * p.block_k
    operations *= column_tiles * (tiles.block_d + sum(pieces(p.coordinates)))
    cached = (row_tiles - 1) * basis + (row_tiles * column_tiles - 1) * proj - z
    cached += (
        column_tiles * float(p.chunks) * p.pairs * p.coordinates * p.itemsize
    )  # every chunk reads its unit's z
    return _launch(z + proj + basis, operations, KERNEL_RATE[p.kind], cached) + _merge(splits, p)


def workspace_rows(p: Problem) -> int:
    """Output rows whose coefficients fit the cached workspace, a multiple of 64 and at least 256."""
    return max(CACHED // max(p.components * p.itemsize, 1) // 64 * 64, 256)


def _two_pass(p: Problem, *, backward: bool) -> float:
    """Coefficients and a product per block of rows; forward, the vendor too splits the long sum over J."""
    z, proj, basis = _sizes(p)
    blocks = -(-p.pairs // workspace_rows(p))
    pairs = float(p.pairs)
    kept = pairs * p.components * p.itemsize
    narrow = 2.0 * pairs * p.chunks * p.block_k * sum(pieces(p.coordinates))
    wide = 2.0 * pairs * p.components * p.dim
    output = pairs * p.dim * p.itemsize
    first = _launch(z + proj, narrow, KERNEL_RATE[p.kind], kept)
    second = _launch(blocks * basis + output, wide, VENDOR_RATE[p.kind], kept)
    tiles = -(-min(p.pairs, workspace_rows(p)) // 128) * -(-p.dim // 128)
    merge = 0.0 if backward else _merge(max(PROCESSORS // tiles, 1), p)
    return 2 * (blocks - 1) * LAUNCH + first + second + merge


def _folded(p: Problem, *, backward: bool) -> float:
    """The fold or its gradient, and one product, for every task."""
    z, proj, basis = _sizes(p)
    width = float(p.units) * p.coordinates
    fold = 2.0 * p.chunks * p.block_k * p.coordinates * p.dim
    matrix = width * p.dim * p.itemsize
    product = 2.0 * p.rows * width * p.dim
    output = float(p.rows) * p.dim * p.itemsize
    small = _launch(proj + basis + matrix, fold, KERNEL_RATE[p.kind]) + 2 * LAUNCH
    large = _launch(z + matrix + output, product, VENDOR_RATE[p.kind])
    affine = (
        0.0 if p.plain else _launch((3 if backward else 4) * output, 0.0, 1.0)
    )  # else the product adds it
    return p.tasks * (small + large + affine)


def _matmul(p: Problem) -> float:
    """The torch backend's calls: [N, J] in memory, about eight passes over it, two vendor products."""
    z, proj, basis = _sizes(p)
    kept = float(p.pairs) * p.components * p.itemsize
    products = 2.0 * p.pairs * p.components * (p.coordinates + p.dim)
    return 7 * LAUNCH + _launch(z + proj + basis + 8 * kept, products, VENDOR_RATE[p.kind])


def _fused_backward(p: Problem) -> float:
    z, proj, basis = _sizes(p)
    tiles = backward_tiles(p, given=False)
    row_tiles = -(-p.rows // tiles.block_n)
    tasks = 1 if p.indexed else p.tasks
    operations = (
        2.0 * row_tiles * tiles.block_n * p.chunks * p.block_k * (tasks * p.dim + sum(pieces(p.coordinates)))
    )
    cached = (tasks * row_tiles - 1) * basis + (row_tiles - 1) * proj
    cached += float(p.chunks) * tasks * p.rows * p.dim * p.itemsize  # every chunk reads dy
    return _launch(z + proj + basis, operations, KERNEL_RATE[p.kind], cached) + (
        LAUNCH if row_tiles > 1 else 0.0
    )


# --- decision ---------------------------------------------------------------------------------------------------------


def _plan_wide(p: Problem, operation: str) -> Explanation:
    estimates = {"matmul": _matmul(p)}
    if not p.indexed:
        estimates["folded"] = _folded(p, backward=operation == "backward")
    route = min(estimates, key=estimates.__getitem__)
    reason = f"units of {p.coordinates} > {NARROW} coordinates go to the vendor's products; " + (
        "the fold is the shorter one"
        if route == "folded"
        else "the fold does not pay or rows choose their weights"
    )
    return Explanation(operation, route, fold_tiles(p) if route == "folded" else None, 1, estimates, reason)


@lru_cache(maxsize=4096)
def plan_forward(p: Problem) -> Explanation:
    """The route of the forward pass."""
    if p.coordinates > NARROW:
        return _plan_wide(p, "forward")
    estimates = {"fused": _fused_forward(p), "two_pass": _two_pass(p, backward=False)}
    if not p.indexed:
        estimates["folded"] = _folded(p, backward=False)
    route = min(estimates, key=estimates.__getitem__)
    reasons = {
        "fused": f"with {p.pairs} rows of output, reading the constants once is what takes the time",
        "two_pass": f"with {p.pairs} rows the vendor's product over J = {p.components} pays for its workspace",
        "folded": f"J = {p.components} is too near R*C = {p.units * p.coordinates} to beat one product over R*C",
    }
    tiles = {"fused": forward_tiles, "two_pass": coefficient_tiles}.get(route, fold_tiles)(p)
    return Explanation(
        "forward", route, tiles, splits_of(p, tiles) if route == "fused" else 1, estimates, reasons[route]
    )


@lru_cache(maxsize=4096)
def plan_backward(p: Problem) -> Explanation:
    """The route of the backward pass. From t = dy . basis dz is almost free: the fold serves wide units only."""
    if p.coordinates > NARROW:
        return _plan_wide(p, "backward")
    estimates = {"fused": _fused_backward(p), "two_pass": _two_pass(p, backward=True)}
    route = min(estimates, key=estimates.__getitem__)
    reasons = {
        "fused": f"with {p.rows} rows dy stays in the cache while the constants are read once",
        "two_pass": f"with {p.rows} rows the vendor's product makes t = dy . basis, not every chunk rereading dy",
    }
    return Explanation(
        "backward", route, backward_tiles(p, given=route != "fused"), 1, estimates, reasons[route]
    )
