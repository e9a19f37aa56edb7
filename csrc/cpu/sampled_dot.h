// Dots of selected (row of x, row of w) pairs in the fixed order of summation: the gradient of decode with
// respect to its values, and pre-activations requested by index.

template <typename E>
static inline void sampled_rows(const SampledDotArgs& a, int64_t n0, int64_t n1) {
  const E* w = static_cast<const E*>(a.w);
  for (int64_t n = n0; n < n1; ++n) {
    const float* x[1] = {a.x + n * a.d};
    int64_t i = a.crow[n];
    const int64_t end = a.crow[n + 1];
    float z[4];
    for (; i < end; i += 4) {
      const int64_t count = end - i < 4 ? end - i : 4;
      const E* rows[4];
      // a short last group repeats its last row, to avoid a separate code path
      for (int64_t f = 0; f < 4; ++f) rows[f] = w + a.col[i + (f < count ? f : count - 1)] * a.d;
      dot_tile<1, 4>(x, rows, a.d, z);
      for (int64_t f = 0; f < count; ++f) a.out[i + f] = a.bias ? z[f] + a.bias[a.col[i + f]] : z[f];
    }
  }
}

static void sampled_dot(const SampledDotArgs& a, int64_t n0, int64_t n1) {
  switch (a.w_dtype) {
    case Dtype::f32:
      return sampled_rows<float>(a, n0, n1);
    case Dtype::bf16:
      return sampled_rows<BF16>(a, n0, n1);
    case Dtype::f16:
      return sampled_rows<F16>(a, n0, n1);
    case Dtype::i8:
      return;  // rejected by the checks one layer up
  }
}
