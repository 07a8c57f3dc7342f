// y[n] = sum_j weight[j] * c[n,j] * basis[j],  c[n,j] = scale[n] * (z[n,r(j)] . proj[j] + bias[j] + mean[n] * slope[j]) - offset[j]
// and its gradients, fused, or the sum alone where c is given: the coefficients of a block of rows on a block of components
// stay in cache between the two products, forward and backward. Included by each instruction set's file after tile.h.
//
// Inside, a vector runs over rows for c, t (= dy . basis) and q (= dL/dc), all [components, rows], and over dimensions
// for y and dz. The work is cut by shape alone, so results do not depend on the number of threads.
#include "kernels.h"
#include "threads.h"

namespace {

using namespace residual_kernels;

constexpr int64_t ROW_BLOCK = 96;        // rows that go through all blocks of components together
constexpr int64_t FORWARD_TASKS = 16;    // forward: few rows are spread over this many groups of components
constexpr int64_t GROUP_OF_COMPONENTS = 1024;  // backward: about this many components to a task
constexpr int64_t TASKS_AT_ONCE = 4;     // weight vectors applied to one reading of the coefficients
constexpr int64_t PACKED_DY = 8;         // as many weight vectors' dy are kept packed for a block of rows
constexpr int64_t DEPTH = 128;           // dimensions summed up in registers before t goes back to cache

// --- how the work is cut ------------------------------------------------------------------------------------------------

struct Cut {
  int64_t row_blocks, rows_in_block;

  explicit Cut(int64_t rows, int64_t panel) {
    const int64_t wanted = most(1, divide_up(rows, ROW_BLOCK));
    rows_in_block = round_up(most(1, divide_up(rows, wanted)), panel);
    row_blocks = divide_up(rows, rows_in_block);
  }
};

// First block of group `g` when the blocks are cut into `groups` groups of about equally many components. A unit that
// fills several blocks stays whole.
int64_t group_start(const Units& units, int64_t groups, int64_t g) {
  if (g >= groups) return units.blocks;
  const int64_t target = units.J * g / groups;
  int64_t low = 0, high = units.blocks;  // the first block that starts at or after target
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (units.block[BLOCK_FIELDS * middle + FIRST] < target) low = middle + 1; else high = middle;
  }
  while (low > 0 && low < units.blocks && units.block[BLOCK_FIELDS * low + FIRST_UNIT] <
                                              units.block[BLOCK_FIELDS * (low - 1) + LAST_UNIT]) ++low;
  return g == 0 ? 0 : low;
}

int64_t largest_block(const Units& units) {
  int64_t largest = 1;
  for (int64_t b = 0; b < units.blocks; ++b) largest = most(largest, units.block[BLOCK_FIELDS * b + LAST] - units.block[BLOCK_FIELDS * b + FIRST]);
  return largest;
}

// Scratch memory handed out in 64-byte steps; first counted, then taken.
struct Arena {
  char* memory;
  size_t used = 0;

  explicit Arena(void* from) : memory(static_cast<char*>(from)) {}
  template <class T>
  T* take(int64_t count) {
    T* here = reinterpret_cast<T*>(memory + used);
    used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return here;
  }
};

// --- c ------------------------------------------------------------------------------------------------------------------

template <class T>
struct Rows {  // a block of rows: scale and mean filled out to whole vectors
  int64_t first, count, padded;
  T *scale, *mean;

  void fill(const Reweight& x, int64_t start, int64_t rows) {
    first = start;
    count = rows;
    padded = round_up(rows, VectorOf<T>::lanes);
    for (int64_t n = 0; n < padded; ++n) {
      const bool real = n < rows;
      scale[n] = !real ? 0 : x.scale ? static_cast<const T*>(x.scale)[start + n] : 1;
      mean[n] = !real || !x.mean ? 0 : static_cast<const T*>(x.mean)[start + n];
    }
  }
};

