#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>

#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/screen_checks.h"

namespace gsf {
namespace {

at::Tensor zero_codes(at::IntArrayRef shape) {
  at::Tensor t = new_tensor(shape, at::kByte);
  advise_large_pages(t.mutable_data_ptr(),
                     t.nbytes());  // before the first touch
  return t.zero_();
}

// A first digit made elsewhere: a code with its scales and zero points, or none of the three.
void check_given(const std::optional<at::Tensor>& code, const std::optional<at::Tensor>& scale,
                 const std::optional<at::Tensor>& zero, int64_t F, int64_t d) {
  TORCH_CHECK_VALUE(code.has_value() == scale.has_value() && code.has_value() == zero.has_value(),
                    "given: expected a code with its scale and zero, or none of them");
  if (!code) return;
  const auto check = [](const at::Tensor& t, at::IntArrayRef shape, at::ScalarType dtype, const char* name) {
    check_shape(t, shape, name);
    check_cpu(t, name);
    TORCH_CHECK_VALUE(t.scalar_type() == dtype && t.is_contiguous(), name, ": expected contiguous ", dtype,
                      ", got ", t.scalar_type(), t.is_contiguous() ? "" : " in strides");
  };
  check(*code, {F, d}, at::kByte, "given");
  check(*scale, {F}, at::kFloat, "given_scale");
  check(*zero, {F}, at::kByte, "given_zero");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> screen_rows_cpu(
    const at::Tensor& W_enc, const at::Tensor& b_enc, const at::Tensor& threshold,
    const std::optional<at::Tensor>& centre, bool second_digit, const std::optional<at::Tensor>& directions,
    const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& given,
    const std::optional<at::Tensor>& given_scale, const std::optional<at::Tensor>& given_zero) {
  check_sizes(W_enc, b_enc, threshold);
  const int64_t d = W_enc.size(0), F = W_enc.size(1), width = round_to(d, 64), stride = table_stride(F);
  check_centre(centre, d);
  const int64_t k = check_directions(directions, d);
  const std::vector<float> per_scale = inverse_scales(scales, d);
  check_given(given, given_scale, given_zero, F, d);
  const at::Tensor bias = widened(b_enc), theta = widened(threshold);
  const Rows rows(W_enc);
  const int64_t tiles = (F + kTileRows - 1) / kTileRows, steps = width / kTileColumns;
  const at::Tensor code = zero_codes({tiles, steps, kTileRows, kTileColumns});
  const at::Tensor code2 = zero_codes({second_digit ? tiles : 0, steps, kTileRows, kTileColumns});
  at::Tensor table = at::zeros({kScreenRows + k, stride}, at::kFloat);
  ScreenRowArgs args{};
  args.w = rows.data();
  args.w_dtype = dtype_of(W_enc, "W_enc");
  args.mu = centre ? centre->const_data_ptr<float>() : nullptr;
  args.scale = scales ? scales->const_data_ptr<float>() : nullptr;
  args.per_scale = scales ? per_scale.data() : nullptr;
  args.bias = bias.const_data_ptr<float>();
  args.threshold = theta.const_data_ptr<float>();
  args.code = code.mutable_data_ptr<uint8_t>();
  args.code2 = second_digit ? code2.mutable_data_ptr<uint8_t>() : nullptr;
  args.table = table.mutable_data_ptr<float>();
  args.directions = k ? directions->const_data_ptr<float>() : nullptr;
  if (given) {
    args.given = given->const_data_ptr<uint8_t>();
    args.given_scale = given_scale->const_data_ptr<float>();
    args.given_zero = given_zero->const_data_ptr<uint8_t>();
  }
  args.d = d, args.width = width, args.stride = stride, args.k = k;
  // kernels mask the columns past F; a fixed value there makes equal tables equal in every byte
  float* start = args.table + kStart * stride;
  for (int64_t f = F; f < stride; ++f) start[f] = -std::numeric_limits<float>::infinity();
  const Kernels& kernel = kernels();
  std::vector<std::vector<float>> space(std::max(1, at::get_num_threads()), std::vector<float>(width));
  run_chunks((F + kChunkFeatures - 1) / kChunkFeatures, [&](int worker, int64_t chunk) {
    const int64_t f0 = chunk * kChunkFeatures;
    kernel.screen_rows(args, f0, std::min(F, f0 + kChunkFeatures), space[worker].data());
  });
  return {code, code2, table};
}

TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { m.impl("screen_rows", screen_rows_cpu); }

}  // namespace
}  // namespace gsf
