// Greedy one-to-one matching: of every matrix the largest entry left, again and again, with its row and column struck.
#include "tables.h"
#include "threads.h"

namespace residual_kernels {
namespace {

// The largest of a row among the columns left, and where (the first of equals); -1 where none is left.
struct Best {
  double value;
  int64_t column;
};

Best best_of(const double* row, const int64_t* columns, int64_t left) {
  Best best{-1, -1};
  for (int64_t i = 0; i < left; ++i)
    if (row[columns[i]] > best.value) best = {row[columns[i]], columns[i]};
  return best;
}

struct Plan {
  const Matching* call;
  int* out_of_memory;
};

void match(const void* context, int64_t pair) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const Matching& x = *plan.call;
  const double* matrix = x.entries + pair * x.rows * x.columns;
  char* memory = static_cast<char*>(scratch(x.rows * (sizeof(Best) + sizeof(int64_t)) + x.columns * sizeof(int64_t)));
  if (memory == nullptr) return __atomic_store_n(plan.out_of_memory, 1, __ATOMIC_RELAXED);
  Best* best = reinterpret_cast<Best*>(memory);                     // of each row left
  int64_t* rows = reinterpret_cast<int64_t*>(best + x.rows);        // the rows left, in order
  int64_t* columns = rows + x.rows;                                 // the columns left, in order
  int64_t rows_left = x.rows, columns_left = x.columns;
  for (int64_t i = 0; i < x.columns; ++i) columns[i] = i;
  for (int64_t i = 0; i < x.rows; ++i) {
    rows[i] = i;
    best[i] = best_of(matrix + i * x.columns, columns, columns_left);
  }
  const auto strike = [](int64_t* list, int64_t& left, int64_t at) {
    --left;
    for (int64_t i = at; i < left; ++i) list[i] = list[i + 1];
  };
  double total = 0;
  while (rows_left > 0 && columns_left > 0) {
    int64_t at = 0;
    for (int64_t i = 1; i < rows_left; ++i)
      if (best[rows[i]].value > best[rows[at]].value) at = i;
    const Best taken = best[rows[at]];
    if (taken.column < 0) {  // entries that are no numbers
      total = __builtin_nan("");
      break;
    }
    total += taken.value * taken.value;
    strike(rows, rows_left, at);
    int64_t column = 0;
    while (columns[column] != taken.column) ++column;
    strike(columns, columns_left, column);
    for (int64_t i = 0; i < rows_left; ++i)
      if (best[rows[i]].column == taken.column) best[rows[i]] = best_of(matrix + rows[i] * x.columns, columns, columns_left);
  }
  x.total[pair] = total;
}

}  // namespace

bool greedy_matching(const Matching& call) {
  int out_of_memory = 0;
  const Plan plan{&call, &out_of_memory};
  parallel_for(call.pairs, call.threads, match, &plan);
  return !out_of_memory;
}

}  // namespace residual_kernels
