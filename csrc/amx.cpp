// AMX for bfloat16: the two large products on tiles of 16 x 32, everything around them on AVX-512 in float32.
//
// A tile product takes a [16, 32] of bfloat16 in rows and b [32, 16] in pairs ([16, 16, 2]: k, column, k even or odd) and adds
// to c [16, 16] of float32. The constant side is always a, packed once: per block of components (padded to 32, as D is)
// first basis^T, tiles [D/16, components/32], for the forward product y^T = basis^T (weight c), then basis, tiles
// [components/16, D/32], for the backward product t = basis dy^T. The other side becomes pairs on the way.
#define VECTOR_BYTES 64
#define TILE_M 14
#define TILE_V 2
#include "tile.h"
#include "spectral_reweight.h"
#include "unit_moments.h"

#ifdef EMULATE
namespace {

// The same instructions in plain C++, for machines without them.
thread_local unsigned char registers[8][1024];

void emulated_zero(int to) { memset(registers[to], 0, 1024); }
void emulated_load(int to, const void* from, int64_t stride) {
  for (int i = 0; i < 16; ++i) memcpy(registers[to] + 64 * i, static_cast<const char*>(from) + i * stride, 64);
}
void emulated_store(int from, void* to, int64_t stride) {
  for (int i = 0; i < 16; ++i) memcpy(static_cast<char*>(to) + i * stride, registers[from] + 64 * i, 64);
}
void emulated_product(int c, int a, int b) {
  float sum[16][16];
  Bfloat16 rows[16][32], pairs[16][16][2];
  memcpy(sum, registers[c], 1024);
  memcpy(rows, registers[a], 1024);
  memcpy(pairs, registers[b], 1024);
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 32; ++k)
      for (int n = 0; n < 16; ++n) sum[m][n] += read<float>(&rows[m][k]) * read<float>(&pairs[k / 2][n][k % 2]);
  memcpy(registers[c], sum, 1024);
}

}  // namespace
#define ZERO(to) emulated_zero(to)
#define LOAD(to, from, stride) emulated_load(to, from, stride)
#define STORE(from, to, stride) emulated_store(from, to, stride)
#define MULTIPLY(c, a, b) emulated_product(c, a, b)
#else
#include <immintrin.h>
#define ZERO(to) _tile_zero(to)
#define LOAD(to, from, stride) _tile_loadd(to, from, stride)
#define STORE(from, to, stride) _tile_stored(from, to, stride)
#define MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)
#endif

namespace {

constexpr int64_t SIDE = 16, DEPTH_OF_TILE = 32, TILE_NUMBERS = SIDE * DEPTH_OF_TILE;

// c [16 or 32, 16 or 32] (+)= a b over `steps` tiles, with two tiles of a and of b at a time where there are two.
struct TileProduct {
  int64_t steps;
  const Bfloat16 *a0, *a1;  // a1 null: one tile high
  const Bfloat16 *b0, *b1;  // b1 null: one tile wide
  float* c;
  int64_t stride;  // of c, in numbers
  bool add;

  ALWAYS_INLINE void run() const {
    __asm__ volatile("" ::: "memory");  // a tile load does not tell the compiler which memory it reads
    const int64_t bytes = stride * 4;
    float *c1 = c + SIDE, *c2 = c + SIDE * stride, *c3 = c2 + SIDE;
    if (add) LOAD(0, c, bytes); else ZERO(0);
    if (b1) { if (add) LOAD(1, c1, bytes); else ZERO(1); }
    if (a1) { if (add) LOAD(2, c2, bytes); else ZERO(2); }
    if (a1 && b1) { if (add) LOAD(3, c3, bytes); else ZERO(3); }
    if (a1 && b1) {
      for (int64_t k = 0; k < steps * TILE_NUMBERS; k += TILE_NUMBERS) {
        LOAD(4, a0 + k, 64);
        LOAD(6, b0 + k, 64);
        MULTIPLY(0, 4, 6);
        LOAD(7, b1 + k, 64);
        MULTIPLY(1, 4, 7);
        LOAD(5, a1 + k, 64);
        MULTIPLY(2, 5, 6);
        MULTIPLY(3, 5, 7);
      }
    } else {
      for (int64_t k = 0; k < steps * TILE_NUMBERS; k += TILE_NUMBERS) {
        LOAD(4, a0 + k, 64);
        LOAD(6, b0 + k, 64);
        MULTIPLY(0, 4, 6);
        if (b1) {
          LOAD(7, b1 + k, 64);
          MULTIPLY(1, 4, 7);
        }
        if (a1) {
          LOAD(5, a1 + k, 64);
          MULTIPLY(2, 5, 6);
        }
      }
    }
    STORE(0, c, bytes);
    if (b1) STORE(1, c1, bytes);
    if (a1) STORE(2, c2, bytes);
    if (a1 && b1) STORE(3, c3, bytes);
  }
};

// c [16 a_tiles, columns] (+)= a b, where a is tiles [a_tiles, steps] and b is tiles [columns/16, steps].
void multiply_tiles(const Bfloat16* a, int64_t a_tiles, const Bfloat16* b, int64_t columns, int64_t steps, float* c,
                    bool add) {
  const int64_t run = steps * TILE_NUMBERS;
  for (int64_t i = 0; i < a_tiles; i += 2) {
    for (int64_t n = 0; n < columns; n += 2 * SIDE) {
      const Bfloat16 *a0 = a + i * run, *b0 = b + n / SIDE * run;
      const TileProduct product{steps, a0, i + 1 < a_tiles ? a0 + run : nullptr,
                                b0, n + SIDE < columns ? b0 + run : nullptr,
                                c + i * SIDE * columns + n, columns, add};
      product.run();
    }
  }
}

typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES), may_alias));

