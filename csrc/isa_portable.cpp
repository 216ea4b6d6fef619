// Plain C++: correct everywhere, tuned for nothing.
#define MILL_ISA portable
#include "vec.h"

namespace mill::MILL_ISA {

struct Acc { int32_t lane[16]; };
struct Bytes { uint8_t at[64]; };

MILL_INLINE Bytes load_bytes(const uint8_t* p) { return load<Bytes>(p); }
MILL_INLINE Bytes low_nibbles(Bytes b) {
  for (int i = 0; i < 64; i++) b.at[i] &= 15;
  return b;
}
MILL_INLINE Bytes high_nibbles(Bytes b) {
  for (int i = 0; i < 64; i++) b.at[i] >>= 4;
  return b;
}
MILL_INLINE Acc dot4(Acc acc, const Bytes& b, int32_t x) {
  int8_t q[4];
  memcpy(q, &x, 4);
  for (int n = 0; n < 16; n++)
    acc.lane[n] += b.at[n * 4] * q[0] + b.at[n * 4 + 1] * q[1] + b.at[n * 4 + 2] * q[2] + b.at[n * 4 + 3] * q[3];
  return acc;
}
MILL_INLINE Acc dot4_small(Acc acc, const Bytes& b, int32_t x) { return dot4(acc, b, x); }
MILL_INLINE vi finish(const Acc& acc) { return load<vi>(acc.lane); }

using Chain = Acc;
using Weights = Bytes;
constexpr int kWidth = 16, kZero = 0, kRows = 4, kColumns = 1;

MILL_INLINE Weights load_weights(const uint8_t* p) { return load_bytes(p); }
MILL_INLINE void dot(Chain& chain, const Weights& w, int32_t x) { chain = dot4(chain, w, x); }
MILL_INLINE Chain add_chains(Chain a, const Chain& b) {
  for (int n = 0; n < 16; n++) a.lane[n] += b.lane[n];
  return a;
}
MILL_INLINE void store_chain(int32_t* p, const Chain& chain) { store(p, chain); }

}  // namespace mill::MILL_ISA

#include "table.h"

namespace mill {
const Kernels* kernels_portable() {
  static const Kernels table = portable::make_table("portable");
  return &table;
}
}  // namespace mill
