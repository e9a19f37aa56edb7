# ruff: noqa: E501
"""Breaks of the code that the tests must notice: one line each, what it is, where, and which tests should see it."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """`old` must stand exactly once in the file (a stale entry is an error)."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    needs: str = ""  # the instruction set that the line is for: elsewhere nothing could notice


ENCODE, DECODE, DOTS = "tests/ops/test_encode.py", "tests/ops/test_decode.py", "tests/ops/test_sampled_dot.py"
SAE, LATENTS, TRANSPOSE = "tests/sae/test_sae.py", "tests/ops/test_latents.py", "tests/ops/test_transpose.py"
BAD = "tests/sae/test_sae_bad_input.py"
PREPARE, BACKENDS = "tests/sae/test_prepare.py", "tests/backends/test_backends.py"

SCREEN, REFINE, BUILD = "csrc/cpu/screen.h", "csrc/cpu/screen_refine.h", "csrc/cpu/screen_build.h"
AMX, LANES = "csrc/cpu/screen_amx.h", "csrc/cpu/screen_lanes.h"
EPILOGUE, TERMS = "csrc/cpu/screen_epilogue.h", "csrc/cpu/screen_terms.h"
SCREENED = "tests/sae/test_screen.py tests/ops/test_screen_bound.py tests/ops/test_screen_rows.py tests/sae/test_screen_prepare.py"
SCALED, BOUND, FORGED = (
    "tests/sae/test_screen_scales.py",
    "tests/ops/test_screen_bound.py",
    "tests/ops/test_screen_forged.py",
)
TOPK_DRIVER, GREATEST = "csrc/cpu/ops_topk.cpp", "csrc/cpu/greatest.cpp"
TOPK = "tests/ops/test_encode_topk.py tests/sae/test_topk.py"
SCREENED_BY_AMX = f"{SCREENED} -k amx"

GPU_SCREEN = "tests/backends/test_triton_interpreter.py -k test_screen"

UNIT, NESTED, KERNELS = "csrc/cpu/matryoshka_unit.h", "csrc/cpu/matryoshka.h", "tests/ops/test_matryoshka_kernels.py"

PACKED = (
    "tests/checkpoints/test_packed.py tests/checkpoints/test_packed_damage.py tests/checkpoints/test_packed_memory.py"
)
FORGED, HOSTILE = "tests/checkpoints/test_checkpoints_forged.py", "tests/checkpoints/test_checkpoints_hostile.py"
FIELDS, HUB = "tests/checkpoints/test_checkpoints_fields.py", "tests/checkpoints/test_hub.py"
LOADERS = "gemmascope_fast/checkpoints/"
TORCH_ZIP, PREFIX = "tests/files/test_torch_zip.py", "tests/sae/test_prefix.py"
PUBLIC, PUBLIC_TOPK = "tests/checkpoints/test_public_formats.py", "tests/checkpoints/test_public_topk.py"
INVENTED, NEURONPEDIA = "tests/checkpoints/test_invented_kind.py", "tests/checkpoints/test_neuronpedia.py"
COMPARE = "tests/analysis/test_compare.py tests/analysis/test_compare_models.py tests/analysis/test_variants.py tests/analysis/test_conversation.py"
CONCEPTS, DASHBOARD = "tests/analysis/test_concepts.py", "tests/analysis/test_dashboard.py"
DERIVATIVES, AUTOCAST = "tests/ops/test_derivatives.py", "tests/ops/test_autocast.py"
TENSORS = "tests/ops/test_latents_as_tensors.py"
SITES, ORIGIN = "tests/attach/test_sites.py", "tests/attach/test_origin.py"
EXTRACTION, JOBS = "tests/analysis/test_extraction.py", "tests/analysis/test_jobs_bad_input.py"
IDENTITY, CRASH, ERRORS = (
    "tests/files/test_identity.py",
    "tests/files/test_crash_points.py",
    "tests/analysis/test_jobs_errors.py",
)

