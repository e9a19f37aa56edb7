#include "cpu/screen_call.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/memory.h"

namespace gsf {
namespace {

// Up to this many tokens the first stage is memory-bound: reading both digits of the activations was no
// slower at 1 and 4 tokens, and leaves fewer candidates; at 16 it took half as long again.
constexpr int64_t kBothDigits = 4;
// Use AMX from this many tokens on: at 16 and below the kernel is memory-bound, and VNNI was as fast or
// faster. For activations without scales it reads both digits, which took a fifth less time than the first
// and a second look at 256 real tokens. With scales, which leave a quarter of the false candidates, reading
// only the first took 5 % less there, and 14 to 24 % less on 2304 x 16,384 at 64 to 1,024.
constexpr int64_t kAmxFewest = kLaneTokens + 1;
// Use AVX-512 with one token per lane (screen_lanes.h) from this many tokens on: at 16 it took 4 % less time
// on 2304 x 16,384, 27 % less on 3584 and 5 % more on 640 x 4,096; at 8, where half the lanes are empty, a
// fifth more.
constexpr int64_t kLanesFewest = kLaneTokens;
// Up to this many tokens chunks are long without AMX too: at 64 they made no difference; at 256 short ones,
// whose candidates are computed while the codes are in cache, took 3 % less time.
constexpr int64_t kLongChunks = 64;

// The table's first bound, for threshold - bandwidth / 2 instead of max(threshold, 0).
at::Tensor with_bandwidth(const at::Tensor& table, const float* theta, int64_t F, int64_t k, float half) {
  at::Tensor own = table.clone();
  const int64_t stride = own.size(1);
  float* p = own.mutable_data_ptr<float>();
  for (int64_t f = 0; f < F; ++f) {
    float& start = p[kStart * stride + f];
    if (start == std::numeric_limits<float>::infinity()) continue;
    const double edge = std::min(std::max<double>(theta[f], 0.0), static_cast<double>(theta[f]) - half);
    const double exact = static_cast<double>(p[kCentredBias * stride + f]) + p[kSlack * stride + f] - edge;
    // the roundings of the epilogue, as the builder accounts for them in tau
    const double roomy = exact + start_steps(k) * std::fabs(edge);
    const float near = static_cast<float>(roomy);
    start = near >= roomy ? near : std::nextafter(near, std::numeric_limits<float>::infinity());
  }
  return own;
}

// A token's values (TokenPlane) and coefficients, four times each, as tiles of four features read them.
void fill_lanes(const ScreenedTokens& tokens, bool both, float* lanes, int64_t stride) {
  for (size_t t = 0; t < tokens.screen.size(); ++t) {
    const ScreenToken& k = tokens.screen[t];
    const float* along = tokens.along.data() + t * tokens.k;
    for (int64_t j = 0; j < tokens.k; ++j) {
      std::fill_n(&lanes[4 * ((kTokenPlanes + j) * stride + static_cast<int64_t>(t))], 4, along[j]);
    }
    for (int copy = 0; copy < 4; ++copy) {
      for (int plane = kUnit; plane <= kFloor; ++plane) {
        lanes[4 * (plane * stride + t) + copy] = token_number(k, static_cast<TokenPlane>(plane), both);
      }
      std::memcpy(&lanes[4 * (kDigitSum * stride + t) + copy], &k.sum, sizeof k.sum);
    }
  }
}

at::Tensor chosen_rows(const at::Tensor& x, const std::vector<int32_t>& ids) {
  const int64_t d = x.size(1);
  at::Tensor out = new_tensor({static_cast<int64_t>(ids.size()), d}, at::kFloat);
  float* to = out.mutable_data_ptr<float>();
  const float* from = x.const_data_ptr<float>();
  for (size_t i = 0; i < ids.size(); ++i) std::copy_n(from + ids[i] * d, d, to + i * d);
  return out;
}

// The directions of a call.
struct Directions {
  const float* v;  // [k][d]
  int64_t k;
  double frobenius;
};

Directions of_call(const std::optional<at::Tensor>& directions, int64_t d) {
  const int64_t k = check_directions(directions, d);
  if (k == 0) return {nullptr, 0, 0};
  const float* v = directions->const_data_ptr<float>();
  double square = 0;
  for (int64_t i = 0; i < k * d; ++i) square += static_cast<double>(v[i]) * v[i];
  return {v, k, std::sqrt(square) * (1 + 1e-9)};
}

// What is applied to a call's activations before rounding: centre and inverse scales, [d] or null.
struct Frame {
  const float* mu;
  const float* per_scale;
};

ScreenedTokens quantised(const at::Tensor& x, const Frame& frame, const Directions& along, int64_t width,
                         bool both) {
  const int64_t T = x.size(0), d = x.size(1), second = round_to(T, kTileRows) * width;
  ScreenedTokens out;
  out.x = x;
  out.digits = new_tensor({both ? round_to(T, 2) * 2 * width : 2 * second}, at::kChar);
  out.screen.resize(T);
  out.k = along.k;
  out.along.resize(T * along.k);
  int8_t* q = out.digits.mutable_data_ptr<int8_t>();
  std::fill_n(q, out.digits.numel(), int8_t{0});  // not memset: without tokens there is no address
  const Kernels& kernel = kernels();
  const int workers = static_cast<int>(std::min<int64_t>(std::max(1, at::get_num_threads()), T));
  std::vector<float> space(workers * width);
  const auto token = [&](int worker, int64_t t) {
    int8_t* q1 = q + digits_offset(t, width, both);
    kernel.screen_token(ScreenTokenArgs{x.const_data_ptr<float>() + t * d, frame.mu, frame.per_scale, along.v,
                                        q1, q1 + (both ? 2 * kTileColumns : second),
                                        out.along.data() + t * along.k, &out.screen[t],
                                        space.data() + worker * width, d, width, along.k, along.frobenius});
  };
  if (T == 1) {
    SubnormalsOn guard;
    token(0, 0);
  } else {
    run_chunks(T, token);
  }
  for (int64_t t = 0; t < T; ++t) {
    (out.screen[t].fits ? out.ids : out.rest_ids).push_back(static_cast<int32_t>(t));
  }
  if (out.rest_ids.empty()) {
    out.ids.clear();
    return out;
  }
  // rare: NaN, infinities or all zeros; the remaining tokens are compacted
  ScreenedTokens kept = quantised(chosen_rows(x, out.ids), frame, along, width, both);
  kept.ids = std::move(out.ids);
  kept.rest = chosen_rows(x, out.rest_ids);
  kept.rest_ids = std::move(out.rest_ids);
  return kept;
}

// Features per chunk. More features interrupt a stream of codes less often; at each interruption the 8 KiB
// that the hardware prefetched for this worker are wasted (2304 x 16,384 took 4 to 12 % less time at 1 to 16
// tokens than in chunks of kChunkFeatures, 640 x 4,096 a sixth less). With AMX the tokens' digits also come
// less often from the last-level cache.  But there are at least eight chunks per worker, because workers are
// not equally fast.
int64_t chunk_features(int64_t F, int workers) {
  int64_t features = kChunkFeatures;
  while (2 * features <= kMostChunk && F / (2 * features) >= 8 * workers) features *= 2;
  return features;
}

// W_enc, after checking that it can be read.
const at::Tensor& checked(const at::Tensor& x, const ScreenTensors& given) {
  check_float(x, "x");
  check_cpu(x, "x");
  check_sizes(given.W_enc, given.b_enc, given.threshold);
  return given.W_enc;
}

}  // namespace

ScreenCall::ScreenCall(const at::Tensor& x, const ScreenTensors& given, const ScreenChoices& choices)
    : kernel_(kernels()), rows_(checked(x, given)) {
  const at::Tensor &code = given.code, &table = given.table;
  const std::optional<at::Tensor>& code2 = given.code2;
  const int64_t d = given.W_enc.size(0), F = given.W_enc.size(1), T = x.size(0);
  const int64_t width = round_to(d, 64), stride = table_stride(F);
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) == d, "x: expected [N, d_in = ", d, "], got ", x.sizes());
  TORCH_CHECK_VALUE(T < INT32_MAX && F < INT32_MAX, "x: more than 2^31 tokens or features");
  const int64_t tiles = (F + kTileRows - 1) / kTileRows, steps = width / kTileColumns;
  check_shape(code, {tiles, steps, kTileRows, kTileColumns}, "code");
  const Directions along = of_call(given.directions, d);
  check_shape(table, {kScreenRows + along.k, stride}, "table");
  if (code2) check_shape(*code2, code.sizes(), "code2");
  check_centre(given.centre, d);
  const std::vector<float> per_scale = inverse_scales(given.scales, d);
  TORCH_CHECK_TYPE(code.scalar_type() == at::kByte && (!code2 || code2->scalar_type() == at::kByte) &&
                       table.scalar_type() == at::kFloat,
                   "code, code2, table: expected uint8, uint8 and float32");
  TORCH_CHECK_VALUE(code.is_contiguous() && (!code2 || code2->is_contiguous()) && table.is_contiguous(),
                    "code, code2, table: expected contiguous tensors");
  TORCH_CHECK_VALUE(choices.digits >= 0 && choices.digits <= 2, "digits: expected 0 (choose), 1 or 2, got ",
                    choices.digits);
  const std::optional<double> bandwidth = choices.bandwidth;
  TORCH_CHECK_VALUE(!bandwidth || *bandwidth > 0, "bandwidth: expected a positive number, got ",
                    bandwidth.value_or(0));

  bias_ = widened(given.b_enc), theta_ = widened(given.threshold);
  args.adaptive = choices.digits == 0;
  args.mapped = choices.mapped;
  args.ranked = choices.ranked;
  const bool amx = kernel_.has_amx && T >= kAmxFewest;
  args.both = args.adaptive ? T <= kBothDigits || (amx && !given.scales) : choices.digits == 2;
  const bool lanes_of_tokens = amx || (kernel_.screen_pack && !args.both && T >= kLanesFewest);
  const Frame frame{given.centre ? given.centre->const_data_ptr<float>() : nullptr,
                    given.scales ? per_scale.data() : nullptr};
  tokens = quantised(widened(x), frame, along, width, args.both);
  const int64_t kept = static_cast<int64_t>(tokens.screen.size());
  EncodeArgs& e = args.encode;
  e.x = tokens.x.const_data_ptr<float>();
  e.w = rows_.data();
  e.bias = bias_.const_data_ptr<float>();
  e.threshold = theta_.const_data_ptr<float>();
  e.T = kept, e.F = F, e.d = d;
  e.w_dtype = dtype_of(given.W_enc, "W_enc");
  e.half_bandwidth = bandwidth ? static_cast<float>(*bandwidth / 2) : 0.0f;
  e.ids = tokens.ids.empty() ? nullptr : tokens.ids.data();
  args.lane_stride = round_to(kept, kTileRows) | kTileRows;  // an odd number of lines, like the table
  // with both digits, a tile begins at every second token, and its load includes the next two
  lanes_.resize(4 * (kTokenPlanes + along.k) * args.lane_stride + 8);
  fill_lanes(tokens, args.both, lanes_.data(), args.lane_stride);
  table_ = bandwidth ? with_bandwidth(table, e.threshold, F, along.k, e.half_bandwidth) : table;
  args.lanes = lanes_.data();
  args.q1 = tokens.digits.const_data_ptr<int8_t>();
  args.q2 = args.both ? nullptr : args.q1 + round_to(kept, kTileRows) * width;
  args.tokens = tokens.screen.data();
  args.code = code.const_data_ptr<uint8_t>();
  args.code2 = code2 ? code2->const_data_ptr<uint8_t>() : nullptr;
  args.table = table_.const_data_ptr<float>();
  args.width = width, args.stride = stride, args.k = along.k;
  args.along = tokens.along.data();
  if (lanes_of_tokens) pack();
  rest = e;
  rest.T = T - kept;
  if (rest.T) rest.x = tokens.rest.const_data_ptr<float>(), rest.ids = tokens.rest_ids.data();
  const int workers = std::max(1, at::get_num_threads());
  features = !choices.mapped && (amx || T <= kLongChunks) ? chunk_features(F, workers) : kChunkFeatures;
}

