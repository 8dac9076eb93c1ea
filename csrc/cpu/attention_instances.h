// The kernels of this instruction set for every dtype it serves. Included at the foot of kernel
// files, whose functions it instantiates; hence no include guard.

namespace driftar::cpu {

template struct AttentionKernel<Isa::DRIFTAR_ISA, c10::BFloat16>;
#if !defined(__AMX_BF16__) && !defined(__AVX512BF16__)
template struct AttentionKernel<Isa::DRIFTAR_ISA, float>;
template struct AttentionKernel<Isa::DRIFTAR_ISA, double>;
template struct AttentionKernel<Isa::DRIFTAR_ISA, c10::Half>;
#endif

}  // namespace driftar::cpu
