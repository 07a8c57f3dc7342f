// total[r] = sum_n (l[n,r] - shift[r]),  moment[r] = sum_n (l[n,r] - shift[r])(l[n,r] - shift[r])^T,  l = (scale*z, scale, scale*mean)
// Included by each instruction set's file after tile.h and spectral_reweight.h.
//
// A task holds some rows of l: the coordinates of z, padded to whole vectors, and behind them EXTRAS: scale, scale*mean and
// a 1, whose products with the others are the total. Columns of the product are coordinates of z alone, so no vector is
// spent on three extras; their products with one another are sums of a few numbers. Only tiles on and above the diagonal
// are computed. Sums are kept in the data's precision over SUM_ROWS rows, then added to float64.
//
// A task takes several neighbouring units at once, as many as its caches hold: a row of one head is 256 bytes of a row of
// z that may be 100 kB long, and memory gives such pieces slowly. What the next rows need is asked for between the tiles of
// these. How many units go together changes no sum.

namespace {

constexpr int64_t EXTRAS = 3;
template <class T>
constexpr int64_t room_for_extras = (EXTRAS + VectorOf<T>::lanes - 1) / VectorOf<T>::lanes * VectorOf<T>::lanes;
constexpr int64_t LINE_ROWS = 64;   // rows of l held at a time
constexpr int64_t SUM_ROWS = 512;   // rows summed up before the float64 merge
constexpr int64_t RANGE = 192;      // first coordinates of the product to a task
constexpr int64_t MOMENT_TASKS = 16;
constexpr int64_t TASK_BYTES = 400 * 1024;  // of lines and sums of the units of a task: in the second cache of a core

// Where the sums of one unit go: row i of its moment, and its total.
struct SumRows {
  double* moment;
  int64_t stride;
  double* total;
  int64_t total_stride;
};

struct MomentPlan {
  const Moments* call;
  int64_t ranges, row_groups, unit_groups;
  double* partial;  // [row groups, R, C+2, C+3], the total behind each row; null with one row group
  int* out_of_memory;

  SumRows rows_of(int64_t row_group, int64_t r) const {
    const int64_t size = call->C + 2;
    if (!partial) return {call->moment + r * size * size, size, call->total + r * size, 1};
    double* own = partial + (row_group * call->R + r) * size * (size + 1);
    return {own, size + 1, own + size, size + 1};
  }
};

// The pieces of z that the next lines are made of: each tile asks for one of them, until all are asked for.
struct NextRows {
  const char* row;  // null where there are none
  int64_t stride, bytes, tiles, tile;

  template <class T>
  ALWAYS_INLINE void ask(Product<T>& p) {
    const int64_t n = tile * LINE_ROWS / tiles;
    const bool another = row && (tile == 0 || n != (tile - 1) * LINE_ROWS / tiles);
    ++tile;
    p.ahead = another ? row + n * stride : reinterpret_cast<const char*>(p.b);
    p.ahead_step = another ? divide_up(bytes, p.k) : 0;
  }
};

// One row of l from coordinate `first` on, less `shift`; what lies between z and the extras is left alone.
template <class T, class In>
ALWAYS_INLINE void fill_line(const In* z, int64_t stride, int64_t count, T s, T m, const T* shift, int64_t width, T* l) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) l[i] = s * read<T>(z + i) - shift[i];
  } else {
    for (int64_t i = 0; i < count; ++i) l[i] = s * read<T>(z + i * stride) - shift[i];
  }
  l[width] = s - shift[width];
  l[width + 1] = s * m - shift[width + 1];
  l[width + 2] = 1;
}

// sum [height, width] (+)= l[:, from..]^T l[:, columns]: tiles of one height, as nearly as can be.
template <class T>
ALWAYS_INLINE void rows_of_product(const T* l, int64_t stride, int64_t rows, int64_t from, int64_t height, int64_t column,
                                   int64_t vectors, T* sum, int64_t width, bool add, NextRows& next) {
  const int64_t tiles = divide_up(height, TILE_M);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t low = height * i / tiles, high = height * (i + 1) / tiles;
    Product<T> p{};
    p.panels = 1;
    p.k = rows;
    p.a = l + from + low;
    p.a_stride = stride;
    p.b = l + column;
    p.b_stride = stride;
    p.out = sum + (from + low) * width + column;
    p.out_stride = width;
    p.add = add;
    next.ask(p);
    any_tile<T, ROWS_TOGETHER>(high - low, vectors, p);
  }
}

