// Screened JumpReLU encode: 8-bit rows discard what provably does not fire, a second digit most of the rest,
// and the deciding dot of dot.h answers for what is left.  The bounds are derived in docs/screen.md.

// Rows of codes that stay in L1 while the tokens' digits stream past them: 18 KiB of 32, the rest for a tile
// of digits.  Each tile of digits then comes from L2 once for all of them.
constexpr int64_t kRowBytes = 18432;
// Tokens whose digits (64 x 2304 bytes) stay in a 1 MiB L2 while the rows of a chunk pass.
constexpr int64_t kTokenBlock = 64;
// From this many tokens most rows have a candidate.
constexpr int64_t kManyTokens = 128;
// Up to this many tokens a row hardly has two candidates, and they are refined in the order in which they
// came.
constexpr int64_t kFewTokens = 8;

// The dots of four digit rows with four code rows: lane 4 r + f.  AHEAD lines of `ahead` are prefetched into
// L2 a step.  STRIDE 4 reads row 0 alone, 2 rows 0 and 2: what one token has.
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

// v = z^ + B - tau in one chain; bit i is clear, and the pair discarded, only where v <= 0.
static inline uint32_t left_over(const ScreenArgs& a, V16 n, int64_t t0, int64_t f0) {
  const float* table = a.table + f0;
  const float* lanes = a.lanes + 4 * t0;
  const int64_t plane = 4 * a.lane_stride;
  V16 v =
      fma16(mul16(repeat4(table + kScale * a.stride), load16(lanes)), n, repeat4(table + kStart * a.stride));
  for (int64_t j = 0; j < a.k; ++j) {
    v = fma16(repeat4(table + (kScreenRows + j) * a.stride), load16(lanes + (4 + j) * plane), v);
  }
  v = fma16(repeat4(table + kNorm * a.stride), load16(lanes + 2 * plane), v);
  v = fma16(repeat4(table + kError * a.stride), load16(lanes + plane), v);
  return not_below16(v);
}

static inline void push_candidates(uint32_t left, const int32_t* n1, const int32_t* n2, int64_t t0,
                                   int64_t f0, CandidateSink& out) {
  out.reserve(16);
  for (; left; left &= left - 1) {
    const int i = __builtin_ctz(left);
    *out.at++ =
        Candidate{static_cast<int32_t>(t0 + i / 4), static_cast<int32_t>(f0 + i % 4), n1[i], n2[i], 0, 0};
  }
}

// Four tokens and four features, first digits alone.
static inline void first_digits(const ScreenArgs& a, I16 raw, int64_t t0, int64_t f0, uint32_t wanted,
                                CandidateSink& out) {
  const I16 zero = to_int16(repeat4(a.table + kZero * a.stride + f0));
  const float* sums = a.lanes + 4 * (3 * a.lane_stride + t0);
  const I16 n = isub16(raw, imul16(zero, load16i(reinterpret_cast<const int32_t*>(sums))));
  const uint32_t left = left_over(a, to_float16(n), t0, f0) & wanted;
  if (!left) return;
  int32_t n1[16];
  store16i(n1, n);
  push_candidates(left, n1, n1, t0, f0, out);
}

// Two tokens and four features, both digits: 256 n1 + n2 in fp32, whose rounding is in the bound.
static inline void both_digits(const ScreenArgs& a, I16 sums, int64_t t0, int64_t f0, uint32_t wanted,
                               CandidateSink& out) {
  int32_t raw[16], n1[16] = {}, n2[16] = {};
  float n[16] = {};
  store16i(raw, sums);
  for (int i = 0; i < 8; ++i) {
    const int64_t t = t0 + i / 4 < a.encode.T ? t0 + i / 4 : t0;
    const int32_t zero = static_cast<int32_t>(a.table[kZero * a.stride + f0 + i % 4]);
    n1[i] = raw[i] - zero * a.tokens[t].sum;
    n2[i] = raw[8 + i] - zero * a.tokens[t].sum2;
    n[i] = __builtin_fmaf(256.0f, static_cast<float>(n1[i]), static_cast<float>(n2[i]));
  }
  const uint32_t left = left_over(a, load16(n), t0, f0) & wanted & 0xFFu;
  if (left) push_candidates(left, n1, n2, t0, f0, out);
}

