#include <torch/library.h>

#include <cmath>
#include <optional>

#include "cpu/collect.h"
#include "cpu/ops_common.h"

namespace gsf {
namespace {

Csr encode_cpu(const at::Tensor& x, const at::Tensor& W_enc, const at::Tensor& b_enc,
               const at::Tensor& threshold, std::optional<double> bandwidth) {
  check_float(x, "x");
  TORCH_CHECK_VALUE(x.dim() == 2, "x: expected [N, d_in], got ", x.sizes());
  TORCH_CHECK_VALUE(W_enc.dim() == 2, "W_enc: expected [d_in, d_sae], got ", W_enc.sizes());
  const int64_t T = x.size(0), d = W_enc.size(0), F = W_enc.size(1);
  TORCH_CHECK_VALUE(x.size(1) == d, "x: expected d_in = ", d, " in its last dimension, got ", x.size(1));
  check_shape(b_enc, {F}, "b_enc");
  check_shape(threshold, {F}, "threshold");
  for (const at::Tensor* t : {&x, &W_enc, &b_enc, &threshold}) check_cpu(*t, "encode");
  TORCH_CHECK_VALUE(T < INT32_MAX && F < INT32_MAX, "x: more than 2^31 tokens or features");
  const Dtype dtype = dtype_of(W_enc, "W_enc");
  TORCH_CHECK_TYPE(dtype != Dtype::i8, "W_enc: expected float32, bfloat16 or float16, got int8");
  TORCH_CHECK_VALUE(!bandwidth || *bandwidth > 0, "bandwidth: expected a positive number, got ",
                    bandwidth.value_or(0));

  const at::Tensor xs = widened(x), bias = widened(b_enc), theta = widened(threshold);
  const Rows rows(W_enc);
  EncodeArgs args{};
  args.x = xs.const_data_ptr<float>();
  args.w = rows.data();
  args.bias = bias.const_data_ptr<float>();
  args.threshold = theta.const_data_ptr<float>();
  args.T = T, args.F = F, args.d = d;
  args.w_dtype = dtype;
  args.half_bandwidth = bandwidth ? static_cast<float>(*bandwidth / 2) : 0.0f;

  const int64_t chunks = T == 0 ? 0 : (F + kChunkFeatures - 1) / kChunkFeatures;
  HitCollector hits(std::max(1, at::get_num_threads()), chunks);
  const Kernels& table = kernels();
  run_chunks(chunks, [&](int worker, int64_t chunk) {
    const int64_t f0 = chunk * kChunkFeatures, f1 = std::min(F, f0 + kChunkFeatures);
    hits.fill(worker, chunk, [&](HitSink& sink) { table.encode(args, f0, f1, sink); });
  });
  return hits.to_csr(T);
}

TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { m.impl("encode", encode_cpu); }

}  // namespace
}  // namespace gsf
