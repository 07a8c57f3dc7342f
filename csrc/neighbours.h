// The two nearest neighbours of every point: lower bounds of all squared distances from a product of tiles, the exact
// distances of the few points with the smallest. Included by each instruction set's file after tile.h.
//
// A bound is |y|^2 (1 - slack) - 2 q.y; the caller has chosen slack so that no rounding makes it too large, and takes the
// points as found where the exact distances lie below the smallest bound that was left aside. No N x N array exists: a
// bound is compared, while its tile is in the first cache, with the largest of its row's smallest so far.
#pragma once
#include "kernels.h"
#include "threads.h"

namespace {

using residual_kernels::Nearest;

constexpr int64_t CANDIDATES = 4;              // points of a row whose exact distance is taken
constexpr int64_t QUERY_ROWS = 8 * TILE_M;     // rows that go through all columns together
constexpr float FAR = 1e30f;                   // above every bound

struct Smallest {  // rising; the first of equals comes first
  float bound[CANDIDATES + 1];
  int64_t index[CANDIDATES + 1];

  void insert(float value, int64_t j) {
    int64_t at = CANDIDATES;
    for (; at > 0 && value < bound[at - 1]; --at) {
      bound[at] = bound[at - 1];
      index[at] = index[at - 1];
    }
    bound[at] = value;
    index[at] = j;
  }
};

struct NearestPlan {
  const Nearest* call;
  float* columns;  // panels of points, each [r + 1, width of the panel]
};

void pack_points(const void* context, int64_t p) {
  const NearestPlan& plan = *static_cast<const NearestPlan*>(context);
  const Nearest& x = *plan.call;
  constexpr int64_t panel = VectorOf<float>::panel;
  const int64_t k = x.r + 1, first = p * panel;
  pack_rows<float, float>(x.points + first * k, k, 1, least(panel, x.N - first), k, plan.columns + first * k);
}

ALWAYS_INLINE bool any_below(const float* row, int64_t vectors, float limit) {
  constexpr int64_t lanes = VectorOf<float>::lanes;
  const Vector<float> limits = Vector<float>{} + limit;
  auto below = load(row) < limits;
  for (int64_t v = 1; v < vectors; ++v) below |= load(row + v * lanes) < limits;
  uint64_t words[VECTOR_BYTES / 8], any = 0;
  memcpy(words, &below, sizeof words);
  UNROLL for (uint64_t word : words) any |= word;
  return any != 0;
}

void nearest_task(const void* context, int64_t block) {
  const NearestPlan& plan = *static_cast<const NearestPlan*>(context);
  const Nearest& x = *plan.call;
  constexpr int64_t lanes = VectorOf<float>::lanes, panel = VectorOf<float>::panel;
  const int64_t k = x.r + 1, first = block * QUERY_ROWS, rows = least(QUERY_ROWS, x.N - first);
  Smallest smallest[QUERY_ROWS];
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t i = 0; i <= CANDIDATES; ++i) {
      smallest[n].bound[i] = FAR;
      smallest[n].index[i] = -1;
    }
  float bounds[TILE_M * panel];
  for (int64_t j = 0; j < x.N; j += panel) {
    const int64_t width = least(panel, round_up(x.N - j, lanes)), here = least(width, x.N - j);
    for (int64_t m = 0; m < rows; m += TILE_M) {
      const int64_t height = least(TILE_M, rows - m);
      Product<float> p{};
      p.panels = 1;
      p.k = k;
      p.a = x.queries + (first + m) * k;
      p.a_stride = k;
      p.b = plan.columns + j * k;
      p.b_stride = width;
      p.out = bounds;
      p.out_stride = width;
      p.ahead = reinterpret_cast<const char*>(p.b);
      any_tile<float, COLUMNS_TOGETHER>(height, width / lanes, p);
      for (int64_t i = 0; i < height; ++i) {
        Smallest& mine = smallest[m + i];
        const float* row = bounds + i * width;
        if (!any_below(row, width / lanes, mine.bound[CANDIDATES])) continue;
        for (int64_t c = 0; c < here; ++c)
          if (row[c] < mine.bound[CANDIDATES] && j + c != first + m + i) mine.insert(row[c], j + c);
      }
    }
  }
  for (int64_t n = 0; n < rows; ++n) {
    const double* own = x.exact + (first + n) * x.r;
    double best[2] = {__builtin_inf(), __builtin_inf()};
    for (int64_t i = 0; i < CANDIDATES && smallest[n].index[i] >= 0; ++i) {
      const double* other = x.exact + smallest[n].index[i] * x.r;
      Vector<double> sums{};
      int64_t c = 0;
      for (; c + VectorOf<double>::lanes <= x.r; c += VectorOf<double>::lanes) {
        const Vector<double> apart = load(own + c) - load(other + c);
        sums += apart * apart;
      }
      double square = sum_lanes<double>(sums);
      for (; c < x.r; ++c) square += (own[c] - other[c]) * (own[c] - other[c]);
      if (square < best[0]) {
        best[1] = best[0];
        best[0] = square;
      } else if (square < best[1]) {
        best[1] = square;
      }
    }
    x.squares[2 * (first + n)] = best[0];
    x.squares[2 * (first + n) + 1] = best[1];
    x.outside[first + n] = smallest[n].bound[CANDIDATES];
  }
}

bool nearest(const Nearest& call) {
  const int64_t panels = divide_up(call.N, VectorOf<float>::panel);
  const int64_t size = panels * VectorOf<float>::panel * (call.r + 1);
  NearestPlan plan{&call, static_cast<float*>(__builtin_malloc(size * sizeof(float)))};
  if (plan.columns == nullptr) return false;
  residual_kernels::parallel_for(panels, call.threads, pack_points, &plan);
  residual_kernels::parallel_for(divide_up(call.N, QUERY_ROWS), call.threads, nearest_task, &plan);
  __builtin_free(plan.columns);
  return true;
}

}  // namespace
