// What the screen needs in addition to vec.h and matryoshka_vec.h: dots of 64 codes with 64 digits, the sums
// of sixteen accumulators at once, four numbers repeated four times, and rounding to digits.  Included by
// isa_body.h.

#if GSF_LEVEL >= 3
// Adds the sum of code[i] * digit[i] to acc, spread over its lanes; lane order is unspecified.
// In assembly, because GCC 12 copies the accumulator before each intrinsic of this kind: two instructions
// instead of one.
static inline I16 dot64(I16 acc, B64 code, B64 digit) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(code.v), "v"(digit.v));
  return acc;
}
static inline I16 load16i(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
static inline void store16i(int32_t* p, I16 a) { _mm512_storeu_si512(p, a.v); }
static inline I16 imul16(I16 a, I16 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
static inline I16 to_int16(V16 a) { return {_mm512_cvttps_epi32(a.v)}; }
static inline V16 mul16(V16 a, V16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline V16 repeat4(const float* p) { return {_mm512_broadcast_f32x4(_mm_loadu_ps(p))}; }
// Bit i: not (lane i of a <= lane i of floor), so NaN sets the bit.
static inline uint32_t above16(V16 a, V16 floor) { return _mm512_cmp_ps_mask(a.v, floor.v, _CMP_NLE_UQ); }
static inline __m512i sums_of_4(const I16* a) {
  const __m512i ab =
      _mm512_add_epi32(_mm512_unpacklo_epi32(a[0].v, a[1].v), _mm512_unpackhi_epi32(a[0].v, a[1].v));
  const __m512i cd =
      _mm512_add_epi32(_mm512_unpacklo_epi32(a[2].v, a[3].v), _mm512_unpackhi_epi32(a[2].v, a[3].v));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}
// Lane i of the result is the sum of the lanes of a[i].
static inline I16 sums16(const I16* a) {
  const __m512i s0 = sums_of_4(a), s1 = sums_of_4(a + 4), s2 = sums_of_4(a + 8), s3 = sums_of_4(a + 12);
  const __m512i lo = _mm512_add_epi32(_mm512_shuffle_i32x4(s0, s1, 0x44), _mm512_shuffle_i32x4(s0, s1, 0xEE));
  const __m512i hi = _mm512_add_epi32(_mm512_shuffle_i32x4(s2, s3, 0x44), _mm512_shuffle_i32x4(s2, s3, 0xEE));
  return {_mm512_add_epi32(_mm512_shuffle_i32x4(lo, hi, 0x88), _mm512_shuffle_i32x4(lo, hi, 0xDD))};
}
static inline V16 sub16(V16 a, V16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline V16 div16(V16 a, V16 b) { return {_mm512_div_ps(a.v, b.v)}; }
// b if either is NaN
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
static inline __m256i load32i(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
// 32 codes or digits, ready for add_dots.  Without an instruction for byte dot products, even and odd bytes
// are widened to int16, which madd_epi16 sums exactly; maddubs would saturate (2·255·127 > 32,767).
#if GSF_LEVEL == 2
struct Digits32 {
  __m256i all;
};
static inline Digits32 digits32(__m256i digit) { return {digit}; }
static inline void add_dots(__m256i& acc, const Digits32& code, const Digits32& digit) {
  acc = _mm256_dpbusd_avx_epi32(acc, code.all, digit.all);
}
static inline Digits32 codes32(__m256i code) { return {code}; }
#else
struct Digits32 {
  __m256i even, odd;
};
static inline Digits32 digits32(__m256i digit) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(digit, 8), 8), _mm256_srai_epi16(digit, 8)};
}
static inline Digits32 codes32(__m256i code) {
  return {_mm256_and_si256(code, _mm256_set1_epi16(255)), _mm256_srli_epi16(code, 8)};
}
// In assembly as above.
static inline void add_dots(__m256i& acc, const Digits32& code, const Digits32& digit) {
  __asm__("vpaddd %1, %0, %0" : "+x"(acc) : "x"(_mm256_madd_epi16(code.even, digit.even)));
  __asm__("vpaddd %1, %0, %0" : "+x"(acc) : "x"(_mm256_madd_epi16(code.odd, digit.odd)));
}
#endif
static inline __m256i dot32(__m256i acc, __m256i code, __m256i digit) {
  add_dots(acc, codes32(code), digits32(digit));
  return acc;
}
static inline I16 dot64(I16 acc, B64 code, B64 digit) {
  return {dot32(acc.lo, code.lo, digit.lo), dot32(acc.hi, code.hi, digit.hi)};
}
static inline I16 load16i(const int32_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
static inline void store16i(int32_t* p, I16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + 1, a.hi);
}
static inline I16 imul16(I16 a, I16 b) {
  return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
}
static inline I16 to_int16(V16 a) { return {_mm256_cvttps_epi32(a.lo), _mm256_cvttps_epi32(a.hi)}; }
static inline V16 mul16(V16 a, V16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
static inline V16 repeat4(const float* p) {
  const __m256 v = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
  return {v, v};
}
static inline uint32_t above16(V16 a, V16 floor) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.lo, floor.lo, _CMP_NLE_UQ))) |
         static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.hi, floor.hi, _CMP_NLE_UQ))) << 8;
}
static inline __m128i sums_of_4(const __m256i* s) {
  const __m256i h = _mm256_hadd_epi32(_mm256_hadd_epi32(s[0], s[1]), _mm256_hadd_epi32(s[2], s[3]));
  return _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}
static inline I16 sums16(const __m256i* s) {
  return {_mm256_set_m128i(sums_of_4(s + 4), sums_of_4(s)),
          _mm256_set_m128i(sums_of_4(s + 12), sums_of_4(s + 8))};
}
static inline I16 sums16(const I16* a) {
  __m256i s[16];
  for (int i = 0; i < 16; ++i) s[i] = _mm256_add_epi32(a[i].lo, a[i].hi);
  return sums16(s);
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
static inline I16 dot64(I16 acc, const B64& code, const B64& digit) {
  for (int i = 0; i < 64; ++i) acc.v[i & 15] += code.v[i] * static_cast<int8_t>(digit.v[i]);
  return acc;
}
static inline I16 load16i(const int32_t* p) {
  I16 r;
  memcpy(r.v, p, sizeof r.v);
  return r;
}
static inline void store16i(int32_t* p, const I16& a) { memcpy(p, a.v, sizeof a.v); }
static inline I16 imul16(I16 a, const I16& b) {
  for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
  return a;
}
static inline I16 to_int16(const V16& a) {
  I16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = static_cast<int32_t>(a.v[i]);
  return r;
}
static inline V16 mul16(V16 a, const V16& b) {
  for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
  return a;
}
static inline V16 repeat4(const float* p) {
  V16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = p[i & 3];
  return r;
}
static inline uint32_t above16(const V16& a, const V16& floor) {
  uint32_t set = 0;
  for (int i = 0; i < 16; ++i) set |= static_cast<uint32_t>(!(a.v[i] <= floor.v[i])) << i;
  return set;
}
static inline I16 sums16(const I16* a) {
  I16 r{};
  for (int i = 0; i < 16; ++i) {
    for (int lane = 0; lane < 16; ++lane) r.v[i] += a[i].v[lane];
  }
  return r;
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

static inline B64 load_digits64(const int8_t* p) { return load64(reinterpret_cast<const uint8_t*>(p)); }

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