// c [components of the block, rows] := z . proj for every unit of the block.
template <class T, class In>
void read_components(const Reweight& x, const Rows<T>& rows, const int64_t* block, T* packed_z, T* c) {
  constexpr int64_t lanes = VectorOf<T>::lanes, panel = VectorOf<T>::panel;
  const Units& units = x.units;
  const int64_t proj_stride = round_up(units.C, lanes);
  Ahead nothing{nullptr, nullptr, 0};
  for (int64_t r = block[FIRST_UNIT]; r < block[LAST_UNIT]; ++r) {
    const int64_t low = most(units.offsets[r], block[FIRST]), high = least(units.offsets[r + 1], block[LAST]);
    if (low >= high) continue;
    const In* z = static_cast<const In*>(x.z.data) + rows.first * x.z.stride[0] + r * x.z.stride[1];
    pack_rows<T, In>(z, x.z.stride[0], x.z.stride[2], rows.count, units.C, packed_z);
    for (int64_t n = 0; n < rows.padded; n += panel) {
      const int64_t width = least(panel, rows.padded - n);
      Product<T> p{};
      p.panels = 1;
      p.k = units.C;
      p.a = static_cast<const T*>(units.proj) + low * proj_stride;
      p.a_stride = proj_stride;
      p.b = packed_z + n * units.C;
      p.b_stride = width;
      p.out = c + (low - block[FIRST]) * rows.padded + n;
      p.out_stride = rows.padded;
      column_of_tiles<T, COLUMNS_TOGETHER>(high - low, width / lanes, p, nothing);
    }
  }
}

// c [components of the block, rows] := the coefficients given, times weight; weight null: 1.
template <class T>
void take_components(const Reweight& x, const Rows<T>& rows, const int64_t* block, const T* weight, T* c) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  for (int64_t n = 0; n < rows.padded; n += lanes) {
    const T* from = static_cast<const T*>(x.c) + (rows.first + n) * x.c_stride[0];
    const int64_t here = least(lanes, rows.count - n);
    for (int64_t j = block[FIRST]; j < block[LAST]; ++j) {
      const T w = weight ? weight[j] : 1;
      T* to = c + (j - block[FIRST]) * rows.padded + n;
      for (int64_t i = 0; i < here; ++i) to[i] = from[i * x.c_stride[0] + j * x.c_stride[1]] * w;
      for (int64_t i = here; i < lanes; ++i) to[i] = 0;
    }
  }
}

// c := (scale * (c + bias + mean * slope) - offset) * weight; weight null: 1.
template <class T>
void finish_components(const Units& units, const Rows<T>& rows, const int64_t* block, const T* weight, T* c) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  for (int64_t j = block[FIRST]; j < block[LAST]; ++j) {
    const T bias = static_cast<const T*>(units.bias)[j], slope = static_cast<const T*>(units.slope)[j];
    const T offset = static_cast<const T*>(units.offset)[j], w = weight ? weight[j] : 1;
    for (int64_t n = 0; n < rows.padded; n += lanes, c += lanes) {
      const Vector<T> inner = load(c) + bias + load(rows.mean + n) * slope;
      store<T>(c, (load(rows.scale + n) * inner - offset) * w);
    }
  }
}

// by_row [components of the block, rows] := weight[weight_index[n], j].
template <class T>
void gather_weights(const Reweight& x, const Rows<T>& rows, const int64_t* block, T* by_row) {
  for (int64_t n = 0; n < rows.padded; ++n) {
    if (n >= rows.count) {
      for (int64_t j = block[FIRST]; j < block[LAST]; ++j) by_row[(j - block[FIRST]) * rows.padded + n] = 0;
      continue;
    }
    const T* weight = static_cast<const T*>(x.weight) + x.weight_index[rows.first + n] * x.units.J;
    for (int64_t j = block[FIRST]; j < block[LAST]; ++j) by_row[(j - block[FIRST]) * rows.padded + n] = weight[j];
  }
}

// --- the two large products, on vectors; amx.cpp has them on tiles --------------------------------------------------------

template <class T>
struct OnVectors {
  static constexpr int64_t lanes = VectorOf<T>::lanes, panel = VectorOf<T>::panel;
  static constexpr int64_t component_step = 1;  // c and t have room for a multiple of so many components
  static constexpr int64_t smallest_groups = 8;  // backward: at least so many groups of components

  static void begin() {}
  static void end() {}
  static int64_t spare_size(int64_t, int64_t) { return 0; }
  static int64_t y_size(int64_t rows, int64_t dims) { return rows * round_up(dims, lanes); }
  static int64_t dy_size(int64_t padded_rows, int64_t dims) { return padded_rows * dims; }

