// The screen's epilogue, defined once for every stage that evaluates it in fp32 (docs/how/screen.md,
// "Epilogue"):
//
//     m = fma(fl(s t), N, start) + sum_j p_j c_j + |w| E + |e| R,      a pair is discarded only where m <=
//     floor
//
// every + is a fused multiply-add, in this order.  Stages differ in where the values of the sixteen pairs are
// stored: `Feature` reads rows of the table, `Token` planes of the tokens' values, for sixteen pairs.

// Dots of codes and digits minus the zero point's part: (code - zero) . q, modulo 2^32 for any contents of
// the table.
static inline I16 less_zero16(I16 sums, V16 zero, I16 digit_sums) {
  return isub16(sums, imul16(to_int16(zero), digit_sums));
}

// N of both digits: 256 N1 + N2 in fp32; the bound includes its rounding.
static inline V16 joined16(I16 n1, I16 n2) { return fma16(set16(256.0f), to_float16(n1), to_float16(n2)); }

// Bit i: pair i is left over. NaN is always left over.
template <typename Feature, typename Token>
static inline uint32_t left_by_bound(const Feature& feature, const Token& token, int64_t k, V16 n) {
  V16 m = fma16(mul16(feature.row(kScale), token.plane(kUnit)), n, feature.row(kStart));
  for (int64_t j = 0; j < k; ++j) m = fma16(feature.row(kScreenRows + j), token.coefficient(j), m);
  m = fma16(feature.row(kNorm), token.plane(kTokenError), m);
  m = fma16(feature.row(kError), token.plane(kReach), m);
  return above16(m, token.plane(kFloor));
}

// Four features from f on: lane 4 r + i is feature f + i.
struct FourFeatures {
  const float* table;  // from column f on
  int64_t stride;
  inline V16 row(int64_t r) const { return repeat4(table + r * stride); }
};

// Four tokens from t on, each four times: lane 4 r + i is token t + r.
struct FourTokens {
  const float* lanes;  // from token t on
  int64_t plane_size;
  inline V16 plane(int64_t p) const { return load16(lanes + p * plane_size); }
  inline V16 coefficient(int64_t j) const { return plane(kTokenPlanes + j); }
};

static inline FourFeatures four_features(const ScreenArgs& a, int64_t f) { return {a.table + f, a.stride}; }

static inline FourTokens four_tokens(const ScreenArgs& a, int64_t t) {
  return {a.lanes + 4 * t, 4 * a.lane_stride};
}

// One feature, repeated in all lanes.
struct OneFeature {
  const float* table;
  int64_t stride;
  inline V16 row(int64_t r) const { return set16(table[r * stride]); }
};

// A block of sixteen tokens, one per lane.
struct TokenBlock {
  const float* lanes;
  inline V16 plane(int64_t p) const { return load16(lanes + p * kLaneTokens); }
  inline V16 coefficient(int64_t j) const { return plane(kPackedPlanes + j); }
  inline I16 digit_sums(int64_t p) const {
    return load16i(reinterpret_cast<const int32_t*>(lanes + p * kLaneTokens));
  }
};

static inline OneFeature one_feature(const ScreenArgs& a, int64_t f) { return {a.table + f, a.stride}; }

static inline TokenBlock token_block(const ScreenArgs& a, int64_t block) {
  return {a.packed_lanes + block * (kPackedPlanes + a.k) * kLaneTokens};
}

// Sixteen pairs, each with its own feature and token, gathered pair by pair.
struct PairFeatures {
  float first[kScreenRows][16];  // the table's rows that `set` reads
  const float* column[16];
  int64_t stride;
  inline void set(int i, const float* from) {
    column[i] = from;
    first[kScale][i] = from[kScale * stride];
    first[kZero][i] = from[kZero * stride];
    first[kError][i] = from[kError * stride];
    first[kNorm][i] = from[kNorm * stride];
    first[kStart][i] = from[kStart * stride];
  }
  inline V16 row(int64_t r) const {
    if (r < kScreenRows) return load16(first[r]);
    float v[16];
    for (int i = 0; i < 16; ++i) v[i] = column[i][r * stride];
    return load16(v);
  }
};

struct PairTokens {
  float number[kFloor + 1][16];
  const float* along[16];  // their coefficients
  inline void set(int i, const ScreenToken& token, bool both, const float* coefficients) {
    along[i] = coefficients;
    number[kUnit][i] = token_number(token, kUnit, both);
    number[kReach][i] = token_number(token, kReach, both);
    number[kTokenError][i] = token_number(token, kTokenError, both);
    number[kFloor][i] = token.floor;
  }
  inline V16 plane(int64_t p) const { return load16(number[p]); }
  inline V16 coefficient(int64_t j) const {
    float v[16];
    for (int i = 0; i < 16; ++i) v[i] = along[i][j];
    return load16(v);
  }
};

// B in fp64, with the error of the first digit (kError) or of both (kError2).
static inline double bound_fp64(const float* column, int64_t stride, ScreenRow error, double reach,
                                double token_error) {
  return column[error * stride] * reach + column[kNorm * stride] * token_error + column[kSlack * stride];
}

// Bit 4 r + i for every r and each feature f + i < F: what the table or the codes contain beyond the last
// feature must not decide anything.
static inline uint32_t features_there(const ScreenArgs& a, int64_t f) {
  return a.encode.F - f < kTileRows ? 0x1111u * ((1u << (a.encode.F - f)) - 1) : 0xFFFFu;
}
