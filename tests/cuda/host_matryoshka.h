// Part of host_build.cpp: the nested-bit product against loops over the codes, which are packed here a second
// time, bit by bit, from the layout that matryoshka/planes.py states.

struct MatryoshkaCase {
  int64_t T, d, out, group;  // group: columns that share a scale, 0 for one a row
  int stored, bits;
  bool rounds, extra, mean, half;
};

// One token and several, tails of rows, columns, units and tokens, every set of planes, groups within a stage
// and across, one group over and under 512, slices that drop, round, and round beyond the top.
const MatryoshkaCase kMatryoshkaCases[] = {
    {1, 70, 17, 0, 8, 8, false, false, false, false},  {5, 70, 33, 0, 4, 4, false, false, true, false},
    {3, 2200, 5, 0, 2, 2, false, false, false, true},  {1, 2210, 16, 32, 8, 8, false, false, true, true},
    {6, 100, 20, 32, 6, 4, true, false, true, true},   {2, 3000, 18, 96, 3, 2, true, true, false, false},
    {1, 1300, 3, 640, 6, 6, false, false, true, true}, {4, 40, 16, 64, 4, 3, false, false, false, false},
    {7, 33, 31, 0, 8, 7, true, true, true, false},     {1, 5, 1, 32, 2, 1, false, false, false, true},
    {2, 1100, 7, 512, 4, 4, false, false, true, false}};

// Where the bit `b` (0 the lowest) of a code lies: plane, byte in its unit, bit in the byte.
void place(int stored, int b, int lane, int k, int* plane, int* byte, int* bit) {
  const int widths[9][6] = {{}, {}, {2}, {2, 1}, {2, 1, 1}, {}, {2, 1, 1, 2}, {}, {2, 1, 1, 2, 2}};
  int top = stored;
  for (*plane = 0; top - widths[stored][*plane] > b; ++*plane) top -= widths[stored][*plane];
  const int width = widths[stored][*plane], low = top - width, quad = k / 4, c = k % 4;
  *byte = (width == 2 ? quad / 4 * 64 : 0) + lane * 4 + c;
  *bit = (width == 2 ? quad % 4 * 2 : quad) + b - low;
}

