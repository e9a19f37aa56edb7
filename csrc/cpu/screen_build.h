// Builds the screen: the two digits and bounds of one feature row, and of one token.  Norms are summed in
// fp64 and rounded up.  docs/how/screen.md derives every constant of screen_terms.h.

// The smallest float that is not below v.
static inline float round_up(double v) {
  const float f = static_cast<float>(v);
  return static_cast<double>(f) >= v ? f : __builtin_nextafterf(f, __builtin_inff());
}

// Columns [k, k + 16) of a vector of d, zeros beyond its end.
template <typename E>
static inline V16 columns16(const E* from, int64_t k, int64_t d) {
  return k + 16 <= d ? load16(from + k) : (k < d ? load16_tail(from + k, d - k) : zero16());
}

// The same for a vector that may be null: `otherwise` everywhere.
static inline V16 columns16(const float* from, int64_t k, int64_t d, float otherwise) {
  return from ? columns16(from, k, d) : set16(otherwise);
}

static inline int64_t column_offset(int64_t k) { return k / kTileColumns * kTileStep + k % kTileColumns; }

// The last bits of norms may differ between instruction sets, results cannot.
static inline double norm_of(const D16& squares) { return __builtin_sqrt(dtotal16(squares)) * kSumUp; }

static inline double dot_fp64(const float* a, const float* b, int64_t d) {
  D16 dot = dset16(0);
  for (int64_t k = 0; k < d; k += 16) {
    dot = dfma16(dwiden16(columns16(a, k, d)), dwiden16(columns16(b, k, d)), dot);
  }
  return dtotal16(dot);
}

// Removes from r its part along the directions; the screen multiplies by their coefficients as rounded here.
// Returns |c|.
static inline double take_out_directions(const ScreenTokenArgs& a, float* r) {
  double square = 0;
  if (a.k == 0) return square;
  for (int64_t j = 0; j < a.k; ++j) {
    a.along[j] = static_cast<float>(dot_fp64(r, a.directions + j * a.d, a.d));
    square += static_cast<double>(a.along[j]) * a.along[j];
  }
  for (int64_t k = 0; k < a.d; k += 16) {
    D16 rest = dwiden16(load16(r + k));
    for (int64_t j = 0; j < a.k; ++j) {
      rest = dfma16(dset16(-static_cast<double>(a.along[j])),
                    dwiden16(columns16(a.directions + j * a.d, k, a.d)), rest);
    }
    store16(r + k, dnarrow16(rest));
  }
  return __builtin_sqrt(square) * kSumUp;
}

