// total[r] = sum_n (l[n,r] - shift[r]),  moment[r] = sum_n (l[n,r] - shift[r])(l[n,r] - shift[r])^T,  l = (scale*z, scale, scale*mean)
// Included by each instruction set's file after tile.h and spectral_reweight.h.
//
// A task holds some rows of l: the coordinates of z, padded to whole vectors, and behind them EXTRAS: scale, scale*mean and
// a 1, whose products with the others are the total. Columns of the product are coordinates of z alone, so no vector is
// spent on three extras; their products with one another are sums of a few numbers. Only tiles on and above the diagonal
// are computed. Sums are kept in the data's precision over SUM_ROWS rows, then added to float64.

namespace {

constexpr int64_t EXTRAS = 3;
template <class T>
constexpr int64_t room_for_extras = (EXTRAS + VectorOf<T>::lanes - 1) / VectorOf<T>::lanes * VectorOf<T>::lanes;
constexpr int64_t LINE_ROWS = 128;  // rows of l held at a time
constexpr int64_t SUM_ROWS = 512;   // rows summed up before the float64 merge
constexpr int64_t RANGE = 192;      // first coordinates of the product to a task
constexpr int64_t MOMENT_TASKS = 16;

struct MomentPlan {
  const Moments* call;
  int64_t ranges, row_groups;
  double* partial;  // [row groups, R, C+2, C+3]
  int* out_of_memory;
};

// l [rows, width + room_for_extras] from coordinate `first` on, less `shift`; what lies between is left alone.
template <class T, class In>
void fill_lines(const Moments& x, int64_t r, int64_t first_row, int64_t rows, int64_t first, int64_t width,
                const T* shift, T* l) {
  const int64_t from_z = x.C - first;
  for (int64_t n = 0; n < rows; ++n, l += width + room_for_extras<T>) {
    const In* z = static_cast<const In*>(x.z.data) + (first_row + n) * x.z.stride[0] + r * x.z.stride[1];
    const T s = x.scale ? static_cast<const T*>(x.scale)[first_row + n] : 1;
    const T m = x.mean ? static_cast<const T*>(x.mean)[first_row + n] : 0;
    if (x.z.stride[2] == 1) {
      // Rows lie too far apart for the processor to foresee the next one.
      const char* ahead = reinterpret_cast<const char*>(z + first + 16 * x.z.stride[0]);
      for (int64_t i = 0; i < from_z * static_cast<int64_t>(sizeof(In)); i += 64) __builtin_prefetch(ahead + i);
      for (int64_t i = 0; i < from_z; ++i) l[i] = s * read<T>(z + first + i) - shift[i];
    } else {
      for (int64_t i = 0; i < from_z; ++i) l[i] = s * read<T>(z + (first + i) * x.z.stride[2]) - shift[i];
    }
    l[width] = s - shift[width];
    l[width + 1] = s * m - shift[width + 1];
    l[width + 2] = 1;
  }
}

// sum [height, width] (+)= l[:, from..]^T l[:, columns]: tiles of one height, as nearly as can be.
template <class T>
ALWAYS_INLINE void rows_of_product(const T* l, int64_t stride, int64_t rows, int64_t from, int64_t height, int64_t column,
                                   int64_t vectors, T* sum, int64_t width, bool add) {
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
    p.ahead = reinterpret_cast<const char*>(p.b);
    any_tile<T, ROWS_TOGETHER>(high - low, vectors, p);
  }
}

