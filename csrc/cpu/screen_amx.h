// The first stage of the screen on AMX: tiles of 16 features x 64 columns times 64 columns x 16 tokens, with
// eight times the rate of VNNI.  One core of an Emerald Rapids Xeon did 2.6 T multiply-adds a second with
// tiles and 0.33 T with VNNI.

#if GSF_LEVEL >= 4
// Tokens whose digits stay in a 2 MiB L2 with the rows of this panel and of the next: 256 tokens of 2304.
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

// A feature and sixteen tokens whose sums of both digits are known: which of them are left.
static inline void amx_both(const ScreenArgs& a, int64_t block, int64_t f, int32_t* n1, int32_t* n2,
                            CandidateSink& out) {
  const OneFeature feature = one_feature(a, f);
  const TokenBlock tokens = token_block(a, block);
  const I16 m1 = less_zero16(load16i(n1), feature.row(kZero), tokens.digit_sums(kDigitSum));
  const I16 m2 = less_zero16(load16i(n2), feature.row(kZero), tokens.digit_sums(kDigitSum2));
  const uint32_t left = left_by_bound(feature, tokens, a.k, joined16(m1, m2)) & tokens_of(a, block, f);
  if (!left) return;
  store16i(n1, m1);
  store16i(n2, m2);
  push_row(left, n1, n2, block, f, out);
}

// The same with sums of first digits.
static inline void amx_first(const ScreenArgs& a, int64_t block, int64_t f, int32_t* n1, CandidateSink& out) {
  const OneFeature feature = one_feature(a, f);
  const TokenBlock tokens = token_block(a, block);
  const I16 m1 = less_zero16(load16i(n1), feature.row(kZero), tokens.digit_sums(kDigitSum));
  const uint32_t left = left_by_bound(feature, tokens, a.k, to_float16(m1)) & tokens_of(a, block, f);
  if (!left) return;
  store16i(n1, m1);
  push_row(left, n1, n1, block, f, out);
}

// A panel of up to 64 features, [f0, f1), times both digits of sixteen tokens, or the first digits of up to
// 32 tokens, `blocks` of sixteen from `block` on.  The rows of a tile are every fourth feature, because four
// rows of codes are stored together.  Each step prefetches `ahead` lines of the next panel, at `next`.
template <bool BOTH>
static inline void amx_panel(const ScreenArgs& a, int64_t block, int64_t blocks, int64_t f0, int64_t f1,
                             const char* next, int64_t ahead, CandidateSink& out) {
  const int64_t steps = a.width / kTileColumns, stride = kTileRows * a.width;
  const int64_t digits_of_block = (BOTH ? 2 : 1) * kLaneTokens * a.width;
  const int64_t step_bytes = (BOTH ? 2 : 1) * kAmxTileBytes;
  // the second tile of digits: the same tokens' second digits, or the next block, or, if there is none, this
  // block again
  const int64_t second = BOTH ? kAmxTileBytes : (blocks - 1) * digits_of_block;
  const int rows = static_cast<int>((f1 - f0 + kTileRows - 1) / kTileRows);
  for (int pair = 0; pair < 2; ++pair) {
    const uint8_t* code = a.code + f0 * a.width + pair * 2 * kTileColumns;
    const int8_t* digits = a.packed + block * digits_of_block;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t line = 0; line < ahead; ++line, next += 64) __builtin_prefetch(next, 0, 2);
      _tile_loadd(4, code, stride);
      _tile_loadd(6, digits, 64);
      _tile_loadd(7, digits + second, 64);
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      _tile_loadd(5, code + kTileColumns, stride);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
      code += kTileStep;
      digits += step_bytes;
    }
    alignas(64) int32_t n[4][16][kLaneTokens];
    _tile_stored(0, n[0], 64);
    _tile_stored(1, n[1], 64);
    _tile_stored(2, n[2], 64);
    _tile_stored(3, n[3], 64);
    for (int row = 0; row < rows; ++row) {
      for (int half = 0; half < 2; ++half) {
        const int64_t f = f0 + kTileRows * row + 2 * pair + half;
        if (BOTH) {
          amx_both(a, block, f, n[2 * half][row], n[2 * half + 1][row], out);
        } else {
          for (int64_t b = 0; b < blocks; ++b) amx_first(a, block + b, f, n[2 * half + b][row], out);
        }
      }
    }
  }
}

template <bool BOTH>
static inline void amx_chunk(const ScreenArgs& a, int64_t f0, int64_t f1, CandidateSink& out) {
  constexpr int64_t kBlocks = BOTH ? 1 : 2;  // of a panel
  const int64_t blocks = (a.encode.T + kLaneTokens - 1) / kLaneTokens;
  const int64_t panels = (blocks + kBlocks - 1) / kBlocks;
  const int64_t bytes = panels * 2 * kLaneTokens * a.width;
  const int64_t groups = (bytes + kTokenBytes - 1) / kTokenBytes, group = (panels + groups - 1) / groups;
  const int64_t end = (a.encode.F + kTileRows - 1) / kTileRows * kTileRows;
  for (int64_t p0 = 0; p0 < panels; p0 += group) {
    const int64_t p1 = p0 + group < panels ? p0 + group : panels;
    for (int64_t f = f0; f < f1; f += kChunkFeatures) {
      const int64_t last = f + kChunkFeatures < f1 ? f + kChunkFeatures : f1;
      configure_tiles((last - f + kTileRows - 1) / kTileRows);
      // the steps of this panel together prefetch all lines of the next one
      const bool more = last + kChunkFeatures <= end;
      const int64_t ahead = more ? (kChunkFeatures / 2 + p1 - p0 - 1) / (p1 - p0) : 0;
      const char* next = reinterpret_cast<const char*>(a.code + last * a.width);
      for (int64_t p = p0; p < p1; ++p) {
        const char* at = next + (p - p0) * 2 * (a.width / kTileColumns) * 64 * ahead;
        const int64_t block = p * kBlocks, count = blocks - block < kBlocks ? blocks - block : kBlocks;
        amx_panel<BOTH>(a, block, count, f, last, at, ahead, out);
      }
    }
  }
  _tile_release();
}
#endif

static inline void first_stage(const ScreenArgs& a, int64_t f0, int64_t f1, CandidateSink& out) {
#if GSF_LEVEL >= 4
  if (a.packed) return a.both ? amx_chunk<true>(a, f0, f1, out) : amx_chunk<false>(a, f0, f1, out);
#endif
#if GSF_LEVEL >= 3
  if (a.packed) return lanes_chunk(a, f0, f1, out);
#endif
  screen_chunk(a, f0, f1, out);
}