static void screen_token(const ScreenTokenArgs& a) {
  ScreenToken& out = *a.out;
  out = ScreenToken{};
  float* r = a.space;
  const int64_t d = a.d;
  D16 xx = dset16(0), rr = xx, left = xx;
  for (int64_t k = 0; k < a.width; k += 16) {
    const V16 x = columns16(a.x, k, d), per = columns16(a.per_scale, k, d, 1.0f);
    const V16 rest = mul16(sub16(x, columns16(a.mu, k, d, 0.0f)), per);
    store16(r + k, rest);
    xx = dsquared16(dmul16(dwiden16(x), dwiden16(per)), xx);
    rr = dsquared16(dwiden16(rest), rr);
  }
  const double norm_x = norm_of(xx), norm_r = norm_of(rr);
  const double norm_c = take_out_directions(a, r);
  V16 most = zero16();
  for (int64_t k = 0; k < a.width; k += 16) {
    const V16 rest = load16(r + k);
    // NaN does not change `most`, but makes the sums NaN, which `fits` checks
    most = max16(abs16(rest), most);
    left = dsquared16(dwiden16(rest), left);
  }
  const float top = greatest16(most);
  const double norm_left = norm_of(left);
  // written such that NaN fails
  if (!(top >= kTiny && top <= kHuge && norm_x <= kHuge && norm_r <= kHuge && norm_c <= kHuge)) {
    return;  // its digits are zeros already
  }
  const float t = top / 127.0f, per_t = 1.0f / t, t2 = t * static_cast<float>(kDigit2),
              per_t2 = per_t * 256.0f;
  D16 r1r1 = dset16(0), rhat = r1r1, r2r2 = r1r1, left1 = r1r1, left2 = r1r1;
  I16 sum = izero16(), sum2 = sum;
  for (int64_t k = 0; k < a.width; k += 16) {
    const V16 rest = load16(r + k);
    const V16 d1 = clamped16(round16(mul16(rest, set16(per_t))), -127.0f, 127.0f);
    const V16 after = fma16(set16(-t), d1, rest);
    const V16 d2 = clamped16(round16(mul16(after, set16(per_t2))), -127.0f, 127.0f);
    const I16 i1 = to_int16(d1), i2 = to_int16(d2);
    store_bytes16(a.q1 + column_offset(k), i1);
    store_bytes16(a.q2 + column_offset(k), i2);
    sum = iadd16(sum, i1);
    sum2 = iadd16(sum2, i2);
    const D16 r1 = dmul16(dset16(t), dwiden16(d1)), r2 = dmul16(dset16(t2), dwiden16(d2));
    const D16 e1 = dsub16(dwiden16(rest), r1);
    r1r1 = dsquared16(r1, r1r1);
    r2r2 = dsquared16(r2, r2r2);
    rhat = dsquared16(dadd16(r1, r2), rhat);
    left1 = dsquared16(e1, left1);
    left2 = dsquared16(dsub16(e1, r2), left2);
  }
  const double n1 = norm_of(r1r1), n2 = norm_of(r2r2), nb = norm_of(rhat);
  const double l1 = norm_of(left1) + kCancel * norm_left, l2 = norm_of(left2) + kCancel * norm_left;
  double rounding = dot_kappa(d) * norm_x + kSecondOrder * kU * norm_r;
  if (a.k > 0) {
    rounding += kSecondOrder * kU * norm_left + kDirectionLoss * (norm_r + norm_c * a.frobenius) +
                coefficient_steps(a.k, a.frobenius) * norm_c;
  }
  const double steps = token_steps(a.k);
  out.t = t;
  out.reach = round_up((n1 + steps * n1) * kUp);
  out.error = round_up((l1 + rounding + steps * n1) * kUp);
  out.reach2 = round_up((nb + steps * (n1 + n2)) * kUp);
  out.error2 = round_up((l2 + rounding + steps * (n1 + n2)) * kUp);
  out.sum = total16(sum);
  out.sum2 = total16(sum2);
  out.fits = 1;
}

template <typename E>
static inline void widen_row(const E* w, int64_t d, int64_t width, float* out) {
  for (int64_t k = 0; k < width; k += 16) store16(out + k, columns16(w, k, d));
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
      return;  // rejected by the checks one layer up
  }
}

static inline void refine_always(const ScreenRowArgs& a, int64_t f) {
  // its codes stay zeros
  for (int64_t row = 0; row < kScreenRows + a.k; ++row) a.table[row * a.stride + f] = 0.0f;
  a.table[kStart * a.stride + f] = __builtin_inff();
}

// Writes the row's products with the directions to the table; returns their norm.
static inline double project(const ScreenRowArgs& a, int64_t f, const float* w) {
  double square = 0;
  for (int64_t j = 0; j < a.k; ++j) {
    const double p = dot_fp64(w, a.directions + j * a.d, a.d);
    a.table[(kScreenRows + j) * a.stride + f] = static_cast<float>(p);
    square += p * p;
  }
  return __builtin_sqrt(square) * kSumUp;
}

// Codes [k, k + 16) of a row of d; the zero point past its end.
static inline V16 given16(const uint8_t* codes, int64_t k, int64_t d, float zero) {
  if (k + 16 <= d) return to_float16(widen16(codes + k));
  float padded[16];
  for (int64_t i = 0; i < 16; ++i) padded[i] = k + i < d ? static_cast<float>(codes[k + i]) : zero;
  return load16(padded);
}

