// forward.h's work on pairs of bfloat16: c and y are [rows, components] and [rows, dimensions], as the call has them.
// Included after pairs.h and the set's own products.
#pragma once

namespace {

// a [rows, STRIDE] := c * weight, rounded, and zeros up to DEPTH. `weight` [STRIDE] if weights do not depend on the row.
void weigh(const Reweight& x, const Rows<float>& rows, const Block& block, const float* c, const float* weight, Bfloat16* a) {
  constexpr int64_t lanes = VectorOf<float>::lanes;
  const int64_t components = block.components(), whole = components / lanes * lanes;
  for (int64_t n = 0; n < rows.count; ++n, c += STRIDE, a += STRIDE) {
    const float* own = weight;
    if (x.weight_index)
      own = static_cast<const float*>(x.weight) + x.weight_index[rows.first + n] * x.units.J + block.first();
    for (int64_t j = 0; j < whole; j += lanes) store_rounded(a + j, load(c + j) * load(own + j));
    for (int64_t j = whole; j < components; ++j) write(a + j, c[j] * own[j]);
    memset(a + components, 0, (block.depth() - components) * sizeof(Bfloat16));
  }
}

// c [rows, STRIDE] := scale * (c + bias + mean * slope) - offset.
void finish(const Rows<float>& rows, const Block& block, const Constants& constants, float* c) {
  constexpr int64_t lanes = VectorOf<float>::lanes;
  for (int64_t n = 0; n < rows.count; ++n, c += STRIDE) {
    const float scale = rows.scale[n], mean = rows.mean[n];
    for (int64_t j = 0; j < block.components(); j += lanes) {
      const Vector<float> inner = load(c + j) + load(constants.bias + j) + mean * load(constants.slope + j);
      store<float>(c + j, scale * inner - load(constants.offset + j));
    }
  }
}

// y [rows, dims] := the sum of `groups` partial ones [rows, dims rounded up to DEPTH], in order.
void sum_of_groups(const float* from, int64_t groups, int64_t group_stride, int64_t rows, int64_t dims, Bfloat16* y) {
  constexpr int64_t lanes = VectorOf<float>::lanes;
  for (int64_t n = 0; n < rows; ++n, from += round_up(dims, DEPTH), y += dims)
    for (int64_t d = 0; d < dims; d += lanes) {
      Vector<float> sum = load(from + d);
      for (int64_t g = 1; g < groups; ++g) sum += load(from + g * group_stride + d);
      if (d + lanes <= dims) {
        store_rounded(y + d, sum);
      } else {
        for (int64_t i = 0; i < dims - d; ++i) write(y + d + i, sum[i]);
      }
    }
}

void forward_sum_on_pairs(const void* context, int64_t index) {
  const ForwardPlan& plan = *static_cast<const ForwardPlan*>(context);
  const Reweight& x = plan.call->common;
  const SumPiece piece(plan, index);
  sum_of_groups(static_cast<const float*>(plan.partial) + piece.partial + piece.low * round_up(x.units.D, DEPTH), plan.groups,
                plan.partial_size(), piece.high - piece.low, x.units.D,
                static_cast<Bfloat16*>(plan.call->y) + (piece.task * x.N + piece.first_row + piece.low) * x.units.D);
}

void forward_task_on_pairs(const void* context, int64_t index) {
  const ForwardPlan& plan = *static_cast<const ForwardPlan*>(context);
  const Reweight& x = plan.call->common;
  const Units& units = x.units;
  const int64_t group = index % plan.groups, step = index / plan.groups % plan.task_steps;
  const int64_t row_block = index / plan.groups / plan.task_steps;
  const int64_t first_task = step * TASKS_AT_ONCE, tasks = least(plan.tasks() - first_task, TASKS_AT_ONCE);
  const int64_t first_row = row_block * plan.cut.rows_in_block;
  const int64_t count = least(plan.cut.rows_in_block, x.N - first_row), room = round_up(count, 2 * SIDE);

  Rows<float> rows;
  Constants* constants;
  Bfloat16* a;
  float *c, *weight, *y;
  const auto lay_out = [&](Arena& arena) {
    rows.scale = arena.take<float>(room);
    rows.mean = arena.take<float>(room);
    constants = arena.take<Constants>(1);
    weight = arena.take<float>(STRIDE);
    a = arena.take<Bfloat16>(room * STRIDE);
    c = arena.take<float>(room * STRIDE);
    y = arena.take<float>(plan.partial ? 0 : tasks * plan.y_size);
  };
  Arena counted(nullptr);
  lay_out(counted);
  Arena arena(scratch(counted.used));
  if (arena.memory == nullptr) return __atomic_store_n(plan.out_of_memory, 1, __ATOMIC_RELAXED);
  lay_out(arena);
  if (plan.partial) y = static_cast<float*>(plan.partial) + index * plan.partial_size();

  begin_products();
  rows.fill(x, first_row, count);
  const int64_t end = group_start(units, plan.groups, group + 1);
  bool add = false;
  for (int64_t b = group_start(units, plan.groups, group); b < end; ++b) {
    const Block block{units.block + BLOCK_FIELDS * b, &units};
    if (block.components() == 0) continue;
    constants->fill(units, block);
    read_components(x, rows, block, a, c);
    finish(rows, block, *constants, c);
    for (int64_t t = 0; t < tasks; ++t) {
      if (!x.weight_index)
        Constants::copy_row(static_cast<const float*>(x.weight) + (first_task + t) * units.J + block.first(), block, weight);
      weigh(x, rows, block, c, weight, a);
      const Block after{block.fields + BLOCK_FIELDS, &units};
      Next next{nullptr, 0};
      if (b + 1 < end) next = {after.basis(), 2 * SIDE * after.depth()};
      multiply(count, block.dims(), block.components(), a, block.basis(), SIDE * block.depth(), y + t * plan.y_size,
               block.dims(), add, next);
    }
    add = true;
  }
  end_products();
  if (!add) memset(y, 0, tasks * plan.y_size * sizeof(float));
  if (plan.partial) return;
  for (int64_t t = 0; t < tasks; ++t)
    sum_of_groups(y + t * plan.y_size, 1, 0, count, units.D,
                  static_cast<Bfloat16*>(plan.call->y) + ((first_task + t) * x.N + first_row) * units.D);
}

bool forward_on_pairs(const Forward& call) {
  const Cut cut(call.common.N, ROW_STEP);
  const int64_t y_size = round_up(cut.rows_in_block, 2 * SIDE) * round_up(call.common.units.D, DEPTH);
  return run_forward(call, cut, y_size, sizeof(float), forward_task_on_pairs, forward_sum_on_pairs);
}

}  // namespace
