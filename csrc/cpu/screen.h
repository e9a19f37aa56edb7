// Screened JumpReLU encode: 8-bit rows discard what provably does not fire, a second digit most of the rest, and
// the deciding dot of dot.h answers for what is left.  The bounds are derived in docs/screen.md.

// Tokens whose first digits (64 x 2304 bytes) stay in a 1 MiB L2 while the rows of a chunk pass.
constexpr int64_t kTokenBlock = 64;
// Candidates that follow each other with one row: with fewer tokens than this a row hardly has two.
constexpr int64_t kFewTokens = 8;

// The sums of (code - zero) . digit of up to four tokens (or two, both digits of each) with four rows.
// ROWS digit rows; n[4 * r + f].
template <int ROWS>
static inline I16 screen_sums(const int8_t* const* q,     // [ROWS] -> [width]
                              const uint8_t* const* code,  // [4] -> [width]
                              int64_t width) {
  I16 acc[16];
  for (I16& v : acc) v = izero16();
  for (int64_t k = 0; k < width; k += 64) {
    B64 c[4];
    for (int f = 0; f < 4; ++f) c[f] = load64(code[f] + k);
    for (int r = 0; r < ROWS; ++r) {
      const B64 x = load_digits64(q[r] + k);
      for (int f = 0; f < 4; ++f) acc[4 * r + f] = dot64(acc[4 * r + f], c[f], x);
    }
  }
  return sums16(acc);
}

static inline void push_candidates(uint32_t left, const int32_t* n1, const int32_t* n2, int64_t t0, int64_t f0,
                                   CandidateSink& out) {
  for (; left; left &= left - 1) {
    const int i = __builtin_ctz(left);
    *out.at++ = Candidate{static_cast<int32_t>(t0 + i / 4), static_cast<int32_t>(f0 + i % 4), n1[i], n2[i], 0, 0};
  }
}

// v = z^ + B - tau in one chain; a pair is discarded only where v <= 0.
static inline uint32_t left_over(const ScreenArgs& a, V16 n, int64_t t0, int64_t f0) {
  const float* table = a.table + f0;
  const float* lanes = a.lanes + 4 * t0;
  const int64_t L = 4 * a.lane_stride;
  V16 v = fma16(mul16(repeat4(table + kScale * a.stride), load16(lanes)), n,
                repeat4(table + kStart * a.stride));
  v = fma16(repeat4(table + kNorm * a.stride), load16(lanes + 2 * L), v);
  v = fma16(repeat4(table + kError * a.stride), load16(lanes + L), v);
  return not_below16(v);
}

// (code - zero) . q out of code . q, for four rows and the tokens whose digit sums follow each other at `sums`.
static inline I16 without_zero(const ScreenArgs& a, I16 n, const float* sums, int64_t f0) {
  const I16 zero = to_int16(repeat4(a.table + kZero * a.stride + f0));
  return isub16(n, imul16(zero, load16i(reinterpret_cast<const int32_t*>(sums))));
}

template <int TOKENS>
static inline void screen_tile(const ScreenArgs& a, int64_t t0, int64_t f0, uint32_t wanted, CandidateSink& out) {
  const int8_t* q[TOKENS];
  const uint8_t* code[4];
  for (int t = 0; t < TOKENS; ++t) q[t] = a.q1 + (t0 + t) * a.width;
  // the columns past F never survive: any row serves for them
  for (int64_t f = 0; f < 4; ++f) {
    code[f] = a.code + (f0 + f < a.encode.F ? f0 + f : a.encode.F - 1) * a.width;
  }
  const float* sums = a.lanes + 4 * (3 * a.lane_stride + t0);
  const I16 n = without_zero(a, screen_sums<TOKENS>(q, code, a.width), sums, f0);
  const uint32_t left = left_over(a, to_float16(n), t0, f0) & wanted & ((1u << (4 * TOKENS)) - 1);
  if (!left) return;
  int32_t n1[16];
  store16i(n1, n);
  out.reserve(16);
  push_candidates(left, n1, n1, t0, f0, out);
}

