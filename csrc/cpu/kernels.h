// What the kernel bodies take and give: raw pointers and sizes.  Every body is compiled once per instruction
// set (isa_*.cpp) and reached through one table; threads, checks and tensors live one layer up (ops_*.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"

namespace gsf {

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

// One table per instruction set.
struct Kernels {
  // Features [f0, f1) of all tokens; hits of one token are appended in ascending order of the feature.
  void (*encode)(const EncodeArgs&, int64_t f0, int64_t f1, HitSink&);
  // Rows [n0, n1) and output columns [d0, d1).
  void (*decode)(const DecodeArgs&, int64_t n0, int64_t n1, int64_t d0, int64_t d1);
  // Rows [n0, n1).
  void (*sampled_dot)(const SampledDotArgs&, int64_t n0, int64_t n1);
  // Blocks [b0, b1) of 16 rows for all tokens; raw: space for one block's codes, [units][8][64].
  void (*matryoshka)(const MatryoshkaArgs&, int64_t b0, int64_t b1, uint8_t* raw);
  // One token's int8 codes.
  void (*matryoshka_quantize)(const MatryoshkaToken&);
  RoofLoops roof;
};

const Kernels& kernels(Isa isa);
inline const Kernels& kernels() { return kernels(current_isa()); }

}  // namespace gsf
