// What the bindings ask of an instruction set: plain structs of pointers and sizes, one table of functions per set.
// Letters are those of the Python side: N rows, R units, C coordinates, J components, D dimensions, T weight vectors.
#pragma once
#include <cstdint>

#include "cpu_features.h"

namespace residual_kernels {

enum DataType { FLOAT32 = 0, FLOAT64 = 1, BFLOAT16 = 2 };

// A block of components: first, last+1, first unit, last+1 unit, first with all earlier blocks padded to 32.
enum BlockField { FIRST, LAST, FIRST_UNIT, LAST_UNIT, PADDED_FIRST, BLOCK_FIELDS };

constexpr int64_t MOST_IN_BLOCK = 384;  // components of a block for a set on pairs, at most

// The packed constants of one set of units. `Wide` numbers are float for float32 and bfloat16 data, double for float64.
// Components are cut into blocks, each of whole units or a piece of one larger unit; all units appear in some block.
struct Units {
  int64_t R, C, D, J;
  int64_t blocks;           // how many blocks
  const int64_t* block;     // [blocks, BLOCK_FIELDS]
  const int64_t* offsets;   // [R+1]
  const void* proj;         // wide [J, C rounded up to the vector], padded with zeros
  const void* basis;        // wide, per block: panels of columns, each [components of the block, width of the panel];
                            // for a set on pairs see Block in pairs.h
  const void* proj_pairs;   // for a set on pairs: proj again, see Block in pairs.h; else null
  const void* bias;         // wide [J]
  const void* slope;        // wide [J]
  const void* offset;       // wide [J]
};

struct Array3 {  // any strides, counted in elements
  const void* data;
  int64_t stride[3];
};

struct Reweight {
  Units units;
  DataType dtype;  // of z, y, dy, dz
  int64_t N, T;
  Array3 z;                     // [N, R, C]; unused with c
  const void* c;                // wide [N, J]: coefficients known already, or null to read them from z
  int64_t c_stride[2];          // counted in elements
  const void* scale;            // wide [N] or null
  const void* mean;             // wide [N] or null
  const void* weight;           // wide [T, J]
  const int64_t* weight_index;  // [N] or null
  int threads;
};

struct Forward {
  Reweight common;
  void* y;  // [T, N, D], or [N, D] with weight_index
};

struct Backward {
  Reweight common;
  Array3 dy;      // [T, N, D]; stride[0] unused with weight_index
  void* dweight;  // wide [T, J] or null
  void* dz;       // [N, R, C] or null
  void* dscale;   // wide [N] or null
  void* dmean;    // wide [N] or null
};

struct Moments {
  DataType dtype;  // of z
  int64_t N, R, C;
  Array3 z;
  const void* scale;    // wide [N] or null
  const void* mean;     // wide [N] or null
  const double* shift;  // [R, C+2]
  double* total;        // [R, C+2]
  double* moment;       // [R, C+2, C+2]
  int threads;
};

struct Nearest {
  int64_t N, r;
  const float* queries;  // [N, r + 1]: -2 q and a 1, for points q about their mean with norms of at most one
  const float* points;   // [N, r + 1]: q and |q|^2 less what rounding may add to a product
  const double* exact;   // [N, r]: the points themselves
  double* squares;       // [N, 2]: the two smallest squared distances among the candidates, which may be infinite
  double* outside;       // [N]: the smallest product of what is no candidate
  int threads;
};

// The functions of one instruction set. They return false when memory ran out.
struct Kernels {
  int64_t vector_bytes;      // C of proj and D of basis are padded to this
  int64_t vectors_in_panel;  // a full panel of basis is this many vectors wide
  bool (*forward)(const Forward&);
  bool (*backward)(const Backward&);
  bool (*moments)(const Moments&);
  bool (*nearest)(const Nearest&);
  double (*peak)(int64_t steps);  // FLOP done in `steps` rounds of the set's own product, in registers; see peak.h
};

// Null where the set is not part of this build.
const Kernels* kernels(InstructionSet set);

extern const Kernels portable_kernels;
#ifdef WITH_X86_KERNELS
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512bf16_kernels;  // forward and backward for bfloat16 alone, as amx_kernels
extern const Kernels amx_kernels;
#endif

}  // namespace residual_kernels
