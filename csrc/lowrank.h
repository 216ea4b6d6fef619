// What adapters add to a linear, kept apart from its weights, so that rows of many adapters share a step.
// The inputs are those that the linear sees, rounded to bf16; a product with `down` is summed in 16 lanes and
// a fixed tree, one with `up` rank by rank: a row's result depends on nothing else in the step.
#pragma once
#include "vec.h"

namespace mill::MILL_ISA {

// The quantised inputs of a row as bf16 values.
static void dequantize(const Act& act, ActKind kind, int row, int k, float* x) {
  const float* scale = act.scale + (kind == ActKind::int8_groups ? size_t(row) * act.lines * 2 : row);
  for (int i = 0; i < k; i += 16) {
    if (kind == ActKind::bf16) {
      store(x + i, from_bf16(load<vh>((const uint16_t*)act.line(row, i / 32) + i % 32)));
    } else {
      const vb q = load<vb>(act.line(row, i / 64) + i % 64);
      // By way of integers: gcc converts bytes to floats one by one.
      const vf wide = __builtin_convertvector(__builtin_convertvector(q, vi), vf);
      const vf value = wide * splat(scale[kind == ActKind::int8 ? 0 : i / kGroup]);
      store(x + i, from_bf16(to_bf16(value)));
    }
  }
}

// R rows, whose inputs lie in t.x, by N pairs of ranks.
template <int R, int N> static void shrink_block(const ShrinkTask& t, const int32_t* rows, int pair) {
  const size_t width = size_t(t.k + 15) / 16 * 16;
  const uint16_t* down = t.w->down + pair * width * 2;
  vf acc[R][N][2] = {};
  for (size_t i = 0; i < width; i += 16) {
    vu w[N];
    for (int n = 0; n < N; n++) w[n] = load<vu>(down + (n * width + i) * 2);
    for (int r = 0; r < R; r++) {
      const vf x = load<vf>(t.x + r * width + i);
      for (int n = 0; n < N; n++) {
        acc[r][n][0] = madd_exact(even_bf16(w[n]), x, acc[r][n][0]);
        acc[r][n][1] = madd_exact(odd_bf16(w[n]), x, acc[r][n][1]);
      }
    }
  }
  for (int r = 0; r < R; r++) {
    float* low = t.low + size_t(rows[r]) * t.ld_low + pair * 2;
    for (int n = 0; n < N * 2; n++) low[n] = from_bf16(to_bf16(t.w->scale * sum16(acc[r][n / 2][n % 2])));
  }
}

template <int R> static void shrink_rows(const ShrinkTask& t, const int32_t* rows) {
  const size_t width = size_t(t.k + 15) / 16 * 16;
  for (int r = 0; r < R; r++) dequantize(*t.act, t.kind, rows[r], t.k, t.x + r * width);
  int pair = t.begin;
  for (; pair + 2 <= t.end; pair += 2) shrink_block<R, 2>(t, rows, pair);
  for (; pair < t.end; pair++) shrink_block<R, 1>(t, rows, pair);
}

static void shrink(const ShrinkTask& t) {
  int i = 0;
  for (; i + 4 <= t.count; i += 4) shrink_rows<4>(t, t.rows + i);
  for (; i < t.count; i++) shrink_rows<1>(t, t.rows + i);
}

// Out of line: the products of rows without adapters stay as small as they were.
__attribute__((noinline)) static void add_low_rank(const LinearTask& t, int row, int pair, vf* y) {
  const LowRank& w = t.low_ranks[t.slots[row]];
  if (w.rank == 0) return;
  const LowRankPair& at = w.pairs[pair];
  const uint16_t* up = w.up + size_t(at.row) * 2 * kTileN;
  const float *low0 = t.low + size_t(row) * t.ld_low + at.first[0], *low1 = low0 - at.first[0] + at.first[1];
  vf sum0{}, sum1{};
  for (int i = 0; i < at.count; i++) {
    const vu weights = load<vu>(up + i * 2 * kTileN);
    sum0 = madd_exact(even_bf16(weights), splat(low0[i]), sum0);
    sum1 = madd_exact(odd_bf16(weights), splat(low1[i]), sum1);
  }
  y[0] = y[0] + sum0, y[1] = y[1] + sum1;
}

}  // namespace mill::MILL_ISA
