// Sixteen fp64 lanes, for norms and error sums of sixteen fp32 lanes at a time.  Included by isa_body.h.

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
// Two roundings: without an fma instruction it would be a function call, and these sums are bounds, not
// results.
static inline D16 dfma16(const D16& a, const D16& b, D16 c) {
  for (int i = 0; i < 16; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
static inline double dtotal16(const D16& a) {
  double s = 0;
  for (const double e : a.v) s += e;
  return s;
}
#endif

static inline D16 dsquared16(D16 a, D16 sum) { return dfma16(a, a, sum); }
