// Sums, products, minima, divisions.
#include <algorithm>
#include <limits>

#include "bind.h"

namespace ptx {
namespace {

// Integers wrap: they are computed without their sign.
template <class T, bool Float = std::is_floating_point_v<T>>
struct Number {
  using Wide = std::make_unsigned_t<T>;
  static T add(T a, T b) { return static_cast<T>(static_cast<Wide>(static_cast<Wide>(a) + static_cast<Wide>(b))); }
  static T sub(T a, T b) { return static_cast<T>(static_cast<Wide>(static_cast<Wide>(a) - static_cast<Wide>(b))); }
  static T mul(T a, T b) { return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b)); }
};
template <class T>
struct Number<T, true> {
  static T add(T a, T b) { return canonical(a + b); }
  static T sub(T a, T b) { return canonical(a - b); }
  static T mul(T a, T b) { return canonical(a * b); }
};

struct Add { template <class T> static T of(T a, T b) { return Number<T>::add(a, b); } };
struct Sub { template <class T> static T of(T a, T b) { return Number<T>::sub(a, b); } };
struct Mul { template <class T> static T of(T a, T b) { return Number<T>::mul(a, b); } };
struct Mad { template <class T> static T of(T a, T b, T c) { return Number<T>::add(Number<T>::mul(a, b), c); } };
struct Fma { template <class T> static T of(T a, T b, T c) { return canonical(std::fma(a, b, c)); } };

template <class T, class U>
U wide_product(T a, T b) {
  return static_cast<U>(a) * static_cast<U>(b);
}

template <class T, class U>
struct Wide {
  static U of(T a, T b) { return wide_product<T, U>(a, b); }
};

template <class T>
struct High {
  static T of(T a, T b) {
    using U = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>((static_cast<U>(a) * static_cast<U>(b)) >> (8 * sizeof(T)));
  }
};

// a * b + c with c and the result twice as wide.
template <class T, class U>
void mad_wide(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  const uint64_t *a = plain(w, in, 1), *b = plain(w, in, 2), *c = plain(w, in, 3);
  each(mask, [&](int l) { d[l] = raw(Number<U>::add(wide_product<T, U>(get<T>(a[l]), get<T>(b[l])), get<U>(c[l]))); });
}

struct Negative {
  template <class T>
  static T of(T a) {
    if constexpr (std::is_floating_point_v<T>) return -a;
    else return Number<T>::sub(T{0}, a);
  }
};
struct Absolute {
  template <class T>
  static T of(T a) {
    if constexpr (std::is_floating_point_v<T>) return std::fabs(a);
    else return a < T{0} ? Number<T>::sub(T{0}, a) : a;
  }
};

template <bool Least, bool Nan>
struct Extreme {
  template <class T>
  static T of(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) {
      if (a != a && b != b) return static_cast<T>(from_bits(kNan));
      if (a != a || b != b) return Nan ? static_cast<T>(from_bits(kNan)) : a != a ? b : a;
      if (a == 0 && b == 0) return std::signbit(a) == Least ? a : b;
    }
    return (a < b) == Least ? a : b;
  }
};

template <bool Remainder>
struct Quotient {
  template <class T>
  static T of(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) {
      return canonical(a / b);
    } else {
      if (b == T{0}) throw Fault("an integer division by zero");
      if (std::is_signed_v<T> && b == static_cast<T>(-1)) return Remainder ? T{0} : Number<T>::sub(T{0}, a);
      return Remainder ? static_cast<T>(a % b) : static_cast<T>(a / b);
    }
  }
};

struct Root {
  template <class T>
  static T of(T a) { return canonical(std::sqrt(a)); }
};

// Inputs and result of fp32 without subnormals.
template <class Op>
struct Flushed {
  template <class... T>
  static float of(T... a) { return flushed(Op::of(flushed(a)...)); }
};

template <class Op>
Handler two_floats(const Instruction& in) {
  if (in.type == Type::f64) return binary<Op, double>;
  if (in.type != Type::f32) in.unknown();
  return in.has("ftz") ? binary<Flushed<Op>, float> : binary<Op, float>;
}

template <class Op>
Handler one_float(const Instruction& in) {
  if (in.type == Type::f64) return unary<Op, double>;
  if (in.type != Type::f32) in.unknown();
  return in.has("ftz") ? unary<Flushed<Op>, float> : unary<Op, float>;
}

template <class Op>
Handler two_integers(const Instruction& in) {
  return with_integer(in, in.type, [](auto t) -> Handler { return binary<Op, decltype(t)>; });
}

