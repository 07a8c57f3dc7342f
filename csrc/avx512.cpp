// AVX-512: 32 registers of 512 bits, 28 of them sums
#define VECTOR_BYTES 64
#define TILE_M 14
#define TILE_V 2
#include "tile.h"
#include "spectral_reweight.h"
#include "on_vectors.h"
#include "unit_moments.h"
#include "neighbours.h"
#include "peak.h"

const residual_kernels::Kernels residual_kernels::avx512_kernels{VECTOR_BYTES, TILE_V, forward, backward, moments, nearest,
                                                               vector_peak};
