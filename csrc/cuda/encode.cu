// Exact JumpReLU encode: the dots of docs/how/exact.md, bias, threshold and a bitmap in one pass.
//
// Why CUDA and not Triton: the 16 accumulators of a pair are 16 lanes of a half-warp (or 4 x 4 of a quad), so
// adding them takes four shuffles; Triton has no such layout and uses shared memory.
#include "cuda/intrin.h"
#include "cuda/kernels.h"

namespace gsf::cuda {

// One token's word of 32 features, one per lane: bitmap, count and first values, written by a whole warp.
GSF_DEVICE void write_word(const EncodeArgs& a, int64_t t, int64_t word, float z) {
  const int64_t f = word * 32 + lane();
  const bool hit = f < a.F && fires(z, a.threshold[f], a.half_bandwidth);
  const uint32_t bits = ballot(hit);
  const int rank = popcount(bits & lanes_below());
  const int64_t at = t * a.words + word;
  if (hit && rank < kSlots) a.slots[at * kSlots + rank] = canonical(z);
  if (lane() == 0) {
    a.bitmap[at] = bits;
    a.count[at] = popcount(bits);
  }
}

// ---- many tokens: a tile of 32 tokens x 32 features, 8 x 8 pairs a half-warp -----------------------------

constexpr int kTile = 32;
constexpr int kChunk = 64;           // of d in shared memory at a time
constexpr int kStride = kChunk + 2;  // 8 rows are 16 banks apart: two half-warps never conflict

template <typename W>
GSF_GLOBAL void GSF_BOUNDS(kThreads) encode_tile(EncodeArgs a) {
  GSF_SHARED float xs[kTile][kStride], ws[kTile][kStride];
  GSF_SHARED float zs[kTile][kTile + 1];
  const int64_t blocks = (a.T + kTile - 1) / kTile;  // tokens vary fastest: weights are read from L2
  const int64_t t0 = block() % blocks * kTile, word = block() / blocks, f0 = word * 32;
  const W* w = static_cast<const W*>(a.w);
  const int group = thread() / 16, j = thread() % 16;
  const int tt = group / 4 * 8, ff = group % 4 * 8;

  float acc[8][8] = {};
  for (int64_t k0 = 0; k0 < a.d; k0 += kChunk) {
    for (int i = thread(); i < kTile * kChunk; i += kThreads) {
      const int r = i / kChunk, c = i % kChunk;
      const bool inside = k0 + c < a.d;
      xs[r][c] = inside && t0 + r < a.T ? a.x[(t0 + r) * a.d + k0 + c] : 0.0f;
      ws[r][c] = inside && f0 + r < a.F ? widened(w[(f0 + r) * a.d + k0 + c]) : 0.0f;
    }
    sync_block();  // the chunk is complete before it is read
    for (int k = 0; k < kChunk && k0 + k < a.d; k += 16) {
      float xk[8], wk[8];
      for (int i = 0; i < 8; ++i) xk[i] = xs[tt + i][k + j];
      for (int i = 0; i < 8; ++i) wk[i] = ws[ff + i][k + j];
#pragma unroll
      for (int p = 0; p < 8; ++p) {
#pragma unroll
        for (int q = 0; q < 8; ++q) acc[p][q] = fma_rn(xk[p], wk[q], acc[p][q]);
      }
    }
    sync_block();  // all threads have read it before the next chunk overwrites it
  }

#pragma unroll
  for (int p = 0; p < 8; ++p) {
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      float v = acc[p][q];
      for (int half = 8; half > 0; half /= 2) v = add_rn(v, shuffle_xor(v, half));
      // every lane of the half-warp has the sum; one of them stores it
      if (j == (p * 8 + q) % 16) zs[tt + p][ff + q] = v;
    }
  }
  sync_block();  // the dots of a token's word come from four half-warps
  for (int r = warp(); r < kTile; r += kWarps) {
    const int64_t f = f0 + lane();
    const float z = add_rn(zs[r][lane()], f < a.F ? a.bias[f] : 0.0f);
    if (t0 + r < a.T) write_word(a, t0 + r, word, z);
  }
}

// ---- few tokens: every weight is read once, straight into registers ---------------------------------------

constexpr int kRows =
    kThreads / 4;  // features of a block, four threads each: 16 bytes of a row a thread and step

template <typename E>
struct alignas(4 * sizeof(E)) Four {
  E v[4];
};

