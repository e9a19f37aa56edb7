// Sparse decode, features in ascending order by fused multiply-add.  The sum of one output element has one
// order, so it cannot be split over warps, but the loads can.
//
// Why CUDA and not Triton: with few rows, all loads of a row should be in flight at once.  Here the warps of
// a block share the loads and one warp adds in order; a Triton program waits for its own loads.
#include "cuda/intrin.h"
#include "cuda/kernels.h"

namespace gsf::cuda {

template <typename W>
GSF_DEVICE float entry(const DecodeArgs& a, int64_t i, float* value, int64_t k) {
  const int64_t f = a.col[i];
  *value = a.row_scale ? mul_rn(a.values[i], a.row_scale[f]) : a.values[i];
  return widened(static_cast<const W*>(a.w)[f * a.d + k]);
}

GSF_DEVICE void store(const DecodeArgs& a, int64_t n, int64_t k, float sum, bool fits) {
  const float out = a.bias ? add_rn(sum, a.bias[k]) : sum;
  a.out[n * a.d + k] = fits ? canonical(out) : quiet_nan();
}

// Few rows: a block computes 32 columns of one row; its 8 warps load segments of 128 features, with 16 loads
// per thread in flight, and warp 0 adds them in order.
constexpr int kStage = 128;

template <typename W>
GSF_GLOBAL void GSF_BOUNDS(kThreads) decode_few(DecodeArgs a) {
  GSF_SHARED float rows[kStage][32];
  GSF_SHARED float scaled[kStage];
  const int64_t n = block() % a.N, k = block() / a.N * 32 + lane();
  const int64_t begin = a.crow[n], end = a.crow[n + 1];
  const bool fits = end <= a.capacity, inside = k < a.d;
  float sum = 0.0f;
  for (int64_t i0 = begin; fits && i0 < end; i0 += kStage) {
    const int count = static_cast<int>(end - i0 < kStage ? end - i0 : kStage);
#pragma unroll 16
    for (int r = warp(); r < count; r += kWarps) {
      float value;
      const float w = entry<W>(a, i0 + r, &value, inside ? k : a.d - 1);
      rows[r][lane()] = w;
      if (lane() == 0) scaled[r] = value;
    }
    sync_block();  // all segments are loaded before they are added
    if (warp() == 0) {
      for (int r = 0; r < count; ++r) sum = fma_rn(scaled[r], rows[r][lane()], sum);
    }
    sync_block();  // and added before the next ones overwrite them
  }
  if (warp() == 0 && inside) store(a, n, k, sum, fits);
}

// Many rows: a block computes 256 columns of one row; columns vary slowest, so that rows shared by tokens are
// read from L2.
template <typename W>
GSF_GLOBAL void GSF_BOUNDS(kThreads) decode_many(DecodeArgs a) {
  const int64_t n = block() % a.N, k = block() / a.N * kThreads + thread();
  const int64_t begin = a.crow[n], end = a.crow[n + 1];
  const bool fits = end <= a.capacity;
  if (k >= a.d) return;
  float sum = 0.0f;
  if (fits) {
#pragma unroll 8
    for (int64_t i = begin; i < end; ++i) {
      float value;
      const float w = entry<W>(a, i, &value, k);
      sum = fma_rn(value, w, sum);
    }
  }
  store(a, n, k, sum, fits);
}

// Up to this many rows, a row's 32-column blocks (72 at d = 2304) fill a device only if all warps load.
constexpr int64_t kFewDecodeRows = 32;

template <typename W>
static void launch_decode(const Launcher& launch, const DecodeArgs& a) {
  if (a.N <= kFewDecodeRows) return launch(decode_few<W>, (a.d + 31) / 32 * a.N, a);
  launch(decode_many<W>, (a.d + kThreads - 1) / kThreads * a.N, a);
}

void decode_rows(const Launcher& launch, const DecodeArgs& a, Dtype w) {
  if (a.N == 0 || a.d == 0) return;
  if (w == Dtype::f32) launch_decode<float>(launch, a);
  if (w == Dtype::bf16) launch_decode<BF16>(launch, a);
  if (w == Dtype::f16) launch_decode<F16>(launch, a);
  if (w == Dtype::i8) launch_decode<int8_t>(launch, a);
}

}  // namespace gsf::cuda
