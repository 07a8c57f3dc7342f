// y from coefficients that stay in cache. P has the large product, on vectors or on tiles. Included by spectral_reweight.h.
#pragma once
#include "coefficients.h"

namespace {

constexpr int64_t FORWARD_TASKS = 16;  // few rows are spread over this many groups of components
constexpr int64_t SUM_PIECES = 4;  // a block of rows is summed up over the groups in so many pieces
constexpr int64_t TASKS_AT_ONCE = 4;  // weight vectors applied to one reading of the coefficients

struct ForwardPlan {
  const Forward* call;
  Cut cut;
  int64_t groups;      // of components
  int64_t task_steps;  // runs of up to TASKS_AT_ONCE weight vectors
  int64_t y_size;      // numbers in the y of one weight vector and a whole block of rows
  void* partial;       // [row blocks, task steps, groups, tasks, dims, rows]; null with one group
  int* out_of_memory;

  int64_t tasks() const { return call->common.weight_index ? 1 : call->common.T; }
  int64_t partial_size() const { return least(tasks(), TASKS_AT_ONCE) * y_size; }
};

template <class T, class Data, class P>
void forward_task(const void* context, int64_t index) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  const ForwardPlan& plan = *static_cast<const ForwardPlan*>(context);
  const Reweight& x = plan.call->common;
  const Units& units = x.units;
  const int64_t group = index % plan.groups, step = index / plan.groups % plan.task_steps;
  const int64_t row_block = index / plan.groups / plan.task_steps;
  const int64_t first_task = step * TASKS_AT_ONCE, tasks = least(plan.tasks() - first_task, TASKS_AT_ONCE);
  const int64_t first_row = row_block * plan.cut.rows_in_block;
  const int64_t count = least(plan.cut.rows_in_block, x.N - first_row), padded = round_up(count, lanes);
  const int64_t largest = round_up(largest_block(units), P::component_step);
  const bool weight_apart = tasks > 1 || x.weight_index;

  Rows<T> rows;
  T *packed_z, *c, *weighted, *y;
  char* spare;
  const auto lay_out = [&](Arena& arena) {
    rows.scale = arena.take<T>(padded);
    rows.mean = arena.take<T>(padded);
    packed_z = arena.take<T>(P::z_size(padded, units.C));
    c = arena.take<T>(padded * (largest + P::component_room));
    weighted = arena.take<T>(weight_apart ? padded * largest : 0);
    spare = arena.take<char>(P::spare_size(padded, largest));
    y = arena.take<T>(plan.partial ? 0 : tasks * plan.y_size);
  };
  Arena counted(nullptr);
  lay_out(counted);
  Arena arena(scratch(counted.used));
  if (arena.memory == nullptr) return __atomic_store_n(plan.out_of_memory, 1, __ATOMIC_RELAXED);
  lay_out(arena);
  if (plan.partial) y = static_cast<T*>(plan.partial) + index * plan.partial_size();

  P::begin();
  rows.fill(x, first_row, count);
  const int64_t end = group_start(units, plan.groups, group + 1);
  bool add = false;
  for (int64_t b = group_start(units, plan.groups, group); b < end; ++b) {
    const int64_t* block = units.block + BLOCK_FIELDS * b;
    const int64_t components = block[LAST] - block[FIRST];
    if (components == 0) continue;
    const T* all_weights = static_cast<const T*>(x.weight) + first_task * units.J;
    const T* weight_now = weight_apart ? nullptr : all_weights;
    if (x.c) {
      take_components<T>(x, rows, block, weight_now, c);
    } else {
      P::template read_components<Data>(x, rows, block, packed_z, c);
      finish_components<T>(units, rows, block, weight_now, c);
    }
    for (int64_t t = 0; t < tasks; ++t) {
      const T* a = c;
      if (x.weight_index) gather_weights<T>(x, rows, block, weighted);
      if (weight_apart) {
        a = weighted;
        for (int64_t j = 0; j < components; ++j) {
          const T w = x.weight_index ? 0 : all_weights[t * units.J + block[FIRST] + j];
          for (int64_t n = j * padded; n < (j + 1) * padded; n += lanes)
            store<T>(weighted + n, x.weight_index ? load(c + n) * load(weighted + n) : load(c + n) * w);
        }
      }
      P::write_components(units, rows, block, a, spare, y + t * plan.y_size, add);
    }
    add = true;
  }
  P::end();
  if (!add) memset(y, 0, tasks * plan.y_size * sizeof(T));
  if (plan.partial) return;
  for (int64_t t = 0; t < tasks; ++t) {
    Data* to = static_cast<Data*>(plan.call->y) + ((first_task + t) * x.N + first_row) * units.D;
    P::template write_rows<Data>(y + t * plan.y_size, 1, 0, count, 0, count, units.D, to);
  }
}

