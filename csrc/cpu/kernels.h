// Arguments and results of the kernel bodies: raw pointers and sizes.  Every body is compiled once per
// instruction set (isa_*.cpp) and called through one table; threads, checks and tensors are one layer up
// (ops_*.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/planes.h"
#include "cpu/screen_terms.h"

namespace gsf {

// Features per chunk, the unit of work of a thread: 64 rows of 2304 fp32 are 590 KB, which stay in a 1 MiB L2
// while the tokens are processed; with few tokens each row is read only once anyway.
constexpr int64_t kChunkFeatures = 64;
// With AMX a chunk has up to this many, so that the tokens' digits are read for fewer chunks
// (ops_screen.cpp).
constexpr int64_t kMostChunk = 8 * kChunkFeatures;

// Element types of stored weights and activations.
enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };

// One (token, feature) pair that fired or is within the bandwidth.
struct Hit {
  int32_t token;
  int32_t feature;
  float value;
};
static_assert(sizeof(Hit) == 12, "hits are appended as 12 packed bytes");

// An append-only buffer.  Bodies write through `at` after reserving room. The function that grows it belongs
// to the layer above, so that no library template is compiled with a body's target options.
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
  float half_bandwidth;  // 0: only what fires; else also the pairs with |z - threshold| < half_bandwidth
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

// Maximum number of blocks that one step of the matryoshka kernel unpacks at a time.
constexpr int kMatryoshkaBlocks = 3;

// Up to 16 tokens processed together; `width` is 1, 4, 8 or 16, with zeros after the last token.
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
  const int64_t* over_crow;  // [out+1] or null: codes that are one above those in the planes
  const int32_t* over_col;
  const MatryoshkaTile* tiles;                          // [tile_count]
  const float* s;                                       // [T], the tokens' scales; exact: null
  float* y;                                             // [T][out]
  int64_t out, units, groups, group_units, tile_count;  // units of 32 columns; group_units of them a group
  Dtype scale_dtype;
  int stored, bits, top;  // top: the largest code after rounding
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

// Loops that measure the machine, and the number of multiply-adds in one of their steps.
struct RoofLoops {
  uint64_t (*read)(const uint8_t* p, int64_t bytes);   // bytes: a multiple of 512
  float (*fma)(int64_t steps, const float* zeros);     // zeros: [fma_a_step], where the sums start
  int64_t (*int8)(int64_t steps, const float* zeros);  // zeros: [fma_a_step]
  int64_t fma_a_step, int8_a_step;
};

// ---- the certified screen (docs/how/screen.md names every quantity) ----

// First byte of a row; its column k is at offset (k / 64) * 256 + k % 64.
inline int64_t tile_offset(int64_t row, int64_t width) {
  return row / kTileRows * kTileRows * width + row % kTileRows * kTileColumns;
}

// First byte of a token's first digits. With both digits, a tile has the first digits of two tokens, followed
// by their second digits.
inline int64_t digits_offset(int64_t token, int64_t width, bool both) {
  return both ? token / 2 * kTileRows * width + token % 2 * kTileColumns : tile_offset(token, width);
}

// Number of tokens side by side in the lanes of a vector.
constexpr int64_t kLaneTokens = 16;
// A tile with one digit of this many tokens.
constexpr int64_t kAmxTileBytes = 1024;

// One token in the form used by the screen.  r = x - mu minus its part along the directions is about
// t q1 + (t / 256) q2.
struct ScreenToken {
  float t;               // scale of the first digit
  float reach, error;    // R and E with only the first digit
  float reach2, error2;  // R and E with both
  float floor;           // an upper bound must exceed this
  int32_t sum, sum2;     // of the digits
  int32_t fits;          // 0: the token skips the screen
};

// A token's value in a plane up to kTokenError, for the first digit alone or for both.
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
  const float* per_scale;   // [d] or null: the inverse of ScreenRowArgs::scale
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
  const void* w;              // [F][d] of w_dtype: the rows for exact products
  const float* mu;            // [d] or null
  const float* scale;         // [d] or null: powers of two >= 1 that scale the rows' columns
  const float* per_scale;     // [d] or null: their inverses
  const float* bias;          // [F]
  const float* threshold;     // [F]
  const float* directions;    // [k][d]
  const uint8_t* given;       // [F][d] or null: a code made elsewhere, used instead of the rows' own
  const float* given_scale;   // [F] with it
  const uint8_t* given_zero;  // [F] with it
  uint8_t* code;              // [F/4][width/64][4][64]
  uint8_t* code2;             // the same or null
  float* table;               // [kScreenRows + k][stride]
  int64_t d, width, stride, k;
  Dtype w_dtype;
};

