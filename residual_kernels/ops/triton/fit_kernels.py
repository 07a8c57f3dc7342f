"""The kernels of a step of a fit; `fit_step.py` says what they compute, and launches them."""

import triton
import triton.language as tl


@triton.jit
def _rows_of(order_ptr, place_ptr, now, slot, batch):
    """The data's rows at the places `slot` of batch `now`, and which of them there are."""
    at = now * batch + slot
    mask = (slot < batch) & (at < tl.load(place_ptr + 2))
    return tl.load(order_ptr + at, mask=mask, other=0), mask


@triton.jit(do_not_specialize=["batch", "J", "P", "steps", "row_tiles"])
def fit_forward_kernel(
    c_ptr,
    weight_ptr,
    basis_ptr,
    order_ptr,
    order_of_ptr,
    place_ptr,
    partial_ptr,
    batch,
    J,
    P,
    D,
    steps,
    row_tiles,
    shift,
    stride_cn,
    stride_bj,
    stride_order,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(2)
    now = tl.load(place_ptr)
    if (tile == 0) & (tl.program_id(1) == 0) & (split == 0):
        tl.store(
            place_ptr + 1, now
        )  # what the other launches read: this number goes on with the last of them
    task = (tile // row_tiles).to(tl.int64)
    slot = (tile % row_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    order_ptr += tl.load(order_of_ptr + task) * stride_order
    row, mask_n = _rows_of(order_ptr, place_ptr, now, slot, batch)
    c_rows_ptr = c_ptr + tl.multiple_of(row * stride_cn, 8)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    begin = split * steps * BLOCK_K
    for first in range(begin, tl.minimum(begin + steps * BLOCK_K, P), BLOCK_K):
        j = first + offs_k
        mask_k = j // 8 < P // 8
        c = tl.load(
            c_rows_ptr[:, None] + j[None, :], mask=mask_n[:, None] & mask_k[None, :], other=0.0
        )  # [BLOCK_N, BLOCK_K]
        weight = tl.load(weight_ptr + task * J + j, mask=j < J, other=0.0)
        c *= (weight - tl.cast(shift, tl.float32))[None, :]
        b_ptr = basis_ptr + tl.cast(first, tl.int64) * stride_bj
        offs_b = (offs_k * stride_bj)[:, None] + offs_d[None, :]
        b = tl.load(b_ptr + offs_b, mask=mask_k[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_K, BLOCK_D]
        if PRECISION == "bf16":
            acc = tl.dot(c.to(tl.bfloat16), b.to(tl.bfloat16), acc)
        else:
            acc = tl.dot(c, b, acc, input_precision=PRECISION)
    pair = (split.to(tl.int64) * (tl.num_programs(0) // row_tiles) + task) * batch + slot
    tl.store(partial_ptr + (pair * D)[:, None] + offs_d[None, :], acc, mask=mask_n[:, None] & mask_d[None, :])


@triton.jit(do_not_specialize=["batch", "splits"])
def fit_output_kernel(
    partial_ptr,
    rest_ptr,
    order_ptr,
    order_of_ptr,
    place_ptr,
    y_ptr,
    batch,
    D,
    splits,
    stride_rn,
    stride_order,
    HAS_REST: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    task = pair // batch
    order_ptr += tl.load(order_of_ptr + task) * stride_order
    row, here = _rows_of(order_ptr, place_ptr, tl.load(place_ptr + 1), pair % batch, batch)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = (offs_d < D) & here
    offs_s = tl.arange(0, BLOCK_S)
    size = tl.num_programs(0).to(tl.int64) * D
    acc = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for first in range(0, splits, BLOCK_S):
        s = first + offs_s
        offs = (s.to(tl.int64) * size + pair * D)[:, None] + offs_d[None, :]
        acc += tl.load(partial_ptr + offs, mask=(s < splits)[:, None] & mask_d[None, :], other=0.0)
    y = tl.sum(acc, axis=0)
    if HAS_REST:
        y += tl.load(rest_ptr + row * stride_rn + offs_d, mask=mask_d, other=0.0)
    tl.store(y_ptr + pair * D + offs_d, y, mask=mask_d)


@triton.jit(do_not_specialize=["batch", "row_tiles"])
def fit_logits_kernel(
    y_ptr,
    vectors_ptr,
    scale_ptr,
    head_ptr,
    place_ptr,
    logits_ptr,
    inverse_ptr,
    batch,
    D,
    K,
    row_tiles,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0)
    task = (tile // row_tiles).to(tl.int64)
    head = tl.load(head_ptr + task)
    slot = (tile % row_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (slot < batch) & (tl.load(place_ptr + 1) * batch + slot < tl.load(place_ptr + 2))
    pair = task * batch + slot
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k // 8 < K // 8
    vectors_ptr += head * D * K
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    squares = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        y_rows_ptr = y_ptr + (pair * D)[:, None]
        y = tl.load(y_rows_ptr + offs_d[None, :], mask=mask_n[:, None] & mask_d[None, :], other=0.0)
        v_rows_ptr = vectors_ptr + (offs_d.to(tl.int64) * K)[:, None]
        v = tl.load(v_rows_ptr + offs_k[None, :], mask=mask_d[:, None] & mask_k[None, :], other=0.0)
        squares += y * y
        acc = tl.dot(y, v, acc, input_precision=PRECISION)
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(squares, axis=1)), 1e-12)
    acc *= (inverse * tl.load(scale_ptr + head))[:, None]
    tl.store(logits_ptr + (pair * K)[:, None] + offs_k[None, :], acc, mask=mask_n[:, None] & mask_k[None, :])
    if tl.program_id(1) == 0:
        tl.store(inverse_ptr + pair, inverse, mask=mask_n)


@triton.jit(do_not_specialize=["batch", "row_tiles"])
def fit_loss_kernel(
    y_ptr,
    logits_ptr,
    inverse_ptr,
    vectors_ptr,
    scale_ptr,
    head_ptr,
    classes_ptr,
    labels_ptr,
    which_ptr,
    class_weight_ptr,
    order_ptr,
    order_of_ptr,
    place_ptr,
    dy_ptr,
    losses_ptr,
    batch,
    D,
    K,
    row_tiles,
    stride_order,
    stride_label,
    stride_class,
    HAS_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    tile = tl.program_id(0)
    task = (tile // row_tiles).to(tl.int64)
    head, which, now = tl.load(head_ptr + task), tl.load(which_ptr + task), tl.load(place_ptr + 1)
    classes = tl.load(classes_ptr + head)
    order_ptr += tl.load(order_of_ptr + task) * stride_order
    labels_ptr += which * stride_label
    slot = (tile % row_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, mask_n = _rows_of(order_ptr, place_ptr, now, slot, batch)
    label = tl.load(labels_ptr + row, mask=mask_n, other=0)
    count = tl.minimum(tl.load(place_ptr + 2) - now * batch, batch).to(tl.float32)  # rows of this batch
    if HAS_WEIGHT:
        class_weight_ptr += which * stride_class
        total = tl.zeros([BLOCK_B], dtype=tl.float32)
        for first in range(0, batch, BLOCK_B):
            other, there = _rows_of(order_ptr, place_ptr, now, first + tl.arange(0, BLOCK_B), batch)
            of = tl.load(labels_ptr + other, mask=there, other=0)
            total += tl.load(class_weight_ptr + of, mask=there, other=0.0)
        factor = tl.load(class_weight_ptr + label, mask=mask_n, other=0.0) / tl.sum(total, axis=0)
    else:
        factor = tl.where(mask_n, 1.0 / count, 0.0)
    pair = task * batch + slot
    offs_k = tl.arange(0, BLOCK_K)
    logits_rows_ptr = logits_ptr + (pair * K)[:, None]
    most = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
    mass = tl.zeros([BLOCK_N], dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + offs_k
        mask = mask_n[:, None] & (k < classes)[None, :]
        logits = tl.load(logits_rows_ptr + k[None, :], mask=mask, other=float("-inf"))
        higher = tl.maximum(most, tl.max(logits, axis=1))
        shifted = tl.where(mask, tl.exp(logits - higher[:, None]), 0.0)
        mass = tl.where(mask_n, mass * tl.exp(most - higher), 0.0) + tl.sum(shifted, axis=1)
        most = higher
    mass = tl.where(mask_n, mass, 1.0)

    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    v_rows_ptr = vectors_ptr + head * D * K + (offs_d.to(tl.int64) * K)[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)  # of dL / d(y / |y|), without scale
    along = tl.zeros([BLOCK_N], dtype=tl.float32)  # that gradient along y / |y|
    for first in range(0, K, BLOCK_K):
        k = first + offs_k
        mask = mask_n[:, None] & (k < classes)[None, :]
        logits = tl.load(logits_rows_ptr + k[None, :], mask=mask, other=0.0)
        share = tl.where(mask, tl.exp(logits - most[:, None]) / mass[:, None], 0.0)
        dlogits = (share - tl.where(mask & (k[None, :] == label[:, None]), 1.0, 0.0)) * factor[:, None]
        along += tl.sum(dlogits * logits, axis=1)
        mask_v = mask_d[:, None] & (k // 8 < K // 8)[None, :]
        v = tl.load(v_rows_ptr + k[None, :], mask=mask_v, other=0.0)  # [BLOCK_D, BLOCK_K]
        acc = tl.dot(dlogits, tl.trans(v), acc, input_precision=PRECISION)
    inverse = tl.load(inverse_ptr + pair, mask=mask_n, other=0.0)
    y_offs = (pair * D)[:, None] + offs_d[None, :]
    mask = mask_n[:, None] & mask_d[None, :]
    y = tl.load(y_ptr + y_offs, mask=mask, other=0.0)
    along = tl.where(
        inverse < 1e12, along * inverse, 0.0
    )  # a length of next to nothing is held, and has no gradient
    dy = (acc * tl.load(scale_ptr + head) - y * along[:, None]) * inverse[:, None]
    tl.store(dy_ptr + y_offs, dy, mask=mask)
    if tl.program_id(1) == 0:
        own = tl.load(logits_ptr + pair * K + label, mask=mask_n, other=0.0)
        loss = (most + tl.log(mass) - own) * factor * count
        tl.store(losses_ptr + task * stride_order + now * batch + slot, loss, mask=mask_n)


@triton.jit(do_not_specialize=["batch", "J", "P"])
def fit_update_kernel(
    dy_ptr,
    c_ptr,
    basis_ptr,
    order_ptr,
    order_of_ptr,
    place_ptr,
    rates_ptr,
    weight_ptr,
    z_ptr,
    square_ptr,
    batch,
    J,
    P,
    D,
    stride_cn,
    stride_bj,
    stride_order,
    beta2,
    fresh,
    eps,
    decay,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    task = tl.program_id(1).to(tl.int64)
    now, limit = tl.load(place_ptr + 1), tl.load(place_ptr + 2)
    if (tl.program_id(0) == 0) & (task == 0):
        tl.store(place_ptr, now + 1)
    order_ptr += tl.load(order_of_ptr + task) * stride_order
    j = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = j // 8 < P // 8
    b_rows_ptr = basis_ptr + j.to(tl.int64) * stride_bj
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    here = tl.minimum(tl.maximum(limit - now * batch, 0), batch).to(tl.int32)
    for start in range(0, here, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        row, mask_n = _rows_of(order_ptr, place_ptr, now, slot, batch)
        dy_rows_ptr = dy_ptr + (task * batch + slot) * D
        t = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        for d in range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            mask_d = (offs_d < D)[None, :]
            dy = tl.load(dy_rows_ptr[:, None] + offs_d[None, :], mask=mask_n[:, None] & mask_d, other=0.0)
            b = tl.load(b_rows_ptr[:, None] + offs_d[None, :], mask=mask_k[:, None] & mask_d, other=0.0)
            if PRECISION == "bf16":
                t = tl.dot(dy.to(tl.bfloat16), tl.trans(b.to(tl.bfloat16)), t)
            else:
                t = tl.dot(dy, tl.trans(b), t, input_precision=PRECISION)
        c_ptrs = c_ptr + tl.multiple_of(row * stride_cn, 8)[:, None] + j[None, :]
        acc += t * tl.load(c_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
    grad = tl.sum(acc, axis=0)

    mask = (j < J) & (here > 0)
    rates_ptr += (now * tl.num_programs(1) + task) * 4
    average = tl.load(rates_ptr, mask=here > 0, other=0.0)
    lr = tl.load(rates_ptr + 1, mask=here > 0, other=0.0)
    correction = tl.load(rates_ptr + 2, mask=here > 0, other=1.0)
    towards = tl.load(rates_ptr + 3, mask=here > 0, other=0.0)
    at = task * J + j
    weight, z = tl.load(weight_ptr + at, mask=mask, other=0.0), tl.load(z_ptr + at, mask=mask, other=0.0)
    square = tl.load(square_ptr + at, mask=mask, other=0.0) * tl.cast(beta2, tl.float32)
    square += grad * grad * tl.cast(fresh, tl.float32)  # 1 - beta2, which float32 would make 1e-5 too small
    move = grad / (tl.sqrt(square / correction) + tl.cast(eps, tl.float32)) + weight * tl.cast(
        decay, tl.float32
    )
    tl.store(square_ptr + at, square, mask=mask)
    tl.store(weight_ptr + at, weight + average * (z - weight) + towards * move, mask=mask)
    tl.store(z_ptr + at, z - lr * move, mask=mask)
