// y = A(x - mean) . W_r^T + bias for nested codes in bit planes (quant/planes.py), for few tokens, in two
// launches: one rounds the tokens to int8, the other reads every plane byte once.
//
// Why CUDA and not Triton: a 32-bit word of a plane has the bits of four columns of one row for eight (or
// four) quads of columns. Shifted and masked, it is directly an operand of dp4a.  Planes are loaded with
// 128-bit loads into registers.  A Triton tile for tensor cores must first be permuted through shared memory,
// and it computes 16 tokens even if there is one.
#include "cuda/block.h"
#include "cuda/intrin.h"
#include "cuda/kernels.h"

namespace gsf::cuda {

// ---- tokens to int8: q = round(v / s), s = max|v| / 127 --------------------------------------------------

GSF_DEVICE float centred(const TokensArgs& a, int64_t t, int64_t k) {
  if (k >= a.d) return 0.0f;
  return a.mean ? add_rn(a.x[t * a.d + k], -a.mean[k]) : a.x[t * a.d + k];
}

// Maximum over the block, the same in every thread.
GSF_DEVICE float block_max(float v, float* part) {
  for (int half = 16; half > 0; half /= 2) {
    const float other = shuffle_xor(v, half);
    v = other > v ? other : v;
  }
  if (lane() == 0) part[warp()] = v;
  sync_block();  // all parts are written
  for (int i = 0; i < kWarps; ++i) v = part[i] > v ? part[i] : v;
  return v;
}

// A block: one token.
GSF_GLOBAL void GSF_BOUNDS(kThreads) round_token(TokensArgs a) {
  GSF_SHARED float parts[kWarps];
  const float kInfinity = 2.0f * 3.40282347e+38f, kTiny = 1.17549435e-38f;
  const int64_t t = block(), words = a.units * 8;
  float most = 0.0f;
  for (int64_t k = thread(); k < a.d; k += kThreads) {
    const float v = centred(a, t, k), size = v < 0.0f ? -v : v;
    // comparisons with NaN are false, so count it as infinity
    most = size <= most ? most : (size < kInfinity ? size : kInfinity);
  }
  most = block_max(most, parts);
  const bool finite = most < kInfinity;
  const float exact = div_rn(most, 127.0f), s = exact > kTiny ? exact : kTiny;
  int32_t* q = a.q + t * words;
  for (int64_t w = thread(); w < words; w += kThreads) {
    uint32_t word = 0;
    for (int c = 0; c < 4; ++c) {
      float v = finite ? nearest_even(div_rn(centred(a, t, w * 4 + c), s)) : 0.0f;
      v = v > 127.0f ? 127.0f : (v < -127.0f ? -127.0f : v);
      word |= (static_cast<uint32_t>(static_cast<int32_t>(v)) & 255u) << (8 * c);
    }
    q[w] = static_cast<int32_t>(word);
  }
  if (thread() == 0) a.s[t] = finite ? s : quiet_nan();
  sync_block();  // the codes are written before other threads add them up
  for (int64_t g = warp(); g < a.groups; g += kWarps) {
    const int64_t end = (g + 1) * a.group_units * 8, last = end < words ? end : words;
    int32_t sum = 0;
    for (int64_t w = g * a.group_units * 8 + lane(); w < last; w += 32) sum = dot4(0x01010101u, q[w], sum);
    for (int half = 16; half > 0; half /= 2) sum += shuffle_xor(sum, half);
    if (lane() == 0) a.qsum[t * a.groups + g] = sum;
  }
}

void round_tokens(const Launcher& launch, const TokensArgs& a) {
  if (a.T > 0) launch(round_token, a.T, a);
}

// ---- the product -----------------------------------------------------------------------------------------

struct alignas(16) Word4 {
  uint32_t v[4];  // of four rows
};

GSF_DEVICE Word4 load_words(const void* p) { return *static_cast<const Word4*>(p); }

GSF_BOTH constexpr uint32_t in_bytes(int mask) { return 0x01010101u * static_cast<uint32_t>(mask); }

// Shift right by S bits, left if S is negative.
template <int S>
GSF_DEVICE uint32_t moved(uint32_t word) {
  if constexpr (S >= 0) return word >> S;
  if constexpr (S < 0) return word << -S;
}

// The bits of quad J in plane P, at their position in the code; other bits are masked off.
template <int R, int P, int J>
GSF_DEVICE uint32_t field(const uint32_t (&plane)[5][2]) {
  constexpr int width = plane_width(R, P), low = plane_low(R, P), from = width == 2 ? 2 * (J % 4) : J;
  return moved<from - low>(plane[P][width == 2 ? J / 4 : 0]) & in_bytes(((1 << width) - 1) << low);
}

// Four columns' codes of one row.  pairs: planes 1 and 2 combined, for the even and for the odd
// quads.
template <int R, int J>
GSF_DEVICE uint32_t quad(const uint32_t (&plane)[5][2], const uint32_t (&pairs)[2]) {
  uint32_t code = field<R, 0, J>(plane);
  if constexpr (R == 3) code |= field<R, 1, J>(plane);
  if constexpr (R >= 4) {
    constexpr int low = plane_low(R, 2);
    code |= moved<J / 2 * 2 - low>(pairs[J % 2]) & in_bytes(3 << low);
  }
  if constexpr (R >= 6) code |= field<R, 3, J>(plane);
  if constexpr (R == 8) code |= field<R, 4, J>(plane);
  return code;
}

// Bits below the slice are dropped, or rounded once: (c + 2^(d-1)) >> d = ((c >> (d-1)) + 1) >> 1, in each
// byte.
GSF_DEVICE uint32_t resliced(const MatryoshkaArgs& a, uint32_t code) {
  const int drop = a.stored - a.bits, first = a.rounds ? drop - 1 : drop;
  const uint32_t c = code >> first & in_bytes(255 >> first);
  if (!a.rounds) return c;
  return min_bytes((c >> 1 & in_bytes(127)) + (c & in_bytes(1)), in_bytes(a.top));
}

template <int R, int TT, int J>
GSF_DEVICE void add_quads(const MatryoshkaArgs& a, const uint32_t (&plane)[5][2], const uint32_t (&pairs)[2],
                          const int32_t (&q)[TT][8], int32_t (&dot)[TT][4], int row) {
  if constexpr (J < 8) {
    uint32_t code = quad<R, J>(plane, pairs);
    if (a.stored > a.bits) code = resliced(a, code);
#pragma unroll
    for (int t = 0; t < TT; ++t) dot[t][row] = dot4(code, q[t][J], dot[t][row]);
    add_quads<R, TT, J + 1>(a, plane, pairs, q, dot, row);
  }
}

// A unit's 32 columns times rows first ... first + 3 of a block, for TT tokens.
template <int R, int TT>
GSF_DEVICE void add_unit(const MatryoshkaArgs& a, int64_t tile, int64_t u, int first, int64_t t0,
                         int32_t (&dot)[TT][4]) {
  Word4 words[5][2];
#pragma unroll
  for (int p = 0; p < plane_count(R); ++p) {
#pragma unroll
    for (int v = 0; v < plane_width(R, p); ++v) {
      words[p][v] = load_words(a.planes[p] + (tile * plane_width(R, p) + v) * 64 + first * 4);
    }
  }
  int32_t q[TT][8];
#pragma unroll
  for (int t = 0; t < TT; ++t) {
    // an invalid token repeats the last one
    const int64_t token = t0 + t < a.T ? t0 + t : a.T - 1;
    const int32_t* from = a.q + (token * a.units + u) * 8;
    const Word4 low = load_words(from), high = load_words(from + 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      q[t][j] = static_cast<int32_t>(low.v[j]);
      q[t][4 + j] = static_cast<int32_t>(high.v[j]);
    }
  }
#pragma unroll
  for (int row = 0; row < 4; ++row) {
    uint32_t plane[5][2] = {}, pairs[2] = {};
#pragma unroll
    for (int p = 0; p < plane_count(R); ++p) {
#pragma unroll
      for (int v = 0; v < plane_width(R, p); ++v) plane[p][v] = words[p][v].v[row];
    }
    if constexpr (R >= 4) {
      const uint32_t high = plane[1][0], low = plane[2][0];
      pairs[0] = (high << 1 & in_bytes(0xAA)) | (low & in_bytes(0x55));
      pairs[1] = (high & in_bytes(0xAA)) | (low >> 1 & in_bytes(0x55));
    }
    add_quads<R, TT, 0>(a, plane, pairs, q, dot, row);
  }
}

GSF_DEVICE float alpha_of(const MatryoshkaArgs& a, int64_t at) {
  if (a.half_scale) return widened(static_cast<const F16*>(a.scale)[at]);
  return static_cast<const float*>(a.scale)[at];
}

// Adds a group's integer dot to the sum like the native kernel: one rounding per step, in the same order.
GSF_DEVICE float end_group(const MatryoshkaArgs& a, int64_t at, int32_t qsum, int32_t dot, float acc) {
  const float alpha = alpha_of(a, at), sum = static_cast<float>(qsum);
  const int32_t zero = a.zero[at], step = 1 << (8 - a.bits);
  if (a.group_units > 16) {
    // above 512 weights, the products and the zero point's part would cancel in fp32
    const float whole = static_cast<float>(dot * step - zero * qsum);
    return fma_rn(alpha, add_rn(whole, mul_rn(a.mid, sum)), acc);
  }
  acc = fma_rn(mul_rn(alpha, static_cast<float>(step)), static_cast<float>(dot), acc);
  return fma_rn(mul_rn(alpha, add_rn(a.mid, -static_cast<float>(zero))), sum, acc);
}

// What one thread completes: a row and a token, with groups in ascending order.
struct Finish {
  int64_t at, token, group, end;  // of the scale; the current group and its last unit
  int32_t dot;
  float acc;
};

GSF_DEVICE void add_part(const MatryoshkaArgs& a, Finish& f, int32_t part, int64_t units) {
  f.dot += part;
  if (units < f.end) return;
  f.acc = end_group(a, f.at + f.group * 16, a.qsum[f.token * a.groups + f.group], f.dot, f.acc);
  f.dot = 0;
  ++f.group;
  f.end = f.end + a.group_units < a.units ? f.end + a.group_units : a.units;
}

constexpr int kUnits =
    kWarps * 8;  // units per stage: a thread takes one unit of four rows, four threads its block

// A block: 16 rows and TT tokens.  WHOLE: one group a row, whose dots stay in registers until the end;
// otherwise the units' dots go through shared memory and are added group by group.
template <int R, int TT, bool WHOLE>
GSF_GLOBAL void GSF_BOUNDS(kThreads) matryoshka_few(MatryoshkaArgs a) {
  constexpr int kParts = WHOLE ? kWarps : kUnits;
  GSF_SHARED int32_t parts[kParts][TT][16];
  const int64_t tiles =
      (a.T + TT - 1) / TT;  // tokens vary fastest: for all but the first, planes come from L2
  const int64_t rows = block() / tiles, t0 = block() % tiles * TT;
  const int own = warp() * 8 + lane() / 4, first = lane() % 4 * 4;
  const int t = thread() / 16, row = thread() % 16;
  const bool finishes = t < TT && t0 + t < a.T;
  Finish f{rows * a.groups * 16 + row, t0 + t, 0, a.group_units < a.units ? a.group_units : a.units, 0, 0.0f};
  int32_t dot[TT][4] = {};
  for (int64_t u0 = 0; u0 < a.units; u0 += kUnits) {
    const int64_t u = u0 + own;
    if (u < a.units) add_unit<R, TT>(a, rows * a.units + u, u, first, t0, dot);
    if constexpr (!WHOLE) {
      for (int i = 0; i < TT * 4; ++i) {
        parts[own][i / 4][first + i % 4] = dot[i / 4][i % 4];
        dot[i / 4][i % 4] = 0;
      }
      sync_block();  // all dots of a stage are written before they are added
      const int count = static_cast<int>(a.units - u0 < kUnits ? a.units - u0 : kUnits);
      for (int i = 0; finishes && i < count; ++i) add_part(a, f, parts[i][t][row], u0 + i + 1);
      sync_block();  // and added before the next ones overwrite them
    }
  }
  if constexpr (WHOLE) {
    for (int i = 0; i < TT * 4; ++i) {
      int32_t sum = dot[i / 4][i % 4];
      for (int half = 16; half >= 4; half /= 2) sum += shuffle_xor(sum, half);
      if (lane() < 4) parts[warp()][i / 4][first + i % 4] = sum;
    }
    sync_block();  // a row's dot comes from all warps
    for (int i = 0; finishes && i < kWarps; ++i) {
      add_part(a, f, parts[i][t][row], i + 1 < kWarps ? 0 : a.units);
    }
  }
  const int64_t o = rows * 16 + row;
  if (finishes && o < a.out)
    a.y[f.token * a.out + o] = canonical(fma_rn(f.acc, a.s[f.token], a.bias ? a.bias[o] : 0.0f));
}

// ---- which kernel is used for which shape ----------------------------------------------------------------

template <int R, int TT>
static void launch_tokens(const Launcher& launch, const MatryoshkaArgs& a) {
  const int64_t blocks = (a.out + 15) / 16 * ((a.T + TT - 1) / TT);
  if (a.groups == 1) return launch(matryoshka_few<R, TT, true>, blocks, a);
  launch(matryoshka_few<R, TT, false>, blocks, a);
}

template <int R>
static void launch_planes(const Launcher& launch, const MatryoshkaArgs& a) {
  a.T == 1 ? launch_tokens<R, 1>(launch, a) : launch_tokens<R, 4>(launch, a);
}

void matryoshka_rows(const Launcher& launch, const MatryoshkaArgs& a) {
  if (a.T == 0 || a.out == 0) return;
  if (a.stored == 2) launch_planes<2>(launch, a);
  if (a.stored == 3) launch_planes<3>(launch, a);
  if (a.stored == 4) launch_planes<4>(launch, a);
  if (a.stored == 6) launch_planes<6>(launch, a);
  if (a.stored == 8) launch_planes<8>(launch, a);
}

}  // namespace gsf::cuda
