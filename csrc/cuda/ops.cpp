// The CUDA kernels as ops of the library gemmascope_fast_cuda; gemmascope_fast/backends/gpu/register.py makes
// them implementations of the package's ops.  Tensors and checks are here, kernels are in the .cu files.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "cuda/ops_common.h"

namespace gsf::cuda {
namespace {

// Size of one pass's bitmap; the slots take four times as much.  It also keeps every grid below 2^31 blocks.
constexpr int64_t kChunkBytes = 16 << 20;

using Csr = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Allocates the outputs of the encode kernel.
struct Words {
  at::Tensor bitmap, count, slots;

  Words(const at::Tensor& x, int64_t T, int64_t words)
      : bitmap(at::empty({T, words}, x.options().dtype(at::kInt))),
        count(at::empty({T, words}, x.options().dtype(at::kInt))),
        slots(at::empty({T, words, kSlots}, x.options())) {}
};

EncodeArgs arguments(const at::Tensor& x, const at::Tensor& rows, const at::Tensor& bias,
                     const at::Tensor& theta, Words& words, float half_bandwidth) {
  return {x.const_data_ptr<float>(),
          rows.const_data_ptr(),
          bias.const_data_ptr<float>(),
          theta.const_data_ptr<float>(),
          reinterpret_cast<uint32_t*>(words.bitmap.mutable_data_ptr<int32_t>()),
          words.count.mutable_data_ptr<int32_t>(),
          words.slots.mutable_data_ptr<float>(),
          x.size(0),
          rows.size(0),
          x.size(1),
          words.bitmap.size(1),
          half_bandwidth};
}

// One pass over a chunk of tokens; one number (the count of latents) is read back.
Csr encode_chunk(const at::Tensor& x, const at::Tensor& rows, const at::Tensor& bias, const at::Tensor& theta,
                 float half_bandwidth) {
  const int64_t T = x.size(0);
  const auto ints = x.options().dtype(at::kInt), longs = x.options().dtype(at::kLong);
  Words words(x, T, (rows.size(0) + 31) / 32);
  const EncodeArgs e = arguments(x, rows, bias, theta, words, half_bandwidth);
  const Dtype dtype = dtype_of(rows, "W_enc");
  encode_words(here(), e, dtype);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const at::Tensor total = at::cumsum(words.count.flatten(), 0, at::kLong);
  const int64_t nnz = total[-1].item<int64_t>();
  at::Tensor crow = at::empty({T + 1}, longs), col = at::empty({nnz}, ints),
             values = at::empty({nnz}, x.options());
  GatherArgs g{e,
               total.const_data_ptr<int64_t>(),
               crow.mutable_data_ptr<int64_t>(),
               col.mutable_data_ptr<int32_t>(),
               values.mutable_data_ptr<float>(),
               nnz};
  gather_words(here(), g, dtype);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {crow, col, values};
}

void check_encode(const at::Tensor& x, const at::Tensor& W_enc, const at::Tensor& b_enc,
                  const at::Tensor& threshold) {
  check_float(x, "x");
  TORCH_CHECK_VALUE(x.dim() == 2, "x: expected [N, d_in], got ", x.sizes());
  TORCH_CHECK_VALUE(W_enc.dim() == 2, "W_enc: expected [d_in, d_sae], got ", W_enc.sizes());
  const int64_t d = W_enc.size(0), F = W_enc.size(1);
  TORCH_CHECK_VALUE(x.size(1) == d, "x: expected d_in = ", d, " in its last dimension, got ", x.size(1));
  check_shape(b_enc, {F}, "b_enc");
  check_shape(threshold, {F}, "threshold");
  check_device(W_enc, x, "W_enc");
  check_device(b_enc, x, "b_enc");
  check_device(threshold, x, "threshold");
  TORCH_CHECK_TYPE(dtype_of(W_enc, "W_enc") != Dtype::i8,
                   "W_enc: expected float32, bfloat16 or float16, got int8");
}

Csr encode_cuda(const at::Tensor& x, const at::Tensor& W_enc, const at::Tensor& b_enc,
                const at::Tensor& threshold, std::optional<double> bandwidth) {
  check_encode(x, W_enc, b_enc, threshold);
  const int64_t T = x.size(0), F = W_enc.size(1);
  TORCH_CHECK_VALUE(!bandwidth || *bandwidth > 0, "bandwidth: expected a positive number, got ",
                    bandwidth.value_or(0));
  const c10::cuda::CUDAGuard guard(x.device());
  check_capability();
  const at::Tensor xs = fp32(x), rows = W_enc.t().contiguous(), bias = fp32(b_enc), theta = fp32(threshold);
  const float half = bandwidth ? static_cast<float>(*bandwidth / 2) : 0.0f;
  if (T == 0 || F == 0) {
    return {at::zeros({T + 1}, x.options().dtype(at::kLong)), at::empty({0}, x.options().dtype(at::kInt)),
            at::empty({0}, xs.options())};
  }
  const int64_t step = std::max<int64_t>(32, kChunkBytes / (4 * ((F + 31) / 32)));
  std::vector<at::Tensor> crows, cols, values;
  int64_t base = 0;
  for (int64_t t = 0; t < T; t += step) {
    auto [crow, col, value] = encode_chunk(xs.slice(0, t, std::min(T, t + step)), rows, bias, theta, half);
    crows.push_back((t == 0 ? crow : crow.slice(0, 1)) + base);
    base += col.numel();
    cols.push_back(col);
    values.push_back(value);
  }
  if (cols.size() == 1) return {crows[0], cols[0], values[0]};
  return {at::cat(crows), at::cat(cols), at::cat(values)};
}

at::Tensor decode_cuda(const at::Tensor& crow, const at::Tensor& col, const at::Tensor& values,
                       const at::Tensor& W_dec, const std::optional<at::Tensor>& b_dec,
                       const std::optional<at::Tensor>& row_scale) {
  TORCH_CHECK_VALUE(W_dec.dim() == 2, "W_dec: expected [d_sae, d_out], got ", W_dec.sizes());
  const int64_t F = W_dec.size(0), d = W_dec.size(1), N = crow.numel() - 1;
  TORCH_CHECK_TYPE(crow.scalar_type() == at::kLong && col.scalar_type() == at::kInt,
                   "crow_indices, col_indices: expected int64 and int32, got ", crow.scalar_type(), " and ",
                   col.scalar_type());
  TORCH_CHECK_VALUE(crow.dim() == 1 && N >= 0 && col.dim() == 1,
                    "crow_indices: expected a vector [N+1], got ", crow.sizes());
  check_float(values, "values");
  check_shape(values, col.sizes(), "values");
  check_device(crow, W_dec, "crow_indices");
  check_device(col, W_dec, "col_indices");
  check_device(values, W_dec, "values");
  const c10::cuda::CUDAGuard guard(W_dec.device());
  check_capability();
  // one read back: the pattern must be valid before a kernel uses it
  const at::Tensor bad = (col < 0).logical_or(col >= F).any().logical_or((crow.diff() < 0).any());
  const at::Tensor ends = at::stack({bad.to(at::kLong), crow[0], crow[-1]}).cpu();
  const int64_t* seen = ends.const_data_ptr<int64_t>();
  TORCH_CHECK_INDEX(seen[0] == 0 && seen[1] == 0 && seen[2] == col.numel(),
                    "crow_indices, col_indices: expected ", "offsets from 0 to ", col.numel(),
                    " that never fall and features in [0, ", F, ")");
  const Dtype dtype = dtype_of(W_dec, "W_dec");
  TORCH_CHECK_VALUE(dtype != Dtype::i8 || row_scale.has_value(), "row_scale: required for int8 W_dec");
  at::Tensor bias, scale;
  if (b_dec) {
    check_shape(*b_dec, {d}, "b_dec");
    check_device(*b_dec, W_dec, "b_dec");
    bias = fp32(*b_dec);
  }
  if (row_scale) {
    check_shape(*row_scale, {F}, "row_scale");
    check_device(*row_scale, W_dec, "row_scale");
    scale = fp32(*row_scale);
  }
  const at::Tensor crows = crow.contiguous(), cols = col.contiguous(), vals = fp32(values),
                   rows = W_dec.contiguous();
  at::Tensor out = at::empty({N, d}, W_dec.options().dtype(at::kFloat));
  DecodeArgs a{crows.const_data_ptr<int64_t>(),
               cols.const_data_ptr<int32_t>(),
               vals.const_data_ptr<float>(),
               rows.const_data_ptr(),
               scale.defined() ? scale.const_data_ptr<float>() : nullptr,
               bias.defined() ? bias.const_data_ptr<float>() : nullptr,
               out.mutable_data_ptr<float>(),
               N,
               d,
               col.numel()};
  decode_rows(here(), a, dtype);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

// Two launches, nothing read back: T <= 16 tokens, edits as packed by gemmascope_fast/backends/gpu/loop.py.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> splice_cuda(
    const at::Tensor& x, const at::Tensor& W_enc, const at::Tensor& b_enc, const at::Tensor& threshold,
    const at::Tensor& W_dec, const at::Tensor& b_dec, const at::Tensor& features, const at::Tensor& kind,
    const at::Tensor& amount, bool error, int64_t capacity) {
  check_encode(x, W_enc, b_enc, threshold);
  const int64_t T = x.size(0), F = W_enc.size(1), edits = features.numel();
  TORCH_CHECK_VALUE(T >= 1 && T <= 16, "x: expected from 1 to 16 tokens, got ", T);
  TORCH_CHECK_VALUE(F > 0 && W_dec.dim() == 2 && W_dec.size(0) == F, "W_dec: expected [d_sae = ", F,
                    ", d_out], got ", W_dec.sizes());
  const int64_t d_out = W_dec.size(1);
  check_shape(b_dec, {d_out}, "b_dec");
  TORCH_CHECK_TYPE(W_dec.scalar_type() == W_enc.scalar_type(), "W_dec: expected ", W_enc.scalar_type(),
                   ", like W_enc, got ", W_dec.scalar_type());
  TORCH_CHECK_VALUE(!error || d_out == x.size(1), "W_dec: expected d_out = ", x.size(1),
                    " with the error term, got ", d_out);
  TORCH_CHECK_TYPE(features.scalar_type() == at::kInt && kind.scalar_type() == at::kInt &&
                       amount.scalar_type() == at::kFloat,
                   "features, kind, amount: expected int32, int32 and float32");
  check_shape(kind, {edits}, "kind");
  check_shape(amount, {edits}, "amount");
  for (const auto& [tensor, name] : {std::pair<const at::Tensor&, const char*>{W_dec, "W_dec"},
                                     {b_dec, "b_dec"},
                                     {features, "features"},
                                     {kind, "kind"},
                                     {amount, "amount"}}) {
    check_device(tensor, x, name);
  }
  TORCH_CHECK_VALUE(capacity >= 0, "capacity: expected 0 or more, got ", capacity);
  const c10::cuda::CUDAGuard guard(x.device());
  check_capability();
  const at::Tensor xs = fp32(x), rows = W_enc.t().contiguous(), bias = fp32(b_enc), theta = fp32(threshold);
  const at::Tensor dec = W_dec.contiguous(), dec_bias = fp32(b_dec);
  const at::Tensor ids = features.contiguous(), kinds = kind.contiguous(), amounts = amount.contiguous();
  const auto ints = x.options().dtype(at::kInt), longs = x.options().dtype(at::kLong);
  Words words(xs, T, (F + 31) / 32);
  at::Tensor crow = at::empty({T + 1}, longs), col = at::empty({capacity}, ints),
             values = at::empty({capacity}, xs.options()), out = at::empty({T, d_out}, xs.options());
  const EncodeArgs e = arguments(xs, rows, bias, theta, words, 0.0f);
  const Dtype dtype = dtype_of(rows, "W_enc");
  encode_words(here(), e, dtype);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  SpliceArgs a{{e, nullptr, crow.mutable_data_ptr<int64_t>(), col.mutable_data_ptr<int32_t>(),
                values.mutable_data_ptr<float>(), capacity},
               error ? xs.const_data_ptr<float>() : nullptr,
               dec.const_data_ptr(),
               dec_bias.const_data_ptr<float>(),
               ids.const_data_ptr<int32_t>(),
               kinds.const_data_ptr<int32_t>(),
               amounts.const_data_ptr<float>(),
               out.mutable_data_ptr<float>(),
               d_out,
               edits};
  splice_tokens(here(), a, dtype);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, crow, col, values};
}

}  // namespace

TORCH_LIBRARY(gemmascope_fast_cuda, m) {
  m.def(
      "encode(Tensor x, Tensor W_enc, Tensor b_enc, Tensor threshold, float? bandwidth=None)"
      " -> (Tensor crow_indices, Tensor col_indices, Tensor values)");
  m.def(
      "decode(Tensor crow_indices, Tensor col_indices, Tensor values, Tensor W_dec, Tensor? b_dec=None,"
      " Tensor? row_scale=None) -> Tensor");
  m.def(
      "splice(Tensor x, Tensor W_enc, Tensor b_enc, Tensor threshold, Tensor W_dec, Tensor b_dec,"
      " Tensor features, Tensor kind, Tensor amount, bool error, int capacity)"
      " -> (Tensor out, Tensor crow_indices, Tensor col_indices, Tensor values)");
}

TORCH_LIBRARY_IMPL(gemmascope_fast_cuda, CUDA, m) {
  m.impl("encode", encode_cuda);
  m.impl("decode", decode_cuda);
  m.impl("splice", splice_cuda);
}

}  // namespace gsf::cuda
