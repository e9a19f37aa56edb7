// Sixteen fp32 lanes, defined once per instruction set, with the same results.  isa_body.h includes this
// inside the instruction set's namespace; GSF_LEVEL is 0 plain, 1 AVX2, 2 AVX-VNNI, 3 AVX-512, 4 AVX-512
// and AMX.

#if GSF_LEVEL >= 3
struct V16 {
  __m512 v;
};
static inline V16 zero16() { return {_mm512_setzero_ps()}; }
static inline V16 set16(float a) { return {_mm512_set1_ps(a)}; }
static inline V16 load16(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void store16(float* p, V16 a) { _mm512_storeu_ps(p, a.v); }
static inline V16 fma16(V16 a, V16 b, V16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline V16 add16(V16 a, V16 b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline V16 load16(const BF16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
static inline V16 load16(const F16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline V16 load16(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
// Adds the lanes in the fixed order of summation (docs/how/exact.md): 8-4-2-1.
static inline float fold16(V16 a) {
  const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
#elif GSF_LEVEL >= 1
struct V16 {
  __m256 lo, hi;
};
static inline V16 zero16() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline V16 set16(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
static inline V16 load16(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store16(float* p, V16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
static inline V16 fma16(V16 a, V16 b, V16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
static inline V16 add16(V16 a, V16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
static inline __m256 widen8(const BF16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
static inline __m256 widen8(const F16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline __m256 widen8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
static inline V16 load16(const BF16* p) { return {widen8(p), widen8(p + 8)}; }
static inline V16 load16(const F16* p) { return {widen8(p), widen8(p + 8)}; }
static inline V16 load16(const int8_t* p) { return {widen8(p), widen8(p + 8)}; }
static inline float fold16(V16 a) {
  const __m256 s8 = _mm256_add_ps(a.lo, a.hi);
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
#else
struct V16 {
  float v[16];
};
static inline V16 set16(float a) {
  V16 r;
  for (float& e : r.v) e = a;
  return r;
}
static inline V16 zero16() { return set16(0.0f); }
static inline V16 load16(const float* p) {
  V16 r;
  memcpy(r.v, p, sizeof r.v);
  return r;
}
static inline void store16(float* p, V16 a) { memcpy(p, a.v, sizeof a.v); }
// fmaf and not a*b+c, because a single rounding is part of the contract.
static inline V16 fma16(V16 a, V16 b, V16 c) {
  for (int i = 0; i < 16; ++i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
}
static inline V16 add16(V16 a, V16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
static inline V16 load16(const BF16* p) {
  V16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = widen(p[i]);
  return r;
}
static inline V16 load16(const F16* p) {
  V16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = widen(p[i]);
  return r;
}
static inline V16 load16(const int8_t* p) {
  V16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = p[i];
  return r;
}
static inline float fold16(V16 a) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  }
  return a.v[0];
}
#endif

// The last n < 16 elements, zero-padded.
template <typename E>
static inline V16 load16_tail(const E* p, int64_t n) {
  E padded[16] = {};
  memcpy(padded, p, static_cast<size_t>(n) * sizeof(E));
  return load16(padded);
}