// Four consecutive elements, zero beyond the end; one load where rows are multiples of four.
template <bool ALIGNED, typename E>
GSF_DEVICE void load4(const E* p, int64_t left, float* out) {
  if (ALIGNED) {
    const Four<E> four = *reinterpret_cast<const Four<E>*>(p);
    for (int i = 0; i < 4; ++i) out[i] = widened(four.v[i]);
  } else {
    for (int i = 0; i < 4; ++i) out[i] = i < left ? widened(p[i]) : 0.0f;
  }
}

template <int TT, bool ALIGNED, typename W>
GSF_GLOBAL void GSF_BOUNDS(kThreads) encode_few(EncodeArgs a) {
  GSF_SHARED float zs[TT][kRows];
  const int row = thread() / 4, quad = thread() % 4;
  const int64_t f0 = block() * kRows, f = f0 + row;
  const int64_t safe =
      f < a.F ? f : a.F - 1;  // an invalid row repeats the last one, because shuffles need all lanes
  const W* w = static_cast<const W*>(a.w) + safe * a.d;

  float acc[TT][4] = {};  // lanes 4 * quad + i of each token's 16
  // steps whose loads are in flight together: 64 bytes per thread for one token, fewer when 128 registers are
  // full
  [[maybe_unused]] constexpr int kAhead = TT == 1 ? 4 : (TT == 4 ? 2 : 1);
#pragma unroll kAhead
  for (int64_t k = quad * 4; k < a.d; k += 16) {
    float wk[4];
    load4<ALIGNED>(w + k, a.d - k, wk);
    for (int t = 0; t < TT; ++t) {
      float xk[4];
      load4<ALIGNED>(a.x + (t < a.T ? t : 0) * a.d + k, a.d - k, xk);
      for (int i = 0; i < 4; ++i) acc[t][i] = fma_rn(xk[i], wk[i], acc[t][i]);
    }
  }
  for (int t = 0; t < TT; ++t) {
    for (int i = 0; i < 4; ++i) {
      acc[t][i] = add_rn(acc[t][i], shuffle_xor(acc[t][i], 2));  // lane + 8
      acc[t][i] = add_rn(acc[t][i], shuffle_xor(acc[t][i], 1));  // lane + 4
    }
    const float z = add_rn(add_rn(acc[t][0], acc[t][2]), add_rn(acc[t][1], acc[t][3]));
    if (quad == 0) zs[t][row] = add_rn(z, a.bias[safe]);
  }
  sync_block();  // a word's 32 dots come from four warps
  for (int i = warp(); i < TT * kRows / 32; i += kWarps) {
    const int t = i / (kRows / 32), part = i % (kRows / 32);
    const int64_t word = f0 / 32 + part;
    const float z = zs[t][part * 32 + lane()];
    if (t < a.T && word < a.words) write_word(a, t, word, z);
  }
}

// ---- which kernel is used for which shape ----------------------------------------------------------------

// Above, a tile of 32 tokens is at worst half idle and still takes no longer than loading the weights.
constexpr int64_t kFewTokens = 8;

template <bool ALIGNED, typename W>
static void launch_few(const Launcher& launch, const EncodeArgs& a) {
  const int64_t blocks = (a.F + kRows - 1) / kRows;
  if (a.T == 1) return launch(encode_few<1, ALIGNED, W>, blocks, a);
  if (a.T <= 4) return launch(encode_few<4, ALIGNED, W>, blocks, a);
  launch(encode_few<8, ALIGNED, W>, blocks, a);
}

template <typename W>
static void launch_encode(const Launcher& launch, const EncodeArgs& a) {
  if (a.T > kFewTokens) return launch(encode_tile<W>, (a.T + kTile - 1) / kTile * a.words, a);
  // 16-byte loads need rows that begin on 16 bytes
  const bool aligned = a.d % 4 == 0 && reinterpret_cast<uintptr_t>(a.x) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(a.w) % (4 * sizeof(W)) == 0;
  aligned ? launch_few<true, W>(launch, a) : launch_few<false, W>(launch, a);
}

void encode_words(const Launcher& launch, const EncodeArgs& a, Dtype w) {
  if (a.T == 0 || a.F == 0) return;
  if (w == Dtype::f32) launch_encode<float>(launch, a);
  if (w == Dtype::bf16) launch_encode<BF16>(launch, a);
  if (w == Dtype::f16) launch_encode<F16>(launch, a);
}

}  // namespace gsf::cuda
