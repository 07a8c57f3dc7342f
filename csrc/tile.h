// out[m][n] (+)= sum_k a[m,k] * b[k,n] on a tile that lives in registers, and the loads and stores around it.
//
// Included once by each instruction set's file, after these are defined:
//   VECTOR_BYTES  length of a vector register
//   TILE_M        rows of a full tile
//   TILE_V        vectors in a row of a full tile
// Everything here is internal to that file, and nothing here may come from the C++ library: an inline function of it that
// was compiled for AVX-512 could be the copy that the linker keeps for everyone.
#include <stdint.h>
#include <string.h>

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace {

template <class T>
struct VectorOf {
  typedef T Type __attribute__((vector_size(VECTOR_BYTES), may_alias));
  static constexpr int64_t lanes = VECTOR_BYTES / sizeof(T);
  static constexpr int64_t panel = TILE_V * lanes;  // columns of a full tile
};

template <class T>
using Vector = typename VectorOf<T>::Type;

// Memory that is ours is 64-byte aligned in rows of whole vectors or not aligned at all (proj): unaligned loads cost the same.
template <class T>
ALWAYS_INLINE Vector<T> load(const T* from) {
  Vector<T> v;
  memcpy(&v, from, VECTOR_BYTES);
  return v;
}

template <class T>
ALWAYS_INLINE void store(T* to, Vector<T> v) {
  memcpy(to, &v, VECTOR_BYTES);
}

template <class T>
ALWAYS_INLINE T sum_lanes(Vector<T> v) {
  T total = 0;
  for (int64_t i = 0; i < VectorOf<T>::lanes; ++i) total += v[i];
  return total;
}

ALWAYS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
ALWAYS_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
ALWAYS_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
ALWAYS_INLINE int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// --- elements of the user's arrays: any alignment, converted on the way -------------------------------------------------

struct Bfloat16 {
  uint16_t bits;
};

template <class T>
ALWAYS_INLINE T read(const float* p) {
  float x;
  memcpy(&x, p, sizeof x);
  return static_cast<T>(x);
}
template <class T>
ALWAYS_INLINE T read(const double* p) {
  double x;
  memcpy(&x, p, sizeof x);
  return static_cast<T>(x);
}
template <class T>
ALWAYS_INLINE T read(const Bfloat16* p) {
  uint16_t half;
  memcpy(&half, p, sizeof half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return static_cast<T>(x);
}

ALWAYS_INLINE void write(float* p, float x) { memcpy(p, &x, sizeof x); }
ALWAYS_INLINE void write(double* p, double x) { memcpy(p, &x, sizeof x); }
ALWAYS_INLINE void write(Bfloat16* p, float x) {  // to nearest, ties to even; a NaN stays one
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint16_t half = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
  memcpy(p, &half, sizeof half);
}

// --- the tile ----------------------------------------------------------------------------------------------------------

// How a is laid out: next to each other lie its rows (a[m,k] = a[k*a_stride + m]) or its columns (a[m*a_stride + k]).
enum Side { ROWS_TOGETHER, COLUMNS_TOGETHER };

// k runs over `panels` stretches of `k` each; between stretches a moves by a_panel, b goes on.
template <class T>
struct Product {
  int64_t panels, k;
  const T* a;
  int64_t a_stride, a_panel;
  const T* b;
  int64_t b_stride;
  T* out;
  int64_t out_stride;
  bool add;
  const char* ahead;   // memory that is read after this product, asked for on the way
  int64_t ahead_step;  // bytes for each k
};

template <class T, Side SIDE, int M, int V>
void tile(const Product<T>& p) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  Vector<T> acc[M][V];  // [M, V * lanes]
  UNROLL for (int m = 0; m < M; ++m)
    UNROLL for (int v = 0; v < V; ++v) acc[m][v] = Vector<T>{};
  const T* b = p.b;
  const char* ahead = p.ahead;
  const int64_t a_stride = p.a_stride, b_stride = p.b_stride, ahead_step = p.ahead_step;
  for (int64_t panel = 0; panel < p.panels; ++panel) {
    const T* a = p.a + panel * p.a_panel;
    for (int64_t k = p.k; k > 0; --k) {
      Vector<T> row[V];
      UNROLL for (int v = 0; v < V; ++v) row[v] = load(b + v * lanes);
      UNROLL for (int m = 0; m < M; ++m) {
        const T x = SIDE == ROWS_TOGETHER ? a[m] : a[m * a_stride];
        UNROLL for (int v = 0; v < V; ++v) acc[m][v] += x * row[v];
      }
      __builtin_prefetch(ahead, 0, 2);
      ahead += ahead_step;
      a += SIDE == ROWS_TOGETHER ? a_stride : 1;
      b += b_stride;
    }
  }
  T* out = p.out;
  UNROLL for (int m = 0; m < M; ++m) {
    UNROLL for (int v = 0; v < V; ++v) {
      Vector<T> x = acc[m][v];
      if (p.add) x += load(out + v * lanes);
      store(out + v * lanes, x);
    }
    out += p.out_stride;
  }
}

template <class T, Side SIDE, int M>
ALWAYS_INLINE void tile_of_height(int64_t vectors, const Product<T>& p) {
  if (vectors == TILE_V) return tile<T, SIDE, M, TILE_V>(p);
#if TILE_V > 2
  if (vectors == 2) return tile<T, SIDE, M, 2>(p);
#endif
  tile<T, SIDE, M, 1>(p);
}

// One tile of any height up to TILE_M and any width up to TILE_V vectors.
template <class T, Side SIDE>
ALWAYS_INLINE void any_tile(int64_t height, int64_t vectors, const Product<T>& p) {
  if (height == TILE_M) return tile_of_height<T, SIDE, TILE_M>(vectors, p);
  switch (height) {
    case 1: return tile_of_height<T, SIDE, 1>(vectors, p);
    case 2: return tile_of_height<T, SIDE, 2>(vectors, p);
    case 3: return tile_of_height<T, SIDE, 3>(vectors, p);
#if TILE_M > 4
    case 4: return tile_of_height<T, SIDE, 4>(vectors, p);
    case 5: return tile_of_height<T, SIDE, 5>(vectors, p);
#endif
#if TILE_M > 6
    case 6: return tile_of_height<T, SIDE, 6>(vectors, p);
    case 7: return tile_of_height<T, SIDE, 7>(vectors, p);
#endif
#if TILE_M > 8
    case 8: return tile_of_height<T, SIDE, 8>(vectors, p);
    case 9: return tile_of_height<T, SIDE, 9>(vectors, p);
    case 10: return tile_of_height<T, SIDE, 10>(vectors, p);
    case 11: return tile_of_height<T, SIDE, 11>(vectors, p);
    case 12: return tile_of_height<T, SIDE, 12>(vectors, p);
    case 13: return tile_of_height<T, SIDE, 13>(vectors, p);
#endif
    default: return;
  }
}

// One column of tiles: `height` rows of a against `vectors` vectors of b. `ahead` points to `bytes` that are read later:
// they are asked for a little with every k. Fetched all at once they would hold up what is read now.
template <class T, Side SIDE>
ALWAYS_INLINE void column_of_tiles(int64_t height, int64_t vectors, Product<T> p, const void* ahead, int64_t bytes) {
  const int64_t steps = p.panels * p.k;
  p.ahead = static_cast<const char*>(ahead);
  p.ahead_step = divide_up(bytes, most(1, divide_up(height, TILE_M) * steps));
  for (int64_t m = 0; m < height; m += TILE_M) {
    any_tile<T, SIDE>(least(TILE_M, height - m), vectors, p);
    p.ahead += p.ahead_step * steps;
    p.a += SIDE == ROWS_TOGETHER ? TILE_M : TILE_M * p.a_stride;
    p.out += TILE_M * p.out_stride;
  }
}

// --- packing: rows of the user's array become columns of ours --------------------------------------------------------

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define WITH_SHUFFLES 1
#endif
#endif

#ifdef WITH_SHUFFLES
// low := a0 b0 a1 b1 ... of the first halves of a and b, high: of the second ones.
template <class V, int64_t LANES>
ALWAYS_INLINE void interleave(V a, V b, V& low, V& high) {
  if constexpr (LANES == 2) {
    low = __builtin_shufflevector(a, b, 0, 2);
    high = __builtin_shufflevector(a, b, 1, 3);
  } else if constexpr (LANES == 4) {
    low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  } else if constexpr (LANES == 8) {
    low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    static_assert(LANES == 16, "a vector of another length");
    low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
}

// to[k][i] := from[i][k] on a square of whole vectors; rows of `from` and `to` lie so many numbers apart.
template <class T>
ALWAYS_INLINE void transpose_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  Vector<T> rows[lanes], mixed[lanes];
  UNROLL for (int64_t i = 0; i < lanes; ++i) rows[i] = load(from + i * from_stride);
  UNROLL for (int64_t round = 1; round < lanes; round *= 2) {
    UNROLL for (int64_t i = 0; i < lanes / 2; ++i)
      interleave<Vector<T>, lanes>(rows[i], rows[i + lanes / 2], mixed[2 * i], mixed[2 * i + 1]);
    UNROLL for (int64_t i = 0; i < lanes; ++i) rows[i] = mixed[i];
  }
  UNROLL for (int64_t i = 0; i < lanes; ++i) store<T>(to + i * to_stride, rows[i]);
}
#endif

// to: panels of rows, each [columns, width of the panel]; rows up to a whole vector are filled with zeros.
template <class T, class In>
void pack_rows(const In* from, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, T* to) {
  constexpr int64_t lanes = VectorOf<T>::lanes, panel = VectorOf<T>::panel;
  for (int64_t n = 0; n < rows; n += panel) {
    const int64_t here = least(panel, rows - n), width = least(panel, round_up(rows - n, lanes));
    const In* source = from + n * row_stride;
    if (here == panel && column_stride == 1) {
      // By way of a small square: rows that lie a power of two apart would push each other out of the cache.
      constexpr int64_t square = 64;
      T rows_here[panel][square];
      for (int64_t first = 0; first < columns; first += square) {
        const int64_t across = least(square, columns - first);
        for (int64_t i = 0; i < panel; ++i) {
          const In* row = source + i * row_stride + first;
          // What follows in a row is mostly what is packed next: the same row's next unit.
          for (int64_t c = 0; c < across; c += 64 / sizeof(In)) __builtin_prefetch(row + columns + c, 0, 2);
          for (int64_t c = 0; c < across; ++c) rows_here[i][c] = read<T>(row + c);
        }
        T* out = to + first * panel;
        int64_t c = 0;
#ifdef WITH_SHUFFLES
        constexpr int64_t lanes = VectorOf<T>::lanes;
        for (; c + lanes <= across; c += lanes)
          for (int64_t i = 0; i < panel; i += lanes)
            transpose_square<T>(rows_here[i] + c, square, out + c * panel + i, panel);
#endif
        for (; c < across; ++c)
          UNROLL for (int64_t i = 0; i < panel; ++i) out[c * panel + i] = rows_here[i][c];
      }
    } else {
      for (int64_t c = 0; c < columns; ++c) {
        for (int64_t i = 0; i < here; ++i) to[c * width + i] = read<T>(source + i * row_stride + c * column_stride);
        for (int64_t i = here; i < width; ++i) to[c * width + i] = 0;
      }
    }
    to += columns * width;
  }
}

}  // namespace
