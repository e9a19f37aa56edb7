// Dot products of a unit (16 rows x 32 columns, 8 quads) on machines without an instruction for byte dot
// products.  Included by isa_body.h.

// Whether codes of R bits are multiplied as two halves; on other levels there is one case, compiled once.
template <int R>
constexpr bool kWide = GSF_LEVEL == 1 && R > 4;

#if GSF_LEVEL == 1
// maddubs adds two products of u8 x s8 in int16 and saturates, so codes of more than 4 bits are multiplied as
// two halves of 4.  A half is at most 15, or 16 if the overflow of extra precision is added to 4 bits, and
// activations are at most 127: the 8 quads of a unit stay within 8 * 2 * 16 * 127 = 32,512 < 2^15 before they
// are widened.  In registers, codes of 4 bits are multiplied at 2.4 times the rate of bytes widened first,
// codes of 8 bits at 1.0 to 1.2 times (Zen 3).

// In assembly, because GCC 12 otherwise copies every sum in every step, which halves the rate.
static inline void add_words(__m256i& sum, __m256i products) {
  __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(products));
}
static inline void add_widened(__m256i& sum, __m256i words, __m256i factor) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(words, factor));
}

// sum[t] += a unit's dots with TT tokens: code [8][64] of at most 4 bits, x [8][width][4].
template <int TT>
static inline void narrow_unit_dots(const uint8_t* code, const int8_t* x, int64_t width, I16* sum) {
  __m256i lo[TT], hi[TT];
#pragma GCC unroll 4
  for (int t = 0; t < TT; ++t) lo[t] = hi[t] = _mm256_setzero_si256();
#pragma GCC unroll 2
  for (int j = 0; j < 8; ++j) {
    const B64 c = load64(code + 64 * j);
#pragma GCC unroll 4
    for (int t = 0; t < TT; ++t) {
      const __m256i q = quad16(x + (j * width + t) * 4).lo;
      add_words(lo[t], _mm256_maddubs_epi16(c.lo, q));
      add_words(hi[t], _mm256_maddubs_epi16(c.hi, q));
    }
  }
  const __m256i one = _mm256_set1_epi16(1);
#pragma GCC unroll 4
  for (int t = 0; t < TT; ++t) {
    add_widened(sum[t].lo, lo[t], one);
    add_widened(sum[t].hi, hi[t], one);
  }
}

// The same for codes of 8 bits, 8 rows at a time: `half` is the lower or upper sums of each token.
template <int TT>
static inline void wide_half_dots(const uint8_t* code, const int8_t* x, int64_t width, __m256i* half) {
  const __m256i nibble = _mm256_set1_epi8(15);
  __m256i low[TT], high[TT];
#pragma GCC unroll 4
  for (int t = 0; t < TT; ++t) low[t] = high[t] = _mm256_setzero_si256();
#pragma GCC unroll 2
  for (int j = 0; j < 8; ++j) {
    const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code + 64 * j));
    const __m256i l = _mm256_and_si256(c, nibble), h = _mm256_and_si256(_mm256_srli_epi16(c, 4), nibble);
#pragma GCC unroll 4
    for (int t = 0; t < TT; ++t) {
      const __m256i q = quad16(x + (j * width + t) * 4).lo;
      add_words(low[t], _mm256_maddubs_epi16(l, q));
      add_words(high[t], _mm256_maddubs_epi16(h, q));
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < TT; ++t) {
    add_widened(half[t], low[t], _mm256_set1_epi16(1));
    add_widened(half[t], high[t], _mm256_set1_epi16(16));
  }
}

template <bool WIDE, int TT>
static inline void unit_dots(const uint8_t* code, const int8_t* x, int64_t width, I16* sum) {
  if constexpr (!WIDE) return narrow_unit_dots<TT>(code, x, width, sum);
  __m256i lo[TT], hi[TT];
#pragma GCC unroll 4
  for (int t = 0; t < TT; ++t) lo[t] = sum[t].lo, hi[t] = sum[t].hi;
  wide_half_dots<TT>(code, x, width, lo);
  wide_half_dots<TT>(code + 32, x, width, hi);
#pragma GCC unroll 4
  for (int t = 0; t < TT; ++t) sum[t] = {lo[t], hi[t]};
}

// The same with one token, for codes directly from their planes.
template <bool WIDE>
static inline void fresh_unit_dots(const B64* code, const int8_t* x, I16* sum) {
  __m256i low[2], high[2];
  low[0] = low[1] = high[0] = high[1] = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    const __m256i q = quad16(x + j * 4).lo;
    const B64 c = WIDE ? mask64(code[j], 15) : code[j];
    add_words(low[0], _mm256_maddubs_epi16(c.lo, q));
    add_words(low[1], _mm256_maddubs_epi16(c.hi, q));
    if constexpr (WIDE) {
      const B64 h = mask64(shift64<4>(code[j]), 15);
      add_words(high[0], _mm256_maddubs_epi16(h.lo, q));
      add_words(high[1], _mm256_maddubs_epi16(h.hi, q));
    }
  }
  const __m256i one = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16);
  add_widened(sum->lo, low[0], one);
  add_widened(sum->hi, low[1], one);
  if constexpr (WIDE) {
    add_widened(sum->lo, high[0], sixteen);
    add_widened(sum->hi, high[1], sixteen);
  }
}
#endif
