// Building the screen: one feature row's two digits and bounds, and one token's.  Norms are sums in fp64,
// rounded up.  docs/screen.md derives every constant; the names here are its names.

constexpr double kU = 5.9604644775390625e-08;  // 2^-24, half an ulp of 1 in fp32
// Rounded up and then some: what the fp32 epilogue's three roundings can take away (docs/screen.md,
// "Epilogue").
constexpr double kUp = 1.0 + 8 * kU;
// Sums of d <= 66,000 squares in fp64 err by less than 2^-36 of their value; roots halve that.
constexpr double kSumUp = 1.0 + 1.0 / (1 << 30);
constexpr double kTiny = 8.673617379884035e-19;  // 2^-60: norms outside [2^-60, 2^60] skip the screen
constexpr double kHuge = 1.152921504606847e+18;  // 2^60
// Of a code that was given: below 2^-80 lies no row of norm 2^-60; up to 2^43 its rows' norms are below 2^60.
constexpr double kLeastGiven = kTiny / (1 << 20), kMostGiven = kHuge / (1 << 17);
constexpr double kCancel = 8.881784197001252e-16;     // 2^-50: fp64 cancellation in e and e_r
constexpr double kUnderflow = 2.350988701644575e-38;  // 2^-125
constexpr double kFar = 9.1e-13;                      // above 2^-40: sums of d <= 66,000 products in fp64
constexpr double kFarther = 2.9e-14;                  // above 2^-45: sums of k <= 128 products in fp64

// The least float that is not below v.
static inline float round_up(double v) {
  const float f = static_cast<float>(v);
  return static_cast<double>(f) >= v ? f : __builtin_nextafterf(f, __builtin_inff());
}

// Relative bound of the deciding dot: ceil(d/16) fused steps a lane, four folds, the bias, and one to spare.
static inline double dot_kappa(int64_t d) { return 1.01 * static_cast<double>((d + 15) / 16 + 6) * kU; }

// Sixteen running sums: an order that vectorises; the norms' last bits may differ between instruction sets,
// the answers cannot.
struct Sum16 {
  double v[16] = {};
  double total() const {
    double s = 0;
    for (int i = 0; i < 16; ++i) s += v[i];
    return s;
  }
};

// Sixteen columns of a vector from k on, n of them there; `otherwise` beyond the end and where there is no
// vector.
struct Columns {
  float v[16];
  Columns(const float* from, int64_t k, int64_t n, float otherwise) {
    if (from && n == 16) {
      memcpy(v, from + k, sizeof v);
      return;
    }
    for (float& value : v) value = otherwise;
    if (from && n > 0) memcpy(v, from + k, static_cast<size_t>(n) * sizeof(float));
  }
};

static inline int64_t column_offset(int64_t k) { return k / kTileColumns * kTileStep + k % kTileColumns; }

static inline float clamp_digit(float v) { return v > 127.0f ? 127.0f : (v < -127.0f ? -127.0f : v); }

static inline double dot_fp64(const float* a, const float* b, int64_t d) {
  Sum16 dot;
  const int64_t whole = d & ~int64_t{15};
  for (int64_t k = 0; k < whole; k += 16) {
    for (int i = 0; i < 16; ++i) dot.v[i] += static_cast<double>(a[k + i]) * b[k + i];
  }
  for (int64_t k = whole; k < d; ++k) dot.v[k - whole] += static_cast<double>(a[k]) * b[k];
  return dot.total();
}

// r loses its part along the directions; their coefficients, as rounded here, are what the screen multiplies
// by.  Gives |c|.
static inline double take_out_directions(const ScreenTokenArgs& a, float* r) {
  double square = 0;
  if (a.k == 0) return square;
  for (int64_t j = 0; j < a.k; ++j) {
    a.along[j] = static_cast<float>(dot_fp64(r, a.directions + j * a.d, a.d));
    square += static_cast<double>(a.along[j]) * a.along[j];
  }
  for (int64_t k = 0; k < a.d; k += 16) {
    double rest[16];
    const int64_t n = a.d - k < 16 ? a.d - k : 16;
    for (int64_t i = 0; i < n; ++i) rest[i] = r[k + i];
    for (int64_t j = 0; j < a.k; ++j) {
      const double along = a.along[j];
      const float* v = a.directions + j * a.d + k;
      for (int64_t i = 0; i < n; ++i) rest[i] -= along * v[i];
    }
    for (int64_t i = 0; i < n; ++i) r[k + i] = static_cast<float>(rest[i]);
  }
  return __builtin_sqrt(square) * kSumUp;
}

