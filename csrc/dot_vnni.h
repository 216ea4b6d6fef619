// The primitives of linear.h on AVX-512 VNNI; shared by the AVX-512 and the AMX tables.
#pragma once
#include "vec.h"

namespace mill::MILL_ISA {

using Acc = __m512i;
using Bytes = __m512i;

MILL_INLINE Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
MILL_INLINE Bytes low_nibbles(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
MILL_INLINE Bytes high_nibbles(Bytes b) {
  return _mm512_and_si512(_mm512_srli_epi16(b, 4), _mm512_set1_epi8(15));
}
MILL_INLINE Acc dot4(Acc acc, Bytes b, int32_t x) { return _mm512_dpbusd_epi32(acc, b, _mm512_set1_epi32(x)); }
MILL_INLINE vi finish(Acc acc) { return (vi)acc; }

}  // namespace mill::MILL_ISA
