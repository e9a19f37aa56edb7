// Products of a warpgroup (sm_90): operands in shared memory by descriptor, results in registers once they are waited for.
#include <algorithm>

#include "bind.h"

namespace ptx {

void whole_warp(Machine& m, Warp& w, uint32_t mask);
double matrix_element(const Instruction& in, uint32_t word, Type t, int i);
uint32_t matrix_sum(Machine& m, Warp& w, const Instruction& in, Type to, uint32_t c, const double* products, int n);

namespace {

// A matrix descriptor: byte offsets in units of 16, and how rows are swizzled.
struct Descriptor {
  uint64_t start, leading, stride;
  int row_bytes;  // of a swizzle atom: 128, 64, 32; 16 without

  explicit Descriptor(uint64_t v)
      : start((v & 0x3FFF) << 4), leading((v >> 16 & 0x3FFF) << 4), stride((v >> 32 & 0x3FFF) << 4) {
    constexpr int kRows[] = {16, 128, 64, 32};
    row_bytes = kRows[v >> 62];
    if (v >> 49 & 7) throw Fault("a matrix descriptor with a base offset is not known");
  }

  // Of byte `byte` of row `row`, rows along k.  Bits 4-6 are exchanged with those three (two, one) rows further on.
  uint64_t address(int row, int byte) const {
    const uint64_t r = static_cast<uint64_t>(row), b = static_cast<uint64_t>(byte);
    uint64_t at = start + r / 8 * stride + r % 8 * static_cast<uint64_t>(row_bytes) + b % static_cast<uint64_t>(row_bytes);
    if (row_bytes == 16) return at + b / 16 * leading;
    const uint64_t bits = row_bytes == 128 ? 7 : row_bytes == 64 ? 3 : 1;
    return at ^ ((at >> 7 & bits) << 4);
  }
};

struct Product {
  int n = 0, k = 0, per_word = 0;
  Type to = Type::none, a = Type::none, b = Type::none;
};

Product product_of(const Instruction& in) {
  Product p;
  Type types[3];
  int found = 0;
  for (const std::string& word : in.words) {
    if (found < 3 && type_named(word, &types[found])) ++found;
    if (word.rfind("m64n", 0) == 0) {
      p.n = std::stoi(word.substr(4));
      p.k = std::stoi(word.substr(word.find('k') + 1));
    }
  }
  if (found != 3 || p.n == 0) in.unknown();
  p.to = types[0], p.a = types[1], p.b = types[2];
  p.per_word = p.k == 32 ? 4 : p.k == 16 ? 2 : 1;
  if (p.k != 32 && p.k != 16 && p.k != 8) in.unknown();
  return p;
}

// Row `row` of an operand in shared memory: k elements, each of 4 / per_word bytes.
void read_row(Machine& m, Warp& w, const Instruction& in, const Product& p, Type t, const Descriptor& d, int row,
              double* out) {
  for (int byte = 0; byte < 32; byte += 4) {
    uint32_t v;
    const uint64_t at = d.address(row, byte);
    m.load_shared(w, kAll, at, 4, reinterpret_cast<uint8_t*>(&v));
    const Moment& written = m.shared.shadow.last_write(at);
    const bool by_one = written.warp >= 0 && written.warp < static_cast<int>(m.warps.size());
    const bool fenced = w.fence > written.order ||
                        (by_one && m.warps[static_cast<size_t>(written.warp)].fence > written.order);
    if (m.launch.races && !fenced) m.fault("a product reads what no fence.proxy.async has passed on", w, 0);
    w.open_products.reads.emplace_back(at, 4);
    for (int i = 0; i < p.per_word; ++i) out[byte / 4 * p.per_word + i] = matrix_element(in, v, t, i);
  }
}

// Warp q of the four computes rows 16q ... 16q + 15; its fragments are those of m16n8, side by side.
void multiply(Machine& m, Warp& w, Instruction& in, uint32_t mask) {
  whole_warp(m, w, mask);
  const Product p = product_of(in);
  const Operand &D = in.operands[0], &A = in.operands[1];
  const size_t after = 3;  // the operands behind A and B
  const bool scaled = predicate(w, in.operands[after], 0);
  for (size_t i = after + 1; i < in.operands.size(); ++i) {  // signs of A and B, then whether they are transposed
    const int32_t v = get<int32_t>(plain(w, in, i)[0]);
    if (v != (i < after + 3 ? 1 : 0)) in.unknown();
  }
  if (!w.arranged) m.fault("a product without wgmma.fence after its registers were touched", w, 0);

  std::vector<double> a(16 * static_cast<size_t>(p.k)), b(static_cast<size_t>(p.n * p.k)), products(static_cast<size_t>(p.k));
  if (A.kind == Operand::vector) {
    for (int l = 0; l < 32; ++l) {
      for (size_t r = 0; r < 4; ++r) {
        const uint32_t v = get<uint32_t>(w.slot(A.parts[r])[l]);
        const int row = l / 4 + 8 * static_cast<int>(r % 2);
        const int column = l % 4 * p.per_word + static_cast<int>(r / 2) * 4 * p.per_word;
        for (int i = 0; i < p.per_word; ++i) a[static_cast<size_t>(row * p.k + column + i)] = matrix_element(in, v, p.a, i);
      }
    }
  } else {
    const Descriptor d(plain(w, in, 1)[0]);
    for (int row = 0; row < 16; ++row) read_row(m, w, in, p, p.a, d, w.number % 4 * 16 + row, &a[static_cast<size_t>(row * p.k)]);
  }
  const Descriptor d(plain(w, in, 2)[0]);
  for (int row = 0; row < p.n; ++row) read_row(m, w, in, p, p.b, d, row, &b[static_cast<size_t>(row * p.k)]);

  for (int l = 0; l < 32; ++l) {
    for (size_t c = 0; c < D.parts.size(); ++c) {
      const int row = l / 4 + 8 * static_cast<int>(c / 2 % 2);
      const int column = static_cast<int>(c / 4) * 8 + l % 4 * 2 + static_cast<int>(c % 2);
      for (int k = 0; k < p.k; ++k) {
        products[static_cast<size_t>(k)] = a[static_cast<size_t>(row * p.k + k)] * b[static_cast<size_t>(column * p.k + k)];
      }
      uint64_t* slot = w.slot(D.parts[c]);
      slot[l] = matrix_sum(m, w, in, p.to, scaled ? get<uint32_t>(slot[l]) : 0, products.data(), p.k);
    }
  }
  for (int slot : D.parts) w.open_products.slots.push_back(slot);
}

void arrange(Machine&, Warp& w, Instruction&, uint32_t) { w.arranged = true; }

void commit(Machine&, Warp& w, Instruction&, uint32_t) {
  w.products.push_back(std::move(w.open_products));
  w.open_products = {};
}

// What the products read counts as read until here.
void wait(Machine& m, Warp& w, Instruction& in, uint32_t mask) {
  const uint64_t keep = plain(w, in, 0)[std::countr_zero(mask)];
  while (w.products.size() > keep) {
    for (const auto& [at, length] : w.products.front().reads) {
      uint8_t ignored[16];
      m.load_shared(w, kAll, at, length, ignored);
    }
    w.products.pop_front();
  }
}

void pass_on(Machine& m, Warp& w, Instruction&, uint32_t) { w.fence = ++m.order; }

}  // namespace

Handler bind_wgmma(const Instruction& in) {
  if (in.words[0] == "fence") {
    if (in.words.size() < 3 || in.words[1] != "proxy" || in.words[2] != "async") in.unknown();
    in.allow({"proxy", "async", "shared::cta"});
    return pass_on;
  }
  if (in.words[0] != "wgmma") return nullptr;
  const std::string& what = in.words[1];
  if (what == "fence") return in.allow({"fence", "sync", "aligned"}), arrange;
  if (what == "commit_group") return in.allow({"commit_group", "sync", "aligned"}), commit;
  if (what == "wait_group") return in.allow({"wait_group", "sync", "aligned"}), wait;
  if (what != "mma_async") in.unknown();
  const auto shape = std::find_if(in.words.begin(), in.words.end(), [](const auto& v) { return v.rfind("m64n", 0) == 0; });
  if (shape == in.words.end()) in.unknown();
  in.allow({"mma_async", "sync", "aligned", shape->c_str(), "satfinite"});
  return multiply;
}

}  // namespace ptx
