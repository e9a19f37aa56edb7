#include <torch/library.h>

#include <cmath>

#include "cpu/encode_call.h"

namespace gsf {
namespace {

// W_enc, after the arguments have been checked.
const at::Tensor& checked(const at::Tensor& x, const at::Tensor& W_enc, const at::Tensor& b_enc,
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
  TORCH_CHECK_TYPE(dtype_of(W_enc, "W_enc") != Dtype::i8,
                   "W_enc: expected float32, bfloat16 or float16, got int8");
  TORCH_CHECK_VALUE(!bandwidth || *bandwidth > 0, "bandwidth: expected a positive number, got ",
                    bandwidth.value_or(0));
  return W_enc;
}

}  // namespace

EncodeCall::EncodeCall(const at::Tensor& x, const at::Tensor& W_enc, const at::Tensor& b_enc,
                       const at::Tensor& threshold, std::optional<double> bandwidth)
    : rows_(checked(x, W_enc, b_enc, threshold, bandwidth)),
      x_(widened(x)),
      bias_(widened(b_enc)),
      theta_(widened(threshold)) {
  args_.x = x_.const_data_ptr<float>();
  args_.w = rows_.data();
  args_.bias = bias_.const_data_ptr<float>();
  args_.threshold = theta_.const_data_ptr<float>();
  args_.T = x.size(0), args_.F = W_enc.size(1), args_.d = W_enc.size(0);
  args_.w_dtype = dtype_of(W_enc, "W_enc");
  args_.half_bandwidth = bandwidth ? static_cast<float>(*bandwidth / 2) : 0.0f;
}

Csr EncodeCall::rows(int64_t t0, int64_t t1) const {
  EncodeArgs args = args_;
  args.x += t0 * args.d;
  args.T = t1 - t0;
  const int64_t chunks = args.T == 0 ? 0 : (args.F + kChunkFeatures - 1) / kChunkFeatures;
  HitCollector hits(std::max(1, at::get_num_threads()), chunks);
  const Kernels& table = kernels();
  run_chunks(chunks, [&](int worker, int64_t chunk) {
    const int64_t f0 = chunk * kChunkFeatures, f1 = std::min(args.F, f0 + kChunkFeatures);
    hits.fill(worker, chunk, [&](HitSink& sink) { table.encode(args, f0, f1, sink); });
  });
  return hits.to_csr(args.T);
}

namespace {

Csr encode_cpu(const at::Tensor& x, const at::Tensor& W_enc, const at::Tensor& b_enc,
               const at::Tensor& threshold, std::optional<double> bandwidth) {
  const EncodeCall call(x, W_enc, b_enc, threshold, bandwidth);
  return call.rows(0, x.size(0));
}

TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { m.impl("encode", encode_cpu); }

}  // namespace
}  // namespace gsf
