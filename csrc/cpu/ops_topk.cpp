// The k greatest pre-activations of a token: with every pair in full precision, and with the screen.
#include <torch/library.h>

#include <cmath>
#include <functional>
#include <limits>

#include "cpu/encode_call.h"
#include "cpu/greatest.h"
#include "cpu/screen_call.h"

namespace gsf {
namespace {

using Screened = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Tokens that pass together without a screen: about half of their pairs are stored before the k are taken, 24
// MB of 256 x 16,384.
constexpr int64_t kDenseTokens = 256;
// Bytes that candidates may take if the screen discards none, which decides how many tokens pass together.
constexpr int64_t kMostCandidates = int64_t{1} << 30;
constexpr int64_t kMostTokens = 1024, kFewestTokens = 64;
// Features that are screened before there is a floor, for each of the k: half of them are left, and from
// there on about k a doubling.  The sum, k (n / 2 + log2(F / (k n))), is least for n = 3.
constexpr int64_t kSeed = 3;
// Features that a phase ends with, for each that it began with.  The fewer phases, the less often threads
// wait for each other, but a phase leaves about k times its growth per token.  With one
// digit of the activations such a pair costs a second look, which from kManyTokens on is more than the
// waiting; with both digits it costs a few operations.
constexpr int64_t kManyTokens = 64;
int64_t growth(const ScreenArgs& a) { return a.both ? 8 : a.encode.T < kManyTokens ? 4 : 2; }
// A phase that would leave less than half of the features for the next one takes them all.
constexpr int64_t kLastPhase = 2;
// Up to so many, one thread is done before another would have started: candidates that become floors,
// candidates that are refined (a row of 2304 in fp32 takes 0.5 us at 20 GB/s), and pairs that are screened
// (its codes take 0.1 us).
constexpr size_t kFewCandidates = 4096;
constexpr size_t kFewRefined = 128;
constexpr int64_t kFewScreened = 512;

void check_k(int64_t k, int64_t F) {
  TORCH_CHECK_VALUE(k >= 1 && k <= F, "k: expected 1 to d_sae = ", F, ", got ", k);
}

at::Tensor no_thresholds(const at::Tensor& W_enc) {
  TORCH_CHECK_VALUE(W_enc.dim() == 2, "W_enc: expected [d_in, d_sae], got ", W_enc.sizes());
  at::Tensor zeros = new_tensor({W_enc.size(1)}, at::kFloat);
  std::fill_n(zeros.mutable_data_ptr<float>(), zeros.numel(), 0.0f);
  return zeros;
}

Csr encode_topk_cpu(const at::Tensor& x, const at::Tensor& W_enc, const at::Tensor& b_enc, int64_t k,
                    bool per_batch) {
  const at::Tensor theta = no_thresholds(W_enc);
  const EncodeCall call(x, W_enc, b_enc, theta, std::nullopt);
  check_k(k, W_enc.size(1));
  const int64_t T = x.size(0);
  std::vector<Csr> parts;
  int64_t t = 0;
  do {
    const int64_t end = std::min(T, t + kDenseTokens);
    Csr part = call.rows(t, end);
    parts.push_back(per_batch ? std::move(part) : greatest(part, k, false));
    t = end;
  } while (t < T);
  Csr whole = stacked(parts);
  return per_batch ? greatest(whole, k, true) : whole;
}

// What the upper bound of a pair must exceed to be among the k greatest: k pairs are known to exceed it.
// Lower bounds that are NaN, and those of features that the screen cannot judge, do not count.
class Floors {
 public:
  // together: the k of each of `tokens`, wherever in the batch they are.
  Floors(int64_t tokens, int64_t k, bool together)
      : wanted_(together ? tokens * k : k), together_(together), lows_(together ? 1 : tokens) {}

