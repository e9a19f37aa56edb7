// Matrix fragments of a warp: ldmatrix, stmatrix and mma.
#include "bind.h"

namespace ptx {

void whole_warp(Machine& m, Warp& w, uint32_t mask) {
  if (mask != kAll) m.fault("only a part of a warp executes a matrix instruction", w, std::countr_zero(mask));
}

namespace {

int matrices(const Instruction& in) { return in.has("x4") ? 4 : in.has("x2") ? 2 : 1; }

uint64_t row_address(Warp& w, const Operand& o, int lane) {
  return (w.slot(o.slot)[lane] & 0xFFFFFFFFu) + static_cast<uint64_t>(o.offset);
}

int part(const Operand& o, int i) { return o.kind == Operand::vector ? o.parts[static_cast<size_t>(i)] : o.slot; }

// The lanes 8i ... 8i + 7 give the addresses of matrix i's rows of 16 bytes.  Lane l holds row l / 4, columns 2(l % 4)
// and the next one; transposed, column l / 4 and two rows.
void load_matrix(Machine& m, Warp& w, Instruction& in, uint32_t mask) {
  whole_warp(m, w, mask);
  const int n = matrices(in);
  const bool transposed = in.has("trans");
  uint64_t at[32] = {};
  uint16_t rows[4][8][8];
  for (int i = 0; i < 8 * n; ++i) {
    at[i] = row_address(w, in.operands[1], i);
    m.load_shared(w, kAll, at[i], 16, reinterpret_cast<uint8_t*>(rows[i / 8][i % 8]));
  }
  if (m.launch.count) m.count_shared(in, at, n == 4 ? kAll : (1u << 8 * n) - 1, 16);
  for (int i = 0; i < n; ++i) {
    for (int l = 0; l < 32; ++l) {
      const int a = l / 4, b = l % 4 * 2;
      const uint32_t low = transposed ? rows[i][b][a] : rows[i][a][b];
      const uint32_t high = transposed ? rows[i][b + 1][a] : rows[i][a][b + 1];
      w.slot(part(in.operands[0], i))[l] = high << 16 | low;
    }
  }
}

void store_matrix(Machine& m, Warp& w, Instruction& in, uint32_t mask) {
  whole_warp(m, w, mask);
  const int n = matrices(in);
  const bool transposed = in.has("trans");
  uint64_t at[32] = {};
  uint16_t rows[4][8][8];
  for (int i = 0; i < n; ++i) {
    for (int l = 0; l < 32; ++l) {
      const uint32_t v = get<uint32_t>(w.slot(part(in.operands[1], i))[l]);
      const int a = l / 4, b = l % 4 * 2;
      (transposed ? rows[i][b][a] : rows[i][a][b]) = static_cast<uint16_t>(v);
      (transposed ? rows[i][b + 1][a] : rows[i][a][b + 1]) = static_cast<uint16_t>(v >> 16);
    }
  }
  for (int i = 0; i < 8 * n; ++i) {
    at[i] = row_address(w, in.operands[0], i);
    m.store_shared(w, kAll, at[i], 16, reinterpret_cast<const uint8_t*>(rows[i / 8][i % 8]));
  }
  if (m.launch.count) m.count_shared(in, at, n == 4 ? kAll : (1u << 8 * n) - 1, 16);
}

}  // namespace

double matrix_element(const Instruction& in, uint32_t word, Type t, int i) {
  switch (t) {
    case Type::s8: return static_cast<int8_t>(word >> 8 * i);
    case Type::u8: return static_cast<uint8_t>(word >> 8 * i);
    case Type::f16: return widen(Half{static_cast<uint16_t>(word >> 16 * i)});
    case Type::bf16: return widen(Brain{static_cast<uint16_t>(word >> 16 * i)});
    case Type::tf32: return from_bits(word & ~0x1FFFu);
    default: in.unknown();
  }
}

// Sums of fp32 products are exact here and rounded once: the hardware's order and rounding are not documented.
uint32_t matrix_sum(Machine& m, Warp& w, const Instruction& in, Type to, uint32_t c, const double* products, int n) {
  if (to == Type::f32) {
    double sum = from_bits(c);
    for (int k = 0; k < n; ++k) sum += products[k];
    return bits(canonical(static_cast<float>(sum)));
  }
  int64_t sum = static_cast<int32_t>(c);
  for (int k = 0; k < n; ++k) sum += static_cast<int64_t>(products[k]);
  if (sum != static_cast<int32_t>(sum)) m.fault("an int32 sum of a matrix product overflows", w, 0);
  if (to != Type::s32) in.unknown();
  return static_cast<uint32_t>(sum);
}

namespace {

struct Shape {
  int k, per_word;  // columns of A, elements in 32 bits
};

Shape shape_of(const Instruction& in, Type a) {
  if (in.has("m16n8k32") && (a == Type::s8 || a == Type::u8)) return {32, 4};
  if (in.has("m16n8k16") && (a == Type::f16 || a == Type::bf16)) return {16, 2};
  if (in.has("m16n8k8") && a == Type::tf32) return {8, 1};
  in.unknown();
}

// Fragments of m16n8: A's words are rows g and g + 8, then the columns further on; B's are columns g; the results of a
// lane are two neighbours of row g and of row g + 8, where g is a quarter of the lane's number.
void multiply(Machine& m, Warp& w, Instruction& in, uint32_t mask) {
  whole_warp(m, w, mask);
  Type types[4];
  int found = 0;
  for (const std::string& word : in.words) {
    if (found < 4 && type_named(word, &types[found])) ++found;
  }
  const auto [K, per] = shape_of(in, types[1]);
  const Operand &A = in.operands[1], &B = in.operands[2];
  double a[16][32], b[32][8], products[32];
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, first = l % 4 * per;
    for (size_t r = 0; r < A.parts.size(); ++r) {
      const uint32_t v = get<uint32_t>(w.slot(A.parts[r])[l]);
      const size_t column = static_cast<size_t>(first) + r / 2 * 4 * static_cast<size_t>(per);
      for (int i = 0; i < per; ++i) a[g + 8 * (r % 2)][column + static_cast<size_t>(i)] = matrix_element(in, v, types[1], i);
    }
    const int words = B.kind == Operand::vector ? static_cast<int>(B.parts.size()) : 1;
    for (int r = 0; r < words; ++r) {
      const uint32_t v = get<uint32_t>(w.slot(part(B, r))[l]);
      for (int i = 0; i < per; ++i) b[first + i + r * 4 * per][g] = matrix_element(in, v, types[2], i);
    }
  }
  uint32_t out[32][4];
  for (int l = 0; l < 32; ++l) {
    for (int c = 0; c < 4; ++c) {
      const int row = l / 4 + 8 * (c / 2), column = l % 4 * 2 + c % 2;
      for (int k = 0; k < K; ++k) products[k] = a[row][k] * b[k][column];
      const uint32_t start = get<uint32_t>(w.slot(in.operands[3].parts[static_cast<size_t>(c)])[l]);
      out[l][c] = matrix_sum(m, w, in, types[0], start, products, K);
    }
  }
  for (int l = 0; l < 32; ++l) {
    for (int c = 0; c < 4; ++c) w.slot(in.operands[0].parts[static_cast<size_t>(c)])[l] = out[l][c];
  }
}

}  // namespace

Handler bind_matrix(const Instruction& in) {
  const std::string& word = in.words[0];
  if (word == "ldmatrix" || word == "stmatrix") {
    in.allow({"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta"});
    return word == "ldmatrix" ? load_matrix : store_matrix;
  }
  if (word == "mma") {
    in.allow({"sync", "aligned", "m16n8k32", "m16n8k16", "m16n8k8", "row", "col", "satfinite"});
    return multiply;
  }
  return nullptr;
}

}  // namespace ptx
