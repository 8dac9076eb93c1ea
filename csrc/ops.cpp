// The one list of native operators. Kernels register themselves for their device at the foot of
// their binding file; fake implementations and gradients are attached in Python
// (driftar_kernels/_library.py), the gradient of attention in autograd/.

#include "cpu/isa.h"
#include "python/direct_call.h"

#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>

TORCH_LIBRARY(driftar, library) {
  library.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
      "Tensor? query_offsets, Tensor? key_lengths, Tensor? parents, SymInt query_offset, "
      "float scale, bool is_causal, str entropy, bool normalize, SymInt entropy_from) -> "
      "(Tensor out, Tensor entropy, Tensor lse, Tensor max_score, Tensor entropy_lse, "
      "Tensor entropy_cross, Tensor entropy_norm)");
  library.def(
      "attention_backward(Tensor grad_out, Tensor grad_entropy, Tensor grad_lse, Tensor query, "
      "Tensor key, Tensor value, Tensor? attn_mask, Tensor? query_offsets, Tensor? key_lengths, "
      "Tensor? parents, Tensor out, Tensor lse, Tensor entropy_lse, Tensor entropy_cross, "
      "Tensor entropy_norm, SymInt query_offset, float scale, bool is_causal, str entropy, "
      "SymInt entropy_from) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  library.def(
      "walk_tree(Tensor parents, Tensor accept, SymInt max_depth) -> "
      "(Tensor length, Tensor path, Tensor node)");
  library.def(
      "verify_tree(Tensor parents, Tensor draft, Tensor target, float tolerance, "
      "SymInt max_depth) -> (Tensor length, Tensor path, Tensor node)");
  library.def(
      "verify_chain(Tensor draft, Tensor draft_mean, Tensor draft_std, Tensor target_mean, "
      "Tensor target_std, Tensor seed) -> (Tensor length, Tensor next_sample)");
  library.def(
      "commit_path(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor key_lengths, Tensor path, "
      "Tensor length) -> Tensor");
  library.def(
      "drift_field(Tensor gen, Tensor pos, Tensor? neg, Tensor? weight, bool keep, "
      "float[] temperatures) -> (Tensor force, Tensor scale, Tensor norms, Tensor loss)");
  library.def(
      "drift_distances(Tensor gen, Tensor pos, Tensor? neg, Tensor weight, bool keep) -> "
      "(Tensor distances, Tensor sums)");
  library.def(
      "drift_force(Tensor gen, Tensor pos, Tensor? neg, Tensor weight, Tensor distances, "
      "Tensor scale, float[] temperatures) -> (Tensor force, Tensor squares)");
  library.def(
      "drift_squares(Tensor gen, Tensor pos, Tensor? neg, Tensor weight, Tensor distances, "
      "Tensor scale, float[] temperatures) -> (Tensor squares, Tensor balances)");
  library.def(
      "drift_combined_force(Tensor gen, Tensor pos, Tensor? neg, Tensor weight, Tensor distances, "
      "Tensor scale, float[] temperatures, Tensor balances, Tensor factors) -> "
      "(Tensor force, Tensor squares)");
  library.def("drift_loss_gradient(Tensor force, Tensor factor, ScalarType dtype) -> Tensor");
  library.def(
      "entropy_to_sigma(Tensor entropy, float sigma_max, float tau, float entropy_max) -> Tensor");
  library.def(
      "entropy_to_sigma_backward(Tensor grad, Tensor entropy, float sigma_max, float tau, "
      "float entropy_max) -> Tensor");
  library.def(
      "entropy_prior(Tensor mean, Tensor entropy, Tensor noise, float sigma_max, float tau, "
      "float entropy_max) -> Tensor");
  library.def(
      "entropy_prior_backward(Tensor grad, Tensor entropy, Tensor noise, float sigma_max, "
      "float tau, float entropy_max, bool need_entropy, bool need_noise) -> "
      "(Tensor grad_entropy, Tensor grad_noise)");
}

// These results carry no gradient: PyTorch passes over its autograd layer instead of through its
// default for operators without a formula.
TORCH_LIBRARY_IMPL(driftar, Autograd, library) {
  for (const char* op : {"walk_tree", "verify_tree", "drift_field"}) {
    library.impl(op, torch::CppFunction::makeFallthrough());
  }
}

namespace {

pybind11::dict build_info() {
  using driftar::cpu::Isa;
  std::string built = driftar::cpu::isa_name(Isa::baseline);
#ifdef DRIFTAR_HAS_AVX512
  built += std::string(" ") + driftar::cpu::isa_name(Isa::avx512);
#endif
#ifdef DRIFTAR_HAS_AVX512_BF16
  built += std::string(" ") + driftar::cpu::isa_name(Isa::avx512_bf16);
#endif
#ifdef DRIFTAR_HAS_AMX
  built += std::string(" ") + driftar::cpu::isa_name(Isa::amx);
#endif
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = DRIFTAR_COMPILER;
  info["instruction_sets"] = built;
  info["active_instruction_set"] = driftar::cpu::isa_name(driftar::cpu::active_isa());
#ifdef DRIFTAR_CUDA_ARCHITECTURES
  info["cuda_architectures"] = DRIFTAR_CUDA_ARCHITECTURES;
#else
  info["cuda_architectures"] = "";
#endif
  info["problem"] = driftar::cpu::isa_problem();
  return info;
}

}  // namespace

// The module is named by the build, so that C++ users can load the same library without Python.
PYBIND11_MODULE(_C, module) {
  module.doc() = "Native operators of driftar_kernels, registered as torch.ops.driftar.*";
  module.def("build_info", &build_info, "Versions and instruction sets of this build.");
  module.def("direct_call", &driftar::python::direct_call, pybind11::arg("name"),
             pybind11::arg("result") = pybind11::none(),
             "An operator as a function that stays in C++.");
}