template <class T, class In>
void moments_task(const void* context, int64_t index) {
  constexpr int64_t lanes = VectorOf<T>::lanes, panel = VectorOf<T>::panel;
  const MomentPlan& plan = *static_cast<const MomentPlan*>(context);
  const Moments& x = *plan.call;
  const int64_t range = index % plan.ranges, r = index / plan.ranges % x.R, row_group = index / plan.ranges / x.R;
  const int64_t size = x.C + 2, first = range * RANGE, here = x.C - first;  // coordinates of z from the first on
  const int64_t height = least(RANGE, here), width = round_up(here, lanes), stride = width + room_for_extras<T>;

  T *l, *sum, *shift;
  const auto lay_out = [&](Arena& arena) {
    l = arena.take<T>(LINE_ROWS * stride);
    sum = arena.take<T>((width + EXTRAS) * width);  // rows of coordinates past `height` stay unused
    shift = arena.take<T>(stride);
  };
  Arena counted(nullptr);
  lay_out(counted);
  Arena arena(scratch(counted.used));
  if (arena.memory == nullptr) return __atomic_store_n(plan.out_of_memory, 1, __ATOMIC_RELAXED);
  lay_out(arena);

  memset(l, 0, LINE_ROWS * stride * sizeof(T));
  for (int64_t i = 0; i < here; ++i) shift[i] = static_cast<T>(x.shift[r * size + first + i]);
  for (int64_t e = 0; e < 2; ++e) shift[width + e] = static_cast<T>(x.shift[r * size + x.C + e]);

  double* out = plan.partial + ((row_group * x.R + r) * size + first) * (size + 1) + first;
  double corner[2][EXTRAS] = {};
  for (int64_t i = 0; i < height; ++i)
    for (int64_t j = i; j < here + EXTRAS; ++j) out[i * (size + 1) + j] = 0;
  const int64_t steps = divide_up(x.N, SUM_ROWS);
  const int64_t low = steps * row_group / plan.row_groups * SUM_ROWS;
  const int64_t high = least(x.N, steps * (row_group + 1) / plan.row_groups * SUM_ROWS);
  for (int64_t start = low; start < high; start += SUM_ROWS) {
    const int64_t stop = least(high, start + SUM_ROWS);
    T few[2][EXTRAS] = {};
    for (int64_t row = start; row < stop; row += LINE_ROWS) {
      const int64_t rows = least(LINE_ROWS, stop - row);
      const bool add = row > start;
      fill_lines<T, In>(x, r, row, rows, first, width, shift, l);
      for (int64_t j = 0; j < width; j += panel) {
        const int64_t vectors = least(panel, width - j) / lanes;
        rows_of_product(l, stride, rows, 0, least(height, j + lanes), j, vectors, sum, width, add);
        for (int64_t v = 1; v < vectors && j + v * lanes < height; ++v)  // on the diagonal fewer vectors a row
          rows_of_product(l, stride, rows, j + v * lanes, least(lanes, height - j - v * lanes), j + v * lanes,
                          vectors - v, sum, width, add);
        if (j < height) rows_of_product(l, stride, rows, width, EXTRAS, j, vectors, sum, width, add);
      }
      if (range == 0)
        for (const T* e = l + width; e < l + rows * stride; e += stride)
          for (int i = 0; i < 2; ++i)
            for (int j = i; j < EXTRAS; ++j) few[i][j] += e[i] * e[j];
    }
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = i; j < here; ++j) out[i * (size + 1) + j] += sum[i * width + j];
      for (int64_t e = 0; e < EXTRAS; ++e) out[i * (size + 1) + here + e] += sum[(width + e) * width + i];
    }
    for (int i = 0; i < 2; ++i)
      for (int j = i; j < EXTRAS; ++j) corner[i][j] += few[i][j];
  }
  if (range == 0)
    for (int64_t i = 0; i < 2; ++i)
      for (int64_t j = i; j < EXTRAS; ++j) out[(x.C + i) * (size + 1) + x.C + j] = corner[i][j];
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
  MomentPlan plan{&call, most(1, divide_up(call.C, RANGE)), 1, nullptr, &out_of_memory};
  if (call.R == 0) return true;
  const int64_t jobs = plan.ranges * call.R, size = call.C + 2;
  plan.row_groups = most(1, least(divide_up(MOMENT_TASKS, jobs), divide_up(call.N, SUM_ROWS)));
  plan.partial = static_cast<double*>(__builtin_malloc(plan.row_groups * call.R * size * (size + 1) * sizeof(double)));
  if (plan.partial == nullptr) return false;
  parallel_for(jobs * plan.row_groups, call.threads, moments_task<T, In>, &plan);
  if (!out_of_memory) parallel_for(call.R, call.threads, moments_merge<T>, &plan);
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