void ScreenCall::pack() {
  const int64_t blocks = (args.encode.T + kLaneTokens - 1) / kLaneTokens;
  const int64_t block_lanes = (kPackedPlanes + args.k) * kLaneTokens;
  const int64_t block_digits = (args.both ? 2 : 1) * kLaneTokens * args.width;
  packed_.digits = new_tensor({blocks * block_digits}, at::kChar);
  packed_.lanes.resize(blocks * block_lanes);
  int8_t* digits = packed_.digits.mutable_data_ptr<int8_t>();
  run_chunks(blocks, [&](int, int64_t block) {
    kernel_.screen_pack(args, block, digits + block * block_digits,
                        packed_.lanes.data() + block * block_lanes);
  });
  args.packed = digits;
  args.packed_lanes = packed_.lanes.data();
}

void ScreenCall::floors_changed() {
  const int64_t block_lanes = (kPackedPlanes + args.k) * kLaneTokens;
  for (int64_t t = 0; t < args.encode.T; ++t) {
    const float floor = tokens.screen[t].floor;
    std::fill_n(&lanes_[4 * (kFloor * args.lane_stride + t)], 4, floor);
    if (args.packed) {
      packed_.lanes[t / kLaneTokens * block_lanes + kFloor * kLaneTokens + t % kLaneTokens] = floor;
    }
  }
}

