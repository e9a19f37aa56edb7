// The k greatest of each row of compressed sparse rows, or of all rows together.
#pragma once

#include "cpu/collect.h"

namespace gsf {

// values: positive or the canonical NaN, as encode stores them.  NaN is greatest; of equal values the earlier
// one is taken.  together: k for each row on average, wherever in the batch they are.
Csr greatest(const Csr& rows, int64_t k, bool together);

// Rows of several parts, one below the other.
Csr stacked(const std::vector<Csr>& parts);

}  // namespace gsf
