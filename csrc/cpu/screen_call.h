// One call of an op that screens: its arguments checked, its tokens rounded to digits, and the arrays that
// the kernels point into.
#pragma once

#include <optional>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/screen_checks.h"

namespace gsf {

// What a screen keeps, and the weights that it is of: the arguments that both ops have in common.
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

// How a call is made; none of it changes an answer.
struct ScreenChoices {
  int64_t digits = 0;  // of the activations in the first stage, 1 or 2; 0: as it pays
  std::optional<double> bandwidth;
  bool mapped = false;
  bool ranked = false;  // the tokens' floors decide beside the thresholds
};

// Tokens as the screen reads them.
struct ScreenedTokens {
  at::Tensor x;                     // [T][d] of the tokens that are screened
  at::Tensor digits;                // as ScreenArgs::q1 says, and after it q2
  std::vector<ScreenToken> screen;  // [T]
  std::vector<float> along;         // [T][k]
  int64_t k = 0;
  std::vector<int32_t> ids;       // [T]; empty where all are screened
  at::Tensor rest;                // [R][d] of the others
  std::vector<int32_t> rest_ids;  // [R]
};

class ScreenCall {
 public:
  ScreenCall(const at::Tensor& x, const ScreenTensors&, const ScreenChoices&);
  ScreenCall(const ScreenCall&) = delete;
  ScreenCall& operator=(const ScreenCall&) = delete;

  // The arrays that the kernels load floors from, after `tokens.screen` was given others.
  void floors_changed();
  // The pairs of features [f0, f1), kMostChunk at most, that the screen leaves, in `space`.
  CandidateSpan screen(int64_t f0, int64_t f1, CandidateSink& space, ScreenStats& stats) const;
  // They and all pairs of the tokens that are not screened, in full precision.
  void finish(int64_t f0, int64_t f1, CandidateSpan pairs, ScreenStats& stats, HitSink& sink) const;
  // The pairs' rows, in a mapped file, are on their way when this returns.
  void announce(CandidateSpan pairs) const;
  // int64 [4]: pairs left by the first stage, pairs refined, refined pairs outside their bound, tokens not
  // screened.
  at::Tensor stats(const std::vector<ScreenStats>& counts) const;

  ScreenedTokens tokens;
  ScreenArgs args{};
  EncodeArgs rest{};  // of the tokens that are not screened
  int64_t features;   // of a chunk, as it pays

 private:
  struct Packed {  // the tokens' digits and numbers with a token a lane
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

}  // namespace gsf
