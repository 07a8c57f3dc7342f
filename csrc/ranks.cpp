// Rank correlation: every row of numbers is sorted, and the ranks of its entries meet those of another row.
#include "tables.h"

#include <cstdlib>
#include <cstring>

#include "threads.h"

namespace residual_kernels {
namespace {

constexpr int DIGIT = 8, DIGITS = 32 / DIGIT;
constexpr uint64_t BUCKETS = 1 << DIGIT;

// Rises with x; equal where the numbers are, of zero and minus zero too.
inline uint32_t key_of(float x) {
  x += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
}

// Entries are (key, place), sorted by key, equal keys in the order they came: a pass for each digit, from the lowest on.
const uint64_t* sorted(const float* values, int64_t count, uint64_t* entries, uint64_t* spare) {
  int64_t starts[DIGITS][BUCKETS] = {};
  for (int64_t n = 0; n < count; ++n) {
    const uint32_t key = key_of(values[n]);
    entries[n] = uint64_t(key) << 32 | uint64_t(n);
    for (int d = 0; d < DIGITS; ++d) ++starts[d][key >> (d * DIGIT) & (BUCKETS - 1)];
  }
  for (int d = 0; d < DIGITS; ++d) {
    const int shift = 32 + d * DIGIT;
    if (starts[d][entries[0] >> shift & (BUCKETS - 1)] == count) continue;  // all numbers share this digit
    int64_t start = 0;
    for (int64_t& bucket : starts[d]) {
      const int64_t size = bucket;
      bucket = start;
      start += size;
    }
    for (int64_t n = 0; n < count; ++n) spare[starts[d][entries[n] >> shift & (BUCKETS - 1)]++] = entries[n];
    uint64_t* const full = spare;
    spare = entries;
    entries = full;
  }
  return entries;
}

struct Plan {
  const RankSums* call;
  int* out_of_memory;
};

void rank_row(const void* context, int64_t row) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const RankSums& x = *plan.call;
  uint64_t* memory = static_cast<uint64_t*>(scratch(2 * x.N * sizeof(uint64_t)));
  if (memory == nullptr) return __atomic_store_n(plan.out_of_memory, 1, __ATOMIC_RELAXED);
  const uint64_t* entries = sorted(x.values + row * x.N, x.N, memory, memory + x.N);
  const double* target = x.target + row * x.N;
  const double middle = (x.N - 1) / 2.0;
  double shared = 0, square = 0;  // of halves: sums of up to 130,000 rows are exact
  for (int64_t low = 0; low < x.N;) {
    int64_t high = low;
    double others = 0;
    do others += target[entries[high++] & 0xffffffffu];
    while (high < x.N && entries[high] >> 32 == entries[low] >> 32);
    const double rank = (low + high - 1) / 2.0 - middle;  // equal numbers share the mean of their places
    shared += rank * others;
    square += rank * rank * static_cast<double>(high - low);
    low = high;
  }
  x.shared[row] = shared;
  x.square[row] = square;
}

}  // namespace

bool rank_sums(const RankSums& call) {
  int out_of_memory = 0;
  if (call.N == 0) return true;
  const Plan plan{&call, &out_of_memory};
  parallel_for(call.rows, call.threads, rank_row, &plan);
  return !out_of_memory;
}

}  // namespace residual_kernels
