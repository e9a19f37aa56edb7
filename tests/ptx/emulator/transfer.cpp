// Loads, stores and asynchronous copies.
#include "bind.h"

namespace ptx {
namespace {

uint64_t address_of(Warp& w, const Instruction& in, const Operand& o, int lane, Space space) {
  if (o.kind != Operand::address) in.unknown();
  const uint64_t v = w.slot(o.slot)[lane];
  const bool narrow = space == Space::shared || space == Space::local;
  return (narrow ? v & 0xFFFFFFFFu : v) + static_cast<uint64_t>(o.offset);
}

int slot_of(const Instruction& in, const Operand& o, int part) {
  if (o.kind == Operand::vector) return o.parts[static_cast<size_t>(part)];
  if (o.kind != Operand::value || in.width != 1) in.unknown();
  return o.slot;
}

void count(Machine& m, Warp& w, Instruction& in, const Operand& o, uint32_t mask, int bytes, Space space) {
  if (!m.launch.count || (space != Space::global && space != Space::shared)) return;
  uint64_t at[32] = {};
  each(mask, [&](int l) { at[l] = address_of(w, in, o, l, space); });
  space == Space::global ? m.count_global(in, at, mask, bytes) : m.count_shared(in, at, mask, bytes);
}

template <class T>
void load_parameter(Machine& m, Warp& w, Instruction& in, uint32_t mask) {
  each(mask, [&](int l) {
    const uint64_t at = address_of(w, in, in.operands[1], l, Space::param);
    for (int i = 0; i < in.width; ++i) {
      const uint64_t from = at + static_cast<uint64_t>(i) * sizeof(T);
      if (from + sizeof(T) > m.launch.parameters.size()) m.fault("out of bounds: parameters", w, l);
      T v;
      memcpy(&v, m.launch.parameters.data() + from, sizeof(T));
      w.slot(slot_of(in, in.operands[0], i))[l] = static_cast<uint64_t>(static_cast<int64_t>(v));
    }
  });
}

template <class T>
void load(Machine& m, Warp& w, Instruction& in, uint32_t mask) {
  const int bytes = static_cast<int>(sizeof(T)) * in.width;
  count(m, w, in, in.operands[1], mask, bytes, in.space);
  each(mask, [&](int l) {
    T v[8];
    m.load(w, l, in.space, address_of(w, in, in.operands[1], l, in.space), bytes, reinterpret_cast<uint8_t*>(v));
    for (int i = 0; i < in.width; ++i) {
      const int slot = slot_of(in, in.operands[0], i);
      if (slot >= 0) w.slot(slot)[l] = static_cast<uint64_t>(static_cast<int64_t>(v[i]));
    }
  });
}

template <class T>
void store(Machine& m, Warp& w, Instruction& in, uint32_t mask) {
  const int bytes = static_cast<int>(sizeof(T)) * in.width;
  count(m, w, in, in.operands[0], mask, bytes, in.space);
  each(mask, [&](int l) {
    T v[8];
    for (int i = 0; i < in.width; ++i) v[i] = get<T>(w.slot(slot_of(in, in.operands[1], i))[l]);
    m.store(w, l, in.space, address_of(w, in, in.operands[0], l, in.space), bytes, reinterpret_cast<uint8_t*>(v));
  });
}

// The type that is loaded is the last word's.  Floats move as the bits that they are.
Type moved(const Instruction& in) {
  switch (in.from) {
    case Type::f32: return Type::b32;
    case Type::f64: return Type::b64;
    case Type::f16: case Type::bf16: return Type::b16;
    default: return in.from;
  }
}

Handler loads(const Instruction& in) {
  in.allow({"global", "shared", "shared::cta", "local", "param", "v2", "v4", "v8", "nc", "volatile",
            "L1::evict_last", "L1::evict_first", "L1::no_allocate"});
  return with_integer(in, moved(in), [&](auto t) -> Handler {
    return in.space == Space::param ? load_parameter<decltype(t)> : load<decltype(t)>;
  });
}

Handler stores(const Instruction& in) {
  in.allow({"global", "shared", "shared::cta", "local", "v2", "v4", "v8", "volatile"});
  return with_integer(in, moved(in), [](auto t) -> Handler { return store<decltype(t)>; });
}

void copy(Machine& m, Warp& w, Instruction& in, uint32_t mask) {
  const uint64_t* size = plain(w, in, 2);
  each(mask, [&](int l) {
    const int bytes = static_cast<int>(size[l]);
    const int source = in.operands.size() > 3 ? get<int32_t>(plain(w, in, 3)[l]) : bytes;
    if (bytes != 4 && bytes != 8 && bytes != 16) in.unknown();
    m.start_copy(w, l, address_of(w, in, in.operands[0], l, Space::shared),
                 address_of(w, in, in.operands[1], l, Space::global), bytes, source);
  });
  // lanes whose source is empty read nothing
  uint32_t reading = mask;
  if (in.operands.size() > 3) each(mask, [&](int l) { reading &= plain(w, in, 3)[l] ? ~0u : ~(1u << l); });
  if (reading) count(m, w, in, in.operands[1], reading, static_cast<int>(size[std::countr_zero(reading)]), Space::global);
}

void commit(Machine&, Warp& w, Instruction&, uint32_t mask) {
  each(mask, [&](int l) {
    Copies& c = w.copies[static_cast<size_t>(l)];
    c.groups.push_back(std::move(c.open));
    c.open.clear();
  });
}

void wait(Machine& m, Warp& w, Instruction& in, uint32_t mask) {
  if (in.has("wait_all")) commit(m, w, in, mask);
  each(mask, [&](int l) { m.finish_copies(w, l, in.has("wait_all") ? 0 : plain(w, in, 0)[l]); });
}

Handler copies(const Instruction& in) {
  if (in.words.size() < 2 || in.words[1] != "async") in.unknown();
  if (in.words.size() == 3) {
    if (in.words[2] == "commit_group") return commit;
    if (in.words[2] == "wait_group" || in.words[2] == "wait_all") return wait;
  }
  in.allow({"async", "ca", "cg", "shared", "shared::cta", "global", "L2::128B"});
  return copy;
}

}  // namespace

Handler bind_memory(const Instruction& in) {
  const std::string& word = in.words[0];
  if (word == "ld") return loads(in);
  if (word == "st") return stores(in);
  if (word == "cp") return copies(in);
  return nullptr;
}

}  // namespace ptx