// Both digits of two tokens (or of one): 256 n1 + n2 in fp32, its rounding in the bound.
template <int TOKENS>
static inline void screen_tile_both(const ScreenArgs& a, int64_t t0, int64_t f0, uint32_t wanted,
                                    CandidateSink& out) {
  const int8_t* q[2 * TOKENS];
  const uint8_t* code[4];
  for (int t = 0; t < TOKENS; ++t) {
    q[t] = a.q1 + (t0 + t) * a.width;
    q[TOKENS + t] = a.q2 + (t0 + t) * a.width;
  }
  for (int64_t f = 0; f < 4; ++f) {
    code[f] = a.code + (f0 + f < a.encode.F ? f0 + f : a.encode.F - 1) * a.width;
  }
  int32_t raw[16], n1[16] = {}, n2[16] = {};
  store16i(raw, screen_sums<2 * TOKENS>(q, code, a.width));
  float n[16] = {};
  for (int i = 0; i < 4 * TOKENS; ++i) {
    const ScreenToken& token = a.tokens[t0 + i / 4];
    const int32_t zero = static_cast<int32_t>(a.table[kZero * a.stride + f0 + i % 4]);
    n1[i] = raw[i] - zero * token.sum;
    n2[i] = raw[4 * TOKENS + i] - zero * token.sum2;
    n[i] = __builtin_fmaf(256.0f, static_cast<float>(n1[i]), static_cast<float>(n2[i]));
  }
  const uint32_t left = left_over(a, load16(n), t0, f0) & wanted & ((1u << (4 * TOKENS)) - 1);
  if (!left) return;
  out.reserve(16);
  push_candidates(left, n1, n2, t0, f0, out);
}

// Four features, tokens [t0, t1).
static inline void screen_tokens(const ScreenArgs& a, int64_t t0, int64_t t1, int64_t f0, uint32_t wanted,
                                 CandidateSink& out) {
  int64_t t = t0;
  if (a.both) {
    for (; t + 2 <= t1; t += 2) screen_tile_both<2>(a, t, f0, wanted, out);
    if (t < t1) screen_tile_both<1>(a, t, f0, wanted, out);
    return;
  }
  for (; t + 4 <= t1; t += 4) screen_tile<4>(a, t, f0, wanted, out);
  switch (t1 - t) {
    case 3:
      return screen_tile<3>(a, t, f0, wanted, out);
    case 2:
      return screen_tile<2>(a, t, f0, wanted, out);
    case 1:
      return screen_tile<1>(a, t, f0, wanted, out);
    default:
      return;
  }
}

static inline void screen_chunk(const ScreenArgs& a, int64_t f0, int64_t f1, CandidateSink& out) {
  for (int64_t t = 0; t < a.encode.T; t += kTokenBlock) {
    const int64_t t1 = t + kTokenBlock < a.encode.T ? t + kTokenBlock : a.encode.T;
    for (int64_t f = f0; f < f1; f += 4) {
      const uint32_t columns = f1 - f >= 4 ? 15u : (1u << (f1 - f)) - 1;
      screen_tokens(a, t, t1, f, columns * 0x1111u, out);
    }
  }
}

// z^ and B of a candidate in fp64, from the first digit of the row.
static inline void first_estimate(const ScreenArgs& a, Candidate& c) {
  const ScreenToken& token = a.tokens[c.token];
  const float* table = a.table + c.feature;
  const double n = a.both ? c.n1 + c.n2 * 0.00390625 : c.n1;
  const double reach = a.both ? token.reach2 : token.reach, error = a.both ? token.error2 : token.error;
  c.z = static_cast<double>(table[kScale * a.stride]) * token.t * n + table[kCentredBias * a.stride];
  c.bound = table[kError * a.stride] * reach + table[kNorm * a.stride] * error + table[kSlack * a.stride];
}

// The same of four candidates from both digits of row and token: w . r^ to within |e2| |r^|.
static inline void second_estimates(const ScreenArgs& a, Candidate* const* c) {  // [4]
  I16 acc[16];
  for (I16& v : acc) v = izero16();
  for (int64_t k = 0; k < a.width; k += 64) {
    for (int p = 0; p < 4; ++p) {
      const int64_t token = c[p]->token * a.width + k, row = c[p]->feature * a.width + k;
      const B64 x1 = load_digits64(a.q1 + token), x2 = load_digits64(a.q2 + token), c2 = load64(a.code2 + row);
      acc[p] = dot64(acc[p], c2, x1);
      acc[4 + p] = dot64(acc[4 + p], c2, x2);
      if (!a.both) acc[8 + p] = dot64(acc[8 + p], load64(a.code + row), x2);
    }
  }
  int32_t sums[16];
  store16i(sums, sums16(acc));
  for (int p = 0; p < 4; ++p) {
    const ScreenToken& token = a.tokens[c[p]->token];
    const float* table = a.table + c[p]->feature;
    const double zero = table[kZero * a.stride], t = token.t, t2 = t * 0.00390625;
    const double n2 = a.both ? c[p]->n2 : sums[8 + p] - zero * token.sum2;
    const double m1 = sums[p] - 128.0 * token.sum, m2 = sums[4 + p] - 128.0 * token.sum2;
    c[p]->z = table[kScale * a.stride] * (t * c[p]->n1 + t2 * n2) +
              table[kScale2 * a.stride] * (t * m1 + t2 * m2) + table[kCentredBias * a.stride];
    c[p]->bound = static_cast<double>(table[kError2 * a.stride]) * token.reach2 +
                  static_cast<double>(table[kNorm * a.stride]) * token.error2 + table[kSlack * a.stride];
  }
}

