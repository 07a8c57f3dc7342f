// The products of the sets that multiply bfloat16 alone: how their operands lie in memory, and plain C++ for machines
// without the instructions.
//
// All three large products have one form: out[n, i] = sum over k of a[n, k] b[k, i]. `a` are numbers of the call, a row of
// the result to a row of a. They are copied (z, dy) or rounded (c) to rows that lie STRIDE apart, zeros behind up to a
// multiple of 32: so the distance of rows is known to the compiler, and is no power of two, which would put them on top
// of each other in the cache. `b` are constants, packed once: panels of SIDE columns, each [k/2, SIDE, 2], so that a vector
// or a tile holds pairs of neighbours in k. Included after spectral_reweight.h.
#pragma once

namespace {

constexpr int64_t SIDE = 16;     // columns of a panel
constexpr int64_t DEPTH = 32;    // k is padded to this many: what a tile of bfloat16 holds
constexpr int64_t MOST_K = MOST_IN_BLOCK;  // of one product: two panels of b and some rows of a stay in the nearest cache
constexpr int64_t STRIDE = MOST_K + DEPTH;  // of a, and of c and t, which are [rows, components] in float32

// Memory that is read after this product; it is asked for on the way, if at all.
struct Next {
  const Bfloat16* from;
  int64_t count;
};

#ifdef EMULATE
void begin_products() {}
void end_products() {}

// out [rows, 16 panels] (+)= a b for one or two panels, `panel` numbers apart.
void multiply_panels(int64_t rows, int64_t panels, int64_t k, const Bfloat16* a, const Bfloat16* b, int64_t panel, float* out,
                     int64_t out_stride, bool add, Next) {
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t i = 0; i < panels * SIDE; ++i) {
      float sum = add ? out[n * out_stride + i] : 0;
      const Bfloat16* column = b + i / SIDE * panel + i % SIDE * 2;
      for (int64_t at = 0; at < k; ++at)
        sum += read<float>(a + n * STRIDE + at) * read<float>(column + at / 2 * 2 * SIDE + at % 2);
      out[n * out_stride + i] = sum;
    }
}

double pair_peak(int64_t steps) {  // there is no register loop to emulate: products of zeros
  static const Bfloat16 zeros[DEPTH * SIDE] = {};
  float out[SIDE] = {};
  for (int64_t step = 0; step < steps; ++step) multiply_panels(1, 1, DEPTH, zeros, zeros, 0, out, SIDE, true, {nullptr, 0});
  return 2.0 * steps * SIDE * DEPTH;
}
#else
void begin_products();
void end_products();
void multiply_panels(int64_t rows, int64_t panels, int64_t k, const Bfloat16* a, const Bfloat16* b, int64_t panel, float* out,
                     int64_t out_stride, bool add, Next next);
#endif

// out [rows, columns rounded up to SIDE] (+)= a b. `next` follows the last panel.
void multiply(int64_t rows, int64_t columns, int64_t k, const Bfloat16* a, const Bfloat16* b, int64_t panel, float* out,
              int64_t out_stride, bool add, Next next) {
  const int64_t panels = divide_up(columns, SIDE);
  for (int64_t i = 0; i < panels; i += 2) {
    const int64_t here = least(2, panels - i), after = least(2, panels - i - here);
    const Bfloat16* now = b + i * panel;
    multiply_panels(rows, here, k, a, now, panel, out + i * SIDE, out_stride, add,
                    after ? Next{now + here * panel, after * panel} : next);
  }
}

// --- numbers of the call become rows of a ------------------------------------------------------------------------------

typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2), may_alias));

ALWAYS_INLINE void store_rounded(Bfloat16* to, Vector<float> x) {  // to nearest, ties to even; a NaN stays one
#if defined(__AVX512BF16__) && !defined(EMULATE)
  const __m256bh halves = _mm512_cvtneps_pbh((__m512)x);
#else
  Words bits;
  memcpy(&bits, &x, sizeof bits);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words chosen = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;
  const Halves halves = __builtin_convertvector(chosen, Halves);
#endif
  memcpy(to, &halves, sizeof halves);
}

