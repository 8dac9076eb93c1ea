#pragma once

// Which instruction set runs. Kernel files are compiled once per instruction set, with DRIFTAR_ISA
// naming it, and instantiate their functions for that value of Isa; bindings choose among them at
// run time.

#include <algorithm>
#include <type_traits>
#include <utility>

namespace driftar::cpu {

// Each has what those before it have: every processor with AMX for bf16 has AVX512-BF16.
enum class Isa { baseline, avx512, avx512_bf16, amx };

// The best one that was built and that this processor has, unless DRIFTAR_KERNELS_ISA names one.
Isa active_isa();
const char* isa_name(Isa isa);
// Why not even the baseline runs on this processor; empty when it does.
const char* isa_problem();

// Calls visit(std::integral_constant<Isa, ...>{}) with the active instruction set, or with the best
// one below it that the kernels are built for: `built`, and all before it.
template <Isa built = Isa::avx512, typename Visitor>
decltype(auto) dispatch_isa(Visitor&& visit) {
  [[maybe_unused]] const Isa isa = std::min(active_isa(), built);
#ifdef DRIFTAR_HAS_AMX
  if constexpr (built >= Isa::amx) {
    if (isa == Isa::amx) return visit(std::integral_constant<Isa, Isa::amx>{});
  }
#endif
#ifdef DRIFTAR_HAS_AVX512_BF16
  if constexpr (built >= Isa::avx512_bf16) {
    if (isa == Isa::avx512_bf16) return visit(std::integral_constant<Isa, Isa::avx512_bf16>{});
  }
#endif
#ifdef DRIFTAR_HAS_AVX512
  if (isa == Isa::avx512) return visit(std::integral_constant<Isa, Isa::avx512>{});
#endif
  return visit(std::integral_constant<Isa, Isa::baseline>{});
}

}  // namespace driftar::cpu
