#include "cpu/kernels.h"

namespace gsf {

namespace plain {
extern const Kernels kTable;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kTable;
}
namespace avxvnni {
extern const Kernels kTable;
}
namespace avx512 {
extern const Kernels kTable;
}
namespace amx {
extern const Kernels kTable;
}
#endif

const Kernels& kernels(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::amx:
      return amx::kTable;
    case Isa::avx512:
      return avx512::kTable;
    case Isa::avxvnni:
      return avxvnni::kTable;
    case Isa::avx2:
      return avx2::kTable;
    case Isa::plain:
      break;
  }
#endif
  return plain::kTable;
}

}  // namespace gsf
