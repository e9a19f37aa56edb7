// Rounds activations of nested layers to int8, with one scale per token.  Included by isa_body.h.

// One token: centred row [d] -> codes [padded], sums a group, scale.  Rounds to nearest even by the constant
// 1.5 * 2^23, exact below 2^22 and the same on every instruction set.
static void matryoshka_quantize(const MatryoshkaToken& a) {
  uint32_t greatest = 0;
  for (int64_t k = 0; k < a.d; ++k) {
    uint32_t bits;
    memcpy(&bits, a.row + k, sizeof bits);
    bits &= 0x7FFFFFFFu;
    greatest = bits > greatest ? bits : greatest;
  }
  const bool finite = greatest < 0x7F800000u;
  float most;
  memcpy(&most, &greatest, sizeof most);
  float s = most / 127.0f;
  if (s < 1.17549435e-38f) s = 1.17549435e-38f;
  if (finite) {
    for (int64_t k = 0; k < a.d; ++k) {
      const float rounded = (a.row[k] / s + 12582912.0f) - 12582912.0f;
      const float low = rounded < -127.0f ? -127.0f : rounded;
      a.codes[k] = static_cast<int8_t>(static_cast<int32_t>(low > 127.0f ? 127.0f : low));
    }
  } else {
    memset(a.codes, 0, static_cast<size_t>(a.d));
  }
  memset(a.codes + a.d, 0, static_cast<size_t>(a.padded - a.d));
  *a.s = finite ? s : __builtin_nanf("");
  const int64_t groups = (a.padded + a.group - 1) / a.group;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t end = (g + 1) * a.group < a.padded ? (g + 1) * a.group : a.padded;
    int32_t sum = 0;
    for (int64_t k = g * a.group; k < end; ++k) sum += a.codes[k];
    a.qsum[g * a.width] = sum;
  }
  for (int64_t quad = 0; quad < a.padded / 4; ++quad) {
    memcpy(a.tile + quad * a.width * 4, a.codes + quad * 4, 4);
  }
}
