// The first stage of the screen on AMX: tiles of 16 features x 64 columns times 64 columns x 16 tokens, eight
// times what VNNI multiplies.  Both digits of the activations are read always: the second costs less here
// than the pairs that it discards would cost later.  One core of an Emerald Rapids Xeon made 2.6 T
// multiply-adds a second of its tiles and 0.33 T of VNNI.

#if GSF_LEVEL >= 4
// Digits of tokens that stay in a 2 MiB L2 beside the rows of this panel and of the next: 256 tokens of 2304.
constexpr int64_t kTokenBytes = 5 << 18;

// Rows of 64 bytes in each of the eight tiles: `rows` in the sums (0 to 3) and in the codes (4, 5), 16 in the
// digits.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

static inline void configure_tiles(int64_t rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = tile < 6 ? static_cast<uint8_t>(rows) : 16;
  }
  _tile_loadconfig(&config);
}

// Digits of sixteen tokens as AMX multiplies them, four columns of each token in turn, and their numbers.
static void screen_pack(const ScreenArgs& a, int64_t block, int8_t* digits, float* lanes) {
  const int64_t t0 = block * kAmxTokens;
  const int count = a.encode.T - t0 < kAmxTokens ? static_cast<int>(a.encode.T - t0) : kAmxTokens;
  memset(digits, 0, static_cast<size_t>(2 * kAmxTokens * a.width));
  memset(lanes, 0, static_cast<size_t>((kAmxLanes + a.k) * kAmxTokens) * sizeof(float));
  for (int i = 0; i < count; ++i) {
    const int64_t t = t0 + i;
    const int8_t* q = a.q1 + t / 2 * kTileRows * a.width + t % 2 * kTileColumns;
    for (int64_t step = 0; step < a.width / kTileColumns; ++step) {
      for (int digit = 0; digit < 2; ++digit) {
        const int8_t* from = q + step * kTileStep + digit * 2 * kTileColumns;
        int8_t* to = digits + (2 * step + digit) * kAmxTileBytes + 4 * i;
        for (int row = 0; row < 16; ++row) memcpy(to + 64 * row, from + 4 * row, 4);
      }
    }
    const ScreenToken& token = a.tokens[t];
    lanes[0 * kAmxTokens + i] = token.t * 0.00390625f;
    lanes[1 * kAmxTokens + i] = token.reach2;
    lanes[2 * kAmxTokens + i] = token.error2;
    memcpy(&lanes[3 * kAmxTokens + i], &token.sum, sizeof token.sum);
    memcpy(&lanes[4 * kAmxTokens + i], &token.sum2, sizeof token.sum2);
    for (int64_t j = 0; j < a.k; ++j) lanes[(kAmxLanes + j) * kAmxTokens + i] = a.along[t * a.k + j];
  }
}

// One feature and sixteen tokens, the chain of left_over with both digits.  n1 and n2 lose the zero point.
static inline uint32_t left_of_row(const ScreenArgs& a, const float* lanes, int64_t f, int32_t* n1,
                                   int32_t* n2) {
  const float* table = a.table + f;
  const int32_t* sums = reinterpret_cast<const int32_t*>(lanes + 3 * kAmxTokens);
  const I16 zero = to_int16(set16(table[kZero * a.stride]));
  const I16 m1 = isub16(load16i(n1), imul16(zero, load16i(sums)));
  const I16 m2 = isub16(load16i(n2), imul16(zero, load16i(sums + kAmxTokens)));
  const V16 n = fma16(set16(256.0f), to_float16(m1), to_float16(m2));
  V16 v = fma16(mul16(set16(table[kScale * a.stride]), load16(lanes)), n, set16(table[kStart * a.stride]));
  for (int64_t j = 0; j < a.k; ++j) {
    v = fma16(set16(table[(kScreenRows + j) * a.stride]), load16(lanes + (kAmxLanes + j) * kAmxTokens), v);
  }
  v = fma16(set16(table[kNorm * a.stride]), load16(lanes + 2 * kAmxTokens), v);
  v = fma16(set16(table[kError * a.stride]), load16(lanes + kAmxTokens), v);
  const uint32_t left = not_below16(v);
  if (left) {
    store16i(n1, m1);
    store16i(n2, m2);
  }
  return left;
}

