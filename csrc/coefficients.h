// How the work is cut, and the coefficients c of a block of rows on a block of components: read from z, or taken as given.
// Included by spectral_reweight.h.
#pragma once
#include "kernels.h"
#include "threads.h"

namespace {

using namespace residual_kernels;

constexpr int64_t ROW_BLOCK = 96;  // rows that go through all blocks of components together

// --- how the work is cut ------------------------------------------------------------------------------------------------

struct Cut {
  int64_t row_blocks, rows_in_block;

  explicit Cut(int64_t rows, int64_t panel) {
    const int64_t wanted = most(1, divide_up(rows, ROW_BLOCK));
    rows_in_block = round_up(most(1, divide_up(rows, wanted)), panel);
    row_blocks = divide_up(rows, rows_in_block);
  }
};

// First block of group `g` when the blocks are cut into `groups` groups of about equally many components. A unit that
// fills several blocks stays whole.
int64_t group_start(const Units& units, int64_t groups, int64_t g) {
  if (g >= groups) return units.blocks;
  const int64_t target = units.J * g / groups;
  int64_t low = 0, high = units.blocks;  // the first block that starts at or after target
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (units.block[BLOCK_FIELDS * middle + FIRST] < target) low = middle + 1; else high = middle;
  }
  while (low > 0 && low < units.blocks && units.block[BLOCK_FIELDS * low + FIRST_UNIT] <
                                              units.block[BLOCK_FIELDS * (low - 1) + LAST_UNIT]) ++low;
  return g == 0 ? 0 : low;
}

int64_t largest_block(const Units& units) {
  int64_t largest = 1;
  for (int64_t b = 0; b < units.blocks; ++b) largest = most(largest, units.block[BLOCK_FIELDS * b + LAST] - units.block[BLOCK_FIELDS * b + FIRST]);
  return largest;
}

// Scratch memory handed out in 64-byte steps; first counted, then taken.
struct Arena {
  char* memory;
  size_t used = 0;

  explicit Arena(void* from) : memory(static_cast<char*>(from)) {}
  template <class T>
  T* take(int64_t count) {
    T* here = reinterpret_cast<T*>(memory + used);
    used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return here;
  }
};

// --- c ------------------------------------------------------------------------------------------------------------------

template <class T>
struct Rows {  // a block of rows: scale and mean filled out to whole vectors
  int64_t first, count, padded;
  T *scale, *mean;

  void fill(const Reweight& x, int64_t start, int64_t rows) {
    first = start;
    count = rows;
    padded = round_up(rows, VectorOf<T>::lanes);
    for (int64_t n = 0; n < padded; ++n) {
      const bool real = n < rows;
      scale[n] = !real ? 0 : x.scale ? static_cast<const T*>(x.scale)[start + n] : 1;
      mean[n] = !real || !x.mean ? 0 : static_cast<const T*>(x.mean)[start + n];
    }
  }
};

// c [components of the block, rows] := the coefficients given, times weight; weight null: 1.
template <class T>
void take_components(const Reweight& x, const Rows<T>& rows, const int64_t* block, const T* weight, T* c) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  for (int64_t n = 0; n < rows.padded; n += lanes) {
    const T* from = static_cast<const T*>(x.c) + (rows.first + n) * x.c_stride[0];
    const int64_t here = least(lanes, rows.count - n);
    for (int64_t j = block[FIRST]; j < block[LAST]; ++j) {
      const T w = weight ? weight[j] : 1;
      T* to = c + (j - block[FIRST]) * rows.padded + n;
      for (int64_t i = 0; i < here; ++i) to[i] = from[i * x.c_stride[0] + j * x.c_stride[1]] * w;
      for (int64_t i = here; i < lanes; ++i) to[i] = 0;
    }
  }
}

// c := (scale * (c + bias + mean * slope) - offset) * weight; weight null: 1.
template <class T>
void finish_components(const Units& units, const Rows<T>& rows, const int64_t* block, const T* weight, T* c) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  for (int64_t j = block[FIRST]; j < block[LAST]; ++j) {
    const T bias = static_cast<const T*>(units.bias)[j], slope = static_cast<const T*>(units.slope)[j];
    const T offset = static_cast<const T*>(units.offset)[j], w = weight ? weight[j] : 1;
    for (int64_t n = 0; n < rows.padded; n += lanes, c += lanes) {
      const Vector<T> inner = load(c) + bias + load(rows.mean + n) * slope;
      store<T>(c, (load(rows.scale + n) * inner - offset) * w);
    }
  }
}

// by_row [components of the block, rows] := weight[weight_index[n], j].
template <class T>
void gather_weights(const Reweight& x, const Rows<T>& rows, const int64_t* block, T* by_row) {
  for (int64_t n = 0; n < rows.padded; ++n) {
    if (n >= rows.count) {
      for (int64_t j = block[FIRST]; j < block[LAST]; ++j) by_row[(j - block[FIRST]) * rows.padded + n] = 0;
      continue;
    }
    const T* weight = static_cast<const T*>(x.weight) + x.weight_index[rows.first + n] * x.units.J;
    for (int64_t j = block[FIRST]; j < block[LAST]; ++j) by_row[(j - block[FIRST]) * rows.padded + n] = weight[j];
  }
}

}  // namespace
