// The primitives of linear.h on the dot product of arm64 (FEAT_DotProd), which multiplies signed bytes by signed ones.
#pragma once
#include <arm_neon.h>

#include "vec.h"

namespace mill::MILL_ISA {

// Register i holds the outputs [4 i, 4 i + 4).
struct Acc { int32x4_t part[4]; };
struct Bytes { uint8x16_t part[4]; };

MILL_INLINE int8x16_t quad_everywhere(int32_t x) { return vreinterpretq_s8_s32(vdupq_n_s32(x)); }
MILL_INLINE int8x16_t less_128(uint8x16_t b) { return vreinterpretq_s8_u8(veorq_u8(b, vdupq_n_u8(128))); }

MILL_INLINE Bytes load_bytes(const uint8_t* p) {
  return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
}
MILL_INLINE Bytes low_nibbles(Bytes b) {
  for (auto& part : b.part) part = vandq_u8(part, vdupq_n_u8(15));
  return b;
}
MILL_INLINE Bytes high_nibbles(Bytes b) {
  for (auto& part : b.part) part = vshrq_n_u8(part, 4);
  return b;
}
// The bytes less 128, and 128 times the inputs.
MILL_INLINE Acc dot4(Acc acc, const Bytes& b, int32_t x) {
  const int8x16_t q = quad_everywhere(x);
  const int32x4_t rest = vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), q, vdupq_n_s8(1)), 7);
  for (int i = 0; i < 4; i++) acc.part[i] = vaddq_s32(vdotq_s32(acc.part[i], less_128(b.part[i]), q), rest);
  return acc;
}
MILL_INLINE Acc dot4_small(Acc acc, const Bytes& b, int32_t x) {
  for (int i = 0; i < 4; i++)
    acc.part[i] = vdotq_s32(acc.part[i], vreinterpretq_s8_u8(b.part[i]), quad_everywhere(x));
  return acc;
}
MILL_INLINE vi finish(const Acc& acc) {
  vi out;
  memcpy(&out, acc.part, sizeof out);
  return out;
}

using Chain = int32x4_t;
using Weights = int8x16_t;
constexpr int kWidth = 4, kZero = 128, kRows = 8, kColumns = 2;

MILL_INLINE Weights load_weights(const uint8_t* p) { return less_128(vld1q_u8(p)); }
MILL_INLINE void dot(Chain& chain, Weights w, int32_t x) { chain = vdotq_s32(chain, w, quad_everywhere(x)); }
MILL_INLINE Chain add_chains(Chain a, Chain b) { return vaddq_s32(a, b); }
MILL_INLINE void store_chain(int32_t* p, Chain chain) { vst1q_s32(p, chain); }

}  // namespace mill::MILL_ISA
