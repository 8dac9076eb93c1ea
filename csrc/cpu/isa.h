#pragma once

// Which instruction set runs. Kernel files are compiled once per instruction set, with DRIFTAR_ISA
// naming it, and instantiate their functions for that value of Isa; bindings choose among them at
// run time.

#include <type_traits>
#include <utility>

namespace driftar::cpu {

enum class Isa { baseline, avx512 };

// The best one that was built and that this processor has; DRIFTAR_KERNELS_ISA=avx2 forces the
// baseline.
Isa active_isa();
const char* isa_name(Isa isa);
// Why not even the baseline runs on this processor; empty when it does.
const char* isa_problem();

// Calls visit(std::integral_constant<Isa, ...>{}) with the active instruction set.
template <typename Visitor>
decltype(auto) dispatch_isa(Visitor&& visit) {
#ifdef DRIFTAR_HAS_AVX512
  if (active_isa() == Isa::avx512) {
    return visit(std::integral_constant<Isa, Isa::avx512>{});
  }
#endif
  return visit(std::integral_constant<Isa, Isa::baseline>{});
}

}  // namespace driftar::cpu
