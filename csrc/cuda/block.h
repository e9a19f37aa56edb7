// Helpers for a block of 256 threads, used by several kernels.
#pragma once

#include "cuda/intrin.h"
#include "cuda/kernels.h"

namespace gsf::cuda {

// Lane j plus lane j + HALF, down to one.  Each width is a separate loop: with a variable bound the compiler
// keeps the lanes in local memory.
template <int HALF>
GSF_DEVICE void fold(float (&acc)[16]) {
#pragma unroll
  for (int j = 0; j < HALF; ++j) acc[j] = add_rn(acc[j], acc[j + HALF]);
  if constexpr (HALF > 1) fold<HALF / 2>(acc);
}

// One dot in the fixed order of summation, by one thread: for the rare word whose values did not fit its
// slots.
template <typename W>
GSF_DEVICE float dot_alone(const float* x, const W* w, int64_t d) {
  float acc[16] = {};
  for (int64_t k = 0; k < d; k += 16) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const bool inside = k + j < d;
      acc[j] = fma_rn(inside ? x[k + j] : 0.0f, inside ? widened(w[k + j]) : 0.0f, acc[j]);
    }
  }
  fold<8>(acc);
  return acc[0];
}

// Recomputes the pre-activation of token t and feature f, in the same order and thus with the same bytes as
// in the encode kernel.
template <typename W>
GSF_DEVICE float value_again(const EncodeArgs& e, int64_t t, int64_t f) {
  return canonical(add_rn(dot_alone(e.x + t * e.d, static_cast<const W*>(e.w) + f * e.d, e.d), e.bias[f]));
}

// Sum over the block, the same in every thread.  All threads must pass another barrier before `part` is
// reused; this also applies to block_prefix.
GSF_DEVICE int64_t block_sum(int64_t v, int64_t* part) {
  for (int half = 16; half > 0; half /= 2) v += shuffle_xor(v, half);
  if (lane() == 0) part[warp()] = v;
  sync_block();  // all parts are written
  int64_t sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += part[i];
  return sum;
}

// Sum over the threads before this one.
GSF_DEVICE int block_prefix(int v, int* part) {
  int inclusive = v;
  for (int step = 1; step < 32; step *= 2) {
    const int other = shuffle(inclusive, lane() >= step ? lane() - step : lane());
    if (lane() >= step) inclusive += other;
  }
  if (lane() == 31) part[warp()] = inclusive;
  sync_block();  // all parts are written
  int before = inclusive - v;
  for (int i = 0; i < warp(); ++i) before += part[i];
  return before;
}

}  // namespace gsf::cuda
