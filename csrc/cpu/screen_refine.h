// After the first stage: a second look at what is left, then the exact dot for what the second look leaves.

// What the directions add to z^; exact except for fp64's rounding.
static inline double along_directions(const ScreenArgs& a, const Candidate& c) {
  const float* along = a.along + c.token * a.k;
  const float* projected = a.table + kScreenRows * a.stride + c.feature;
  double sum = 0;
  for (int64_t j = 0; j < a.k; ++j) sum += static_cast<double>(projected[j * a.stride]) * along[j];
  return sum;
}

// z^ and B of a candidate in fp64, from the first digit of the row and the first digit or both of the token.
static inline void estimate(const ScreenArgs& a, bool both, Candidate& c) {
  const ScreenToken& token = a.tokens[c.token];
  const float* table = a.table + c.feature;
  const double n = both ? c.n1 + c.n2 * kDigit2 : c.n1;
  const double reach = both ? token.reach2 : token.reach, error = both ? token.error2 : token.error;
  c.z = static_cast<double>(table[kScale * a.stride]) * token.t * n + table[kCentredBias * a.stride] +
        along_directions(a, c);
  c.bound = bound_fp64(table, a.stride, kError, reach, error);
}

// The dots of sixteen pairs of rows: codes and digits.
static inline I16 dots_of_pairs(const uint8_t* const* row, const int8_t* const* q, int64_t width) {  // [16]
#if GSF_LEVEL == 1 || GSF_LEVEL == 2
  __m256i acc[16];  // pair by pair: with sixteen sums at once each step would use the stack
  for (int i = 0; i < 16; ++i) {
    __m256i lo = _mm256_setzero_si256(), hi = lo;
    for (int64_t k = 0; k < 4 * width; k += kTileStep) {
      lo = dot32(lo, load32i(row[i] + k), load32i(q[i] + k));
      hi = dot32(hi, load32i(row[i] + k + 32), load32i(q[i] + k + 32));
    }
    acc[i] = _mm256_add_epi32(lo, hi);
  }
#else
  I16 acc[16];
  for (I16& v : acc) v = izero16();
  for (int64_t k = 0; k < 4 * width; k += kTileStep) {
    for (int i = 0; i < 16; ++i) acc[i] = dot64(acc[i], load64(row[i] + k), load_digits64(q[i] + k));
  }
#endif
  return sums16(acc);
}

// n2 of sixteen candidates (the tokens' second digits times the rows' first), and which of them the epilogue
// with both digits leaves.
static inline uint32_t second_look(const ScreenArgs& a, Candidate* const* c) {  // [16]
  const uint8_t* row[16];
  const int8_t* q[16];
  PairFeatures features;
  PairTokens tokens;
  features.stride = a.stride;
  int32_t n1[16], n2[16], digit_sums[16];
  for (int i = 0; i < 16; ++i) {
    row[i] = a.code + tile_offset(c[i]->feature, a.width);
    q[i] = a.q2 + tile_offset(c[i]->token, a.width);
    features.set(i, a.table + c[i]->feature);
    tokens.set(i, a.tokens[c[i]->token], true, a.along + c[i]->token * a.k);
    n1[i] = c[i]->n1;
    digit_sums[i] = a.tokens[c[i]->token].sum2;
  }
  const I16 n = less_zero16(dots_of_pairs(row, q, a.width), features.row(kZero), load16i(digit_sums));
  store16i(n2, n);
  for (int i = 0; i < 16; ++i) c[i]->n2 = n2[i];
  return left_by_bound(features, tokens, a.k, joined16(load16i(n1), n));
}

// Whether reading the tokens' second digits is worth it: they discarded at least half of what they were read
// for, or rows are expensive, because each is read for only one or two tokens or comes from a disk.  At T =
// 1024 on 2304 x 16,384, where 37 % of the candidates are false, not reading them took 122 ms instead of 130;
// on a real layer, where three in four are false, 5.2 instead of 4.7.
static inline bool look_pays(const ScreenArgs& a, const ScreenStats& stats) {
  return !a.adaptive || a.mapped || a.encode.T <= kTokenBlock || stats.looked < 256 ||
         2 * stats.looked_out > stats.looked;
}

// Candidates [begin, end) that are left after the tokens' second digits.
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

