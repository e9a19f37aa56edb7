// What the kernel bodies take and give: raw pointers and sizes.  Every body is compiled once per instruction
// set (isa_*.cpp) and reached through one table; threads, checks and tensors live one layer up (ops_*.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/planes.h"
#include "cpu/screen_terms.h"

namespace gsf {

// Features of a chunk, the unit that a worker draws: 64 rows of 2304 fp32 are 590 KB, which stays in a 1 MiB
// L2 while the tokens pass; with few tokens each row is read once anyway.
constexpr int64_t kChunkFeatures = 64;
// Where AMX multiplies a chunk has up to so many: the tokens' digits then pass by fewer chunks
// (ops_screen.cpp).
constexpr int64_t kMostChunk = 8 * kChunkFeatures;

// Element types of weights and activations as they lie in memory.
enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };

// One (token, feature) pair that fired, or lies within the bandwidth.
struct Hit {
  int32_t token;
  int32_t feature;
  float value;
};
static_assert(sizeof(Hit) == 12, "hits are appended as 12 packed bytes");

// An append-only buffer.  Bodies write through `at` after making sure of the room; growing is a function of
// the layer above, so that no library template is ever compiled with a body's target options.
struct HitSink {
  Hit* begin = nullptr;
  Hit* at = nullptr;
  Hit* end = nullptr;
  void* owner = nullptr;
  void (*grow)(HitSink&, size_t) = nullptr;

  void reserve(size_t n) {
    if (static_cast<size_t>(end - at) < n) grow(*this, n);
  }
  void push(int64_t token, int64_t feature, float value) {
    *at++ = Hit{static_cast<int32_t>(token), static_cast<int32_t>(feature), value};
  }
};

struct EncodeArgs {
  const float* x;          // [T][d], widened
  const void* w;           // [F][d] of w_dtype
  const float* bias;       // [F]
  const float* threshold;  // [F], finite
  int64_t T, F, d;
  Dtype w_dtype;
  float half_bandwidth;  // 0: only what fires; else the pairs with |z - threshold| < half_bandwidth too
  const int32_t* ids;    // [T] the tokens' numbers in the hits, or null: 0 ... T - 1
};

struct DecodeArgs {
  const int64_t* crow;     // [N+1]
  const int32_t* col;      // [nnz], ascending within a row, < F
  const float* values;     // [nnz]
  const void* w;           // [F][d] of w_dtype
  const float* row_scale;  // [F] or null; multiplies the value first
  const float* bias;       // [d] or null, added last
  float* out;              // [N][d]
  int64_t d;
  Dtype w_dtype;
};

struct SampledDotArgs {
  const float* x;       // [N][d], widened
  const void* w;        // [F][d] of w_dtype
  const float* bias;    // [F] or null, added last
  const int64_t* crow;  // [N+1]
  const int32_t* col;   // [nnz]
  float* out;           // [nnz]
  int64_t d;
  Dtype w_dtype;
};

// Most blocks that one step of the matryoshka kernel unpacks at once.
constexpr int kMatryoshkaBlocks = 3;

// Up to 16 tokens that pass together; `width` of 1, 4, 8 or 16 with zeros after the last.
struct MatryoshkaTile {
  const int8_t* q;      // [in/4][width][4]; exact: null
  const int32_t* qsum;  // [groups][width]; exact: null
  const float* x;       // exact: [in][width]; else null
  int64_t first;        // the tile's first token
  int width, tokens;
};

struct MatryoshkaArgs {
  const uint8_t* planes[5];  // [out/16][units][64 * width of the plane], as `stored` says
  const void* scale;         // [out/16][groups][16] of scale_dtype, f32 or f16
  const uint8_t* zero;       // [out/16][groups][16]
  const float* bias;         // [out] or null
  const int64_t* over_crow;  // [out+1] or null: codes that are one above what the planes say
  const int32_t* over_col;
  const MatryoshkaTile* tiles;                          // [tile_count]
  const float* s;                                       // [T], the tokens' scales; exact: null
  float* y;                                             // [T][out]
  int64_t out, units, groups, group_units, tile_count;  // units of 32 columns; group_units of them a group
  Dtype scale_dtype;
  int stored, bits, top;  // top: the greatest code after rounding
  bool rounds, exact;
  float mid;  // what the slice adds on the 8-bit grid
};

