"""What decides how the Triton backend computes a call: plain integers, no device, no clock.

Routes of `spectral_reweight` (N rows, R units of C coordinates, J components, D outputs):

fused      one kernel reads z, proj and basis once; nothing of size N x J exists. Best while reading the
           constants is what takes the time (few rows).
two_pass   coefficients, or t = dy . basis, in a bounded workspace, and the vendor's matrix product over J.
           Best with many rows, where the vendor's product is the faster one and pays for the workspace's
           traffic.
folded     F[r] = sum_j proj[j]^T weight[j] basis[j] first, then one vendor product [N, R*C] x [R*C, D]. Best
           when the units keep about as many components as they have coordinates and the rows pay for the
           fold.
matmul     the calls of the torch backend: units wider than 128 coordinates where the fold does not pay, or
           cannot serve because rows choose their own weights.

A route is a record in a file of its own: name, estimate, tiles, run. The decision compares estimates: for
each launch the largest of bytes over bandwidth, operations over rate, and warp instructions over what the
chip issues; launches are added. Bandwidth and rates are nominal figures of an H100, CHOSEN FROM ITS DATA
SHEET AND NOT MEASURED; the instructions that routes compare are rough fits to compiled code, whose floors
`benchmarks/budget.json` holds exactly. `benchmarks/gpu.py` prints what each route takes on a real device
beside the estimate, and this table is where a correction goes.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

BANDWIDTH = 3.0e12  # bytes / s of device memory
CACHE_BANDWIDTH = 5.5e12  # bytes / s of the second-level cache
VENDOR_RATE = {"half": 6.5e14, "tf32": 3.3e14, "fp32": 4.8e13}  # operations / s of a vendor's matrix product
KERNEL_RATE = {"half": 3.5e14, "tf32": 1.7e14, "fp32": 2.4e13}  # the same for the products inside our kernels
ISSUE = 132 * 4 * 1.755e9  # warp instructions / s: processors x schedulers x clock
LAUNCH = 3e-6  # s per launch inside a graph, drain and fill included
PROCESSORS = (
    132  # a nominal chip: partial sums follow the shape, never the device at hand, so that bits repeat
)

WORKSPACE = 32 << 20  # bytes of partial sums at most
NARROW = 128  # widest unit the fused kernels hold in one tile


@dataclass(frozen=True)
class Tiles:
    """What a launch compiles with: rows and columns of the tile, warps of a program,
    depth of the load pipeline."""

    block_n: int
    block_d: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Problem:
    """The shape a decision rests on.

    `kind` is half (bf16, fp16), tf32 or fp32: the matrix unit that may be used.
    """

    rows: int
    tasks: int
    indexed: bool
    units: int
    coordinates: int
    components: int
    padded: int  # J with every unit's run padded to a multiple of 8
    dim: int
    chunks: int
    block_k: int
    longest: int  # largest padded number of components of a unit
    kind: str
    plain: bool = False  # neither scale nor mean: the stream form
    hip: bool = False
    wanted: tuple[bool, bool, bool, bool] = (True, False, False, False)  # dweight, dz, dscale, dmean
    workspace: int | None = (
        None  # bytes that may be spent beside inputs and outputs; None: see workspace_bytes
    )

    @property
    def itemsize(self) -> int:
        return 2 if self.kind == "half" else 4

    @property
    def pairs(self) -> int:
        """Rows of output: one per row, or one per (task, row)."""
        return self.rows if self.indexed else self.rows * self.tasks

    @property
    def lone(self) -> bool:
        """Whether the gradient of one shared weight is all that is asked for: a fit."""
        return self.wanted == (True, False, False, False) and self.tasks == 1 and not self.indexed


@dataclass(frozen=True)
class Explanation:
    """The route a call takes, its tiles, the nominal estimate of every route considered,
    and why this one won."""

    operation: str
    route: str
    tiles: Tiles | None
    splits: int
    estimates: dict[str, float]  # seconds, nominal figures, not measurements
    reason: str

    def __str__(self) -> str:
        times = ", ".join(f"{name} {1e6 * value:.1f} us" for name, value in sorted(self.estimates.items()))
        said = [f"{self.operation}: {self.route}"]
        if self.tiles is not None:
            said.append(
                f"tile {self.tiles.block_n} x {self.tiles.block_d}, {self.tiles.warps} warps, "
                f"{self.tiles.stages} stages"
            )
        if self.splits > 1:
            said.append(f"{self.splits} partial sums")
        return f"{'; '.join(said)}. {self.reason}" + (f" (nominal: {times})" if times else "")


def pieces(width: int) -> tuple[int, int]:
    """Powers of two (main, tail) that cover `width` coordinates: 64 -> (64, 0), 80 -> (64, 16), 104 ->
    (128, 0)."""
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


def cut_runs(runs: list[int], kept: list[int], block: int) -> list[tuple[int, int, int]]:
    """Chunks (unit, first component, length) of at most `block` components, each inside one unit.

    `runs` are the padded bounds of the units, `kept` their numbers of components. A run is cut evenly, in
    multiples of 8, so that every step of a loop over chunks moves about as many bytes.
    """
    chunks: list[tuple[int, int, int]] = []
    for unit, (low, size) in enumerate(zip(runs, kept, strict=False)):
        eighths = -(-size // 8)
        count = -(-size // block)
        start = 0
        for part in range(count):
            stop = min(8 * (eighths * (part + 1) // count), size)
            chunks.append((unit, low + start, stop - start))
            start = stop
    return chunks


# --- estimates ----------------------------------------------------------------------------------------------


def launch(
    moved: float, operations: float, rate: float, cached: float = 0.0, instructions: float = 0.0
) -> float:
    """Seconds of a launch that moves bytes from or to memory, and further bytes that stay in the cache."""
    return LAUNCH + max(
        moved / BANDWIDTH, (moved + cached) / CACHE_BANDWIDTH, operations / rate, instructions / ISSUE
    )


def sizes(p: Problem) -> tuple[float, float, float]:
    """Bytes of z, proj and basis."""
    rows = float(p.rows)
    return (
        rows * p.units * p.coordinates * p.itemsize,
        float(p.padded) * p.coordinates * p.itemsize,
        float(p.padded) * p.dim * p.itemsize,
    )


def workspace_bytes(p: Problem) -> int:
    """What a call may spend beside inputs and outputs: what the caller said, or a tenth of them and 32 MB."""
    if p.workspace is not None:
        return p.workspace
    given = sum(sizes(p)) + float(p.pairs) * p.dim * p.itemsize
    return (30 << 20) + int(given) // 10  # partial sums get the other 2 MB


def workspace_rows(p: Problem) -> int:
    """Rows whose coefficients (of all tasks) fit the workspace, a multiple of 64 and at least 64."""
    tasks = 1 if p.indexed else p.tasks
    return max(workspace_bytes(p) // max(tasks * p.padded * p.itemsize, 1) // 64 * 64, 64)


_spending: list[int | None] = [None]


def set_workspace(most: int | None) -> None:
    """Limits the memory that a call may use besides its inputs and outputs.

    A larger workspace takes fewer launches.

    The variable RESIDUAL_KERNELS_WORKSPACE (bytes) sets the same for a process.

    Args:
        most: bytes; None for a tenth of the inputs and outputs plus 32 MB.

    Raises:
        ValueError: a negative number.
    """
    if most is not None and most < 0:
        raise ValueError(f"a workspace has at least 0 bytes; got {most}")
    _spending[0] = most


def workspace_said() -> int | None:
    """What set_workspace said."""
    return _spending[0]


def allowed_workspace() -> int | None:
    """What set_workspace or the variable RESIDUAL_KERNELS_WORKSPACE said."""
    if _spending[0] is not None:
        return _spending[0]
    text = os.environ.get("RESIDUAL_KERNELS_WORKSPACE")
    if text is None:
        return None
    if not text.isdecimal():
        raise ValueError(f"RESIDUAL_KERNELS_WORKSPACE is a number of bytes; got {text!r}")
    return int(text)


# --- decision -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Route:
    """A way to compute one pass. `run` takes a Call (backward: and dy and what is wanted)."""

    name: str
    serves: Callable[[Problem], bool]
    estimate: Callable[[Problem], float]  # seconds, nominal
    tiles: Callable[[Problem], Tiles | None]
    run: Callable
    reason: Callable[[Problem], str]
    splits: Callable[[Problem], int] = lambda p: 1


def choose(p: Problem, operation: str, table: Sequence[Route]) -> Explanation:
    """The route of the smallest estimate among those that serve."""
    estimates = {route.name: route.estimate(p) for route in table if route.serves(p)}
    name = min(estimates, key=estimates.__getitem__)
    best = next(route for route in table if route.name == name)
    return Explanation(operation, name, best.tiles(p), best.splits(p), estimates, best.reason(p))
