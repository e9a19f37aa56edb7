// CUDA's execution model on the CPU, for tests: every thread of a block is a fiber (ucontext), and blocks run
// one after the other.  Shuffles, ballots and barriers stop a fiber until all that must arrive have arrived.
//
// Under ThreadSanitizer, each fiber is a separate thread for the race detector (its fiber API). Switches do
// not synchronise; only barriers order memory: sync_block() for the block, sync_warp() for the warp.
// Shuffles and ballots do not (CUDA gives no such guarantee).  Fibers run in ascending, descending or seeded
// random order, so that code which works in only one order is found.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_acquire(void* addr);
void __tsan_release(void* addr);
}
#define GSF_NO_TSAN __attribute__((no_sanitize("thread"), noinline))
#else
#define GSF_NO_TSAN __attribute__((noinline))
#endif

namespace gsf::host {

constexpr int kMaxThreads = 256;
constexpr size_t kStack = 128 * 1024;

enum class Order { ascending, descending, random };
enum class Wait { none, block, warp, shuffle, ballot, done };

struct Fiber {
  ucontext_t context;
  char* stack;
  void* tsan;
  Wait wait;
  unsigned block_turn, warp_turn;  // barriers passed so far
  uint64_t give, take[32];         // what a lane gives, and what its warp gave when all had arrived
  uint32_t votes;
};

struct Block {
  Fiber fibers[kMaxThreads];
  ucontext_t scheduler;
  void* scheduler_tsan;
  void (*body)(void*);
  void* arguments;
  int threads, current;
  int64_t number;
  Order order;
  uint64_t seed;
  // Addresses that the race detector orders by.  Barriers alternate between two: with only one, a thread that
  // leaves a barrier late would also be ordered after what others did up to their next barrier.
  char start_clock, end_clock, block_clock[2], warp_clock[kMaxThreads / 32][2];
};

inline Block& state() {
  static Block block;
  return block;
}

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "host.h: block %lld, thread %d: %s\n", static_cast<long long>(state().number),
          state().current, what);
  fflush(stderr);
  _Exit(3);
}

GSF_NO_TSAN inline int thread() { return state().current; }
GSF_NO_TSAN inline int lane() { return state().current & 31; }
GSF_NO_TSAN inline int64_t block() { return state().number; }

// Returns to the scheduler until it lets this fiber run again.
GSF_NO_TSAN inline void park(Wait wait) {
  Block& b = state();
  Fiber& f = b.fibers[b.current];
  f.wait = wait;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(b.scheduler_tsan, 1);
#endif
  swapcontext(&f.context, &b.scheduler);
}

GSF_NO_TSAN inline void sync_block() {
  Block& b = state();
  [[maybe_unused]] char* clock = &b.block_clock[b.fibers[b.current].block_turn++ % 2];
#if defined(__SANITIZE_THREAD__)
  __tsan_release(clock);
#endif
  park(Wait::block);
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(clock);
#endif
}

GSF_NO_TSAN inline void sync_warp() {
  Block& b = state();
  [[maybe_unused]] char* clock = &b.warp_clock[b.current >> 5][b.fibers[b.current].warp_turn++ % 2];
#if defined(__SANITIZE_THREAD__)
  __tsan_release(clock);
#endif
  park(Wait::warp);
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(clock);
#endif
}

template <typename V>
GSF_NO_TSAN inline V shuffle(V v, int from) {
  static_assert(sizeof(V) <= 8, "a shuffle moves at most 8 bytes");
  if (from < 0 || from > 31) fail("shuffle from a lane outside 0..31");
  union {
    uint64_t raw;
    V value;
  } word;
  word.raw = 0;
  word.value = v;
  Block& b = state();
  b.fibers[b.current].give = word.raw;
  park(Wait::shuffle);
  word.raw = b.fibers[b.current].take[from];
  return word.value;
}

GSF_NO_TSAN inline uint32_t ballot(bool p) {
  Block& b = state();
  b.fibers[b.current].give = p ? 1 : 0;
  park(Wait::ballot);
  return b.fibers[b.current].votes;
}

GSF_NO_TSAN inline void fiber_main() {
  Block& b = state();
  b.body(b.arguments);
  park(Wait::done);
  fail("a finished thread was resumed");
}

