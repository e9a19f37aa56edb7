// Arguments of the CUDA kernels: raw pointers and sizes, passed by value; and the launchers, one per source
// file, which choose the kernel for a shape.  They check nothing and wait for nothing.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/planes.h"
#include "cuda/launcher.h"

namespace gsf::cuda {

constexpr int kSlots = 4;  // values stored per word of 32 features; SLOTS in backends/gpu/encode.py

struct EncodeArgs {
  const float* x;          // [T][d], widened
  const void* w;           // [F][d] of its element type
  const float* bias;       // [F]
  const float* threshold;  // [F], finite
  uint32_t* bitmap;        // [T][words]
  int32_t* count;          // [T][words]
  float* slots;            // [T][words][kSlots]
  int64_t T, F, d, words;
  float half_bandwidth;  // 0: only what fires
};

struct GatherArgs {
  EncodeArgs e;
  const int64_t* total;  // [T * words] inclusive sums of the counts, or null: the kernel sums them itself
  int64_t* crow;         // [T+1]
  int32_t* col;          // [capacity]
  float* values;         // [capacity]
  int64_t capacity;
};

struct DecodeArgs {
  const int64_t* crow;     // [N+1]
  const int32_t* col;      // [nnz], ascending within a row
  const float* values;     // [nnz]
  const void* w;           // [F][d] of its element type
  const float* row_scale;  // [F] or null
  const float* bias;       // [d] or null
  float* out;              // [N][d]
  int64_t N, d, capacity;  // a row that ends beyond the capacity becomes NaN
};

struct SpliceArgs {
  GatherArgs g;             // its latents are written too; total is null
  const float* x;           // [T][d_out], widened, or null: then the reconstruction replaces it
  const void* w;            // [F][d_out] of its element type: the decoder's rows
  const float* bias;        // [d_out]
  const int32_t* features;  // [edits], ascending
  const int32_t* kind;      // [edits]: EditKind
  const float* amount;      // [edits]
  float* out;               // [T][d_out]
  int64_t d_out, edits;
};

enum EditKind : int32_t { kScale = 0, kClamp = 1, kAdd = 2, kMinClamp = 3 };  // as in backends/gpu/loop.py

struct TokensArgs {
  const float* x;     // [T][d], widened
  const float* mean;  // [d] or null
  int32_t* q;         // [T][units * 8], four int8 columns a word, zero beyond d
  float* s;           // [T]; NaN for a token that is not finite, whose codes are 0
  int32_t* qsum;      // [T][groups], sums of a group's codes
  int64_t T, d, units, groups, group_units;
};

struct MatryoshkaArgs {
  const int32_t* q;          // [T][units * 8], 16-byte aligned
  const float* s;            // [T]
  const int32_t* qsum;       // [T][groups]
  const uint8_t* planes[5];  // [blocks][units][64 * width], 16-byte aligned
  const void* scale;         // [blocks][groups][16], fp32, or fp16 where half_scale is set
  const uint8_t* zero;       // [blocks][groups][16]
  const float* bias;         // [out] or null
  float* y;                  // [T][out]
  int64_t T, out, units, groups, group_units;
  int32_t half_scale;
  int32_t stored, bits;  // of the given planes (2, 3, 4, 6 or 8), of the slice
  int32_t rounds;        // bits below the slice are rounded once, up to `top`; else they are dropped
  int32_t top;
  float mid;  // what the mid-rise slice adds on the 8-bit grid
};

void encode_words(const Launcher& launch, const EncodeArgs& a, Dtype w);
void gather_words(const Launcher& launch, const GatherArgs& a, Dtype w);
void decode_rows(const Launcher& launch, const DecodeArgs& a, Dtype w);
// w: of the encoder's rows and of the decoder's
void splice_tokens(const Launcher& launch, const SpliceArgs& a, Dtype w);
void round_tokens(const Launcher& launch, const TokensArgs& a);
void matryoshka_rows(const Launcher& launch, const MatryoshkaArgs& a);

}  // namespace gsf::cuda