struct MatryoshkaToken {
  const float* row;  // [d], centred
  int8_t* codes;     // [padded], space
  int8_t* tile;      // [padded/4][width][4] from this token's slot
  int32_t* qsum;     // [groups][width] from this token's slot
  float* s;
  int64_t d, padded, group, width;
};

// Loops that measure the machine, and the multiply-adds of one of their steps.
struct RoofLoops {
  uint64_t (*read)(const uint8_t* p, int64_t bytes);   // bytes: a multiple of 512
  float (*fma)(int64_t steps, const float* zeros);     // zeros: [fma_a_step], where the sums start
  int64_t (*int8)(int64_t steps, const float* zeros);  // zeros: [fma_a_step]
  int64_t fma_a_step, int8_a_step;
};

// ---- the certified screen (docs/how/screen.md names every quantity) ----

// First byte of a row; column k of it is (k / 64) * 256 + k % 64 further on.
inline int64_t tile_offset(int64_t row, int64_t width) {
  return row / kTileRows * kTileRows * width + row % kTileRows * kTileColumns;
}

// First byte of a token's first digits: with both digits a tile holds those of two tokens and then their
// second ones.
inline int64_t digits_offset(int64_t token, int64_t width, bool both) {
  return both ? token / 2 * kTileRows * width + token % 2 * kTileColumns : tile_offset(token, width);
}

// Tokens that lie side by side in the lanes of a vector.
constexpr int64_t kLaneTokens = 16;
// A tile of one digit of so many tokens.
constexpr int64_t kAmxTileBytes = 1024;

// One token as the screen sees it.  r = x - mu less its part along the directions is about t q1 + (t / 256)
// q2.
struct ScreenToken {
  float t;               // scale of the first digit
  float reach, error;    // R and E with the first digit alone
  float reach2, error2;  // R and E with both
  float floor;           // what an upper bound must exceed
  int32_t sum, sum2;     // of the digits
  int32_t fits;          // 0: the token skips the screen
};

// A token's number of a plane up to kTokenError, of the first digit alone or of both.
inline float token_number(const ScreenToken& token, TokenPlane plane, bool both) {
  switch (plane) {
    case kUnit:
      return both ? token.t * static_cast<float>(kDigit2) : token.t;
    case kReach:
      return both ? token.reach2 : token.reach;
    case kFloor:
      return token.floor;
    default:
      return both ? token.error2 : token.error;
  }
}

struct ScreenTokenArgs {
  const float* x;           // [d]
  const float* mu;          // [d] or null
  const float* per_scale;   // [d] or null: what ScreenRowArgs::scale is the inverse of
  const float* directions;  // [k][d]
  int8_t* q1;               // [width] in a tile, zeros after d
  int8_t* q2;               // [width] in a tile
  float* along;             // [k], the token's coefficients
  ScreenToken* out;
  float* space;  // [width]
  int64_t d, width, k;
  double frobenius;  // norm of the directions, rounded up
};

struct ScreenRowArgs {
  const void* w;              // [F][d] of w_dtype: the rows that refine
  const float* mu;            // [d] or null
  const float* scale;         // [d] or null: powers of two from 1 up, of the rows' columns
  const float* per_scale;     // [d] or null: their inverses
  const float* bias;          // [F]
  const float* threshold;     // [F]
  const float* directions;    // [k][d]
  const uint8_t* given;       // [F][d] or null: a code that was made elsewhere, instead of the rows' own
  const float* given_scale;   // [F] with it
  const uint8_t* given_zero;  // [F] with it
  uint8_t* code;              // [F/4][width/64][4][64]
  uint8_t* code2;             // the same or null
  float* table;               // [kScreenRows + k][stride]
  int64_t d, width, stride, k;
  Dtype w_dtype;
};

// A pair that the screen could not discard, with the integers that said so, and then the estimate.
struct Candidate {
  int32_t token, feature;
  int32_t n1, n2;  // (code - zero) . q1 and, where both digits were read, (code - zero) . q2
  double z, bound;
};

// Appended to like a HitSink; begin stays with it, since the buffer may move.
struct CandidateSink {
  Candidate* begin = nullptr;
  Candidate* at = nullptr;
  Candidate* end = nullptr;
  void* owner = nullptr;
  void (*grow)(CandidateSink&, size_t) = nullptr;