Handler sum(const Instruction& in, bool subtract) {
  in.allow({"rn", "ftz"});
  if (is_float(in.type)) return subtract ? two_floats<Sub>(in) : two_floats<Add>(in);
  return subtract ? two_integers<Sub>(in) : two_integers<Add>(in);
}

template <class T, class U>
Handler product_of(const Instruction& in, bool sum) {
  if (in.has("wide")) return sum ? mad_wide<T, U> : Handler{binary<Wide<T, U>, T>};
  if (in.has("hi") && !sum) return binary<High<T>, T>;
  if (!in.has("lo")) in.unknown();
  return sum ? ternary<Mad, T> : Handler{binary<Mul, T>};
}

Handler product(const Instruction& in, bool sum) {
  in.allow({"rn", "ftz", "lo", "hi", "wide"});
  switch (in.type) {
    case Type::u16: return product_of<uint16_t, uint32_t>(in, sum);
    case Type::s16: return product_of<int16_t, int32_t>(in, sum);
    case Type::u32: case Type::b32: return product_of<uint32_t, uint64_t>(in, sum);
    case Type::s32: return product_of<int32_t, int64_t>(in, sum);
    case Type::u64: case Type::b64: return product_of<uint64_t, uint64_t>(in, sum);
    case Type::s64: return product_of<int64_t, int64_t>(in, sum);
    default: if (sum) in.unknown();
  }
  return two_floats<Mul>(in);
}

Handler fused(const Instruction& in) {
  in.allow({"rn", "ftz"});
  if (in.type == Type::f64) return ternary<Fma, double>;
  if (in.type != Type::f32) in.unknown();
  return in.has("ftz") ? ternary<Flushed<Fma>, float> : ternary<Fma, float>;
}

template <bool Least>
Handler extreme(const Instruction& in) {
  in.allow({"ftz", "NaN"});
  if (!is_float(in.type)) return two_integers<Extreme<Least, false>>(in);
  return in.has("NaN") ? two_floats<Extreme<Least, true>>(in) : two_floats<Extreme<Least, false>>(in);
}

// `approx` and `full` give what `rn` gives; the gate on machine code (gemmascope_fast/dev/gpu/sass.py) keeps them away
// from exact paths.
Handler quotient(const Instruction& in) {
  in.allow({"rn", "full", "approx", "ftz"});
  return is_float(in.type) ? two_floats<Quotient<false>>(in) : two_integers<Quotient<false>>(in);
}

// sum + the dot of four bytes with four bytes, as dp4a has it.
template <class A, class B>
void dot4(Machine&, Warp& w, Instruction& in, uint32_t mask) {
  uint64_t* d = plain(w, in, 0);
  const uint64_t *a = plain(w, in, 1), *b = plain(w, in, 2), *c = plain(w, in, 3);
  each(mask, [&](int l) {
    int32_t sum = get<int32_t>(c[l]);
    for (int i = 0; i < 32; i += 8) sum += static_cast<A>(a[l] >> i) * static_cast<B>(b[l] >> i);
    d[l] = raw(sum);
  });
}

Handler dots(const Instruction& in) {
  in.allow({});
  const bool a = is_signed(in.type), b = is_signed(in.from);
  if (a) return b ? dot4<int8_t, int8_t> : dot4<int8_t, uint8_t>;
  return b ? dot4<uint8_t, int8_t> : dot4<uint8_t, uint8_t>;
}

template <class Op>
Handler sign(const Instruction& in) {
  in.allow({"ftz"});
  if (is_float(in.type)) return one_float<Op>(in);
  return with_integer(in, in.type, [](auto t) -> Handler { return unary<Op, decltype(t)>; });
}

}  // namespace

Handler bind_arithmetic(const Instruction& in) {
  const std::string& word = in.words[0];
  if (word == "add" || word == "sub") return sum(in, word == "sub");
  if (word == "mul" || word == "mad") return product(in, word == "mad");
  if (word == "fma") return fused(in);
  if (word == "min") return extreme<true>(in);
  if (word == "max") return extreme<false>(in);
  if (word == "div") return quotient(in);
  if (word == "rem") return in.allow({}), two_integers<Quotient<true>>(in);
  if (word == "neg") return sign<Negative>(in);
  if (word == "abs") return sign<Absolute>(in);
  if (word == "sqrt") return in.allow({"rn", "approx", "ftz"}), one_float<Root>(in);
  if (word == "dp4a") return dots(in);
  return nullptr;
}

}  // namespace ptx
