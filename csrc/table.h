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

// Independent chains of dot on registers. The input is hidden from the compiler in every round, so that it cannot
// foresee the sums.
static double int8_ops_dot(int iters) {
  constexpr int chains = kWidth == 8 ? 8 : 12;
  uint8_t bytes[64];
  for (int i = 0; i < 64; i++) bytes[i] = uint8_t(i * 7 + iters);
  const Weights w = load_weights(bytes);
  Chain sums[chains] = {};
  int32_t x = 0x01020304;
  for (int it = 0; it < iters; it++) {
    asm volatile("" : "+r"(x));
    for (int i = 0; i < chains; i++) dot(sums[i], w, x);
  }
  for (int i = 1; i < chains; i++) sums[0] = add_chains(sums[0], sums[i]);
  int32_t out[kWidth];
  store_chain(out, sums[0]);
  return double(iters) * chains * kWidth * 4 * 2 + (out[0] == 42 ? 1 : 0);
}

static double bf16_ops_madd(int iters) {
  constexpr int chains = 12;
  vf_register acc[chains] = {};
  float x = 1e-3f;
  for (int it = 0; it < iters; it++) {
    asm volatile("" : "+m"(x));
    const vf_register b = x - vf_register{};
    for (int i = 0; i < chains; i++) acc[i] = madd_register(b, x, acc[i]);
  }
  float s = 0;
  for (int i = 0; i < chains; i++) s += acc[i][0];
  return double(iters) * chains * (kRegister / 4) * 2 + (s == 42.0f ? 1 : 0);
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
  k.put_kv = put_kv;
  k.attend = attend<PlainAttend>;
  k.router_logits = router_logits;
  k.choose_experts = choose_experts;
  k.add_experts = add_experts;
  k.log_sum_exp = log_sum_exp;
  k.sample = sample;
  k.top_ids = top_ids;
  k.read_pass = read_pass;
  k.int8_ops = int8_ops_dot;
  k.bf16_ops = bf16_ops_madd;
  return k;
}

}  // namespace mill::MILL_ISA
