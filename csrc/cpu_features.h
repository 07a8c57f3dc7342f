// Which instruction sets this processor and this build offer.
#pragma once

namespace residual_kernels {

enum InstructionSet { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AMX = 3, INSTRUCTION_SETS = 4 };

const char* name_of(InstructionSet set);

// Null when `set` can run here, else why not, in one clause.
const char* why_not(InstructionSet set);

}  // namespace residual_kernels
