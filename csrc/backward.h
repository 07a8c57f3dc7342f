// The gradients of weight, z, scale and mean. c is read again, and t = dy . basis never leaves the cache. P has the
// large product, on vectors or on tiles. Included by spectral_reweight.h.
#pragma once
#include "coefficients.h"

namespace {

constexpr int64_t GROUP_OF_COMPONENTS = 1024;  // about this many components to a task
constexpr int64_t SMALLEST_GROUPS = 8;  // of components, where there are so many blocks
constexpr int64_t PACKED_DY = 8;  // as many weight vectors' dy are kept packed for a block of rows

struct BackwardPlan {
  const Backward* call;
  Cut cut;
  int64_t groups;      // of components; each owns its units' dz and its components' dweight
  int64_t row_groups;  // runs of row blocks
  double* dweight;     // [row groups, T, J]
  double* dscale;      // [groups, N]
  double* dmean;       // [groups, N]
  int* out_of_memory;
};

// dz[n,r] := sum over the unit's components of q * proj, gathered in `sum` over the blocks of the unit.
template <class T, class Data>
void write_dz(const Backward& call, const Rows<T>& rows, const int64_t* block, const T* q, T* sum) {
  constexpr int64_t lanes = VectorOf<T>::lanes, panel = VectorOf<T>::panel;
  const Reweight& x = call.common;
  const Units& units = x.units;
  const int64_t width = round_up(units.C, lanes);
  for (int64_t r = block[FIRST_UNIT]; r < block[LAST_UNIT]; ++r) {
    const int64_t low = most(units.offsets[r], block[FIRST]), high = least(units.offsets[r + 1], block[LAST]);
    if (low >= high) {
      memset(sum, 0, rows.count * width * sizeof(T));  // a unit without components
    } else {
      for (int64_t c = 0; c < width; c += panel) {
        Product<T> p{};
        p.panels = 1;
        p.k = high - low;
        p.a = q + (low - block[FIRST]) * rows.padded;
        p.a_stride = rows.padded;
        p.b = static_cast<const T*>(units.proj) + low * width + c;
        p.b_stride = width;
        p.out = sum + c;
        p.out_stride = width;
        p.add = low > units.offsets[r];
        column_of_tiles<T, ROWS_TOGETHER>(rows.count, least(panel, width - c) / lanes, p, p.a, 0);
      }
      if (high < units.offsets[r + 1]) continue;  // the next block goes on with this unit
    }
    for (int64_t n = 0; n < rows.count; ++n) {
      Data* to = static_cast<Data*>(call.dz) + ((rows.first + n) * units.R + r) * units.C;
      for (int64_t c = 0; c < units.C; ++c) write(to + c, sum[n * width + c]);
    }
  }
}

template <class T>
T dot(const T* a, const T* b, int64_t count) {
  Vector<T> sum{};
  for (int64_t n = 0; n < count; n += VectorOf<T>::lanes) sum += load(a + n) * load(b + n);
  return sum_lanes<T>(sum);
}

template <class T, class Data, class P>
void backward_task(const void* context, int64_t index) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  const BackwardPlan& plan = *static_cast<const BackwardPlan*>(context);
  const Backward& call = *plan.call;
  const Reweight& x = call.common;
  const Units& units = x.units;
  const int64_t group = index % plan.groups, row_group = index / plan.groups;
  const int64_t dys = x.weight_index ? 1 : x.T, kept = least(dys, PACKED_DY);
  const int64_t largest = round_up(largest_block(units), P::component_step), most_rows = plan.cut.rows_in_block;
  const bool want_inner = call.dscale != nullptr, want_c = call.dweight != nullptr;
  const bool want_q = call.dz || call.dscale || call.dmean;