// A panel of up to 64 features, [f0, f1), against one block of tokens.  A tile's rows are every fourth
// feature, since four rows of codes lie together.  `ahead` lines of the next panel, at `next`, are fetched in
// each step.
static inline void amx_panel(const ScreenArgs& a, int64_t block, int64_t f0, int64_t f1, const char* next,
                             int64_t ahead, CandidateSink& out) {
  const int64_t steps = a.width / kTileColumns, stride = kTileRows * a.width;
  const float* lanes = a.packed_lanes + block * (kAmxLanes + a.k) * kAmxTokens;
  const int64_t t0 = block * kAmxTokens;
  const uint32_t tokens = a.encode.T - t0 < kAmxTokens ? (1u << (a.encode.T - t0)) - 1 : 0xFFFFu;
  const int rows = static_cast<int>((f1 - f0 + kTileRows - 1) / kTileRows);
  for (int pair = 0; pair < 2; ++pair) {
    const uint8_t* code = a.code + f0 * a.width + pair * 2 * kTileColumns;
    const int8_t* digits = a.packed + block * 2 * kAmxTokens * a.width;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t line = 0; line < ahead; ++line, next += 64) __builtin_prefetch(next, 0, 2);
      _tile_loadd(4, code, stride);
      _tile_loadd(6, digits, 64);
      _tile_loadd(7, digits + kAmxTileBytes, 64);
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      _tile_loadd(5, code + kTileColumns, stride);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
      code += kTileStep;
      digits += 2 * kAmxTileBytes;
    }
    alignas(64) int32_t n[4][16][kAmxTokens];
    _tile_stored(0, n[0], 64);
    _tile_stored(1, n[1], 64);
    _tile_stored(2, n[2], 64);
    _tile_stored(3, n[3], 64);
    for (int row = 0; row < rows; ++row) {
      for (int half = 0; half < 2; ++half) {
        const int64_t f = f0 + kTileRows * row + 2 * pair + half;
        int32_t *n1 = n[2 * half][row], *n2 = n[2 * half + 1][row];
        uint32_t left = left_of_row(a, lanes, f, n1, n2) & tokens;
        if (!left) continue;
        out.reserve(16);
        for (; left; left &= left - 1) {
          const int i = __builtin_ctz(left);
          *out.at++ = Candidate{static_cast<int32_t>(t0 + i), static_cast<int32_t>(f), n1[i], n2[i], 0, 0};
        }
      }
    }
  }
}

static inline void amx_chunk(const ScreenArgs& a, int64_t f0, int64_t f1, CandidateSink& out) {
  const int64_t blocks = (a.encode.T + kAmxTokens - 1) / kAmxTokens;
  const int64_t bytes = blocks * 2 * kAmxTokens * a.width;
  const int64_t groups = (bytes + kTokenBytes - 1) / kTokenBytes, group = (blocks + groups - 1) / groups;
  const int64_t end = (a.encode.F + kTileRows - 1) / kTileRows * kTileRows;
  for (int64_t b0 = 0; b0 < blocks; b0 += group) {
    const int64_t b1 = b0 + group < blocks ? b0 + group : blocks;
    for (int64_t f = f0; f < f1; f += kChunkFeatures) {
      const int64_t last = f + kChunkFeatures < f1 ? f + kChunkFeatures : f1;
      configure_tiles((last - f + kTileRows - 1) / kTileRows);
      // all of the next panel's lines in the steps of this one
      const bool more = last + kChunkFeatures <= end;
      const int64_t ahead = more ? (kChunkFeatures / 2 + b1 - b0 - 1) / (b1 - b0) : 0;
      const char* next = reinterpret_cast<const char*>(a.code + last * a.width);
      for (int64_t b = b0; b < b1; ++b) {
        const char* at = next + (b - b0) * 2 * (a.width / kTileColumns) * 64 * ahead;
        amx_panel(a, b, f, last, at, ahead, out);
      }
    }
  }
  _tile_release();
}

static inline void first_stage(const ScreenArgs& a, int64_t f0, int64_t f1, CandidateSink& out) {
  if (a.packed) {
    amx_chunk(a, f0, f1, out);
  } else {
    screen_chunk(a, f0, f1, out);
  }
}
#else
constexpr decltype(Kernels::screen_pack) screen_pack = nullptr;

static inline void first_stage(const ScreenArgs& a, int64_t f0, int64_t f1, CandidateSink& out) {
  screen_chunk(a, f0, f1, out);
}
#endif
