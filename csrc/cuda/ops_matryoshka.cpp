// Op matryoshka_linear on CUDA tensors, up to 16 tokens: checks and two launches, nothing read back.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cuda/ops_common.h"

namespace gsf::cuda {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

constexpr int64_t kMaxTokens = 16;  // gemmascope_fast/backends/gpu/matryoshka.py
constexpr int64_t kMaxIn = 66000;   // 256 * 127 * 66,000 < 2^31

// Contiguous and 16-byte aligned, as the kernels' 128-bit loads need it.
at::Tensor aligned(const at::Tensor& t) {
  const at::Tensor whole = t.contiguous();
  return reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0 ? whole : whole.clone();
}

// Vector of fp32 on x's device, or undefined.
at::Tensor vector(const MaybeTensor& t, int64_t size, const at::Tensor& x, const char* name) {
  if (!t) return {};
  check_shape(*t, {size}, name);
  check_device(*t, x, name);
  return fp32(*t);
}

// The planes that the slice reads, kept alive by `held`: whole planes, and one bit more if it rounds.
void choose_planes(at::TensorList planes, const at::Tensor& x, int64_t blocks, int64_t bits, int64_t rule,
                   MatryoshkaArgs& args, std::vector<at::Tensor>& held) {
  int64_t stored = 0;
  for (const at::Tensor& p : planes) stored += p.dim() == 3 ? p.size(2) / 64 : 100;
  TORCH_CHECK_VALUE(stored >= 1 && stored <= 8 && bits >= 1 && bits <= stored,
                    "bits: expected a width from 1 to the ", stored, " stored, got ", bits);
  const int64_t need = rule == 0 || bits == stored ? bits : bits + 1;
  int read = 0;
  for (size_t i = 0; i < planes.size() && read < need; ++i) {
    const at::Tensor& p = planes[i];
    const int64_t width = plane_width(static_cast<int>(stored), static_cast<int>(i));
    TORCH_CHECK_TYPE(p.scalar_type() == at::kByte, "planes: expected uint8, got ", p.scalar_type());
    check_shape(p, {blocks, args.units, 64 * width}, "planes");
    check_device(p, x, "planes");
    held.push_back(aligned(p));
    args.planes[i] = held.back().const_data_ptr<uint8_t>();
    read += static_cast<int>(width);
  }
  TORCH_CHECK_VALUE(read == 2 || read == 3 || read == 4 || read == 6 || read == 8,
                    "planes: expected to read 2, 3, 4, 6 or 8 bits, the first planes of a nested code, got ",
                    read);
  args.stored = read, args.bits = static_cast<int32_t>(bits);
  args.rounds = rule != 0 && read > bits;
  args.top = rule == 2 ? 1 << bits : (1 << bits) - 1;
  args.mid = rule == 0 ? static_cast<float>((1 << (8 - bits)) - 1) / 2 : 0.0f;
}

at::Tensor matryoshka_linear_cuda(const at::Tensor& x, at::TensorList planes, const at::Tensor& scale,
                                  const at::Tensor& zero_point, const MaybeTensor& bias,
                                  const MaybeTensor& mean, const MaybeTensor& crow, const MaybeTensor& col,
                                  int64_t out, int64_t group_size, int64_t bits, int64_t rule, bool exact) {
  check_float(x, "x");
  TORCH_CHECK_VALUE(!exact && !crow && !col,
                    "matryoshka_linear in CUDA C++: expected int8 activations and no", " overflow list");
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(0) <= kMaxTokens && x.size(1) <= kMaxIn,
                    "x: expected [N <= ", kMaxTokens, ", in_features <= ", kMaxIn, "], got ", x.sizes());
  TORCH_CHECK_VALUE(out >= 0 && group_size >= 0 && group_size % 32 == 0,
                    "group_size: expected 0 or a multiple of 32, got ", group_size);
  TORCH_CHECK_VALUE(rule >= 0 && rule <= 2, "rule: expected 0, 1 or 2, got ", rule);
  const c10::cuda::CUDAGuard guard(x.device());
  check_capability();
  const int64_t T = x.size(0), in = x.size(1), blocks = (out + 15) / 16;
  MatryoshkaArgs args{};
  args.T = T, args.out = out, args.units = (in + 31) / 32;
  args.groups = group_size == 0 ? 1 : (in + group_size - 1) / group_size;
  args.group_units = group_size == 0 ? std::max<int64_t>(1, args.units) : group_size / 32;
  std::vector<at::Tensor> held;
  choose_planes(planes, x, blocks, bits, rule, args, held);
  for (const at::Tensor* t : {&scale, &zero_point}) {
    check_shape(*t, {blocks, args.groups, 16}, "scale, zero_point");
    check_device(*t, x, "scale, zero_point");
  }
  TORCH_CHECK_TYPE(scale.scalar_type() == at::kFloat || scale.scalar_type() == at::kHalf,
                   "scale: expected float32 or float16, got ", scale.scalar_type());
  TORCH_CHECK_TYPE(zero_point.scalar_type() == at::kByte, "zero_point: expected uint8, got ",
                   zero_point.scalar_type());
  const at::Tensor xs = fp32(x), scales = scale.contiguous(), zeros = zero_point.contiguous();
  const at::Tensor b = vector(bias, out, x, "bias"), m = vector(mean, in, x, "mean");
  const auto ints = x.options().dtype(at::kInt);
  at::Tensor y = at::empty({T, out}, xs.options());
  if (T == 0 || out == 0) return y;
  at::Tensor q = at::empty({T, args.units * 8}, ints), sums = at::empty({T, args.groups}, ints),
             s = at::empty({T}, xs.options());
  const TokensArgs tokens{xs.const_data_ptr<float>(),
                          m.defined() ? m.const_data_ptr<float>() : nullptr,
                          q.mutable_data_ptr<int32_t>(),
                          s.mutable_data_ptr<float>(),
                          sums.mutable_data_ptr<int32_t>(),
                          T,
                          in,
                          args.units,
                          args.groups,
                          args.group_units};
  round_tokens(here(), tokens);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  args.q = tokens.q, args.s = tokens.s, args.qsum = tokens.qsum;
  args.scale = scales.const_data_ptr(), args.half_scale = scale.scalar_type() == at::kHalf;
  args.zero = zeros.const_data_ptr<uint8_t>();
  args.bias = b.defined() ? b.const_data_ptr<float>() : nullptr;
  args.y = y.mutable_data_ptr<float>();
  matryoshka_rows(here(), args);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gemmascope_fast_cuda, m) {
  m.def(
      "matryoshka_linear(Tensor x, Tensor[] planes, Tensor scale, Tensor zero_point, Tensor? bias, Tensor? "
      "mean,"
      " Tensor? overflow_crow, Tensor? overflow_col, int out_features, int group_size, int bits, int rule,"
      " bool exact) -> Tensor");
}

TORCH_LIBRARY_IMPL(gemmascope_fast_cuda, CUDA, m) { m.impl("matryoshka_linear", matryoshka_linear_cuda); }

}  // namespace gsf::cuda
