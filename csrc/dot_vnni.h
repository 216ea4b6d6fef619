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
MILL_INLINE Acc dot4_small(Acc acc, const Bytes& b, int32_t x) { return dot4(acc, b, x); }
MILL_INLINE vi finish(Acc acc) { return (vi)acc; }

using Chain = __m512i;
using Weights = __m512i;
constexpr int kWidth = 16, kZero = 0, kRows = 8, kColumns = 2;

MILL_INLINE Weights load_weights(const uint8_t* p) { return _mm512_loadu_si512(p); }
MILL_INLINE void dot(Chain& chain, Weights w, int32_t x) {
  chain = _mm512_dpbusd_epi32(chain, w, _mm512_set1_epi32(x));
}
MILL_INLINE Chain add_chains(Chain a, Chain b) { return _mm512_add_epi32(a, b); }
MILL_INLINE void store_chain(int32_t* p, Chain chain) { _mm512_storeu_si512(p, chain); }

}  // namespace mill::MILL_ISA
