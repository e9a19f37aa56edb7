// Times the roof loops of the instruction set in use on torch's threads.
#pragma once

#include <cstdint>
#include <vector>

namespace gsf {

// Bytes read per second in each of `passes` readings of one buffer of about `bytes`.
std::vector<double> roof_read_rates(int64_t bytes, int passes);
// Operations per second, a multiply-add counted as two.
std::vector<double> roof_fma_rates(int passes);
std::vector<double> roof_int8_rates(int passes);

}  // namespace gsf
