// The first stage with one token per lane: the digits of sixteen tokens are interleaved by four columns, as
// the multiply instruction reads them, and no sum goes across lanes.  For many tokens that is faster than
// screen.h, which spends up to a quarter of its products' time to add up a tile's sixteen sums: 2304 x 16,384
// took 25, 15 and 6 % less time at 32, 64 and 1,024 tokens on Zen 5. AVX-512 multiplies the first digits this
// way, AMX those or both (screen_amx.h).

#if GSF_LEVEL >= 3
// Tokens whose digits stay in a 1 MiB L2 with the rows of this panel and of the next: 227 tokens of 2304.
constexpr int64_t kLaneBytes = 1 << 19;
// Features per panel, and vectors of sixteen tokens per block: 24 sums, with three loads of digits and eight
// of codes for 24 products.
constexpr int kPanel = 8, kLaneVectors = 3;

static inline B64 broadcast4(const uint8_t* p) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  return {_mm512_set1_epi32(four)};
}

// Digits of sixteen tokens and their values: with `both`, blocks of 64 columns of the two digits alternate.
static void screen_pack(const ScreenArgs& a, int64_t block, int8_t* digits, float* lanes) {
  const int64_t t0 = block * kLaneTokens, kinds = a.both ? 2 : 1;
  const int count = a.encode.T - t0 < kLaneTokens ? static_cast<int>(a.encode.T - t0) : kLaneTokens;
  memset(digits, 0, static_cast<size_t>(kinds * kLaneTokens * a.width));
  memset(lanes, 0, static_cast<size_t>((kPackedPlanes + a.k) * kLaneTokens) * sizeof(float));
  for (int i = 0; i < count; ++i) {
    const int64_t t = t0 + i;
    const int8_t* q = a.q1 + digits_offset(t, a.width, a.both);
    for (int64_t step = 0; step < a.width / kTileColumns; ++step) {
      for (int64_t digit = 0; digit < kinds; ++digit) {
        const int8_t* from = q + step * kTileStep + digit * 2 * kTileColumns;
        int8_t* to = digits + (kinds * step + digit) * kLaneTokens * kTileColumns + 4 * i;
        for (int row = 0; row < 16; ++row) memcpy(to + 64 * row, from + 4 * row, 4);
      }
    }
    const ScreenToken& token = a.tokens[t];
    for (int plane = kUnit; plane <= kFloor; ++plane) {
      lanes[plane * kLaneTokens + i] = token_number(token, static_cast<TokenPlane>(plane), a.both);
    }
    memcpy(&lanes[kDigitSum * kLaneTokens + i], &token.sum, sizeof token.sum);
    memcpy(&lanes[kDigitSum2 * kLaneTokens + i], &token.sum2, sizeof token.sum2);
    for (int64_t j = 0; j < a.k; ++j) lanes[(kPackedPlanes + j) * kLaneTokens + i] = a.along[t * a.k + j];
  }
}

// Bit i for each token of a block, if the feature exists: a tile's rows are multiples of four, and what the
// table or the codes contain beyond the last feature must not decide anything.
static inline uint32_t tokens_of(const ScreenArgs& a, int64_t block, int64_t f) {
  const int64_t left = a.encode.T - block * kLaneTokens;
  const uint32_t tokens = left < kLaneTokens ? (1u << left) - 1 : 0xFFFFu;
  return f < a.encode.F ? tokens : 0;
}

// The tokens of a block that are left for one feature.
static inline void push_row(uint32_t left, const int32_t* n1, const int32_t* n2, int64_t block, int64_t f,
                            CandidateSink& out) {
  out.reserve(16);
  for (; left; left &= left - 1) {
    const int i = __builtin_ctz(left);
    const int64_t t = block * kLaneTokens + i;
    *out.at++ = Candidate{static_cast<int32_t>(t), static_cast<int32_t>(f), n1[i], n2[i], 0, 0};
  }
}

