// The two large products in bfloat16 on tiles of 16 x 32, everything around them on AVX-512 in float32.
//
// A tile product takes a [16, 32] of bfloat16 in rows and b [32, 16] in pairs ([16, 16, 2]: k, column, k even or odd) and adds
// to c [16, 16] of float32. The constant side is always a, packed once: per block of components (padded to 32, as D is)
// first basis^T, tiles [D/16, components/32], for the forward product y^T = basis^T (weight c), then basis, tiles
// [components/16, D/32], for the backward product t = basis dy^T. The other side becomes pairs on the way.
//
// Included by amx.cpp and avx512bf16.cpp after tile.h, spectral_reweight.h, tile_product.h and their own multiply, begin_tiles and end_tiles.
#pragma once

namespace {

// c [16 a_tiles, columns] (+)= a b, where a is tiles [a_tiles, steps] and b is tiles [columns/16, steps].
void multiply_tiles(const Bfloat16* a, int64_t a_tiles, const Bfloat16* b, int64_t columns, int64_t steps, float* c,
                    bool add) {
  const int64_t run = steps * TILE_NUMBERS;
  for (int64_t i = 0; i < a_tiles; i += 2) {
    for (int64_t n = 0; n < columns; n += 2 * SIDE) {
      const Bfloat16 *a0 = a + i * run, *b0 = b + n / SIDE * run;
      multiply({steps, a0, i + 1 < a_tiles ? a0 + run : nullptr, b0, n + SIDE < columns ? b0 + run : nullptr,
                c + i * SIDE * columns + n, columns, add});
    }
  }
}

typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES), may_alias));

