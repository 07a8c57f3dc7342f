// AMX for bfloat16: products of tiles in the tile registers; see pairs.h.
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

constexpr int64_t ROW_STEP = 32;  // rows are cut into blocks of a multiple of this

#ifndef EMULATE
#define ZERO(to) _tile_zero(to)
#define LOAD(to, from, stride) _tile_loadd(to, from, stride)
#define STORE(from, to, stride) _tile_stored(from, to, stride)
#define MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)

// out [16 or 32, 16 or 32] (+)= a b over `steps` tiles: a1 null for one tile of rows, b1 for one of columns. Rows of a
// and out past the last of the call are there and mean nothing.
ALWAYS_INLINE void multiply_tiles(int64_t steps, const Bfloat16* a0, const Bfloat16* a1, const Bfloat16* b0, const Bfloat16* b1,
                                  float* c, int64_t stride, bool add) {
  constexpr int64_t tile = DEPTH * SIDE, row = STRIDE * sizeof(Bfloat16);
  __asm__ volatile("" ::: "memory");  // a tile load does not tell the compiler which memory it reads
  const int64_t bytes = stride * 4;
  float *c1 = c + SIDE, *c2 = c + SIDE * stride, *c3 = c2 + SIDE;
  if (add) LOAD(0, c, bytes); else ZERO(0);
  if (b1) { if (add) LOAD(1, c1, bytes); else ZERO(1); }
  if (a1) { if (add) LOAD(2, c2, bytes); else ZERO(2); }
  if (a1 && b1) { if (add) LOAD(3, c3, bytes); else ZERO(3); }
  for (int64_t step = 0; step < steps; ++step) {
    LOAD(4, a0 + step * DEPTH, row);
    LOAD(6, b0 + step * tile, 64);
    MULTIPLY(0, 4, 6);
    if (b1) {
      LOAD(7, b1 + step * tile, 64);
      MULTIPLY(1, 4, 7);
    }
    if (a1) {
      LOAD(5, a1 + step * DEPTH, row);
      MULTIPLY(2, 5, 6);
      if (b1) MULTIPLY(3, 5, 7);
    }
  }
  STORE(0, c, bytes);
  if (b1) STORE(1, c1, bytes);
  if (a1) STORE(2, c2, bytes);
  if (a1 && b1) STORE(3, c3, bytes);
}

void multiply_panels(int64_t rows, int64_t panels, int64_t k, const Bfloat16* a, const Bfloat16* b, int64_t panel, float* out,
                     int64_t out_stride, bool add, Next) {
  for (int64_t n = 0; n < rows; n += 2 * SIDE)
    multiply_tiles(divide_up(k, DEPTH), a + n * STRIDE, n + SIDE < rows ? a + (n + SIDE) * STRIDE : nullptr, b,
                   panels > 1 ? b + panel : nullptr, out + n * out_stride, out_stride, add);
}

void begin_products() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } eight_full_tiles;
  __asm__ volatile("" : : "r"(&eight_full_tiles) : "memory");  // all of it is read, not the first word alone
  _tile_loadconfig(&eight_full_tiles);
}

void end_products() { _tile_release(); }

// As peak.h has it for multiply-adds: four sums, as in `multiply_tiles`.
double pair_peak(int64_t steps) {
  begin_products();
  ZERO(0); ZERO(1); ZERO(2); ZERO(3); ZERO(4); ZERO(5); ZERO(6); ZERO(7);
  for (int64_t step = 0; step < steps; ++step) {
    MULTIPLY(0, 4, 6);
    MULTIPLY(1, 4, 7);
    MULTIPLY(2, 5, 6);
    MULTIPLY(3, 5, 7);
  }
  end_products();
  return 4.0 * 2 * steps * SIDE * SIDE * DEPTH;
}

#endif

}  // namespace

#include "pairs_forward.h"
#include "pairs_backward.h"

const residual_kernels::Kernels residual_kernels::amx_kernels{VECTOR_BYTES, TILE_V, forward_on_pairs, backward_on_pairs,
                                                              moments, nearest, pair_peak};
