// The multiply-adds a core can do at most: as many sums as a full tile has, in registers, and no memory at all. What the
// operators reach is quoted against it. Included by each instruction set's file after tile.h.
#pragma once

namespace {

// FLOP done in `steps` rounds. Each sum waits for its last value only: TILE_M * TILE_V of them hide the latency.
double vector_peak(int64_t steps) {
  constexpr int64_t lanes = VectorOf<float>::lanes;
  Vector<float> sum[TILE_M][TILE_V];
  volatile float tiny = 1e-3f;  // read once each: the compiler cannot know the result
  const Vector<float> factor = Vector<float>{} + tiny, addend = Vector<float>{} + tiny;
  UNROLL for (int m = 0; m < TILE_M; ++m)
    UNROLL for (int v = 0; v < TILE_V; ++v) sum[m][v] = Vector<float>{} + tiny;
  for (int64_t step = 0; step < steps; ++step)
    UNROLL for (int m = 0; m < TILE_M; ++m)
      UNROLL for (int v = 0; v < TILE_V; ++v) sum[m][v] = sum[m][v] * factor + addend;
  Vector<float> total{};
  UNROLL for (int m = 0; m < TILE_M; ++m)
    UNROLL for (int v = 0; v < TILE_V; ++v) total += sum[m][v];
  tiny = sum_lanes<float>(total);
  return 2.0 * steps * TILE_M * TILE_V * lanes;
}

}  // namespace
