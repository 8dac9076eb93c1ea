#pragma once

// Emulated kernels run on CPU tensors: there is no current device to change.

#include <c10/core/Device.h>

namespace c10::cuda {

class CUDAGuard {
 public:
  explicit CUDAGuard(c10::Device) {}
};

}  // namespace c10::cuda
