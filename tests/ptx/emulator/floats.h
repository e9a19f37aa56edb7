// Floating-point numbers as NVIDIA's units give them: every NaN that an operation makes is the same one.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ptx {

constexpr uint32_t kNan = 0x7FFFFFFFu;

inline float from_bits(uint32_t b) {
  float f;
  memcpy(&f, &b, 4);
  return f;
}
inline uint32_t bits(float f) {
  uint32_t b;
  memcpy(&b, &f, 4);
  return b;
}
inline float canonical(float f) { return f == f ? f : from_bits(kNan); }
inline double canonical(double f) { return f; }
inline float flushed(float f) { return std::fpclassify(f) == FP_SUBNORMAL ? std::copysign(0.0f, f) : f; }

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};
inline float widen(float f) { return f; }
inline double widen(double f) { return f; }
inline float widen(Brain b) { return from_bits(static_cast<uint32_t>(b.bits) << 16); }
inline float widen(Half h) {
  _Float16 x;
  memcpy(&x, &h.bits, 2);
  const float f = static_cast<float>(x);
  return f == f ? f : from_bits(kNan);
}
template <class T>
auto widen_or_same(T v) {
  if constexpr (std::is_class_v<T>) return widen(v);
  else return v;
}
template <class T>
T narrow(float f);
template <>
inline float narrow<float>(float f) {
  return f;
}
template <>
inline Brain narrow<Brain>(float f) {
  if (f != f) return {0x7FFF};
  const uint32_t u = bits(f);
  return {static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16)};
}
template <>
inline Half narrow<Half>(float f) {
  if (f != f) return {0x7FFF};
  const _Float16 x = static_cast<_Float16>(f);
  Half h;
  memcpy(&h.bits, &x, 2);
  return h;
}

}  // namespace ptx