  // Takes lower bounds into account and gives the tokens their floors.
  void add(const std::vector<std::vector<Candidate>>& pieces, size_t begin, size_t end, ScreenCall& call) {
    const int64_t T = call.args.encode.T;
    size_t count = 0;
    for (size_t i = begin; i < end; ++i) count += pieces[i].size();
    const bool alone = together_ || count < kFewCandidates;
    const int64_t workers = alone ? 1 : std::min<int64_t>(std::max(1, at::get_num_threads()), T);
    run_workers(static_cast<int>(workers), [&](int worker) {
      const int64_t t0 = worker * T / workers, t1 = (worker + 1) * T / workers;
      for (size_t i = begin; i < end; ++i) {
        for (const Candidate& c : pieces[i]) {
          if (c.token >= t0 && c.token < t1) add(c, call.args);
        }
      }
      for (int64_t t = t0; t < t1; ++t) call.tokens.screen[t].floor = floor(t);
    });
    call.floors_changed();
  }

 private:
  void add(const Candidate& c, const ScreenArgs& args) {
    if (args.table[kStart * args.stride + c.feature] == std::numeric_limits<float>::infinity()) return;
    // strictly below the bound, since of equal values the lower feature is taken
    const float low =
        std::nextafter(static_cast<float>(c.z - c.bound), -std::numeric_limits<float>::infinity());
    if (!(low > 0.0f)) return;
    std::vector<float>& lows = lows_[together_ ? 0 : c.token];
    if (static_cast<int64_t>(lows.size()) < wanted_) {
      lows.push_back(low);
      std::push_heap(lows.begin(), lows.end(), std::greater<>());
    } else if (low > lows.front()) {
      std::pop_heap(lows.begin(), lows.end(), std::greater<>());
      lows.back() = low;
      std::push_heap(lows.begin(), lows.end(), std::greater<>());
    }
  }

  float floor(int64_t t) const {
    const std::vector<float>& lows = lows_[together_ ? 0 : t];
    return static_cast<int64_t>(lows.size()) < wanted_ ? 0.0f : lows.front();
  }

  int64_t wanted_;
  bool together_;
  std::vector<std::vector<float>> lows_;  // [T][at most k], the least in front
};

// Ranges of features in the order in which they are screened, and where a new floor is taken.
struct Pieces {
  std::vector<int64_t> starts{0};  // of the ranges, and the end of the last
  std::vector<size_t> phases{0};   // first ranges of the phases, and the end of the last

