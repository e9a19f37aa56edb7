// y = A(x - mean) . W_r^T + bias for nested codes in bit planes (gemmascope_fast/quant/planes.py).
//
// A unit is 16 rows x 32 columns: 8 quads of 64 bytes when unpacked. Each quad is an operand of an 8-bit dot
// product whose 16 lanes are 16 outputs, so nothing is ever summed across lanes.

// Where the bits of quad J are: field J % 4 of one half of a plane of width 2, bit J of a plane of width 1.
template <int R, int P, int J>
static inline B64 aligned(const B64* const* planes) {
  constexpr int width = plane_width(R, P), low = plane_low(R, P);
  constexpr int from = width == 2 ? 2 * (J % 4) : J;
  return shift64<from - low>(planes[P][width == 2 ? J / 4 : 0]);
}

// Planes 1 and 2, of one bit each, combined into pairs: one for the even quads, one for the odd quads. The
// pair of quad J is at bits J and J+1 of the first, J-1 and J of the second.
static inline void pair_planes(B64 high, B64 low, B64* pairs) {  // [2]
  pairs[0] = select64<0xAA>(shift64<-1>(high), low);
  pairs[1] = select64<0xAA>(high, shift64<1>(low));
}

// Quad J of a unit.  Shifts also move neighbouring bits; each merge keeps those above its own field and
// replaces the rest.
template <int R, int J>
static inline B64 quad_of(const B64* const* planes, const B64* pairs) {
  constexpr int low = R > 2 ? R - 2 : 0, pair = R > 4 ? R - 4 : 0;
  constexpr int third = R > 4 ? ((1 << plane_width(R, 3)) - 1) << plane_low(R, 3) : 0;
  B64 code = mask64(aligned<R, 0, J>(planes), ((1 << plane_width(R, 0)) - 1) << low);
  if constexpr (R == 3) code = merge64<1>(code, aligned<R, 1, J>(planes));
  if constexpr (R >= 4) code = merge64<3 << pair>(code, shift64<J / 2 * 2 - pair>(pairs[J % 2]));
  if constexpr (R >= 5) code = merge64<third>(code, aligned<R, 3, J>(planes));
  if constexpr (R >= 7) code = merge64<(1 << plane_width(R, 4)) - 1>(code, aligned<R, 4, J>(planes));
  return code;
}

template <int R>
static inline void unpack_unit(const uint8_t* const* unit, B64* code) {  // [planes] -> [64 * width]; [8]
  B64 plane[5][2];
  const B64* planes[5];
  for (int p = 0; p < plane_count(R); ++p) {
    for (int v = 0; v < plane_width(R, p); ++v) plane[p][v] = load64(unit[p] + 64 * v);
    planes[p] = plane[p];
  }
  B64 pairs[2] = {};
  if constexpr (R >= 4) pair_planes(plane[1][0], plane[2][0], pairs);
  code[0] = quad_of<R, 0>(planes, pairs);
  code[1] = quad_of<R, 1>(planes, pairs);
  code[2] = quad_of<R, 2>(planes, pairs);
  code[3] = quad_of<R, 3>(planes, pairs);
  code[4] = quad_of<R, 4>(planes, pairs);
  code[5] = quad_of<R, 5>(planes, pairs);
  code[6] = quad_of<R, 6>(planes, pairs);
  code[7] = quad_of<R, 7>(planes, pairs);
}

// Bits stored below the slice are dropped, or rounded once.  (c + 2^(d-1)) >> d = ((c >> (d-1)) + 1) >> 1
// fits in a byte.
static inline void reslice(const MatryoshkaArgs& a, B64* code) {
  const int drop = a.stored - a.bits, first = a.rounds ? drop - 1 : drop;
  for (int j = 0; j < 8; ++j) {
    B64 c = mask64(shift_right64(code[j], first), 255 >> first);
    if (a.rounds) c = min64(halve_up64(c), a.top);
    code[j] = c;
  }
}

struct PlaneCursor {
  const uint8_t* at[5];
};

template <int R>
static inline PlaneCursor planes_of_block(const MatryoshkaArgs& a, int64_t block) {
  PlaneCursor c{};
  for (int p = 0; p < plane_count(R); ++p) c.at[p] = a.planes[p] + block * a.units * 64 * plane_width(R, p);
  return c;
}

// Units to prefetch ahead.  The planes are several streams per thread, and the hardware prefetcher stops at
// each page. One unit of 2 bits is read in about 4 ns, so 64 units cover DRAM latency and the page boundary;
// with the eight lines of a unit of 8 bits, 16 units cover as much, and more were slower.
template <int R>
constexpr int kUnitsAhead = R >= 7 ? 16 : 64;

