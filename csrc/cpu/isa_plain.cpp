#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/half.h"
#include "cpu/kernels.h"

#define GSF_LEVEL 0
#define GSF_NAMESPACE plain
#include "cpu/isa_body.h"
