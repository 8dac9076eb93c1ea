#pragma once

// dtype -> template argument: one visitor instead of a macro.

#include "accumulate.h"

#include <ATen/core/Tensor.h>

namespace driftar {

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls visit(TypeTag<T>{}) with the C++ type of `type`.
template <typename Visitor>
decltype(auto) dispatch_floating(at::ScalarType type, Visitor&& visit) {
  switch (type) {
    case at::kFloat:
      return visit(TypeTag<float>{});
    case at::kDouble:
      return visit(TypeTag<double>{});
    case at::kBFloat16:
      return visit(TypeTag<at::BFloat16>{});
    case at::kHalf:
      return visit(TypeTag<at::Half>{});
    default:
      TORCH_CHECK_TYPE(false, "expected fp32, bf16, fp16 or fp64, got ", type);
  }
}

}  // namespace driftar