// A piece of the rows of a block, for one weight vector: where its partial sums lie and which rows they are.
struct SumPiece {
  int64_t task, first_row, count;  // of the block
  int64_t low, high;               // of its rows
  int64_t partial;                 // numbers before its first partial sum

  SumPiece(const ForwardPlan& plan, int64_t index) {
    const int64_t piece = index % SUM_PIECES, row_block = index / SUM_PIECES / plan.tasks();
    task = index / SUM_PIECES % plan.tasks();
    first_row = row_block * plan.cut.rows_in_block;
    count = least(plan.cut.rows_in_block, plan.call->common.N - first_row);
    low = count * piece / SUM_PIECES;
    high = count * (piece + 1) / SUM_PIECES;
    partial = (row_block * plan.task_steps + task / TASKS_AT_ONCE) * plan.groups * plan.partial_size() +
              task % TASKS_AT_ONCE * plan.y_size;
  }
};

template <class T, class Data, class P>
void forward_sum(const void* context, int64_t index) {
  const ForwardPlan& plan = *static_cast<const ForwardPlan*>(context);
  const Reweight& x = plan.call->common;
  const SumPiece piece(plan, index);
  Data* to = static_cast<Data*>(plan.call->y) + (piece.task * x.N + piece.first_row) * x.units.D;
  P::template write_rows<Data>(static_cast<const T*>(plan.partial) + piece.partial, plan.groups, plan.partial_size(),
                               piece.count, piece.low, piece.high, x.units.D, to);
}

// Cuts the work and runs it: `task` for each group of components of some rows, then `sum` where there are several groups.
bool run_forward(const Forward& call, const Cut& cut, int64_t y_size, int64_t number_bytes, Task task, Task sum) {
  const Reweight& x = call.common;
  int out_of_memory = 0;
  ForwardPlan plan{&call, cut, 1, 1, y_size, nullptr, &out_of_memory};
  plan.task_steps = divide_up(plan.tasks(), TASKS_AT_ONCE);
  const int64_t jobs = plan.cut.row_blocks * plan.task_steps;
  if (jobs == 0) return true;
  // Partial sums of y stay small beside the coefficients that are never stored.
  const int64_t room = most(4, 3 * x.units.J / most(1, 4 * x.units.D));
  plan.groups = most(1, least(least(divide_up(FORWARD_TASKS, jobs), room), x.units.blocks));
  void* memory = nullptr;
  if (plan.groups > 1) {
    memory = __builtin_malloc(jobs * plan.groups * plan.partial_size() * number_bytes);
    if (memory == nullptr) return false;
    plan.partial = memory;
  }
  parallel_for(jobs * plan.groups, x.threads, task, &plan);
  if (plan.groups > 1 && !out_of_memory) parallel_for(plan.cut.row_blocks * plan.tasks() * SUM_PIECES, x.threads, sum, &plan);
  __builtin_free(memory);
  return !out_of_memory;
}

template <class T, class Data, class P>
bool forward_as(const Forward& call) {
  const Cut cut(call.common.N, VectorOf<T>::panel);
  return run_forward(call, cut, P::y_size(cut.rows_in_block, call.common.units.D), sizeof(T), forward_task<T, Data, P>,
                     forward_sum<T, Data, P>);
}

}  // namespace
