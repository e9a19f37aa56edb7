// Constants of the screen's error bound and the layout of its arrays, with the names used in
// docs/how/screen.md. gemmascope_fast/ops/screen_terms.py has the same names and numbers for Python and
// Triton; tests/ops/test_screen_terms.py reads both files and the page and compares them.
#pragma once

#include <cstdint>

namespace gsf {

// ---- rounding ----
constexpr double kU = 5.9604644775390625e-08;  // u = 2^-24, half an ulp of 1 in fp32
constexpr double kSecondOrder = 1.01;          // covers terms of second order, as in (1 + u)^n beyond n u
constexpr double kDirectionOrder = 1.02;       // the same if a sum over directions is rounded too
constexpr double kDotSteps = 6;        // of the exact dot in addition to d/16: four folds, bias, one spare
constexpr double kTokenSteps = 7;      // roundings of P in the epilogue; part of R and E
constexpr double kStartSteps = 5;      // roundings of `start` in the epilogue; part of beta
constexpr double kDirectionSteps = 4;  // of the products along the directions, in addition to k
constexpr double kUp = 1.0 + 8 * kU;   // roundings of B itself: a factor of R, E, |w|, |e|, beta
constexpr double kSumUp = 1.0 + 1.0 / (1 << 30);   // error of fp64 sums of d squares: 2^-36; roots halve it
constexpr double kCancel = 8.881784197001252e-16;  // 2^-50: error of fp64 when e and e_r are computed
constexpr double kDotLoss = 9.1e-13;               // above 2^-40: fp64 sums of d products
constexpr double kDirectionLoss = 2.9e-14;         // above 2^-45: fp64 sums of k products
constexpr double kUnderflow = 2.350988701644575e-38;  // 2^-125 per column: subnormal products and s t
constexpr double kDigit2 = 0.00390625;                // 2^-8: scale of the second digit relative to the first

// ---- what is not screened ----
constexpr double kTiny = 8.673617379884035e-19;  // 2^-60: norms outside [kTiny, kHuge] are not screened
constexpr double kHuge = 1.152921504606847e+18;  // 2^60
constexpr double kMostBias = 1e38;               // limit of |b| and |b'|: sums stay finite
// Scales of a given code: a row of norm kTiny has none below, a row with one above would exceed kHuge.
constexpr double kLeastGiven = kTiny / (1 << 20);  // 2^-80
constexpr double kMostGiven = kHuge / (1 << 17);   // 2^43
constexpr double kMostScale = 1 << 20;             // scales of columns are powers of two from 1 to this
constexpr int64_t kMostInputs = 66000;             // 255 * 127 * 66,000 < 2^31: integer dots fit 32 bits
constexpr int64_t kMostDirections = 128;           // kDirectionLoss allows for this many

// ---- layout ----
// Per-feature numbers, rows of one fp32 table [kScreenRows + k][stride]; stride is table_stride(F).  The
// columns past F are never used as features: kernels mask them.
enum ScreenRow : int {
  kScale = 0,    // s of the first digit: the row is about s (code - zero)
  kZero,         // its zero point, an integer in [0, 255]
  kError,        // |e|, rounded up
  kNorm,         // |w|, or |p| of its products with the directions if that is larger, rounded up
  kCentredBias,  // b' = b + w . mu
  kSlack,        // beta
  kStart,        // b' + beta - max(threshold, 0), rounded up; +inf: never discarded
  kScale2,       // s2 of the second digit: e is about s2 (code2 - 128)
  kError2,       // |e2|, rounded up
  kScreenRows    // followed by the row's products with the k directions
};

// Per-token numbers, planes of an fp32 array that the first stage loads from (ScreenArgs::lanes,
// packed_lanes).
enum TokenPlane : int {
  kUnit = 0,       // factor of an integer dot in addition to s: t, or t / 256 with both digits
  kReach,          // R
  kTokenError,     // E
  kFloor,          // what an upper bound must exceed: 0, or for top-k what k others are known to reach
  kDigitSum,       // of the first digits, as int32
  kTokenPlanes,    // followed, in ScreenArgs::lanes, by the coefficients along the k directions
  kDigitSum2 = 5,  // of the second digits, in packed_lanes
  kPackedPlanes    // followed by its coefficients
};

// Codes and digits are stored in tiles of four rows, 64 columns of each in turn, so that a tile is one
// stream: [rows/4][width/64][4][64], where width is d rounded up to 64.
constexpr int64_t kTileRows = 4;
constexpr int64_t kTileColumns = 64;
constexpr int64_t kTileStep = kTileRows * kTileColumns;
static_assert(kTileStep == 256, "four cache lines a step");
constexpr int64_t kTableLine = 16;  // columns of the table in a cache line

// Columns of the table, an odd number of cache lines. The kernel reads one line of each row at the same time;
// otherwise these would be in one set of the L1 cache (65,536 bytes apart for 16,384 features).
constexpr int64_t table_stride(int64_t F) { return ((F + kTableLine - 1) / kTableLine | 1) * kTableLine; }

// ---- the terms that depend on a size ----
// kappa: the relative error bound of the exact dot.
constexpr double dot_kappa(int64_t d) {
  return kSecondOrder * (static_cast<double>((d + 15) / 16) + kDotSteps) * kU;
}

// Relative error of k fused steps of the epilogue; each rounds the sum so far.
constexpr double direction_steps(int64_t k) { return kDirectionOrder * static_cast<double>(k) * kU; }

// What is added to R and E, relative to R^ = |r1^| + |r2^|.
constexpr double token_steps(int64_t k) { return kTokenSteps * kU + direction_steps(k); }

// What is added to beta, relative to |b'| + tau, and to `start`, relative to |edge|, if a bandwidth moves it.
constexpr double start_steps(int64_t k) { return kStartSteps * kU + direction_steps(k); }

// What is added to E, relative to |c|: rounding of the products p_j, and their steps in the epilogue.
constexpr double coefficient_steps(int64_t k, double frobenius) {
  return kDirectionOrder * (static_cast<double>(k) + kDirectionSteps) * kU + kDotLoss * frobenius;
}

}  // namespace gsf
