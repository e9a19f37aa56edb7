// Hints to the OS about memory. None of them changes a result.
#pragma once

#include <cstddef>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace gsf {

// Large pages for memory that is read as a stream: with 4 KiB pages a stream of 37 MB misses the TLB 9,000
// times, and under a hypervisor each miss walks two page tables.  Measured: 40 instead of 27 GB/s.  Asks for
// large pages in the part of [p, p + bytes) that has whole ones, and to collapse pages already touched.
inline void advise_large_pages(void* p, size_t bytes) {
#if defined(__linux__)
  constexpr size_t kLarge = size_t{2} << 20;
  const size_t begin = (reinterpret_cast<size_t>(p) + kLarge - 1) / kLarge * kLarge;
  const size_t end = (reinterpret_cast<size_t>(p) + bytes) / kLarge * kLarge;
  if (begin >= end) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  constexpr int kCollapse =
      25;  // MADV_COLLAPSE, Linux 6.1; older headers lack the name, older kernels refuse it
  madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
#else
  (void)p, (void)bytes;
#endif
}

// Prefetches pages of a mapped file that are read next, so that the disk gets many requests at once.
// Otherwise each page fault waits alone and also reads neighbouring pages.  Ranges come by ascending address;
// ranges with adjacent pages are merged into one call.
class PageAnnouncer {
 public:
  PageAnnouncer() = default;
  ~PageAnnouncer() { flush(); }
  PageAnnouncer(const PageAnnouncer&) = delete;
  PageAnnouncer& operator=(const PageAnnouncer&) = delete;

  void range(const void* p, size_t bytes) {
#if defined(__linux__)
    static const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t begin = reinterpret_cast<size_t>(p) / page * page;
    if (begin > end_) flush(), begin_ = begin;
    end_ = (reinterpret_cast<size_t>(p) + bytes + page - 1) / page * page;
#else
    (void)p, (void)bytes;
#endif
  }

 private:
  void flush() {
#if defined(__linux__)
    if (begin_ < end_) madvise(reinterpret_cast<void*>(begin_), end_ - begin_, MADV_WILLNEED);
#endif
  }
  size_t begin_ = 0, end_ = 0;
};

}  // namespace gsf
