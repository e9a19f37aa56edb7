// The CUDA kernels compiled for the CPU (csrc/cuda/host.h): as a library for ctypes, and, with GSF_MAIN, as a
// program that makes its own cases and compares with loops written a second time, for the sanitizers.
#include "cuda/compact.cu"
#include "cuda/decode.cu"
#include "cuda/encode.cu"
#include "cuda/matryoshka.cu"
#include "cuda/splice.cu"

using HostLaunch = gsf::cuda::Launcher;

static bool g_last_alone = false;

extern "C" {

// From here on only the last block of each grid runs.
void gsf_host_last_alone(int on) { g_last_alone = on != 0; }

void gsf_host_encode(const gsf::cuda::EncodeArgs* args, int dtype, int order, uint64_t seed) {
  const HostLaunch launch{static_cast<gsf::host::Order>(order), seed, g_last_alone};
  gsf::cuda::encode_words(launch, *args, static_cast<gsf::Dtype>(dtype));
}

void gsf_host_gather(const gsf::cuda::GatherArgs* args, int dtype, int order, uint64_t seed) {
  const HostLaunch launch{static_cast<gsf::host::Order>(order), seed, g_last_alone};
  gsf::cuda::gather_words(launch, *args, static_cast<gsf::Dtype>(dtype));
}

void gsf_host_decode(const gsf::cuda::DecodeArgs* args, int dtype, int order, uint64_t seed) {
  const HostLaunch launch{static_cast<gsf::host::Order>(order), seed, g_last_alone};
  gsf::cuda::decode_rows(launch, *args, static_cast<gsf::Dtype>(dtype));
}

void gsf_host_splice(const gsf::cuda::SpliceArgs* args, int dtype, int order, uint64_t seed) {
  const HostLaunch launch{static_cast<gsf::host::Order>(order), seed, g_last_alone};
  gsf::cuda::splice_tokens(launch, *args, static_cast<gsf::Dtype>(dtype));
}

void gsf_host_round_tokens(const gsf::cuda::TokensArgs* args, int, int order, uint64_t seed) {
  const HostLaunch launch{static_cast<gsf::host::Order>(order), seed, g_last_alone};
  gsf::cuda::round_tokens(launch, *args);
}

void gsf_host_matryoshka(const gsf::cuda::MatryoshkaArgs* args, int, int order, uint64_t seed) {
  const HostLaunch launch{static_cast<gsf::host::Order>(order), seed, g_last_alone};
  gsf::cuda::matryoshka_rows(launch, *args);
}
}

#ifdef GSF_MAIN
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

