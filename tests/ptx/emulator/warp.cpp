// What the lanes of a warp do together.
#include "bind.h"

namespace ptx {
namespace {

// All lanes that a lane names must execute the instruction with it.
void present(Machine& m, Warp& w, uint32_t named, uint32_t mask, int lane) {
  if (named & ~mask) m.fault("the instruction names lanes that do not execute it", w, lane);
}

void shuffle(Machine& m, Warp& w, Instruction& in, uint32_t mask) {
  const std::string& mode = in.words[2];
  const uint64_t *a = plain(w, in, 1), *b = plain(w, in, 2), *c = plain(w, in, 3), *named = plain(w, in, 4);
  uint64_t out[32];
  bool valid[32];
  each(mask, [&](int l) {
    present(m, w, get<uint32_t>(named[l]), mask, l);
    const int by = b[l] & 31, clamp = c[l] & 31, segment = c[l] >> 8 & 31;
    const int last = (l & segment) | (clamp & ~segment & 31), first = l & segment;
    int from = l;
    if (mode == "up") from = l - by, valid[l] = from >= last;
    if (mode == "down") from = l + by, valid[l] = from <= last;
    if (mode == "bfly") from = l ^ by, valid[l] = from <= last;
    if (mode == "idx") from = first | (by & ~segment & 31), valid[l] = from <= last;
    if (!valid[l]) from = l;
    if ((mask >> from & 1) == 0) m.fault("a shuffle from a lane that does not execute it", w, l);
    out[l] = a[from] & 0xFFFFFFFFu;
  });
  const Operand& to = in.operands[0];
  each(mask, [&](int l) {
    if (to.kind == Operand::value) {
      w.slot(to.slot)[l] = out[l];
    } else {
      if (to.parts[0] >= 0) w.slot(to.parts[0])[l] = out[l];
      if (to.parts[1] >= 0) w.slot(to.parts[1])[l] = valid[l];
    }
  });
}

void vote(Machine& m, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  const uint64_t* named = plain(w, in, 2);
  uint32_t votes = 0;
  each(mask, [&](int l) { votes |= predicate(w, in.operands[1], l) ? 1u << l : 0; });
  each(mask, [&](int l) {
    const uint32_t who = get<uint32_t>(named[l]);
    present(m, w, who, mask, l);
    const uint32_t yes = votes & who;
    d[l] = in.has("ballot") ? yes : in.has("any") ? yes != 0 : yes == who;
  });
}

template <class T>
void reduce(Machine& m, Warp& w, Instruction& in, uint32_t mask) {
  const std::string& op = in.words[2];
  uint64_t* d = plain(w, in, 0);
  const uint64_t *a = plain(w, in, 1), *named = plain(w, in, 2);
  uint64_t out[32];
  each(mask, [&](int l) {
    const uint32_t who = get<uint32_t>(named[l]);
    present(m, w, who, mask, l);
    bool first = true;
    T sum = 0;
    each(who, [&](int k) {
      const T v = get<T>(a[k]);
      if (first) sum = v;
      else if (op == "add") sum = static_cast<T>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(v));
      else if (op == "min") sum = v < sum ? v : sum;
      else if (op == "max") sum = v > sum ? v : sum;
      else if (op == "and") sum = sum & v;
      else if (op == "or") sum = sum | v;
      else sum = sum ^ v;
      first = false;
    });
    out[l] = raw(sum);
  });
  each(mask, [&](int l) { d[l] = out[l]; });
}

void active_lanes(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  each(mask, [&](int l) { d[l] = mask; });
}

// Orders the memory of the lanes; here all of them, as every kernel of this package asks for it.
void barrier_of_warp(Machine& m, Warp& w, Instruction& in, uint32_t mask) {
  const int lane = std::countr_zero(mask);
  if (mask != w.live) m.fault("only a part of a warp reaches its barrier", w, lane);
  if ((get<uint32_t>(plain(w, in, 0)[lane]) & w.live) != w.live) in.unknown();
  ++w.sync;
}

void nothing(Machine&, Warp&, Instruction&, uint32_t) {}

void trap(Machine& m, Warp& w, Instruction&, uint32_t mask) { m.fault("trap", w, std::countr_zero(mask)); }

}  // namespace

Handler bind_warp(const Instruction& in) {
  const std::string& word = in.words[0];
  if (word == "shfl") return in.allow({"sync", "up", "down", "bfly", "idx"}), shuffle;
  if (word == "vote") {
    in.allow({"sync", "ballot", "any", "all"});
    return vote;
  }
  if (word == "redux") {
    in.allow({"sync", "add", "min", "max", "and", "or", "xor"});
    return is_signed(in.type) ? reduce<int32_t> : reduce<uint32_t>;
  }
  if (word == "activemask") return in.allow({}), active_lanes;
  if (word == "bar" && in.words.size() > 1 && in.words[1] == "warp") return in.allow({"warp", "sync"}), barrier_of_warp;
  if (word == "membar") return in.allow({"cta", "gl", "sys"}), nothing;  // blocks run one after the other
  if (word == "trap") return trap;
  return nullptr;
}

Handler handler_of(const Instruction& in) {
  const std::string& word = in.words[0];
  // control flow and the barrier of the block, which Machine::step does itself
  if (word == "bra") return in.allow({"uni"}), nullptr;
  if (word == "ret" || word == "exit") return in.allow({}), nullptr;
  if (word == "bar" && in.words.size() == 2 && in.words[1] == "sync") return nullptr;
  for (const auto bind :
       {bind_arithmetic, bind_bits, bind_convert, bind_memory, bind_warp, bind_matrix, bind_wgmma}) {
    if (const Handler h = bind(in)) return h;
  }
  in.unknown();
}

}  // namespace ptx