template <int R>
static inline void next_unit(PlaneCursor& c) {
  for (int p = 0; p < plane_count(R); ++p) {
    constexpr int64_t line = 64;
    for (int i = 0; i < plane_width(R, p); ++i) {
      __builtin_prefetch(c.at[p] + (kUnitsAhead<R> * plane_width(R, p) + i) * line);
    }
    c.at[p] += line * plane_width(R, p);
  }
}

// The codes of one block, unpacked: raw [units][8][64].
template <int R>
static inline void unpack_block(const MatryoshkaArgs& a, int64_t block, uint8_t* raw) {
  PlaneCursor cursor = planes_of_block<R>(a, block);
  const bool finish = a.stored > a.bits;
  for (int64_t u = 0; u < a.units; ++u) {
    B64 code[8];
    unpack_unit<R>(cursor.at, code);
    if (finish) reslice(a, code);
    for (int j = 0; j < 8; ++j) store64(raw + (u * 8 + j) * 64, code[j]);
    next_unit<R>(cursor);
  }
  if (a.over_crow == nullptr) return;
  for (int64_t lane = 0; lane < 16 && block * 16 + lane < a.out; ++lane) {
    const int64_t row = block * 16 + lane;
    for (int64_t i = a.over_crow[row]; i < a.over_crow[row + 1]; ++i) {
      const int64_t k = a.over_col[i];
      raw[k / 4 * 64 + lane * 4 + k % 4] += 1;
    }
  }
}

static inline V16 scale_of(const MatryoshkaArgs& a, int64_t at) {
  return a.scale_dtype == Dtype::f16 ? load16(static_cast<const F16*>(a.scale) + at)
                                     : load16(static_cast<const float*>(a.scale) + at);
}

static inline void store_rows(const MatryoshkaArgs& a, int64_t t, int64_t block, V16 y) {
  float* out = a.y + t * a.out + block * 16;
  const int64_t left = a.out - block * 16;
  if (left >= 16) return store16(out, y);
  float whole[16];
  store16(whole, y);
  memcpy(out, whole, static_cast<size_t>(left) * sizeof(float));
}

static inline V16 bias_of(const MatryoshkaArgs& a, int64_t block) {
  if (a.bias == nullptr) return zero16();
  const int64_t left = a.out - block * 16;
  return left >= 16 ? load16(a.bias + block * 16) : load16_tail(a.bias + block * 16, left);
}

// Adds a group's integer dots to the sums.  Groups of up to 512 fit fp32 exactly. A wider one subtracts its
// zero point in int32 first, because in fp32 the products and the zero point's part would cancel.
template <int TT>
static inline void end_group(const MatryoshkaArgs& a, int64_t block, int64_t g, const int32_t* qsum,  // [TT]
                             const I16* dot, V16* acc) {                                              // [TT]
  const int64_t at = (block * a.groups + g) * 16;
  const V16 alpha = scale_of(a, at);
  const I16 zero = widen16(a.zero + at);
  const int shift = 8 - a.bits;
  if (a.group_units > 16) {
    for (int t = 0; t < TT; ++t) {
      const V16 whole = to_float16(isub16(ishift_left16(dot[t], shift), imul16(zero, qsum[t])));
      acc[t] = fma16(alpha, add16(whole, set16(a.mid * static_cast<float>(qsum[t]))), acc[t]);
    }
    return;
  }
  const V16 step = fma16(alpha, set16(static_cast<float>(1 << shift)), zero16());
  const V16 rest = fma16(alpha, add16(set16(a.mid), to_float16(imul16(zero, -1))), zero16());
  for (int t = 0; t < TT; ++t) {
    acc[t] = fma16(step, to_float16(dot[t]), acc[t]);
    acc[t] = fma16(rest, set16(static_cast<float>(qsum[t])), acc[t]);
  }
}

static inline void finish_tile(const MatryoshkaArgs& a, int64_t block, int64_t first, int tokens,
                               const V16* acc) {
  const V16 bias = bias_of(a, block);
  for (int t = 0; t < tokens; ++t) {
    store_rows(a, first + t, block, fma16(acc[t], set16(a.s[first + t]), bias));
  }
}

