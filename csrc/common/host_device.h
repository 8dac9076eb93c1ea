#pragma once

// Functions that host code, CPU kernels and CUDA kernels share.

#if defined(__CUDACC__)
#define DRIFTAR_HOST_DEVICE __host__ __device__
#else
#define DRIFTAR_HOST_DEVICE
#endif
