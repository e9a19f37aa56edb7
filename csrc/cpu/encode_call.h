// One call of an op that computes every pair in full precision.
#pragma once

#include <optional>

#include "cpu/collect.h"
#include "cpu/ops_common.h"

namespace gsf {

class EncodeCall {
 public:
  // Raises the same errors as the reference if the arguments do not fit together.
  EncodeCall(const at::Tensor& x, const at::Tensor& W_enc, const at::Tensor& b_enc,
             const at::Tensor& threshold, std::optional<double> bandwidth);

  // The latents of tokens [t0, t1).
  Csr rows(int64_t t0, int64_t t1) const;

 private:
  Rows rows_;
  at::Tensor x_, bias_, theta_;
  EncodeArgs args_{};
};

}  // namespace gsf
