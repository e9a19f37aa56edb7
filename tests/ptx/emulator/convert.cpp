// Conversions between number types.
#include <algorithm>
#include <limits>

#include "bind.h"

namespace ptx {
namespace {

enum class Rounding { none, nearest, zero, down, up };

Rounding rounding_of(const Instruction& in) {
  if (in.has("rni")) return Rounding::nearest;
  if (in.has("rzi")) return Rounding::zero;
  if (in.has("rmi")) return Rounding::down;
  if (in.has("rpi")) return Rounding::up;
  return Rounding::none;
}

template <class F>
F rounded(F v, Rounding r) {
  switch (r) {
    case Rounding::nearest: return std::nearbyint(v);
    case Rounding::zero: return std::trunc(v);
    case Rounding::down: return std::floor(v);
    case Rounding::up: return std::ceil(v);
    default: return v;
  }
}

// NaN becomes 0, what does not fit the nearest that does.
template <class To>
To saturated(double v) {
  if (v != v) return 0;
  if (v >= static_cast<double>(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
  if (v <= static_cast<double>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  return static_cast<To>(v);
}

// Integers: the source is extended by its own sign, the result is cut; in a wider register it keeps its sign.
template <class To, class From>
void integer(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  const uint64_t* a = plain(w, in, 1);
  each(mask, [&](int l) { d[l] = static_cast<uint64_t>(static_cast<int64_t>(static_cast<To>(get<From>(a[l])))); });
}

template <class To, class From>
void to_float(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  const uint64_t* a = plain(w, in, 1);
  each(mask, [&](int l) { d[l] = raw(static_cast<To>(get<From>(a[l]))); });
}

template <class To, class From>
void to_integer(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  const uint64_t* a = plain(w, in, 1);
  const Rounding r = rounding_of(in);
  each(mask, [&](int l) {
    const To v = saturated<To>(rounded(static_cast<double>(widen(get<From>(a[l]))), r));
    d[l] = static_cast<uint64_t>(static_cast<int64_t>(v));
  });
}

template <class To, class From>
void between_floats(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  const uint64_t* a = plain(w, in, 1);
  const Rounding r = rounding_of(in);
  each(mask, [&](int l) {
    const auto v = rounded(widen(get<From>(a[l])), r);
    if constexpr (std::is_same_v<To, double>) {
      d[l] = raw(static_cast<double>(v));
    } else {
      d[l] = raw(narrow<To>(static_cast<float>(v)));
    }
  });
}

// Two fp32 to a pair of 16 bits; the first operand is the upper half.
template <class To>
void pair(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  const uint64_t *a = plain(w, in, 1), *b = plain(w, in, 2);
  each(mask, [&](int l) {
    const uint32_t high = narrow<To>(get<float>(a[l])).bits, low = narrow<To>(get<float>(b[l])).bits;
    d[l] = high << 16 | low;
  });
}

// rna: to ten bits of mantissa, ties away from zero.
void to_tf32(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  const uint64_t* a = plain(w, in, 1);
  each(mask, [&](int l) { d[l] = (get<uint32_t>(a[l]) + 0x1000) & ~0x1FFFu; });
}

// cvta: generic addresses of shared and local memory lie behind a base each, global ones are themselves.
template <uint64_t Base, bool ToGeneric>
void address(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  const uint64_t* a = plain(w, in, 1);
  each(mask, [&](int l) { d[l] = ToGeneric ? a[l] + Base : a[l] - Base; });
}

Handler addresses(const Instruction& in) {
  in.allow({"to", "global", "shared", "local", "param"});
  const bool to = !in.has("to");
  if (in.space == Space::global || in.space == Space::param) return to ? address<0, true> : address<0, false>;
  if (in.space == Space::shared) return to ? address<kSharedBase, true> : address<kSharedBase, false>;
  if (in.space == Space::local) return to ? address<kLocalBase, true> : address<kLocalBase, false>;
  in.unknown();
}

Handler conversions(const Instruction& in) {
  const Type to = in.type, from = in.from;
  if (to == Type::f16x2 || to == Type::bf16x2) {
    in.allow({"rn"});
    return to == Type::f16x2 ? pair<Half> : pair<Brain>;
  }
  if (to == Type::tf32) return in.allow({"rna"}), to_tf32;
  in.allow({"rn", "rni", "rzi", "rmi", "rpi"});
  if (is_float(to) && is_float(from)) {
    return with_float(in, to, [&](auto t) -> Handler {
      return with_float(in, from, [](auto f) -> Handler { return between_floats<decltype(t), decltype(f)>; });
    });
  }
  if (is_float(to)) {
    if (to != Type::f32 && to != Type::f64) in.unknown();
    return with_integer(in, from, [&](auto f) -> Handler {
      return to == Type::f32 ? to_float<float, decltype(f)> : to_float<double, decltype(f)>;
    });
  }
  if (is_float(from)) {
    return with_integer(in, to, [&](auto t) -> Handler {
      return with_float(in, from, [](auto f) -> Handler { return to_integer<decltype(t), decltype(f)>; });
    });
  }
  return with_integer(in, to, [&](auto t) -> Handler {
    return with_integer(in, from, [](auto f) -> Handler { return integer<decltype(t), decltype(f)>; });
  });
}

}  // namespace

Handler bind_convert(const Instruction& in) {
  if (in.words[0] == "cvt") return conversions(in);
  if (in.words[0] == "cvta") return addresses(in);
  return nullptr;
}

}  // namespace ptx
