// The two large products on vectors (amx.cpp has them on tiles), and forward and backward of an instruction set that
// computes everything so. Included after spectral_reweight.h.

namespace {

constexpr int64_t DEPTH = 128;  // dimensions summed up in registers before t goes back to cache

template <class T>
struct OnVectors {
  static constexpr int64_t lanes = VectorOf<T>::lanes, panel = VectorOf<T>::panel;
  static constexpr int64_t component_step = 1;  // c and t have room for a multiple of so many components
  static constexpr int64_t component_room = 0;  // and c for so many behind it

  static void begin() {}
  static void end() {}
  static int64_t spare_size(int64_t, int64_t) { return 0; }
  static int64_t z_size(int64_t padded_rows, int64_t width) { return padded_rows * width; }
  static int64_t y_size(int64_t rows, int64_t dims) { return rows * round_up(dims, lanes); }
  static int64_t dy_size(int64_t padded_rows, int64_t dims) { return padded_rows * dims; }

  // c [components of the block, rows] := z . proj for every unit of the block.
  template <class In>
  static void read_components(const Reweight& x, const Rows<T>& rows, const int64_t* block, T* packed_z, T* c) {
    const Units& units = x.units;
    const int64_t proj_stride = round_up(units.C, lanes);
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
        // Other columns read proj again; after them comes the next unit's.
        const int64_t bytes = n == 0 ? (high - low) * proj_stride * sizeof(T) : 0;
        column_of_tiles<T, COLUMNS_TOGETHER>(high - low, width / lanes, p, p.a + (high - low) * proj_stride, bytes);
      }
    }
  }

  // y (+)= sum_j a[j, rows] * basis[j]
  static void write_components(const Units& units, const Rows<T>& rows, const int64_t* block, const T* a, void*, T* y,
                               bool add) {
    const int64_t components = block[LAST] - block[FIRST], dims = round_up(units.D, lanes);
    const T* basis = static_cast<const T*>(units.basis) + block[FIRST] * dims;
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
      column_of_tiles<T, ROWS_TOGETHER>(rows.count, width / lanes, p, p.b + components * width, bytes);
    }
  }

  // Writes rows `low` to `high` of y [rows, D] from panels [rows, width of the panel], summed over `groups` of them in order.
  template <class Out>
  static void write_rows(const T* from, int64_t groups, int64_t group_stride, int64_t rows, int64_t low, int64_t high,
                         int64_t dims, Out* y) {
    const int64_t padded = round_up(dims, lanes);
    T line[VectorOf<T>::panel];
    for (int64_t n = low; n < high; ++n) {
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
    for (int64_t d = 0; d < units.D;) {
      // As many whole panels as DEPTH holds, or the last, narrower one.
      const int64_t whole = least(DEPTH / panel, (units.D - d) / panel);
      const int64_t panels = most(1, whole), depth = whole ? whole * panel : units.D - d;
      const int64_t width = whole ? panel : round_up(units.D - d, lanes);
      const int64_t bytes = components * panels * width * sizeof(T);
      const char* next = reinterpret_cast<const char*>(basis + components * d) + bytes;
      const int64_t share = divide_up(bytes, divide_up(rows.padded, panel));
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
        column_of_tiles<T, COLUMNS_TOGETHER>(components, across / lanes, p, next + n / panel * share, share);
      }
      d += depth;
    }
  }
};

bool forward(const Forward& call) {
  switch (call.common.dtype) {
    case FLOAT64: return forward_as<double, double, OnVectors<double>>(call);
    case BFLOAT16: return forward_as<float, Bfloat16, OnVectors<float>>(call);
    default: return forward_as<float, float, OnVectors<float>>(call);
  }
}

bool backward(const Backward& call) {
  switch (call.common.dtype) {
    case FLOAT64: return backward_as<double, double, OnVectors<double>>(call);
    case BFLOAT16: return backward_as<float, Bfloat16, OnVectors<float>>(call);
    default: return backward_as<float, float, OnVectors<float>>(call);
  }
}

}  // namespace
