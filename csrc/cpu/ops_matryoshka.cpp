#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "cpu/ops_common.h"
#include "cpu/parallel.h"

namespace gsf {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

enum Rule : int64_t { kPrefix = 0, kMatquant = 1, kExtra = 2 };
constexpr int64_t kMaxIn = 66000;  // 256 * 127 * 66,000 < 2^31
constexpr int kWidths[9][6] = {
    {}, {1}, {2}, {2, 1}, {2, 1, 1}, {2, 1, 1, 1}, {2, 1, 1, 2}, {2, 1, 1, 2, 1}, {2, 1, 1, 2, 2}};
// Maximum bytes of planes per task: every task begins up to eight cold streams, and with 64 KiB that was a
// quarter of the time.  Small matrices are split finer, so that each worker gets several tasks.
constexpr int64_t kChunkBytes = 262144;
constexpr int64_t kDraws = 4;
// With less work than this, a second thread costs more than it saves.
constexpr int64_t kAloneBytes = 65536;

void check_planes(at::TensorList planes, int64_t blocks, int64_t units, int64_t bits, MatryoshkaArgs& args) {
  int64_t stored = 0;
  for (const at::Tensor& p : planes) stored += p.dim() == 3 ? p.size(2) / 64 : 100;
  TORCH_CHECK_VALUE(stored >= 1 && stored <= 8 && bits >= 1 && bits <= stored,
                    "bits: expected a width from 1 to the ", stored, " stored, got ", bits);
  size_t count = 0;
  while (kWidths[stored][count] != 0) ++count;
  TORCH_CHECK_VALUE(planes.size() == count, "planes: expected ", count, " for ", stored, " bits, got ",
                    planes.size());
  for (size_t i = 0; i < count; ++i) {
    check_cpu(planes[i], "planes");
    TORCH_CHECK_TYPE(planes[i].scalar_type() == at::kByte, "planes: expected uint8, got ",
                     planes[i].scalar_type());
    check_shape(planes[i], {blocks, units, 64 * kWidths[stored][i]}, "planes");
    TORCH_CHECK_VALUE(planes[i].is_contiguous(), "planes: expected contiguous planes");
    args.planes[i] = planes[i].const_data_ptr<uint8_t>();
  }
  args.stored = static_cast<int>(stored), args.bits = static_cast<int>(bits);
}

// Tokens split into tiles, rounded to int8 or widened unchanged, and laid out for broadcasts.
class Tiles {
 public:
  Tiles(const at::Tensor& x, const MaybeTensor& mean, bool exact, MatryoshkaArgs& args)
      : x_(widened(x)), T_(x.size(0)), d_(x.size(1)), padded_(args.units * 32), exact_(exact) {
    if (mean) {
      check_cpu(*mean, "mean");
      check_shape(*mean, {d_}, "mean");
      mean_ = widened(*mean);
    }
    cut();
    const int64_t slots = tiles_.empty() ? 0 : tiles_.back().first + tiles_.back().width;
    if (exact) {
      values_ = at::empty({slots * padded_}, at::kFloat);
    } else {
      codes_ = at::empty({slots * padded_}, at::kChar);
      sums_ = at::empty({slots * args.groups}, at::kInt);
      scales_ = at::empty({std::max<int64_t>(1, T_)}, at::kFloat);
    }
    for (MatryoshkaTile& tile : tiles_) {
      if (exact) {
        tile.x = values_.const_data_ptr<float>() + tile.first * padded_;
      } else {
        tile.q = codes_.const_data_ptr<int8_t>() + tile.first * padded_;
        tile.qsum = sums_.const_data_ptr<int32_t>() + tile.first * args.groups;
      }
    }
    args.tiles = tiles_.data(), args.tile_count = static_cast<int64_t>(tiles_.size());
    if (!exact) args.s = scales_.const_data_ptr<float>();
    const Kernels& table = kernels();
    // a tile of 16 tokens of 2,304 takes about 10 µs: one tile is not worth a second thread
    run_chunks(static_cast<int64_t>(tiles_.size()), [&](int, int64_t i) { fill(tiles_[i], args, table); });
  }

 private:
  void cut() {
    const int64_t most = exact_ ? 4 : 16;
    for (int64_t t = 0; t < T_;) {
      const int64_t left = std::min(T_ - t, most);
      const int width = T_ == 1 ? 1 : left <= 4 ? 4 : left <= 8 ? 8 : 16;
      tiles_.push_back({nullptr, nullptr, nullptr, t, width, static_cast<int>(left)});
      t += left;
    }
  }

  void fill(const MatryoshkaTile& tile, const MatryoshkaArgs& args, const Kernels& table) {
    std::vector<float> row(static_cast<size_t>(d_));
    std::vector<int8_t> space(exact_ ? 0 : static_cast<size_t>(padded_));
    float* values = exact_ ? values_.mutable_data_ptr<float>() + tile.first * padded_ : nullptr;
    int8_t* codes = exact_ ? nullptr : codes_.mutable_data_ptr<int8_t>() + tile.first * padded_;
    int32_t* sums = exact_ ? nullptr : sums_.mutable_data_ptr<int32_t>() + tile.first * args.groups;
    if (tile.tokens < tile.width || padded_ > d_) {
      const int64_t n = padded_ * tile.width;
      if (exact_) std::fill(values, values + n, 0.0f);
      if (!exact_) std::fill(codes, codes + n, int8_t{0});
      if (!exact_) std::fill(sums, sums + args.groups * tile.width, 0);
    }
    const float* mean = mean_.defined() ? mean_.const_data_ptr<float>() : nullptr;
    for (int64_t i = 0; i < tile.tokens; ++i) {
      const float* x = x_.const_data_ptr<float>() + (tile.first + i) * d_;
      if (mean) {
        for (int64_t k = 0; k < d_; ++k) row[k] = x[k] - mean[k];
        x = row.data();
      }
      if (exact_) {
        for (int64_t k = 0; k < d_; ++k) values[k * tile.width + i] = x[k];
        continue;
      }
      table.matryoshka_quantize({x, space.data(), codes + i * 4, sums + i,
                                 scales_.mutable_data_ptr<float>() + tile.first + i, d_, padded_,
                                 args.group_units * 32, tile.width});
    }
  }

