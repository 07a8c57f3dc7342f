// AMX for bfloat16: products of tiles in the tile registers; see on_tiles.h.
#define VECTOR_BYTES 64
#define TILE_M 14
#define TILE_V 2
#include "tile.h"
#include "spectral_reweight.h"
#include "unit_moments.h"
#include "tile_product.h"

#ifdef EMULATE
namespace {
void begin_tiles() {}
void end_tiles() {}
}  // namespace
#else
#include <immintrin.h>
#define ZERO(to) _tile_zero(to)
#define LOAD(to, from, stride) _tile_loadd(to, from, stride)
#define STORE(from, to, stride) _tile_stored(from, to, stride)
#define MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)

namespace {

ALWAYS_INLINE void multiply(const Tiles& x) {
  const auto [steps, a0, a1, b0, b1, c, stride, add] = x;
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

void begin_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } eight_full_tiles;
  __asm__ volatile("" : : "r"(&eight_full_tiles) : "memory");  // all of it is read, not the first word alone
  _tile_loadconfig(&eight_full_tiles);
}

void end_tiles() { _tile_release(); }

// As peak.h has it for multiply-adds: four sums, as in `multiply`.
double tile_peak(int64_t steps) {
  begin_tiles();
  ZERO(0); ZERO(1); ZERO(2); ZERO(3); ZERO(4); ZERO(5); ZERO(6); ZERO(7);
  for (int64_t step = 0; step < steps; ++step) {
    MULTIPLY(0, 4, 6);
    MULTIPLY(1, 4, 7);
    MULTIPLY(2, 5, 6);
    MULTIPLY(3, 5, 7);
  }
  end_tiles();
  return 4.0 * 2 * steps * SIDE * SIDE * DEPTH_OF_TILE;
}

}  // namespace
#endif

#include "on_tiles.h"

const residual_kernels::Kernels residual_kernels::amx_kernels{VECTOR_BYTES, TILE_V, forward_on_tiles, backward_on_tiles,
                                                              moments, tile_peak};