// Up to eight features from f0 on, in one or two tiles of codes, times N vectors of sixteen tokens.  Each
// step prefetches `ahead` lines of the next panel, at `next`.
template <int ROWS, int N>
static inline void lanes_panel(const ScreenArgs& a, int64_t block, int64_t f0, const char* next,
                               int64_t ahead, CandidateSink& out) {
  I16 acc[ROWS][N];
  for (auto& row : acc) {
    for (I16& v : row) v = izero16();
  }
  const int64_t vector = kLaneTokens * a.width;
  const uint8_t* code = a.code + f0 * a.width;
  const int8_t* digits = a.packed + block * vector;
  for (int64_t step = 0; step < a.width; step += kTileColumns) {
    for (int64_t line = 0; line < ahead; ++line, next += 64) __builtin_prefetch(next, 0, 2);
    for (int four = 0; four < kTileColumns; four += 4) {
      B64 x[N];
      for (int n = 0; n < N; ++n) x[n] = load_digits64(digits + n * vector);
      for (int f = 0; f < ROWS; ++f) {
        const B64 c =
            broadcast4(code + f / kTileRows * kTileRows * a.width + f % kTileRows * kTileColumns + four);
        for (int n = 0; n < N; ++n) acc[f][n] = dot64(acc[f][n], c, x[n]);
      }
      digits += 64;
    }
    code += kTileStep;
  }
  for (int f = 0; f < ROWS; ++f) {
    const OneFeature feature = one_feature(a, f0 + f);
    for (int n = 0; n < N; ++n) {
      const TokenBlock tokens = token_block(a, block + n);
      const I16 m = less_zero16(acc[f][n], feature.row(kZero), tokens.digit_sums(kDigitSum));
      const uint32_t left =
          left_by_bound(feature, tokens, a.k, to_float16(m)) & tokens_of(a, block + n, f0 + f);
      if (!left) continue;
      int32_t n1[16];
      store16i(n1, m);
      push_row(left, n1, n1, block + n, f0 + f, out);
    }
  }
}

template <int ROWS>
static inline void lanes_panels(const ScreenArgs& a, int64_t block, int64_t count, int64_t f0,
                                const char* next, int64_t ahead, CandidateSink& out) {
  if (count == 3) return lanes_panel<ROWS, 3>(a, block, f0, next, ahead, out);
  if (count == 2) return lanes_panel<ROWS, 2>(a, block, f0, next, ahead, out);
  lanes_panel<ROWS, 1>(a, block, f0, next, ahead, out);
}

static inline void lanes_chunk(const ScreenArgs& a, int64_t f0, int64_t f1, CandidateSink& out) {
  const int64_t vectors = (a.encode.T + kLaneTokens - 1) / kLaneTokens;
  const int64_t blocks =
      (vectors + kLaneVectors - 1) / kLaneVectors;  // blocks of two or three vectors, or a single one
  const int64_t groups = (vectors * kLaneTokens * a.width + kLaneBytes - 1) / kLaneBytes;
  const int64_t end = (a.encode.F + kTileRows - 1) / kTileRows * kTileRows;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t b0 = group * blocks / groups, b1 = (group + 1) * blocks / groups;
    for (int64_t f = f0; f < f1; f += kPanel) {
      // the steps of this panel, which reads its rows once per block, prefetch all lines of the next one
      // (prefetching full-precision rows of candidates too took a third more time at 64 tokens, a tenth at
      // 256)
      const bool more = b1 > b0 && f + 2 * kPanel <= end;
      const int64_t ahead = more ? (kPanel + b1 - b0 - 1) / (b1 - b0) : 0;
      const char* next = reinterpret_cast<const char*>(a.code + (f + kPanel) * a.width);
      for (int64_t b = b0; b < b1; ++b) {
        const int64_t v0 = b * vectors / blocks, v1 = (b + 1) * vectors / blocks;
        const char* at = next + (b - b0) * a.width * ahead;
        if (end - f > kTileRows) {
          lanes_panels<kPanel>(a, v0, v1 - v0, f, at, ahead, out);
        } else {
          lanes_panels<kTileRows>(a, v0, v1 - v0, f, at, ahead, out);
        }
      }
    }
  }
}
#else
constexpr decltype(Kernels::screen_pack) screen_pack = nullptr;
#endif
