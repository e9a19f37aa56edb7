#include "machine.h"

#include <algorithm>
#include <numeric>

namespace ptx {

void Machine::fault(const std::string& what, const Warp& w, int lane) const {
  throw Fault(what + ", block " + std::to_string(block) + ", thread " + std::to_string(w.number * 32 + lane) + ": " +
              (now ? now->text : ""));
}

void Machine::run() {
  std::vector<uint32_t> numbers(launch.blocks);
  std::iota(numbers.begin(), numbers.end(), 0u);
  if (launch.last_block_alone) numbers = {launch.blocks - 1};
  std::shuffle(numbers.begin(), numbers.end(), random);
  for (uint32_t number : numbers) {
    start_block(number);
    run_block();
  }
}

void Machine::start_block(uint32_t number) {
  block = number;
  block_start = ++epoch;
  shared.start(program.dynamic_at + launch.dynamic_shared);
  warps.resize(static_cast<size_t>((launch.threads + 31) / 32));
  for (size_t i = 0; i < warps.size(); ++i) {
    Warp& w = warps[i];
    const int lanes = std::min(32, launch.threads - static_cast<int>(i) * 32);
    w.number = static_cast<int>(i);
    w.live = lanes == 32 ? kAll : (1u << lanes) - 1;
    w.pc = 0, w.together = true, w.waits = false, w.fence = 0, w.arranged = false;
    w.registers.assign(static_cast<size_t>(program.slots) * 32, 0xDEADBEEFDEADBEEFull);
    w.copies.assign(32, {});
    w.open_products = {}, w.products.clear();
    w.local.assign(program.local_bytes ? 32 : 0, std::vector<uint8_t>(program.local_bytes, 0xA5));
    for (int l = 0; l < 32; ++l) {
      w.slot(tid_x)[l] = i * 32 + static_cast<uint64_t>(l);
      w.slot(ntid_x)[l] = static_cast<uint64_t>(launch.threads);
      w.slot(ctaid_x)[l] = number;
      w.slot(nctaid_x)[l] = launch.blocks;
      w.slot(laneid)[l] = static_cast<uint64_t>(l);
      w.slot(warpid)[l] = i;
      w.slot(zero_slot)[l] = 0;
      w.slot(one_slot)[l] = 1;
      for (const auto& [slot, v] : program.constants) w.slot(slot)[l] = v;
    }
  }
}

void Machine::run_block() {
  std::vector<Warp*> ready;
  for (;;) {
    ready.clear();
    bool open = false;
    for (Warp& w : warps) {
      open |= w.live != 0;
      if (w.live != 0 && !w.waits) ready.push_back(&w);
    }
    if (!open) return;
    if (ready.empty()) {  // all that are left have reached the barrier
      for (Warp& w : warps) w.waits = false;
      ++epoch;
      continue;
    }
    Warp& w = *ready[random() % ready.size()];
    for (uint64_t left = 1 + random() % 400; left > 0 && step(w); --left) {
    }
  }
}

bool Machine::step(Warp& w) {
  if (w.live == 0) return false;
  if (++steps > 4'000'000'000ull) fault("the kernel does not end", w, 0);
  uint32_t lanes = w.live;
  int pc = w.pc;
  if (!w.together) {  // those furthest behind go on, so that the others can be caught up with
    pc = INT32_MAX;
    each(w.live, [&](int l) { pc = std::min(pc, w.lane_pc[l]); });
    lanes = 0;
    each(w.live, [&](int l) { lanes |= w.lane_pc[l] == pc ? 1u << l : 0; });
    if (lanes == w.live) w.together = true, w.pc = pc;
  }
  if (pc >= static_cast<int>(program.code.size())) {
    w.live &= ~lanes;
    return w.live != 0;
  }
  Instruction& in = program.code[static_cast<size_t>(pc)];
  now = &in;
  uint32_t mask = lanes;
  if (in.guard >= 0) {
    const uint64_t* p = w.slot(in.guard);
    const uint64_t want = in.guard_negated ? 0 : 1;
    mask = 0;
    each(lanes, [&](int l) { mask |= (p[l] & 1) == want ? 1u << l : 0; });
  }
  ++in.counts.warps;
  in.counts.lanes += static_cast<uint64_t>(std::popcount(mask));
  if (!w.products.empty() || !w.open_products.slots.empty()) check_products(w);
  if (w.together) {
    w.pc = pc + 1;
  } else {
    each(lanes, [&](int l) { w.lane_pc[l] = pc + 1; });
  }
  const std::string& word = in.words[0];
  if (in.accumulator) w.arranged = false;
  if (in.run) {
    if (mask) in.run(*this, w, in, mask);
  } else if (word == "bra") {
    branch(w, in, mask);
  } else if (word == "ret" || word == "exit") {
    w.live &= ~mask;
  } else if (mask) {  // the barrier of the block
    const int lane = std::countr_zero(mask);
    const bool whole = in.operands.size() < 2 || plain(w, in, 1)[lane] == static_cast<uint64_t>(launch.threads);
    if (plain(w, in, 0)[lane] != 0 || !whole) in.unknown();  // another barrier, or one for some of the warps
    if (mask != w.live) fault("only a part of a warp reaches the barrier", w, lane);
    w.waits = true;
    return false;
  }
  return w.live != 0;
}

void Machine::branch(Warp& w, Instruction& in, uint32_t mask) {
  if (mask == 0) return;
  if (w.together && mask == w.live) {
    w.pc = in.target;
    return;
  }
  if (w.together) {
    each(w.live, [&](int l) { w.lane_pc[l] = w.pc; });
    w.together = false;
  }
  each(mask, [&](int l) { w.lane_pc[l] = in.target; });
}

// Until wgmma.wait_group the accumulators belong to the tensor cores.
void Machine::check_products(const Warp& w) const {
  const std::string& word = now->words[0];
  if (word == "wgmma" || word == "bar" || word == "bra") return;
  const auto busy = [&](const Products& p, int slot) {
    return std::find(p.slots.begin(), p.slots.end(), slot) != p.slots.end();
  };
  const auto check = [&](int slot) {
    bool found = busy(w.open_products, slot);
    for (const Products& p : w.products) found |= busy(p, slot);
    if (found) fault("an accumulator is touched before its product was waited for", w, 0);
  };
  for (const Operand& o : now->operands) {
    if (o.slot >= specials) check(o.slot);
    for (int part : o.parts) {
      if (part >= specials) check(part);
    }
  }
}

}  // namespace ptx