ALWAYS_INLINE Words rounded_to_bfloat16(Vector<float> x) {  // to nearest, ties to even; in the low halves
  Words bits;
  memcpy(&bits, &x, sizeof bits);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;
}

struct OnTiles {
  static constexpr int64_t component_step = DEPTH_OF_TILE;
  static constexpr int64_t smallest_groups = 8;

  static int64_t padded_dims(int64_t dims) { return round_up(dims, DEPTH_OF_TILE); }

  static const Bfloat16* basis_of(const Units& units, const int64_t* block) {
    return static_cast<const Bfloat16*>(units.basis) + 2 * block[PADDED_FIRST] * padded_dims(units.D);
  }

  static void begin() {
#ifndef EMULATE
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } eight_full_tiles;
    __asm__ volatile("" : : "r"(&eight_full_tiles) : "memory");  // all of it is read, not the first word alone
    _tile_loadconfig(&eight_full_tiles);
#endif
  }

  static void end() {
#ifndef EMULATE
    _tile_release();
#endif
  }

  static int64_t spare_size(int64_t padded_rows, int64_t components) { return 2 * padded_rows * components; }
  static int64_t y_size(int64_t rows, int64_t dims) { return round_up(rows, SIDE) * padded_dims(dims); }
  static int64_t dy_size(int64_t padded_rows, int64_t dims) { return padded_rows * padded_dims(dims) / 2; }

  static void write_components(const Units& units, const Rows<float>& rows, const int64_t* block, const float* a,
                               void* spare, float* y, bool add) {
    const int64_t components = block[LAST] - block[FIRST], steps = divide_up(components, DEPTH_OF_TILE);
    uint32_t* pairs = static_cast<uint32_t*>(spare);  // tiles [rows/16, steps], each [16, 16] pairs
    for (int64_t n = 0; n < rows.padded; n += SIDE) {
      for (int64_t j = 0; j < steps * DEPTH_OF_TILE; j += 2, pairs += SIDE) {
        const float* here = a + j * rows.padded + n;
        const Vector<float> even = j < components ? load(here) : Vector<float>{};
        const Vector<float> odd = j + 1 < components ? load(here + rows.padded) : Vector<float>{};
        const Words both = rounded_to_bfloat16(even) | rounded_to_bfloat16(odd) << 16;
        memcpy(pairs, &both, sizeof both);
      }
    }
    multiply_tiles(basis_of(units, block), padded_dims(units.D) / SIDE, static_cast<const Bfloat16*>(spare), rows.padded,
                   steps, y, add);
  }

  // from: y^T [dims, rows], `groups` of them.
  template <class Out>
  static void write_rows(const float* from, int64_t groups, int64_t group_stride, int64_t rows, int64_t dims, Out* y) {
    const int64_t padded = round_up(rows, SIDE);
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t d = 0; d < dims; ++d) {
        float sum = from[d * padded + n];
        for (int64_t g = 1; g < groups; ++g) sum += from[g * group_stride + d * padded + n];
        write(y + n * dims + d, sum);
      }
    }
  }

  // to: tiles [rows/16, dims/32], each [16, 16] pairs.
  template <class Data>
  static void pack_dy(const Data* dy, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t dims, float* to) {
    uint32_t* pairs = reinterpret_cast<uint32_t*>(to);
    for (int64_t n = 0; n < rows; n += SIDE) {
      const int64_t here = least(SIDE, rows - n);
      for (int64_t d = 0; d < padded_dims(dims); d += 2, pairs += SIDE) {
        const Data* source = dy + n * row_stride + d * column_stride;
        uint32_t line[SIDE] = {};
        if (column_stride == 1 && d + 1 < dims) {
          for (int64_t i = 0; i < here; ++i) memcpy(line + i, source + i * row_stride, sizeof(uint32_t));
        } else if (d < dims) {
          for (int64_t i = 0; i < here; ++i) {
            uint16_t half[2] = {};
            memcpy(half, source + i * row_stride, sizeof(uint16_t));
            if (d + 1 < dims) memcpy(half + 1, source + i * row_stride + column_stride, sizeof(uint16_t));
            line[i] = half[0] | static_cast<uint32_t>(half[1]) << 16;
          }
        }
        memcpy(pairs, line, sizeof line);
      }
    }
  }

  static void read_gradient(const Units& units, const Rows<float>& rows, const int64_t* block, const float* packed_dy,
                            float* t) {
    const int64_t dims = padded_dims(units.D), components = round_up(block[LAST] - block[FIRST], DEPTH_OF_TILE);
    multiply_tiles(basis_of(units, block) + components * dims, components / SIDE,
                   reinterpret_cast<const Bfloat16*>(packed_dy), rows.padded, dims / DEPTH_OF_TILE, t, false);
  }
};

bool forward_on_tiles(const Forward& call) { return forward_as<float, Bfloat16, OnTiles>(call); }
bool backward_on_tiles(const Backward& call) { return backward_as<float, Bfloat16, OnTiles>(call); }

}  // namespace

const residual_kernels::Kernels residual_kernels::amx_kernels{VECTOR_BYTES, TILE_V, forward_on_tiles, backward_on_tiles,
                                                              moments};
