#include "isa.h"

#include <ATen/cpu/Utils.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>

namespace driftar::cpu {

namespace {

bool has_avx512() {
#ifdef DRIFTAR_HAS_AVX512
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

// Linux lends the tile registers to processes that ask for them, which init_amx() does. Every
// processor with tiles multiplies bf16.
bool has_amx() {
#ifdef DRIFTAR_HAS_AMX
  return has_avx512() && at::cpu::init_amx();
#else
  return false;
#endif
}

Isa choose() {
  const char* wanted = std::getenv("DRIFTAR_KERNELS_ISA");
  const std::string name = wanted == nullptr ? "" : wanted;
  if (name.empty()) return has_amx() ? Isa::amx : has_avx512() ? Isa::avx512 : Isa::baseline;
  if (name == isa_name(Isa::baseline)) return Isa::baseline;
  TORCH_CHECK_VALUE(name == isa_name(Isa::avx512) || name == isa_name(Isa::amx),
                    "DRIFTAR_KERNELS_ISA must be ", isa_name(Isa::baseline),
                    ", avx512 or amx, got ", name);
  const bool amx = name == isa_name(Isa::amx);
  TORCH_CHECK(amx ? has_amx() : has_avx512(), "DRIFTAR_KERNELS_ISA=", name,
              ", but this build, this processor or its kernel does not have ",
              amx ? "AMX" : "AVX-512");
  return amx ? Isa::amx : Isa::avx512;
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) {
  if (isa == Isa::amx) return "amx";
  if (isa == Isa::avx512) return "avx512";
#if defined(__x86_64__) && !defined(DRIFTAR_PORTABLE)
  return "avx2";
#else
  return "portable";
#endif
}

const char* isa_problem() {
#if defined(__x86_64__) && !defined(DRIFTAR_PORTABLE)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return "this processor has no AVX2 and FMA";
  }
#endif
  return "";
}

}  // namespace driftar::cpu
