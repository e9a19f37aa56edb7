// JumpReLU encode with every pair in full precision: dot, bias, threshold and compaction in one pass. Nothing
// of size [T][F] is stored.

// When a latent is stored (docs/how/exact.md): z > max(theta, 0), or z is NaN.  `!(z <= tau)` covers both.
static inline bool fires(float z, float threshold) { return !(z <= (threshold > 0.0f ? threshold : 0.0f)); }

static inline float canonical(float z) { return z == z ? z : __builtin_nanf(""); }

template <int TT, int FF, typename E>
static inline void encode_tile(const EncodeArgs& a, int64_t t0, int64_t f0, HitSink& sink) {
  const float* x[TT];
  const E* w[FF];
  float z[TT * FF];
  for (int t = 0; t < TT; ++t) x[t] = a.x + (t0 + t) * a.d;
  for (int f = 0; f < FF; ++f) w[f] = static_cast<const E*>(a.w) + (f0 + f) * a.d;
  dot_tile<TT, FF>(x, w, a.d, z);
  sink.reserve(TT * FF);
  for (int t = 0; t < TT; ++t) {
    for (int f = 0; f < FF; ++f) {
      const float zb = z[t * FF + f] + a.bias[f0 + f];
      const float theta = a.threshold[f0 + f];
      if (fires(zb, theta) || __builtin_fabsf(zb - theta) < a.half_bandwidth) {
        sink.push(a.ids ? a.ids[t0 + t] : t0 + t, f0 + f, canonical(zb));
      }
    }
  }
}

// Tokens and features per tile: 4 x 4 sums with 32 registers; 2 x 3 of two registers each with sixteen.
constexpr int kTileTokens = GSF_LEVEL == 1 || GSF_LEVEL == 2 ? 2 : 4;
constexpr int kTileFeatures = GSF_LEVEL == 1 || GSF_LEVEL == 2 ? 3 : 4;

template <int TT, typename E>
static inline void encode_tokens(const EncodeArgs& a, int64_t t0, int64_t f0, int64_t f1, HitSink& sink) {
  int64_t f = f0;
  for (; f + kTileFeatures <= f1; f += kTileFeatures) encode_tile<TT, kTileFeatures, E>(a, t0, f, sink);
  for (; f < f1; ++f) encode_tile<TT, 1, E>(a, t0, f, sink);
}

template <typename E>
static inline void encode_chunk(const EncodeArgs& a, int64_t f0, int64_t f1, HitSink& sink) {
  int64_t t = 0;
  for (; t + kTileTokens <= a.T; t += kTileTokens) encode_tokens<kTileTokens, E>(a, t, f0, f1, sink);
  switch (a.T - t) {
    case 3:
      return encode_tokens<3, E>(a, t, f0, f1, sink);
    case 2:
      return encode_tokens<2, E>(a, t, f0, f1, sink);
    case 1:
      return encode_tokens<1, E>(a, t, f0, f1, sink);
    default:
      return;
  }
}

static void encode(const EncodeArgs& a, int64_t f0, int64_t f1, HitSink& sink) {
  switch (a.w_dtype) {
    case Dtype::f32:
      return encode_chunk<float>(a, f0, f1, sink);
    case Dtype::bf16:
      return encode_chunk<BF16>(a, f0, f1, sink);
    case Dtype::f16:
      return encode_chunk<F16>(a, f0, f1, sink);
    case Dtype::i8:
      return;  // rejected by the checks one layer up
  }
}
