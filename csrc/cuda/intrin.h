// The only place for intrinsics. Each has a host version, so that one source compiles with nvcc and, through
// host.h, with any C++ compiler.  It needs nothing beyond compute capability 8.0.
#pragma once

#include <cstdint>

#include "cpu/half.h"
#include "cuda/launcher.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define GSF_GLOBAL __global__
#define GSF_DEVICE __device__ __forceinline__
#define GSF_SHARED __shared__
// At least two blocks on a multiprocessor: up to 128 registers a thread, a quarter of the warps or more.
#define GSF_BOUNDS(threads) __launch_bounds__(threads, 2)
#else
#define GSF_GLOBAL
#define GSF_DEVICE inline
// One block runs at a time, so one copy is enough; before the first write it has the previous block's
// content.
#define GSF_SHARED static
#define GSF_BOUNDS(threads)
#endif

namespace gsf::cuda {

#ifdef __CUDACC__
GSF_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
GSF_DEVICE int64_t block() { return blockIdx.x; }
GSF_DEVICE void sync_block() { __syncthreads(); }
GSF_DEVICE void sync_warp() { __syncwarp(); }
template <typename V>
GSF_DEVICE V shuffle_xor(V v, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, v, mask);
}
template <typename V>
GSF_DEVICE V shuffle(V v, int lane) {
  return __shfl_sync(0xFFFFFFFFu, v, lane);
}
GSF_DEVICE uint32_t ballot(bool p) { return __ballot_sync(0xFFFFFFFFu, p); }
GSF_DEVICE int popcount(uint32_t v) { return __popc(v); }
GSF_DEVICE int lowest_bit(uint32_t v) { return __ffs(static_cast<int>(v)) - 1; }
GSF_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
GSF_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
GSF_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
GSF_DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
GSF_DEVICE float nearest_even(float v) { return rintf(v); }
// sum + the dot of four unsigned bytes with four signed ones; exact.
GSF_DEVICE int32_t dot4(uint32_t codes, int32_t q, int32_t sum) {
  asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(codes), "r"(q));
  return sum;
}
GSF_DEVICE uint32_t min_bytes(uint32_t a, uint32_t b) { return __vminu4(a, b); }
GSF_DEVICE float quiet_nan() { return __int_as_float(0x7FC00000); }
GSF_DEVICE float widened(F16 h) { return __half2float(__ushort_as_half(h.bits)); }
GSF_DEVICE float widened(BF16 h) { return __int_as_float(static_cast<int>(h.bits) << 16); }
#else
GSF_DEVICE int thread() { return host::thread(); }
GSF_DEVICE int64_t block() { return host::block(); }
GSF_DEVICE void sync_block() { host::sync_block(); }
GSF_DEVICE void sync_warp() { host::sync_warp(); }
template <typename V>
GSF_DEVICE V shuffle_xor(V v, int mask) {
  return host::shuffle(v, host::lane() ^ mask);
}
template <typename V>
GSF_DEVICE V shuffle(V v, int lane) {
  return host::shuffle(v, lane);
}
GSF_DEVICE uint32_t ballot(bool p) { return host::ballot(p); }
GSF_DEVICE int popcount(uint32_t v) { return __builtin_popcount(v); }
GSF_DEVICE int lowest_bit(uint32_t v) { return __builtin_ffs(static_cast<int>(v)) - 1; }
GSF_DEVICE float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
GSF_DEVICE float add_rn(float a, float b) { return a + b; }
GSF_DEVICE float mul_rn(float a, float b) { return a * b; }
GSF_DEVICE float div_rn(float a, float b) { return a / b; }
GSF_DEVICE float nearest_even(float v) { return __builtin_rintf(v); }
GSF_DEVICE int32_t dot4(uint32_t codes, int32_t q, int32_t sum) {
  for (int i = 0; i < 4; ++i) {
    const int32_t code = static_cast<int32_t>(codes >> (8 * i) & 255u);
    sum += code * static_cast<int8_t>(static_cast<uint32_t>(q) >> (8 * i));
  }
  return sum;
}
GSF_DEVICE uint32_t min_bytes(uint32_t a, uint32_t b) {
  uint32_t least = 0;
  for (int i = 0; i < 32; i += 8) {
    const uint32_t x = a >> i & 255u, y = b >> i & 255u;
    least |= (x < y ? x : y) << i;
  }
  return least;
}
GSF_DEVICE float quiet_nan() { return __builtin_nanf(""); }
GSF_DEVICE float widened(F16 h) { return widen(h); }
GSF_DEVICE float widened(BF16 h) { return widen(h); }
#endif
GSF_DEVICE float widened(float v) { return v; }
GSF_DEVICE float widened(int8_t v) { return static_cast<float>(v); }

GSF_DEVICE int lane() { return thread() & 31; }
GSF_DEVICE int warp() { return thread() >> 5; }
GSF_DEVICE uint32_t lanes_below() { return (1u << lane()) - 1u; }

// Stored NaNs are the canonical quiet one.
GSF_DEVICE float canonical(float z) { return z == z ? z : quiet_nan(); }

// When a latent is stored (docs/how/exact.md): z > max(theta, 0), or z is NaN; with a bandwidth also if it is
// near.
GSF_DEVICE bool fires(float z, float theta, float half_bandwidth) {
  const float near = z > theta ? z - theta : theta - z;
  return !(z <= (theta > 0.0f ? theta : 0.0f)) || near < half_bandwidth;
}

}  // namespace gsf::cuda
