// AVX512-BF16: products of tiles by vdpbf16ps, two bfloat16 products a lane added to float32; see on_tiles.h.
#define VECTOR_BYTES 64
#define TILE_M 14
#define TILE_V 2
#include "tile.h"
#include "spectral_reweight.h"
#include "unit_moments.h"
#include "tile_product.h"
#ifndef EMULATE
#include <immintrin.h>
#endif

namespace {

#ifndef EMULATE

constexpr int ROWS_AT_ONCE = 8;  // of a tile of a: 8 x 2 sums hide the latency of the product, and leave room for b

// c [8, 16 V] (+)= a b: `a` points to the first of eight rows of a tile, b to V tiles.
template <int V>
ALWAYS_INLINE void multiply_rows(int64_t steps, const Bfloat16* a, const Bfloat16* const (&b)[V], float* c, int64_t stride,
                                 bool add) {
  __m512 sum[ROWS_AT_ONCE][V];
  UNROLL for (int m = 0; m < ROWS_AT_ONCE; ++m)
    UNROLL for (int v = 0; v < V; ++v)
      sum[m][v] = add ? _mm512_loadu_ps(c + m * stride + v * SIDE) : _mm512_setzero_ps();
  for (int64_t k = 0; k < steps * TILE_NUMBERS; k += TILE_NUMBERS) {
    for (int64_t pair = 0; pair < DEPTH_OF_TILE; pair += 2) {  // numbers of a row of a; 16 pairs of b to each two
      __m512bh column[V];
      UNROLL for (int v = 0; v < V; ++v) column[v] = (__m512bh)_mm512_loadu_si512(b[v] + k + pair * SIDE);
      UNROLL for (int m = 0; m < ROWS_AT_ONCE; ++m) {
        int both;
        memcpy(&both, a + k + m * DEPTH_OF_TILE + pair, sizeof both);
        const __m512bh row = (__m512bh)_mm512_set1_epi32(both);
        UNROLL for (int v = 0; v < V; ++v) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], row, column[v]);
      }
    }
  }
  UNROLL for (int m = 0; m < ROWS_AT_ONCE; ++m)
    UNROLL for (int v = 0; v < V; ++v) _mm512_storeu_ps(c + m * stride + v * SIDE, sum[m][v]);
}

void multiply(const Tiles& x) {
  for (int64_t m = 0; m < (x.a1 ? 2 * SIDE : SIDE); m += ROWS_AT_ONCE) {
    const Bfloat16* a = (m < SIDE ? x.a0 : x.a1) + m % SIDE * DEPTH_OF_TILE;
    float* c = x.c + m * x.stride;
    if (x.b1) multiply_rows<2>(x.steps, a, {x.b0, x.b1}, c, x.stride, x.add);
    else multiply_rows<1>(x.steps, a, {x.b0}, c, x.stride, x.add);
  }
}

// As peak.h has it for multiply-adds.
double tile_peak(int64_t steps) {
  constexpr int SUMS = 16;
  __m512 sum[SUMS];
  volatile float tiny = 1e-3f;
  const __m512bh factor = (__m512bh)_mm512_set1_ps(tiny);
  UNROLL for (int i = 0; i < SUMS; ++i) sum[i] = _mm512_set1_ps(tiny);
  for (int64_t step = 0; step < steps; ++step)
    UNROLL for (int i = 0; i < SUMS; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], factor, factor);
  for (int i = 1; i < SUMS; ++i) sum[0] += sum[i];
  tiny = sum_lanes<float>((Vector<float>)sum[0]);
  return 4.0 * steps * SUMS * VectorOf<float>::lanes;
}
#endif

void begin_tiles() {}
void end_tiles() {}

}  // namespace

#include "on_tiles.h"

const residual_kernels::Kernels residual_kernels::avx512bf16_kernels{VECTOR_BYTES, TILE_V, forward_on_tiles,
                                                                     backward_on_tiles, moments, tile_peak};
