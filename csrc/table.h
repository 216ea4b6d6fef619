// The end of every isa_*.cpp: gathers that file's functions into its table.
#pragma once
#include "attend.h"
#include "groups.h"
#include "moe.h"
#include "rows.h"
#include "sample.h"

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

// Independent chains of dot4 on registers, 64 multiply-adds each. The input is hidden from the compiler in
// every round, so that it cannot foresee the sums.
static double int8_ops_dot4(int iters) {
  constexpr int chains = sizeof(Acc) > 64 ? 3 : 12;
  uint8_t bytes[64];
  for (int i = 0; i < 64; i++) bytes[i] = uint8_t(i * 7 + iters);
  const Bytes b = load_bytes(bytes);
  Acc acc[chains] = {};
  int32_t x = 0x01020304;
  for (int it = 0; it < iters; it++) {
    asm volatile("" : "+r"(x));
    for (int i = 0; i < chains; i++) acc[i] = dot4(acc[i], b, x);
  }
  vi all{};
  for (int i = 0; i < chains; i++) all += finish(acc[i]);
  return double(iters) * chains * 64 * 2 + (all[0] == 42 ? 1 : 0);
}

static double bf16_ops_madd(int iters) {
  constexpr int chains = sizeof(Acc) > 64 ? 6 : 12;
  vf acc[chains] = {};
  float x = 1e-3f;
  for (int it = 0; it < iters; it++) {
    asm volatile("" : "+m"(x));
    const vf b = splat(x);
    for (int i = 0; i < chains; i++) acc[i] = madd_exact(b, b, acc[i]);
  }
  float s = 0;
  for (int i = 0; i < chains; i++) s += acc[i][0];
  return double(iters) * chains * 16 * 2 + (s == 42.0f ? 1 : 0);
}

static Kernels make_table(const char* name) {
  Kernels k{};
  k.name = name;
  k.begin_thread = no_thread_state;
  k.end_thread = no_thread_state;
  k.linear = linear_any;
  k.shrink = shrink;
  k.norm = norm;
  k.quantize = quantize;
  k.rope = rope;
  k.attend = attend<PlainAttend>;
  k.router_logits = router_logits;
  k.choose_experts = choose_experts;
  k.add_experts = add_experts;
  k.log_sum_exp = log_sum_exp;
  k.sample = sample;
  k.top_ids = top_ids;
  k.read_pass = read_pass;
  k.int8_ops = int8_ops_dot4;
  k.bf16_ops = bf16_ops_madd;
  return k;
}

}  // namespace mill::MILL_ISA
