// Moves, logic, shifts, fields of bits, comparisons and choices.
#include <algorithm>

#include "bind.h"

namespace ptx {
namespace {

struct And { template <class T> static T of(T a, T b) { return a & b; } };
struct Or { template <class T> static T of(T a, T b) { return a | b; } };
struct Xor { template <class T> static T of(T a, T b) { return a ^ b; } };
struct Not { template <class T> static T of(T a) { return static_cast<T>(~a); } };

template <class Op>
void of_predicates(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  each(mask, [&](int l) {
    const bool a = predicate(w, in.operands[1], l), b = predicate(w, in.operands[2], l);
    d[l] = Op::of(static_cast<uint8_t>(a), static_cast<uint8_t>(b)) & 1;
  });
}

template <class Op>
Handler logic(const Instruction& in) {
  in.allow({});
  if (in.type == Type::pred) return of_predicates<Op>;
  return with_integer(in, in.type, [](auto t) -> Handler { return binary<Op, decltype(t)>; });
}

void not_predicate(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  each(mask, [&](int l) { d[l] = !predicate(w, in.operands[1], l); });
}

template <class T>
void move(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  const Operand &to = in.operands[0], &from = in.operands[1];
  constexpr uint64_t bits = 8 * sizeof(T);
  if (to.kind == Operand::vector) {
    const uint64_t* a = plain(w, in, 1);
    const uint64_t part = bits / to.parts.size(), some = part == 64 ? ~0ull : (1ull << part) - 1;
    each(mask, [&](int l) {
      const uint64_t v = a[l];
      for (size_t i = 0; i < to.parts.size(); ++i) {
        if (to.parts[i] >= 0) w.slot(to.parts[i])[l] = v >> (part * i) & some;
      }
    });
  } else if (from.kind == Operand::vector) {
    uint64_t* d = plain(w, in, 0);
    const uint64_t part = bits / from.parts.size(), some = part == 64 ? ~0ull : (1ull << part) - 1;
    each(mask, [&](int l) {
      uint64_t v = 0;
      for (size_t i = 0; i < from.parts.size(); ++i) v |= (w.slot(from.parts[i])[l] & some) << (part * i);
      d[l] = v;
    });
  } else {
    uint64_t* d = plain(w, in, 0);
    const uint64_t* a = plain(w, in, 1);
    each(mask, [&](int l) { d[l] = raw(get<T>(a[l])); });
  }
}

Handler moves(const Instruction& in) {
  in.allow({});
  switch (bytes_of(in.type)) {
    case 1: return move<uint8_t>;
    case 2: return move<uint16_t>;
    case 4: return move<uint32_t>;
    default: return move<uint64_t>;
  }
}

// Amounts of the width and above leave nothing, or the sign.
template <class T, bool Left>
void shift(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  const uint64_t *a = plain(w, in, 1), *b = plain(w, in, 2);
  constexpr uint32_t bits = 8 * sizeof(T);
  each(mask, [&](int l) {
    const uint32_t by = get<uint32_t>(b[l]);
    const T v = get<T>(a[l]);
    if (Left) {
      d[l] = by >= bits ? 0 : raw(static_cast<T>(static_cast<uint64_t>(v) << by));
    } else if (by >= bits) {
      d[l] = raw(static_cast<T>(v < T{0} ? -1 : 0));
    } else {
      d[l] = raw(static_cast<T>(v >> by));
    }
  });
}

template <class T>
void extract(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  const uint64_t *a = plain(w, in, 1), *b = plain(w, in, 2), *c = plain(w, in, 3);
  constexpr uint32_t bits = 8 * sizeof(T);
  each(mask, [&](int l) {
    const uint32_t from = b[l] & 255, count = c[l] & 255;
    const auto v = get<std::make_unsigned_t<T>>(a[l]);
    std::make_unsigned_t<T> out = 0;
    for (uint32_t i = 0; i < bits && count > 0; ++i) {
      if (i >= count && !std::is_signed_v<T>) break;
      const uint32_t at = from + std::min(i, count - 1);
      const uint64_t bit = at < bits ? v >> at & 1 : (std::is_signed_v<T> ? v >> (bits - 1) & 1 : 0);
      out |= static_cast<std::make_unsigned_t<T>>(bit << i);
    }
    d[l] = raw(out);
  });
}

template <class T>
void insert(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  const uint64_t *a = plain(w, in, 1), *b = plain(w, in, 2), *c = plain(w, in, 3), *n = plain(w, in, 4);
  each(mask, [&](int l) {
    const uint32_t at = c[l] & 255, count = n[l] & 255;
    T v = get<T>(b[l]);
    for (uint32_t i = 0; i < count && at + i < 8 * sizeof(T); ++i) {
      const T bit = static_cast<T>(T{1} << (at + i));
      v = (i < 8 * sizeof(T) && (get<T>(a[l]) >> i & 1)) ? v | bit : v & ~bit;
    }
    d[l] = raw(v);
  });
}

void permute(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  const uint64_t *a = plain(w, in, 1), *b = plain(w, in, 2), *c = plain(w, in, 3);
  each(mask, [&](int l) {
    const uint64_t bytes = get<uint32_t>(a[l]) | static_cast<uint64_t>(get<uint32_t>(b[l])) << 32;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t selector = c[l] >> (4 * i) & 15;
      uint32_t byte = bytes >> (8 * (selector & 7)) & 255;
      if (selector & 8) byte = byte & 128 ? 255 : 0;
      out |= byte << (8 * i);
    }
    d[l] = out;
  });
}

void lookup3(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  const uint64_t *a = plain(w, in, 1), *b = plain(w, in, 2), *c = plain(w, in, 3), *t = plain(w, in, 4);
  each(mask, [&](int l) {
    uint32_t out = 0;
    for (int i = 0; i < 32; ++i) {
      out |= static_cast<uint32_t>(t[l] >> ((a[l] >> i & 1) << 2 | (b[l] >> i & 1) << 1 | (c[l] >> i & 1)) & 1) << i;
    }
    d[l] = out;
  });
}

void funnel(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  const uint64_t *a = plain(w, in, 1), *b = plain(w, in, 2), *c = plain(w, in, 3);
  const bool left = in.has("l"), wrap = in.has("wrap");
  each(mask, [&](int l) {
    const uint64_t both = get<uint32_t>(a[l]) | static_cast<uint64_t>(get<uint32_t>(b[l])) << 32;
    const uint32_t by = wrap ? c[l] & 31 : std::min<uint32_t>(get<uint32_t>(c[l]), 32);
    d[l] = left ? static_cast<uint32_t>(both << by >> 32) : static_cast<uint32_t>(both >> by);
  });
}

struct Ones { template <class T> static uint32_t of(T a) { return static_cast<uint32_t>(std::popcount(a)); } };
struct Zeros { template <class T> static uint32_t of(T a) { return static_cast<uint32_t>(std::countl_zero(a)); } };
struct Reversed {
  template <class T>
  static T of(T a) {
    T out = 0;
    for (unsigned i = 0; i < 8 * sizeof(T); ++i) out |= static_cast<T>(a >> i & 1) << (8 * sizeof(T) - 1 - i);
    return out;
  }
};
template <bool Amount>
struct Highest {
  template <class T>
  static uint32_t of(T a) {
    if (a == 0) return ~0u;
    const uint32_t zeros = static_cast<uint32_t>(std::countl_zero(a));
    return Amount ? zeros : static_cast<uint32_t>(8 * sizeof(T)) - 1 - zeros;
  }
};

template <class Op>
Handler of_word(const Instruction& in) {
  if (in.type == Type::b32 || in.type == Type::u32) return unary<Op, uint32_t>;
  if (in.type == Type::b64 || in.type == Type::u64) return unary<Op, uint64_t>;
  in.unknown();
}

enum Comparison { eq, ne, lt, le, gt, ge, ordered, unordered };

template <class T>
bool compare(Comparison c, bool or_nan, T a, T b) {
  if (a != a || b != b) return or_nan || c == unordered;
  switch (c) {
    case eq: return a == b;
    case ne: return a != b;
    case lt: return a < b;
    case le: return a <= b;
    case gt: return a > b;
    case ge: return a >= b;
    case ordered: return true;
    default: return false;
  }
}

const std::map<std::string, std::pair<Comparison, bool>> kComparisons = {
    {"eq", {eq, false}}, {"ne", {ne, false}}, {"lt", {lt, false}}, {"le", {le, false}}, {"gt", {gt, false}},
    {"ge", {ge, false}}, {"lo", {lt, false}}, {"ls", {le, false}}, {"hi", {gt, false}}, {"hs", {ge, false}},
    {"equ", {eq, true}}, {"neu", {ne, true}}, {"ltu", {lt, true}}, {"leu", {le, true}}, {"gtu", {gt, true}},
    {"geu", {ge, true}}, {"num", {ordered, false}}, {"nan", {unordered, false}}};

template <class T>
void set_predicate(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  const auto [comparison, or_nan] = kComparisons.at(in.words[1]);
  const uint64_t *a = plain(w, in, 1), *b = plain(w, in, 2);
  const Operand& to = in.operands[0];
  const bool both = to.kind == Operand::vector, joined = in.operands.size() > 3;
  each(mask, [&](int l) {
    bool yes = compare(comparison, or_nan, widen_or_same(get<T>(a[l])), widen_or_same(get<T>(b[l]))), no = !yes;
    if (joined) {
      const bool c = predicate(w, in.operands[3], l);
      if (in.has("and")) yes = yes && c, no = no && c;
      if (in.has("or")) yes = yes || c, no = no || c;
      if (in.has("xor")) yes = yes != c, no = no != c;
    }
    if (!both) {
      w.slot(to.slot)[l] = yes;
    } else {
      if (to.parts[0] >= 0) w.slot(to.parts[0])[l] = yes;
      if (to.parts[1] >= 0) w.slot(to.parts[1])[l] = no;
    }
  });
}

Handler set_predicates(const Instruction& in) {
  if (in.words.size() < 3 || !kComparisons.count(in.words[1])) in.unknown();
  in.allow({in.words[1].c_str(), "and", "or", "xor"});  // ftz is not known: no comparison here may flush
  if (!is_float(in.type)) {
    return with_integer(in, in.type, [](auto t) -> Handler { return set_predicate<decltype(t)>; });
  }
  return with_float(in, in.type, [](auto t) -> Handler { return set_predicate<decltype(t)>; });
}

template <class T>
void choose(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  const uint64_t *a = plain(w, in, 1), *b = plain(w, in, 2);
  each(mask, [&](int l) { d[l] = raw(get<T>(predicate(w, in.operands[3], l) ? a[l] : b[l])); });
}

Handler choices(const Instruction& in) {
  in.allow({});
  switch (bytes_of(in.type)) {
    case 2: return choose<uint16_t>;
    case 4: return choose<uint32_t>;
    case 8: return choose<uint64_t>;
    default: in.unknown();
  }
}

Handler shifts(const Instruction& in, bool left) {
  in.allow({});
  return with_integer(in, in.type, [&](auto t) -> Handler {
    return left ? shift<decltype(t), true> : shift<decltype(t), false>;
  });
}

}  // namespace

