// Which instruction sets this processor and this build offer.
#pragma once

namespace residual_kernels {

enum InstructionSet { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512BF16 = 3, AMX = 4, INSTRUCTION_SETS = 5 };

// Whether a set multiplies pairs of bfloat16, and nothing else: see pairs.h.
constexpr bool on_pairs(int set) { return set == AVX512BF16 || set == AMX; }

const char* name_of(InstructionSet set);

// Null when `set` can run here, else why not, in one clause.
const char* why_not(InstructionSet set);

}  // namespace residual_kernels