  Rows<T> rows;
  T *packed_z, *c, *inner, *t, *q, *by_row, *dz, *packed_dy, *scale_sum, *mean_sum;
  const auto lay_out = [&](Arena& arena) {
    rows.scale = arena.take<T>(most_rows);
    rows.mean = arena.take<T>(most_rows);
    scale_sum = arena.take<T>(most_rows);
    mean_sum = arena.take<T>(most_rows);
    packed_z = arena.take<T>(P::z_size(most_rows, units.C));
    c = arena.take<T>(want_c ? most_rows * (largest + P::component_room) : 0);
    inner = arena.take<T>(want_inner ? most_rows * (largest + P::component_room) : 0);
    t = arena.take<T>(most_rows * largest);
    q = arena.take<T>(want_q ? most_rows * largest : 0);
    by_row = arena.take<T>(want_q && x.weight_index ? most_rows * largest : 0);
    dz = arena.take<T>(call.dz ? most_rows * round_up(units.C, lanes) : 0);
    packed_dy = arena.take<T>(kept * P::dy_size(most_rows, units.D));
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

  P::begin();
  for (int64_t row_block = first_rows; row_block < end_rows; ++row_block) {
    const int64_t first_row = row_block * plan.cut.rows_in_block;
    rows.fill(x, first_row, least(plan.cut.rows_in_block, x.N - first_row));
    const int64_t dy_size = P::dy_size(rows.padded, units.D);
    const auto pack_dy = [&](int64_t task, T* to) {
      const Data* dy = static_cast<const Data*>(call.dy.data) + task * call.dy.stride[0] + first_row * call.dy.stride[1];
      P::template pack_dy<Data>(dy, call.dy.stride[1], call.dy.stride[2], rows.count, units.D, to);
    };
    if (kept == dys)
      for (int64_t task = 0; task < dys; ++task) pack_dy(task, packed_dy + task * dy_size);
    for (int64_t n = 0; n < rows.count; ++n) {
      if (call.dscale) plan.dscale[group * x.N + first_row + n] = 0;
      if (call.dmean) plan.dmean[group * x.N + first_row + n] = 0;
    }

    for (int64_t b = first_block; b < end_block; ++b) {
      const int64_t* block = units.block + BLOCK_FIELDS * b;
      const int64_t components = block[LAST] - block[FIRST], size = components * rows.padded;
      T* raw = want_inner ? inner : c;
      if (x.c) {
        if (want_c) take_components<T>(x, rows, block, nullptr, c);
      } else if (want_inner || want_c) {
        P::template read_components<Data>(x, rows, block, packed_z, raw);
      }
      if (want_inner) {
        if (want_c) memcpy(c, inner, size * sizeof(T));
        for (int64_t j = 0; j < components; ++j) {
          const T bias = static_cast<const T*>(units.bias)[block[FIRST] + j];
          const T slope = static_cast<const T*>(units.slope)[block[FIRST] + j];
          for (int64_t n = 0; n < rows.padded; n += lanes) {
            T* here = inner + j * rows.padded + n;
            store<T>(here, load(here) + bias + load(rows.mean + n) * slope);
          }
        }
      }
      if (want_c && !x.c) finish_components<T>(units, rows, block, nullptr, c);
      if (want_q && x.weight_index) gather_weights<T>(x, rows, block, by_row);

      for (int64_t task = 0; task < dys; ++task) {
        T* dy = packed_dy + (kept == dys ? task * dy_size : 0);
        if (kept != dys) pack_dy(task, dy);
        P::read_gradient(units, rows, block, dy, t);
        if (want_c && !x.weight_index)
          for (int64_t j = 0; j < components; ++j)
            dweight[task * units.J + block[FIRST] + j] += dot<T>(c + j * rows.padded, t + j * rows.padded, rows.padded);
        if (want_c && x.weight_index)
          for (int64_t n = 0; n < rows.count; ++n) {
            double* to = dweight + x.weight_index[first_row + n] * units.J + block[FIRST];
            for (int64_t j = 0; j < components; ++j) to[j] += c[j * rows.padded + n] * t[j * rows.padded + n];
          }
        if (want_q)
          for (int64_t j = 0; j < components; ++j) {
            const T w = x.weight_index ? 0 : static_cast<const T*>(x.weight)[task * units.J + block[FIRST] + j];
            for (int64_t n = j * rows.padded; n < (j + 1) * rows.padded; n += lanes) {
              const Vector<T> mine = x.weight_index ? load(by_row + n) * load(t + n) : w * load(t + n);
              store<T>(q + n, task ? load(q + n) + mine : mine);
            }
          }
      }

      if (call.dscale) {
        memset(scale_sum, 0, rows.padded * sizeof(T));
        for (int64_t i = 0; i < size; i += rows.padded)
          for (int64_t n = 0; n < rows.padded; n += lanes)
            store<T>(scale_sum + n, load(scale_sum + n) + load(q + i + n) * load(inner + i + n));
        for (int64_t n = 0; n < rows.count; ++n) plan.dscale[group * x.N + first_row + n] += scale_sum[n];
      }
      if (call.dz || call.dmean)  // from here on q holds scale * dL/dc
        for (int64_t i = 0; i < size; i += rows.padded)
          for (int64_t n = 0; n < rows.padded; n += lanes) store<T>(q + i + n, load(q + i + n) * load(rows.scale + n));
      if (call.dmean) {
        memset(mean_sum, 0, rows.padded * sizeof(T));
        for (int64_t j = 0; j < components; ++j) {
          const T slope = static_cast<const T*>(units.slope)[block[FIRST] + j];
          for (int64_t n = 0; n < rows.padded; n += lanes)
            store<T>(mean_sum + n, load(mean_sum + n) + load(q + j * rows.padded + n) * slope);
        }
        for (int64_t n = 0; n < rows.count; ++n) plan.dmean[group * x.N + first_row + n] += mean_sum[n];
      }
      if (call.dz) write_dz<T, Data>(call, rows, block, q, dz);
    }
  }
  P::end();
}

template <class T>
void sum_in_order(const double* from, int64_t terms, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t g = 0; g < terms; ++g) sum += from[g * count + i];
    to[i] = static_cast<T>(sum);
  }
}