  void reserve(size_t n) {
    if (static_cast<size_t>(end - at) < n) grow(*this, n);
  }
};

struct ScreenArgs {
  EncodeArgs encode;  // the screened tokens alone; `ids` says which they are
  const int8_t* q1;   // [T/4][width/64][4][64]; with `both` the rows of a tile are the first digits of two
  const int8_t* q2;   // tokens and then their second ones, and q2 is null
  const ScreenToken* tokens;  // [T]
  const float* along;         // [T][k] coefficients along the directions
  const float* lanes;         // [kTokenPlanes + k][lane_stride][4]: a token's numbers (TokenPlane) and its
                              // coefficients, four times each
  int64_t lane_stride;        // tokens of a plane of `lanes`: T rounded up to an odd number of fours
  const uint8_t* code;        // [F/4][width/64][4][64]
  const uint8_t* code2;       // the same or null: no second digit
  const float* table;         // [kScreenRows + k][stride]
  const int8_t* packed;  // [T/16][width/64][1 or with `both` 2 digits][16][64] with a token a lane, or null
  const float* packed_lanes;  // [T/16][kPackedPlanes + k][16]: TokenPlane, and coefficients
  int64_t width, stride, k;
  bool both;      // the first stage reads both digits of the activations
  bool adaptive;  // the second digit of the rows is read where it pays; otherwise wherever there is one
  bool ranked;    // a token's `floor` stands for the features' thresholds, of which none is above 0
  bool mapped;    // rows may come from a disk: the second digit is read wherever there is one, and what is
                  // left comes sorted by row
};

// What the screen left of a chunk.
struct CandidateSpan {
  const Candidate *begin, *end;
};

struct ScreenStats {
  int64_t survivors;   // pairs that the first stage left
  int64_t looked;      // those of them that the tokens' second digits looked at
  int64_t looked_out;  // and those of these that they discarded
  int64_t undecided;   // those left that the rows' second digit looked at
  int64_t discarded;   // and those of these that it discarded
  int64_t refined;     // pairs whose row was read in full precision
  int64_t violations;  // refined pairs outside their bound: the rows are not those the screen was built from
};

// One table per instruction set.
struct Kernels {
  // Features [f0, f1) of all tokens; hits of one token are appended in ascending order of the feature.
  void (*encode)(const EncodeArgs&, int64_t f0, int64_t f1, HitSink&);
  // Rows [n0, n1) and output columns [d0, d1).
  void (*decode)(const DecodeArgs&, int64_t n0, int64_t n1, int64_t d0, int64_t d1);
  // Rows [n0, n1).
  void (*sampled_dot)(const SampledDotArgs&, int64_t n0, int64_t n1);
  // The pairs of features [f0, f1) and all tokens that the screen cannot discard; they lie in `space`, which
  // is overwritten.  A token's features ascend.
  CandidateSpan (*screen_pairs)(const ScreenArgs&, int64_t f0, int64_t f1, CandidateSink& space,
                                ScreenStats&);
  // Full precision for them; hits come in the order of the pairs.
  void (*refine_pairs)(const ScreenArgs&, CandidateSpan, ScreenStats&, HitSink&);
  void (*screen_token)(const ScreenTokenArgs&);
  // Sixteen tokens for `packed` and `packed_lanes`; null where there is no AVX-512.  With `both` AMX takes
  // them.
  void (*screen_pack)(const ScreenArgs&, int64_t block, int8_t* digits, float* lanes);
  bool has_amx;
  // Rows [f0, f1).
  void (*screen_rows)(const ScreenRowArgs&, int64_t f0, int64_t f1, float* space);
  // Blocks [b0, b1) of 16 rows for all tokens; raw: space for unpacked codes,
  // [kMatryoshkaBlocks][units][8][64], or null where T <= 4, not exact and without overflow.
  void (*matryoshka)(const MatryoshkaArgs&, int64_t b0, int64_t b1, uint8_t* raw);
  // One token's int8 codes.
  void (*matryoshka_quantize)(const MatryoshkaToken&);
  RoofLoops roof;
};

const Kernels& kernels(Isa isa);
inline const Kernels& kernels() { return kernels(current_isa()); }

}  // namespace gsf