// A block of 16 rows and a tile of TT tokens; each unit is used directly after unpacking from planes of R
// bits.
template <int R, int TT>
static inline void plane_tile(const MatryoshkaArgs& a, int64_t block, const MatryoshkaTile& tile) {
  // Independent sums: a dot product takes 4 to 5 cycles, and two start in each cycle.
  constexpr int chains = TT == 1 ? 4 : 2;
  PlaneCursor cursor = planes_of_block<R>(a, block);
  const bool finish = a.stored > a.bits;
  const int8_t* x = tile.q;  // [units * 8][TT][4]
  V16 acc[TT];
  for (int t = 0; t < TT; ++t) acc[t] = zero16();
  for (int64_t g = 0, u = 0; g < a.groups; ++g) {
    const int64_t end = u + a.group_units < a.units ? u + a.group_units : a.units;
    I16 dot[chains][TT];
    for (int c = 0; c < chains; ++c) {
      for (int t = 0; t < TT; ++t) dot[c][t] = izero16();
    }
    for (; u < end; ++u) {
      B64 code[8];
      unpack_unit<R>(cursor.at, code);
      next_unit<R>(cursor);
      if (finish) reslice(a, code);
#if GSF_LEVEL == 1
      if constexpr (TT == 1) {
        fresh_unit_dots<kWide<R>>(code, x + u * 32, dot[0]);
      } else {
        uint8_t unit[512];
        for (int j = 0; j < 8; ++j) store64(unit + 64 * j, code[j]);
        unit_dots<kWide<R>, TT>(unit, x + u * 32 * TT, TT, dot[0]);
      }
#else
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
#pragma GCC unroll 4
        for (int t = 0; t < TT; ++t) {
          dot[j % chains][t] = dot4(dot[j % chains][t], code[j], quad16(x + ((u * 8 + j) * TT + t) * 4));
        }
      }
#endif
    }
    for (int c = 1; c < chains; ++c) {
      for (int t = 0; t < TT; ++t) dot[0][t] = iadd16(dot[0][t], dot[c][t]);
    }
    end_group<TT>(a, block, g, tile.qsum + g * TT, dot[0], acc);
  }
  finish_tile(a, block, tile.first, tile.tokens, acc);
}

// NB blocks already unpacked (raw [NB][units][8][64]) and TT tokens of a tile from token t0 on: each quad of
// activations is broadcast once and used NB times.  WIDE: codes of more than 4 bits.
template <int NB, int TT, bool WIDE>
static inline void raw_tile(const MatryoshkaArgs& a, int64_t block, const uint8_t* raw,
                            const MatryoshkaTile& tile, int t0) {
  const int64_t stride = a.units * 512, width = tile.width;
  const int8_t* x = tile.q + t0 * 4;  // [units * 8][width][4]
  V16 acc[NB][TT];
  for (int n = 0; n < NB; ++n) {
    for (int t = 0; t < TT; ++t) acc[n][t] = zero16();
  }
  for (int64_t g = 0, quad = 0; g < a.groups; ++g) {
    const int64_t units = (g + 1) * a.group_units < a.units ? (g + 1) * a.group_units : a.units;
    // an array whose address is not taken stays in registers
    I16 sum[NB * TT];
#pragma GCC unroll 24
    for (int i = 0; i < NB * TT; ++i) sum[i] = izero16();
#if GSF_LEVEL == 1
    // codes of 8 bits are used many times here: widening their bytes once per quad took a fifth less time
    // than halves
    static_assert(NB == 1, "the sums of one block fill the registers");
    if constexpr (!WIDE) {
      for (; quad < units * 8; quad += 8) {
        narrow_unit_dots<TT>(raw + quad * 64, x + quad * width * 4, width, sum);
      }
    }
#endif
    for (; quad < units * 8; ++quad) {
      B64 code[NB];
#pragma GCC unroll 3
      for (int n = 0; n < NB; ++n) code[n] = load64(raw + n * stride + quad * 64);
#pragma GCC unroll 8
      for (int t = 0; t < TT; ++t) {
        const I16 q = quad16(x + (quad * width + t) * 4);
#pragma GCC unroll 3
        for (int n = 0; n < NB; ++n) sum[n * TT + t] = dot4(sum[n * TT + t], code[n], q);
      }
    }
    I16 dot[NB][TT];
#pragma GCC unroll 24
    for (int i = 0; i < NB * TT; ++i) dot[i / TT][i % TT] = sum[i];
    for (int n = 0; n < NB; ++n) end_group<TT>(a, block + n, g, tile.qsum + g * width + t0, dot[n], acc[n]);
  }
  const int left = tile.tokens - t0 < TT ? tile.tokens - t0 : TT;
  for (int n = 0; n < NB; ++n) finish_tile(a, block + n, tile.first + t0, left, acc[n]);
}

