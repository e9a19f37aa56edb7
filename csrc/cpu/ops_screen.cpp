#include <torch/library.h>

#include "cpu/collect.h"
#include "cpu/screen_call.h"

namespace gsf {
namespace {

// Of mapped rows a chunk's candidates wait until all chunks are screened, unless they are more than this: 134
// MB at a million features, whatever the number of tokens.  A chunk with more has reads enough in flight of
// its own.
constexpr int64_t kMostWaiting = 256;
static_assert(kMostWaiting * sizeof(Candidate) * (1 << 20) / kChunkFeatures == 134217728, "as said");

// Screens all chunks and finishes each with the pairs that are left of it.  Where rows are mapped the disk
// fetches them while other chunks are screened.
template <typename ScreenFn, typename FinishFn>
void run_screened(const ScreenCall& call, int64_t chunks, const ScreenFn& screen, const FinishFn& finish) {
  if (!call.args.mapped) {
    run_chunks(chunks, [&](int worker, int64_t chunk) { finish(worker, chunk, screen(worker, chunk)); });
    return;
  }
  std::vector<std::vector<Candidate>> waiting(chunks);
  std::vector<char> finished(chunks);  // not bool: threads write neighbours
  run_chunks(chunks, [&](int worker, int64_t chunk) {
    const CandidateSpan pairs = screen(worker, chunk);
    call.announce(pairs);
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
  const ScreenTensors tensors{W_enc, b_enc, threshold, code, code2, table, centre, directions, scales};
  const ScreenCall call(x, tensors, {digits, bandwidth, mapped});
  const int64_t T = x.size(0), F = W_enc.size(1),
                chunks = T == 0 ? 0 : (F + call.features - 1) / call.features;
  const int workers = std::max(1, at::get_num_threads());
  HitCollector hits(workers, chunks);
  std::vector<CandidateBuffer> space(workers);
  std::vector<ScreenStats> counts(workers);
  const auto screen = [&](int worker, int64_t chunk) {
    const int64_t f0 = chunk * call.features, f1 = std::min(F, f0 + call.features);
    return call.screen(f0, f1, space[worker].sink, counts[worker]);
  };
  const auto finish = [&](int worker, int64_t chunk, CandidateSpan pairs) {
    const int64_t f0 = chunk * call.features, f1 = std::min(F, f0 + call.features);
    hits.fill(worker, chunk, [&](HitSink& sink) { call.finish(f0, f1, pairs, counts[worker], sink); });
  };
  run_screened(call, chunks, screen, finish);
  auto [crow, col, values] = hits.to_csr(T);
  return {crow, col, values, stats_of(counts, call.rest.T)};
}

TORCH_LIBRARY_IMPL(gemmascope_fast, CPU, m) { m.impl("encode_screened", encode_screened_cpu); }

}  // namespace
}  // namespace gsf
