// The fused loop's second launch (T <= 16): from the encode kernel's bitmap to the spliced activation.
//
// Why CUDA and not Triton: the list of what fired must be compacted before it is read in order. Here a block
// does so in shared memory; a Triton program has no indexable shared memory and needs another launch.
#include "cuda/block.h"
#include "cuda/intrin.h"
#include "cuda/kernels.h"

namespace gsf::cuda {

constexpr int kSpliceStage = 128;  // entries whose 32-column segments are in shared memory: 16 KiB

// The value of token t's feature f, which is the rank-th hit of its word.
template <typename W>
GSF_DEVICE float latent_value(const EncodeArgs& e, int64_t t, int64_t f, int rank) {
  if (rank < kSlots) return e.slots[(t * e.words + f / 32) * kSlots + rank];
  return value_again<W>(e, t, f);
}

// What an edit adds; the same as attach's edits give for every latent: NaN is not below a minimum, and
// infinity scaled by one stays.
GSF_DEVICE float delta_of(int32_t kind, float amount, float old) {
  if (kind == kScale) return amount == 1.0f ? 0.0f : add_rn(mul_rn(old, amount), -old);
  if (kind == kAdd) return amount;
  if (kind == kMinClamp && !(old < amount)) return 0.0f;
  return add_rn(amount, -old);
}

// A block: 32 columns of one token.  Its threads compact 256 words at a time, its warps load the rows'
// segments, warp 0 adds in order.  The blocks of the first columns also write the latents.
template <typename W>
GSF_GLOBAL void GSF_BOUNDS(kThreads) splice_few(SpliceArgs a) {
  GSF_SHARED float rows[kSpliceStage][32];
  GSF_SHARED float value[kSpliceStage];
  GSF_SHARED int32_t feature[kSpliceStage];
  GSF_SHARED int64_t sums[kWarps];
  GSF_SHARED int parts[kWarps];
  const EncodeArgs& e = a.g.e;
  const int64_t t = block() % e.T, k = block() / e.T * 32 + lane();
  const bool inside = k < a.d_out, writes = block() < e.T, sums_rows = a.x == nullptr;
  const int64_t column = inside ? k : a.d_out - 1;
  const W* w = static_cast<const W*>(a.w);

  // every block of a token must know whether the row fits the capacity, so it needs the row's start
  int64_t mine = 0;
  for (int64_t i = thread(); i < t * e.words; i += kThreads) mine += e.count[i];
  int64_t start = block_sum(mine, sums);
  if (writes && thread() == 0) a.g.crow[t] = start;

  float sum = 0.0f;
  for (int64_t first = 0; first < e.words; first += kThreads) {
    const int64_t word = first + thread();
    const uint32_t bits = word < e.words ? e.bitmap[t * e.words + word] : 0;
    // The barriers inside each call separate one round's reads of the other call's parts from the next
    // round's writes.
    const int before = block_prefix(popcount(bits), parts);
    const int64_t total = block_sum(popcount(bits), sums);
    for (int64_t s0 = 0; s0 < total && (sums_rows || writes); s0 += kSpliceStage) {
      int rank = 0;
      for (uint32_t left = bits; left != 0; left &= left - 1, ++rank) {
        const int64_t at = before + rank - s0;
        if (at < 0 || at >= kSpliceStage) continue;
        feature[at] = static_cast<int32_t>(word * 32 + lowest_bit(left));
        value[at] = latent_value<W>(e, t, feature[at], rank);
      }
      sync_block();  // the list is complete before it is read
      const int count = static_cast<int>(total - s0 < kSpliceStage ? total - s0 : kSpliceStage);
      if (writes && thread() < count && start + s0 + thread() < a.g.capacity) {
        a.g.col[start + s0 + thread()] = feature[thread()];
        a.g.values[start + s0 + thread()] = value[thread()];
      }
#pragma unroll 16
      for (int r = warp(); sums_rows && r < count; r += kWarps) {
        rows[r][lane()] = widened(w[feature[r] * a.d_out + column]);
      }
      sync_block();  // all segments are loaded before they are added
      if (warp() == 0 && sums_rows) {
        for (int r = 0; r < count; ++r) sum = fma_rn(value[r], rows[r][lane()], sum);
      }
      sync_block();  // and added before the next ones overwrite them
    }
    start += total;
  }
  if (writes && t == e.T - 1 && thread() == 0) a.g.crow[e.T] = start;
  if (warp() != 0 || !inside) return;

  float extra = 0.0f;
  bool changed = false;
  for (int64_t i = 0; i < a.edits; ++i) {
    const int64_t f = a.features[i];
    const uint32_t bits = e.bitmap[t * e.words + f / 32], bit = 1u << (f % 32);
    const float old = bits & bit ? latent_value<W>(e, t, f, popcount(bits & (bit - 1))) : 0.0f;
    const float delta = delta_of(a.kind[i], a.amount[i], old);
    if (delta == 0.0f) continue;
    extra = fma_rn(delta, widened(w[f * a.d_out + k]), extra);
    changed = true;
  }
  const float base = a.x ? a.x[t * a.d_out + k] : canonical(add_rn(sum, a.bias[k]));
  // without a change the base is returned bit for bit, because adding +0 would turn -0 into +0
  const float out = changed ? canonical(add_rn(base, extra)) : base;
  a.out[t * a.d_out + k] = start <= a.g.capacity ? out : quiet_nan();
}

void splice_tokens(const Launcher& launch, const SpliceArgs& a, Dtype w) {
  const int64_t blocks = (a.d_out + 31) / 32 * a.g.e.T;
  if (blocks == 0) return;
  if (w == Dtype::f32) launch(splice_few<float>, blocks, a);
  if (w == Dtype::bf16) launch(splice_few<BF16>, blocks, a);
  if (w == Dtype::f16) launch(splice_few<F16>, blocks, a);
}

}  // namespace gsf::cuda
