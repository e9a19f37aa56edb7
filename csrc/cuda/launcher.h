// launch(kernel, blocks, args): the only difference between a device and the host build.  The ops, which a
// C++ compiler compiles separately from nvcc's kernels (GSF_CUDA_OPS), keep a launcher and pass it on.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(GSF_CUDA_OPS)
#include <cuda_runtime_api.h>
#else
#include "cuda/host.h"
#endif

namespace gsf::cuda {

constexpr int kThreads = 256;  // of every block
constexpr int kWarps = kThreads / 32;

#if defined(__CUDACC__) || defined(GSF_CUDA_OPS)
struct Launcher {
  cudaStream_t stream;
#ifdef __CUDACC__
  template <typename Kernel, typename Args>
  void operator()(Kernel kernel, int64_t blocks, const Args& args) const {
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(args);
  }
#endif
};
#else
struct Launcher {
  host::Order order;
  uint64_t seed;
  bool last_alone = false;  // run only the last block of a grid
  template <typename Kernel, typename Args>
  void operator()(Kernel kernel, int64_t blocks, const Args& args) const {
    host::launch(blocks, kThreads, order, seed, last_alone, [&] { kernel(args); });
  }
};
#endif

}  // namespace gsf::cuda