// A pair that the screen could not discard, with its integer dots, and later the estimate.
struct Candidate {
  int32_t token, feature;
  int32_t n1, n2;  // (code - zero) . q1 and, where both digits were read, (code - zero) . q2
  double z, bound;
};

// Appended to like a HitSink; begin is stored with it, because the buffer may move.
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
  EncodeArgs encode;  // only the screened tokens; `ids` says which they are
  const int8_t* q1;   // [T/4][width/64][4][64]; with `both` the rows of a tile are the first digits of two
  const int8_t* q2;   // tokens and then their second digits, and q2 is null
  const ScreenToken* tokens;  // [T]
  const float* along;         // [T][k] coefficients along the directions
  const float* lanes;         // [kTokenPlanes + k][lane_stride][4]: a token's numbers (TokenPlane) and its
                              // coefficients, four times each
  int64_t lane_stride;        // tokens in a plane of `lanes`: T rounded up to an odd number of fours
  const uint8_t* code;        // [F/4][width/64][4][64]
  const uint8_t* code2;       // the same or null: no second digit
  const float* table;         // [kScreenRows + k][stride]
  const int8_t* packed;  // [T/16][width/64][1, or 2 digits with `both`][16][64], one token per lane, or null
  const float* packed_lanes;  // [T/16][kPackedPlanes + k][16]: TokenPlane, and coefficients
  int64_t width, stride, k;
  bool both;      // the first stage reads both digits of the activations
  bool adaptive;  // read the second digit of the rows only if that is faster; otherwise whenever there is one
  bool ranked;    // a token's `floor` is used instead of the features' thresholds, none of which is above 0
  bool mapped;    // rows may come from a disk: the second digit is read whenever there is one, and the
                  // remaining pairs are sorted by row
};

// What the screen left over of a chunk.
struct CandidateSpan {
  const Candidate *begin, *end;
};

struct ScreenStats {
  int64_t survivors;   // pairs that the first stage left
  int64_t looked;      // how many of them the tokens' second digits were read for
  int64_t looked_out;  // how many of these that discarded
  int64_t undecided;   // remaining ones that the rows' second digit was read for
  int64_t discarded;   // how many of these that discarded
  int64_t refined;     // pairs whose row was read in full precision
  int64_t violations;  // exact pairs outside their bound: the screen was built from other rows
};

// One table per instruction set.
struct Kernels {
  // Features [f0, f1) of all tokens; hits of one token are appended in ascending order of the feature.
  void (*encode)(const EncodeArgs&, int64_t f0, int64_t f1, HitSink&);
  // Rows [n0, n1) and output columns [d0, d1).
  void (*decode)(const DecodeArgs&, int64_t n0, int64_t n1, int64_t d0, int64_t d1);
  // Rows [n0, n1).
  void (*sampled_dot)(const SampledDotArgs&, int64_t n0, int64_t n1);
  // The pairs of features [f0, f1) and all tokens that the screen cannot discard; they are stored in `space`,
  // which is overwritten.  A token's features are ascending.
  CandidateSpan (*screen_pairs)(const ScreenArgs&, int64_t f0, int64_t f1, CandidateSink& space,
                                ScreenStats&);
  // Computes them in full precision; hits come in the order of the pairs.
  void (*refine_pairs)(const ScreenArgs&, CandidateSpan, ScreenStats&, HitSink&);
  void (*screen_token)(const ScreenTokenArgs&);
  // Sixteen tokens for `packed` and `packed_lanes`; null without AVX-512.  With `both`, for AMX.
  void (*screen_pack)(const ScreenArgs&, int64_t block, int8_t* digits, float* lanes);
  bool has_amx;
  // Rows [f0, f1).
  void (*screen_rows)(const ScreenRowArgs&, int64_t f0, int64_t f1, float* space);
  // Blocks [b0, b1) of 16 rows for all tokens; raw: space for unpacked codes,
  // [kMatryoshkaBlocks][units][8][64], or null if T <= 4, not exact and without overflow.
  void (*matryoshka)(const MatryoshkaArgs&, int64_t b0, int64_t b1, uint8_t* raw);
  // One token's int8 codes.
  void (*matryoshka_quantize)(const MatryoshkaToken&);
  RoofLoops roof;
};

const Kernels& kernels(Isa isa);
inline const Kernels& kernels() { return kernels(current_isa()); }

}  // namespace gsf
