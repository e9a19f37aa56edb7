// What the CUDA kernels take: raw pointers and sizes, passed by value; and the launchers, one a source, which
// pick the kernel of a shape.  They check nothing and wait for nothing.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cuda/launcher.h"

namespace gsf::cuda {

constexpr int kSlots = 4;  // values kept per word of 32 features (gemmascope_fast/gpu/encode.py, SLOTS)

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
  const float* x;           // [T][d_out], widened, or null: the reconstruction takes its place
  const void* w;            // [F][d_out] of its element type: the decoder's rows
  const float* bias;        // [d_out]
  const int32_t* features;  // [edits], ascending
  const int32_t* kind;      // [edits]: EditKind
  const float* amount;      // [edits]
  float* out;               // [T][d_out]
  int64_t d_out, edits;
};

enum EditKind : int32_t { kScale = 0, kClamp = 1, kAdd = 2, kMinClamp = 3 };  // gemmascope_fast/gpu/loop.py

void encode_words(const Launcher& launch, const EncodeArgs& a, Dtype w);
void gather_words(const Launcher& launch, const GatherArgs& a, Dtype w);
void decode_rows(const Launcher& launch, const DecodeArgs& a, Dtype w);
// w: of the encoder's rows and of the decoder's
void splice_tokens(const Launcher& launch, const SpliceArgs& a, Dtype w);

}  // namespace gsf::cuda
