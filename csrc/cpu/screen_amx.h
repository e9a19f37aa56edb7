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

// A panel of up to 64 features, [f0, f1), against one block of tokens.  A tile's rows are every fourth
// feature, since four rows of codes lie together.  `ahead` lines of the next panel, at `next`, are fetched in
// each step.
static inline void amx_panel(const ScreenArgs& a, int64_t block, int64_t f0, int64_t f1, const char* next,
                             int64_t ahead, CandidateSink& out) {
  const int64_t steps = a.width / kTileColumns, stride = kTileRows * a.width;
  const float* lanes = lanes_of(a, block);
  const uint32_t tokens = tokens_of(a, block);
  const int rows = static_cast<int>((f1 - f0 + kTileRows - 1) / kTileRows);
  for (int pair = 0; pair < 2; ++pair) {
    const uint8_t* code = a.code + f0 * a.width + pair * 2 * kTileColumns;
    const int8_t* digits = a.packed + block * 2 * kLaneTokens * a.width;
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
    alignas(64) int32_t n[4][16][kLaneTokens];
    _tile_stored(0, n[0], 64);
    _tile_stored(1, n[1], 64);
    _tile_stored(2, n[2], 64);
    _tile_stored(3, n[3], 64);
    for (int row = 0; row < rows; ++row) {
      for (int half = 0; half < 2; ++half) {
        const int64_t f = f0 + kTileRows * row + 2 * pair + half;
        int32_t *n1 = n[2 * half][row], *n2 = n[2 * half + 1][row];
        const I16 m1 = without_zero(a, lanes, f, load16i(n1), 0),
                  m2 = without_zero(a, lanes, f, load16i(n2), 1);
        const V16 both = fma16(set16(256.0f), to_float16(m1), to_float16(m2));
        const uint32_t left = left_of_row(a, lanes, f, both) & tokens;
        if (!left) continue;
        store16i(n1, m1);
        store16i(n2, m2);
        push_row(left, n1, n2, block, f, out);
      }
    }
  }
}

static inline void amx_chunk(const ScreenArgs& a, int64_t f0, int64_t f1, CandidateSink& out) {
  const int64_t blocks = (a.encode.T + kLaneTokens - 1) / kLaneTokens;
  const int64_t bytes = blocks * 2 * kLaneTokens * a.width;
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
#endif

static inline void first_stage(const ScreenArgs& a, int64_t f0, int64_t f1, CandidateSink& out) {
#if GSF_LEVEL >= 4
  if (a.packed && a.both) return amx_chunk(a, f0, f1, out);
#endif
#if GSF_LEVEL >= 3
  if (a.packed) return lanes_chunk(a, f0, f1, out);
#endif
  screen_chunk(a, f0, f1, out);
}