CandidateSpan ScreenCall::screen(int64_t f0, int64_t f1, CandidateSink& space, ScreenStats& stats) const {
  if (!args.encode.T) return CandidateSpan{nullptr, nullptr};
  return kernel_.screen_pairs(args, f0, f1, space, stats);
}

void ScreenCall::finish(int64_t f0, int64_t f1, CandidateSpan pairs, ScreenStats& stats,
                        HitSink& sink) const {
  kernel_.refine_pairs(args, pairs, stats, sink);
  if (rest.T) kernel_.encode(rest, f0, f1, sink);
}

void ScreenCall::announce(CandidateSpan pairs) const {
  const EncodeArgs& e = args.encode;
  const int64_t bytes = e.d * (e.w_dtype == Dtype::f32 ? 4 : 2);
  PageAnnouncer pages;
  for (const Candidate* c = pairs.begin; c < pairs.end; ++c) {
    pages.range(static_cast<const char*>(e.w) + c->feature * bytes, bytes);
  }
}

at::Tensor stats_of(const std::vector<ScreenStats>& counts, int64_t unscreened) {
  at::Tensor stats = new_tensor({4}, at::kLong);
  int64_t* s = stats.mutable_data_ptr<int64_t>();
  std::fill_n(s, 4, 0);
  for (const ScreenStats& c : counts) s[0] += c.survivors, s[1] += c.refined, s[2] += c.violations;
  s[3] = unscreened;
  return stats;
}

}  // namespace gsf
