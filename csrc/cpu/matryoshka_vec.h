// 64 code bytes and sixteen int32 lanes, defined once per instruction set. They are integers, so the results
// are the same. Byte 4*lane + c of a B64 belongs to lane `lane` of an I16.  Included by isa_body.h.

#if GSF_LEVEL >= 3
struct B64 {
  __m512i v;
};
struct I16 {
  __m512i v;
};
static inline B64 load64(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
static inline void store64(uint8_t* p, B64 a) { _mm512_storeu_si512(p, a.v); }
static inline B64 or64(B64 a, B64 b) { return {_mm512_or_si512(a.v, b.v)}; }
static inline B64 mask64(B64 a, int byte) {
  return {_mm512_and_si512(a.v, _mm512_set1_epi8(static_cast<char>(byte)))};
}
// The bits of M from a, the others from b.
template <int M>
static inline B64 select64(B64 a, B64 b) {
  return {_mm512_ternarylogic_epi64(a.v, b.v, _mm512_set1_epi8(static_cast<char>(M)), 0xE4)};
}
// a, combined with b's bits of M.
template <int M>
static inline B64 merge64(B64 a, B64 b) {
  return {_mm512_ternarylogic_epi64(a.v, b.v, _mm512_set1_epi8(static_cast<char>(M)), 0xF8)};
}
static inline B64 min64(B64 a, int byte) {
  return {_mm512_min_epu8(a.v, _mm512_set1_epi8(static_cast<char>(byte)))};
}
static inline B64 halve_up64(B64 a) { return {_mm512_avg_epu8(a.v, _mm512_setzero_si512())}; }
// Shift right by N, or left if N is negative, within 16-bit pieces: a mask must follow.
template <int N>
static inline B64 shift64(B64 a) {
  if constexpr (N > 0) return {_mm512_srli_epi16(a.v, N)};
  if constexpr (N < 0) return {_mm512_slli_epi16(a.v, -N)};
  return a;
}
static inline B64 shift_right64(B64 a, int n) { return {_mm512_srl_epi16(a.v, _mm_cvtsi32_si128(n))}; }

static inline I16 izero16() { return {_mm512_setzero_si512()}; }
static inline I16 iadd16(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline I16 isub16(I16 a, I16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
static inline I16 imul16(I16 a, int32_t b) { return {_mm512_mullo_epi32(a.v, _mm512_set1_epi32(b))}; }
static inline I16 ishift_left16(I16 a, int n) { return {_mm512_sll_epi32(a.v, _mm_cvtsi32_si128(n))}; }
static inline V16 to_float16(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
static inline I16 widen16(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
template <int C>
static inline I16 byte_of_lane(B64 a) {
  return {_mm512_and_si512(_mm512_srli_epi32(a.v, 8 * C), _mm512_set1_epi32(255))};
}
// Four activations, repeated in every lane.
static inline I16 quad16(const int8_t* x) {
  int32_t quad;
  memcpy(&quad, x, sizeof quad);
  return {_mm512_set1_epi32(quad)};
}
// acc[lane] += sum over c of code[lane][c] * x[c]
static inline I16 dot4(I16 acc, B64 code, I16 x) { return {_mm512_dpbusd_epi32(acc.v, code.v, x.v)}; }
#elif GSF_LEVEL >= 1
struct B64 {
  __m256i lo, hi;
};
struct I16 {
  __m256i lo, hi;
};
static inline B64 load64(const uint8_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
static inline void store64(uint8_t* p, B64 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + 1, a.hi);
}
static inline B64 or64(B64 a, B64 b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
static inline B64 mask64(B64 a, int byte) {
  const __m256i m = _mm256_set1_epi8(static_cast<char>(byte));
  return {_mm256_and_si256(a.lo, m), _mm256_and_si256(a.hi, m)};
}
template <int M>
static inline B64 merge64(B64 a, B64 b) {
  return or64(a, mask64(b, M));
}
template <int M>
static inline B64 select64(B64 a, B64 b) {
  return or64(mask64(a, M), mask64(b, ~M));
}
static inline B64 min64(B64 a, int byte) {
  const __m256i m = _mm256_set1_epi8(static_cast<char>(byte));
  return {_mm256_min_epu8(a.lo, m), _mm256_min_epu8(a.hi, m)};
}
static inline B64 halve_up64(B64 a) {
  const __m256i zero = _mm256_setzero_si256();
  return {_mm256_avg_epu8(a.lo, zero), _mm256_avg_epu8(a.hi, zero)};
}
template <int N>
static inline B64 shift64(B64 a) {
  if constexpr (N > 0) return {_mm256_srli_epi16(a.lo, N), _mm256_srli_epi16(a.hi, N)};
  if constexpr (N < 0) return {_mm256_slli_epi16(a.lo, -N), _mm256_slli_epi16(a.hi, -N)};
  return a;
}
static inline B64 shift_right64(B64 a, int n) {
  const __m128i count = _mm_cvtsi32_si128(n);
  return {_mm256_srl_epi16(a.lo, count), _mm256_srl_epi16(a.hi, count)};
}

static inline I16 izero16() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
static inline I16 iadd16(I16 a, I16 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
static inline I16 isub16(I16 a, I16 b) {
  return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
static inline I16 imul16(I16 a, int32_t b) {
  const __m256i m = _mm256_set1_epi32(b);
  return {_mm256_mullo_epi32(a.lo, m), _mm256_mullo_epi32(a.hi, m)};
}
static inline I16 ishift_left16(I16 a, int n) {
  const __m128i count = _mm_cvtsi32_si128(n);
  return {_mm256_sll_epi32(a.lo, count), _mm256_sll_epi32(a.hi, count)};
}
static inline V16 to_float16(I16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
static inline I16 widen16(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
template <int C>
static inline I16 byte_of_lane(B64 a) {
  const __m256i m = _mm256_set1_epi32(255);
  return {_mm256_and_si256(_mm256_srli_epi32(a.lo, 8 * C), m),
          _mm256_and_si256(_mm256_srli_epi32(a.hi, 8 * C), m)};
}
static inline I16 quad16(const int8_t* x) {
  int32_t quad;
  memcpy(&quad, x, sizeof quad);
  const __m256i q = _mm256_set1_epi32(quad);
  return {q, q};
}
static inline I16 dot4(I16 acc, B64 code, I16 x) {
  const __m256i q = x.lo;
#if GSF_LEVEL == 2
  return {_mm256_dpbusd_avx_epi32(acc.lo, code.lo, q), _mm256_dpbusd_avx_epi32(acc.hi, code.hi, q)};
#else
  // even and odd bytes as int16, which madd_epi16 sums exactly; maddubs would saturate (2·255·127 > 32,767)
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(q, 8), 8), odd = _mm256_srai_epi16(q, 8);
  const __m256i low = _mm256_set1_epi16(255);
  const auto half = [&](__m256i sum, __m256i c) __attribute__((target("avx2,fma,f16c"))) {
    const __m256i e = _mm256_madd_epi16(_mm256_and_si256(c, low), even);
    const __m256i o = _mm256_madd_epi16(_mm256_srli_epi16(c, 8), odd);
    return _mm256_add_epi32(sum, _mm256_add_epi32(e, o));
  };
  return {half(acc.lo, code.lo), half(acc.hi, code.hi)};
#endif
}
#else
struct B64 {
  uint8_t v[64];
};
struct I16 {
  int32_t v[16];
};
static inline B64 load64(const uint8_t* p) {
  B64 r;
  memcpy(r.v, p, 64);
  return r;
}
static inline void store64(uint8_t* p, B64 a) { memcpy(p, a.v, 64); }
static inline B64 or64(B64 a, B64 b) {
  for (int i = 0; i < 64; ++i) a.v[i] |= b.v[i];
  return a;
}
static inline B64 mask64(B64 a, int byte) {
  for (uint8_t& e : a.v) e &= static_cast<uint8_t>(byte);
  return a;
}
template <int M>
static inline B64 merge64(B64 a, B64 b) {
  return or64(a, mask64(b, M));
}
template <int M>
static inline B64 select64(B64 a, B64 b) {
  return or64(mask64(a, M), mask64(b, ~M));
}
static inline B64 min64(B64 a, int byte) {
  for (uint8_t& e : a.v) e = e < byte ? e : static_cast<uint8_t>(byte);
  return a;
}
static inline B64 halve_up64(B64 a) {
  for (uint8_t& e : a.v) e = static_cast<uint8_t>((e + 1) >> 1);
  return a;
}
template <int N>
static inline B64 shift64(B64 a) {
  for (uint8_t& e : a.v) e = static_cast<uint8_t>(N > 0 ? e >> (N > 0 ? N : 0) : e << (N < 0 ? -N : 0));
  return a;
}
static inline B64 shift_right64(B64 a, int n) {
  for (uint8_t& e : a.v) e = static_cast<uint8_t>(e >> n);
  return a;
}

static inline I16 izero16() { return I16{}; }
static inline I16 iadd16(I16 a, I16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
static inline I16 isub16(I16 a, I16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i];
  return a;
}
static inline I16 imul16(I16 a, int32_t b) {
  for (int32_t& e : a.v) e *= b;
  return a;
}
static inline I16 ishift_left16(I16 a, int n) {
  // unsigned: shifting a negative number left is defined there
  for (int32_t& e : a.v) e = static_cast<int32_t>(static_cast<uint32_t>(e) << n);
  return a;
}
static inline V16 to_float16(I16 a) {
  V16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = static_cast<float>(a.v[i]);
  return r;
}
static inline I16 widen16(const uint8_t* p) {
  I16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = p[i];
  return r;
}
template <int C>
static inline I16 byte_of_lane(B64 a) {
  I16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[4 * i + C];
  return r;
}
static inline I16 quad16(const int8_t* x) {
  I16 r;
  for (int i = 0; i < 16; ++i) memcpy(&r.v[i], x, 4);
  return r;
}
static inline I16 dot4(I16 acc, B64 code, I16 x) {
  int8_t q[4];
  memcpy(q, x.v, 4);
  for (int i = 0; i < 16; ++i) {
    for (int c = 0; c < 4; ++c) acc.v[i] += code.v[4 * i + c] * q[c];
  }
  return acc;
}
#endif
