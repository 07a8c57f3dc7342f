// backward.h's work on pairs of bfloat16: c, t = dy . basis and q = dL/dc are [rows, STRIDE], a row of the call to a row.
// Included after pairs_forward.h.
#pragma once

namespace {

// a, for every part of D: [rows, STRIDE].
void copy_dy(const Bfloat16* dy, const int64_t* stride, int64_t rows, int64_t room, const Parts& parts, Bfloat16* a) {
  for (int64_t part = 0; part < parts.count(); ++part)
    copy_rows(dy + part * parts.size * stride[2], stride[1], stride[2], rows, parts.length(part), a + part * room * STRIDE);
}

// sum[0 ... 31] := sum over rows of c * t, in four sums for each column.
ALWAYS_INLINE void column_dots(int64_t rows, const float* c, const float* t, float* to) {
  constexpr int64_t lanes = VectorOf<float>::lanes, vectors = 2 * SIDE / lanes, sums = 4;
  for (int64_t v = 0; v < vectors; ++v) {
    Vector<float> sum[sums] = {};
    int64_t n = 0;
    for (; n + sums <= rows; n += sums)
      UNROLL for (int64_t i = 0; i < sums; ++i)
        sum[i] += load(c + (n + i) * STRIDE + v * lanes) * load(t + (n + i) * STRIDE + v * lanes);
    for (; n < rows; ++n) sum[0] += load(c + n * STRIDE + v * lanes) * load(t + n * STRIDE + v * lanes);
    store<float>(to + v * lanes, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

// t := dy . basis for the block, and dweight += sum over rows of c * t where all rows share their weights.
void read_gradient(const Rows<float>& rows, const Block& block, const Bfloat16* dy, int64_t room, const Parts& parts,
                   const Bfloat16* next, const float* c, float* t, double* dweight) {
  const int64_t components = block.components(), panel = SIDE * block.dims();
  for (int64_t j = 0; j < components; j += 2 * SIDE) {
    const int64_t panels = divide_up(least(2 * SIDE, components - j), SIDE);
    const Bfloat16* basis = block.transposed_basis() + j * block.dims();
    if (parts.whole == 0)
      for (int64_t n = 0; n < rows.count; ++n) memset(t + n * STRIDE + j, 0, 2 * SIDE * sizeof(float));
    for (int64_t part = 0; part < parts.count(); ++part) {
      // The next panels lie behind these, all parts of one after the other.
      const bool last = j + 2 * SIDE >= components;
      const int64_t at = part * parts.size * SIDE;
      const Bfloat16* after = last ? next : basis + 2 * panel;
      const Next ahead{after ? after + 2 * at : nullptr, 2 * SIDE * parts.length(part)};
      multiply_panels(rows.count, panels, parts.length(part), dy + part * room * STRIDE, basis + at, panel, t + j, STRIDE,
                      part > 0, ahead);
    }
    if (dweight) {
      float sums[2 * SIDE];
      column_dots(rows.count, c + j, t + j, sums);
      for (int64_t i = 0; i < least(2 * SIDE, components - j); ++i) dweight[j + i] += sums[i];
    }
  }
}

// dz[n,r] := sum over the unit's components of q * proj, gathered in `sum` [rows, C] over the blocks of the unit.
void write_dz_of_rows(const Backward& call, const Rows<float>& rows, const Block& block, const float* q, float* sum) {
  constexpr int64_t lanes = VectorOf<float>::lanes, panel = VectorOf<float>::panel;
  const Reweight& x = call.common;
  const Units& units = x.units;
  const int64_t width = round_up(units.C, lanes);
  for (int64_t r = block.fields[FIRST_UNIT]; r < block.fields[LAST_UNIT]; ++r) {
    const int64_t low = most(units.offsets[r], block.first()), high = least(units.offsets[r + 1], block.fields[LAST]);
    if (low >= high) {
      memset(sum, 0, rows.count * width * sizeof(float));  // a unit without components
    } else {
      for (int64_t c = 0; c < width; c += panel) {
        Product<float> p{};
        p.panels = 1;
        p.k = high - low;
        p.a = q + (low - block.first());
        p.a_stride = STRIDE;
        p.b = static_cast<const float*>(units.proj) + low * width + c;
        p.b_stride = width;
        p.out = sum + c;
        p.out_stride = width;
        p.add = low > units.offsets[r];
        column_of_tiles<float, COLUMNS_TOGETHER>(rows.count, least(panel, width - c) / lanes, p, p.a, 0);
      }
      if (high < units.offsets[r + 1]) continue;  // the next block goes on with this unit
    }
    for (int64_t n = 0; n < rows.count; ++n) {
      Bfloat16* to = static_cast<Bfloat16*>(call.dz) + ((rows.first + n) * units.R + r) * units.C;
      for (int64_t c = 0; c < units.C; ++c) write(to + c, sum[n * width + c]);
    }
  }
}

void backward_task_on_pairs(const void* context, int64_t index) {
  constexpr int64_t lanes = VectorOf<float>::lanes;
  const BackwardPlan& plan = *static_cast<const BackwardPlan*>(context);
  const Backward& call = *plan.call;
  const Reweight& x = call.common;
  const Units& units = x.units;
  const int64_t group = index % plan.groups, row_group = index / plan.groups;
  const int64_t dys = x.weight_index ? 1 : x.T, kept = least(dys, PACKED_DY);
  const int64_t room = round_up(plan.cut.rows_in_block, 2 * SIDE);
  const bool want_inner = call.dscale != nullptr, want_c = call.dweight != nullptr;
  const bool want_q = call.dz || call.dscale || call.dmean;
  const Parts parts(units.D);
  const int64_t dy_size = parts.count() * room * STRIDE;

  Rows<float> rows;
  Constants* constants;
  Bfloat16 *a, *packed_dy;
  float *c, *inner, *t, *q, *dz, *weight;
  const auto lay_out = [&](Arena& arena) {
    rows.scale = arena.take<float>(room);
    rows.mean = arena.take<float>(room);
    constants = arena.take<Constants>(1);
    weight = arena.take<float>(STRIDE);
    a = arena.take<Bfloat16>(room * STRIDE);
    c = arena.take<float>(want_c ? room * STRIDE : 0);
    inner = arena.take<float>(want_inner ? room * STRIDE : 0);
    t = arena.take<float>(room * STRIDE);
    q = arena.take<float>(want_q ? room * STRIDE : 0);
    dz = arena.take<float>(call.dz ? room * round_up(units.C, lanes) : 0);
    packed_dy = arena.take<Bfloat16>(kept * dy_size);
  };
  Arena counted(nullptr);
  lay_out(counted);
  Arena arena(scratch(counted.used));
  if (arena.memory == nullptr) return __atomic_store_n(plan.out_of_memory, 1, __ATOMIC_RELAXED);
  lay_out(arena);

  const int64_t first_block = group_start(units, plan.groups, group), end_block = group_start(units, plan.groups, group + 1);
  const int64_t first_rows = plan.cut.row_blocks * row_group / plan.row_groups;
  const int64_t end_rows = plan.cut.row_blocks * (row_group + 1) / plan.row_groups;
  double* dweight = plan.dweight + row_group * x.T * units.J;
  if (want_c)
    for (int64_t task = 0; task < x.T; ++task)
      for (int64_t b = first_block; b < end_block; ++b)
        for (int64_t j = units.block[BLOCK_FIELDS * b + FIRST]; j < units.block[BLOCK_FIELDS * b + LAST]; ++j) dweight[task * units.J + j] = 0;

  begin_products();
  for (int64_t row_block = first_rows; row_block < end_rows; ++row_block) {
    const int64_t first_row = row_block * plan.cut.rows_in_block;
    rows.fill(x, first_row, least(plan.cut.rows_in_block, x.N - first_row));
    const auto copy_of_dy = [&](int64_t task) {
      Bfloat16* to = packed_dy + (kept == dys ? task * dy_size : 0);
      const Bfloat16* dy = static_cast<const Bfloat16*>(call.dy.data) + task * call.dy.stride[0] + first_row * call.dy.stride[1];
      copy_dy(dy, call.dy.stride, rows.count, room, parts, to);
    };
    if (kept == dys)
      for (int64_t task = 0; task < dys; ++task) copy_of_dy(task);
    for (int64_t n = 0; n < rows.count; ++n) {
      if (call.dscale) plan.dscale[group * x.N + first_row + n] = 0;
      if (call.dmean) plan.dmean[group * x.N + first_row + n] = 0;
    }

    for (int64_t b = first_block; b < end_block; ++b) {
      const Block block{units.block + BLOCK_FIELDS * b, &units};
      const int64_t components = block.components();
      if (components) constants->fill(units, block);
      if (components && (want_inner || want_c)) {
        float* raw = want_c ? c : inner;
        read_components(x, rows, block, a, raw);
        for (int64_t n = 0; want_inner && n < rows.count; ++n)
          for (int64_t j = n * STRIDE, k = 0; k < components; j += lanes, k += lanes)
            store<float>(inner + j, load(raw + j) + load(constants->bias + k) + rows.mean[n] * load(constants->slope + k));
        if (want_c) finish(rows, block, *constants, c);
      }

      for (int64_t task = 0; task < dys && components; ++task) {
        if (kept != dys) copy_of_dy(task);
        double* shared = want_c && !x.weight_index ? dweight + task * units.J + block.first() : nullptr;
        const Bfloat16* next = nullptr;
        if (b + 1 < end_block) next = Block{block.fields + BLOCK_FIELDS, &units}.transposed_basis();
        read_gradient(rows, block, packed_dy + (kept == dys ? task * dy_size : 0), room, parts, next, c, t, shared);
        if (want_c && x.weight_index)
          for (int64_t n = 0; n < rows.count; ++n) {
            double* to = dweight + x.weight_index[first_row + n] * units.J + block.first();
            for (int64_t j = 0; j < components; ++j) to[j] += c[n * STRIDE + j] * t[n * STRIDE + j];
          }
        if (!want_q) continue;
        const float* weights = static_cast<const float*>(x.weight) + block.first();
        if (!x.weight_index) Constants::copy_row(weights + task * units.J, block, weight);
        for (int64_t n = 0; n < rows.count; ++n) {
          if (x.weight_index) Constants::copy_row(weights + x.weight_index[first_row + n] * units.J, block, weight);
          for (int64_t j = n * STRIDE, k = 0; k < components; j += lanes, k += lanes) {
            const Vector<float> mine = load(weight + k) * load(t + j);
            store<float>(q + j, task ? load(q + j) + mine : mine);
          }
        }
      }

      for (int64_t n = 0; want_q && n < rows.count; ++n) {
        Vector<float> scale_sum{}, mean_sum{};
        // Columns past the last are zero in q and finite beside it: inner's are products with zeros of proj.
        for (int64_t j = n * STRIDE, k = 0; k < components; j += lanes, k += lanes) {
          if (call.dscale) scale_sum += load(q + j) * load(inner + j);
          const Vector<float> scaled = load(q + j) * rows.scale[n];
          mean_sum += scaled * load(constants->slope + k);
          store<float>(q + j, scaled);  // from here on q holds scale * dL/dc
        }
        if (call.dscale) plan.dscale[group * x.N + first_row + n] += sum_lanes<float>(scale_sum);
        if (call.dmean) plan.dmean[group * x.N + first_row + n] += sum_lanes<float>(mean_sum);
      }
      if (call.dz) write_dz_of_rows(call, rows, block, q, dz);
    }
  }
  end_products();
}

bool backward_on_pairs(const Backward& call) {
  return run_backward<float>(call, Cut(call.common.N, ROW_STEP), backward_task_on_pairs);
}

}  // namespace
