#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gsf {
namespace {

constexpr const char* kNames[kIsaCount] = {"plain", "avx2", "avxvnni", "avx512", "amx"};

Isa choose() {
  if (const char* wanted = std::getenv("GSF_ISA")) {
    for (int i = 0; i < kIsaCount; ++i) {
      if (std::strcmp(wanted, kNames[i]) != 0) continue;
      if (isa_supported(static_cast<Isa>(i))) return static_cast<Isa>(i);
      throw std::runtime_error(std::string("GSF_ISA=") + wanted + ": this machine does not have it");
    }
    throw std::runtime_error(std::string("GSF_ISA=") + wanted + ": expected one of " + isa_names());
  }
  for (int i = kIsaCount - 1; i > 0; --i) {
    if (isa_supported(static_cast<Isa>(i))) return static_cast<Isa>(i);
  }
  return Isa::plain;
}

std::atomic<int> g_isa{-1};

// cpuid leaf 7, sub-leaf 1, EAX bit 4; GCC 12's __builtin_cpu_supports has no name for AVX-VNNI.
bool has_avxvnni() {
#if defined(__x86_64__)
  unsigned eax = 7, ebx = 0, ecx = 1, edx = 0;
  __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return (eax >> 4) & 1u;
#else
  return false;
#endif
}

// cpuid leaf 7: EDX bits 24 (tiles) and 25 (int8).  Linux lets a process use the 8 KiB of tile state only
// after it asked for it; a kernel without AMX support refuses.
bool has_amx() {
#if defined(__linux__) && defined(__x86_64__)
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  if ((edx >> 24 & 3u) != 3u) return false;
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::string isa_names() {
  std::string all;
  for (const char* name : kNames) all += (all.empty() ? "" : ", ") + std::string(name);
  return all;
}

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  switch (isa) {
    case Isa::plain:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avxvnni:
      return avx2 && has_avxvnni();
    case Isa::amx:
      return isa_supported(Isa::avx512) && has_amx();
    case Isa::avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vnni");
  }
  return false;
#else
  return isa == Isa::plain;
#endif
}

Isa current_isa() {
  int isa = g_isa.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = static_cast<int>(choose());
    g_isa.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

bool set_isa(Isa isa) {
  if (!isa_supported(isa)) return false;
  g_isa.store(static_cast<int>(isa), std::memory_order_relaxed);
  return true;
}

}  // namespace gsf