  // y (+)= sum_j a[j, rows] * basis[j]
  static void write_components(const Units& units, const Rows<T>& rows, const int64_t* block, const T* a, void*, T* y,
                               bool add) {
    const int64_t components = block[LAST] - block[FIRST], dims = round_up(units.D, lanes);
    const T* basis = static_cast<const T*>(units.basis) + block[FIRST] * dims;
    const char* basis_end = reinterpret_cast<const char*>(static_cast<const T*>(units.basis) + units.J * dims);
    for (int64_t d = 0; d < dims; d += panel) {
      const int64_t width = least(panel, dims - d), bytes = components * width * sizeof(T);
      Product<T> p{};
      p.panels = 1;
      p.k = components;
      p.a = a;
      p.a_stride = rows.padded;
      p.b = basis + components * d;
      p.b_stride = width;
      p.out = y + rows.count * d;
      p.out_stride = width;
      p.add = add;
      Ahead next{reinterpret_cast<const char*>(p.b) + bytes, basis_end, 0};
      next.step = round_up(bytes / divide_up(rows.count, TILE_M), 64);
      column_of_tiles<T, ROWS_TOGETHER>(rows.count, width / lanes, p, next);
    }
  }

  // Writes y [rows, D] from panels [rows, width of the panel], summed over `groups` of them in order.
  template <class Out>
  static void write_rows(const T* from, int64_t groups, int64_t group_stride, int64_t rows, int64_t dims, Out* y) {
    const int64_t padded = round_up(dims, lanes);
    T line[VectorOf<T>::panel];
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t d = 0; d < dims; d += panel) {
        const int64_t width = least(panel, padded - d);
        const T* source = from + rows * d + n * width;
        for (int64_t i = 0; i < width; i += lanes) {
          Vector<T> sum = load(source + i);
          for (int64_t g = 1; g < groups; ++g) sum += load(source + g * group_stride + i);
          store<T>(line + i, sum);
        }
        const int64_t real = least(width, dims - d);
        for (int64_t i = 0; i < real; ++i) write(y + n * dims + d + i, line[i]);
      }
    }
  }

  template <class Data>
  static void pack_dy(const Data* dy, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t dims, T* to) {
    pack_rows<T, Data>(dy, row_stride, column_stride, rows, dims, to);
  }

  // t [components of the block, rows] := basis . dy
  static void read_gradient(const Units& units, const Rows<T>& rows, const int64_t* block, const T* packed_dy, T* t) {
    const int64_t dims = round_up(units.D, lanes), components = block[LAST] - block[FIRST];
    if (components == 0) return;
    if (units.D == 0) memset(t, 0, components * rows.padded * sizeof(T));
    const T* basis = static_cast<const T*>(units.basis) + block[FIRST] * dims;
    const char* basis_end = reinterpret_cast<const char*>(static_cast<const T*>(units.basis) + units.J * dims);
    for (int64_t d = 0; d < units.D;) {
      // As many whole panels as DEPTH holds, or the last, narrower one.
      const int64_t whole = least(DEPTH / panel, (units.D - d) / panel);
      const int64_t panels = most(1, whole), depth = whole ? whole * panel : units.D - d;
      const int64_t width = whole ? panel : round_up(units.D - d, lanes);
      const int64_t bytes = components * panels * width * sizeof(T);
      Ahead next{reinterpret_cast<const char*>(basis + components * d) + bytes, basis_end, 0};
      next.step = round_up(bytes / (divide_up(components, TILE_M) * divide_up(rows.padded, panel)), 64);
      for (int64_t n = 0; n < rows.padded; n += panel) {
        const int64_t across = least(panel, rows.padded - n);
        Product<T> p{};
        p.panels = panels;
        p.k = depth / panels;
        p.a = basis + components * d;
        p.a_stride = width;
        p.a_panel = components * width;
        p.b = packed_dy + n * units.D + d * across;
        p.b_stride = across;
        p.out = t + n;
        p.out_stride = rows.padded;
        p.add = d > 0;
        column_of_tiles<T, COLUMNS_TOGETHER>(components, across / lanes, p, next);
      }
      d += depth;
    }
  }
};

// --- forward ------------------------------------------------------------------------------------------------------------

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
    packed_z = arena.take<T>(padded * units.C);
    c = arena.take<T>(padded * largest);
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
      read_components<T, Data>(x, rows, block, packed_z, c);
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
    P::template write_rows<Data>(y + t * plan.y_size, 1, 0, count, units.D, to);
  }
}