#if defined(__AVX512BF16__) && !defined(EMULATE)
ALWAYS_INLINE Words pairs_of(Vector<float> even, Vector<float> odd) {  // rounded to bfloat16, even in the low halves
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
  return (Words)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
#else
ALWAYS_INLINE Words rounded_to_bfloat16(Vector<float> x) {  // to nearest, ties to even; in the low halves
  Words bits;
  memcpy(&bits, &x, sizeof bits);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;
}

ALWAYS_INLINE Words pairs_of(Vector<float> even, Vector<float> odd) {
  return rounded_to_bfloat16(even) | rounded_to_bfloat16(odd) << 16;
}
#endif

// The row of the packed tiles of proj where the run of components from `low` on begins: each run of a unit in a block starts
// a tile of its own, and (block, unit) counts them.
ALWAYS_INLINE int64_t tile_row(int64_t low, int64_t block, int64_t unit) { return low + SIDE * (block + unit); }

// 16 rows of 16 pairs become 16 pairs of 16 rows.
ALWAYS_INLINE void transpose_pairs(const Bfloat16* from, int64_t row_stride, uint32_t* to) {
#ifdef EMULATE
  for (int64_t i = 0; i < SIDE; ++i)
    for (int64_t k = 0; k < SIDE; ++k) memcpy(to + k * SIDE + i, from + i * row_stride + 2 * k, sizeof(uint32_t));
#else
  __m512i a[16], b[16];
  UNROLL for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * row_stride);
  UNROLL for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  UNROLL for (int i = 0; i < 4; ++i) {  // quarters 0 and 2, 1 and 3 of rows i ... i + 3 and of the next eight
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(to + i * SIDE, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 8) * SIDE, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    _mm512_storeu_si512(to + (i + 4) * SIDE, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
    _mm512_storeu_si512(to + (i + 12) * SIDE, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
  }
#endif
}

// to: tiles [rows/16, columns/32], each [16, 16] pairs of numbers that are neighbours in a row; filled with zeros.
void pack_pairs(const Bfloat16* from, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, float* to) {
  uint32_t* pairs = reinterpret_cast<uint32_t*>(to);
  for (int64_t n = 0; n < rows; n += SIDE) {
    const int64_t here = least(SIDE, rows - n);
    for (int64_t d = 0; d < round_up(columns, DEPTH_OF_TILE); d += DEPTH_OF_TILE, pairs += SIDE * SIDE) {
      const Bfloat16* source = from + n * row_stride + d * column_stride;
      if (column_stride == 1 && here == SIDE && d + DEPTH_OF_TILE <= columns) {
        transpose_pairs(source, row_stride, pairs);
        continue;
      }
      for (int64_t k = 0; k < SIDE; ++k) {
        uint32_t line[SIDE] = {};
        for (int64_t i = 0; i < here; ++i) {
          uint16_t half[2] = {};
          if (d + 2 * k < columns) memcpy(half, source + i * row_stride + 2 * k * column_stride, 2);
          if (d + 2 * k + 1 < columns) memcpy(half + 1, source + i * row_stride + (2 * k + 1) * column_stride, 2);
          line[i] = half[0] | static_cast<uint32_t>(half[1]) << 16;
        }
        memcpy(pairs + k * SIDE, line, sizeof line);
      }
    }
  }
}

struct OnTiles {
  static constexpr int64_t component_step = DEPTH_OF_TILE;
  static constexpr int64_t component_room = SIDE;  // the last tile of a block's last unit
  static constexpr int64_t smallest_groups = 8;

  static int64_t padded_dims(int64_t dims) { return round_up(dims, DEPTH_OF_TILE); }

  static const Bfloat16* basis_of(const Units& units, const int64_t* block) {
    return static_cast<const Bfloat16*>(units.basis) + 2 * block[PADDED_FIRST] * padded_dims(units.D);
  }

  static void begin() { begin_tiles(); }
  static void end() { end_tiles(); }

  static int64_t spare_size(int64_t padded_rows, int64_t components) { return 2 * padded_rows * components; }
  static int64_t z_size(int64_t padded_rows, int64_t width) { return padded_rows * round_up(width, DEPTH_OF_TILE) / 2; }
  static int64_t y_size(int64_t rows, int64_t dims) { return round_up(rows, SIDE) * padded_dims(dims); }
  static int64_t dy_size(int64_t padded_rows, int64_t dims) { return padded_rows * padded_dims(dims) / 2; }

  // c [components of the block, rows] := z . proj for every unit of the block. A unit's last tile writes zeros over the
  // first components of the next unit, whose own follow.
  template <class In>
  static void read_components(const Reweight& x, const Rows<float>& rows, const int64_t* block, float* packed_z, float* c) {
    const Units& units = x.units;
    const int64_t width = round_up(units.C, DEPTH_OF_TILE), number = (block - units.block) / BLOCK_FIELDS;
    if (width == 0) {  // no coordinates: there is no tile to point to
      memset(c, 0, (block[LAST] - block[FIRST]) * rows.padded * sizeof(float));
      return;
    }
    for (int64_t r = block[FIRST_UNIT]; r < block[LAST_UNIT]; ++r) {
      const int64_t low = most(units.offsets[r], block[FIRST]), high = least(units.offsets[r + 1], block[LAST]);
      if (low >= high) continue;
      const In* z = static_cast<const In*>(x.z.data) + rows.first * x.z.stride[0] + r * x.z.stride[1];
      pack_pairs(z, x.z.stride[0], x.z.stride[2], rows.count, units.C, packed_z);
      const Bfloat16* proj = static_cast<const Bfloat16*>(units.proj_tiles) + tile_row(low, number, r) * width;
      multiply_tiles(proj, divide_up(high - low, SIDE), reinterpret_cast<const Bfloat16*>(packed_z), rows.padded,
                     width / DEPTH_OF_TILE, c + (low - block[FIRST]) * rows.padded, false);
    }
  }

  static void write_components(const Units& units, const Rows<float>& rows, const int64_t* block, const float* a,
                               void* spare, float* y, bool add) {
    const int64_t components = block[LAST] - block[FIRST], steps = divide_up(components, DEPTH_OF_TILE);
    uint32_t* pairs = static_cast<uint32_t*>(spare);  // tiles [rows/16, steps], each [16, 16] pairs
    for (int64_t n = 0; n < rows.padded; n += SIDE) {
      for (int64_t j = 0; j < steps * DEPTH_OF_TILE; j += 2, pairs += SIDE) {
        const float* here = a + j * rows.padded + n;
        const Vector<float> even = j < components ? load(here) : Vector<float>{};
        const Vector<float> odd = j + 1 < components ? load(here + rows.padded) : Vector<float>{};
        const Words both = pairs_of(even, odd);
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

  template <class Data>
  static void pack_dy(const Data* dy, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t dims, float* to) {
    pack_pairs(dy, row_stride, column_stride, rows, dims, to);
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