// Like `estimate`, for four candidates with both digits of row and token: w . r^ to within |e2| |r^|.
static inline void second_estimates(const ScreenArgs& a, Candidate* const* c) {  // [4]
  I16 acc[16];
  for (I16& v : acc) v = izero16();
  const int8_t *q1[4], *q2[4];
  int64_t row[4];
  for (int p = 0; p < 4; ++p) {
    const int64_t t = c[p]->token;
    q1[p] = a.q1 + digits_offset(t, a.width, a.both);
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
    const double t = token.t, t2 = t * kDigit2;
    const double m1 = sums[p] - 128.0 * token.sum, m2 = sums[4 + p] - 128.0 * token.sum2;
    c[p]->z = table[kScale * a.stride] * (t * c[p]->n1 + t2 * c[p]->n2) +
              table[kScale2 * a.stride] * (t * m1 + t2 * m2) + table[kCentredBias * a.stride] +
              along_directions(a, *c[p]);
    c[p]->bound = bound_fp64(table, a.stride, kError2, token.reach2, token.error2);
  }
}

static inline bool never_discarded(const ScreenArgs& a, int64_t f) {
  return a.table[kStart * a.stride + f] == __builtin_inff();
}

// What a pre-activation must exceed for the pair to be stored at all.
static inline double least_stored(const EncodeArgs& a, int64_t f) {
  const double theta = a.threshold[f], edge = theta - a.half_bandwidth, tau = theta > 0 ? theta : 0;
  return a.half_bandwidth > 0.0f && edge < tau ? edge : tau;
}

// The same for one pair, when the k largest of a token are wanted.
static inline double least_wanted(const ScreenArgs& a, const Candidate& c) {
  return a.ranked ? a.tokens[c.token].floor : least_stored(a.encode, c.feature);
}

static inline bool discarded(const ScreenArgs& a, const Candidate& c) {
  return c.z + c.bound <= least_wanted(a, c) && !never_discarded(a, c.feature);
}

// Whether reading the rows' second digit is worth it: of the pairs that the first could not decide, it
// discarded at least half so far (a pair's two digits are half the bytes of its fp32 token), or rows come
// from a disk.
static inline bool second_pays(const ScreenArgs& a, const ScreenStats& stats) {
  return a.code2 &&
         (!a.adaptive || a.mapped || stats.undecided < 256 || 2 * stats.discarded > stats.undecided);
}

// Adds estimates to candidates [begin, end); those that a second digit discards are removed.
static inline Candidate* with_estimates(const ScreenArgs& a, Candidate* begin, Candidate* end,
                                        ScreenStats& stats) {
  const bool look = !a.both && look_pays(a, stats);
  if (look) {
    Candidate* left = left_by_second_look(a, begin, end);
    stats.looked += end - begin;
    stats.looked_out += end - left;
    end = left;
  }
  for (Candidate* c = begin; c < end; ++c) estimate(a, a.both || look, *c);
  if (!(a.both || look) || !second_pays(a, stats)) return end;
  Candidate *kept = begin, *four[4];
  int waiting = 0;
  const auto decide = [&] {
    for (int p = waiting; p < 4; ++p) four[p] = four[waiting - 1];
    second_estimates(a, four);
    stats.undecided += waiting;
    waiting = 0;
  };
  // for pairs that certainly fire, reading the rows' second digit is not worth it
  for (Candidate* c = begin; c < end; ++c) {
    if (c->z - c->bound > least_wanted(a, *c)) continue;
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

// Full precision for the first four pairs of [c, end); results are stored in the order of the candidates.
template <typename E>
static inline void refine(const ScreenArgs& a, const Candidate* c, const Candidate* end, ScreenStats& stats,
                          HitSink& sink) {
  const int count = end - c < 4 ? static_cast<int>(end - c) : 4;
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
    // written such that NaN is a violation
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

// By feature, then by token: a row is read once for all its tokens.  The tokens of a feature are
// ascending.
static inline Candidate* sorted_by_feature(CandidateSink& space, int64_t f0, int64_t f1) {
  const int64_t count = space.at - space.begin;
  space.reserve(static_cast<size_t>(count));
  const Candidate* c = space.begin;
  Candidate* sorted = space.at;
  int64_t starts[kMostChunk + 1];
  memset(starts, 0, static_cast<size_t>(f1 - f0 + 1) * sizeof(int64_t));
  for (int64_t i = 0; i < count; ++i) ++starts[c[i].feature - f0 + 1];
  for (int64_t f = 0; f < f1 - f0; ++f) starts[f + 1] += starts[f];
  for (int64_t i = 0; i < count; ++i) sorted[starts[c[i].feature - f0]++] = c[i];
  return sorted;
}

static CandidateSpan screen_pairs(const ScreenArgs& a, int64_t f0, int64_t f1, CandidateSink& space,
                                  ScreenStats& stats) {
  space.at = space.begin;
  first_stage(a, f0, f1, space);
  const int64_t count = space.at - space.begin;
  stats.survivors += count;
  Candidate* begin =
      a.mapped || a.packed || a.encode.T > kFewTokens ? sorted_by_feature(space, f0, f1) : space.begin;
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
      return;  // rejected by the checks one layer up
  }
}