template <class T, class Data, class P>
void forward_sum(const void* context, int64_t index) {
  const ForwardPlan& plan = *static_cast<const ForwardPlan*>(context);
  const Reweight& x = plan.call->common;
  const int64_t task = index % plan.tasks(), row_block = index / plan.tasks();
  const int64_t step = task / TASKS_AT_ONCE, t = task % TASKS_AT_ONCE;
  const int64_t first_row = row_block * plan.cut.rows_in_block, count = least(plan.cut.rows_in_block, x.N - first_row);
  const T* from = static_cast<const T*>(plan.partial) +
                  (row_block * plan.task_steps + step) * plan.groups * plan.partial_size() +
                  t * plan.y_size;
  Data* to = static_cast<Data*>(plan.call->y) + (task * x.N + first_row) * x.units.D;
  P::template write_rows<Data>(from, plan.groups, plan.partial_size(), count, x.units.D, to);
}

template <class T, class Data, class P = OnVectors<T>>
bool forward_as(const Forward& call) {
  const Reweight& x = call.common;
  int out_of_memory = 0;
  ForwardPlan plan{&call, Cut(x.N, VectorOf<T>::panel), 1, 1, 0, nullptr, &out_of_memory};
  plan.y_size = P::y_size(plan.cut.rows_in_block, x.units.D);
  plan.task_steps = divide_up(plan.tasks(), TASKS_AT_ONCE);
  const int64_t jobs = plan.cut.row_blocks * plan.task_steps;
  if (jobs == 0) return true;
  // Partial sums of y stay small beside the coefficients that are never stored.
  const int64_t room = most(4, 3 * x.units.J / most(1, 4 * x.units.D));
  plan.groups = most(1, least(least(divide_up(FORWARD_TASKS, jobs), room), x.units.blocks));
  void* memory = nullptr;
  if (plan.groups > 1) {
    memory = __builtin_malloc(jobs * plan.groups * plan.partial_size() * sizeof(T));
    if (memory == nullptr) return false;
    plan.partial = memory;
  }
  parallel_for(jobs * plan.groups, x.threads, forward_task<T, Data, P>, &plan);
  if (plan.groups > 1 && !out_of_memory)
    parallel_for(plan.cut.row_blocks * plan.tasks(), x.threads, forward_sum<T, Data, P>, &plan);
  __builtin_free(memory);
  return !out_of_memory;
}

// --- backward -----------------------------------------------------------------------------------------------------------

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
  Ahead nothing{nullptr, nullptr, 0};
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
        column_of_tiles<T, ROWS_TOGETHER>(rows.count, least(panel, width - c) / lanes, p, nothing);
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
    packed_z = arena.take<T>(most_rows * units.C);
    c = arena.take<T>(want_c ? most_rows * largest : 0);
    inner = arena.take<T>(want_inner ? most_rows * largest : 0);
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
        read_components<T, Data>(x, rows, block, packed_z, raw);
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

template <class T, class Data, class P = OnVectors<T>>
bool backward_as(const Backward& call) {
  const Reweight& x = call.common;
  int out_of_memory = 0;
  BackwardPlan plan{&call, Cut(x.N, VectorOf<T>::panel), 1, 1, nullptr, nullptr, nullptr, &out_of_memory};
  plan.groups = most(1, least(P::smallest_groups * least(8, most(1, x.units.J / (8 * GROUP_OF_COMPONENTS))), x.units.blocks));
  const int64_t room = (int64_t{1} << 22) / most(1, x.T * x.units.J);  // so many partial dweight take 32 MiB
  plan.row_groups = most(1, least(least(divide_up(16, plan.groups), plan.cut.row_blocks), room));
  const int64_t weights = call.dweight ? plan.row_groups * x.T * x.units.J : 0;
  const int64_t scales = call.dscale ? plan.groups * x.N : 0, means = call.dmean ? plan.groups * x.N : 0;
  double* memory = static_cast<double*>(__builtin_malloc((weights + scales + means + 1) * sizeof(double)));
  if (memory == nullptr) return false;
  plan.dweight = memory;
  plan.dscale = memory + weights;
  plan.dmean = plan.dscale + scales;
  parallel_for(plan.groups * plan.row_groups, x.threads, backward_task<T, Data, P>, &plan);
  if (call.dweight) sum_in_order<T>(plan.dweight, plan.row_groups, x.T * x.units.J, static_cast<T*>(call.dweight));
  if (call.dscale) sum_in_order<T>(plan.dscale, plan.groups, x.N, static_cast<T*>(call.dscale));
  if (call.dmean) sum_in_order<T>(plan.dmean, plan.groups, x.N, static_cast<T*>(call.dmean));
  __builtin_free(memory);
  return !out_of_memory;
}

}  // namespace
