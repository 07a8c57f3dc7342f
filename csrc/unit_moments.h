// total[r] = sum_n (l[n,r] - shift[r]),  moment[r] = sum_n (l[n,r] - shift[r])(l[n,r] - shift[r])^T,  l = (scale*z, scale, scale*mean)
// Included by each instruction set's file after tile.h and spectral_reweight.h.
//
// Rows of l get a last coordinate that is always 1: its column of the product is the total. Tiles on and above the diagonal
// are computed, summed up in the data's precision over SUM_ROWS rows, then added to float64.

namespace {

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

// l [rows, width] from coordinate `first` on, less `shift` [width]; what lies past the last coordinate is left alone.
template <class T, class In>
void fill_lines(const Moments& x, int64_t r, int64_t first_row, int64_t rows, int64_t first, int64_t width,
                const T* shift, T* l) {
  const int64_t from_z = most(0, x.C - first);
  for (int64_t n = 0; n < rows; ++n, l += width) {
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
    const T last[3] = {s, s * m, 1};
    for (int64_t i = from_z; first + i < x.C + 3; ++i) l[i] = last[first + i - x.C] - shift[i];
  }
}

template <class T, class In>
void moments_task(const void* context, int64_t index) {
  constexpr int64_t lanes = VectorOf<T>::lanes, panel = VectorOf<T>::panel;
  const MomentPlan& plan = *static_cast<const MomentPlan*>(context);
  const Moments& x = *plan.call;
  const int64_t range = index % plan.ranges, r = index / plan.ranges % x.R, row_group = index / plan.ranges / x.R;
  const int64_t size = x.C + 2, first = range * RANGE, height = least(RANGE, size - first);
  const int64_t width = round_up(size + 1 - first, lanes);

  T *l, *sum, *shift;
  const auto lay_out = [&](Arena& arena) {
    l = arena.take<T>(LINE_ROWS * width);
    sum = arena.take<T>(height * width);
    shift = arena.take<T>(width);
  };
  Arena counted(nullptr);
  lay_out(counted);
  Arena arena(scratch(counted.used));
  if (arena.memory == nullptr) return __atomic_store_n(plan.out_of_memory, 1, __ATOMIC_RELAXED);
  lay_out(arena);

  memset(l, 0, LINE_ROWS * width * sizeof(T));
  for (int64_t i = 0; i < width; ++i) shift[i] = first + i < size ? static_cast<T>(x.shift[r * size + first + i]) : 0;

  double* out = plan.partial + ((row_group * x.R + r) * size + first) * (size + 1) + first;
  for (int64_t i = 0; i < height; ++i)
    for (int64_t j = i; j < size + 1 - first; ++j) out[i * (size + 1) + j] = 0;
  const int64_t steps = divide_up(x.N, SUM_ROWS);
  const int64_t low = steps * row_group / plan.row_groups * SUM_ROWS;
  const int64_t high = least(x.N, steps * (row_group + 1) / plan.row_groups * SUM_ROWS);
  Ahead nothing{nullptr, nullptr, 0};
  for (int64_t start = low; start < high; start += SUM_ROWS) {
    const int64_t stop = least(high, start + SUM_ROWS);
    for (int64_t row = start; row < stop; row += LINE_ROWS) {
      const int64_t rows = least(LINE_ROWS, stop - row);
      fill_lines<T, In>(x, r, row, rows, first, width, shift, l);
      for (int64_t j = 0; j < width; j += panel) {
        const int64_t across = least(panel, width - j);
        Product<T> p{};
        p.panels = 1;
        p.k = rows;
        p.a = l;
        p.a_stride = width;
        p.b = l + j;
        p.b_stride = width;
        p.out = sum + j;
        p.out_stride = width;
        p.add = row > start;
        column_of_tiles<T, ROWS_TOGETHER>(least(height, j + across), across / lanes, p, nothing);
      }
    }
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = i; j < size + 1 - first; ++j) out[i * (size + 1) + j] += sum[i * width + j];
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
  MomentPlan plan{&call, divide_up(call.C + 2, RANGE), 1, nullptr, &out_of_memory};
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