CPP = [
    # nested codes: sums of 16 bits, slices, groups
    Mutation("codes of 6 bits are summed like those of 4", UNIT, "GSF_LEVEL == 1 && R > 4", "GSF_LEVEL == 1 && R > 6", KERNELS, "avx2"),
    Mutation("the upper half of a code counts half", UNIT, "add_widened(half[t], high[t], _mm256_set1_epi16(16))", "add_widened(half[t], high[t], _mm256_set1_epi16(8))", KERNELS, "avx2"),
    Mutation("one token's upper halves are lost", UNIT, "add_widened(sum->hi, high[1], sixteen);", ";", KERNELS, "avx2"),
    Mutation("rows 8 to 15 are rows 0 to 7", UNIT, "wide_half_dots<TT>(code + 32, x, width, hi)", "wide_half_dots<TT>(code, x, width, hi)", KERNELS, "avx2"),
    Mutation("a narrow unit's rows 8 to 15 are rows 0 to 7", UNIT, "add_words(hi[t], _mm256_maddubs_epi16(c.hi, q));", "add_words(hi[t], _mm256_maddubs_epi16(c.lo, q));", KERNELS, "avx2"),
    Mutation("a code above the top is not added", NESTED, "raw[k / 4 * 64 + lane * 4 + k % 4] += 1;", "raw[k / 4 * 64 + lane * 4 + k % 4] += 0;", KERNELS),
    Mutation("a slice is not rounded", NESTED, "c = min64(halve_up64(c), a.top);", "c = min64(mask64(shift_right64(c, 1), 127), a.top);", KERNELS),
    Mutation("small groups forget the middle of a cell", NESTED, "fma16(alpha, add16(set16(a.mid), to_float16(imul16(zero, -1))), zero16());", "fma16(alpha, to_float16(imul16(zero, -1)), zero16());", KERNELS),
    # tiles of the screen for sixteen registers
    Mutation("rows 2 and 3 read digits of rows 0 and 1", SCREEN, "screen_rows_of<0, 2>(q + 2 * kTileColumns, kTileColumns", "screen_rows_of<0, 2>(q, kTileColumns", SCREENED, "avx2"),
    Mutation("half of the columns are left out", SCREEN, "for (int half = 0; half < 64; half += 32)", "for (int half = 0; half < 32; half += 32)", SCREENED, "avx2"),
    Mutation("odd digits are lost", "csrc/cpu/screen_vec.h", "_mm256_madd_epi16(code.odd, digit.odd)))", "_mm256_madd_epi16(code.odd, code.odd)))", SCREENED, "avx2"),
    Mutation("a pair's upper halves are left out", REFINE, "acc[i] = _mm256_add_epi32(lo, hi);", "acc[i] = lo;", SCREENED, "avx2"),
    # the certified screen: every term of the bound, every stage
    Mutation("no rounding of the deciding dot in the bound", BUILD, "double rounding = dot_kappa(d) * norm_x +", "double rounding =", SCREENED),
    Mutation("half of the error of the rows", BUILD, "round_up(error * kUp)", "round_up(0.5 * error * kUp)", SCREENED),
    Mutation("half of the norm of the rows", BUILD, "round_up((norm > across ? norm : across) * kUp)", "round_up(0.5 * norm * kUp)", SCREENED),
    Mutation("half of the error of the first digits", BUILD, "out.error = round_up((l1 +", "out.error = round_up((0.5 * l1 +", SCREENED),
    Mutation("half of the error of both digits", BUILD, "out.error2 = round_up((l2 +", "out.error2 = round_up((0.5 * l2 +", SCREENED),
    Mutation("NaN is discarded by the screen", "csrc/cpu/screen_vec.h", "a.v, floor.v, _CMP_NLE_UQ", "a.v, floor.v, _CMP_GT_OQ", SCREENED),
    Mutation("an activation's norm is without scales", BUILD, "dmul16(dwiden16(x), dwiden16(per))", "dwiden16(x)", SCALED),
    Mutation("activations are not divided by their scales", BUILD, "mul16(sub16(x, columns16(a.mu, k, d, 0.0f)), per)", "sub16(x, columns16(a.mu, k, d, 0.0f))", SCALED),
    Mutation("the centre keeps its scale in b'", BUILD, "dmul16(mu, dwiden16(columns16(a.per_scale, k, a.d, 1.0f)))", "mu", SCALED),
    Mutation("the centre's norm is without scales", BUILD, "dmul16(dwiden16(mu), dwiden16(per))", "dwiden16(mu)", SCALED),
    Mutation("rows are not scaled", BUILD, "space[k] *= a.scale[k]", "space[k] *= 1.0f", SCALED),
    Mutation("a given scale may be anything", BUILD, "  if (a.given && !(s >= kLeastGiven && s <= kMostGiven)) return refine_always(a, f);\n", "", "tests/ops/test_screen_rows.py"),
    Mutation("a given code is not read in the last columns", BUILD, "k + i < d ? static_cast<float>(codes[k + i]) : zero", "zero", "tests/ops/test_screen_rows.py"),
    Mutation("scales may be any number", "csrc/cpu/screen_checks.h", "(bits & 0x7FFFFF) == 0 && ", "", SCALED),
    Mutation("scales may be below one", "csrc/cpu/screen_checks.h", "s[i] >= 1.0f", "s[i] >= 0.25f", SCALED),
    Mutation("scales may be above 2^20", "csrc/cpu/screen_checks.h", "s[i] <= kMostScale", "s[i] <= 8 * kMostScale", SCALED),
    Mutation("tokens of nothing are screened", BUILD, "top >= kTiny && ", "", SCREENED),
    Mutation("the zero point is forgotten", EPILOGUE, "isub16(sums, imul16(to_int16(zero), digit_sums))", "sums", SCREENED),
    Mutation("the epilogue forgets the rows' error", EPILOGUE, "m = fma16(feature.row(kError), token.plane(kReach), m);", "", SCREENED),
    Mutation("the epilogue forgets the rows' norm", EPILOGUE, "m = fma16(feature.row(kNorm), token.plane(kTokenError), m);", "", SCREENED),
    Mutation("the second digits of a token are lost", SCREEN, "n2[i] = n[8 + i];", "n2[i] = 0 * n[8 + i];", SCREENED),
    Mutation("violations are not counted", REFINE, "++stats.violations;", ";", SCREENED),
    # terms without which hardly any problem goes wrong
    Mutation("no underflow in the bound", BUILD, "static_cast<double>(a.d) * kUnderflow", "0.0", BOUND),
    Mutation("one step of the epilogue for seven", TERMS, "return kTokenSteps * kU +", "return kU +", BOUND),
    Mutation("the second digit's bound has the norm of the first digits", REFINE, "kError2, token.reach2,", "kError2, token.reach,", BOUND),
    Mutation("a bandwidth has no slack for the epilogue", "csrc/cpu/screen_call.cpp", "start_steps(k) * std::fabs(edge)", "0.0 * std::fabs(edge)", BOUND),
    Mutation("the certificate is 1,000 times looser", REFINE, "<= c[p].bound)", "<= 1000 * c[p].bound)", BOUND),
    Mutation("another number in C++ than in Python", TERMS, "kStartSteps = 5", "kStartSteps = 6", "tests/ops/test_screen_terms.py"),
    # a forged screen
    Mutation("features that are not there are found", EPILOGUE, "a.encode.F - f < kTileRows ?", "a.encode.F - f < 0 ?", FORGED),
    Mutation("the second digit's bound is nothing", REFINE, "kError2, token.reach2,", "kError2, 0.0 * token.reach2,", SCREENED),
    Mutation("no rounding along the directions in the bound", BUILD, "coefficient_steps(a.k, a.frobenius) * norm_c", "0.0", SCREENED),
    Mutation("the directions are not added back", EPILOGUE, "feature.row(kScreenRows + j), token.coefficient(j), m)", "zero16(), token.coefficient(j), m)", SCREENED),
    Mutation("the second look stays where it discards little", REFINE, "2 * stats.looked_out > stats.looked", "2 * stats.looked_out < stats.looked", SCREENED),
    Mutation("the second look forgets the zero point", REFINE, "features.row(kZero), load16i(digit_sums)", "zero16(), load16i(digit_sums)", SCREENED),
    Mutation("the second look drops the last of a group", REFINE, "((1u << count) - 1); left; left", "((1u << (count - 1)) - 1); left; left", SCREENED),
    Mutation("the last candidates are dropped", REFINE, "for (const Candidate* c = begin; c < end; c += 4) {", "for (const Candidate* c = begin; c + 4 <= end; c += 4) {", SCREENED),
    Mutation("the second digit of mapped rows is given up", REFINE, "(!a.adaptive || a.mapped ||", "(!a.adaptive ||", SCREENED),
    Mutation("crowded chunks of mapped rows are lost", "csrc/cpu/ops_screen.cpp", "      finish(worker, chunk, pairs);\n      finished", "      finished", SCREENED),
    Mutation("mapped rows are not announced", "csrc/cpu/ops_screen.cpp", "    call.announce(pairs);", "", PACKED),
    Mutation("rows with gaps between them are read without", "csrc/cpu/ops_common.cpp", "(W.stride(1) == W.size(0) || W.size(1) < 2)", "true", ENCODE),
    Mutation("a matrix of columns is read as rows", "csrc/cpu/ops_common.cpp", "= W.stride(0) == 1 &&", "=", ENCODE),
    # top-k: floors, ties, and what the screen cannot judge
    Mutation("a floor is taken of one pair too few", TOPK_DRIVER, "static_cast<int64_t>(lows.size()) < wanted_ ? 0.0f", "static_cast<int64_t>(lows.size()) + 1 < wanted_ ? 0.0f", TOPK),
    Mutation("a floor is of upper bounds", TOPK_DRIVER, "c.z - c.bound), -std", "c.z + c.bound), -std", TOPK),
    Mutation("pairs that the screen cannot judge are thinned", TOPK_DRIVER, "return judged && c.z", "return c.z", TOPK),
    Mutation("the batch's floor is one token's", TOPK_DRIVER, "wanted_(together ? tokens * k : k)", "wanted_(k)", TOPK),
    Mutation("the last range of features is not screened", TOPK_DRIVER, "phase + 1 < pieces.phases.size()", "phase + 2 < pieces.phases.size()", TOPK),
    Mutation("floors never reach the first stage", TOPK_DRIVER, "    call.floors_changed();", "", TOPK),
    Mutation("all of equal values are taken", GREATEST, "cut.equal-- > 0", "cut.equal > 0", TOPK),
    Mutation("equal values are not counted", GREATEST, "return {key, k - above};", "return {key, k - above - 1};", TOPK),
    Mutation("a token's candidates are judged by thresholds alone", REFINE, "a.ranked ? a.tokens[c.token].floor : ", "", TOPK),
    # its first stage with a token a lane: on AVX-512, and what AMX shares of it
    Mutation("a token a lane forgets the zero point", LANES, "less_zero16(acc[f][n], feature.row(kZero), tokens.digit_sums(kDigitSum))", "acc[f][n]", SCREENED, "avx512"),
    Mutation("a token a lane takes a sum of digits for a coefficient", EPILOGUE, "plane(kPackedPlanes + j)", "plane(kTokenPlanes + j)", SCREENED, "avx512"),
    Mutation("tokens that are not there are screened", LANES, "left < kLaneTokens ? (1u << left) - 1 : 0xFFFFu", "left < 0 ? 0u : 0xFFFFu", SCREENED, "avx512"),
    Mutation("a token a lane finds features that are not there", LANES, "f < a.encode.F ? tokens : 0", "f < 0 ? 0 : tokens", FORGED, "avx512"),
    Mutation("a token a lane leaves out the last columns", LANES, "step < a.width; step += kTileColumns) {\n    for (int64_t line", "step + kTileColumns < a.width; step += kTileColumns) {\n    for (int64_t line", SCREENED, "avx512"),
    Mutation("a panel's second tile is its first", LANES, "code + f / kTileRows * kTileRows * a.width +", "code +", SCREENED, "avx512"),
    Mutation("the second vector of tokens is the first", LANES, "load_digits64(digits + n * vector)", "load_digits64(digits + n * 0)", SCREENED, "avx512"),
    Mutation("the last block of tokens is left out", LANES, "b1 = (group + 1) * blocks / groups;", "b1 = (group + 1) * blocks / groups - (blocks > 1);", SCREENED, "avx512"),
    # and on AMX
    Mutation("AMX forgets the zero point of the second digits", AMX, "tokens.digit_sums(kDigitSum2)", "tokens.digit_sums(kDigitSum)", SCREENED_BY_AMX, "amx"),
    Mutation("AMX screens tokens that are not there", AMX, "joined16(m1, m2)) & tokens_of(a, block, f)", "joined16(m1, m2))", SCREENED_BY_AMX, "amx"),
    Mutation("AMX drops the last rows of a panel", AMX, "row < rows; ++row", "row + 1 < rows; ++row", SCREENED_BY_AMX, "amx"),
    Mutation("AMX exchanges neighbours", AMX, "kTileRows * row + 2 * pair + half;", "kTileRows * row + 2 * pair + 1 - half;", SCREENED_BY_AMX, "amx"),
    Mutation("AMX leaves out the last columns", AMX, "step < steps; ++step) {\n      for (int64_t line", "step + 1 < steps; ++step) {\n      for (int64_t line", SCREENED_BY_AMX, "amx"),
    Mutation("AMX screens tokens that have no first digits", AMX, "to_float16(m1)) & tokens_of(a, block, f)", "to_float16(m1))", SCREENED_BY_AMX, "amx"),
    Mutation("AMX forgets the zero point of the first digits", AMX, "int32_t* n1, CandidateSink& out) {\n  const OneFeature feature = one_feature(a, f);\n  const TokenBlock tokens = token_block(a, block);\n  const I16 m1 = less_zero16(load16i(n1), feature.row(kZero), tokens.digit_sums(kDigitSum));", "int32_t* n1, CandidateSink& out) {\n  const OneFeature feature = one_feature(a, f);\n  const TokenBlock tokens = token_block(a, block);\n  const I16 m1 = load16i(n1);", SCREENED_BY_AMX, "amx"),
    Mutation("AMX takes the first block's sums for the second's", AMX, "n[2 * half + b][row]", "n[2 * half][row]", SCREENED_BY_AMX, "amx"),
    Mutation("AMX leaves out a lone last block", AMX, "(blocks + kBlocks - 1) / kBlocks", "blocks / kBlocks", SCREENED_BY_AMX, "amx"),
    # the comparison
    Mutation("z >= threshold fires", "csrc/cpu/encode.h", "return !(z <= (", "return !(z < (", ENCODE),
    Mutation(
        "a negative threshold lets negative z fire",
        "csrc/cpu/encode.h",
        "(threshold > 0.0f ? threshold : 0.0f)",
        "threshold",
        ENCODE,
    ),
    Mutation("NaN does not fire", "csrc/cpu/encode.h", "return !(z <= (", "return (z > (", ENCODE),
    Mutation("NaN keeps its payload", "csrc/cpu/encode.h", "return z == z ? z : __builtin_nanf", "return z == z ? z : -__builtin_nanf", ENCODE),
    Mutation("half the bandwidth", "csrc/cpu/encode.h", "< a.half_bandwidth", "< 0.5f * a.half_bandwidth", ENCODE),
    Mutation("the bias of the neighbour", "csrc/cpu/encode.h", "+ a.bias[f0 + f]", "+ a.bias[f0]", ENCODE),
    # the dot
    Mutation("no tail of the dot", "csrc/cpu/dot.h", "if (whole < d) {\n    V16 wk[FF];", "if (false) {\n    V16 wk[FF];", ENCODE),
    Mutation("one lane group too few", "csrc/cpu/dot.h", "k < whole; k += 16) {\n    V16 wk", "k + 16 < whole; k += 16) {\n    V16 wk", ENCODE),
    Mutation("two roundings in plain C++", "csrc/cpu/vec.h", "c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i])", "c.v[i] += a.v[i] * b.v[i]", ENCODE),
    Mutation("two roundings in AVX2", "csrc/cpu/vec.h", "{_mm256_fmadd_ps(a.lo, b.lo, c.lo), ", "{_mm256_add_ps(_mm256_mul_ps(a.lo, b.lo), c.lo), ", ENCODE),
    Mutation("another fold in plain C++", "csrc/cpu/vec.h", "for (int half = 8; half > 0; half /= 2) {\n    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];", "for (int half = 1; half < 16; half *= 2) {\n    for (int i = 0; i + half < 16; i += 2 * half) a.v[i] += a.v[i + half];", ENCODE),
    Mutation("bf16 loses its lowest bit", "csrc/cpu/half.h", "static_cast<uint32_t>(h.bits) << 16", "static_cast<uint32_t>(h.bits & 0xFFFEu) << 16", ENCODE),
    Mutation("fp16 subnormals are zero", "csrc/cpu/half.h", "const float magnitude = static_cast<float>(mantissa)", "const float magnitude = 0.0f * static_cast<float>(mantissa)", DOTS),
    Mutation("workers keep flush to zero", "csrc/cpu/parallel.h", "saved_ & ~0x8040u", "saved_", ENCODE),
    Mutation("the caller loses its flush to zero", "csrc/cpu/parallel.h", "{ _mm_setcsr(saved_); }", "{ _mm_setcsr(saved_ & ~0x8040u); }", ENCODE),
    # compaction
    Mutation("the last feature of a group is dropped", "csrc/cpu/encode.h", "for (; f < f1; ++f) encode_tile", "for (; f + 1 < f1; ++f) encode_tile", ENCODE),
    Mutation("the last tokens are dropped", "csrc/cpu/encode.h", "case 3:\n      return encode_tokens<3, E>", "case 3:\n      return encode_tokens<2, E>", ENCODE),
    Mutation("rows are unsorted across chunks", "csrc/cpu/collect.cpp", "for (const Span& span : spans_) {", "for (size_t s = spans_.size(); s-- > 0;) {\n    const Span& span = spans_[s];", ENCODE),
    Mutation("a hit is stored twice over its neighbour", "csrc/cpu/collect.cpp", "= next[hits[i].token]++;", "= next[hits[i].token]; next[hits[i].token] += i % 2;", ENCODE),
    # decode
    Mutation("no tail of the columns", "csrc/cpu/decode.h", "if (k < d1) decode_tail", "if (false) decode_tail", DECODE),
    Mutation("features descending", "csrc/cpu/decode.h", "const V16 value = set16(scaled_value(a, i));\n    const E* row = w + a.col[i] * a.d;", "const int64_t r = begin + end - 1 - i;\n    const V16 value = set16(scaled_value(a, r));\n    const E* row = w + a.col[r] * a.d;", DECODE),
    Mutation("the bias twice in the tail", "csrc/cpu/decode.h", "if (a.bias) acc = add16(acc, load16_tail(a.bias + k, count));", "if (a.bias) acc = add16(add16(acc, load16_tail(a.bias + k, count)), load16_tail(a.bias + k, count));", DECODE),
    Mutation("the scale is ignored", "csrc/cpu/decode.h", "a.row_scale ? a.values[i] * a.row_scale[a.col[i]]", "false ? 0.0f", DECODE),
    Mutation("int8 read as unsigned in plain C++", "csrc/cpu/vec.h", "for (int i = 0; i < 16; ++i) r.v[i] = p[i];", "for (int i = 0; i < 16; ++i) r.v[i] = static_cast<uint8_t>(p[i]);", DECODE),
    Mutation("an index one past the end passes", "csrc/cpu/ops_common.cpp", "f >= features;", "f > features;", DECODE),
    Mutation("a negative index passes", "csrc/cpu/ops_common.cpp", "f < 0 || ", "", DECODE),
    # sampled dot and transpose
    Mutation("no bias in sampled_dot", "csrc/cpu/sampled_dot.h", "a.bias ? z[f] + a.bias[a.col[i + f]] : z[f]", "z[f]", DOTS),
    Mutation("a short group reads its first row", "csrc/cpu/sampled_dot.h", "(f < count ? f : count - 1)", "(count == 4 ? f : 0)", DOTS),
    Mutation("the transpose is unstable", "csrc/cpu/ops_decode.cpp", "for (int64_t i = p[n]; i < p[n + 1]; ++i) {\n      const int64_t at", "for (int64_t i = p[n + 1] - 1; i >= p[n]; --i) {\n      const int64_t at", TRANSPOSE),
]  # fmt: skip

