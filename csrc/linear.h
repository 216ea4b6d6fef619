// Matrix products over tile-packed weights, written once over four small primitives that each
// instruction set defines before including this file:
//   Acc / Bytes          16 int32 sums in the layout dot4 likes / 64 weight bytes (16 outputs x 4 inputs)
//   load_bytes, low_nibbles, high_nibbles
//   dot4(acc, bytes, x)  acc[n] += sum over j < 4 of unsigned bytes[n][j] * signed x[j]
//   finish(acc)          the sums as 16 int32 lanes
// Weights are stored unsigned with a zero point (128 for 8 bits, 8 or 0 for 4 bits), taken out again
// with the sums of the activations, which is exact. Work comes in pairs of tiles, 32 outputs.
#pragma once
#include "lowrank.h"

namespace mill::MILL_ISA {

MILL_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }

MILL_INLINE int32_t load_quad(const uint8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return x;
}

// activation(gate) * up (Shazeer 2020). silu(x) is x times the logistic function of x; so is GELU by way of tanh
// (Hendrycks and Gimpel 2016), of 2 sqrt(2 / pi) (x + 0.044715 x^3).
MILL_INLINE vf gated_unit(Activation activation, vf gate, vf up) {
  if (activation == Activation::relu) return (gate < vf{} ? vf{} : gate) * up;
  const bool gelu = activation == Activation::gelu_tanh;
  const vf inner = gelu ? gate + ((gate * gate) * gate) * splat(0.044715f) : gate;
  const vf t = inner * splat(gelu ? -2.30220819813849f : -1.44269504088896341f);
  return (gate / (splat(1.0f) + exp2_16(fmin16(fmax16(t, splat(-125.0f)), splat(125.0f))))) * up;
}

// Writes 16 outputs of one row; columns past the end are dropped.
MILL_INLINE void put(const LinearTask& t, int row, int tile, vf y) {
  const int width = t.gated != Activation::none ? t.w->n / 2 : t.w->n, n = width - tile * kTileN;
  float* dst = t.dst + size_t(row) * t.ld_dst + tile * kTileN;
  if (n >= kTileN) {
    store(dst, t.accumulate ? load<vf>(dst) + y : y);
  } else if (n > 0) {
    const vf sum = t.accumulate ? load_head(dst, n) + y : y;
    memcpy(dst, &sum, n * sizeof(float));
  }
}

MILL_INLINE void put_pair(const LinearTask& t, int row, int pair, vf y0, vf y1) {
  if (t.low_ranks && t.slots[row] >= 0) {
    vf y[2] = {y0, y1};
    add_low_rank(t, row, pair, y);
    y0 = y[0], y1 = y[1];
  }
  if (t.bias) {
    const float* bias = t.bias + pair * 2 * kTileN;
    y0 = y0 + load<vf>(bias), y1 = y1 + load<vf>(bias + kTileN);
  }
  if (t.gated != Activation::none) return put(t, row, pair, gated_unit(t.gated, y0, y1));
  put(t, row, pair * 2, y0);
  put(t, row, pair * 2 + 1, y1);
}

// The rows' lines of 64 input bytes.
template <int R> struct Lines {
  const uint8_t* at[R];
  Lines(const Act& act, int row) {
    for (int r = 0; r < R; r++) at[r] = act.line(row + r, 0);
  }
  const uint8_t* line(int r, int i) const { return at[r] + size_t(i) * 1024; }
};

// 8 bits, one scale an output: R rows by P pairs of tiles in registers, weights read once.
template <int R, int P> static void i8c_block(const LinearTask& t, int row, int pair) {
  const Act& act = *t.act;
  const size_t pair_bytes = size_t(act.lines) * 2048;
  const uint8_t* data = t.w->data + pair * pair_bytes;
  const Lines<R> x(act, row);
  Acc acc[R][P][2] = {};
  for (int line = 0; line < act.lines; line++)
    for (int quad = 0; quad < 16; quad++) {
      Bytes b[P][2];
      for (int p = 0; p < P; p++)
        for (int h = 0; h < 2; h++)
          b[p][h] = load_bytes(data + p * pair_bytes + size_t(line) * 2048 + h * 1024 + quad * 64);
      for (int r = 0; r < R; r++) {
        const int32_t q = load_quad(x.line(r, line) + quad * 4);
        for (int p = 0; p < P; p++)
          for (int h = 0; h < 2; h++) acc[r][p][h] = dot4(acc[r][p][h], b[p][h], q);
      }
    }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) {
      vf y[2];
      for (int h = 0; h < 2; h++) {
        const vi sum = finish(acc[r][p][h]) - 128 * act.row_sum[row + r];
        const vf scale = load<vf>((const float*)t.w->scales + ((pair + p) * 2 + h) * kTileN);
        y[h] = (to_float(sum) * scale) * splat(act.scale[row + r]);
      }
      put_pair(t, row + r, pair + p, y[0], y[1]);
    }
}

// bf16, summed in the order of TDPBF16PS (see mill.h): one tile of a pair.
template <int R> static void bf16_tile(const LinearTask& t, int row, int tile, vf* total) {
  const Act& act = *t.act;
  const uint8_t* data = t.w->data + size_t(tile / 2) * act.lines * 2048 + tile % 2 * 1024;
  const Lines<R> x(act, row);
  for (int r = 0; r < R; r++) total[r] = vf{};
  for (int line = 0; line < act.lines; line++) {
    vf even[R] = {}, odd[R] = {};
    for (int pair = 0; pair < 16; pair++) {
      const vu wp = load<vu>(data + size_t(line) * 2048 + pair * 64);
      const vf we = even_bf16(wp), wo = odd_bf16(wp);
      for (int r = 0; r < R; r++) {
        const auto* b = (const uint16_t*)(x.line(r, line) + pair * 4);
        even[r] = madd_exact(we, splat(from_bf16(b[0])), even[r]);
        odd[r] = madd_exact(wo, splat(from_bf16(b[1])), odd[r]);
      }
    }
    for (int r = 0; r < R; r++) total[r] = total[r] + (even[r] + odd[r]);
  }
}

template <int R> static void bf16_pair(const LinearTask& t, int row, int pair) {
  vf y[2][R];
  for (int h = 0; h < 2; h++) bf16_tile<R>(t, row, pair * 2 + h, y[h]);
  for (int r = 0; r < R; r++) put_pair(t, row + r, pair, y[0][r], y[1][r]);
}

template <int R> static void rows_by_pairs(const LinearTask& t, int row, int pair0, int pair1) {
  int pair = pair0;
  if (t.w->kind == LinearKind::i8c) {
    if (R == 1)
      for (; pair + 2 <= pair1; pair += 2) i8c_block<R, 2>(t, row, pair);
    for (; pair < pair1; pair++) i8c_block<R, 1>(t, row, pair);
    return;
  }
  for (; pair < pair1; pair++) bf16_pair<R>(t, row, pair);
}

// Panels of outputs that stay in the nearest cache while all rows pass over them.
static void linear_generic(const LinearTask& t, int pair0, int pair1) {
  constexpr int panel = 2;
  for (int pair = pair0; pair < pair1; pair += panel) {
    const int stop = pair + panel < pair1 ? pair + panel : pair1;
    int row = 0;
    for (; row + 4 <= t.rows; row += 4) rows_by_pairs<4>(t, row, pair, stop);
    for (; row < t.rows; row++) rows_by_pairs<1>(t, row, pair, stop);
  }
}

}  // namespace mill::MILL_ISA
