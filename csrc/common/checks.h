#pragma once

// Argument checks of the native bindings. The Python functions have already explained most
// mistakes; these make a direct torch.ops call, and every tensor value, memory-safe. Shapes and
// ranges raise ValueError, dtypes TypeError.

#include <ATen/core/Tensor.h>

#include <optional>

namespace driftar {

inline bool is_floating(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

// fp32 statistics, fp64 for fp64 inputs.
inline at::ScalarType accumulation_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_floating(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK_TYPE(is_floating(x.scalar_type()), op, ": ", name,
                   " must be fp32, bf16, fp16 or fp64, got ", x.scalar_type());
}

inline void check_device(const char* op, const char* name, const at::Tensor& x,
                         const at::Tensor& model) {
  TORCH_CHECK_VALUE(x.device() == model.device(), op, ": ", name, " must be on ", model.device(),
                    ", got ", x.device());
}

inline void check_like(const char* op, const char* name, const at::Tensor& x,
                       const at::Tensor& model) {
  TORCH_CHECK_TYPE(x.scalar_type() == model.scalar_type(), op, ": ", name, " must have dtype ",
                   model.scalar_type(), ", got ", x.scalar_type());
  check_device(op, name, x, model);
}

// A statistic of `model`: fp32 (fp64 for fp64), on the same device.
inline void check_statistic(const char* op, const char* name, const at::Tensor& x,
                            const at::Tensor& model) {
  const at::ScalarType type = accumulation_type(model.scalar_type());
  TORCH_CHECK_TYPE(x.scalar_type() == type, op, ": ", name, " must have dtype ", type, ", got ",
                   x.scalar_type());
  check_device(op, name, x, model);
}

inline void check_shape(const char* op, const char* name, const at::Tensor& x,
                        at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(x.sizes() == expected, op, ": ", name, " must have shape ", expected, ", got ",
                    x.sizes());
}

inline void check_rank(const char* op, const char* name, const at::Tensor& x, int64_t rank) {
  TORCH_CHECK_VALUE(x.dim() == rank, op, ": ", name, " must have ", rank, " dimensions, got shape ",
                    x.sizes());
}

inline void check_integer(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK_TYPE(at::isIntegralType(x.scalar_type(), /*includeBool=*/false), op, ": ", name,
                   " must have an integer dtype, got ", x.scalar_type());
}

// Parents [trees, nodes] as contiguous int64 with every value an earlier node or -1.
inline at::Tensor checked_parents(const char* op, const at::Tensor& parents) {
  const at::Tensor values = parents.to(at::kLong).contiguous();
  const int64_t nodes = values.size(1);
  const int64_t* data = values.const_data_ptr<int64_t>();
  for (int64_t tree = 0; tree < values.size(0); ++tree, data += nodes) {
    for (int64_t node = 0; node < nodes; ++node) {
      TORCH_CHECK_VALUE(data[node] >= -1 && data[node] < node, op,
                        ": parents must be -1 or an earlier node, got ", data[node], " for node ",
                        node, " of tree ", tree);
    }
  }
  return values;
}

}  // namespace driftar