static void screen_token(const ScreenTokenArgs& a) {
  ScreenToken& out = *a.out;
  out = ScreenToken{};
  float* r = a.space;
  Sum16 xx, rr, left;
  const int64_t d = a.d;
  for (int64_t k = 0; k < a.width; k += 16) {
    const int64_t n = d - k < 16 ? d - k : 16;
    const Columns x(a.x, k, n, 0.0f), mu(a.mu, k, n, 0.0f), per(a.per_scale, k, n, 1.0f);
    for (int i = 0; i < 16; ++i) {
      const float ri = (x.v[i] - mu.v[i]) * per.v[i];
      const double xi = static_cast<double>(x.v[i]) * per.v[i];
      r[k + i] = ri;
      xx.v[i] += xi * xi;
      rr.v[i] += static_cast<double>(ri) * ri;
    }
  }
  const double norm_x = __builtin_sqrt(xx.total()) * kSumUp, norm_r = __builtin_sqrt(rr.total()) * kSumUp;
  const double norm_c = take_out_directions(a, r);
  float most[16] = {};
  for (int64_t k = 0; k < a.width; k += 16) {
    for (int i = 0; i < 16; ++i) {
      const float ri = r[k + i], size = __builtin_fabsf(ri);
      // NaN keeps the larger side false, and the sums turn NaN: `fits` sees it there
      most[i] = size > most[i] ? size : most[i];
      left.v[i] += static_cast<double>(ri) * ri;
    }
  }
  float top = 0;
  for (float m : most) top = m > top ? m : top;
  const double norm_left = __builtin_sqrt(left.total()) * kSumUp;
  // written so that NaN fails
  if (!(top >= kTiny && top <= kHuge && norm_x <= kHuge && norm_r <= kHuge && norm_c <= kHuge)) {
    return;  // its digits are zeros already
  }
  const float t = top / 127.0f, per_t = 1.0f / t, t2 = t * 0.00390625f, per_t2 = per_t * 256.0f;
  Sum16 r1r1, rhat, r2r2, left1, left2;
  int32_t sum[16] = {}, sum2[16] = {};
  for (int64_t k = 0; k < a.width; k += 16) {
    // short loops of one statement: GCC makes vectors of these, and of one long loop it does not
    int8_t *q1 = a.q1 + column_offset(k), *q2 = a.q2 + column_offset(k);
    float d1[16], d2[16];
    double r1[16], r2[16], e1[16];
    for (int i = 0; i < 16; ++i) d1[i] = clamp_digit(__builtin_rintf(r[k + i] * per_t));
    for (int i = 0; i < 16; ++i) {
      d2[i] = clamp_digit(__builtin_rintf(__builtin_fmaf(-t, d1[i], r[k + i]) * per_t2));
    }
    for (int i = 0; i < 16; ++i) q1[i] = static_cast<int8_t>(static_cast<int32_t>(d1[i]));
    for (int i = 0; i < 16; ++i) q2[i] = static_cast<int8_t>(static_cast<int32_t>(d2[i]));
    for (int i = 0; i < 16; ++i) sum[i] += static_cast<int32_t>(d1[i]);
    for (int i = 0; i < 16; ++i) sum2[i] += static_cast<int32_t>(d2[i]);
    for (int i = 0; i < 16; ++i) r1[i] = static_cast<double>(t) * d1[i];
    for (int i = 0; i < 16; ++i) r2[i] = static_cast<double>(t2) * d2[i];
    for (int i = 0; i < 16; ++i) e1[i] = r[k + i] - r1[i];
    for (int i = 0; i < 16; ++i) r1r1.v[i] += r1[i] * r1[i];
    for (int i = 0; i < 16; ++i) r2r2.v[i] += r2[i] * r2[i];
    for (int i = 0; i < 16; ++i) rhat.v[i] += (r1[i] + r2[i]) * (r1[i] + r2[i]);
    for (int i = 0; i < 16; ++i) left1.v[i] += e1[i] * e1[i];
    for (int i = 0; i < 16; ++i) left2.v[i] += (e1[i] - r2[i]) * (e1[i] - r2[i]);
  }
  const double n1 = __builtin_sqrt(r1r1.total()) * kSumUp, n2 = __builtin_sqrt(r2r2.total()) * kSumUp;
  const double nb = __builtin_sqrt(rhat.total()) * kSumUp;
  const double l1 = __builtin_sqrt(left1.total()) * kSumUp + kCancel * norm_left;
  const double l2 = __builtin_sqrt(left2.total()) * kSumUp + kCancel * norm_left;
  double rounding = dot_kappa(d) * norm_x + 1.01 * kU * norm_r;
  if (a.k > 0) {
    rounding += 1.01 * kU * norm_left + kFarther * (norm_r + norm_c * a.frobenius) +
                (1.02 * (static_cast<double>(a.k) + 4) * kU + kFar * a.frobenius) * norm_c;
  }
  const double steps = (7 + 1.02 * static_cast<double>(a.k)) * kU;
  out.t = t;
  out.reach = round_up((n1 + steps * n1) * kUp);
  out.error = round_up((l1 + rounding + steps * n1) * kUp);
  out.reach2 = round_up((nb + steps * (n1 + n2)) * kUp);
  out.error2 = round_up((l2 + rounding + steps * (n1 + n2)) * kUp);
  for (int i = 0; i < 16; ++i) out.sum += sum[i], out.sum2 += sum2[i];
  out.fits = 1;
}

