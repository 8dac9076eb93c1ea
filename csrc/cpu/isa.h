#pragma once

// Which instruction set runs. Kernel files are compiled once per instruction set, with DRIFTAR_ISA
// naming it, and instantiate their functions for that value of Isa; bindings choose among them at
// run time.

#include <type_traits>
#include <utility>

namespace driftar::cpu {

enum class Isa { baseline, avx512, amx };  // each has what those before it have

// The best one that was built and that this processor has, unless DRIFTAR_KERNELS_ISA names one.
Isa active_isa();
const char* isa_name(Isa isa);
// Why not even the baseline runs on this processor; empty when it does.
const char* isa_problem();

// Calls visit(std::integral_constant<Isa, ...>{}) with the active instruction set; AMX counts for
// kernels that are built for it.
template <bool has_amx = false, typename Visitor>
decltype(auto) dispatch_isa(Visitor&& visit) {
#ifdef DRIFTAR_HAS_AMX
  if constexpr (has_amx) {
    if (active_isa() == Isa::amx) return visit(std::integral_constant<Isa, Isa::amx>{});
  }
#endif
#ifdef DRIFTAR_HAS_AVX512
  if (active_isa() >= Isa::avx512) {
    return visit(std::integral_constant<Isa, Isa::avx512>{});
  }
#endif
  return visit(std::integral_constant<Isa, Isa::baseline>{});
}

}  // namespace driftar::cpu
