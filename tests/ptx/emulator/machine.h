// One launch: blocks one after the other, the warps of a block in turns of random length.
#pragma once

#include <bit>
#include <cstring>
#include <deque>
#include <random>

#include "memory.h"
#include "program.h"

namespace ptx {

constexpr uint64_t kSharedBase = 1ull << 44, kLocalBase = 1ull << 45;  // of generic addresses
constexpr uint32_t kAll = 0xFFFFFFFFu;

struct Copy {  // of cp.async, on its way
  uint64_t to;
  int bytes;
  uint8_t data[16];
};

struct Copies {  // of one lane: not yet committed, and the groups in the order in which they were
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

// Products of a warpgroup that nobody has waited for: what they read, and the slots that they will write.
struct Products {
  std::vector<std::pair<uint64_t, int>> reads;
  std::vector<int> slots;
};

struct Warp {
  int number = 0;
  uint32_t live = 0;  // lanes that have not returned
  int pc = 0;         // of all live lanes, where they are together
  bool together = true;
  int lane_pc[32] = {};
  bool waits = false;    // at the barrier of the block
  uint32_t sync = 0;     // own barriers so far
  uint32_t fence = 0;    // when the warp last made its writes visible to the asynchronous proxy
  bool arranged = false; // wgmma.fence since another instruction touched registers of accumulators
  std::vector<uint64_t> registers;  // [slot][lane]
  std::vector<Copies> copies;       // of each lane
  Products open_products;
  std::deque<Products> products;
  std::vector<std::vector<uint8_t>> local;

  uint64_t* slot(int s) { return registers.data() + static_cast<size_t>(s) * 32; }
};

struct Launch {
  uint32_t blocks = 1;
  int threads = 32;
  uint64_t dynamic_shared = 0;
  uint64_t seed = 1;
  bool last_block_alone = false;
  bool races = true, count = false;
  std::vector<uint8_t> parameters;
};

struct Machine {
  Program& program;
  const Launch& launch;
  Global global;
  Shared shared;
  std::vector<Warp> warps;
  uint32_t block = 0, epoch = 0, block_start = 0, order = 0;
  uint64_t steps = 0;
  std::mt19937_64 random;
  Instruction* now = nullptr;

  Machine(Program& p, const Launch& l, std::vector<Allocation> allocations)
      : program(p), launch(l), global(std::move(allocations)), random(l.seed) {}
  void run();

  void load(Warp& w, int lane, Space space, uint64_t at, int bytes, uint8_t* out);
  void store(Warp& w, int lane, Space space, uint64_t at, int bytes, const uint8_t* in);
  // Shared memory for a whole warp's matrix instruction.
  void load_shared(Warp& w, uint32_t lanes, uint64_t at, int bytes, uint8_t* out);
  // may_repeat: to write what is there already is no race
  void store_shared(Warp& w, uint32_t lanes, uint64_t at, int bytes, const uint8_t* in, bool may_repeat = true);
  void start_copy(Warp& w, int lane, uint64_t to, uint64_t from, int bytes, int source_bytes);
  void finish_copies(Warp& w, int lane, size_t keep);
  [[noreturn]] void fault(const std::string& what, const Warp& w, int lane) const;
  void count_global(Instruction& in, const uint64_t* at, uint32_t mask, int bytes) const;
  void count_shared(Instruction& in, const uint64_t* at, uint32_t mask, int bytes) const;
  Moment moment(const Warp& w, uint32_t lanes) { return {epoch, w.sync, lanes, w.number, ++order}; }

 private:
  void start_block(uint32_t number);
  void run_block();
  bool step(Warp& w);  // false where the warp waits or has ended
  void branch(Warp& w, Instruction& in, uint32_t mask);
  void report(Shadow::Finding found, const std::string& verb, const std::string& what, const Warp& w, int lane) const;
  void check_products(const Warp& w) const;
  Space resolve(Space space, uint64_t& at) const;
};

template <class T>
T get(uint64_t v) {
  T out;
  memcpy(&out, &v, sizeof(T));
  return out;
}

template <class T>
uint64_t raw(T v) {
  uint64_t out = 0;
  memcpy(&out, &v, sizeof(T));
  return out;
}

template <class F>
inline void each(uint32_t mask, F f) {
  if (mask == kAll) {
    for (int l = 0; l < 32; ++l) f(l);
  } else {
    for (uint32_t left = mask; left != 0; left &= left - 1) f(std::countr_zero(left));
  }
}

// The slot of operand i, which must be a plain one.
inline uint64_t* plain(Warp& w, const Instruction& in, size_t i) {
  if (i >= in.operands.size() || in.operands[i].kind != Operand::value) in.unknown();
  return w.slot(in.operands[i].slot);
}

inline bool predicate(Warp& w, const Operand& o, int lane) {
  return ((w.slot(o.slot)[lane] & 1) != 0) != o.negated;
}

}  // namespace ptx
