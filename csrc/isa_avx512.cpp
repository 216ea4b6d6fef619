// AVX-512 with VNNI.
#define MILL_ISA avx512
#include "dot_vnni.h"
#include "table.h"

namespace mill {
const Kernels* kernels_avx512() {
  static const Kernels table = avx512::make_table("avx512");
  return &table;
}
}  // namespace mill
