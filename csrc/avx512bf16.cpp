// AVX512-BF16: vdpbf16ps, two bfloat16 products a lane added to float32; see pairs.h.
#define VECTOR_BYTES 64
#define TILE_M 14
#define TILE_V 2
#include "tile.h"
#include "spectral_reweight.h"
#include "unit_moments.h"
#include "neighbours.h"
#ifndef EMULATE
#include <immintrin.h>
#endif
#include "pairs.h"

namespace {

constexpr int64_t ROW_STEP = 2;  // rows are cut into blocks of a multiple of this

#ifndef EMULATE

void begin_products() {}
void end_products() {}

// A tile [M, 16 V] of the product: M x V sums hide the latency of an instruction.
template <int M, int V>
void pair_tile(int64_t pairs, const Bfloat16* a, const Bfloat16* b, int64_t panel, float* out, int64_t out_stride, bool add,
               const char* ahead, int64_t ahead_step) {
  __m512 sum[M][V];
  UNROLL for (int m = 0; m < M; ++m)
    UNROLL for (int v = 0; v < V; ++v)
      sum[m][v] = add ? _mm512_loadu_ps(out + m * out_stride + v * SIDE) : _mm512_setzero_ps();
  for (; pairs > 0; --pairs) {
    __m512bh column[V];
    UNROLL for (int v = 0; v < V; ++v) column[v] = (__m512bh)_mm512_loadu_si512(b + v * panel);
    UNROLL for (int m = 0; m < M; ++m) {
      int both;
      memcpy(&both, a + m * STRIDE, sizeof both);
      const __m512bh row = (__m512bh)_mm512_set1_epi32(both);
      UNROLL for (int v = 0; v < V; ++v) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], row, column[v]);
    }
    __builtin_prefetch(ahead, 0, 2);
    ahead += ahead_step;
    a += 2;
    b += 2 * SIDE;
  }
  UNROLL for (int m = 0; m < M; ++m)
    UNROLL for (int v = 0; v < V; ++v) _mm512_storeu_ps(out + m * out_stride + v * SIDE, sum[m][v]);
}

template <int V>
void multiply_columns(int64_t rows, int64_t k, const Bfloat16* a, const Bfloat16* b, int64_t panel, float* out,
                      int64_t out_stride, bool add, Next next) {
  const int64_t tiles = divide_up(rows, TILE_M), pairs = divide_up(k, 2);
  const char* ahead = reinterpret_cast<const char*>(next.from ? next.from : b);
  const int64_t step = next.from ? divide_up(next.count * 2, most(1, tiles * pairs)) : 0;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t low = rows * i / tiles, high = rows * (i + 1) / tiles;
#define TILE(M) case M: pair_tile<M, V>(pairs, a + low * STRIDE, b, panel, out + low * out_stride, out_stride, add, ahead, step); break;
    switch (high - low) {
      TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12) TILE(13) TILE(14)
    }
#undef TILE
    ahead += step * pairs;
  }
}

void multiply_panels(int64_t rows, int64_t panels, int64_t k, const Bfloat16* a, const Bfloat16* b, int64_t panel, float* out,
                     int64_t out_stride, bool add, Next next) {
  if (panels == 2) multiply_columns<2>(rows, k, a, b, panel, out, out_stride, add, next);
  else multiply_columns<1>(rows, k, a, b, panel, out, out_stride, add, next);
}

// As peak.h has it for multiply-adds.
double pair_peak(int64_t steps) {
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

}  // namespace

#include "pairs_forward.h"
#include "pairs_backward.h"

const residual_kernels::Kernels residual_kernels::avx512bf16_kernels{VECTOR_BYTES, TILE_V, forward_on_pairs,
                                                                     backward_on_pairs, moments, nearest, pair_peak};
