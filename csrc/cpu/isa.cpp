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

bool has_avx512_bf16() {
#ifdef DRIFTAR_HAS_AVX512_BF16
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Linux lends the tile registers to processes that ask for them, which init_amx() does. Every
// processor with tiles multiplies bf16, but a virtual machine may hide the one and show the other.
bool has_amx() {
#ifdef DRIFTAR_HAS_AMX
  return has_avx512_bf16() && at::cpu::init_amx();
#else
  return false;
#endif
}

bool has(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return has_amx();
    case Isa::avx512_bf16:
      return has_avx512_bf16();
    case Isa::avx512:
      return has_avx512();
    default:
      return true;
  }
}

constexpr Isa kBestFirst[] = {Isa::amx, Isa::avx512_bf16, Isa::avx512, Isa::baseline};

Isa choose() {
  const char* wanted = std::getenv("DRIFTAR_KERNELS_ISA");
  const std::string name = wanted == nullptr ? "" : wanted;
  for (const Isa isa : kBestFirst) {
    if (name.empty() && has(isa)) return isa;
    if (name != isa_name(isa)) continue;
    TORCH_CHECK(has(isa), "DRIFTAR_KERNELS_ISA=", name,
                ", but this build, this processor or its kernel does not have it");
    return isa;
  }
  TORCH_CHECK_VALUE(false, "DRIFTAR_KERNELS_ISA must be ", isa_name(Isa::baseline),
                    ", avx512, avx512_bf16 or amx, got ", name);
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) {
  if (isa == Isa::amx) return "amx";
  if (isa == Isa::avx512_bf16) return "avx512_bf16";
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
