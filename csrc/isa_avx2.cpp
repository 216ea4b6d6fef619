// AVX2 without VNNI.
#define MILL_ISA avx2
#include "dot_avx2.h"
#include "table.h"

namespace mill {
const Kernels* kernels_avx2() {
  static const Kernels table = avx2::make_table("avx2");
  return &table;
}
}  // namespace mill