static inline bool never_discarded(const ScreenArgs& a, int64_t f) {
  return a.table[kStart * a.stride + f] == __builtin_inff();
}

// Whether the estimate proves that the pair is not stored, in any way.
static inline bool discarded(const ScreenArgs& a, const Candidate& c) {
  const double theta = a.encode.threshold[c.feature], edge = theta - a.encode.half_bandwidth;
  double least = theta > 0 ? theta : 0;
  if (a.encode.half_bandwidth > 0.0f && edge < least) least = edge;
  return c.z + c.bound <= least && !never_discarded(a, c.feature);
}

// Candidates [begin, end) with their estimates; those that the second digit discards are left out.
static inline Candidate* with_estimates(const ScreenArgs& a, Candidate* begin, Candidate* end) {
  if (!a.code2) {
    for (Candidate* c = begin; c < end; ++c) first_estimate(a, *c);
    return end;
  }
  Candidate* kept = begin;
  for (Candidate* c = begin; c < end; c += 4) {
    Candidate* four[4];
    for (int p = 0; p < 4; ++p) four[p] = c + p < end ? c + p : end - 1;
    second_estimates(a, four);
    for (int p = 0; p < 4 && c + p < end; ++p) {
      if (!discarded(a, c[p])) *kept++ = c[p];
    }
  }
  return kept;
}

// Full precision for up to four pairs; what is stored stays in the order of the candidates.
template <typename E>
static inline void refine(const ScreenArgs& a, const Candidate* c, int count, ScreenStats& stats, HitSink& sink) {
  const EncodeArgs& e = a.encode;
  const float* x[4];
  const E* w[4];
  float z[4];
  bool one_row = true;
  for (int p = 0; p < 4; ++p) {
    const Candidate& pair = c[p < count ? p : count - 1];
    x[p] = e.x + pair.token * e.d;
    w[p] = static_cast<const E*>(e.w) + pair.feature * e.d;
    one_row &= pair.feature == c[0].feature;
  }
  if (one_row) {
    dot_tile<4, 1>(x, w, e.d, z);
  } else {
    dot_pairs<4>(x, w, e.d, z);
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
  if (a.fetch) {
    const int64_t bytes = a.encode.d * static_cast<int64_t>(sizeof(E));
    for (const Candidate* c = begin; c < end; ++c) {
      if (c == begin || c->feature != c[-1].feature) {
        a.fetch(static_cast<const char*>(a.encode.w) + c->feature * bytes, bytes);
      }
    }
  }
  for (const Candidate* c = begin; c < end; c += 4) {
    refine<E>(a, c, end - c < 4 ? static_cast<int>(end - c) : 4, stats, sink);
  }
  stats.refined += end - begin;
}

// By feature, and by token within one: a row is read once for all its tokens.  A feature's tokens come ascending.
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

static void encode_screened(const ScreenArgs& a, int64_t f0, int64_t f1, CandidateSink& space, ScreenStats& stats,
                            HitSink& sink) {
  space.at = space.begin;
  screen_chunk(a, f0, f1, space);
  const int64_t count = space.at - space.begin;
  stats.survivors += count;
  Candidate* begin = a.encode.T > kFewTokens ? sorted_by_feature(space, f0) : space.begin;
  const Candidate* end = with_estimates(a, begin, begin + count);
  switch (a.encode.w_dtype) {
    case Dtype::f32:
      return refine_all<float>(a, begin, end, stats, sink);
    case Dtype::bf16:
      return refine_all<BF16>(a, begin, end, stats, sink);
    case Dtype::f16:
      return refine_all<F16>(a, begin, end, stats, sink);
    case Dtype::i8:
      return;  // refused by the checks above this layer
  }
}
