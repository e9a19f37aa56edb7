// Converts hits in chunks to compressed sparse rows with a stable counting sort by token.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "cpu/parallel.h"

namespace gsf {

using Csr = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Hits of one run over `chunks` disjoint, ascending ranges of features.  Within a chunk, a token's hits are
// ascending by feature; any worker may finish chunks in any order.
class HitCollector {
 public:
  HitCollector(int workers, int64_t chunks) : buffers_(workers), spans_(chunks) {}

  template <typename Fn>
  void fill(int worker, int64_t chunk, const Fn& body) {
    HitBuffer& buffer = buffers_[worker];
    const size_t begin = buffer.size();
    body(buffer.sink);
    spans_[chunk] = {worker, begin, buffer.size()};
  }

  // (crow int64 [T+1], col int32 [nnz], values fp32 [nnz])
  Csr to_csr(int64_t T) const;

 private:
  struct Span {
    int worker = 0;
    size_t begin = 0, end = 0;
  };
  std::vector<HitBuffer> buffers_;
  std::vector<Span> spans_;
};

}  // namespace gsf
