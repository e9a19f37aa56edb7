// Global and shared memory with what a device does not keep: bounds, what was written, and who touched what when.
//
// Two accesses to a byte, one of them a write, must be ordered: by the barrier of the block, or within a warp by its
// own barrier.  Shuffles and votes order nothing.  Accesses of different blocks are never ordered.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "program.h"

namespace ptx {

// When an access happened.  `epoch` counts the barriers of all blocks of a launch, `sync` those of the warp alone.
struct Moment {
  uint32_t epoch = 0, sync = 0, lanes = 0;
  int32_t warp = 0;  // kSeveral: of several warps
  uint32_t order = 0;
};
constexpr int32_t kSeveral = -1;

struct Record {
  Moment write, read;
  bool other_block_read = false;
};

// What is known of each byte, in pages that appear when they are first touched.  A page keeps one record for four bytes
// until an access is smaller than that.
class Shadow {
 public:
  // Epochs below `block_start` are those of other blocks.
  enum class Finding { none, race, other_block };
  Finding read(uint64_t at, int bytes, const Moment& now, uint32_t block_start);
  // same: the bytes already hold what is written, which harms nobody
  Finding write(uint64_t at, int bytes, const Moment& now, uint32_t block_start, bool same);
  const Moment& last_write(uint64_t at);
  void clear() { pages_.clear(), last_number_ = ~0ull; }

 private:
  static constexpr uint64_t kPage = 1024;
  struct Page {
    int unit = 4;
    std::vector<Record> records;
  };
  Page& page(uint64_t number);
  static void refine(Page& page);
  static bool ordered(const Moment& before, const Moment& now);
  template <class F>
  Finding visit(uint64_t at, int bytes, F f);

  std::unordered_map<uint64_t, std::unique_ptr<Page>> pages_;
  uint64_t last_number_ = ~0ull;
  Page* last_ = nullptr;
};

struct Allocation {
  uint64_t base, size;
  std::string name;
  Shadow shadow;
};

class Global {
 public:
  explicit Global(std::vector<Allocation> allocations);
  // The allocation that holds all of [at, at + bytes), null where there is none.
  Allocation* find(uint64_t at, int bytes);
  std::string near(uint64_t at) const;

 private:
  std::vector<Allocation> allocations_;  // ascending, disjoint
  Allocation* last_ = nullptr;
};

enum class Content : uint8_t { unwritten, written, arriving };  // arriving: a copy that nobody has waited for

struct Shared {
  std::vector<uint8_t> bytes;
  std::vector<Content> content;
  Shadow shadow;
  void start(uint64_t size);
};

}  // namespace ptx
