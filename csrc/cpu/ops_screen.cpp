#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "cpu/collect.h"
#include "cpu/memory.h"
#include "cpu/screen_checks.h"

namespace gsf {
namespace {

// Up to this many tokens the first stage waits for memory: reading both digits of the activations was no
// slower at 1 and 4 tokens, and leaves fewer candidates; at 16 it took half as long again.
constexpr int64_t kBothDigits = 4;
// From so many tokens AMX multiplies: at 16 and below the codes are waited for, and VNNI was as fast or
// faster.  Of activations without scales it reads both digits, which took a fifth less time than the first
// and a second look at 256 real tokens; with scales, which leave a quarter of the false candidates, the first
// alone took 5 % less there, and 14 to 24 % less on 2304 x 16,384 at 64 to 1,024.
constexpr int64_t kAmxFewest = kLaneTokens + 1;
// From so many tokens AVX-512 multiplies with a token a lane (screen_lanes.h): at 16 it took 4 % less time on
// 2304 x 16,384, 27 % less on 3584 and 5 % more on 640 x 4,096; at 8, where half the lanes are empty, a fifth
// more.
constexpr int64_t kLanesFewest = kLaneTokens;
// Up to so many tokens chunks are long without AMX too: at 64 they made no difference, at 256 short ones,
// whose candidates are refined while the codes are near, took 3 % less time.
constexpr int64_t kLongChunks = 64;
// Of mapped rows a chunk's candidates wait until all chunks are screened, unless they are more than this: 134
// MB at a million features, whatever the number of tokens.  A chunk with more has reads enough in flight of
// its own.
constexpr int64_t kMostWaiting = 256;
static_assert(kMostWaiting * sizeof(Candidate) * (1 << 20) / kChunkFeatures == 134217728, "as said");

// The table's first bound against threshold - bandwidth / 2 in place of max(threshold, 0).
at::Tensor with_bandwidth(const at::Tensor& table, const float* theta, int64_t F, int64_t k, float half) {
  at::Tensor own = table.clone();
  const int64_t stride = own.size(1);
  float* p = own.mutable_data_ptr<float>();
  for (int64_t f = 0; f < F; ++f) {
    float& start = p[kStart * stride + f];
    if (start == std::numeric_limits<float>::infinity()) continue;
    const double edge = std::min(std::max<double>(theta[f], 0.0), static_cast<double>(theta[f]) - half);
    const double exact = static_cast<double>(p[kCentredBias * stride + f]) + p[kSlack * stride + f] - edge;
    // the epilogue's roundings, as the builder has them for tau
    const double roomy = exact + start_steps(k) * std::fabs(edge);
    const float near = static_cast<float>(roomy);
    start = near >= roomy ? near : std::nextafter(near, std::numeric_limits<float>::infinity());
  }
  return own;
}

struct Tokens {
  at::Tensor x;                     // [T][d] of the tokens that are screened
  at::Tensor digits;                // as ScreenArgs::q1 says, and after it q2
  std::vector<ScreenToken> screen;  // [T]
  std::vector<float> along;         // [T][k]
  int64_t k = 0;
  std::vector<int32_t> ids;       // [T]; empty where all are screened
  at::Tensor rest;                // [R][d] of the others
  std::vector<int32_t> rest_ids;  // [R]
};

// A token's numbers (TokenPlane) and coefficients four times each, as the tiles of four features read them.
void fill_lanes(const Tokens& tokens, bool both, float* lanes, int64_t stride) {
  for (size_t t = 0; t < tokens.screen.size(); ++t) {
    const ScreenToken& k = tokens.screen[t];
    const float* along = tokens.along.data() + t * tokens.k;
    for (int64_t j = 0; j < tokens.k; ++j) {
      std::fill_n(&lanes[4 * ((kTokenPlanes + j) * stride + static_cast<int64_t>(t))], 4, along[j]);
    }
    for (int copy = 0; copy < 4; ++copy) {
      for (int plane = kUnit; plane <= kTokenError; ++plane) {
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

// What is fixed of a call's activations before they are rounded: centre and inverse scales, [d] or null.
struct Frame {
  const float* mu;
  const float* per_scale;
};

Tokens quantised(const at::Tensor& x, const Frame& frame, const Directions& along, int64_t width, bool both) {
  const int64_t T = x.size(0), d = x.size(1), second = round_to(T, kTileRows) * width;
  Tokens out;
  out.x = x;
  out.digits = new_tensor({both ? round_to(T, 2) * 2 * width : 2 * second}, at::kChar);
  out.screen.resize(T);
  out.k = along.k;
  out.along.resize(T * along.k);
  int8_t* q = out.digits.mutable_data_ptr<int8_t>();
  std::fill_n(q, out.digits.numel(), int8_t{0});  // not memset: of no tokens there is no address
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
  // rare: NaN, infinities, or nothing at all; the others close ranks
  Tokens kept = quantised(chosen_rows(x, out.ids), frame, along, width, both);
  kept.ids = std::move(out.ids);
  kept.rest = chosen_rows(x, out.rest_ids);
  kept.rest_ids = std::move(out.rest_ids);
  return kept;
}

// The tokens' digits and numbers with a token a lane.
struct Packed {
  at::Tensor digits;
  std::vector<float> lanes;
};

void pack(ScreenArgs& a, const Kernels& kernel, Packed& out) {
  const int64_t blocks = (a.encode.T + kLaneTokens - 1) / kLaneTokens;
  const int64_t block_lanes = (kPackedPlanes + a.k) * kLaneTokens;
  const int64_t block_digits = (a.both ? 2 : 1) * kLaneTokens * a.width;
  out.digits = new_tensor({blocks * block_digits}, at::kChar);
  out.lanes.resize(blocks * block_lanes);
  int8_t* digits = out.digits.mutable_data_ptr<int8_t>();
  run_chunks(blocks, [&](int, int64_t block) {
    kernel.screen_pack(a, block, digits + block * block_digits, out.lanes.data() + block * block_lanes);
  });
  a.packed = digits;
  a.packed_lanes = out.lanes.data();
}

// Features of a chunk: the more, the less often a stream of codes breaks off, whose next 8 KiB the hardware
// had begun to fetch for the worker that does not go on there (2304 x 16,384 took 4 to 12 % less time at 1 to
// 16 tokens than in chunks of kChunkFeatures, 640 x 4,096 a sixth less), and with AMX the less often the
// tokens' digits come from the last cache.  But at least eight chunks a worker, which are not equally fast.
int64_t chunk_features(int64_t F, int workers) {
  int64_t features = kChunkFeatures;
  while (2 * features <= kMostChunk && F / (2 * features) >= 8 * workers) features *= 2;
  return features;
}

// The pairs' rows are on their way when this returns.
void announce_pairs(const EncodeArgs& e, CandidateSpan pairs) {
  const int64_t bytes = e.d * (e.w_dtype == Dtype::f32 ? 4 : 2);
  PageAnnouncer pages;
  for (const Candidate* c = pairs.begin; c < pairs.end; ++c) {
    pages.range(static_cast<const char*>(e.w) + c->feature * bytes, bytes);
  }
}

// Screens all chunks and finishes each with the pairs that are left of it.  Where rows are mapped the disk
// fetches them while other chunks are screened.
template <typename ScreenFn, typename FinishFn>
void run_screened(const EncodeArgs& e, bool mapped, int64_t chunks, const ScreenFn& screen,
                  const FinishFn& finish) {
  if (!mapped) {
    run_chunks(chunks, [&](int worker, int64_t chunk) { finish(worker, chunk, screen(worker, chunk)); });
    return;
  }
  std::vector<std::vector<Candidate>> waiting(chunks);
  std::vector<char> finished(chunks);  // not bool: threads write neighbours
  run_chunks(chunks, [&](int worker, int64_t chunk) {
    const CandidateSpan pairs = screen(worker, chunk);
    announce_pairs(e, pairs);
    if (pairs.end - pairs.begin > kMostWaiting) {
      finish(worker, chunk, pairs);
      finished[chunk] = 1;
    } else {
      waiting[chunk].assign(pairs.begin, pairs.end);
    }
  });
  run_chunks(chunks, [&](int worker, int64_t chunk) {
    const std::vector<Candidate>& pairs = waiting[chunk];
    if (!finished[chunk]) finish(worker, chunk, CandidateSpan{pairs.data(), pairs.data() + pairs.size()});
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> encode_screened_cpu(
    const at::Tensor& x, const at::Tensor& W_enc, const at::Tensor& b_enc, const at::Tensor& threshold,
    const at::Tensor& code, const std::optional<at::Tensor>& code2, const at::Tensor& table,
    const std::optional<at::Tensor>& centre, int64_t digits, std::optional<double> bandwidth,
    const std::optional<at::Tensor>& directions, bool mapped, const std::optional<at::Tensor>& scales) {
  check_float(x, "x");
  check_cpu(x, "x");
  check_sizes(W_enc, b_enc, threshold);
  const int64_t d = W_enc.size(0), F = W_enc.size(1), width = round_to(d, 64), stride = table_stride(F);
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) == d, "x: expected [N, d_in = ", d, "], got ", x.sizes());
  TORCH_CHECK_VALUE(x.size(0) < INT32_MAX && F < INT32_MAX, "x: more than 2^31 tokens or features");
  const int64_t tiles = (F + kTileRows - 1) / kTileRows, steps = width / kTileColumns;
  check_shape(code, {tiles, steps, kTileRows, kTileColumns}, "code");
  const Directions along = of_call(directions, d);
  check_shape(table, {kScreenRows + along.k, stride}, "table");
  if (code2) check_shape(*code2, code.sizes(), "code2");
  check_centre(centre, d);
  const std::vector<float> per_scale = inverse_scales(scales, d);
  TORCH_CHECK_TYPE(code.scalar_type() == at::kByte && (!code2 || code2->scalar_type() == at::kByte) &&
                       table.scalar_type() == at::kFloat,
                   "code, code2, table: expected uint8, uint8 and float32");
  TORCH_CHECK_VALUE(code.is_contiguous() && (!code2 || code2->is_contiguous()) && table.is_contiguous(),
                    "code, code2, table: expected contiguous tensors");
  TORCH_CHECK_VALUE(digits >= 0 && digits <= 2, "digits: expected 0 (choose), 1 or 2, got ", digits);
  TORCH_CHECK_VALUE(!bandwidth || *bandwidth > 0, "bandwidth: expected a positive number, got ",
                    bandwidth.value_or(0));

  const at::Tensor bias = widened(b_enc), theta = widened(threshold);
  const Rows rows(W_enc);
  ScreenArgs a{};
  const int64_t T = x.size(0);
  a.adaptive = digits == 0;
  a.mapped = mapped;
  const Kernels& kernel = kernels();
  const bool amx = kernel.has_amx && T >= kAmxFewest;
  a.both = a.adaptive ? T <= kBothDigits || (amx && !scales) : digits == 2;
  const bool lanes_of_tokens = amx || (kernel.screen_pack && !a.both && T >= kLanesFewest);
  const Frame frame{centre ? centre->const_data_ptr<float>() : nullptr, scales ? per_scale.data() : nullptr};
  const Tokens tokens = quantised(widened(x), frame, along, width, a.both);
  const int64_t kept = static_cast<int64_t>(tokens.screen.size());
  EncodeArgs& e = a.encode;
  e.x = tokens.x.const_data_ptr<float>();
  e.w = rows.data();
  e.bias = bias.const_data_ptr<float>();
  e.threshold = theta.const_data_ptr<float>();
  e.T = kept, e.F = F, e.d = d;
  e.w_dtype = dtype_of(W_enc, "W_enc");
  e.half_bandwidth = bandwidth ? static_cast<float>(*bandwidth / 2) : 0.0f;
  e.ids = tokens.ids.empty() ? nullptr : tokens.ids.data();
  a.lane_stride = round_to(kept, kTileRows) | kTileRows;  // odd in lines, as the table's
  // with both digits a tile begins at every second token and its load takes in the two after it
  std::vector<float> lanes(4 * (kTokenPlanes + along.k) * a.lane_stride + 8);
  fill_lanes(tokens, a.both, lanes.data(), a.lane_stride);
  const at::Tensor own_table =
      bandwidth ? with_bandwidth(table, e.threshold, F, along.k, e.half_bandwidth) : table;
  a.lanes = lanes.data();
  a.q1 = tokens.digits.const_data_ptr<int8_t>();
  a.q2 = a.both ? nullptr : a.q1 + round_to(kept, kTileRows) * width;
  a.tokens = tokens.screen.data();
  a.code = code.const_data_ptr<uint8_t>();
  a.code2 = code2 ? code2->const_data_ptr<uint8_t>() : nullptr;
  a.table = own_table.const_data_ptr<float>();
  a.width = width, a.stride = stride, a.k = along.k;
  a.along = tokens.along.data();
  Packed packed;
  if (lanes_of_tokens) pack(a, kernel, packed);
  EncodeArgs rest = e;
  rest.T = T - kept;
  if (rest.T) rest.x = tokens.rest.const_data_ptr<float>(), rest.ids = tokens.rest_ids.data();

  const int workers = std::max(1, at::get_num_threads());
  const int64_t features = !mapped && (amx || T <= kLongChunks) ? chunk_features(F, workers) : kChunkFeatures;
  const int64_t chunks = T == 0 ? 0 : (F + features - 1) / features;
  HitCollector hits(workers, chunks);
  std::vector<CandidateBuffer> space(workers);
  std::vector<ScreenStats> counts(workers);
  const auto screen = [&](int worker, int64_t chunk) {
    const int64_t f0 = chunk * features, f1 = std::min(F, f0 + features);
    if (!kept) return CandidateSpan{nullptr, nullptr};
    return kernel.screen_pairs(a, f0, f1, space[worker].sink, counts[worker]);
  };
  const auto finish = [&](int worker, int64_t chunk, CandidateSpan pairs) {
    const int64_t f0 = chunk * features, f1 = std::min(F, f0 + features);
    hits.fill(worker, chunk, [&](HitSink& sink) {
      kernel.refine_pairs(a, pairs, counts[worker], sink);
      if (rest.T) kernel.encode(rest, f0, f1, sink);
    });
  };
  run_screened(e, mapped, chunks, screen, finish);
  at::Tensor stats = new_tensor({4}, at::kLong);
  int64_t* s = stats.mutable_data_ptr<int64_t>();
  std::fill_n(s, 4, 0);
  for (const ScreenStats& c : counts) s[0] += c.survivors, s[1] += c.refined, s[2] += c.violations;
  s[3] = rest.T;
  auto [crow, col, values] = hits.to_csr(T);
  return {crow, col, values, stats};
}

TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { m.impl("encode_screened", encode_screened_cpu); }

}  // namespace
}  // namespace gsf