template <typename E>
static inline void widen_row(const E* w, int64_t d, int64_t width, float* out) {
  for (int64_t k = 0; k < width; k += 16) {
    const V16 v = k + 16 <= d ? load16(w + k) : (k < d ? load16_tail(w + k, d - k) : zero16());
    store16(out + k, v);
  }
}

static inline void widen_any(const ScreenRowArgs& a, int64_t f, float* out) {
  switch (a.w_dtype) {
    case Dtype::f32:
      return widen_row(static_cast<const float*>(a.w) + f * a.d, a.d, a.width, out);
    case Dtype::bf16:
      return widen_row(static_cast<const BF16*>(a.w) + f * a.d, a.d, a.width, out);
    case Dtype::f16:
      return widen_row(static_cast<const F16*>(a.w) + f * a.d, a.d, a.width, out);
    case Dtype::i8:
      return;  // refused by the checks above this layer
  }
}

static inline void refine_always(const ScreenRowArgs& a, int64_t f) {
  // its codes stay zeros
  for (int64_t row = 0; row < kScreenRows + a.k; ++row) a.table[row * a.stride + f] = 0.0f;
  a.table[kStart * a.stride + f] = __builtin_inff();
}

// The row's products with the directions into the table; gives their norm.
static inline double project(const ScreenRowArgs& a, int64_t f, const float* w) {
  double square = 0;
  for (int64_t j = 0; j < a.k; ++j) {
    const double p = dot_fp64(w, a.directions + j * a.d, a.d);
    a.table[(kScreenRows + j) * a.stride + f] = static_cast<float>(p);
    square += p * p;
  }
  return __builtin_sqrt(square) * kSumUp;
}

