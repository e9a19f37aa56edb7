#include "cpu/greatest.h"

#include <algorithm>
#include <cstring>
#include <functional>

#include "cpu/ops_common.h"

namespace gsf {
namespace {

// Positive floats are ordered like their bits, and the canonical NaN comes after infinity.
uint32_t key_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Where the k largest of some values end: those with a key above `key`, and the first `equal` with that key.
struct Cut {
  uint32_t key;
  int64_t equal;
};

Cut cut_of(const float* values, int64_t n, int64_t k, std::vector<uint32_t>& keys) {
  if (n <= k) return {0, n};
  keys.resize(n);
  for (int64_t i = 0; i < n; ++i) keys[i] = key_of(values[i]);
  std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<>());
  const uint32_t key = keys[k - 1];
  int64_t above = 0;
  for (int64_t i = 0; i < k; ++i) above += keys[i] > key;
  return {key, k - above};
}

// Whether the next value is one of them.
bool taken(Cut& cut, float value) {
  const uint32_t key = key_of(value);
  return key > cut.key || (key == cut.key && cut.equal-- > 0);
}

}  // namespace

Csr greatest(const Csr& rows, int64_t k, bool together) {
  const auto& [crow, col, values] = rows;
  const int64_t T = crow.numel() - 1;
  const int64_t* from = crow.const_data_ptr<int64_t>();
  const int32_t* c = col.const_data_ptr<int32_t>();
  const float* v = values.const_data_ptr<float>();
  at::Tensor kept_crow = new_tensor({T + 1}, at::kLong);
  int64_t* to = kept_crow.mutable_data_ptr<int64_t>();
  to[0] = 0;
  std::vector<uint32_t> space;
  Cut whole{};
  if (together) {
    whole = cut_of(v, from[T], k * T, space);
    Cut cut = whole;
    for (int64_t t = 0; t < T; ++t) {
      to[t + 1] = to[t];
      for (int64_t i = from[t]; i < from[t + 1]; ++i) to[t + 1] += taken(cut, v[i]);
    }
  } else {
    for (int64_t t = 0; t < T; ++t) to[t + 1] = to[t] + std::min(k, from[t + 1] - from[t]);
  }
  at::Tensor kept_col = new_tensor({to[T]}, at::kInt), kept_values = new_tensor({to[T]}, at::kFloat);
  int32_t* kc = kept_col.mutable_data_ptr<int32_t>();
  float* kv = kept_values.mutable_data_ptr<float>();
  const auto copy_row = [&](int64_t t, Cut& cut) {
    int64_t at = to[t];
    for (int64_t i = from[t]; i < from[t + 1]; ++i) {
      if (!taken(cut, v[i])) continue;
      kc[at] = c[i];
      kv[at++] = v[i];
    }
  };
  if (together) {
    for (int64_t t = 0; t < T; ++t) copy_row(t, whole);
  } else {
    std::vector<std::vector<uint32_t>> spaces(std::max(1, at::get_num_threads()));
    run_chunks(T, [&](int worker, int64_t t) {
      Cut cut = cut_of(v + from[t], from[t + 1] - from[t], k, spaces[worker]);
      copy_row(t, cut);
    });
  }
  return {std::move(kept_crow), std::move(kept_col), std::move(kept_values)};
}

Csr stacked(const std::vector<Csr>& parts) {
  if (parts.size() == 1) return parts.front();
  int64_t T = 0, nnz = 0;
  for (const auto& [crow, col, values] : parts) T += crow.numel() - 1, nnz += col.numel();
  at::Tensor crow = new_tensor({T + 1}, at::kLong), col = new_tensor({nnz}, at::kInt);
  at::Tensor values = new_tensor({nnz}, at::kFloat);
  int64_t* to = crow.mutable_data_ptr<int64_t>();
  int32_t* c = col.mutable_data_ptr<int32_t>();
  float* v = values.mutable_data_ptr<float>();
  *to = 0;
  for (const auto& [part_crow, part_col, part_values] : parts) {
    const int64_t* from = part_crow.const_data_ptr<int64_t>();
    const int64_t rows = part_crow.numel() - 1, base = *to;
    for (int64_t t = 0; t < rows; ++t) *++to = base + from[t + 1];
    c = std::copy_n(part_col.const_data_ptr<int32_t>(), part_col.numel(), c);
    v = std::copy_n(part_values.const_data_ptr<float>(), part_values.numel(), v);
  }
  return {std::move(crow), std::move(col), std::move(values)};
}

}  // namespace gsf