PYTHON = [
    Mutation("dW_dec without the gradient", "gemmascope_fast/ops/decode.py", "values[order], grad, None", "values, grad, None", DECODE),
    Mutation("dx counts twice", "gemmascope_fast/ops/decode.py", "decode.step(crow, col, grad, rows,", "decode.step(crow, col, 2 * grad, rows,", ENCODE),
    Mutation("db of the wrong order", "gemmascope_fast/ops/decode.py", "by_feature = grad[order]", "by_feature = grad", ENCODE),
    Mutation("a threshold is not checked again", "gemmascope_fast/sae/weights.py", "    check_threshold(weights.threshold)\n", "", PREPARE),
    Mutation("in-place edits are not watched", "gemmascope_fast/sae/weights.py", "None if t.is_inference() else t._version", "None", PREPARE),
    Mutation("topk prefers the later of equals", "gemmascope_fast/ops/latents_reduce.py", "by_value = torch.sort(values.detach(), descending=True, stable=True).indices", "by_value = torch.sort(values.detach().flip(0), descending=True, stable=True).indices.neg() + values.numel() - 1", LATENTS),
    Mutation("slices keep their offset", "gemmascope_fast/ops/latents_index.py", "cls(crow - begin, latents", "cls(crow, latents", LATENTS),
    Mutation("cat keeps offsets", "gemmascope_fast/ops/latents.py", "p.crow_indices[1:] + base", "p.crow_indices[1:]", LATENTS),
    Mutation("dθ without θ", "gemmascope_fast/sae/straight_through.py", "dtheta = -(theta / ctx.bandwidth) * near * grad", "dtheta = -(1 / ctx.bandwidth) * near * grad", SAE),
    Mutation("decoder rows are not announced", "gemmascope_fast/sae/jumprelu.py", "self.rows.prefetch(self.W_dec, latents.col_indices)", "pass", PACKED),
    Mutation("resident arrays are not checked", "gemmascope_fast/checkpoints/mapped.py", "        _compare(path, layout, about, name, tensor)\n", "", PACKED),
    Mutation("the mapping counts as memory", "gemmascope_fast/checkpoints/mapped.py", "mmap.MAP_PRIVATE | _NORESERVE", "mmap.MAP_PRIVATE", PACKED),
    Mutation("a copy maps the same pages", "gemmascope_fast/checkpoints/mapped.py", "twin = twin or self._again()", "twin = self", PACKED),
    Mutation("edited rows are copied without their edits", "gemmascope_fast/checkpoints/mapped.py", "weight._version != 0", "False", PACKED),
    Mutation("npz checksums are not compared", "gemmascope_fast/checkpoints/packed.py", "                checkpoint.arrays[name].verify()", "                pass", PACKED),
    Mutation("columns are read in whole rows", "gemmascope_fast/files/arrays.py", "if self.at is None or (", "if True or (", PACKED),
    Mutation("the lock of a finished file serves", "gemmascope_fast/checkpoints/packed.py", "if partial.exists() and os.path.samestat(", "if True or os.path.samestat(", PACKED),
    Mutation("the bar forgets the panels that were done", "gemmascope_fast/checkpoints/packed.py", "            update(sum(", "            len(str(", PACKED),
    Mutation("a truncated file goes unnoticed", "gemmascope_fast/checkpoints/mapped.py", "if size < self.was[0]:", "if False:", PACKED),
    Mutation("a checkpoint written to goes unnoticed", "gemmascope_fast/checkpoints/mapped.py", "if (size, time) != self.was:", "if False:", PACKED),
    Mutation("another checkpoint serves a decoder", "gemmascope_fast/checkpoints/mapped.py", "or source_of(checkpoint) != about[\"source\"]", "", PACKED),
    Mutation("decoders are mapped at any byte", "gemmascope_fast/checkpoints/packed.py", " and entry.at % 4 == 0", "", PACKED),
    Mutation("complex x passes", "gemmascope_fast/sae/base.py", "if not x.is_floating_point():", "if False:", BAD),
    # files that somebody else wrote
    Mutation("a table may let columns past d_sae survive", LOADERS + "stored_screen.py", "if not bool((beyond == past).all()):", "if False:", FORGED),
    Mutation("a table's numbers are not looked at", LOADERS + "stored_screen.py", "if not bool(((inside >= least) & (inside <= most)).all()):", "if False:", FORGED),
    Mutation("zero points lie between codes", LOADERS + "stored_screen.py", "if not bool((zero == zero.round()).all()):", "if False:", FORGED),
    Mutation("a stored screen is taken as it is", LOADERS + "native.py", "    check_screen(path, screen, sae.d_in, sae.d_sae)\n", "", FORGED),
    Mutation("a packed screen is taken as it is", "gemmascope_fast/checkpoints/mapped.py", "    check_screen(path, screen, layout.d_in, layout.d_sae)\n", "", FORGED),
    Mutation("a packed file may say another checkpoint's shape", "gemmascope_fast/checkpoints/mapped.py", "        if said[name] != value:", "        if False:", FORGED),
    Mutation("packed vectors may be infinite", "gemmascope_fast/checkpoints/mapped.py", "if name in VECTORS and not bool(torch.isfinite(tensor).all()):", "if False:", FORGED),
    Mutation("panels of any size", "gemmascope_fast/checkpoints/packed.py", "    if panel % 64:", "    if False:", FORGED),
    Mutation("checksums are not counted", "gemmascope_fast/checkpoints/packed.py", "sums[name], len(layout.pieces(name)), (1 << 32) - 1)", "sums[name], None, (1 << 32) - 1)", FORGED),
    Mutation("a bool is an integer", "gemmascope_fast/files/fields.py", "if type(value) is int and least <= value <= most:", "if isinstance(value, int) and least <= value <= most:", FIELDS),
    Mutation("negative sizes pass", "gemmascope_fast/files/fields.py", "return [integer(path, what, number, 0, most) for number in value]", "return [integer(path, what, number, -most, most) for number in value]", HOSTILE),
    Mutation("headers of any size are parsed", "gemmascope_fast/files/arrays.py", "if length > min(MAX_JSON, size - 8):", "if length > size - 8:", HOSTILE),
    Mutation("zip directories of any size are parsed", "gemmascope_fast/files/arrays.py", "with _SmallReads(path, \"rb\") as file, zipfile", "with open(path, \"rb\") as file, zipfile", HOSTILE),
    Mutation("npy headers of any size are read", "gemmascope_fast/files/arrays.py", "member.read(MAX_NPY_HEADER)", "member.read()", HOSTILE),
    Mutation("bombs are counted one by one", "gemmascope_fast/files/arrays.py", "if there > BOMB_BYTES and there > BOMB_RATIO * stored:", "if False:", HOSTILE),
    Mutation("the end of a long row goes to its beginning", "gemmascope_fast/files/arrays.py", "rows[row, column : column + first].copy_", "rows[row, :first].copy_", HOSTILE),
    Mutation("what became a FIFO is read", "gemmascope_fast/files/regular.py", "if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):", "if False:", HOSTILE),
    Mutation("configs of any size are parsed", "gemmascope_fast/files/regular.py", "    if len(data) > most:", "    if False:", HOSTILE),
    Mutation("any activation function loads as ReLU", LOADERS + "base.py", "if config.get(key) is not None and not", "if False and not", FIELDS),
    Mutation("top-k without k loads as ReLU", LOADERS + "saelens.py", "    if new.get(\"activation_fn\") == \"topk\" and new", "    if arguments and new.get(\"activation_fn\") == \"topk\" and new", FIELDS),
    Mutation("any k", LOADERS + "saelens.py", "config.get(\"k\"), 1, _d_sae(arrays))", "config.get(\"k\"), -9, MOST)", FIELDS),
    Mutation("a pickle's calls are passed over", "gemmascope_fast/files/torch_zip.py", "        raise self._refused(f\"a call of {name or shown(called)}\")", "        return \"\"", TORCH_ZIP),
    Mutation("a tensor larger than its storage", "gemmascope_fast/files/torch_zip.py", "if held.offset + count > held.storage.numel:", "if False:", TORCH_ZIP),
    Mutation("strides that are not those of rows", "gemmascope_fast/files/torch_zip.py", "        if length > 1 and found != step:", "        if False:", TORCH_ZIP),
    Mutation("transposed tensors read as they lie", "gemmascope_fast/files/torch_zip.py", "return entry.transposed() if flip else entry", "return entry", TORCH_ZIP),
    Mutation("numbers of a storage that do not fit", "gemmascope_fast/files/torch_zip.py", "info.file_size != held.storage.numel * item:", "False:", TORCH_ZIP),
    Mutation("Qwen Scope's k may contradict the repository", LOADERS + "qwen_scope.py", "if named is not None and k != named:", "if False:", PUBLIC_TOPK),
    Mutation("Qwen Scope's decoder as it is stored", LOADERS + "qwen_scope.py", "entry.transposed() if name in (\"W_enc\", \"W_dec\")", "entry.transposed() if name in (\"W_enc\",)", PUBLIC_TOPK),
    Mutation("Llama Scope's threshold is not scaled", LOADERS + "llama_scope.py", "threshold *= s_out if _by_decoder_norm(config_path, config) else s", "threshold *= 1", PUBLIC),
    Mutation("a transcoder's threshold has the scale of its input", LOADERS + "llama_scope.py", "threshold *= s_out if _by_decoder_norm(config_path, config) else s", "threshold *= s", PUBLIC),
    Mutation("Llama Scope's scale stays out of the weights", LOADERS + "llama_scope.py", "entry.scaled(s) for", "entry for", PUBLIC),
    Mutation("a gate without its scale", LOADERS + "gated.py", "b_mag.double() - scale * b_gate.double()", "b_mag.double() - b_gate.double()", PUBLIC),
    Mutation("OpenAI's normalised SAEs load as ReLU", LOADERS + "openai.py", "    if activation == \"TopK\":", "    if False:", PUBLIC),
    Mutation("batch top-k without its threshold is ReLU", LOADERS + "dictionary_learning.py", "    if made_by in _BATCH:", "    if made_by in _BATCH and \"threshold\" in held:", PUBLIC),
    Mutation("extra fields of any size", LOADERS + "base.py", "right = (least is None or least <= value)", "right = True or (least is None or least <= value)", INVENTED),
    Mutation("a prefix keeps k", "gemmascope_fast/sae/jumprelu.py", "min(value, n) if field.most == \"d_sae\" else value", "value", PREFIX),
    Mutation("Neuronpedia's page of another SAE", LOADERS + "names.py", "page = _pages().get((repo, \"/\".join(below[:end])))", "page = _pages().get((repo, \"/\".join(below[:1])))", NEURONPEDIA),
    Mutation("k beside another kind is passed over", LOADERS + "base.py", "for name in set(self.fields) - set(KINDS[self.kind].extra_fields):", "for name in ():", FIELDS),
    Mutation("latents of any dtype", "gemmascope_fast/files/arrays.py", "if not entries[\"values\"].dtype.is_floating_point:", "if False:", FIELDS),
    Mutation("a hub that is down has answered", LOADERS + "hub.py", "else status < 500", "else True", HUB),
    Mutation("a name server is waited for", LOADERS + "hub.py", "answers.get(timeout=wait + 0.5)", "answers.get()", HUB),
    Mutation("a commit in the cache is asked for", LOADERS + "repository.py", "if commit and not force else None", "if False else None", HUB),
    Mutation("release and folder may both be given", "gemmascope_fast/checkpoints/loading.py", "    if len(given) != 1:", "    if not given:", HUB),
    Mutation("demo is a repository", LOADERS + "repository.py", "    if source == \"demo\":", "    if source == \"\":", HUB),
    Mutation("a list passes for a tensor", "gemmascope_fast/ops/_library.py", "if not isinstance(value, torch.Tensor):", "if False:", BAD),
    Mutation("latents of another device pass", "gemmascope_fast/ops/latents.py", "if latents.device != device:", "if False:", BAD),
    Mutation("a GPU's certificate is 1,000 times looser", "kernels/screen.py", "> tl.reshape(bound, [PAIRS]))", "> 1000 * tl.reshape(bound, [PAIRS]))", GPU_SCREEN),
    Mutation("a GPU's screen finds features that are not there", "kernels/screen.py", "HAS_BANDWIDTH) & f_in[None, :] & t_in", "HAS_BANDWIDTH) & t_in", GPU_SCREEN),
    # the jobs: extraction, dashboard, concepts, comparisons
    Mutation("no correction for having tested many", "gemmascope_fast/analysis/compare/sets.py", 'found["q"] = false_discovery_control(found["p"]) if len(features) else found["p"]', 'found["q"] = found["p"]', COMPARE + " -k every_figure"),
    Mutation("ranks of the other set", "gemmascope_fast/analysis/compare/sets.py", 'parts["auc"].append(result.statistic / (len(x) * len(y)))', 'parts["auc"].append(1 - result.statistic / (len(x) * len(y)))', COMPARE + " -k every_figure"),
    Mutation("the effect's sign is turned", "gemmascope_fast/analysis/compare/sets.py", "np.divide(x.mean(0) - y.mean(0), np.sqrt(variance)", "np.divide(y.mean(0) - x.mean(0), np.sqrt(variance)", COMPARE + " -k every_figure"),
    Mutation("pairs: rejected less chosen", "gemmascope_fast/analysis/compare/sets.py", "y = chosen[:, own].toarray() - rejected[:, own].toarray()", "y = rejected[:, own].toarray() - chosen[:, own].toarray()", COMPARE + " -k one_covariate"),
    Mutation("covariates take nothing out", "gemmascope_fast/analysis/compare/sets.py", 'parts["after"].append(_ratio(beta[0], sd))', 'parts["after"].append(_ratio(y.mean(0), sd))', COMPARE + " -k one_covariate"),
    Mutation("a permutation test of one side", "gemmascope_fast/analysis/compare/sets.py", "return np.abs(x.mean(axis=axis) - y.mean(axis=axis))", "return x.mean(axis=axis) - y.mean(axis=axis)", COMPARE + " -k every_permutation"),
    Mutation("partners fall into different folds", "gemmascope_fast/analysis/compare/sets.py", "np.cumsum(~y)) if paired else None", "len(y) + np.cumsum(~y)) if paired else None", COMPARE + " -k partners"),
    Mutation("silent tokens do not count in a mean", "gemmascope_fast/analysis/compare/pooled.py", "out /= max(latents.n_rows, 1)", "out /= np.bincount(at)", COMPARE + " -k pooling"),
    Mutation("a token ends one character early", "gemmascope_fast/analysis/compare/models.py", "np.array([end for _, end in found]", "np.array([end - 1 for _, end in found]", COMPARE + " -k another_order"),
    Mutation("a token that ends a span opens the next", "gemmascope_fast/analysis/compare/models.py", "np.searchsorted(ends, b).clip", 'np.searchsorted(ends, b, "right").clip', COMPARE + " -k spans_end"),
    Mutation("votes are weighted by another column", "gemmascope_fast/analysis/compare/variants.py", "weights[len(self.kinds) :, None] * weights[self.kind][None]", "weights[: len(self.predicted), None] * weights[self.kind][None]", COMPARE + " -k shares"),
    Mutation("confidence is measured on the groups of the fit", "gemmascope_fast/analysis/compare/variants.py", "fit_weights(votes, known[train], seed)", "fit_weights(votes, known, seed)", "tests/analysis/test_variants.py -k other_groups"),
    Mutation("texts keep their line breaks", "gemmascope_fast/analysis/extraction/sources.py", "parts=stripped(document.parts)", "parts=document.parts", "tests/analysis/test_extraction.py -k every_source"),
    Mutation("the rows of a prompt count as the answer's", "gemmascope_fast/analysis/extraction/texts.py", "spans = [(end - len(windows[i][1]), end)", "spans = [(1, end)", "tests/analysis/test_compare.py -k under_its_prompt"),
    Mutation("an encoder is read without its SEP", "gemmascope_fast/attach/tokens.py", "[last] if last is not None else []", "[]", "tests/attach/test_attach_real.py -k between_cls"),
    Mutation("a label is read one token late", "gemmascope_fast/analysis/compare/variants.py", "begin = len(prompts[i]) - 1 - first", "begin = len(prompts[i]) - first", COMPARE + " -k likeliest"),
    Mutation("a turn has the role of the one before", "gemmascope_fast/analysis/compare/conversation.py", "traces.append(Trace(turn, ", "traces.append(Trace(turns[len(traces) - 1], ", COMPARE + " -k cached_turns"),
    Mutation("a turn's marks count as content", "gemmascope_fast/analysis/compare/conversation.py", "content[begin:end] = True", "content[:end] = True", COMPARE + " -k cached_turns"),
    Mutation("the BOS counts among a text's tokens", "gemmascope_fast/analysis/extraction/texts.py", 'attach(model, coders, tokens=chosen, keep=False)', 'attach(model, coders, tokens="all", keep=False)', CONCEPTS + " -k plain_forwards"),
    Mutation("the minimum of the concept's own texts", "gemmascope_fast/analysis/concepts/run.py", "spread = raw.max() - raw.min()", "spread = raw.max() - raw[: len(split.test_positive)].min()", CONCEPTS + " -k by_hand"),
    Mutation("ranks of the negatives", "gemmascope_fast/analysis/concepts/methods.py", "mannwhitneyu(x, y, axis=0", "mannwhitneyu(y, x, axis=0", CONCEPTS + " -k all_pairs"),
    Mutation("hard negatives are not among the test", "gemmascope_fast/analysis/concepts/run.py", "near = np.concatenate([scores[:p], scores[len(scores) - h :]])", "near = np.concatenate([scores[:p], scores[p : p + h]])", CONCEPTS + " -k by_hand"),
    Mutation("the difference of means is turned", "gemmascope_fast/analysis/concepts/methods.py", "w = positive.double().mean(0) - negative.double().mean(0)", "w = negative.double().mean(0) - positive.double().mean(0)", CONCEPTS + " -k formulas"),
    Mutation("what is gained is what is lost", "gemmascope_fast/analysis/concepts/run.py", '"gain": changed[1] - changed[0]', '"gain": changed[0] - changed[1]', CONCEPTS + " -k steering"),
    Mutation("of neighbours that fire all are shown", "gemmascope_fast/analysis/dashboard/collect.py", "| (np.diff(place[order]) != 0)", "| True", DASHBOARD + " -k strongest_places"),
    Mutation("the index opens in the features' order", "gemmascope_fast/analysis/dashboard/pages.py", "sorted(rows, key=lambda row: (-row[1], row[0]))", "sorted(rows, key=lambda row: row[0])", DASHBOARD + " -k chromium"),
    Mutation("the lens forgets the mean over tokens", "gemmascope_fast/analysis/dashboard/weights.py", "off = (rows @ mean)[:, None]", "off = 0 * (rows @ mean)[:, None]", DASHBOARD + " -k lens"),
    Mutation("a LayerNorm does not centre in the lens", "gemmascope_fast/analysis/dashboard/weights.py", "rows - rows.mean(1, keepdim=True) if centred else rows", "rows", DASHBOARD + " -k lens"),
    Mutation("attention heads have a lens", "gemmascope_fast/analysis/dashboard/weights.py", "return site.kind in STREAM", "return True", DASHBOARD + " -k lens"),
    Mutation("a text key is a named site again", "gemmascope_fast/attach/entries.py", 'return Site("path", path=key.removeprefix(PREFIX))', "return Site.from_hook_name(key)", SITES + " -k means_that"),
    Mutation("a block's multiplier is forgotten", "gemmascope_fast/attach/transformers/blocks.py", "scale *= float(value)", "scale = 1.0", SITES + " -k granite"),
    Mutation("a block's own numbers are not looked at", "gemmascope_fast/attach/transformers/blocks.py", "elif isinstance(value, Tensor) or (_SUSPECT", "elif False and (_SUSPECT", SITES + " -k architecture"),
    Mutation("the norm after attention is left out", "gemmascope_fast/attach/transformers/blocks.py", 'Part(after or _inner(names, attention, ("dense",)), "output", scale)', 'Part(_inner(names, attention, ("dense",)), "output", scale)', SITES + " -k architecture"),
    Mutation("a sum that is normalised passes for a sum", "gemmascope_fast/attach/transformers/blocks.py", 'hasattr(block.output, "LayerNorm")', "False", SITES + " -k architecture"),
    Mutation("a splice forgets the block's multiplier", "gemmascope_fast/attach/taps.py", 'return recon / place.scale if place.form == "scaled" else recon', "return recon", SITES + " -k Multiplied"),
    Mutation("a gradient forgets the block's multiplier", "gemmascope_fast/attach/error_term.py", "own if ctx.unit is None else own * ctx.unit", "own", SITES + " -k Multiplied"),
    Mutation("what a transcoder read may change", "gemmascope_fast/attach/taps.py", "rows = rows.clone()", "pass", SITES + " -k kept_from"),
    Mutation("any layer will do", "gemmascope_fast/attach/origin.py", "    if _same(site, own, structure):", "    if True:", ORIGIN),
    Mutation("a folder's name is a model's", "gemmascope_fast/attach/origin.py", 'elif os.path.isabs(name) or name.startswith((".", "~")) or os.path.isdir(name):', "elif False:", ORIGIN),
    Mutation("a resumed document begins one window late", "gemmascope_fast/analysis/extraction/windows.py", "if count >= skipped:", "if count > skipped or not resumed:", EXTRACTION + " -k every_end"),
    Mutation("positions begin anew with each window", "gemmascope_fast/analysis/extraction/run.py", '"position": at + window.start', '"position": at', EXTRACTION + " -k plain_forwards"),
    Mutation("a torn line of the journal stays", "gemmascope_fast/analysis/extraction/store.py", "if kept < len(whole):", "if False:", EXTRACTION + " -k interrupted"),
    Mutation("a damaged shard is taken for whole", "gemmascope_fast/analysis/extraction/store.py", 'elif digest_of(path) != shard["sha256"][table]:', "elif False:", EXTRACTION + " -k damaged"),
    Mutation("a text may outgrow the model's window", "gemmascope_fast/analysis/extraction/texts.py", "min(window, len(own) + len(prompt)) > most", "min(window, len(own) + len(prompt)) > 2 * most", JOBS + " -k longer"),
    Mutation("a full disk costs the earlier file", "gemmascope_fast/files/results.py", "    with saying_where(path), replacing(path) as temporary:\n        temporary.write_text(text", "    with saying_where(path):\n        path.write_text(text", JOBS + " -k keeps_the_earlier"),
    # derivatives, autocast, latents as tensors
    Mutation("forward mode passes an op by", "gemmascope_fast/ops/_transforms.py", "if forward_ad._current_level >= 0 or (", "if (", DERIVATIVES + " -k forward_ad"),
    Mutation("a transform passes an op by", "gemmascope_fast/ops/_library.py", "known = run is self.dispatched and not transformed()", "known = run is self.dispatched", DERIVATIVES + " -k test_ops"),
    Mutation("backward runs on the backend around it", "gemmascope_fast/ops/_transforms.py", "ctx.backend = requested()", "ctx.backend = None", DERIVATIVES + " -k backend_of_its_forward"),
    Mutation("a tangent of the weights is lost", "gemmascope_fast/ops/sampled_dot.py", "if rows[1] is not None:", "if False:", DERIVATIVES + " -k test_ops"),
    Mutation("latents that are zero have no tangent", "gemmascope_fast/sae/jumprelu.py", "if derivative_wanted(latents):", "if latents.requires_grad:", DERIVATIVES + " -k where_they_are_zero"),
    Mutation("a decoded token's features have no tangent", "gemmascope_fast/ops/latents.py", "if few and isinstance(ids, list) and not derivative_wanted(self.values):", "if few and isinstance(ids, list):", DERIVATIVES + " -k one_row"),
    Mutation("the error term has the tangent of x", "gemmascope_fast/attach/error_term.py", "    if not derivative_wanted(*graph):", "    if not any(t is not None and t.requires_grad for t in graph):", "tests/attach/test_attach_derivatives.py"),
    Mutation("autocast rounds exact products", "gemmascope_fast/ops/_exact.py", "    if not torch.is_autocast_enabled(device.type):\n", "    if True:\n", AUTOCAST),
    Mutation("autocast rounds a backward", "gemmascope_fast/ops/_exact.py", "    if torch.compiler.is_compiling() or not derivative_wanted(a, b):\n", "    if True:\n", AUTOCAST + " -k modules"),
    Mutation("a nested layer's offset is rounded by autocast", "gemmascope_fast/quant/linear.py", "with torch.no_grad(), outside_autocast(self.mean.device):", "with torch.no_grad():", AUTOCAST + " -k nested"),
    Mutation("latents are indexed by token", "gemmascope_fast/ops/latents_index.py", "    each = math.prod(lead[1:])\n", "    each = 1\n", TENSORS),
    Mutation("a zero that is not stored is never the maximum", "gemmascope_fast/ops/latents_reduce.py", "wins = full | ~(stored <= 0)", "wins = full | ~(stored <= -9)", TENSORS),
    Mutation("pickled latents are not checked", "gemmascope_fast/ops/latents.py", "        if not self.crow_indices.is_meta:\n            self.validate()\n", "", TENSORS),
    Mutation("outputs are not checked first", "gemmascope_fast/cli/arguments.py", "if not there.is_dir():", "if False:", JOBS + " -k told_first"),
    Mutation("outputs that exist are replaced", "gemmascope_fast/cli/arguments.py", 'if taken and "kept" not in kind and not args.overwrite:', "if False:", "tests/cli/test_options.py -k checked_before"),
    Mutation("--json - shares standard output", "gemmascope_fast/cli/arguments.py", 'other = sys.stderr if getattr', 'other = sys.stdout if getattr', "tests/cli/test_options.py -k alone_there"),
    # what jobs keep, and of what it is
    Mutation("a sample of the weights stands for them", "gemmascope_fast/files/identity.py", "yield from flat.split(BLOCK)", "yield from flat[::1009].split(BLOCK)", IDENTITY + " -k any_weight"),
    Mutation("a matrix by columns is taken for another by rows", "gemmascope_fast/files/identity.py", 'tensor, order = tensor.t(), "columns of "', 'tensor, order = tensor.t(), ""', IDENTITY + " -k layout"),
    Mutation("the configuration counts for nothing", "gemmascope_fast/files/identity.py", "weights, settings, _config(module)]", "weights, settings]", IDENTITY + " -k configuration"),
    Mutation("a training's folder serves another model", "gemmascope_fast/training/nested/recipe.py", "    identity.claim(Path(work), about)\n", "", IDENTITY + " -k python_too"),
    Mutation("activations serve another model", "gemmascope_fast/training/activations.py", '    identity.claim(folder, {"model": model_id}, "--activations")\n', "", IDENTITY + " -k same_folder"),
    Mutation("a table serves another model", "gemmascope_fast/analysis/widths/measure.py", "if key in self.figures or (self.figures and not first):", "if False:", IDENTITY + " -k same_folder"),
    Mutation("an evaluation goes on with another text", "gemmascope_fast/analysis/evaluation/run.py", "if i == done and read != self._read[which]:", "if False:", IDENTITY + " -k grew"),
    Mutation("a complete extraction takes another text", "gemmascope_fast/analysis/extraction/run.py", "            _check_text(store, fresh)\n", "            pass\n", IDENTITY + " -k same_folder"),
    Mutation("a kill at the first manifest blocks the folder", "gemmascope_fast/analysis/extraction/store.py", " or files.is_temporary(name)", "", CRASH + " -k extraction"),
    Mutation("a repaired shard may differ", "gemmascope_fast/analysis/extraction/store.py", "if known is not None and digest != known:", "if False:", ERRORS + " -k repaired"),
    Mutation("the journal is not on the disk", "gemmascope_fast/files/atomic.py", "                rest = rest[os.write(handle, rest) :]\n            os.fsync(handle)\n", "                rest = rest[os.write(handle, rest) :]\n", ERRORS + " -k counts_when"),
    Mutation("a conversion mixes two checkpoints", "gemmascope_fast/files/atomic.py", "    for path in sorted(old, key=lambda p: -p.stat().st_size):\n        os.unlink(path)\n", "", CRASH + " -k never_mixes"),
    Mutation("what a kill left stays", "gemmascope_fast/files/atomic.py", '        for path in folder.glob(f".{_escaped(name)}.*.tmp"):\n            _discard(path)\n', "", ERRORS + " -k left"),
    Mutation("what another writer writes is removed", "gemmascope_fast/files/atomic.py", "        fcntl.flock(handle, fcntl.LOCK_SH)  # the failed conversion may have lost it\n        return False", "        return True", ERRORS + " -k another_writer"),
    Mutation("an old index stands for new pages", "gemmascope_fast/analysis/dashboard/pages.py", '    remove(out / "index.html")\n', "", CRASH + " -k written_over"),
    Mutation("latents that are not finite pass", "gemmascope_fast/analysis/dashboard/collect.py", "        _check_finite(store.path(\"latents\", shard), rows)\n", "", ERRORS + " -k not_finite"),
    Mutation("a coder of several sites passes", "gemmascope_fast/analysis/pair.py", "if sae.kind in SEVERAL or not isinstance(sae, JumpReLUSAE):", "if False:", ERRORS + " -k several_sites"),
    Mutation("small scales are float16 too", "gemmascope_fast/ops/codes.py", "(widest > 0) & (widest < NARROW)", "(widest > 0) & (widest < 0)", "tests/ops/test_matryoshka_codes.py -k every_size"),
    Mutation("training rounds small scales up", "gemmascope_fast/training/nested/recipe.py", "clamp(min=LEAST)", "clamp(min=6.1e-5)", "tests/training/test_matryoshka_training.py -k tiny_weights"),
    Mutation("experts are left out without a word", "gemmascope_fast/quant/model.py", "if fused and not skip_experts:", "if False:", "tests/ops/test_matryoshka_models.py"),
    Mutation("a quantised head is tied again", "gemmascope_fast/quant/model.py", "            config.tie_word_embeddings = False\n", "            pass\n", "tests/ops/test_matryoshka_models.py -k tied"),
    Mutation("an EOS in the prompt ends the sequence", "gemmascope_fast/attach/sequences.py", "    ended[:, : max(prompt - generation.offset, 0)] = False\n", "", "tests/attach/test_attach_generate.py -k eos_in_the_prompt"),
    Mutation("edits without a mode splice", "gemmascope_fast/attach/run.py", '"splice+error" if self.edits else "observe"', '"splice" if self.edits else "observe"', "tests/attach/test_edits.py -k without_a_mode"),
    Mutation("nine dimensions are read", "gemmascope_fast/files/fields.py", "MAX_DIMENSIONS = 8", "MAX_DIMENSIONS = 9", "tests/files/test_dimensions.py"),
    # vLLM, without an engine
    Mutation("a position computed twice keeps its first row", "gemmascope_fast/attach/vllm/features.py", "last = {p: row for row, p in enumerate(position.tolist())}", "last = {p: row for row, p in reversed(list(enumerate(position.tolist())))}", "tests/attach/test_vllm_parts.py"),
    Mutation("a request reads another's rows", "gemmascope_fast/attach/vllm/worker.py", "torch.cat([at + part.first for part, at in parts])", "torch.cat([at for part, at in parts])", "tests/attach/test_vllm_parts.py"),
    Mutation("a steered row keeps its hidden part", "gemmascope_fast/attach/vllm/worker.py", "hidden.index_copy(0, at, torch.zeros_like(new)), residual", "hidden, residual", "tests/attach/test_vllm_parts.py"),
    Mutation("a feature that the SAE does not have is admitted", "gemmascope_fast/attach/vllm/requests.py", "not 0 <= given < self.saes[sae].d_sae", "not 0 <= given", "tests/attach/test_vllm_parts.py"),
]  # fmt: skip
