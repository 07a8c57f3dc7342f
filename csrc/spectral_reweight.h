// y[n] = sum_j weight[j] * c[n,j] * basis[j],  c[n,j] = scale[n] * (z[n,r(j)] . proj[j] + bias[j] + mean[n] * slope[j]) - offset[j]
// and its gradients, fused, or the sum alone where c is given: the coefficients of a block of rows on a block of components
// stay in cache between the two products, forward and backward. Included by each instruction set's file after tile.h.
//
// Inside, a vector runs over rows for c, t (= dy . basis) and q (= dL/dc), all [components, rows], and over dimensions
// for y and dz. The work is cut by shape alone, so results do not depend on the number of threads.
#pragma once
#include "coefficients.h"
#include "forward.h"
#include "backward.h"