// Lines on their way into L2 while something else is computed, a few at each call.
struct Fetching {
  const char *at = nullptr, *end = nullptr;
  int64_t lines = 0;
  void some() {
    for (int64_t i = 0; i < lines && at < end; ++i, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// The full-precision rows of a chunk, which many tokens will hardly spare: fetched while it is screened.
// Mapped ones may not be there yet, and are not read right after.
static inline Fetching rows_of_chunk(const ScreenArgs& a, int64_t f0, int64_t f1) {
  if (a.mapped || a.encode.T < kManyTokens) return {};
  const int64_t bytes = a.encode.d * (a.encode.w_dtype == Dtype::f32 ? 4 : 2);
  const char* w = static_cast<const char*>(a.encode.w);
  const int64_t tiles = (a.encode.T + 3) / 4 * ((f1 - f0 + 3) / 4);
  return {w + f0 * bytes, w + f1 * bytes, ((f1 - f0) * bytes / 64 + tiles) / tiles};
}

// The rows [f0, f1) against tokens [t0, t1).  Few tokens wait for the codes: the next block's, at `next`, are
// on their way into L2 meanwhile, AHEAD lines a step.
template <int AHEAD>
static inline void screen_block(const ScreenArgs& a, int64_t t0, int64_t t1, int64_t f0, int64_t f1,
                                const uint8_t* next, Fetching& wanted, CandidateSink& out) {
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
      wanted.some();
      // the table's columns past F never survive
      if (a.both) {
        both_digits(a, sums, t, f, rows, out);
      } else {
        first_digits(a, sums, t, f, rows, out);
      }
    }
  }
}

static inline void screen_chunk(const ScreenArgs& a, int64_t f0, int64_t f1, CandidateSink& out) {
  const int64_t rows = kRowBytes / a.width / 4 > 0 ? kRowBytes / a.width / 4 * 4 : 4;
  // how often a block of rows is walked: that many of its lines are fetched in each of its steps
  const int64_t tiles = (a.encode.T + (a.both ? 1 : 3)) / (a.both ? 2 : 4);
  const int64_t end = (a.encode.F + 3) / 4 * 4;
  Fetching wanted = rows_of_chunk(a, f0, f1);
  for (int64_t t = 0; t < a.encode.T; t += kTokenBlock) {
    const int64_t t1 = t + kTokenBlock < a.encode.T ? t + kTokenBlock : a.encode.T;
    for (int64_t f = f0; f < f1; f += rows) {
      const int64_t last = f + rows < f1 ? f + rows : f1;
      const uint8_t* next = a.code + last * a.width;
      if (t > 0 || tiles > 4 || last + rows > end) {
        screen_block<0>(a, t, t1, f, last, next, wanted, out);
      } else if (tiles == 1) {
        screen_block<4>(a, t, t1, f, last, next, wanted, out);
      } else if (tiles == 2) {
        screen_block<2>(a, t, t1, f, last, next, wanted, out);
      } else {
        screen_block<1>(a, t, t1, f, last, next, wanted, out);
      }
    }
  }
}

// What the directions add to z^: exact but for fp64's rounding.
static inline double along_directions(const ScreenArgs& a, const Candidate& c) {
  const float* along = a.along + c.token * a.k;
  const float* projected = a.table + kScreenRows * a.stride + c.feature;
  double sum = 0;
  for (int64_t j = 0; j < a.k; ++j) sum += static_cast<double>(projected[j * a.stride]) * along[j];
  return sum;
}

// z^ and B of a candidate in fp64, from the first digit of the row and both of the token.
static inline void estimate(const ScreenArgs& a, Candidate& c) {
  const ScreenToken& token = a.tokens[c.token];
  const float* table = a.table + c.feature;
  c.z = static_cast<double>(table[kScale * a.stride]) * token.t * (c.n1 + c.n2 * 0.00390625) +
        table[kCentredBias * a.stride] + along_directions(a, c);
  c.bound = static_cast<double>(table[kError * a.stride]) * token.reach2 +
            static_cast<double>(table[kNorm * a.stride]) * token.error2 + table[kSlack * a.stride];
}

// n2 of sixteen candidates, the tokens' second digits against the rows' first, and what the epilogue leaves
// of them: bit i as in left_over, whose chain this is with both digits.
static inline uint32_t second_look(const ScreenArgs& a, Candidate* const* c) {  // [16]
  const uint8_t* row[16];
  const int8_t* q[16];
  float scale[16], start[16], norm[16], error[16], reach2[16], error2[16], n[16];
  I16 acc[16];
  for (int i = 0; i < 16; ++i) {
    row[i] = a.code + tile_offset(c[i]->feature, a.width);
    q[i] = a.q2 + tile_offset(c[i]->token, a.width);
    acc[i] = izero16();
  }
  for (int64_t k = 0; k < 4 * a.width; k += kTileStep) {
    for (int i = 0; i < 16; ++i) acc[i] = dot64(acc[i], load64(row[i] + k), load_digits64(q[i] + k));
  }
  int32_t sums[16];
  store16i(sums, sums16(acc));
  for (int i = 0; i < 16; ++i) {
    const float* table = a.table + c[i]->feature;
    const ScreenToken& token = a.tokens[c[i]->token];
    c[i]->n2 = sums[i] - static_cast<int32_t>(table[kZero * a.stride]) * token.sum2;
    n[i] = __builtin_fmaf(256.0f, static_cast<float>(c[i]->n1), static_cast<float>(c[i]->n2));
    scale[i] = table[kScale * a.stride] * (token.t * 0.00390625f);
    start[i] = table[kStart * a.stride];
    norm[i] = table[kNorm * a.stride];
    error[i] = table[kError * a.stride];
    reach2[i] = token.reach2;
    error2[i] = token.error2;
  }
  V16 v = fma16(load16(scale), load16(n), load16(start));
  for (int64_t j = 0; j < a.k; ++j) {
    float p[16], along[16];
    for (int i = 0; i < 16; ++i) {
      p[i] = a.table[(kScreenRows + j) * a.stride + c[i]->feature];
      along[i] = a.along[c[i]->token * a.k + j];
    }
    v = fma16(load16(p), load16(along), v);
  }
  v = fma16(load16(norm), load16(error2), v);
  v = fma16(load16(error), load16(reach2), v);
  return not_below16(v);
}

// Candidates [begin, end) that the tokens' second digits leave; always worth its quarter of a fp32 dot's
// bytes.
static inline Candidate* left_by_second_look(const ScreenArgs& a, Candidate* begin, Candidate* end) {
  Candidate *kept = begin, *group[16];
  for (Candidate* c = begin; c < end; c += 16) {
    const int count = end - c < 16 ? static_cast<int>(end - c) : 16;
    for (int i = 0; i < 16; ++i) group[i] = c + (i < count ? i : count - 1);
    for (uint32_t left = second_look(a, group) & ((1u << count) - 1); left; left &= left - 1) {
      *kept++ = c[__builtin_ctz(left)];
    }
  }
  return kept;
}

// The same as `estimate` of four candidates from both digits of row and token: w . r^ to within |e2| |r^|.
static inline void second_estimates(const ScreenArgs& a, Candidate* const* c) {  // [4]
  I16 acc[16];
  for (I16& v : acc) v = izero16();
  const int8_t *q1[4], *q2[4];
  int64_t row[4];
  for (int p = 0; p < 4; ++p) {
    const int64_t t = c[p]->token;
    q1[p] = a.q1 + (a.both ? t / 2 * kTileRows * a.width + t % 2 * kTileColumns : tile_offset(t, a.width));
    q2[p] = a.both ? q1[p] + 2 * kTileColumns : a.q2 + tile_offset(t, a.width);
    row[p] = tile_offset(c[p]->feature, a.width);
  }
  for (int64_t k = 0; k < 4 * a.width; k += kTileStep) {
    for (int p = 0; p < 4; ++p) {
      const B64 c2 = load64(a.code2 + row[p] + k);
      acc[p] = dot64(acc[p], c2, load_digits64(q1[p] + k));
      acc[4 + p] = dot64(acc[4 + p], c2, load_digits64(q2[p] + k));
    }
  }
  int32_t sums[16];
  store16i(sums, sums16(acc));
  for (int p = 0; p < 4; ++p) {
    const ScreenToken& token = a.tokens[c[p]->token];
    const float* table = a.table + c[p]->feature;
    const double t = token.t, t2 = t * 0.00390625;
    const double m1 = sums[p] - 128.0 * token.sum, m2 = sums[4 + p] - 128.0 * token.sum2;
    c[p]->z = table[kScale * a.stride] * (t * c[p]->n1 + t2 * c[p]->n2) +
              table[kScale2 * a.stride] * (t * m1 + t2 * m2) + table[kCentredBias * a.stride] +
              along_directions(a, *c[p]);
    c[p]->bound = static_cast<double>(table[kError2 * a.stride]) * token.reach2 +
                  static_cast<double>(table[kNorm * a.stride]) * token.error2 + table[kSlack * a.stride];
  }
}

static inline bool never_discarded(const ScreenArgs& a, int64_t f) {
  return a.table[kStart * a.stride + f] == __builtin_inff();
}

// What a pre-activation must exceed for the pair to be stored, in any way.
static inline double least_stored(const EncodeArgs& a, int64_t f) {
  const double theta = a.threshold[f], edge = theta - a.half_bandwidth, tau = theta > 0 ? theta : 0;
  return a.half_bandwidth > 0.0f && edge < tau ? edge : tau;
}

static inline bool discarded(const ScreenArgs& a, const Candidate& c) {
  return c.z + c.bound <= least_stored(a.encode, c.feature) && !never_discarded(a, c.feature);
}

// Whether the rows' second digit is worth reading: of the pairs that the first could not decide, at least
// half were discarded so far (a pair's two digits are half the bytes of its fp32 token), or rows come from a
// disk.
static inline bool second_pays(const ScreenArgs& a, const ScreenStats& stats) {
  return a.code2 &&
         (!a.adaptive || a.mapped || stats.undecided < 256 || 2 * stats.discarded > stats.undecided);
}

// Candidates [begin, end) with their estimates; those that a second digit discards are left out.
static inline Candidate* with_estimates(const ScreenArgs& a, Candidate* begin, Candidate* end,
                                        ScreenStats& stats) {
  if (!a.both) end = left_by_second_look(a, begin, end);
  for (Candidate* c = begin; c < end; ++c) estimate(a, *c);
  if (!second_pays(a, stats)) return end;
  Candidate *kept = begin, *four[4];
  int waiting = 0;
  const auto decide = [&] {
    for (int p = waiting; p < 4; ++p) four[p] = four[waiting - 1];
    second_estimates(a, four);
    stats.undecided += waiting;
    waiting = 0;
  };
  // pairs that fire whatever the bound are not worth a second look
  for (Candidate* c = begin; c < end; ++c) {
    if (c->z - c->bound > least_stored(a.encode, c->feature)) continue;
    four[waiting++] = c;
    if (waiting == 4) decide();
  }
  if (waiting) decide();
  for (Candidate* c = begin; c < end; ++c) {
    if (discarded(a, *c)) {
      ++stats.discarded;
    } else {
      *kept++ = *c;
    }
  }
  return kept;
}

// Full precision for the first four pairs of [c, end), while the next four's tokens are fetched; what is
// stored stays in the order of the candidates.
template <typename E>
static inline void refine(const ScreenArgs& a, const Candidate* c, const Candidate* end, ScreenStats& stats,
                          HitSink& sink) {
  const int count = end - c < 4 ? static_cast<int>(end - c) : 4;
  const EncodeArgs& e = a.encode;
  const float *x[4], *next[4];
  const E* w[4];
  float z[4];
  bool one_row = true;
  for (int p = 0; p < 4; ++p) {
    const Candidate& pair = c[p < count ? p : count - 1];
    next[p] = e.x + (end - c > p + 4 ? c[p + 4] : pair).token * e.d;
    x[p] = e.x + pair.token * e.d;
    w[p] = static_cast<const E*>(e.w) + pair.feature * e.d;
    one_row &= pair.feature == c[0].feature;
  }
  if (one_row) {
    dot_tile<4, 1, true>(x, w, e.d, z, next);
  } else {
    dot_pairs<4, true>(x, w, e.d, z, next);
  }
  sink.reserve(4);
  for (int p = 0; p < count; ++p) {
    const int64_t f = c[p].feature;
    const float zb = z[p] + e.bias[f], theta = e.threshold[f];
    // written so that NaN is a violation
    if (!never_discarded(a, f) && !(__builtin_fabs(zb - c[p].z) <= c[p].bound)) ++stats.violations;
    if (fires(zb, theta) || __builtin_fabsf(zb - theta) < e.half_bandwidth) {
      sink.push(e.ids ? e.ids[c[p].token] : c[p].token, f, canonical(zb));
    }
  }
}

template <typename E>
static inline void refine_all(const ScreenArgs& a, const Candidate* begin, const Candidate* end,
                              ScreenStats& stats, HitSink& sink) {
  for (const Candidate* c = begin; c < end; c += 4) {
    refine<E>(a, c, end, stats, sink);
  }
  stats.refined += end - begin;
}

// By feature, and by token within one: a row is read once for all its tokens.  A feature's tokens come
// ascending.
static inline Candidate* sorted_by_feature(CandidateSink& space, int64_t f0) {
  const int64_t count = space.at - space.begin;
  space.reserve(static_cast<size_t>(count));
  const Candidate* c = space.begin;
  Candidate* sorted = space.at;
  int64_t starts[kChunkFeatures + 1] = {};
  for (int64_t i = 0; i < count; ++i) ++starts[c[i].feature - f0 + 1];
  for (int64_t f = 0; f < kChunkFeatures; ++f) starts[f + 1] += starts[f];
  for (int64_t i = 0; i < count; ++i) sorted[starts[c[i].feature - f0]++] = c[i];
  return sorted;
}

static CandidateSpan screen_pairs(const ScreenArgs& a, int64_t f0, int64_t f1, CandidateSink& space,
                                  ScreenStats& stats) {
  space.at = space.begin;
  screen_chunk(a, f0, f1, space);
  const int64_t count = space.at - space.begin;
  stats.survivors += count;
  Candidate* begin = a.mapped || a.encode.T > kFewTokens ? sorted_by_feature(space, f0) : space.begin;
  return {begin, with_estimates(a, begin, begin + count, stats)};
}

static void refine_pairs(const ScreenArgs& a, CandidateSpan pairs, ScreenStats& stats, HitSink& sink) {
  switch (a.encode.w_dtype) {
    case Dtype::f32:
      return refine_all<float>(a, pairs.begin, pairs.end, stats, sink);
    case Dtype::bf16:
      return refine_all<BF16>(a, pairs.begin, pairs.end, stats, sink);
    case Dtype::f16:
      return refine_all<F16>(a, pairs.begin, pairs.end, stats, sink);
    case Dtype::i8:
      return;  // refused by the checks above this layer
  }
}