namespace {

uint64_t g_state = 1;
float uniform() {
  g_state = g_state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<float>(g_state >> 40) / (1 << 23) - 1.0f;
}

// Exact-size heap arrays, so that AddressSanitizer sees the first byte beyond them.
template <typename T>
std::unique_ptr<T[]> array(size_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

float reference_dot(const float* x, const float* w, int64_t d) {
  float lanes[16] = {};
  for (int64_t k = 0; k < (d + 15) / 16 * 16; ++k) {
    lanes[k % 16] = std::fma(k < d ? x[k] : 0.0f, k < d ? w[k] : 0.0f, lanes[k % 16]);
  }
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

struct Csr {
  std::vector<int64_t> crow{0};
  std::vector<int32_t> col;
  std::vector<float> values;
};

// Not the canonical one: a kernel that hands it on is found.
float other_nan() {
  const uint32_t bits = 0xFFC00123u;
  float nan;
  memcpy(&nan, &bits, 4);
  return nan;
}

// The same bytes; a latent that is NaN must be the canonical one.
bool same_latent(float got, float want) {
  const uint32_t canonical = 0x7FC00000u;
  return memcmp(&got, std::isnan(want) ? static_cast<const void*>(&canonical) : &want, 4) == 0;
}

// A sum that is NaN has no bits of its own: which of its terms lends them is up to the machine.
bool same_sum(float got, float want) {
  return std::isnan(want) ? std::isnan(got) : memcmp(&got, &want, 4) == 0;
}

int differs(const char* what, int64_t at) {
  printf("%s differs at %lld\n", what, static_cast<long long>(at));
  return 1;
}

// T tokens, F features, d inputs; a higher `shift` makes more features fire.
int check_case(int64_t T, int64_t d, int64_t F, float shift, bool scan, const HostLaunch& launch) {
  auto x = array<float>(T * d), w = array<float>(F * d), bias = array<float>(F), theta = array<float>(F);
  for (int64_t i = 0; i < T * d; ++i) x[i] = uniform();
  for (int64_t i = 0; i < F * d; ++i) w[i] = uniform();
  for (int64_t i = 0; i < F; ++i) bias[i] = uniform() + shift, theta[i] = 0.5f * uniform();
  if (T > 2 && d > 1) x[2 * d + 1] = other_nan();
  Csr want;
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t f = 0; f < F; ++f) {
      const float z = reference_dot(x.get() + t * d, w.get() + f * d, d) + bias[f];
      if (!(z <= std::fmax(theta[f], 0.0f))) want.col.push_back(f), want.values.push_back(z);
    }
    want.crow.push_back(static_cast<int64_t>(want.col.size()));
  }

  const int64_t words = (F + 31) / 32, nnz = want.crow.back();
  auto bitmap = array<uint32_t>(T * words);
  auto count = array<int32_t>(T * words);
  auto slots = array<float>(T * words * gsf::cuda::kSlots);
  gsf::cuda::EncodeArgs e{x.get(),     w.get(), bias.get(), theta.get(), bitmap.get(), count.get(),
                          slots.get(), T,       F,          d,           words,        0.0f};
  gsf::cuda::encode_words(launch, e, gsf::Dtype::f32);
  auto total = array<int64_t>(T * words);
  int64_t sum = 0;
  for (int64_t i = 0; i < T * words; ++i) total[i] = sum += count[i];
  if (sum != nnz) return differs("the count of latents", sum);

  auto crow = array<int64_t>(T + 1);
  auto col = array<int32_t>(nnz);
  auto values = array<float>(nnz);
  gsf::cuda::GatherArgs g{e, scan ? nullptr : total.get(), crow.get(), col.get(), values.get(), nnz};
  gsf::cuda::gather_words(launch, g, gsf::Dtype::f32);
  for (int64_t t = 0; t <= T; ++t) {
    if (crow[t] != want.crow[t]) return differs("crow", t);
  }
  for (int64_t i = 0; i < nnz; ++i) {
    if (col[i] != want.col[i]) return differs("col", i);
    if (!same_latent(values[i], want.values[i])) return differs("values", i);
  }

  if (nnz >
      0) {  // one entry short: nothing is written beyond, and the last row that has any comes out as NaN
    auto less_col = array<int32_t>(nnz - 1);
    auto less_values = array<float>(nnz - 1);
    auto less_out = array<float>(T * d);
    gsf::cuda::GatherArgs s{e, total.get(), crow.get(), less_col.get(), less_values.get(), nnz - 1};
    gsf::cuda::gather_words(launch, s, gsf::Dtype::f32);
    if (crow[T] != nnz) return differs("the count with a short capacity", crow[T]);
    gsf::cuda::DecodeArgs m{crow.get(), less_col.get(), less_values.get(), w.get(),
                            nullptr,    nullptr,        less_out.get(),    T,
                            d,          nnz - 1};
    gsf::cuda::decode_rows(launch, m, gsf::Dtype::f32);
    for (int64_t t = 0; t < T; ++t) {
      if (crow[t + 1] == nnz && !std::isnan(less_out[t * d])) return differs("a row beyond the capacity", t);
    }
  }

  auto out = array<float>(T * d);
  gsf::cuda::DecodeArgs dec{crow.get(), col.get(), values.get(), w.get(), nullptr, x.get(), out.get(),
                            T,          d,         nnz};
  gsf::cuda::decode_rows(launch, dec, gsf::Dtype::f32);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t k = 0; k < d; ++k) {
      float acc = 0.0f;
      for (int64_t i = crow[t]; i < crow[t + 1]; ++i) acc = std::fma(values[i], w[col[i] * d + k], acc);
      acc += x[k];
      if (!same_sum(out[t * d + k], acc)) return differs("decode", t * d + k);
    }
  }
  return 0;
}