// Lets a whole group continue if all of its threads wait for the same operation.
GSF_NO_TSAN inline bool release(int first, int count, Wait what) {
  Block& b = state();
  int waiting = 0, done = 0;
  for (int i = first; i < first + count; ++i) {
    if (b.fibers[i].wait == what) ++waiting;
    if (b.fibers[i].wait == Wait::done) ++done;
  }
  if (waiting == 0) return false;
  // a block's barrier does not wait for threads that have returned; warp operations need all 32 lanes
  if (waiting + (what == Wait::block ? done : 0) < count) return false;
  uint32_t votes = 0;
  uint64_t given[32] = {};
  if (what != Wait::block) {
    for (int i = 0; i < count; ++i) {
      given[i] = b.fibers[first + i].give;
      votes |= static_cast<uint32_t>(given[i] & 1) << i;
    }
  }
  for (int i = first; i < first + count; ++i) {
    Fiber& f = b.fibers[i];
    if (f.wait != what) continue;
    f.wait = Wait::none;
    if (what == Wait::block) continue;
    f.votes = votes;
    for (int j = 0; j < 32; ++j) f.take[j] = given[j];
  }
  return true;
}

GSF_NO_TSAN inline void start_fibers() {
  Block& b = state();
  for (int i = 0; i < b.threads; ++i) {
    Fiber& f = b.fibers[i];
    if (f.stack == nullptr) {
      f.stack = static_cast<char*>(malloc(kStack));
#if defined(__SANITIZE_THREAD__)
      f.tsan = __tsan_create_fiber(0);
#endif
    }
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
    f.wait = Wait::none;
    f.block_turn = f.warp_turn = 0;
  }
}

// One turn: runs every thread that can run, in the chosen order.
GSF_NO_TSAN inline bool turn() {
  Block& b = state();
  int order[kMaxThreads];
  for (int i = 0; i < b.threads; ++i) order[i] = b.order == Order::descending ? b.threads - 1 - i : i;
  if (b.order == Order::random) {
    for (int i = b.threads - 1; i > 0; --i) {
      b.seed = b.seed * 6364136223846793005ull + 1442695040888963407ull;
      const int j = static_cast<int>((b.seed >> 33) % static_cast<uint64_t>(i + 1));
      const int kept = order[i];
      order[i] = order[j];
      order[j] = kept;
    }
  }
  bool ran = false;
  for (int i = 0; i < b.threads; ++i) {
    Fiber& f = b.fibers[order[i]];
    if (f.wait != Wait::none) continue;
    ran = true;
    b.current = order[i];
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(f.tsan, 1);
#endif
    swapcontext(&b.scheduler, &f.context);
  }
  return ran;
}

GSF_NO_TSAN inline void run_block() {
  Block& b = state();
#if defined(__SANITIZE_THREAD__)
  b.scheduler_tsan = __tsan_get_current_fiber();
  // a launch happens after everything before it
  __tsan_release(&b.start_clock);
#endif
  start_fibers();
  for (;;) {
    const bool ran = turn();
    bool freed = false, open = false;
    for (int w = 0; w < b.threads; w += 32) {
      for (Wait what : {Wait::warp, Wait::shuffle, Wait::ballot}) freed |= release(w, 32, what);
    }
    freed |= release(0, b.threads, Wait::block);
    for (int i = 0; i < b.threads; ++i) open |= b.fibers[i].wait != Wait::done;
    if (!open) break;
    if (!ran && !freed) fail("threads wait for each other: a barrier or a warp operation not reached by all");
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&b.end_clock);
#endif
}

// Runs a kernel's body (a callable without arguments) for each block of the grid, or only for the last one:
// for offsets into tensors that are too large to fill.
template <typename Fn>
void launch(int64_t blocks, int threads, Order order, uint64_t seed, bool last_alone, Fn body) {
  Block& b = state();
  b.threads = threads;
  b.order = order;
  b.seed = seed;
  struct Call {
    static void run(void* fn) {
#if defined(__SANITIZE_THREAD__)
      __tsan_acquire(&state().start_clock);
#endif
      (*static_cast<Fn*>(fn))();
#if defined(__SANITIZE_THREAD__)
      __tsan_release(&state().end_clock);
#endif
    }
  };
  b.body = Call::run;
  b.arguments = &body;
  for (int64_t i = last_alone ? blocks - 1 : 0; i < blocks; ++i) {
    b.number = i;
    run_block();
  }
}

}  // namespace gsf::host