  // Ranges of `features` at most; the first phase has `seed` features, each other one ends with `growth`
  // times those that it begins with.
  Pieces(int64_t F, int64_t seed, int64_t growth, int64_t features, int64_t workers) {
    int64_t end = (seed + kChunkFeatures - 1) / kChunkFeatures * kChunkFeatures;
    for (int64_t f = 0; f < F; f = end, end *= growth) {
      if (end >= F / kLastPhase) end = F;
      int64_t step = kChunkFeatures;
      while (2 * step <= features && (end - f) / (2 * step) >= 4 * workers) step *= 2;
      for (; f < end; f += step) starts.push_back(std::min(end, f + step));
      phases.push_back(starts.size() - 1);
    }
  }
  size_t size() const { return starts.size() - 1; }
};

// Removes the candidates that cannot be among the k greatest.
void thin(std::vector<Candidate>& pairs, const ScreenArgs& args) {
  const auto below = [&](const Candidate& c) {
    const bool judged =
        args.table[kStart * args.stride + c.feature] != std::numeric_limits<float>::infinity();
    return judged && c.z + c.bound <= args.tokens[c.token].floor;
  };
  pairs.erase(std::remove_if(pairs.begin(), pairs.end(), below), pairs.end());
}

// The pairs of a call that may be among the k greatest, in full precision.
Csr ranked(ScreenCall& call, int64_t k, Floors& floors, int64_t tokens, std::vector<ScreenStats>& counts) {
  const int workers = static_cast<int>(counts.size());
  const Pieces pieces(tokens == 0 ? 0 : call.args.encode.F, kSeed * k, growth(call.args), call.features,
                      workers);
  std::vector<std::vector<Candidate>> waiting(pieces.size());
  std::vector<CandidateBuffer> space(workers);
  for (size_t phase = 0; phase + 1 < pieces.phases.size(); ++phase) {
    const size_t begin = pieces.phases[phase], end = pieces.phases[phase + 1];
    const auto screen = [&](int worker, int64_t i) {
      const int64_t* range = &pieces.starts[begin + i];
      const CandidateSpan pairs = call.screen(range[0], range[1], space[worker].sink, counts[worker]);
      waiting[begin + i].assign(pairs.begin, pairs.end);
    };
    const int64_t size = pieces.starts[end] - pieces.starts[begin], count = static_cast<int64_t>(end - begin);
    if (size * call.args.encode.T <= kFewScreened) {
      run_chunks_here(count, screen);
    } else {
      run_chunks(count, screen);
    }
    floors.add(waiting, begin, end, call);
  }
  HitCollector hits(workers, static_cast<int64_t>(pieces.size()));
  size_t left = 0;
  for (std::vector<Candidate>& pairs : waiting) {
    thin(pairs, call.args);
    left += pairs.size();
    if (call.args.mapped) call.announce({pairs.data(), pairs.data() + pairs.size()});
  }
  const auto refine = [&](int worker, int64_t i) {
    const std::vector<Candidate>& pairs = waiting[i];
    const CandidateSpan span{pairs.data(), pairs.data() + pairs.size()};
    hits.fill(worker, i, [&](HitSink& sink) {
      call.finish(pieces.starts[i], pieces.starts[i + 1], span, counts[worker], sink);
    });
  };
  if (left <= kFewRefined && !call.rest.T) {
    run_chunks_here(static_cast<int64_t>(pieces.size()), refine);
  } else {
    run_chunks(static_cast<int64_t>(pieces.size()), refine);
  }
  return hits.to_csr(tokens);
}

Screened encode_topk_screened_cpu(const at::Tensor& x, const at::Tensor& W_enc, const at::Tensor& b_enc,
                                  int64_t k, const at::Tensor& code, const std::optional<at::Tensor>& code2,
                                  const at::Tensor& table, const std::optional<at::Tensor>& centre,
                                  int64_t digits, const std::optional<at::Tensor>& directions, bool mapped,
                                  const std::optional<at::Tensor>& scales, bool per_batch) {
  const at::Tensor theta = no_thresholds(W_enc);
  const ScreenTensors tensors{W_enc, b_enc, theta, code, code2, table, centre, directions, scales};
  const int64_t T = x.dim() == 2 ? x.size(0) : 0, F = W_enc.size(1);
  check_k(k, F);
  const int64_t room = kMostCandidates / (static_cast<int64_t>(sizeof(Candidate)) * F) / kFewestTokens;
  const int64_t block = std::min(kMostTokens, std::max<int64_t>(1, room) * kFewestTokens);
  const int workers = std::max(1, at::get_num_threads());
  std::vector<ScreenStats> counts(workers);
  std::vector<Csr> parts;
  int64_t unscreened = 0;
  Floors whole(T, k, true);
  int64_t t = 0;
  do {
    const int64_t end = std::min(T, t + block);
    ScreenCall call(t == 0 && end == T ? x : x.slice(0, t, end), tensors,
                    {digits, std::nullopt, mapped, true});
    Floors own(call.args.encode.T, k, false);
    Csr part = ranked(call, k, per_batch ? whole : own, end - t, counts);
    parts.push_back(per_batch ? std::move(part) : greatest(part, k, false));
    unscreened += call.rest.T;
    t = end;
  } while (t < T);
  auto [crow, col, values] = per_batch ? greatest(stacked(parts), k, true) : stacked(parts);
  return {crow, col, values, stats_of(counts, unscreened)};
}

TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) {
  m.impl("encode_topk", encode_topk_cpu);
  m.impl("encode_topk_screened", encode_topk_screened_cpu);
}

}  // namespace
}  // namespace gsf
