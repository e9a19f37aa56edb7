// The k largest of each row of compressed sparse rows, or of all rows together.
#pragma once

#include "cpu/collect.h"

namespace gsf {

// values: positive or the canonical NaN, as encode stores them.  NaN ranks first; ties go to the earlier one.
// together: k for each row on average, anywhere in the batch.
Csr greatest(const Csr& rows, int64_t k, bool together);

// Concatenates the rows of several parts.
Csr stacked(const std::vector<Csr>& parts);

}  // namespace gsf
