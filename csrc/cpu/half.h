// Widens 16-bit floats exactly; no arithmetic is done in 16 bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace gsf {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float widen(BF16 h) {
  const uint32_t u = static_cast<uint32_t>(h.bits) << 16;
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

inline float widen(F16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  const uint32_t exponent = (h.bits >> 10) & 31u, mantissa = h.bits & 1023u;
  uint32_t u;
  if (exponent == 31) {
    // vcvtph2ps makes a signalling NaN quiet, and this path must give the same
    u = sign | 0x7F800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u);
  } else if (exponent != 0) {
    u = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    // subnormal: the mantissa times 2^-24, exact in fp32
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-08f;
    memcpy(&u, &magnitude, sizeof u);
    u |= sign;
  }
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

}  // namespace gsf
