// All kernel bodies for one instruction set. isa_*.cpp includes this after its target pragma, with GSF_LEVEL
// and GSF_NAMESPACE set.  No standard header may be included here: a library template instantiated under a
// target pragma could be shared with code that must run on every machine.
namespace gsf {
namespace GSF_NAMESPACE {
#include "cpu/vec.h"
//
#include "cpu/dot.h"
//
#include "cpu/decode.h"
#include "cpu/encode.h"
#include "cpu/sampled_dot.h"
//
#include "cpu/matryoshka_vec.h"
//
#include "cpu/matryoshka_unit.h"
#include "cpu/screen_vec.h"
//
#include "cpu/matryoshka.h"
#include "cpu/matryoshka_tokens.h"
#include "cpu/screen_epilogue.h"
//
#include "cpu/screen.h"
//
#include "cpu/screen_lanes.h"
//
#include "cpu/screen_amx.h"
//
#include "cpu/screen_refine.h"
//
#include "cpu/vec_fp64.h"
//
#include "cpu/screen_build.h"
//
#include "cpu/roof.h"

extern const Kernels kTable;
const Kernels kTable = {encode,
                        decode,
                        sampled_dot,
                        screen_pairs,
                        refine_pairs,
                        screen_token,
                        screen_pack,
                        GSF_LEVEL >= 4,
                        screen_rows,
                        matryoshka,
                        matryoshka_quantize,
                        {roof_read, roof_fma, roof_int8, 16 * kRoofChains, kRoofInt8}};
}  // namespace GSF_NAMESPACE
}  // namespace gsf
