// AVX2 without VNNI: bytes are widened to 16 bits, since the saturating byte product would not be exact.
#define MILL_ISA avx2
#include "vec.h"

namespace mill::MILL_ISA {

// Sums of input pairs: lanes [4 i, 4 i + 4) of part i hold outputs 2, two partial sums each.
struct Acc { __m256i part[4]; };
struct Bytes { __m256i half[2]; };

MILL_INLINE Bytes load_bytes(const uint8_t* p) {
  return {{_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))}};
}
MILL_INLINE Bytes low_nibbles(Bytes b) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {{_mm256_and_si256(b.half[0], mask), _mm256_and_si256(b.half[1], mask)}};
}
MILL_INLINE Bytes high_nibbles(Bytes b) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {{_mm256_and_si256(_mm256_srli_epi16(b.half[0], 4), mask),
           _mm256_and_si256(_mm256_srli_epi16(b.half[1], 4), mask)}};
}
MILL_INLINE Acc dot4(Acc acc, Bytes b, int32_t x) {
  const __m256i q = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(x)));
  for (int i = 0; i < 4; i++) {
    const __m128i bytes = i % 2 ? _mm256_extracti128_si256(b.half[i / 2], 1) : _mm256_castsi256_si128(b.half[i / 2]);
    acc.part[i] = _mm256_add_epi32(acc.part[i], _mm256_madd_epi16(_mm256_cvtepu8_epi16(bytes), q));
  }
  return acc;
}
MILL_INLINE vi finish(const Acc& acc) {
  vi out;
  for (int i = 0; i < 2; i++) {
    const __m256i pairs = _mm256_hadd_epi32(acc.part[2 * i], acc.part[2 * i + 1]);
    const __m256i sums = _mm256_permute4x64_epi64(pairs, 0xd8);
    memcpy((char*)&out + 32 * i, &sums, 32);
  }
  return out;
}

// A magnitude is at most 128 and an input at most 127: two of their products sum to less than 2^15, so the saturating
// product is exact.
using Chain = __m256i;
struct Weights { __m256i value, magnitude; };
constexpr int kWidth = 8, kZero = 128, kRows = 8, kColumns = 1;

MILL_INLINE Weights load_weights(const uint8_t* p) {
  const __m256i value = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi8(-128));
  return {value, _mm256_abs_epi8(value)};
}
MILL_INLINE void dot(Chain& chain, const Weights& w, int32_t x) {
  const __m256i pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(_mm256_set1_epi32(x), w.value));
  chain = _mm256_add_epi32(chain, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
MILL_INLINE Chain add_chains(Chain a, Chain b) { return _mm256_add_epi32(a, b); }
MILL_INLINE void store_chain(int32_t* p, Chain chain) { _mm256_storeu_si256((__m256i*)p, chain); }

}  // namespace mill::MILL_ISA

#include "table.h"

namespace mill {
const Kernels* kernels_avx2() {
  static const Kernels table = avx2::make_table("avx2");
  return &table;
}
}  // namespace mill
