// Shared by the ops on CUDA tensors: the launcher for the current stream, and checks.
#pragma once

#define GSF_CUDA_OPS
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cpu/ops_common.h"
#include "cuda/kernels.h"

namespace gsf::cuda {

inline Launcher here() { return Launcher{c10::cuda::getCurrentCUDAStream()}; }

inline at::Tensor fp32(const at::Tensor& t) { return t.to(at::kFloat).contiguous(); }

inline void check_device(const at::Tensor& t, const at::Tensor& like, const char* name) {
  TORCH_CHECK_VALUE(t.is_cuda() && t.device() == like.device(), name, ": expected a tensor on ",
                    like.device(), ", like the others, got ", t.device());
}

inline void check_capability() {
  int device = c10::cuda::current_device(), major = 0, minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  TORCH_CHECK(major >= 8, "compute capability: expected 8.0 or newer, got ", major, ".", minor);
}

}  // namespace gsf::cuda
