// Screened JumpReLU encode: 8-bit rows discard what provably does not fire, a second digit discards most of
// the rest, and the exact dot of dot.h computes what is left.  docs/how/screen.md derives the bounds.

// Rows of codes that stay in L1 while the tokens' digits stream past: 18 KiB of 32; the rest is for a tile of
// digits.  Each tile of digits then comes from L2 once for all these rows.
constexpr int64_t kRowBytes = 18432;
// Tokens whose digits (64 x 2304 bytes) stay in a 1 MiB L2 while the rows of a chunk are processed.
constexpr int64_t kTokenBlock = 64;
// How far ahead one tile of tokens prefetches its codes: 4 to 8 KiB took the same time, 2 and 18 a twentieth
// longer (Emerald Rapids).
constexpr int64_t kAheadBytes = 8192;
// Up to this many tokens a row rarely has two candidates, so they are computed in the order in which they
// were found.
constexpr int64_t kFewTokens = 8;

// The dots of four digit rows with four code rows: lane 4 r + f.  Each step prefetches AHEAD lines of `ahead`
// into L2.  STRIDE 4 reads only row 0, STRIDE 2 rows 0 and 2: what a single token has.
#if GSF_LEVEL == 1 || GSF_LEVEL == 2
// Two digit rows at a time: eight sums, their digits and a code fit sixteen registers.  All four at once,
// with sums on the stack, reached seven tenths of the rate (Zen 3).
template <int AHEAD, int ROWS>
static inline void screen_rows_of(const int8_t* q, int64_t next_row, const uint8_t* code, const char* ahead,
                                  int64_t width, __m256i* sums) {  // [ROWS][4]
  __m256i acc[4 * ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < 4 * ROWS; ++i) acc[i] = _mm256_setzero_si256();
#pragma GCC unroll 1
  for (int64_t k = 0; k < 4 * width; k += kTileStep) {
    for (int line = 0; line < AHEAD; ++line) __builtin_prefetch(ahead + (k / 4 * AHEAD + line * 64), 0, 2);
#pragma GCC unroll 2
    for (int half = 0; half < 64; half += 32) {
      Digits32 x[ROWS];
#pragma GCC unroll 2
      for (int r = 0; r < ROWS; ++r) x[r] = digits32(load32i(q + k + r * next_row + half));
#pragma GCC unroll 4
      for (int f = 0; f < 4; ++f) {
        const Digits32 c = codes32(load32i(code + k + 64 * f + half));
#pragma GCC unroll 2
        for (int r = 0; r < ROWS; ++r) add_dots(acc[4 * r + f], c, x[r]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4 * ROWS; ++i) sums[i] = acc[i];
}

template <int AHEAD, int STRIDE>
static inline I16 screen_sums(const int8_t* q,      // [width/64][4][64]
                              const uint8_t* code,  // [width/64][4][64]
                              const char* ahead, int64_t width) {
  __m256i sums[16] = {};
  if constexpr (STRIDE == 4) screen_rows_of<AHEAD, 1>(q, 0, code, ahead, width, sums);
  if constexpr (STRIDE == 2) {
    screen_rows_of<AHEAD, 2>(q, 2 * kTileColumns, code, ahead, width, sums);
    for (int f = 4; f < 8; ++f) sums[4 + f] = sums[f], sums[f] = _mm256_setzero_si256();
  }
  if constexpr (STRIDE == 1) {
    screen_rows_of<AHEAD, 2>(q, kTileColumns, code, ahead, width, sums);
    screen_rows_of<0, 2>(q + 2 * kTileColumns, kTileColumns, code, ahead, width, sums + 8);
  }
  return sums16(sums);
}
#else
template <int AHEAD, int STRIDE>
static inline I16 screen_sums(const int8_t* q,      // [width/64][4][64]
                              const uint8_t* code,  // [width/64][4][64]
                              const char* ahead, int64_t width) {
  I16 acc[16];
  for (I16& v : acc) v = izero16();
  for (int64_t k = 0; k < width; k += kTileColumns) {
    for (int line = 0; line < AHEAD; ++line) __builtin_prefetch(ahead + (k * AHEAD + line * 64), 0, 2);
    B64 c[4];
    for (int f = 0; f < 4; ++f) c[f] = load64(code + 4 * k + 64 * f);
    for (int r = 0; r < 4; r += STRIDE) {
      const B64 x = load_digits64(q + 4 * k + 64 * r);
      for (int f = 0; f < 4; ++f) acc[4 * r + f] = dot64(acc[4 * r + f], c[f], x);
    }
  }
  return sums16(acc);
}
#endif

static inline void push_candidates(uint32_t left, const int32_t* n1, const int32_t* n2, int64_t t0,
                                   int64_t f0, CandidateSink& out) {
  out.reserve(16);
  for (; left; left &= left - 1) {
    const int i = __builtin_ctz(left);
    *out.at++ =
        Candidate{static_cast<int32_t>(t0 + i / 4), static_cast<int32_t>(f0 + i % 4), n1[i], n2[i], 0, 0};
  }
}

// Four tokens and four features, only first digits.
static inline void first_digits(const ScreenArgs& a, I16 raw, int64_t t0, int64_t f0, uint32_t wanted,
                                CandidateSink& out) {
  const FourFeatures features = four_features(a, f0);
  const FourTokens tokens = four_tokens(a, t0);
  const I16 digit_sums =
      load16i(reinterpret_cast<const int32_t*>(tokens.lanes + kDigitSum * tokens.plane_size));
  const I16 n = less_zero16(raw, features.row(kZero), digit_sums);
  const uint32_t left = left_by_bound(features, tokens, a.k, to_float16(n)) & wanted;
  if (!left) return;
  int32_t n1[16];
  store16i(n1, n);
  push_candidates(left, n1, n1, t0, f0, out);
}

// Two tokens and four features, both digits: sums of first digits in lanes 0 to 7, of second digits after
// them.
static inline void both_digits(const ScreenArgs& a, I16 sums, int64_t t0, int64_t f0, uint32_t wanted,
                               CandidateSink& out) {
  const FourFeatures features = four_features(a, f0);
  int32_t digit_sums[16], n[16], n1[16] = {}, n2[16] = {};
  for (int i = 0; i < 8; ++i) {
    const int64_t t = t0 + i / 4 < a.encode.T ? t0 + i / 4 : t0;
    digit_sums[i] = a.tokens[t].sum;
    digit_sums[8 + i] = a.tokens[t].sum2;
  }
  store16i(n, less_zero16(sums, features.row(kZero), load16i(digit_sums)));
  for (int i = 0; i < 8; ++i) n1[i] = n[i], n2[i] = n[8 + i];
  const V16 both = joined16(load16i(n1), load16i(n2));
  const uint32_t left = left_by_bound(features, four_tokens(a, t0), a.k, both) & wanted & 0xFFu;
  if (left) push_candidates(left, n1, n2, t0, f0, out);
}

// The rows [f0, f1) times tokens [t0, t1).  With few tokens, time is spent waiting for codes: the next ones,
// at `next`, are prefetched into L2 meanwhile, AHEAD lines per step.
template <int AHEAD>
static inline void screen_block(const ScreenArgs& a, int64_t t0, int64_t t1, int64_t f0, int64_t f1,
                                const uint8_t* next, CandidateSink& out) {
  const char* ahead = reinterpret_cast<const char*>(next);
  const int64_t step = a.both ? 2 : 4;
  for (int64_t t = t0; t < t1; t += step) {
    const int8_t* q = a.q1 + t / step * kTileRows * a.width;
    const uint32_t rows = t1 - t < 4 ? (1u << (4 * (t1 - t))) - 1 : 0xFFFFu;
    for (int64_t f = f0; f < f1; f += 4) {
      const uint8_t* code = a.code + f * a.width;
      const I16 sums = t1 - t > 1 ? screen_sums<AHEAD, 1>(q, code, ahead, a.width)
                       : a.both   ? screen_sums<AHEAD, 2>(q, code, ahead, a.width)
                                  : screen_sums<AHEAD, 4>(q, code, ahead, a.width);
      ahead += AHEAD * a.width;
      const uint32_t wanted = rows & features_there(a, f);
      if (a.both) {
        both_digits(a, sums, t, f, wanted, out);
      } else {
        first_digits(a, sums, t, f, wanted, out);
      }
    }
  }
}

static inline void screen_chunk(const ScreenArgs& a, int64_t f0, int64_t f1, CandidateSink& out) {
  const int64_t rows = kRowBytes / a.width / 4 > 0 ? kRowBytes / a.width / 4 * 4 : 4;
  // number of passes over a block of rows: each step prefetches this many of the next lines
  const int64_t tiles = (a.encode.T + (a.both ? 1 : 3)) / (a.both ? 2 : 4);
  const int64_t end = (a.encode.F + 3) / 4 * 4;
  for (int64_t t = 0; t < a.encode.T; t += kTokenBlock) {
    const int64_t t1 = t + kTokenBlock < a.encode.T ? t + kTokenBlock : a.encode.T;
    for (int64_t f = f0; f < f1; f += rows) {
      const int64_t last = f + rows < f1 ? f + rows : f1;
      const uint8_t* next = tiles == 1 ? a.code + f * a.width + kAheadBytes : a.code + last * a.width;
      if (t > 0 || tiles > 4 || last + rows > end) {
        screen_block<0>(a, t, t1, f, last, next, out);
      } else if (tiles == 1) {
        screen_block<4>(a, t, t1, f, last, next, out);
      } else if (tiles == 2) {
        screen_block<2>(a, t, t1, f, last, next, out);
      } else {
        screen_block<1>(a, t, t1, f, last, next, out);
      }
    }
  }
}
