// Sixteen-lane arithmetic in GCC vector extensions: one source for every instruction set. Included into
// each isa_*.cpp inside that file's own namespace, so the linker never mixes instruction sets.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include "mill.h"

#define MILL_INLINE inline __attribute__((always_inline))

namespace mill::MILL_ISA {

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef int8_t vb __attribute__((vector_size(16)));

template <class T, class P> MILL_INLINE T load(const P* p) { T v; memcpy(&v, p, sizeof v); return v; }
template <class T, class P> MILL_INLINE void store(P* p, T v) { memcpy(p, &v, sizeof v); }
MILL_INLINE vf splat(float x) { return x - vf{}; }
MILL_INLINE vi splat_i(int32_t x) { return x - vi{}; }

// First `n` lanes from memory, the rest zero.
MILL_INLINE vf load_head(const float* p, int n) { vf v{}; memcpy(&v, p, n * sizeof(float)); return v; }

#if defined(__AVX__)
// An operation on 8 lanes, on both halves of 16. GCC 12 makes sixteen single comparisons of one that is wider than a
// register.
template <class V, class F> MILL_INLINE V by_halves(F f) {
  V y;
  for (int i = 0; i < 2; i++) {
    const auto half = f(i * 32);
    memcpy((char*)&y + i * 32, &half, sizeof half);
  }
  return y;
}
template <class V> MILL_INLINE __m256 half_of(const V& v, int at) { return load<__m256>((const char*)&v + at); }
#endif

// a < b ? a : b, and the other way round.
MILL_INLINE vf fmin16(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return by_halves<vf>([&](int at) { return _mm256_min_ps(half_of(a, at), half_of(b, at)); });
#else
  return a < b ? a : b;
#endif
}
MILL_INLINE vf fmax16(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return by_halves<vf>([&](int at) { return _mm256_max_ps(half_of(a, at), half_of(b, at)); });
#else
  return a > b ? a : b;
#endif
}
MILL_INLINE vi max16(vi a, vi b) {
#if defined(__AVX512F__)
  return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return by_halves<vi>([&](int at) { return _mm256_max_epi32((__m256i)half_of(a, at), (__m256i)half_of(b, at)); });
#else
  return a > b ? a : b;
#endif
}
MILL_INLINE vf fabs16(vf a) { return (vf)((vu)a & 0x7fffffffu); }

// acc + a * b where the product is exact (bf16 inputs): fused or not, the same bits.
MILL_INLINE vf madd_exact(vf a, vf b, vf acc) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)acc);
#else
  return acc + a * b;
#endif
}

// a * b + c, rounded once: the same bits on every machine.
MILL_INLINE vf fma16(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return by_halves<vf>([&](int at) { return _mm256_fmadd_ps(half_of(a, at), half_of(b, at), half_of(c, at)); });
#else
  vf y;
  for (int i = 0; i < 16; i++) y[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return y;
#endif
}

// Fixed tree: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
MILL_INLINE float sum16(vf v) {
#if defined(__AVX512DQ__)
  const __m256 b = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
#else
  float a[16], b[8], c[4];
  store(a, v);
  for (int i = 0; i < 8; i++) b[i] = a[i] + a[i + 8];
  for (int i = 0; i < 4; i++) c[i] = b[i] + b[i + 4];
  return (c[0] + c[2]) + (c[1] + c[3]);
#endif
}

MILL_INLINE float max16(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float a[16], m;
  store(a, v);
  m = a[0];
  for (int i = 1; i < 16; i++) m = a[i] > m ? a[i] : m;
  return m;
#endif
}

// Nearest integer, ties to even, for |x| < 2^22.
MILL_INLINE vf round16(vf x) {
  const vf magic = splat(12582912.0f);
  return (x + magic) - magic;
}

// Nearest integers, ties to even, for |x| < 2^22; the least of all where x is not a number.
MILL_INLINE vi nearest16(vf x) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  return by_halves<vi>([&](int at) { return _mm256_cvtps_epi32(half_of(x, at)); });
#else
  return __builtin_convertvector(round16(x), vi);
#endif
}

// 2^t for t in [-125, 125], not a number where t is not; the twin has the same polynomial.
MILL_INLINE vf exp2_16(vf t) {
  const vi n = nearest16(t);
  const vf f = t - __builtin_convertvector(n, vf);
  vf p = splat(1.32647273e-3f);
  p = fma16(p, f, splat(9.67151299e-3f));
  p = fma16(p, f, splat(5.55073358e-2f));
  p = fma16(p, f, splat(2.40222424e-1f));
  p = fma16(p, f, splat(6.93147004e-1f));
  p = fma16(p, f, splat(1.0f));
  return (vf)((vu)p + ((vu)n << 23));  // unsigned: what overflows is not used
}

// 2^t for t up to 125; zero below -125. Not a number stays so.
MILL_INLINE vf exp2_or_zero(vf t) {
  const vf e = exp2_16(t);
#if defined(__AVX__) && !defined(__AVX512F__)
  return by_halves<vf>([&](int at) {
    return _mm256_andnot_ps(_mm256_cmp_ps(half_of(t, at), _mm256_set1_ps(-125.0f), _CMP_LT_OQ), half_of(e, at));
  });
#else
  return t < splat(-125.0f) ? vf{} : e;
#endif
}

// By way of 16 bits: GCC makes one step from 32 to 8 value by value.
MILL_INLINE vb narrow16(vi x) {
#if defined(__AVX512F__)
  return __builtin_convertvector(x, vb);
#else
  typedef int16_t vs __attribute__((vector_size(32)));
  return __builtin_convertvector(__builtin_convertvector(x, vs), vb);
#endif
}

// Bits of bf16, rounded to nearest even.
MILL_INLINE vh to_bf16(vf x) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  const vu u = (vu)x;
  return __builtin_convertvector((u + 0x7fffu + ((u >> 16) & 1u)) >> 16, vh);
#endif
}
MILL_INLINE uint16_t to_bf16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
MILL_INLINE vf from_bf16(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }
MILL_INLINE float from_bf16(uint16_t h) {
  const uint32_t u = uint32_t(h) << 16;
  float x;
  memcpy(&x, &u, 4);
  return x;
}

MILL_INLINE float from_f16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exp = (h >> 10) & 31u, man = h & 1023u;
  uint32_t u = exp ? sign | ((exp + 112u) << 23) | (man << 13) : sign;
  if (exp == 31) u = sign | 0x7f800000u | (man << 13);
  float x;
  memcpy(&x, &u, 4);
  if (!exp && man) x = (sign ? -1.0f : 1.0f) * float(man) * 5.9604644775390625e-8f;
  return x;
}
MILL_INLINE vf load_f16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  vf v;
  store((float*)&v, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
  store((float*)&v + 8, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8))));
  return v;
#else
  vf v;
  for (int i = 0; i < 16; i++) v[i] = from_f16(p[i]);
  return v;
#endif
}

// Even and odd members of 16 pairs of bf16 as floats.
MILL_INLINE vf even_bf16(vu pairs) { return (vf)(pairs << 16); }
MILL_INLINE vf odd_bf16(vu pairs) { return (vf)(pairs & 0xffff0000u); }

}  // namespace mill::MILL_ISA
