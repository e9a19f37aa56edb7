#include <torch/library.h>

#include <optional>

#include "cpu/ops_common.h"
#include "cpu/parallel.h"

namespace gsf {
namespace {

// Columns per block for many rows: 128 fp32 of 16,384 feature rows are 8 MiB, so that rows shared by many
// tokens are read from the last-level cache and not from memory again.  At 1,024 tokens 64 columns took half
// as long again (half of each access is latency); 256 took a tenth more on Zen 4, 4 % less on Zen 5.
// Iterating by feature instead, with each row read once for all its tokens and the sums in the L2, took 15 %
// less at 1,024 tokens and half as long again at 256 (Zen 5): not worth a second kernel.
constexpr int64_t kBlockColumns = 128;
// Rows per task within a block: enough work for one chunk.
constexpr int64_t kBlockRows = 32;
// With fewer rows than this little is shared, and streaming whole rows is best: at 128 they were faster by a
// fifth, at 256 slower by a seventh.
constexpr int64_t kFewRows = 192;

at::Tensor decode_cpu(const at::Tensor& crow, const at::Tensor& col, const at::Tensor& values,
                      const at::Tensor& W_dec, const std::optional<at::Tensor>& b_dec,
                      const std::optional<at::Tensor>& row_scale) {
  TORCH_CHECK_VALUE(W_dec.dim() == 2, "W_dec: expected [d_sae, d_out], got ", W_dec.sizes());
  const int64_t F = W_dec.size(0), d = W_dec.size(1);
  check_csr(crow, col, F);
  check_float(values, "values");
  check_shape(values, col.sizes(), "values");
  check_cpu(values, "values");
  check_cpu(W_dec, "W_dec");
  const Dtype dtype = dtype_of(W_dec, "W_dec");
  TORCH_CHECK_VALUE(dtype != Dtype::i8 || row_scale.has_value(), "row_scale: required for int8 W_dec");
  const at::Tensor vals = widened(values), rows = W_dec.contiguous();
  at::Tensor bias, scale;
  DecodeArgs args{};
  if (b_dec) {
    check_shape(*b_dec, {d}, "b_dec");
    bias = widened(*b_dec);
    args.bias = bias.const_data_ptr<float>();
  }
  if (row_scale) {
    check_shape(*row_scale, {F}, "row_scale");
    scale = widened(*row_scale);
    args.row_scale = scale.const_data_ptr<float>();
  }
  const int64_t N = crow.numel() - 1;
  at::Tensor out = new_tensor({N, d}, at::kFloat);
  args.crow = crow.const_data_ptr<int64_t>();
  args.col = col.const_data_ptr<int32_t>();
  args.values = vals.const_data_ptr<float>();
  args.w = rows.const_data_ptr();
  args.out = out.mutable_data_ptr<float>();
  args.d = d;
  args.w_dtype = dtype;

  const Kernels& table = kernels();
  const int threads = std::max(1, at::get_num_threads());
  if (N == 0 || d == 0) return out;
  // Few rows: one row per task; if there are fewer rows than threads, also split into whole cache lines of
  // columns. Many rows: blocks of columns and of rows.
  const bool few = N < kFewRows;
  const int64_t share = N >= 2 * threads ? d : (d + threads - 1) / threads;
  const int64_t columns = few ? (share + 63) / 64 * 64 : kBlockColumns;
  const int64_t row_step = few ? 1 : kBlockRows;
  const int64_t row_chunks = (N + row_step - 1) / row_step, column_chunks = (d + columns - 1) / columns;
  run_chunks(row_chunks * column_chunks, [&](int, int64_t chunk) {
    // rows vary fastest, so that all threads work in the same block of columns
    const int64_t d0 = chunk / row_chunks * columns, n0 = chunk % row_chunks * row_step;
    table.decode(args, n0, std::min(N, n0 + row_step), d0, std::min(d, d0 + columns));
  });
  return out;
}

at::Tensor sampled_dot_cpu(const at::Tensor& x, const at::Tensor& rows, const std::optional<at::Tensor>& bias,
                           const at::Tensor& crow, const at::Tensor& col) {
  check_float(x, "x");
  TORCH_CHECK_VALUE(x.dim() == 2 && rows.dim() == 2 && x.size(1) == rows.size(1),
                    "x: expected [N, d] with rows [F, d], got ", x.sizes(), " and ", rows.sizes());
  check_cpu(x, "x");
  check_cpu(rows, "rows");
  check_csr(crow, col, rows.size(0));
  TORCH_CHECK_VALUE(crow.numel() == x.size(0) + 1, "crow_indices: expected ", x.size(0) + 1, " offsets, got ",
                    crow.numel());
  const Dtype dtype = dtype_of(rows, "rows");
  TORCH_CHECK_TYPE(dtype != Dtype::i8, "rows: expected float32, bfloat16 or float16, got int8");
  const at::Tensor xs = widened(x), w = rows.contiguous();
  at::Tensor b;
  SampledDotArgs args{};
  if (bias) {
    check_shape(*bias, {rows.size(0)}, "bias");
    b = widened(*bias);
    args.bias = b.const_data_ptr<float>();
  }
  at::Tensor out = new_tensor({col.numel()}, at::kFloat);
  args.x = xs.const_data_ptr<float>();
  args.w = w.const_data_ptr();
  args.crow = crow.const_data_ptr<int64_t>();
  args.col = col.const_data_ptr<int32_t>();
  args.out = out.mutable_data_ptr<float>();
  args.d = x.size(1);
  args.w_dtype = dtype;
  const Kernels& table = kernels();
  constexpr int64_t kStep = 8;  // tokens per task: about 80 dots each
  const int64_t N = x.size(0);
  run_chunks((N + kStep - 1) / kStep, [&](int, int64_t chunk) {
    table.sampled_dot(args, chunk * kStep, std::min(N, (chunk + 1) * kStep));
  });
  return out;
}

// Stable counting sort by column: for each column, its rows in ascending order.
std::tuple<at::Tensor, at::Tensor, at::Tensor> csr_transpose_cpu(const at::Tensor& crow,
                                                                 const at::Tensor& col, int64_t columns) {
  TORCH_CHECK_VALUE(columns >= 0, "columns: expected 0 or more, got ", columns);
  check_csr(crow, col, columns);
  const int64_t N = crow.numel() - 1, nnz = col.numel();
  at::Tensor ccol = new_tensor({columns + 1}, at::kLong);
  at::Tensor row = new_tensor({nnz}, at::kInt);
  at::Tensor order = new_tensor({nnz}, at::kLong);
  const int64_t* p = crow.const_data_ptr<int64_t>();
  const int32_t* c = col.const_data_ptr<int32_t>();
  int64_t* offsets = ccol.mutable_data_ptr<int64_t>();
  int32_t* r = row.mutable_data_ptr<int32_t>();
  int64_t* o = order.mutable_data_ptr<int64_t>();
  std::fill(offsets, offsets + columns + 1, 0);
  for (int64_t i = 0; i < nnz; ++i) ++offsets[c[i] + 1];
  for (int64_t f = 0; f < columns; ++f) offsets[f + 1] += offsets[f];
  std::vector<int64_t> next(offsets, offsets + columns);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t i = p[n]; i < p[n + 1]; ++i) {
      const int64_t at = next[c[i]]++;
      r[at] = static_cast<int32_t>(n);
      o[at] = i;
    }
  }
  return {ccol, row, order};
}

TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) {
  m.impl("decode", decode_cpu);
  m.impl("sampled_dot", sampled_dot_cpu);
  m.impl("csr_transpose", csr_transpose_cpu);
}

}  // namespace
}  // namespace gsf