// The same with fp32 activations: the code's level (a multiple of 1/2, exact) times x; the scale is applied
// once per group.
template <int TT>
static inline void block_tile_exact(const MatryoshkaArgs& a, int64_t block, const uint8_t* raw,
                                    const MatryoshkaTile& tile) {
  const float* x = tile.x;  // [units * 32][TT]
  const int shift = 8 - a.bits;
  const V16 mid = set16(a.mid);
  V16 acc[TT];
  for (int t = 0; t < TT; ++t) acc[t] = zero16();
  for (int64_t g = 0, u = 0; g < a.groups; ++g) {
    const int64_t at = (block * a.groups + g) * 16;
    const I16 zero = widen16(a.zero + at);
    const int64_t end = u + a.group_units < a.units ? u + a.group_units : a.units;
    V16 sum[4][TT];  // by column modulo 4: four independent chains
    for (int c = 0; c < 4; ++c) {
      for (int t = 0; t < TT; ++t) sum[c][t] = zero16();
    }
    for (int64_t quad = u * 8; quad < end * 8; ++quad) {
      const B64 code = load64(raw + quad * 64);
      const I16 lane[4] = {byte_of_lane<0>(code), byte_of_lane<1>(code), byte_of_lane<2>(code),
                           byte_of_lane<3>(code)};
      for (int c = 0; c < 4; ++c) {
        const V16 level = add16(to_float16(isub16(ishift_left16(lane[c], shift), zero)), mid);
        for (int t = 0; t < TT; ++t) sum[c][t] = fma16(level, set16(x[(quad * 4 + c) * TT + t]), sum[c][t]);
      }
    }
    u = end;
    const V16 alpha = scale_of(a, at);
    for (int t = 0; t < TT; ++t) {
      acc[t] = fma16(alpha, add16(add16(sum[0][t], sum[1][t]), add16(sum[2][t], sum[3][t])), acc[t]);
    }
  }
  const V16 bias = bias_of(a, block);
  for (int t = 0; t < tile.tokens; ++t) store_rows(a, tile.first + t, block, add16(acc[t], bias));
}

// Blocks and tokens of one raw_tile. Of the 32 registers of AVX-512, 24 are sums, 3 codes, 1 activations. Of
// the 16 registers of AVX2, where sixteen lanes take two, 4 sums use 8.
#if GSF_LEVEL >= 3
constexpr int kRawBlocks = 3, kRawTokens = 8;
#else
constexpr int kRawBlocks = 1, kRawTokens = 4;
#endif
static_assert(kRawBlocks <= kMatryoshkaBlocks, "the drivers' space holds the blocks of a call");

template <int NB, bool WIDE>
static inline void raw_blocks(const MatryoshkaArgs& a, int64_t block, const uint8_t* raw) {
  for (int64_t i = 0; i < a.tile_count; ++i) {
    const MatryoshkaTile& tile = a.tiles[i];
    if (a.exact) {
      for (int n = 0; n < NB; ++n) {
        const uint8_t* own = raw + n * a.units * 512;
        if (tile.width == 1) block_tile_exact<1>(a, block + n, own, tile);
        if (tile.width != 1) block_tile_exact<4>(a, block + n, own, tile);
      }
      continue;
    }
    int t = 0;
    for (; tile.tokens - t > 4 && kRawTokens == 8; t += 8)
      raw_tile<NB, kRawTokens, WIDE>(a, block, raw, tile, t);
    for (; t < tile.tokens && tile.width >= 4; t += 4) raw_tile<NB, 4, WIDE>(a, block, raw, tile, t);
    for (; t < tile.tokens; ++t) raw_tile<NB, 1, WIDE>(a, block, raw, tile, t);
  }
}

template <int R>
static inline void blocks_of(const MatryoshkaArgs& a, int64_t b0, int64_t b1, uint8_t* raw) {
  // up to 4 tokens, codes are used directly after unpacking; with more, the unpacked blocks are read again
  // from cache
  const MatryoshkaTile& only = a.tiles[0];
  if (a.tile_count == 1 && only.width <= 4 && !a.exact && a.over_crow == nullptr) {
    for (int64_t b = b0; b < b1; ++b) {
      if (only.width == 1) plane_tile<R, 1>(a, b, only);
      if (only.width != 1) plane_tile<R, 4>(a, b, only);
    }
    return;
  }
  for (int64_t b = b0; b < b1;) {
    const int64_t n = b1 - b < kRawBlocks ? 1 : kRawBlocks;
    for (int64_t i = 0; i < n; ++i) unpack_block<R>(a, b + i, raw + i * a.units * 512);
    if (n == 1) raw_blocks<1, kWide<R>>(a, b, raw);
    if (n != 1) raw_blocks<kRawBlocks, kWide<R>>(a, b, raw);
    b += n;
  }
}

static void matryoshka(const MatryoshkaArgs& a, int64_t b0, int64_t b1, uint8_t* raw) {
  switch (a.stored) {
    case 1:
      return blocks_of<1>(a, b0, b1, raw);
    case 2:
      return blocks_of<2>(a, b0, b1, raw);
    case 3:
      return blocks_of<3>(a, b0, b1, raw);
    case 4:
      return blocks_of<4>(a, b0, b1, raw);
    case 5:
      return blocks_of<5>(a, b0, b1, raw);
    case 6:
      return blocks_of<6>(a, b0, b1, raw);
    case 7:
      return blocks_of<7>(a, b0, b1, raw);
    default:
      return blocks_of<8>(a, b0, b1, raw);
  }
}
