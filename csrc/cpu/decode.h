// Sparse decode: out[n] = sum over the row's features, in ascending order, of value * w[f] by fused
// multiply-add, then the bias.  Each output element is summed in that order for any blocking over columns.

// Rows to prefetch ahead.  Narrow blocks, whose rows come from the last-level cache, need many: at 1,024
// tokens and blocks of 128 columns (Zen 5) 6 rows ahead took 8.5 ms, 8 took 7.95, 12 took 7.4 and 15 took
// 7.1.  Whole rows from memory took the same time from 4 on.
template <int NV>
constexpr int64_t kDecodeAhead = NV > 8 ? 6 : 14;

static inline float scaled_value(const DecodeArgs& a, int64_t i) {
  return a.row_scale ? a.values[i] * a.row_scale[a.col[i]] : a.values[i];
}

// NV * 16 columns of one row, kept in registers over all its features.  Features are prefetched up to `last`:
// the row's own, or those of the following rows in these columns.
template <int NV, typename E>
static inline void decode_columns(const DecodeArgs& a, int64_t n, int64_t k, int64_t last) {
  const E* w = static_cast<const E*>(a.w) + k;
  const int64_t begin = a.crow[n], end = a.crow[n + 1];
  V16 acc[NV];
  for (int v = 0; v < NV; ++v) acc[v] = zero16();
  for (int64_t i = begin; i < end; ++i) {
    if (i + kDecodeAhead<NV> < last) {
      const char* next = reinterpret_cast<const char*>(w + a.col[i + kDecodeAhead<NV>] * a.d);
      for (size_t byte = 0; byte < NV * 16 * sizeof(E); byte += 64) __builtin_prefetch(next + byte);
    }
    const V16 value = set16(scaled_value(a, i));
    const E* row = w + a.col[i] * a.d;
    for (int v = 0; v < NV; ++v) acc[v] = fma16(value, load16(row + v * 16), acc[v]);
  }
  float* out = a.out + n * a.d + k;
  for (int v = 0; v < NV; ++v) {
    if (a.bias) acc[v] = add16(acc[v], load16(a.bias + k + v * 16));
    store16(out + v * 16, acc[v]);
  }
}

template <typename E>
static inline void decode_tail(const DecodeArgs& a, int64_t n, int64_t k, int64_t count) {
  const E* w = static_cast<const E*>(a.w) + k;
  V16 acc = zero16();
  for (int64_t i = a.crow[n]; i < a.crow[n + 1]; ++i) {
    acc = fma16(set16(scaled_value(a, i)), load16_tail(w + a.col[i] * a.d, count), acc);
  }
  if (a.bias) acc = add16(acc, load16_tail(a.bias + k, count));
  float whole[16];
  store16(whole, acc);
  memcpy(a.out + n * a.d + k, whole, static_cast<size_t>(count) * sizeof(float));
}

template <typename E>
static inline void decode_rows(const DecodeArgs& a, int64_t n0, int64_t n1, int64_t d0, int64_t d1) {
  const bool one_block = d1 - d0 <= 256;  // then the next row is read in the same columns
  for (int64_t n = n0; n < n1; ++n) {
    const int64_t last = a.crow[one_block ? n1 : n + 1];
    int64_t k = d0;
    for (; k + 256 <= d1; k += 256) decode_columns<16, E>(a, n, k, last);
    for (; k + 128 <= d1; k += 128) decode_columns<8, E>(a, n, k, last);
    for (; k + 64 <= d1; k += 64) decode_columns<4, E>(a, n, k, last);
    for (; k + 16 <= d1; k += 16) decode_columns<1, E>(a, n, k, last);
    if (k < d1) decode_tail<E>(a, n, k, d1 - k);
  }
}

static void decode(const DecodeArgs& a, int64_t n0, int64_t n1, int64_t d0, int64_t d1) {
  switch (a.w_dtype) {
    case Dtype::f32:
      return decode_rows<float>(a, n0, n1, d0, d1);
    case Dtype::bf16:
      return decode_rows<BF16>(a, n0, n1, d0, d1);
    case Dtype::f16:
      return decode_rows<F16>(a, n0, n1, d0, d1);
    case Dtype::i8:
      return decode_rows<int8_t>(a, n0, n1, d0, d1);
  }
}
