#include "cpu/collect.h"

#include <memory>

#include "cpu/ops_common.h"

namespace gsf {

Csr HitCollector::to_csr(int64_t T) const {
  at::Tensor crow = new_tensor({T + 1}, at::kLong);
  int64_t* offsets = crow.mutable_data_ptr<int64_t>();
  std::fill(offsets, offsets + T + 1, 0);
  for (const HitBuffer& buffer : buffers_) {
    const Hit* hits = buffer.sink.begin;
    for (size_t i = 0, n = buffer.size(); i < n; ++i) ++offsets[hits[i].token + 1];
  }
  for (int64_t t = 0; t < T; ++t) offsets[t + 1] += offsets[t];
  const int64_t nnz = offsets[T];
  at::Tensor col = new_tensor({nnz}, at::kInt);
  at::Tensor values = new_tensor({nnz}, at::kFloat);
  int32_t* c = col.mutable_data_ptr<int32_t>();
  float* v = values.mutable_data_ptr<float>();
  std::vector<int64_t> next(offsets, offsets + T);
  for (const Span& span : spans_) {
    const Hit* hits = buffers_[span.worker].sink.begin;
    for (size_t i = span.begin; i < span.end; ++i) {
      const int64_t at = next[hits[i].token]++;
      c[at] = hits[i].feature;
      v[at] = hits[i].value;
    }
  }
  return {std::move(crow), std::move(col), std::move(values)};
}

}  // namespace gsf
