#include "cpu/measure_roof.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <memory>

#include "cpu/parallel.h"

namespace gsf {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// `work` units per worker and pass, on all threads at the same time.
template <typename Fn>
std::vector<double> rates(int passes, double work, const Fn& fn) {
  TORCH_CHECK_VALUE(passes > 0, "passes: expected a positive number, got ", passes);
  const int workers = at::get_num_threads();
  std::vector<double> out;
  for (int pass = 0; pass < passes; ++pass) {
    const Clock::time_point start = Clock::now();
    run_workers(workers, fn);
    out.push_back(work * workers / seconds_since(start));
  }
  return out;
}

// A step takes at most 12 cycles on any core with this level: a pass takes some milliseconds, much longer
// than starting the threads and shorter than another process's time slice.  4 products of 1 over 2^20 steps
// fit int32.
constexpr int64_t kSteps = int64_t{1} << 20;

// The result that a loop must have: if the compiler removed work from it, this is an error, not a higher
// roof.
template <typename T>
void check(T got, T expected, const char* loop) {
  TORCH_CHECK(got == expected, loop, ": expected the loop to answer ", expected, ", got ", got);
}

}  // namespace

std::vector<double> roof_read_rates(int64_t bytes, int passes) {
  const int workers = at::get_num_threads();
  const int64_t share = bytes / workers / 512 * 512;
  TORCH_CHECK_VALUE(share > 0, "bytes: expected at least 512 a thread, got ", bytes);
  // 64 bytes of slack to align; each worker writes its own share first, so that its pages are close to it
  std::unique_ptr<uint8_t[]> memory(new uint8_t[static_cast<size_t>(share * workers + 64)]);
  uint8_t* base = memory.get() + (-reinterpret_cast<uintptr_t>(memory.get()) & 63);
  const auto loop = kernels().roof.read;
  run_workers(workers, [&](int w) {
    uint32_t* words = reinterpret_cast<uint32_t*>(base + w * share);
    std::fill(words, words + share / 4, 1u);
  });
  return rates(passes, static_cast<double>(share), [&](int w) {
    check<uint64_t>(loop(base + w * share, share), static_cast<uint64_t>(share / 4), "roof_read");
  });
}

std::vector<double> roof_fma_rates(int passes) {
  const RoofLoops& roof = kernels().roof;
  const std::vector<float> zeros(static_cast<size_t>(roof.fma_a_step));
  // v = v/2 + 1 from 0 is at its fixed point 2 after 25 steps
  const float answer = 2.0f * static_cast<float>(roof.fma_a_step);
  return rates(passes, 2.0 * roof.fma_a_step * kSteps,
               [&](int) { check<float>(roof.fma(kSteps, zeros.data()), answer, "roof_fma"); });
}

std::vector<double> roof_int8_rates(int passes) {
  const RoofLoops& roof = kernels().roof;
  const std::vector<float> zeros(static_cast<size_t>(roof.fma_a_step));
  const int64_t answer = roof.int8_a_step * kSteps;
  return rates(passes, 2.0 * roof.int8_a_step * kSteps,
               [&](int) { check<int64_t>(roof.int8(kSteps, zeros.data()), answer, "roof_int8"); });
}

}  // namespace gsf
