#include "cpu/ops_common.h"

#include <algorithm>

namespace gsf {

at::Tensor widened(const at::Tensor& t) {
  if (t.scalar_type() == at::kFloat && t.is_contiguous()) return t;  // no dispatcher if nothing changes
  return t.to(at::kFloat).contiguous();
}

Rows::Rows(const at::Tensor& W) : data_(W.const_data_ptr()) {
  const bool in_one_piece = W.stride(0) == 1 && (W.stride(1) == W.size(0) || W.size(1) < 2);
  if (in_one_piece) return;
  own_ = W.t().contiguous();
  data_ = own_.const_data_ptr();
}

void check_csr(const at::Tensor& crow, const at::Tensor& col, int64_t features) {
  check_cpu(crow, "crow_indices");
  check_cpu(col, "col_indices");
  TORCH_CHECK_TYPE(crow.scalar_type() == at::kLong, "crow_indices: expected int64, got ", crow.scalar_type());
  TORCH_CHECK_TYPE(col.scalar_type() == at::kInt, "col_indices: expected int32, got ", col.scalar_type());
  TORCH_CHECK_VALUE(crow.dim() == 1 && crow.numel() >= 1 && crow.is_contiguous(),
                    "crow_indices: expected a contiguous vector [N+1], got ", crow.sizes());
  TORCH_CHECK_VALUE(col.dim() == 1 && col.is_contiguous(),
                    "col_indices: expected a contiguous vector [nnz], got ", col.sizes());
  const int64_t* p = crow.const_data_ptr<int64_t>();
  const int64_t rows = crow.numel() - 1;
  bool ascending = p[0] == 0 && p[rows] == col.numel();
  for (int64_t n = 0; n < rows; ++n) ascending &= p[n] <= p[n + 1];
  TORCH_CHECK_VALUE(ascending, "crow_indices: expected offsets from 0 to ", col.numel(),
                    " that never fall, got ", p[0], " to ", p[rows]);
  const int32_t* c = col.const_data_ptr<int32_t>();
  const auto wrong = [features](int32_t f) { return f < 0 || f >= features; };
  const int64_t nnz = col.numel();
  bool inside = true;  // no early exit, so that the loop is vectorised
  for (int64_t i = 0; i < nnz; ++i) inside &= !wrong(c[i]);
  if (inside) return;
  const int64_t at = std::find_if(c, c + nnz, wrong) - c;
  TORCH_CHECK_INDEX(false, "col_indices: expected values in [0, ", features, "), got ", c[at],
                    " at position ", at);
}

}  // namespace gsf