// sum [height + ..., width] (+)= the products of one unit's lines, on and above the diagonal.
template <class T>
void unit_product(const T* l, int64_t stride, int64_t rows, int64_t height, int64_t width, T* sum, bool add,
                  NextRows& next) {
  constexpr int64_t lanes = VectorOf<T>::lanes, panel = VectorOf<T>::panel;
  for (int64_t j = 0; j < width; j += panel) {
    const int64_t vectors = least(panel, width - j) / lanes;
    rows_of_product(l, stride, rows, 0, least(height, j + lanes), j, vectors, sum, width, add, next);
    for (int64_t v = 1; v < vectors && j + v * lanes < height; ++v)  // on the diagonal fewer vectors a row
      rows_of_product(l, stride, rows, j + v * lanes, least(lanes, height - j - v * lanes), j + v * lanes, vectors - v,
                      sum, width, add, next);
    if (j < height) rows_of_product(l, stride, rows, width, EXTRAS, j, vectors, sum, width, add, next);
  }
}

// How many tiles unit_product has.
template <class T>
int64_t tiles_of_unit(int64_t height, int64_t width) {
  constexpr int64_t lanes = VectorOf<T>::lanes, panel = VectorOf<T>::panel;
  int64_t tiles = 0;
  for (int64_t j = 0; j < width; j += panel) {
    tiles += divide_up(least(height, j + lanes), TILE_M) + (j < height);
    for (int64_t first = j + lanes; first < least(height, j + panel); first += lanes)
      tiles += divide_up(least(lanes, height - first), TILE_M);
  }
  return tiles;
}

ALWAYS_INLINE double added(bool add, double before, double more) { return add ? before + more : more; }

// Adds (or takes over) what SUM_ROWS rows gave one unit: rows first ... first + height, and those of the extras.
template <class T>
void add_sums(const SumRows& to, int64_t first, int64_t here, int64_t height, int64_t width, const T* sum, const T* extras,
              bool add) {
  for (int64_t i = 0; i < height; ++i) {
    double* row = to.moment + (first + i) * to.stride + first;
    const T* from = sum + i * width;
    if (add) for (int64_t j = i; j < here; ++j) row[j] += from[j];
    else for (int64_t j = i; j < here; ++j) row[j] = from[j];
    for (int64_t e = 0; e < 2; ++e) row[here + e] = added(add, row[here + e], sum[(width + e) * width + i]);
    double& total = to.total[(first + i) * to.total_stride];
    total = added(add, total, sum[(width + 2) * width + i]);
  }
  for (int64_t i = 0; extras && i < 2; ++i) {
    double* row = to.moment + (here + i) * to.stride + here;
    for (int64_t j = i; j < 2; ++j) row[j] = added(add, row[j], extras[i * EXTRAS + j]);
    double& total = to.total[(here + i) * to.total_stride];
    total = added(add, total, extras[i * EXTRAS + 2]);
  }
}

template <class T, class In>
void moments_task(const void* context, int64_t index) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  const MomentPlan& plan = *static_cast<const MomentPlan*>(context);
  const Moments& x = *plan.call;
  const int64_t range = index % plan.ranges, group = index / plan.ranges % plan.unit_groups;
  const int64_t row_group = index / plan.ranges / plan.unit_groups;
  const int64_t first_unit = x.R * group / plan.unit_groups, units = x.R * (group + 1) / plan.unit_groups - first_unit;
  const int64_t size = x.C + 2, first = range * RANGE, here = x.C - first;  // coordinates of z from the first on
  const int64_t height = least(RANGE, here), width = round_up(here, lanes), stride = width + room_for_extras<T>;
  const int64_t line_size = LINE_ROWS * stride, sum_size = (width + EXTRAS) * width;

  T *l, *sum, *shift, *extras;
  const auto lay_out = [&](Arena& arena) {
    l = arena.take<T>(line_size);
    sum = arena.take<T>(units * sum_size);  // rows of coordinates past `height` stay unused
    shift = arena.take<T>(units * stride);
    extras = arena.take<T>(units * 2 * EXTRAS);  // the extras' products with one another
  };
  Arena counted(nullptr);
  lay_out(counted);
  Arena arena(scratch(counted.used));
  if (arena.memory == nullptr) return __atomic_store_n(plan.out_of_memory, 1, __ATOMIC_RELAXED);
  lay_out(arena);

  const In* z = static_cast<const In*>(x.z.data) + first_unit * x.z.stride[1] + first * x.z.stride[2];
  if (here < width) memset(l, 0, line_size * sizeof(T));  // columns that are multiplied and never filled
  for (int64_t u = 0; u < units; ++u) {
    const double* from = x.shift + (first_unit + u) * size;
    T* to = shift + u * stride;
    for (int64_t i = 0; i < here; ++i) to[i] = static_cast<T>(from[first + i]);
    for (int64_t e = 0; e < 2; ++e) to[width + e] = static_cast<T>(from[x.C + e]);
  }

  const bool together = x.z.stride[2] == 1 && (units == 1 || x.z.stride[1] == x.C);
  NextRows next{};
  next.stride = x.z.stride[0] * static_cast<int64_t>(sizeof(In));
  next.bytes = ((units - 1) * x.C + here) * static_cast<int64_t>(sizeof(In));
  next.tiles = most(1, units * tiles_of_unit<T>(height, width));

  const int64_t steps = divide_up(x.N, SUM_ROWS);
  const int64_t low = steps * row_group / plan.row_groups * SUM_ROWS;
  const int64_t high = least(x.N, steps * (row_group + 1) / plan.row_groups * SUM_ROWS);
  for (int64_t start = low; start < high; start += SUM_ROWS) {
    const int64_t stop = least(high, start + SUM_ROWS);
    for (int64_t row = start; row < stop; row += LINE_ROWS) {
      const int64_t rows = least(LINE_ROWS, stop - row);
      next.tile = 0;
      next.row = together && row + rows < high ? reinterpret_cast<const char*>(z + (row + rows) * x.z.stride[0]) : nullptr;
      for (int64_t u = 0; u < units; ++u) {
        for (int64_t n = 0; n < rows; ++n)
          fill_line<T, In>(z + (row + n) * x.z.stride[0] + u * x.z.stride[1], x.z.stride[2], here,
                           x.scale ? static_cast<const T*>(x.scale)[row + n] : 1,
                           x.mean ? static_cast<const T*>(x.mean)[row + n] : 0, shift + u * stride, width, l + n * stride);
        unit_product(l, stride, rows, height, width, sum + u * sum_size, row > start, next);
        if (range > 0) continue;
        T* few = extras + u * 2 * EXTRAS;
        if (row == start) memset(few, 0, 2 * EXTRAS * sizeof(T));
        for (const T* e = l + width; e < l + rows * stride; e += stride)
          for (int i = 0; i < 2; ++i)
            for (int j = i; j < EXTRAS; ++j) few[i * EXTRAS + j] += e[i] * e[j];
      }
    }
    for (int64_t u = 0; u < units; ++u)
      add_sums<T>(plan.rows_of(row_group, first_unit + u), first, here, height, width, sum + u * sum_size,
                  range == 0 ? extras + u * 2 * EXTRAS : nullptr, start > low);
  }
  if (plan.partial) return;
  for (int64_t u = 0; u < units; ++u) {
    double* moment = x.moment + (first_unit + u) * size * size;
    for (int64_t i = first; i < (range + 1 < plan.ranges ? first + height : size); ++i)
      for (int64_t j = i + 1; j < size; ++j) moment[j * size + i] = moment[i * size + j];
  }
}

