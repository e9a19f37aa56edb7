// Checks and small conversions shared by the op drivers.  Messages name the argument, what was expected and
// what was given.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "cpu/kernels.h"

namespace gsf {

inline Dtype dtype_of(const at::Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    case at::kChar:
      return Dtype::i8;
    default:
      TORCH_CHECK_TYPE(false, name, ": expected float32, bfloat16 or float16, got ", t.scalar_type());
  }
}

inline void check_shape(const at::Tensor& t, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK_VALUE(t.sizes() == shape, name, ": expected shape ", shape, ", got ", t.sizes());
}

inline void check_float(const at::Tensor& t, const char* name) {
  TORCH_CHECK_TYPE(at::isFloatingType(t.scalar_type()), name, ": expected a floating dtype, got ",
                   t.scalar_type());
}

inline void check_cpu(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, ": expected a tensor on cpu, like the others, got ",
                    t.device());
}

// A new tensor, not filled.  at::empty uses the dispatcher, whose tables are out of cache when a model
// returns to its SAE: without its ten calls an op took 50 us less there.
inline at::Tensor new_tensor(at::IntArrayRef shape, at::ScalarType dtype) {
  return at::detail::empty_cpu(shape, dtype);
}

// fp32 and contiguous; free if it already is both.
at::Tensor widened(const at::Tensor& t);

// The rows [F][d] of a matrix [d, F], which are contiguous in an SAE's storage; copied if they are not.
class Rows {
 public:
  explicit Rows(const at::Tensor& W);
  const void* data() const { return data_; }

 private:
  at::Tensor own_;
  const void* data_;
};

// Compressed rows: crow goes from 0 to nnz and never decreases, col is within [0, F).
void check_csr(const at::Tensor& crow, const at::Tensor& col, int64_t features);

}  // namespace gsf
