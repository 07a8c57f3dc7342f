// any 128-bit registers (SSE2, NEON, or whatever the compiler makes of vectors)
#define VECTOR_BYTES 16
#define TILE_M 4
#define TILE_V 2
#include "tile.h"
#include "spectral_reweight.h"
#include "on_vectors.h"
#include "unit_moments.h"
#include "neighbours.h"
#include "peak.h"

const residual_kernels::Kernels residual_kernels::portable_kernels{VECTOR_BYTES, TILE_V, forward, backward, moments, nearest,
                                                               vector_peak};