// The first digit of a row: the 8-bit min-max code of gemmascope_fast/ops/codes.py, per channel, unless one
// was given; its error is measured in both cases.
static inline void screen_row(const ScreenRowArgs& a, int64_t f, const float* w, double norm_mu) {
  V16 low = zero16(), high = low;
  D16 ww = dset16(0), wmu = ww;
  for (int64_t k = 0; k < a.width; k += 16) {
    const V16 v = load16(w + k);
    const D16 wide = dwiden16(v), mu = dwiden16(columns16(a.mu, k, a.d, 0.0f));
    low = min16(v, low);
    high = max16(v, high);
    ww = dsquared16(wide, ww);
    wmu = dfma16(wide, dmul16(mu, dwiden16(columns16(a.per_scale, k, a.d, 1.0f))), wmu);
  }
  const float least = -greatest16(sub16(zero16(), low)), most = greatest16(high);
  const double norm = norm_of(ww);
  const double b = a.bias[f], centred = b + dtotal16(wmu);
  const double tau = a.threshold[f] > 0.0f ? a.threshold[f] : 0.0;
  const double across = project(a, f, w);
  // written such that NaN fails; a bias near the end of fp32's range is left to the exact dot
  if (!(norm >= kTiny && norm <= kHuge && across <= kHuge && __builtin_fabs(b) <= kMostBias &&
        __builtin_fabs(centred) <= kMostBias)) {
    return refine_always(a, f);
  }
  const float s = a.given ? a.given_scale[f] : (most - least) / 255.0f;
  const float zero = a.given ? static_cast<float>(a.given_zero[f]) : __builtin_rintf(-least / s);
  if (a.given && !(s >= kLeastGiven && s <= kMostGiven)) return refine_always(a, f);
  uint8_t* code = a.code + tile_offset(f, a.width);
  // the error that a digit leaves of its weight; columns past d have w = 0, whose code is the zero point: no
  // error
  const auto left_by = [&](int64_t k, V16 digit) {
    const D16 steps = dwiden16(sub16(digit, set16(zero)));
    return dfma16(dset16(-static_cast<double>(s)), steps, dwiden16(load16(w + k)));
  };
  V16 rest_most = zero16();
  D16 ee = dset16(0);
  for (int64_t k = 0; k < a.width; k += 16) {
    V16 digit = clamped16(add16(round16(div16(load16(w + k), set16(s))), set16(zero)), 0.0f, 255.0f);
    if (a.given) digit = given16(a.given + f * a.d, k, a.d, zero);
    store_bytes16(code + column_offset(k), to_int16(digit));
    const D16 e = left_by(k, digit);
    rest_most = max16(abs16(dnarrow16(e)), rest_most);
    ee = dsquared16(e, ee);
  }
  const float top = greatest16(rest_most);
  const double error = norm_of(ee) + kCancel * norm;
  const double beta =
      (dot_kappa(a.d) * __builtin_fabs(b) + start_steps(a.k) * (__builtin_fabs(centred) + tau) +
       kDotLoss * (__builtin_fabs(b) + norm * norm_mu) + static_cast<double>(a.d) * kUnderflow) *
      (kUp + direction_steps(a.k));
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
  // a residual of zero (rows on the grid) has zero digits
  const float s2 = top / 127.0f, per_s2 = s2 > 1e-30f ? 1.0f / s2 : 0.0f;
  uint8_t* code2 = a.code2 + tile_offset(f, a.width);
  D16 ee2 = dset16(0);
  for (int64_t k = 0; k < a.width; k += 16) {
    const D16 e = left_by(k, to_float16(widen16(code + column_offset(k))));
    const V16 c = clamped16(round16(mul16(dnarrow16(e), set16(per_s2))), -127.0f, 127.0f);
    store_bytes16(code2 + column_offset(k), to_int16(add16(c, set16(128.0f))));
    ee2 = dsquared16(dfma16(dset16(-static_cast<double>(s2)), dwiden16(c), e), ee2);
  }
  table[kScale2 * a.stride] = s2;
  table[kError2 * a.stride] = round_up((norm_of(ee2) + kCancel * norm) * kUp);
}

static void screen_rows(const ScreenRowArgs& a, int64_t f0, int64_t f1, float* space) {
  D16 square = dset16(0);
  for (int64_t k = 0; a.mu && k < a.d; k += 16) {
    const V16 mu = columns16(a.mu, k, a.d, 0.0f), per = columns16(a.per_scale, k, a.d, 1.0f);
    square = dsquared16(dmul16(dwiden16(mu), dwiden16(per)), square);
  }
  const double norm_mu = norm_of(square);
  for (int64_t f = f0; f < f1; ++f) {
    widen_any(a, f, space);
    for (int64_t k = 0; a.scale && k < a.d; ++k) space[k] *= a.scale[k];
    screen_row(a, f, space, norm_mu);
  }
}
