// Instruction-set levels, and the one used by this process.
#pragma once

#include <string>

namespace gsf {

enum class Isa : int { plain = 0, avx2 = 1, avxvnni = 2, avx512 = 3, amx = 4 };
constexpr int kIsaCount = 5;

const char* isa_name(Isa isa);
// "plain, avx2, ...": all levels, for messages.
std::string isa_names();
// Whether cpuid and the operating system (xgetbv, through __builtin_cpu_supports) allow it.
bool isa_supported(Isa isa);
// The best supported level, unless GSF_ISA or set_isa() names a lower one.
Isa current_isa();
// False if the machine does not support it.
bool set_isa(Isa isa);

}  // namespace gsf