template <class T>
void moments_merge(const void* context, int64_t r) {
  const MomentPlan& plan = *static_cast<const MomentPlan*>(context);
  const Moments& x = *plan.call;
  const int64_t size = x.C + 2, group = x.R * size * (size + 1);
  double* moment = x.moment + r * size * size;
  for (int64_t i = 0; i < size; ++i) {
    const double* from = plan.partial + (r * size + i) * (size + 1);
    for (int64_t j = i; j <= size; ++j) {
      double sum = 0;
      for (int64_t g = 0; g < plan.row_groups; ++g) sum += from[g * group + j];
      if (j == size) {
        x.total[r * size + i] = sum;
      } else {
        moment[i * size + j] = sum;
        moment[j * size + i] = sum;
      }
    }
  }
}

template <class T, class In>
bool moments_as(const Moments& call) {
  int out_of_memory = 0;
  MomentPlan plan{&call, most(1, divide_up(call.C, RANGE)), 1, 1, nullptr, &out_of_memory};
  if (call.R == 0) return true;
  const int64_t jobs = plan.ranges * call.R, size = call.C + 2;
  if (call.N == 0) {
    memset(call.total, 0, call.R * size * sizeof(double));
    memset(call.moment, 0, call.R * size * size * sizeof(double));
    return true;
  }
  plan.row_groups = most(1, least(divide_up(MOMENT_TASKS, jobs), divide_up(call.N, SUM_ROWS)));
  const int64_t width = round_up(call.C, VectorOf<T>::lanes);
  const int64_t bytes = ((width + EXTRAS) * width + LINE_ROWS * width) * sizeof(T);
  const int64_t units = most(1, least(TASK_BYTES / most(1, bytes), jobs * plan.row_groups / (4 * most(1, call.threads))));
  plan.unit_groups = divide_up(call.R, units);
  if (plan.row_groups > 1) {
    plan.partial =
        static_cast<double*>(__builtin_malloc(plan.row_groups * call.R * size * (size + 1) * sizeof(double)));
    if (plan.partial == nullptr) return false;
  }
  parallel_for(plan.ranges * plan.unit_groups * plan.row_groups, call.threads, moments_task<T, In>, &plan);
  if (plan.partial && !out_of_memory) parallel_for(call.R, call.threads, moments_merge<T>, &plan);
  __builtin_free(plan.partial);
  return !out_of_memory;
}

bool moments(const Moments& call) {
  switch (call.dtype) {
    case FLOAT64: return moments_as<double, double>(call);
    case BFLOAT16: return moments_as<float, Bfloat16>(call);
    default: return moments_as<float, float>(call);
  }
}

}  // namespace