Handler bind_bits(const Instruction& in) {
  const std::string& word = in.words[0];
  if (word == "mov") return moves(in);
  if (word == "and") return logic<And>(in);
  if (word == "or") return logic<Or>(in);
  if (word == "xor") return logic<Xor>(in);
  if (word == "not") {
    in.allow({});
    if (in.type == Type::pred) return not_predicate;
    return with_integer(in, in.type, [](auto t) -> Handler { return unary<Not, decltype(t)>; });
  }
  if (word == "shl" || word == "shr") return shifts(in, word == "shl");
  if (word == "setp") return set_predicates(in);
  if (word == "selp") return choices(in);
  if (word == "prmt") return in.allow({}), permute;
  if (word == "lop3") return in.allow({}), lookup3;
  if (word == "shf") return in.allow({"l", "r", "wrap", "clamp"}), funnel;
  if (word == "popc") return in.allow({}), of_word<Ones>(in);
  if (word == "clz") return in.allow({}), of_word<Zeros>(in);
  if (word == "brev") return in.allow({}), of_word<Reversed>(in);
  if (word == "bfind") {
    in.allow({"shiftamt"});
    return in.has("shiftamt") ? of_word<Highest<true>>(in) : of_word<Highest<false>>(in);
  }
  if (word == "bfe" || word == "bfi") {
    in.allow({});
    return with_integer(in, in.type, [&](auto t) -> Handler {
      using T = decltype(t);
      return word == "bfe" ? extract<T> : insert<std::make_unsigned_t<T>>;
    });
  }
  return nullptr;
}

}  // namespace ptx
