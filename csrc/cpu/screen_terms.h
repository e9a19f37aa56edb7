// The numbers of the screen's bound and the layout of its arrays, under the names that docs/how/screen.md
// gives them.  gemmascope_fast/ops/screen_terms.py holds the same names and numbers for Python and Triton;
// tests/ops/test_screen_terms.py reads both files and the page and compares them.
#pragma once

#include <cstdint>

namespace gsf {

// ---- rounding ----
constexpr double kU = 5.9604644775390625e-08;  // u = 2^-24, half an ulp of 1 in fp32
constexpr double kSecondOrder = 1.01;          // what (1 + u)^n and the like add to n u
constexpr double kDirectionOrder = 1.02;       // the same where a sum over directions is rounded as well
constexpr double kDotSteps = 6;                // of the deciding dot beside d/16: four folds, bias, one spare
constexpr double kTokenSteps = 7;              // the epilogue's roundings of P, into R and E
constexpr double kStartSteps = 5;              // its roundings of `start`, into beta
constexpr double kDirectionSteps = 4;          // of the products along the directions, beside k
constexpr double kUp = 1.0 + 8 * kU;           // its roundings of B itself: a factor of R, E, |w|, |e|, beta
constexpr double kSumUp = 1.0 + 1.0 / (1 << 30);      // fp64 sums of d squares err by 2^-36; roots halve that
constexpr double kCancel = 8.881784197001252e-16;     // 2^-50: what fp64 loses where e and e_r are formed
constexpr double kDotLoss = 9.1e-13;                  // above 2^-40: fp64 sums of d products
constexpr double kDirectionLoss = 2.9e-14;            // above 2^-45: fp64 sums of k products
constexpr double kUnderflow = 2.350988701644575e-38;  // 2^-125 a column: subnormal products and s t
constexpr double kDigit2 = 0.00390625;                // 2^-8: the second digit's scale is that of the first's

// ---- what skips the screen ----
constexpr double kTiny = 8.673617379884035e-19;  // 2^-60: norms outside [kTiny, kHuge] are not screened
constexpr double kHuge = 1.152921504606847e+18;  // 2^60
constexpr double kMostBias = 1e38;               // of |b| and |b'|: sums stay finite
// Scales of a given code: no row of norm kTiny has one below, no row with one above exceeds kHuge.
constexpr double kLeastGiven = kTiny / (1 << 20);  // 2^-80
constexpr double kMostGiven = kHuge / (1 << 17);   // 2^43
constexpr double kMostScale = 1 << 20;             // scales of columns are powers of two from 1 to this
constexpr int64_t kMostInputs = 66000;             // 255 * 127 * 66,000 < 2^31: integer dots fit 32 bits
constexpr int64_t kMostDirections = 128;           // kDirectionLoss counts so many

// ---- layout ----
// Per-feature numbers, rows of one fp32 table [kScreenRows + k][stride]; stride is table_stride(F).  What
// the columns past F hold is never read as a feature: kernels mask them.
enum ScreenRow : int {
  kScale = 0,    // s of the first digit: the row is about s (code - zero)
  kZero,         // its zero point, an integer in [0, 255]
  kError,        // |e|, rounded up
  kNorm,         // |w|, or |p| of its products with the directions where that is more, rounded up
  kCentredBias,  // b' = b + w . mu
  kSlack,        // beta
  kStart,        // b' + beta - max(threshold, 0), rounded up; +inf: never discarded
  kScale2,       // s2 of the second digit: e is about s2 (code2 - 128)
  kError2,       // |e2|, rounded up
  kScreenRows    // and after these the row times each of the k directions
};

// Per-token numbers, planes of an fp32 array that the first stage loads from (ScreenArgs::lanes,
// packed_lanes).
enum TokenPlane : int {
  kUnit = 0,       // what an integer dot is multiplied by beside s: t, or t / 256 with both digits
  kReach,          // R
  kTokenError,     // E
  kFloor,          // what a pair's upper bound must exceed: 0, or of a top-k what k others are known to reach
  kDigitSum,       // of the first digits, as int32
  kTokenPlanes,    // and after these, in ScreenArgs::lanes, the coefficients along the k directions
  kDigitSum2 = 5,  // of the second digits, in packed_lanes
  kPackedPlanes    // and after these its coefficients
};

// Codes and digits lie in tiles of four rows, 64 columns of each in turn, so that a tile is one stream:
// [rows/4][width/64][4][64], width being d rounded up to 64.
constexpr int64_t kTileRows = 4;
constexpr int64_t kTileColumns = 64;
constexpr int64_t kTileStep = kTileRows * kTileColumns;
static_assert(kTileStep == 256, "four cache lines a step");
constexpr int64_t kTableLine = 16;  // columns of the table in a cache line

// Columns of the table, an odd number of cache lines: its rows, of which the kernel reads a line each at
// once, would else lie in one set of the first cache (65,536 bytes apart for 16,384 features).
constexpr int64_t table_stride(int64_t F) { return ((F + kTableLine - 1) / kTableLine | 1) * kTableLine; }

// ---- the terms that depend on a size ----
// kappa: the relative bound of the deciding dot.
constexpr double dot_kappa(int64_t d) {
  return kSecondOrder * (static_cast<double>((d + 15) / 16) + kDotSteps) * kU;
}

// k fused steps of the epilogue, each a rounding of what is summed so far.
constexpr double direction_steps(int64_t k) { return kDirectionOrder * static_cast<double>(k) * kU; }

// What R and E gain of R^ = |r1^| + |r2^|.
constexpr double token_steps(int64_t k) { return kTokenSteps * kU + direction_steps(k); }

// What beta gains of |b'| + tau, and `start` of |edge| where a bandwidth moves the edge.
constexpr double start_steps(int64_t k) { return kStartSteps * kU + direction_steps(k); }

// What E gains of |c|: the products p_j as rounded, and their steps in the epilogue.
constexpr double coefficient_steps(int64_t k, double frobenius) {
  return kDirectionOrder * (static_cast<double>(k) + kDirectionSteps) * kU + kDotLoss * frobenius;
}

}  // namespace gsf
