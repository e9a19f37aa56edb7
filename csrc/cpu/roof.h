// The best that the machine can do, as a roof for the kernels: loops that only read, or only multiply and add
// in registers.  Their results are returned, so that the compiler cannot remove them.

// Makes the compiler assume that an operand changed; otherwise it would fold the loops below.  It is applied
// to an operand and not to the sums, because an asm statement would move those to the stack.
#if GSF_LEVEL >= 3
static inline void hide(V16& a) { asm volatile("" : "+v"(a.v)); }
static inline void hide(I16& a) { asm volatile("" : "+v"(a.v)); }
static inline I16 iload16(const void* p) { return {_mm512_loadu_si512(p)}; }
#elif GSF_LEVEL >= 1
static inline void hide(V16& a) { asm volatile("" : "+x"(a.lo), "+x"(a.hi)); }
static inline void hide(I16& a) { asm volatile("" : "+x"(a.lo), "+x"(a.hi)); }
static inline I16 iload16(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
#else
static inline void hide(V16& a) { asm volatile("" : "+m"(a)); }
static inline void hide(I16& a) { asm volatile("" : "+m"(a)); }
static inline I16 iload16(const void* p) {
  I16 r;
  memcpy(r.v, p, 64);
  return r;
}
#endif

// Independent sums: two multiply-adds a cycle with latency 4 need 8 registers in flight: 12 of 32 (AVX-512),
// 10 of 16 (AVX2, two for a V16).
constexpr int kRoofChains = GSF_LEVEL >= 3 ? 12 : 5;

// N separate values instead of an array, which a compiler may keep in memory.  They are loaded from memory
// that the compiler cannot see: equal constants would be merged into one chain.
template <int N, typename V>
struct Chains {
  V value;
  Chains<N - 1, V> rest;
};
template <typename V>
struct Chains<0, V> {};

static inline void start(Chains<0, V16>&, const float*) {}
template <int N>
static inline void start(Chains<N, V16>& c, const float* p) {
  c.value = load16(p);
  start(c.rest, p + 16);
}
static inline void start(Chains<0, I16>&, const float*) {}
template <int N>
static inline void start(Chains<N, I16>& c, const float* p) {
  c.value = iload16(p);
  start(c.rest, p + 16);
}

// Reads `bytes`, a multiple of 512, once: 8 lines a step.
static uint64_t roof_read(const uint8_t* p, int64_t bytes) {
  I16 sum[8];
  for (I16& s : sum) s = izero16();
  for (int64_t i = 0; i < bytes; i += 512) {
    for (int v = 0; v < 8; ++v) {
      // 2 KiB ahead: 100 ns of DRAM latency at about 20 GB/s a core
      __builtin_prefetch(p + i + 64 * v + 2048);
      sum[v] = iadd16(sum[v], iload16(p + i + 64 * v));
    }
  }
  for (int v = 1; v < 8; ++v) sum[0] = iadd16(sum[0], sum[v]);
  uint32_t lanes[16];
  memcpy(lanes, &sum[0], 64);
  uint64_t total = 0;
  for (uint32_t lane : lanes) total += lane;
  return total;
}

static inline void multiply(Chains<0, V16>&, V16, V16) {}
template <int N>
static inline void multiply(Chains<N, V16>& c, V16 a, V16 b) {
  c.value = fma16(c.value, a, b);
  multiply(c.rest, a, b);
}
static inline V16 total(const Chains<1, V16>& c) { return c.value; }
template <int N>
static inline V16 total(const Chains<N, V16>& c) {
  return add16(c.value, total(c.rest));
}

// steps * kRoofChains * 16 fp32 multiply-adds.
static float roof_fma(int64_t steps, const float* zeros) {  // zeros: [kRoofChains * 16]
  V16 a = set16(0.5f);
  const V16 b = set16(1.0f);
  Chains<kRoofChains, V16> sums;
  start(sums, zeros);
  for (int64_t i = 0; i < steps; ++i) {
    hide(a);
    multiply(sums, a, b);
  }
  return fold16(total(sums));
}

// acc[lane] += the exact products of the pair (a, a), with this level's integer instruction: 4 of u8 x s8
// with VNNI, else 2 of int16 x int16 (bytes are widened beforehand, so nothing saturates).
constexpr int kRoofProducts = GSF_LEVEL >= 2 ? 4 : 2;
#if GSF_LEVEL >= 3
static inline I16 roof_dot(I16 acc, I16 a) { return {_mm512_dpbusd_epi32(acc.v, a.v, a.v)}; }
#elif GSF_LEVEL == 2
static inline I16 roof_dot(I16 acc, I16 a) {
  return {_mm256_dpbusd_avx_epi32(acc.lo, a.lo, a.lo), _mm256_dpbusd_avx_epi32(acc.hi, a.hi, a.hi)};
}
#elif GSF_LEVEL == 1
// In assembly as in screen_vec.h: with a copy of each sum in every step, this roof was below the rate of the
// screen.
static inline I16 roof_dot(I16 acc, I16 a) {
  __asm__("vpaddd %1, %0, %0" : "+x"(acc.lo) : "x"(_mm256_madd_epi16(a.lo, a.lo)));
  __asm__("vpaddd %1, %0, %0" : "+x"(acc.hi) : "x"(_mm256_madd_epi16(a.hi, a.hi)));
  return acc;
}
#else
static inline I16 roof_dot(I16 acc, I16 a) {
  for (int i = 0; i < 16; ++i) {
    const int32_t low = static_cast<int16_t>(a.v[i]), high = a.v[i] >> 16;
    acc.v[i] += low * low + high * high;
  }
  return acc;
}
#endif

static inline void multiply(Chains<0, I16>&, I16&) {}
template <int N>
static inline void multiply(Chains<N, I16>& c, I16& a) {
  hide(a);  // each time: otherwise the products of one operand would be computed once for all chains
  c.value = roof_dot(c.value, a);
  multiply(c.rest, a);
}
static inline I16 total(const Chains<1, I16>& c) { return c.value; }
template <int N>
static inline I16 total(const Chains<N, I16>& c) {
  return iadd16(c.value, total(c.rest));
}

#if GSF_LEVEL >= 4
// The int8 multiply-adds used here: four tiles of sums, each operand is in two products.
constexpr int64_t kRoofInt8 = 4 * 16 * 16 * 64;
static int64_t roof_int8(int64_t steps, const float*) {
  alignas(64) int32_t sums[16 * 16];
  memset(sums, 1, sizeof sums);  // bytes of 1
  configure_tiles(16);
  _tile_loadd(4, sums, 64);
  _tile_loadd(5, sums, 64);
  _tile_loadd(6, sums, 64);
  _tile_loadd(7, sums, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < steps; ++i) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  int64_t whole = 0;
  const auto add = [&] {
    for (int32_t v : sums) whole += v;
  };
  _tile_stored(0, sums, 64);
  add();
  _tile_stored(1, sums, 64);
  add();
  _tile_stored(2, sums, 64);
  add();
  _tile_stored(3, sums, 64);
  add();
  _tile_release();
  return whole;
}
#else
constexpr int64_t kRoofInt8 = 16 * kRoofChains * kRoofProducts;
// steps * kRoofChains * 16 * kRoofProducts multiply-adds; few enough that int32 never overflows.
static int64_t roof_int8(int64_t steps, const float* zeros) {  // zeros: [kRoofChains * 16]
  int8_t ones[64];  // every byte is 1 for VNNI, every int16 for the others
  for (int i = 0; i < 64; ++i) ones[i] = kRoofProducts == 4 || i % 2 == 0;
  I16 a = iload16(ones);
  Chains<kRoofChains, I16> sums;
  start(sums, zeros);
  for (int64_t i = 0; i < steps; ++i) multiply(sums, a);
  int32_t lanes[16];
  const I16 sum = total(sums);
  memcpy(lanes, &sum, 64);
  int64_t whole = 0;
  for (int32_t lane : lanes) whole += lane;
  return whole;
}
#endif
