// The primitives of linear.h on AVX2 without VNNI: every product of bytes has to become words first, exactly.
#pragma once
#include "vec.h"

namespace mill::MILL_ISA {

// Adds products of unsigned and signed bytes to 32-bit sums. The product that there is adds pairs in 16 bits and
// saturates: a pair must stay below 2^15.
MILL_INLINE __m256i add_products(__m256i sums, __m256i bytes, __m256i x) {
  return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, x), _mm256_set1_epi16(1)));
}

// Weights less 128, as a magnitude of at most 128 and a sign that goes to the inputs, of at most 127 each.
struct Weights { __m256i value, magnitude; };
MILL_INLINE Weights less_128(__m256i bytes) {
  const __m256i value = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
  return {value, _mm256_abs_epi8(value)};
}
MILL_INLINE __m256i add_products(__m256i sums, const Weights& w, __m256i x) {
  return add_products(sums, w.magnitude, _mm256_sign_epi8(x, w.value));
}

struct Acc { __m256i half[2]; };
struct Bytes { __m256i half[2]; };

MILL_INLINE Bytes load_bytes(const uint8_t* p) { return load<Bytes>(p); }
MILL_INLINE Bytes low_nibbles(Bytes b) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {{_mm256_and_si256(b.half[0], mask), _mm256_and_si256(b.half[1], mask)}};
}
MILL_INLINE Bytes high_nibbles(Bytes b) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {{_mm256_and_si256(_mm256_srli_epi16(b.half[0], 4), mask),
           _mm256_and_si256(_mm256_srli_epi16(b.half[1], 4), mask)}};
}
// The bytes less 128, and 128 times the inputs.
MILL_INLINE Acc dot4(Acc acc, const Bytes& b, int32_t x) {
  const __m256i q = _mm256_set1_epi32(x), rest = add_products(__m256i{}, _mm256_set1_epi8(-128), q);
  for (int i = 0; i < 2; i++)
    acc.half[i] = add_products(_mm256_add_epi32(acc.half[i], rest), less_128(b.half[i]), q);
  return acc;
}
MILL_INLINE Acc dot4_small(Acc acc, const Bytes& b, int32_t x) {
  for (int i = 0; i < 2; i++) acc.half[i] = add_products(acc.half[i], b.half[i], _mm256_set1_epi32(x));
  return acc;
}
MILL_INLINE vi finish(const Acc& acc) { return load<vi>(acc.half); }

using Chain = __m256i;
constexpr int kWidth = 8, kZero = 128, kRows = 8, kColumns = 1;

MILL_INLINE Weights load_weights(const uint8_t* p) { return less_128(_mm256_loadu_si256((const __m256i*)p)); }
MILL_INLINE void dot(Chain& chain, const Weights& w, int32_t x) {
  chain = add_products(chain, w, _mm256_set1_epi32(x));
}
MILL_INLINE Chain add_chains(Chain a, Chain b) { return _mm256_add_epi32(a, b); }
MILL_INLINE void store_chain(int32_t* p, Chain chain) { _mm256_storeu_si256((__m256i*)p, chain); }

}  // namespace mill::MILL_ISA