  at::Tensor x_, mean_, values_, codes_, sums_, scales_;
  std::vector<MatryoshkaTile> tiles_;
  int64_t T_, d_, padded_;
  bool exact_;
};

void check_overflow(const MaybeTensor& crow, const MaybeTensor& col, int64_t in, int64_t out,
                    MatryoshkaArgs& args) {
  TORCH_CHECK_VALUE(crow.has_value() == col.has_value(),
                    "overflow_crow, overflow_col: expected both or neither");
  if (!crow) return;
  TORCH_CHECK_VALUE(crow->numel() == out + 1, "overflow_crow: expected ", out + 1, " offsets, got ",
                    crow->numel());
  check_csr(*crow, *col, in);
  args.over_crow = crow->const_data_ptr<int64_t>();
  args.over_col = col->const_data_ptr<int32_t>();
}

at::Tensor matryoshka_linear_cpu(const at::Tensor& x, at::TensorList planes, const at::Tensor& scale,
                                 const at::Tensor& zero_point, const MaybeTensor& bias,
                                 const MaybeTensor& mean, const MaybeTensor& crow, const MaybeTensor& col,
                                 int64_t out, int64_t group_size, int64_t bits, int64_t rule, bool exact) {
  check_float(x, "x");
  check_cpu(x, "x");
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) <= kMaxIn, "x: expected [N, in_features <= ", kMaxIn, "], got ",
                    x.sizes());
  TORCH_CHECK_VALUE(out >= 0 && group_size >= 0 && group_size % 32 == 0,
                    "group_size: expected 0 or a multiple of 32, got ", group_size);
  TORCH_CHECK_VALUE(rule >= kPrefix && rule <= kExtra, "rule: expected 0, 1 or 2, got ", rule);
  MatryoshkaArgs args{};
  const int64_t in = x.size(1), T = x.size(0), blocks = (out + 15) / 16;
  args.units = (in + 31) / 32;
  args.group_units = group_size == 0 ? std::max<int64_t>(1, args.units) : group_size / 32;
  args.groups = group_size == 0 ? 1 : (in + group_size - 1) / group_size;
  check_planes(planes, blocks, args.units, bits, args);
  for (const auto* t : {&scale, &zero_point}) {
    check_cpu(*t, "scale, zero_point");
    check_shape(*t, {blocks, args.groups, 16}, "scale, zero_point");
    TORCH_CHECK_VALUE(t->is_contiguous(), "scale, zero_point: expected contiguous tensors");
  }
  args.scale_dtype = dtype_of(scale, "scale");
  TORCH_CHECK_TYPE(args.scale_dtype == Dtype::f32 || args.scale_dtype == Dtype::f16,
                   "scale: expected float32 or float16, got ", scale.scalar_type());
  TORCH_CHECK_TYPE(zero_point.scalar_type() == at::kByte, "zero_point: expected uint8, got ",
                   zero_point.scalar_type());
  args.scale = scale.const_data_ptr();
  args.zero = zero_point.const_data_ptr<uint8_t>();
  at::Tensor b;
  if (bias) {
    check_cpu(*bias, "bias");
    check_shape(*bias, {out}, "bias");
    b = widened(*bias);
    args.bias = b.const_data_ptr<float>();
  }
  check_overflow(crow, col, in, out, args);
  args.rounds = rule != kPrefix && args.stored > args.bits;
  args.top = rule == kExtra ? 1 << bits : (1 << bits) - 1;
  args.mid = rule == kPrefix ? static_cast<float>((1 << (8 - bits)) - 1) / 2 : 0.0f;
  args.exact = exact;
  args.out = out;

  at::Tensor y = at::empty({T, out}, at::kFloat);
  if (T == 0 || out == 0) return y;
  args.y = y.mutable_data_ptr<float>();
  const Tiles tiles(x, mean, exact, args);
  const int64_t block_bytes = std::max<int64_t>(1, args.units * 64 * args.stored);
  const bool direct = args.tile_count == 1 && T <= 4 && !exact && args.over_crow == nullptr;
  const int workers = std::max(1, at::get_num_threads());
  int64_t step = std::min(kChunkBytes / (block_bytes * args.tile_count), blocks / (kDraws * workers));
  step = std::max<int64_t>(1, step);
  // unpacked blocks are multiplied kMatryoshkaBlocks at a time
  if (!direct) step = (step + kMatryoshkaBlocks - 1) / kMatryoshkaBlocks * kMatryoshkaBlocks;
  if (blocks * block_bytes * args.tile_count <= kAloneBytes) step = blocks;
  const int64_t space = direct ? 0 : kMatryoshkaBlocks * args.units * 512;
  const at::Tensor raw = at::empty({workers * space}, at::kByte);
  uint8_t* const first = raw.mutable_data_ptr<uint8_t>();
  const Kernels& table = kernels();
  run_chunks((blocks + step - 1) / step, [&](int worker, int64_t chunk) {
    table.matryoshka(args, chunk * step, std::min(blocks, (chunk + 1) * step),
                     direct ? nullptr : first + worker * space);
  });
  return y;
}

TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { m.impl("matryoshka_linear", matryoshka_linear_cpu); }

}  // namespace
}  // namespace gsf
