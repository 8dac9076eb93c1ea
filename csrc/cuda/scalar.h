#pragma once

namespace driftar::cuda {

// Dtype of the tensors of a call.
enum class Scalar { fp32, bf16, fp16 };

}  // namespace driftar::cuda
