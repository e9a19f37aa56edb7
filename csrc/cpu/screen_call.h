// One call of an op that uses the screen: its checked arguments, its tokens rounded to digits, and the arrays
// that the kernels point to.
#pragma once

#include <optional>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/screen_checks.h"

namespace gsf {

// The tensors of a screen and the weights that it was built from: the arguments that both ops share.
struct ScreenTensors {
  const at::Tensor& W_enc;      // [d_in, d_sae]
  const at::Tensor& b_enc;      // [d_sae]
  const at::Tensor& threshold;  // [d_sae]
  const at::Tensor& code;
  const std::optional<at::Tensor>& code2;
  const at::Tensor& table;
  const std::optional<at::Tensor>& centre;
  const std::optional<at::Tensor>& directions;
  const std::optional<at::Tensor>& scales;
};

// Options of a call; none of them changes a result.
struct ScreenChoices {
  int64_t digits = 0;  // of the activations in the first stage, 1 or 2; 0: choose what is faster
  std::optional<double> bandwidth;
  bool mapped = false;
  bool ranked = false;  // use the tokens' floors in addition to the thresholds
};

// Tokens in the form that the screen reads.
struct ScreenedTokens {
  at::Tensor x;                     // [T][d] of the tokens that are screened
  at::Tensor digits;                // as ScreenArgs::q1 says, and after it q2
  std::vector<ScreenToken> screen;  // [T]
  std::vector<float> along;         // [T][k]
  int64_t k = 0;
  std::vector<int32_t> ids;       // [T]; empty if all are screened
  at::Tensor rest;                // [R][d] of the others
  std::vector<int32_t> rest_ids;  // [R]
};

class ScreenCall {
 public:
  ScreenCall(const at::Tensor& x, const ScreenTensors&, const ScreenChoices&);
  ScreenCall(const ScreenCall&) = delete;
  ScreenCall& operator=(const ScreenCall&) = delete;

  // Updates the arrays that kernels load floors from, after `tokens.screen` got new ones.
  void floors_changed();
  // The pairs of features [f0, f1), kMostChunk at most, that the screen leaves; stored in `space`.
  CandidateSpan screen(int64_t f0, int64_t f1, CandidateSink& space, ScreenStats& stats) const;
  // These pairs, and all pairs of the tokens that are not screened, in full precision.
  void finish(int64_t f0, int64_t f1, CandidateSpan pairs, ScreenStats& stats, HitSink& sink) const;
  // Starts to prefetch the pairs' rows in a mapped file.
  void announce(CandidateSpan pairs) const;

  ScreenedTokens tokens;
  ScreenArgs args{};
  EncodeArgs rest{};  // for the tokens that are not screened
  int64_t features;   // per chunk, chosen for speed

 private:
  struct Packed {  // the tokens' digits and values with one token per lane
    at::Tensor digits;
    std::vector<float> lanes;
  };
  void pack();

  const Kernels& kernel_;
  at::Tensor bias_, theta_, table_;
  Rows rows_;
  std::vector<float> lanes_;
  Packed packed_;
};

// int64 [4]: pairs left by the first stage, pairs computed exactly, those outside their bound, tokens not
// screened.
at::Tensor stats_of(const std::vector<ScreenStats>& counts, int64_t unscreened);

}  // namespace gsf