// The fused loop's second launch, against the same sums written out; every second feature is edited, some by
// a factor of one.  With several tokens one has an infinite entry and one a NaN, hence such latents.  quiet:
// edits that change nothing, so that what is there must pass bit for bit.  lack: entries that do not fit.
int check_splice(int64_t T, int64_t d, int64_t F, float shift, bool error, bool quiet, int64_t lack,
                 const HostLaunch& launch) {
  auto x = array<float>(T * d), w = array<float>(F * d), bias = array<float>(F), theta = array<float>(F);
  auto dec_bias = array<float>(d), out = array<float>(T * d);
  for (int64_t i = 0; i < T * d; ++i) x[i] = uniform();
  for (int64_t i = 0; i < F * d; ++i) w[i] = uniform();
  x[0] = -0.0f;
  if (T > 2) x[d + 1] = INFINITY, x[2 * d + 1] = other_nan();
  for (int64_t i = 0; i < F; ++i) bias[i] = uniform() + shift, theta[i] = 0.5f * uniform();
  for (int64_t i = 0; i < d; ++i) dec_bias[i] = uniform();
  const int64_t words = (F + 31) / 32, edits = F / 2;
  auto features = array<int32_t>(edits), kind = array<int32_t>(edits);
  auto amount = array<float>(edits);
  for (int64_t i = 0; i < edits; ++i) {
    features[i] = 2 * i + 1, kind[i] = i % 4, amount[i] = i % 8 == 0 ? 1.0f : uniform();
    if (quiet) kind[i] = i % 2 * 3, amount[i] = kind[i] == 0 ? 1.0f : -1e30f;
  }
  auto bitmap = array<uint32_t>(T * words);
  auto count = array<int32_t>(T * words);
  auto slots = array<float>(T * words * gsf::cuda::kSlots);
  gsf::cuda::EncodeArgs e{x.get(),     w.get(), bias.get(), theta.get(), bitmap.get(), count.get(),
                          slots.get(), T,       F,          d,           words,        0.0f};
  gsf::cuda::encode_words(launch, e, gsf::Dtype::f32);
  int64_t nnz = 0;
  for (int64_t i = 0; i < T * words; ++i) nnz += count[i];
  const int64_t room = nnz - lack;
  auto crow = array<int64_t>(T + 1);
  auto col = array<int32_t>(room);
  auto values = array<float>(room);
  gsf::cuda::SpliceArgs a{{e, nullptr, crow.get(), col.get(), values.get(), room},
                          error ? x.get() : nullptr,
                          w.get(),
                          dec_bias.get(),
                          features.get(),
                          kind.get(),
                          amount.get(),
                          out.get(),
                          d,
                          edits};
  gsf::cuda::splice_tokens(launch, a, gsf::Dtype::f32);
  if (crow[T] != nnz) return differs("the count of the loop's latents", crow[T]);
  for (int64_t t = 0; t < T; ++t) {
    auto latent = array<float>(F);
    int64_t n = crow[t];
    for (int64_t f = 0; f < F; ++f) {
      const float z = reference_dot(x.get() + t * d, w.get() + f * d, d) + bias[f];
      latent[f] = z <= std::fmax(theta[f], 0.0f) ? 0.0f : z;
      if (latent[f] == 0.0f) continue;
      if (n < room && (col[n] != f || !same_latent(values[n], z))) return differs("the loop's latents", n);
      ++n;
    }
    if (n != crow[t + 1]) return differs("the loop's offsets", t + 1);
    for (int64_t k = 0; k < d; ++k) {
      float sum = 0.0f, extra = 0.0f;
      for (int64_t f = 0; f < F; ++f) {
        if (latent[f] != 0.0f) sum = std::fma(latent[f], w[f * d + k], sum);
      }
      bool changed = false;
      for (int64_t i = 0; i < edits; ++i) {
        const float old = latent[features[i]], v = amount[i];
        const float all[4] = {v == 1.0f ? 0.0f : old * v - old, v - old, v, old < v ? v - old : 0.0f};
        if (all[kind[i]] == 0.0f) continue;
        changed = true;
        extra = std::fma(all[kind[i]], w[features[i] * d + k], extra);
      }
      const float base = error ? x[t * d + k] : sum + dec_bias[k];
      const float want = n > room ? NAN : changed ? base + extra : base;
      if (!same_sum(out[t * d + k], want)) return differs("splice", t * d + k);
    }
  }
  return 0;
}

#include "host_matryoshka.h"

}  // namespace

int main(int argc, char** argv) {
  const int order = argc > 1 ? atoi(argv[1]) : 0;
  const HostLaunch launch{static_cast<gsf::host::Order>(order), 12345};
  // tokens of each kernel (1, <= 4, <= 8, tile, decode_many above 32), tails of every kind, full words,
  // nothing
  const struct {
    int64_t T, d, F;
    float shift;
  } cases[] = {{1, 20, 70, 0.0f}, {3, 17, 64, 9.0f},   {7, 33, 31, 0.0f},  {9, 70, 40, 0.0f},
               {34, 5, 33, 9.0f}, {2, 8, 300, -50.0f}, {1, 4, 8300, 9.0f}, {5, 40, 130, 2.0f}};
  for (const auto& c : cases) {
    for (bool scan : {false, true}) {
      if (check_case(c.T, c.d, c.F, c.shift, scan, launch) != 0) {
        printf("case T %lld d %lld F %lld order %d\n", static_cast<long long>(c.T),
               static_cast<long long>(c.d), static_cast<long long>(c.F), order);
        return 1;
      }
    }
  }
  for (bool error : {false, true}) {
    for (int64_t lack : {0, 1}) {
      if (check_splice(1, 40, 300, 0.0f, error, false, lack, launch) != 0) return 1;
      if (check_splice(3, 33, 70, 9.0f, error, false, lack, launch) != 0) return 1;
    }
    if (check_splice(3, 33, 70, 9.0f, error, true, 0, launch) != 0) return 1;
  }
  for (const auto& c : kMatryoshkaCases) {
    if (check_matryoshka(c, launch) != 0) return 1;
  }
  // more words than a block has threads
  if (check_splice(1, 4, 8300, -0.5f, false, false, 0, launch) != 0) return 1;
  return 0;
}
#endif
