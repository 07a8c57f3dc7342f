// AVX2 and FMA: 16 registers of 256 bits, 12 of them sums
#define VECTOR_BYTES 32
#define TILE_M 6
#define TILE_V 2
#include "tile.h"
#include "spectral_reweight.h"
#include "on_vectors.h"
#include "unit_moments.h"
#include "neighbours.h"
#include "peak.h"

const residual_kernels::Kernels residual_kernels::avx2_kernels{VECTOR_BYTES, TILE_V, forward, backward, moments, nearest,
                                                               vector_peak};
