// AVX2 with VNNI: processors for desks and laps that have no AVX-512.
#define MILL_ISA avxvnni
#include "dot_avxvnni.h"
#include "table.h"

namespace mill {
const Kernels* kernels_avxvnni() {
  static const Kernels table = avxvnni::make_table("avxvnni");
  return &table;
}
}  // namespace mill
