// The primitives of linear.h on the VNNI of AVX (processors with VNNI but without AVX-512).
#pragma once
#include "vec.h"

namespace mill::MILL_ISA {

struct Acc { __m256i half[2]; };
struct Bytes { __m256i half[2]; };

MILL_INLINE Bytes load_bytes(const uint8_t* p) { return load<Bytes>(p); }
MILL_INLINE Bytes low_nibbles(Bytes b) {
  for (auto& half : b.half) half = _mm256_and_si256(half, _mm256_set1_epi8(15));
  return b;
}
MILL_INLINE Bytes high_nibbles(Bytes b) {
  for (auto& half : b.half) half = _mm256_and_si256(_mm256_srli_epi16(half, 4), _mm256_set1_epi8(15));
  return b;
}
MILL_INLINE Acc dot4(Acc acc, const Bytes& b, int32_t x) {
  for (int i = 0; i < 2; i++) acc.half[i] = _mm256_dpbusd_avx_epi32(acc.half[i], b.half[i], _mm256_set1_epi32(x));
  return acc;
}
MILL_INLINE Acc dot4_small(Acc acc, const Bytes& b, int32_t x) { return dot4(acc, b, x); }
MILL_INLINE vi finish(const Acc& acc) { return load<vi>(acc.half); }

using Chain = __m256i;
using Weights = __m256i;
constexpr int kWidth = 8, kZero = 0, kRows = 4, kColumns = 2;

MILL_INLINE Weights load_weights(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
MILL_INLINE void dot(Chain& chain, Weights w, int32_t x) {
  chain = _mm256_dpbusd_avx_epi32(chain, w, _mm256_set1_epi32(x));
}
MILL_INLINE Chain add_chains(Chain a, Chain b) { return _mm256_add_epi32(a, b); }
MILL_INLINE void store_chain(int32_t* p, Chain chain) { _mm256_storeu_si256((__m256i*)p, chain); }

}  // namespace mill::MILL_ISA
