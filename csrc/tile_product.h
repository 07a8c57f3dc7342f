// One product of tiles, as on_tiles.h describes them: the numbers, and plain C++ for machines without the instructions.
#pragma once

namespace {

constexpr int64_t SIDE = 16, DEPTH_OF_TILE = 32, TILE_NUMBERS = SIDE * DEPTH_OF_TILE;

// c [16 or 32, 16 or 32] (+)= a b over `steps` tiles, with two tiles of a and of b at a time where there are two.
struct Tiles {
  int64_t steps;
  const Bfloat16 *a0, *a1;  // a1 null: one tile high
  const Bfloat16 *b0, *b1;  // b1 null: one tile wide
  float* c;
  int64_t stride;  // of c, in numbers
  bool add;
};

#ifdef EMULATE
// One tile of a by one of b. The sums run over k in order, as the instructions' do.
void emulated_product(const Bfloat16* a, const Bfloat16* b, int64_t steps, float* c, int64_t stride, bool add) {
  for (int m = 0; m < SIDE; ++m)
    for (int n = 0; n < SIDE; ++n) {
      float sum = add ? c[m * stride + n] : 0;
      for (int64_t step = 0; step < steps; ++step)
        for (int k = 0; k < DEPTH_OF_TILE; ++k)
          sum += read<float>(a + step * TILE_NUMBERS + m * DEPTH_OF_TILE + k) *
                 read<float>(b + step * TILE_NUMBERS + (k / 2 * SIDE + n) * 2 + k % 2);
      c[m * stride + n] = sum;
    }
}

double tile_peak(int64_t steps) {  // there is no register loop to emulate: products of tiles of zeros
  static const Bfloat16 zeros[TILE_NUMBERS] = {};
  float c[SIDE * SIDE] = {};
  emulated_product(zeros, zeros, 1, c, SIDE, false);
  for (int64_t step = 1; step < steps; ++step) emulated_product(zeros, zeros, 1, c, SIDE, true);
  return 2.0 * steps * SIDE * SIDE * DEPTH_OF_TILE;
}

void multiply(const Tiles& x) {
  for (int i = 0; i < (x.a1 ? 2 : 1); ++i)
    for (int j = 0; j < (x.b1 ? 2 : 1); ++j)
      emulated_product(i ? x.a1 : x.a0, j ? x.b1 : x.b0, x.steps, x.c + SIDE * (i * x.stride + j), x.stride, x.add);
}
#endif

}  // namespace
