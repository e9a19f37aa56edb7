// From bitmap words, counts and slots to compressed sparse rows: a block takes 256 words of one token.
#include "cuda/intrin.h"
#include "cuda/kernels.h"

namespace gsf::cuda {

// One dot in section 3a's order by one thread: for the rare word whose values did not fit its slots.
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
#pragma unroll
  for (int half = 8; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) acc[j] = add_rn(acc[j], acc[j + half]);
  }
  return acc[0];
}

// Sum over the block, the same in every thread; `part` is used once.
GSF_DEVICE int64_t block_sum(int64_t v, int64_t* part) {
  for (int half = 16; half > 0; half /= 2) v += shuffle_xor(v, half);
  if (lane() == 0) part[warp()] = v;
  sync_block();  // all parts are there
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
  sync_block();  // all parts are there
  int before = inclusive - v;
  for (int i = 0; i < warp(); ++i) before += part[i];
  return before;
}

template <typename W>
GSF_GLOBAL void GSF_BOUNDS(kThreads) gather(GatherArgs a) {
  GSF_SHARED int64_t sums[kWarps];
  GSF_SHARED int parts[kWarps];
  const EncodeArgs& e = a.e;
  const int64_t groups = (e.words + kThreads - 1) / kThreads;
  const int64_t t = block() / groups, first = block() % groups * kThreads, word = first + thread();
  const int64_t row = t * e.words;
  const bool there = word < e.words;
  const int count = there ? e.count[row + word] : 0;
  const uint32_t bits = there ? e.bitmap[row + word] : 0;

  int64_t base = 0;
  if (a.total) {
    base = row + first > 0 ? a.total[row + first - 1] : 0;
  } else {
    int64_t mine = 0;
    for (int64_t i = thread(); i < row + first; i += kThreads) mine += e.count[i];
    base = block_sum(mine, sums);
  }
  const int64_t start = base + block_prefix(count, parts);
  if (first == 0 && thread() == 0) a.crow[t] = base;
  if (t == e.T - 1 && word == e.words - 1) a.crow[e.T] = start + count;

  int rank = 0;
  for (uint32_t left = bits; left != 0; left &= left - 1, ++rank) {
    const int64_t at = start + rank;
    if (at >= a.capacity) break;  // crow keeps the true count; who reads finds out
    a.col[at] = static_cast<int32_t>(word * 32 + lowest_bit(left));
    if (rank < kSlots) a.values[at] = e.slots[(row + word) * kSlots + rank];
  }

  // Words with more hits than slots: their dots again, one a lane, in the same order, hence the same bytes.
  for (uint32_t late = ballot(count > kSlots); late != 0; late &= late - 1) {
    const int owner = lowest_bit(late);
    const uint32_t hits = shuffle(bits, owner);
    const int64_t begin = shuffle(start, owner), f = (first + thread() - lane() + owner) * 32 + lane();
    const int mine = popcount(hits & lanes_below());
    if ((hits >> lane() & 1u) == 0 || mine < kSlots || begin + mine >= a.capacity) continue;
    const float z = dot_alone(e.x + t * e.d, static_cast<const W*>(e.w) + f * e.d, e.d);
    a.values[begin + mine] = canonical(add_rn(z, e.bias[f]));
  }
}

void gather_words(const Launcher& launch, const GatherArgs& a, Dtype w) {
  const int64_t blocks = (a.e.words + kThreads - 1) / kThreads * a.e.T;
  if (blocks == 0) return;
  if (w == Dtype::f32) launch(gather<float>, blocks, a);
  if (w == Dtype::bf16) launch(gather<BF16>, blocks, a);
  if (w == Dtype::f16) launch(gather<F16>, blocks, a);
}

}  // namespace gsf::cuda
