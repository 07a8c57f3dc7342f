"""A step of a fit on coefficients in memory, in five launches: nothing of it happens anywhere else.

    y[t,i]       = rest[n] + sum_j (weight[t,j] - shift) c[n,j] basis[j],   n = order[t, now * batch + i]
    loss[t]      = sum_i factor[t,i] cross_entropy(scale * y[t,i] / |y[t,i]| . vectors, label[n])
    dweight[t,j] = sum_i c[n,j] (dy[t,i] . basis[j]),   and schedule-free AdamW on weight[t,j] with it

forward    partial sums of y over the components, from the rows of c that the batch names
output     y from them, and the rest
logits     the cosine to every class vector
loss       the softmax of a row, its loss, and dy
update     dweight of a run of components over all rows, and at once the optimizer on them

`place` holds the number of the step, so that a graph of these launches needs nothing from the host. Order,
rates and losses are those of a whole epoch, and a step behind its last row changes nothing. Products of c and
basis are exact unless torch's switch allows tf32 ("high") or bfloat16 ("medium"); those with class vectors go
no lower than tf32.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from residual_kernels.ops.triton import fit_kernels, routes
from residual_kernels.ops.triton.launch import Launch, on
from residual_kernels.ops.triton.routes import Tiles
from residual_kernels.ops.triton.spectral_sum import precision

RATES = 4  # numbers of a step and task, see StepOperands.rates


@dataclass
class StepOperands:
    """What a step reads and writes, float32 and int64, contiguous.

    There are N rows of data, T tasks and S orders of M rows each.
    """

    c: Tensor  # [N, P]: J coefficients, and zeros up to a multiple of 8
    basis: Tensor  # [P, D rounded up to 8], likewise
    rest: Tensor | None  # [N, D], or [1, D] for every row
    shift: float  # taken off every weight
    vectors: Tensor  # [heads, D, K rounded up to 8], zeros behind a head's classes
    scale: Tensor  # [heads]
    classes: Tensor  # [heads]
    labels: Tensor  # [L, N]
    class_weight: Tensor | None  # [L, K]
    weight: Tensor  # [T, J], changed in place, as are:
    z: Tensor  # [T, J], where schedule-free AdamW stands
    square: Tensor  # [T, J], its mean squares of gradients
    head: Tensor  # [T]
    which: Tensor  # [T]: the label set
    order_of: Tensor  # [T]
    order: Tensor  # [S, M]
    rates: Tensor  # [steps, T, 4]: weight of z in the average, lr, bias correction, step of the average
    losses: Tensor  # [T, M]: of every row, times the rows of its batch
    place: Tensor  # [3]: the step to do, the step being done, M; or no rows: then nothing changes

    def begin(self, order: Tensor, rates: Tensor) -> None:
        """An epoch along order [S, M] with rates [steps, T, 4], both on the CPU."""
        self.order.copy_(order, non_blocking=True)
        self.rates[: len(rates)].copy_(rates, non_blocking=True)
        self.place.copy_(torch.tensor([0, 0, order.shape[1]]), non_blocking=True)


class FitStep:
    """The five launches of a step, with buffers of their own. `beta2`, `eps` and `decay` are AdamW's."""

    def __init__(self, x: StepOperands, batch: int, beta2: float, eps: float, decay: float):
        (tasks, components), padded, dim = x.weight.shape, x.c.shape[1], x.vectors.shape[1]
        kind, classes = precision(), x.vectors.shape[2]
        forward, logits, loss, update = tiles_of(kind, batch)
        row_tiles, columns = -(-batch // forward.block_n), -(-dim // forward.block_d)
        chunks = -(-padded // block_k(kind))
        most = max(1, routes.WORKSPACE // (4 * tasks * batch * dim))
        splits = max(1, min(4 * routes.PROCESSORS // (row_tiles * tasks * columns), chunks // 4, most))
        steps = -(-chunks // splits)
        splits = -(-chunks // steps)
        head_tiles = tasks * -(-batch // logits.block_n)
        new, self.device = x.c.new_empty, x.c.device
        shared = {
            **{f"{name}_ptr": value for name, value in vars(x).items() if name != "shift"},
            "partial_ptr": new(splits, tasks, batch, dim),
            "y_ptr": new(tasks, batch, dim),
            "logits_ptr": new(tasks, batch, classes),
            "inverse_ptr": new(tasks, batch),
            "dy_ptr": new(tasks, batch, dim),
            "batch": batch,
            "J": components,
            "P": padded,
            "D": dim,
            "K": classes,
            "steps": steps,
            "splits": splits,
            "shift": float(x.shift),
            "stride_cn": x.c.stride(0),
            "stride_bj": x.basis.stride(0),
            "stride_order": x.order.shape[1],
            "stride_rn": 0 if x.rest is None or len(x.rest) == 1 else dim,
            "stride_label": x.labels.shape[1],
            "stride_class": 0 if x.class_weight is None else x.class_weight.shape[1],
            "beta2": beta2,
            "fresh": 1 - beta2,
            "eps": eps,
            "decay": decay,
            "HAS_REST": x.rest is not None,
            "HAS_WEIGHT": x.class_weight is not None,
        }

        def launch(kernel, grid: tuple[int, ...], tiles: Tiles, **more) -> Launch:
            found = shared | {"BLOCK_N": tiles.block_n, "BLOCK_D": tiles.block_d} | more
            return Launch(kernel, grid, (), found, tiles.warps, tiles.stages)

        of_head = "ieee" if kind == "ieee" else "tf32"
        few = min(64, max(16, triton.next_power_of_2(classes)))
        self.launches = (
            launch(
                fit_kernels.fit_forward_kernel,
                (row_tiles * tasks, columns, splits),
                forward,
                PRECISION=kind,
                BLOCK_K=block_k(kind),
                row_tiles=row_tiles,
            ),
            launch(
                fit_kernels.fit_output_kernel, (tasks * batch, -(-dim // 256)), Tiles(1, 256, 4, 1), BLOCK_S=8
            ),
            launch(
                fit_kernels.fit_logits_kernel,
                (head_tiles, -(-classes // 32)),
                logits,
                PRECISION=of_head,
                BLOCK_K=32,
                row_tiles=head_tiles // tasks,
            ),
            launch(
                fit_kernels.fit_loss_kernel,
                (head_tiles, -(-dim // loss.block_d)),
                loss,
                PRECISION=of_head,
                BLOCK_K=few,
                BLOCK_B=64,
                row_tiles=head_tiles // tasks,
            ),
            launch(
                fit_kernels.fit_update_kernel,
                (-(-components // update_k(kind)), tasks),
                update,
                PRECISION=kind,
                BLOCK_K=update_k(kind),
            ),
        )

    def __call__(self) -> None:
        with on(self.device):
            for launch in self.launches:
                launch()


def block_k(kind: str) -> int:
    """Components of a step of the forward pass."""
    return 16 if kind == "ieee" else 32


def update_k(kind: str) -> int:
    """Components of a program of the update."""
    return 32 if kind == "ieee" else 64


def tiles_of(kind: str, batch: int) -> tuple[Tiles, Tiles, Tiles, Tiles]:
    """Rows and columns of forward, logits, loss and update; of logits and update the step along D."""
    deep = 2 if torch.version.hip else 3
    rows = 16 if batch <= 16 else 32 if batch <= 32 else 64
    if kind == "ieee":
        return (
            Tiles(rows, 64, 4, 2),
            Tiles(16, 32, 4, 2),
            Tiles(16, 32, 4, 2),
            Tiles(rows, 16, 4, 2),
        )
    return Tiles(rows, 64, 4, deep), Tiles(16, 64, 4, deep), Tiles(16, 64, 4, deep), Tiles(rows, 32, 4, deep)
