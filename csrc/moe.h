// What a mixture of experts adds to the kernels: router logits, the choice of experts, and the weighted sum of
// what they give. src/tokenmill/kernels/moe_twin.py is the same in numpy.
#pragma once
#include "vec.h"

namespace mill::MILL_ISA {

// R rows by E experts: logits[r][e] = the sum over x[r] * weight[e], in 16 lanes and the fixed tree.
template <int R, int E>
static void router_block(const RouterTask& t, int row, int expert) {
  const float *x = t.x + size_t(row) * t.d, *w = t.weight + size_t(expert) * t.d;
  vf sum[R][E] = {};
  int i = 0;
  for (; i + 16 <= t.d; i += 16)
    for (int e = 0; e < E; e++) {
      const vf weight = load<vf>(w + size_t(e) * t.d + i);
      for (int r = 0; r < R; r++) sum[r][e] = sum[r][e] + load<vf>(x + size_t(r) * t.d + i) * weight;
    }
  if (i < t.d)
    for (int e = 0; e < E; e++) {
      const vf weight = load_head(w + size_t(e) * t.d + i, t.d - i);
      for (int r = 0; r < R; r++) sum[r][e] = sum[r][e] + load_head(x + size_t(r) * t.d + i, t.d - i) * weight;
    }
  for (int r = 0; r < R; r++)
    for (int e = 0; e < E; e++) t.logits[size_t(row + r) * t.experts + expert + e] = sum16(sum[r][e]);
}

template <int R> static void router_rows(const RouterTask& t, int row, int begin, int end) {
  int e = begin;
  for (; e + 4 <= end; e += 4) router_block<R, 4>(t, row, e);
  for (; e < end; e++) router_block<R, 1>(t, row, e);
}

// The logits of experts [begin, end) for all rows.
static void router_logits(const RouterTask& t, int begin, int end) {
  int row = 0;
  for (; row + 4 <= t.rows; row += 4) router_rows<4>(t, row, begin, end);
  for (; row < t.rows; row++) router_rows<1>(t, row, begin, end);
}

// softmax of one row, in place. Not a number if any logit is not finite.
MILL_INLINE void softmax_row(float* row, int n) {
  vf top = splat(-std::numeric_limits<float>::infinity()), poison{};
  for (int i = 0; i < n; i += 16) {
    const int k = n - i < 16 ? n - i : 16;
    vf x = splat(row[i]);
    memcpy(&x, row + i, k * sizeof(float));
    top = fmax16(top, x);
    poison = poison + x * splat(0.0f);
  }
  const float peak = max16(top) + sum16(poison);
  vf sum{};
  for (int i = 0; i < n; i += 16) {
    const int k = n - i < 16 ? n - i : 16;
    const vf t = (load_head(row + i, k) - splat(peak)) * splat(1.44269504088896341f);
    const vf e = exp2_16(fmax16(t, splat(-125.0f)));
    memcpy(row + i, &e, k * sizeof(float));
    sum = sum + load_head(row + i, k);
  }
  const float total = sum16(sum) + (peak - peak);
  for (int i = 0; i < n; i++) row[i] = row[i] / total;
}

// Logits to weights, in place: the `active` largest of softmax, of equal ones the first, and zeros.
static void choose_experts(float* row, int experts, int active, bool renormalise) {
  softmax_row(row, experts);
  if (std::isnan(row[0])) {
    for (int e = active; e < experts; e++) row[e] = 0.0f;
    return;
  }
  // The least weight that stays, and how many of exactly that weight do.
  float least = std::numeric_limits<float>::infinity();
  int left = active;
  while (true) {
    float next = -1.0f;
    int count = 0;
    for (int e = 0; e < experts; e++) {
      if (row[e] >= least) continue;
      if (row[e] > next) next = row[e], count = 0;
      count += row[e] == next;
    }
    least = next;
    if (count >= left) break;
    left -= count;
  }
  float total = 0.0f;
  for (int e = 0; e < experts; e++) {
    if (row[e] < least || (row[e] == least && left-- <= 0)) row[e] = 0.0f;
    total = total + row[e];
  }
  if (renormalise)
    for (int e = 0; e < experts; e++) row[e] = row[e] / total;
}

// x += the sum of weights[e] * src[p] over the experts e and the pairs p of a row, in that order.
static void add_experts(float* x, int d, const float* src, const float* weights, const int* experts, const int* pairs,
                        int count) {
  int i = 0;
  for (; i + 16 <= d; i += 16) {
    vf sum{};
    for (int n = 0; n < count; n++) sum = sum + splat(weights[experts[n]]) * load<vf>(src + size_t(pairs[n]) * d + i);
    store(x + i, load<vf>(x + i) + sum);
  }
  for (; i < d; i++) {
    float sum = 0.0f;
    for (int n = 0; n < count; n++) sum = sum + weights[experts[n]] * src[size_t(pairs[n]) * d + i];
    x[i] = x[i] + sum;
  }
}

}  // namespace mill::MILL_ISA
