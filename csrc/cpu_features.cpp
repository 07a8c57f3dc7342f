#include "cpu_features.h"

#include "kernels.h"

#if defined(WITH_X86_KERNELS) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace residual_kernels {
namespace {

#if defined(WITH_X86_KERNELS) && !defined(EMULATE)
const char* why_not_amx() {
#ifdef __linux__
  unsigned a = 0, b = 0, c = 0, d = 0;
  const unsigned tile = 1u << 24, bfloat16 = 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tile) == 0 || (d & bfloat16) == 0)
    return "this processor has no AMX with bfloat16";
  // Tiles are 8 KiB of registers, which Linux gives to a process that asks for them.
  const long request_permission = 0x1023, tile_data = 18;
  static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return granted ? nullptr : "the operating system does not let this process use AMX";
#else
  return "AMX is used on Linux only";
#endif
}
#endif

}  // namespace

const char* name_of(InstructionSet set) {
  switch (set) {
    case AVX2: return "avx2";
    case AVX512: return "avx512";
    case AVX512BF16: return "avx512bf16";
    case AMX: return "amx";
    default: return "portable";
  }
}

const char* why_not(InstructionSet set) {
  if (set == PORTABLE) return nullptr;
  if (kernels(set) == nullptr) return "it is not part of this build";
#if defined(WITH_X86_KERNELS) && !defined(EMULATE)
  __builtin_cpu_init();  // what it reports, the operating system also saves and restores
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return "this processor has no AVX2 with FMA";
  if (set == AVX2) return nullptr;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512dq"))
    return "this processor has no AVX-512 (F, BW, VL, DQ)";
  if (set == AVX512BF16 && !__builtin_cpu_supports("avx512bf16")) return "this processor has no AVX512-BF16";
  if (set == AMX) return why_not_amx();
#endif
  return nullptr;
}

const Kernels* kernels(InstructionSet set) {
  switch (set) {
    case PORTABLE: return &portable_kernels;
#ifdef WITH_X86_KERNELS
    case AVX2: return &avx2_kernels;
    case AVX512: return &avx512_kernels;
    case AVX512BF16: return &avx512bf16_kernels;
    case AMX: return &amx_kernels;
#endif
    default: return nullptr;
  }
}

}  // namespace residual_kernels
