// The fixed order of summation (docs/how/exact.md): lane j of 16 sums the products k = j (mod 16), k
// ascending, by fused multiply-add; the lanes are added 8-4-2-1; the caller adds the bias last.

// A TT x FF tile of dots: z[t][f] = x[t] . w[f].  Each pair has one 16-lane accumulator, so the order does
// not depend on the tile, whose shape can be chosen to fit the registers.
template <int TT, int FF, typename E>
static inline void dot_tile(const float* const* x,  // [TT] -> [d]
                            const E* const* w,      // [FF] -> [d]
                            int64_t d, float* z) {  // [TT][FF]
  V16 acc[TT][FF];
  for (int t = 0; t < TT; ++t) {
    for (int f = 0; f < FF; ++f) acc[t][f] = zero16();
  }
  const int64_t whole = d & ~int64_t{15};
  for (int64_t k = 0; k < whole; k += 16) {
    V16 wk[FF];
    for (int f = 0; f < FF; ++f) wk[f] = load16(w[f] + k);
    for (int t = 0; t < TT; ++t) {
      const V16 xk = load16(x[t] + k);
      for (int f = 0; f < FF; ++f) acc[t][f] = fma16(xk, wk[f], acc[t][f]);
    }
  }
  if (whole < d) {
    V16 wk[FF];
    for (int f = 0; f < FF; ++f) wk[f] = load16_tail(w[f] + whole, d - whole);
    for (int t = 0; t < TT; ++t) {
      const V16 xk = load16_tail(x[t] + whole, d - whole);
      for (int f = 0; f < FF; ++f) acc[t][f] = fma16(xk, wk[f], acc[t][f]);
    }
  }
  for (int t = 0; t < TT; ++t) {
    for (int f = 0; f < FF; ++f) z[t * FF + f] = fold16(acc[t][f]);
  }
}

// Dots of P unrelated pairs, in the same order.
template <int P, typename E>
static inline void dot_pairs(const float* const* x,  // [P] -> [d]
                             const E* const* w,      // [P] -> [d]
                             int64_t d, float* z) {  // [P]
  V16 acc[P];
  for (int p = 0; p < P; ++p) acc[p] = zero16();
  const int64_t whole = d & ~int64_t{15};
  for (int64_t k = 0; k < whole; k += 16) {
    for (int p = 0; p < P; ++p) acc[p] = fma16(load16(x[p] + k), load16(w[p] + k), acc[p]);
  }
  if (whole < d) {
    for (int p = 0; p < P; ++p) {
      acc[p] = fma16(load16_tail(x[p] + whole, d - whole), load16_tail(w[p] + whole, d - whole), acc[p]);
    }
  }
  for (int p = 0; p < P; ++p) z[p] = fold16(acc[p]);
}
