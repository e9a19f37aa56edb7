// Converts bitmap words, counts and slots to compressed sparse rows: a block processes 256 words of one
// token.
#include "cuda/block.h"
#include "cuda/intrin.h"
#include "cuda/kernels.h"

namespace gsf::cuda {

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
    if (at >= a.capacity) break;  // crow keeps the true count, which readers compare
    a.col[at] = static_cast<int32_t>(word * 32 + lowest_bit(left));
    if (rank < kSlots) a.values[at] = e.slots[(row + word) * kSlots + rank];
  }

  // Words with more hits than slots: recompute their values, one per lane.
  for (uint32_t late = ballot(count > kSlots); late != 0; late &= late - 1) {
    const int owner = lowest_bit(late);
    const uint32_t hits = shuffle(bits, owner);
    const int64_t begin = shuffle(start, owner), f = (first + thread() - lane() + owner) * 32 + lane();
    const int mine = popcount(hits & lanes_below());
    if ((hits >> lane() & 1u) == 0 || mine < kSlots || begin + mine >= a.capacity) continue;
    a.values[begin + mine] = value_again<W>(e, t, f);
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