// to [rows, STRIDE] := `columns` numbers of each row, and zeros up to DEPTH. What lies behind them in a row is asked for:
// mostly it is copied next, the same row's next unit.
void copy_rows(const Bfloat16* from, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
               Bfloat16* to) {
  const int64_t padding = round_up(columns, DEPTH) - columns;
  for (int64_t n = 0; n < rows; ++n, from += row_stride, to += STRIDE) {
    int64_t i = 0;
    if (column_stride == 1) {
      for (; i + DEPTH <= columns; i += DEPTH) {  // 64 bytes at a time
        __builtin_prefetch(from + columns + i, 0, 2);
        memcpy(to + i, from + i, DEPTH * sizeof(Bfloat16));
      }
      if (padding) memcpy(to + i, from + i, (columns - i) * sizeof(Bfloat16));
    } else {
      for (; i < columns; ++i) memcpy(to + i, from + i * column_stride, sizeof(Bfloat16));
    }
    if (padding) memset(to + columns, 0, padding * sizeof(Bfloat16));
  }
}

// --- a block of components ---------------------------------------------------------------------------------------------

// The parts of a long k: as few as MOST_K allows, all but the last of one size, a multiple of DEPTH.
struct Parts {
  int64_t whole, size;
  explicit Parts(int64_t k) : whole(k), size(round_up(most(1, divide_up(k, most(1, divide_up(k, MOST_K)))), DEPTH)) {}
  int64_t count() const { return divide_up(whole, size); }
  int64_t length(int64_t part) const { return least(size, whole - part * size); }
};

struct Block {
  const int64_t* fields;
  const Units* units;

  int64_t number() const { return (fields - units->block) / BLOCK_FIELDS; }
  int64_t first() const { return fields[FIRST]; }
  int64_t components() const { return fields[LAST] - fields[FIRST]; }
  int64_t depth() const { return round_up(components(), DEPTH); }
  int64_t dims() const { return round_up(units->D, DEPTH); }

  // [components, D]: panels of dimensions.
  const Bfloat16* basis() const { return static_cast<const Bfloat16*>(units->basis) + 2 * fields[PADDED_FIRST] * dims(); }
  // [D, components]: panels of components.
  const Bfloat16* transposed_basis() const { return basis() + depth() * dims(); }
  // [C, components from `low` on]: panels of components. Each run of a unit in a block starts a panel of its own.
  const Bfloat16* proj(int64_t low, int64_t unit) const {
    return static_cast<const Bfloat16*>(units->proj_pairs) + (low + SIDE * (number() + unit)) * round_up(units->C, DEPTH);
  }
};

// What belongs to the components of a block, and zeros up to STRIDE.
struct Constants {
  float bias[STRIDE], slope[STRIDE], offset[STRIDE];

  void fill(const Units& units, const Block& block) {
    const void* from[] = {units.bias, units.slope, units.offset};
    float* to[] = {bias, slope, offset};
    for (int i = 0; i < 3; ++i) copy_row(static_cast<const float*>(from[i]) + block.first(), block, to[i]);
  }
  static void copy_row(const float* from, const Block& block, float* to) {
    memcpy(to, from, block.components() * sizeof(float));
    memset(to + block.components(), 0, (STRIDE - block.components()) * sizeof(float));
  }
};

// c [rows, STRIDE] := z . proj for every unit of the block. A unit's last panel writes zeros over the first components of
// the next unit, whose own follow.
void read_components(const Reweight& x, const Rows<float>& rows, const Block& block, Bfloat16* a, float* c) {
  const Units& units = *block.units;
  const Parts parts(units.C);
  if (units.C == 0) memset(c, 0, rows.count * STRIDE * sizeof(float));
  for (int64_t r = block.fields[FIRST_UNIT]; r < block.fields[LAST_UNIT]; ++r) {
    const int64_t low = most(units.offsets[r], block.first()), high = least(units.offsets[r + 1], block.fields[LAST]);
    if (low >= high) continue;
    const int64_t panel = SIDE * round_up(units.C, DEPTH);
    const Bfloat16* proj = block.proj(low, r);
    for (int64_t part = 0; part < parts.count(); ++part) {
      const Bfloat16* z = static_cast<const Bfloat16*>(x.z.data) + rows.first * x.z.stride[0] + r * x.z.stride[1] +
                          part * parts.size * x.z.stride[2];
      copy_rows(z, x.z.stride[0], x.z.stride[2], rows.count, parts.length(part), a);
      multiply(rows.count, high - low, parts.length(part), a, proj + part * parts.size * SIDE, panel,
               c + low - block.first(), STRIDE, part > 0, {proj + round_up(high - low, SIDE) / SIDE * panel, 2 * panel});
    }
  }
}

}  // namespace
