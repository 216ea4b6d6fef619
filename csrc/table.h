// The end of every isa_*.cpp: gathers that file's functions into its table.
#pragma once
#include "attend.h"
#include "linear.h"
#include "rows.h"

namespace mill::MILL_ISA {

static void no_thread_state() {}

static uint64_t read_pass(const uint8_t* p, size_t bytes) {
  vu a{}, b{}, c{}, d{};
  for (size_t i = 0; i + 256 <= bytes; i += 256) {
    a ^= load<vu>(p + i), b ^= load<vu>(p + i + 64), c ^= load<vu>(p + i + 128), d ^= load<vu>(p + i + 192);
  }
  const vu all = (a ^ b) ^ (c ^ d);
  uint64_t x = 0;
  for (int i = 0; i < 16; i++) x = x * 31 + all[i];
  return x;
}

// Independent chains of dot4 on registers; 64 multiply-adds each.
static double int8_ops_dot4(int iters) {
  uint8_t bytes[64];
  for (int i = 0; i < 64; i++) bytes[i] = uint8_t(i * 7 + iters);
  Bytes b = load_bytes(bytes);
  Acc acc[12] = {};
  for (int it = 0; it < iters; it++)
    for (int i = 0; i < 12; i++) {
      acc[i] = dot4(acc[i], b, 0x01020304);
      asm volatile("" : "+m"(acc[i]) : : );
    }
  vi all{};
  for (int i = 0; i < 12; i++) all += finish(acc[i]);
  return double(iters) * 12 * 64 * 2 + (all[0] == 42 ? 1 : 0);
}

static double bf16_ops_madd(int iters) {
  vf acc[12] = {};
  const vf a = splat(float(iters)), b = splat(1e-3f);
  for (int it = 0; it < iters; it++)
    for (int i = 0; i < 12; i++) {
      acc[i] = madd_exact(a, b, acc[i]);
      asm volatile("" : "+m"(acc[i]) : : );
    }
  float s = 0;
  for (int i = 0; i < 12; i++) s += acc[i][0];
  return double(iters) * 12 * 16 * 2 + (s == 42.0f ? 1 : 0);
}

static Kernels make_table(const char* name) {
  Kernels k{};
  k.name = name;
  k.begin_thread = no_thread_state;
  k.end_thread = no_thread_state;
  k.linear = linear_generic;
  k.norm = norm;
  k.quantize = quantize;
  k.gated = gated;
  k.rope = rope;
  k.attend = attend<PlainAttend>;
  k.log_sum_exp = log_sum_exp;
  k.read_pass = read_pass;
  k.int8_ops = int8_ops_dot4;
  k.bf16_ops = bf16_ops_madd;
  return k;
}

}  // namespace mill::MILL_ISA