template <class T>
bool run_backward(const Backward& call, const Cut& cut, Task task) {
  const Reweight& x = call.common;
  int out_of_memory = 0;
  BackwardPlan plan{&call, cut, 1, 1, nullptr, nullptr, nullptr, &out_of_memory};
  plan.groups = most(1, least(SMALLEST_GROUPS * least(8, most(1, x.units.J / (8 * GROUP_OF_COMPONENTS))), x.units.blocks));
  const int64_t room = (int64_t{1} << 22) / most(1, x.T * x.units.J);  // so many partial dweight take 32 MiB
  plan.row_groups = most(1, least(least(divide_up(16, plan.groups), plan.cut.row_blocks), room));
  const int64_t weights = call.dweight ? plan.row_groups * x.T * x.units.J : 0;
  const int64_t scales = call.dscale ? plan.groups * x.N : 0, means = call.dmean ? plan.groups * x.N : 0;
  double* memory = static_cast<double*>(__builtin_malloc((weights + scales + means + 1) * sizeof(double)));
  if (memory == nullptr) return false;
  plan.dweight = memory;
  plan.dscale = memory + weights;
  plan.dmean = plan.dscale + scales;
  parallel_for(plan.groups * plan.row_groups, x.threads, task, &plan);
  if (call.dweight) sum_in_order<T>(plan.dweight, plan.row_groups, x.T * x.units.J, static_cast<T*>(call.dweight));
  if (call.dscale) sum_in_order<T>(plan.dscale, plan.groups, x.N, static_cast<T*>(call.dscale));
  if (call.dmean) sum_in_order<T>(plan.dmean, plan.groups, x.N, static_cast<T*>(call.dmean));
  __builtin_free(memory);
  return !out_of_memory;
}

template <class T, class Data, class P>
bool backward_as(const Backward& call) {
  return run_backward<T>(call, Cut(call.common.N, VectorOf<T>::panel), backward_task<T, Data, P>);
}

}  // namespace