// The first digit of a row: the 8-bit min-max code of gemmascope_fast/matryoshka/codes.py, per channel,
// unless one was given; its error is measured either way.
static inline void screen_row(const ScreenRowArgs& a, int64_t f, const float* w, double norm_mu) {
  float low[16] = {}, high[16] = {};
  Sum16 ww, wmu;
  for (int64_t k = 0; k < a.width; k += 16) {
    const int64_t n = a.d - k < 16 ? a.d - k : 16;
    const Columns mu(a.mu, k, n, 0.0f), per(a.per_scale, k, n, 1.0f);
    for (int i = 0; i < 16; ++i) {
      const float v = w[k + i];
      low[i] = v < low[i] ? v : low[i];
      high[i] = v > high[i] ? v : high[i];
      ww.v[i] += static_cast<double>(v) * v;
      wmu.v[i] += static_cast<double>(v) * (static_cast<double>(mu.v[i]) * per.v[i]);
    }
  }
  float least = 0, most = 0;
  for (int i = 0; i < 16; ++i) {
    least = low[i] < least ? low[i] : least;
    most = high[i] > most ? high[i] : most;
  }
  const double norm = __builtin_sqrt(ww.total()) * kSumUp;
  const double b = a.bias[f], centred = b + wmu.total();
  const double tau = a.threshold[f] > 0.0f ? a.threshold[f] : 0.0;
  const double across = project(a, f, w);
  // written so that NaN fails; a bias near the end of fp32's range is left to the full dot
  if (!(norm >= kTiny && norm <= kHuge && across <= kHuge && __builtin_fabs(b) <= 1e38 &&
        __builtin_fabs(centred) <= 1e38)) {
    return refine_always(a, f);
  }
  const float s = a.given ? a.given_scale[f] : (most - least) / 255.0f;
  const float zero = a.given ? static_cast<float>(a.given_zero[f]) : __builtin_rintf(-least / s);
  if (a.given && !(s >= kLeastGiven && s <= kMostGiven)) return refine_always(a, f);
  uint8_t* code = a.code + tile_offset(f, a.width);
  float rest_most[16] = {};
  Sum16 ee;
  for (int64_t k = 0; k < a.width; k += 16) {
    uint8_t* to = code + column_offset(k);
    float digit[16];
    for (int i = 0; i < 16; ++i) {
      const float c = __builtin_rintf(w[k + i] / s) + zero;
      digit[i] = c > 255.0f ? 255.0f : (c < 0.0f ? 0.0f : c);
    }
    for (int64_t i = 0; a.given && i < 16 && k + i < a.d; ++i) digit[i] = a.given[f * a.d + k + i];
    for (int i = 0; i < 16; ++i) {
      const float c = digit[i];
      to[i] = static_cast<uint8_t>(static_cast<int32_t>(c));
      const double e = w[k + i] - static_cast<double>(s) * (c - zero);
      const float size = __builtin_fabsf(static_cast<float>(e));
      rest_most[i] = size > rest_most[i] ? size : rest_most[i];
      // columns past d hold w = 0, whose code is the zero point: e is 0 there
      ee.v[i] += e * e;
    }
  }
  float top = 0;
  for (float m : rest_most) top = m > top ? m : top;
  const double error = __builtin_sqrt(ee.total()) * kSumUp + kCancel * norm;
  const double steps = 1.02 * static_cast<double>(a.k) * kU;
  const double beta =
      (dot_kappa(a.d) * __builtin_fabs(b) + (5 * kU + steps) * (__builtin_fabs(centred) + tau) +
       kFar * (__builtin_fabs(b) + norm * norm_mu) + static_cast<double>(a.d) * kUnderflow) *
      (kUp + steps);
  float* table = a.table + f;
  table[kScale * a.stride] = s;
  table[kZero * a.stride] = zero;
  table[kError * a.stride] = round_up(error * kUp);
  table[kNorm * a.stride] = round_up((norm > across ? norm : across) * kUp);
  table[kCentredBias * a.stride] = static_cast<float>(centred);
  table[kSlack * a.stride] = round_up(beta);
  table[kStart * a.stride] =
      round_up(static_cast<double>(static_cast<float>(centred)) + round_up(beta) - tau);
  if (!a.code2) return;
  // a residual of nothing (rows that lie on the grid) has digits of nothing
  const float s2 = top / 127.0f, per_s2 = s2 > 1e-30f ? 1.0f / s2 : 0.0f;
  uint8_t* code2 = a.code2 + tile_offset(f, a.width);
  Sum16 ee2;
  for (int64_t k = 0; k < a.width; k += 16) {
    const uint8_t* from = code + column_offset(k);
    uint8_t* to = code2 + column_offset(k);
    for (int i = 0; i < 16; ++i) {
      const double e = w[k + i] - static_cast<double>(s) * (static_cast<int32_t>(from[i]) - zero);
      const float c = clamp_digit(__builtin_rintf(static_cast<float>(e) * per_s2));
      to[i] = static_cast<uint8_t>(static_cast<int32_t>(c) + 128);
      const double left = e - static_cast<double>(s2) * c;
      ee2.v[i] += left * left;
    }
  }
  table[kScale2 * a.stride] = s2;
  table[kError2 * a.stride] = round_up((__builtin_sqrt(ee2.total()) * kSumUp + kCancel * norm) * kUp);
}

static void screen_rows(const ScreenRowArgs& a, int64_t f0, int64_t f1, float* space) {
  Sum16 square;
  for (int64_t k = 0; a.mu && k < a.d; k += 16) {
    const int64_t n = a.d - k < 16 ? a.d - k : 16;
    const Columns mu(a.mu, k, n, 0.0f), per(a.per_scale, k, n, 1.0f);
    for (int i = 0; i < 16; ++i) {
      const double m = static_cast<double>(mu.v[i]) * per.v[i];
      square.v[i] += m * m;
    }
  }
  const double norm_mu = __builtin_sqrt(square.total()) * kSumUp;
  for (int64_t f = f0; f < f1; ++f) {
    widen_any(a, f, space);
    for (int64_t k = 0; a.scale && k < a.d; ++k) space[k] *= a.scale[k];
    screen_row(a, f, space, norm_mu);
  }
}
