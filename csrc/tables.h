// What the tables of an analysis ask of the extension beside the products of an instruction set: sorting and matching.
#pragma once
#include <cstdint>

namespace residual_kernels {

struct RankSums {
  int64_t rows, N;
  const float* values;   // [rows, N]
  const double* target;  // [rows, N] centred ranks
  double* shared;        // [rows] sum of centred ranks of values times target
  double* square;        // [rows] sum of squares of the centred ranks
  int threads;
};

struct Matching {
  int64_t pairs, rows, columns;
  const double* entries;  // [pairs, rows, columns], at least 0
  double* total;          // [pairs] sum of squares of the entries taken
  int threads;
};

// They return false when memory ran out.
bool rank_sums(const RankSums& call);
bool greedy_matching(const Matching& call);

}  // namespace residual_kernels
