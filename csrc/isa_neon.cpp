// arm64 with the dot product of bytes; an arm64 without it has the portable table.
#define MILL_ISA neon
#include "dot_neon.h"
#include "table.h"

namespace mill {
const Kernels* kernels_neon() {
  static const Kernels table = neon::make_table("neon");
  return &table;
}
}  // namespace mill
