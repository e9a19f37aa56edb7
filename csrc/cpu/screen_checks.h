// Checks of the arguments that both screened ops share, and the layout of their arrays.
#pragma once

#include <cstring>
#include <optional>
#include <vector>

#include "cpu/ops_common.h"

namespace gsf {

inline int64_t round_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

inline void check_sizes(const at::Tensor& W_enc, const at::Tensor& b_enc, const at::Tensor& threshold) {
  TORCH_CHECK_VALUE(W_enc.dim() == 2, "W_enc: expected [d_in, d_sae], got ", W_enc.sizes());
  TORCH_CHECK_VALUE(W_enc.size(0) <= kMostInputs, "W_enc: the screen takes d_in up to ", kMostInputs,
                    ", got ", W_enc.size(0));
  check_shape(b_enc, {W_enc.size(1)}, "b_enc");
  check_shape(threshold, {W_enc.size(1)}, "threshold");
  for (const at::Tensor* t : {&W_enc, &b_enc, &threshold}) check_cpu(*t, "encode_screened");
  TORCH_CHECK_TYPE(dtype_of(W_enc, "W_enc") != Dtype::i8,
                   "W_enc: expected float32, bfloat16 or float16, got int8");
}

// Directions [k, d] and how many there are.
inline int64_t check_directions(const std::optional<at::Tensor>& directions, int64_t d) {
  if (!directions) return 0;
  TORCH_CHECK_VALUE(
      directions->dim() == 2 && directions->size(1) == d && directions->size(0) <= kMostDirections,
      "directions: expected [k up to ", kMostDirections, ", d_in = ", d, "], got ", directions->sizes());
  check_cpu(*directions, "directions");
  TORCH_CHECK_TYPE(directions->scalar_type() == at::kFloat && directions->is_contiguous(),
                   "directions: expected contiguous float32, got ", directions->scalar_type());
  return directions->size(0);
}

inline void check_centre(const std::optional<at::Tensor>& centre, int64_t d) {
  if (!centre) return;
  check_shape(*centre, {d}, "centre");
  check_cpu(*centre, "centre");
  TORCH_CHECK_TYPE(centre->scalar_type() == at::kFloat && centre->is_contiguous(),
                   "centre: expected contiguous float32, got ", centre->scalar_type());
}

// The inverses of scales [d], powers of two from 1 to kMostScale (docs/how/screen.md, "Scales"), which are
// exact; empty if there are none.
inline std::vector<float> inverse_scales(const std::optional<at::Tensor>& scales, int64_t d) {
  if (!scales) return {};
  check_shape(*scales, {d}, "scales");
  check_cpu(*scales, "scales");
  TORCH_CHECK_TYPE(scales->scalar_type() == at::kFloat && scales->is_contiguous(),
                   "scales: expected contiguous float32, got ", scales->scalar_type());
  const float* s = scales->const_data_ptr<float>();
  std::vector<float> inverse(d);
  bool good = true;
  for (int64_t i = 0; i < d; ++i) {
    int32_t bits;
    std::memcpy(&bits, s + i, sizeof bits);
    good &= (bits & 0x7FFFFF) == 0 && s[i] >= 1.0f && s[i] <= kMostScale;
    inverse[i] = 1.0f / s[i];
  }
  // other values would round, which the bound does not include
  TORCH_CHECK_VALUE(good, "scales: expected powers of two from 1 to 2^20");
  return inverse;
}

}  // namespace gsf
