// Threads and growing buffers for the drivers in ops_*.cpp.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "cpu/kernels.h"

namespace gsf {

// Subnormals must be kept: FTZ and DAZ are set per thread, so every worker clears and restores them.
class SubnormalsOn {
 public:
#if defined(__x86_64__)
  SubnormalsOn() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }
  ~SubnormalsOn() { _mm_setcsr(saved_); }
#else
  SubnormalsOn() = default;
  ~SubnormalsOn() = default;
#endif
  SubnormalsOn(const SubnormalsOn&) = delete;
  SubnormalsOn& operator=(const SubnormalsOn&) = delete;

 private:
  unsigned saved_ = 0;
};

// Calls fn(worker) once on each of `workers` threads of torch's pool (with fewer threads inside another
// parallel region: then one thread runs several workers in turn).
template <typename Fn>
void run_workers(int workers, const Fn& fn) {
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    SubnormalsOn guard;
    for (int64_t w = begin; w < end; ++w) fn(static_cast<int>(w));
  });
}

// Workers take chunk numbers until none is left, because the cores of a shared machine are not equally fast.
template <typename Fn>
void run_chunks(int64_t chunks, const Fn& fn) {
  const int workers = static_cast<int>(std::min<int64_t>(at::get_num_threads(), chunks));
  if (workers <= 0) return;
  std::atomic<int64_t> next{0};
  run_workers(workers, [&](int worker) {
    for (int64_t c; (c = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) fn(worker, c);
  });
}

// The same on the calling thread, for work that is done sooner than other threads would have begun.
template <typename Fn>
void run_chunks_here(int64_t chunks, const Fn& fn) {
  SubnormalsOn guard;
  for (int64_t c = 0; c < chunks; ++c) fn(0, c);
}

// A growing array behind a HitSink or a CandidateSink.
template <typename Sink>
class SinkBuffer {
 public:
  SinkBuffer() {
    sink.owner = this;
    sink.grow = [](Sink& s, size_t n) { static_cast<SinkBuffer*>(s.owner)->enlarge(n); };
  }
  ~SinkBuffer() { std::free(sink.begin); }
  SinkBuffer(const SinkBuffer&) = delete;
  SinkBuffer& operator=(const SinkBuffer&) = delete;

  size_t size() const { return static_cast<size_t>(sink.at - sink.begin); }

  Sink sink;

 private:
  using Record = std::remove_pointer_t<decltype(Sink::at)>;

  void enlarge(size_t n) {
    const size_t used = size();
    size_t capacity = std::max<size_t>(1024, 2 * static_cast<size_t>(sink.end - sink.begin));
    while (capacity < used + n) capacity *= 2;
    Record* grown = static_cast<Record*>(std::realloc(sink.begin, capacity * sizeof(Record)));
    if (grown == nullptr) throw std::bad_alloc();
    sink.begin = grown;
    sink.at = grown + used;
    sink.end = grown + capacity;
  }
};

using HitBuffer = SinkBuffer<HitSink>;
using CandidateBuffer = SinkBuffer<CandidateSink>;

}  // namespace gsf
