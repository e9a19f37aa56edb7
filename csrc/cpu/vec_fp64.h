// Sixteen fp64 lanes, for norms and error sums of sixteen fp32 lanes at a time, and the few operations on
// these that nothing else needs.  Included by isa_body.h.

#if GSF_LEVEL >= 3
struct D16 {
  __m512d lo, hi;
};
static inline D16 dset16(double a) { return {_mm512_set1_pd(a), _mm512_set1_pd(a)}; }
static inline D16 dwiden16(V16 a) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))};
}
static inline V16 dnarrow16(D16 a) {
  return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(a.lo)), _mm512_cvtpd_ps(a.hi), 1)};
}
static inline D16 dadd16(D16 a, D16 b) { return {_mm512_add_pd(a.lo, b.lo), _mm512_add_pd(a.hi, b.hi)}; }
static inline D16 dsub16(D16 a, D16 b) { return {_mm512_sub_pd(a.lo, b.lo), _mm512_sub_pd(a.hi, b.hi)}; }
static inline D16 dmul16(D16 a, D16 b) { return {_mm512_mul_pd(a.lo, b.lo), _mm512_mul_pd(a.hi, b.hi)}; }
static inline D16 dfma16(D16 a, D16 b, D16 c) {
  return {_mm512_fmadd_pd(a.lo, b.lo, c.lo), _mm512_fmadd_pd(a.hi, b.hi, c.hi)};
}
static inline double dtotal16(D16 a) { return _mm512_reduce_add_pd(_mm512_add_pd(a.lo, a.hi)); }
static inline V16 sub16(V16 a, V16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline V16 div16(V16 a, V16 b) { return {_mm512_div_ps(a.v, b.v)}; }
// b where either is NaN
static inline V16 min16(V16 a, V16 b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline V16 max16(V16 a, V16 b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline V16 abs16(V16 a) { return {_mm512_abs_ps(a.v)}; }
static inline V16 round16(V16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline void store_bytes16(void* p, I16 a) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
#elif GSF_LEVEL >= 1
struct D16 {
  __m256d v[4];
};
static inline D16 dset16(double a) {
  const __m256d v = _mm256_set1_pd(a);
  return {{v, v, v, v}};
}
static inline D16 dwiden16(V16 a) {
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(a.lo)), _mm256_cvtps_pd(_mm256_extractf128_ps(a.lo, 1)),
           _mm256_cvtps_pd(_mm256_castps256_ps128(a.hi)), _mm256_cvtps_pd(_mm256_extractf128_ps(a.hi, 1))}};
}
static inline V16 dnarrow16(const D16& a) {
  return {_mm256_set_m128(_mm256_cvtpd_ps(a.v[1]), _mm256_cvtpd_ps(a.v[0])),
          _mm256_set_m128(_mm256_cvtpd_ps(a.v[3]), _mm256_cvtpd_ps(a.v[2]))};
}
static inline D16 dadd16(D16 a, const D16& b) {
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_add_pd(a.v[i], b.v[i]);
  return a;
}
static inline D16 dsub16(D16 a, const D16& b) {
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_sub_pd(a.v[i], b.v[i]);
  return a;
}
static inline D16 dmul16(D16 a, const D16& b) {
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_mul_pd(a.v[i], b.v[i]);
  return a;
}
static inline D16 dfma16(const D16& a, const D16& b, D16 c) {
  for (int i = 0; i < 4; ++i) c.v[i] = _mm256_fmadd_pd(a.v[i], b.v[i], c.v[i]);
  return c;
}
static inline double dtotal16(const D16& a) {
  double lanes[4];
  _mm256_storeu_pd(lanes, _mm256_add_pd(_mm256_add_pd(a.v[0], a.v[1]), _mm256_add_pd(a.v[2], a.v[3])));
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}
static inline V16 sub16(V16 a, V16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
static inline V16 div16(V16 a, V16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
static inline V16 min16(V16 a, V16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
static inline V16 max16(V16 a, V16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
static inline V16 abs16(V16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
static inline V16 round16(V16 a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)};
}
static inline void store_bytes16(void* p, I16 a) {
  const __m256i low_byte = _mm256_set1_epi32(255);
  const __m256i words =
      _mm256_packus_epi32(_mm256_and_si256(a.lo, low_byte), _mm256_and_si256(a.hi, low_byte));
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  _mm_storeu_si128(static_cast<__m128i*>(p),
                   _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
}
#else
struct D16 {
  double v[16];
};
static inline D16 dset16(double a) {
  D16 r;
  for (double& e : r.v) e = a;
  return r;
}
static inline D16 dwiden16(const V16& a) {
  D16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[i];
  return r;
}
static inline V16 dnarrow16(const D16& a) {
  V16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = static_cast<float>(a.v[i]);
  return r;
}
static inline D16 dadd16(D16 a, const D16& b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
static inline D16 dsub16(D16 a, const D16& b) {
  for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i];
  return a;
}
static inline D16 dmul16(D16 a, const D16& b) {
  for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
  return a;
}
// Two roundings: without an instruction for it fma is a call, and these sums are bounds, not answers.
static inline D16 dfma16(const D16& a, const D16& b, D16 c) {
  for (int i = 0; i < 16; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
static inline double dtotal16(const D16& a) {
  double s = 0;
  for (const double e : a.v) s += e;
  return s;
}
static inline V16 sub16(V16 a, const V16& b) {
  for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i];
  return a;
}
static inline V16 div16(V16 a, const V16& b) {
  for (int i = 0; i < 16; ++i) a.v[i] /= b.v[i];
  return a;
}
static inline V16 min16(const V16& a, V16 b) {
  for (int i = 0; i < 16; ++i) b.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return b;
}
static inline V16 max16(const V16& a, V16 b) {
  for (int i = 0; i < 16; ++i) b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return b;
}
static inline V16 abs16(V16 a) {
  for (float& e : a.v) e = __builtin_fabsf(e);
  return a;
}
static inline V16 round16(V16 a) {
  for (float& e : a.v) e = __builtin_rintf(e);
  return a;
}
static inline void store_bytes16(void* p, const I16& a) {
  uint8_t* to = static_cast<uint8_t*>(p);
  for (int i = 0; i < 16; ++i) to[i] = static_cast<uint8_t>(a.v[i]);
}
#endif

static inline D16 dsquared16(D16 a, D16 sum) { return dfma16(a, a, sum); }

static inline V16 clamped16(V16 a, float least, float most) {
  return max16(min16(a, set16(most)), set16(least));
}

static inline float greatest16(V16 a) {
  float lanes[16], top = 0;
  store16(lanes, a);
  for (const float lane : lanes) top = lane > top ? lane : top;
  return top;
}

static inline int32_t total16(I16 a) {
  int32_t lanes[16], sum = 0;
  store16i(lanes, a);
  for (const int32_t lane : lanes) sum += lane;
  return sum;
}