int check_matryoshka(const MatryoshkaCase& c, const HostLaunch& launch) {
  const int64_t units = (c.d + 31) / 32, blocks = (c.out + 15) / 16;
  const int64_t groups = c.group ? (c.d + c.group - 1) / c.group : 1,
                group_units = c.group ? c.group / 32 : units;
  const int widths[9][6] = {{}, {}, {2}, {2, 1}, {2, 1, 1}, {}, {2, 1, 1, 2}, {}, {2, 1, 1, 2, 2}};
  std::unique_ptr<uint8_t[]> planes[5];
  for (int p = 0; p < 5 && widths[c.stored][p] != 0; ++p) {
    const int64_t bytes = blocks * units * 64 * widths[c.stored][p];
    planes[p] = array<uint8_t>(bytes);
    memset(planes[p].get(), 0, bytes);
  }
  auto code = array<int32_t>(c.out * c.d);
  for (int64_t i = 0; i < c.out * c.d; ++i) {
    code[i] = static_cast<int32_t>((uniform() + 1.0f) * 0.5f * static_cast<float>(1 << c.stored));
    if (code[i] >= 1 << c.stored || i % 7 == 0) code[i] = (1 << c.stored) - 1;
    const int64_t o = i / c.d, k = i % c.d;
    for (int b = 0; b < c.stored; ++b) {
      int plane, byte, bit;
      place(c.stored, b, static_cast<int>(o % 16), static_cast<int>(k % 32), &plane, &byte, &bit);
      uint8_t& at = planes[plane][((o / 16) * units + k / 32) * 64 * widths[c.stored][plane] + byte];
      at = static_cast<uint8_t>(at | (code[i] >> b & 1) << bit);
    }
  }
  auto x = array<float>(c.T * c.d), mean = array<float>(c.d), bias = array<float>(c.out);
  for (int64_t i = 0; i < c.T * c.d; ++i) x[i] = uniform();
  for (int64_t i = 0; i < c.d; ++i) mean[i] = 0.2f * uniform();
  for (int64_t i = 0; i < c.out; ++i) bias[i] = uniform();
  if (c.T > 2) x[c.d + c.d / 2] = INFINITY, x[2 * c.d] = other_nan();
  for (int64_t k = 0; c.T > 3 && k < c.d; ++k) x[3 * c.d + k] = c.mean ? mean[k] : 0.0f;  // a token of zeros
  const int64_t held = blocks * groups * 16;
  auto scale = array<float>(held);
  auto half_scale = array<uint16_t>(held);
  auto zero = array<uint8_t>(held);
  for (int64_t i = 0; i < held; ++i) {
    half_scale[i] = static_cast<uint16_t>(0x2000 + 997 * i % 0x800);  // around 2^-7
    scale[i] = c.half ? gsf::widen(gsf::F16{half_scale[i]}) : 0.01f * (1.5f + uniform());
    zero[i] = static_cast<uint8_t>(31 * i);
  }

  // tokens: the greatest size to 127, halves to even
  auto q = array<int32_t>(c.T * units * 8), qsum = array<int32_t>(c.T * groups);
  auto s = array<float>(c.T);
  gsf::cuda::TokensArgs tokens{
      x.get(),    c.mean ? mean.get() : nullptr, q.get(), s.get(), qsum.get(), c.T, c.d, units, groups,
      group_units};
  gsf::cuda::round_tokens(launch, tokens);
  auto want_q = array<int32_t>(c.T * units * 32);
  for (int64_t t = 0; t < c.T; ++t) {
    float most = 0.0f;
    bool finite = true;
    auto v = array<float>(units * 32);
    for (int64_t k = 0; k < units * 32; ++k) {
      v[k] = k >= c.d ? 0.0f : c.mean ? x[t * c.d + k] - mean[k] : x[t * c.d + k];
      finite = finite && std::isfinite(v[k]);
      most = std::fmax(most, std::fabs(v[k]));
    }
    const float want_s = finite ? std::fmax(most / 127.0f, 1.17549435e-38f) : NAN;
    if (!same_sum(s[t], want_s)) return differs("a token's scale", t);
    for (int64_t k = 0; k < units * 32; ++k) {
      want_q[t * units * 32 + k] = finite ? static_cast<int32_t>(std::nearbyint(v[k] / want_s)) : 0;
      const int8_t got = reinterpret_cast<const int8_t*>(q.get())[t * units * 32 + k];
      if (got != want_q[t * units * 32 + k]) return differs("a token's codes", t * units * 32 + k);
    }
    for (int64_t g = 0; g < groups; ++g) {
      int32_t sum = 0;
      for (int64_t k = g * group_units * 32; k < std::min((g + 1) * group_units, units) * 32; ++k) {
        sum += want_q[t * units * 32 + k];
      }
      if (qsum[t * groups + g] != sum) return differs("a token's sums", t * groups + g);
    }
  }

  const int drop = c.stored - c.bits, top = (1 << c.bits) - (c.extra ? 0 : 1), shift = 8 - c.bits;
  const float mid = c.rounds ? 0.0f : static_cast<float>((1 << shift) - 1) / 2;
  auto y = array<float>(c.T * c.out);
  gsf::cuda::MatryoshkaArgs a{q.get(),
                              s.get(),
                              qsum.get(),
                              {},
                              c.half ? static_cast<void*>(half_scale.get()) : scale.get(),
                              zero.get(),
                              c.mean ? bias.get() : nullptr,
                              y.get(),
                              c.T,
                              c.out,
                              units,
                              groups,
                              group_units,
                              c.half,
                              c.stored,
                              c.bits,
                              c.rounds,
                              top,
                              mid};
  for (int p = 0; p < 5; ++p) a.planes[p] = planes[p].get();
  gsf::cuda::matryoshka_rows(launch, a);
  for (int64_t t = 0; t < c.T; ++t) {
    for (int64_t o = 0; o < c.out; ++o) {
      float acc = 0.0f;
      for (int64_t g = 0; g < groups; ++g) {
        int32_t dot = 0;
        for (int64_t k = g * group_units * 32; k < std::min((g + 1) * group_units * 32, c.d); ++k) {
          int32_t v = code[o * c.d + k];
          if (drop > 0) v = c.rounds ? std::min((v + (1 << (drop - 1))) >> drop, top) : v >> drop;
          dot += v * want_q[t * units * 32 + k];
        }
        const int64_t at = (o / 16 * groups + g) * 16 + o % 16;
        const float alpha = scale[at], sum = static_cast<float>(qsum[t * groups + g]);
        if (group_units > 16) {
          const float whole = static_cast<float>(dot * (1 << shift) - zero[at] * qsum[t * groups + g]);
          acc = std::fma(alpha, whole + mid * sum, acc);
        } else {
          acc = std::fma(alpha * static_cast<float>(1 << shift), static_cast<float>(dot), acc);
          acc = std::fma(alpha * (mid - static_cast<float>(zero[at])), sum, acc);
        }
      }
      const float want = std::fma(acc, s[t], c.mean ? bias[o] : 0.0f);
      if (!same_sum(y[t * c.out + o], want)) return differs("the nested product", t * c.out + o);
    }
  }
  return 0;
}
