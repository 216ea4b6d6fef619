// Matrix products over tile-packed weights, written once over four small primitives that each
// instruction set defines before including this file:
//   Acc / Bytes          16 int32 sums in the layout dot4 likes / 64 weight bytes (16 outputs x 4 inputs)
//   load_bytes, low_nibbles, high_nibbles
//   dot4(acc, bytes, x)  acc[n] += sum over j < 4 of unsigned bytes[n][j] * signed x[j]
//   finish(acc)          the sums as 16 int32 lanes
// Weights are stored unsigned with a zero point (128 for 8 bits, 8 or 0 for 4 bits), taken out again
// with the sums of the activations, which is exact.
#pragma once
#include "vec.h"

namespace mill::MILL_ISA {

MILL_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }

MILL_INLINE int32_t load_quad(const int8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return x;
}

// Writes 16 outputs of one row; columns past N are dropped.
MILL_INLINE void put(const LinearTask& t, int row, int tile, vf y) {
  float* dst = t.dst + size_t(row) * t.ld_dst + tile * kTileN;
  const int n = t.w->n - tile * kTileN;
  if (n >= kTileN) {
    store(dst, t.accumulate ? load<vf>(dst) + y : y);
  } else {
    const vf old = t.accumulate ? load_head(dst, n) : vf{};
    const vf sum = t.accumulate ? old + y : y;
    memcpy(dst, &sum, n * sizeof(float));
  }
}

// 8 bits, one scale an output: R rows by C tiles in registers, weights read once.
template <int R, int C> static void i8c_block(const LinearTask& t, int row, int tile) {
  const LinearWeight& w = *t.w;
  const Act& act = *t.act;
  const size_t tile_bytes = size_t(act.ld) * kTileN;
  const uint8_t* data = w.data + tile * tile_bytes;
  Acc acc[R][C] = {};
  for (int quad = 0; quad < act.ld / 4; quad++) {
    Bytes b[C];
    for (int c = 0; c < C; c++) b[c] = load_bytes(data + c * tile_bytes + quad * 64);
    for (int r = 0; r < R; r++) {
      const int32_t x = load_quad(act.q + size_t(row + r) * act.ld + quad * 4);
      for (int c = 0; c < C; c++) acc[r][c] = dot4(acc[r][c], b[c], x);
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) {
      const vi sum = finish(acc[r][c]) - 128 * act.row_sum[row + r];
      const vf scale = load<vf>((const float*)w.scales + (tile + c) * kTileN);
      put(t, row + r, tile + c, (to_float(sum) * scale) * splat(act.scale[row + r]));
    }
}

// 8 or 4 bits with a scale (and minimum) a group of inputs, activations with a scale a 32 inputs: R rows by
// one tile.
template <int Bits, int R> static void group_block(const LinearTask& t, int row, int tile) {
  const LinearWeight& w = *t.w;
  const Act& act = *t.act;
  constexpr int chunk_bytes = Bits == 4 ? 256 : 512;  // 16 outputs x 32 inputs
  const int chunks = w.k / kGroup, per_group = w.group / kGroup;
  const int zero = Bits == 8 ? 128 : w.symmetric ? 8 : 0;
  const size_t groups = w.k / w.group, act_groups = act.ld / kGroup;
  const uint8_t* data = w.data + size_t(tile) * chunks * chunk_bytes;
  const uint16_t* scales = (const uint16_t*)w.scales + tile * groups * kTileN;
  const uint16_t* mins = w.symmetric ? nullptr : w.mins + tile * groups * kTileN;
  vf total[R] = {};
  for (int c = 0; c < chunks; c++) {
    Acc acc[R] = {};
    const uint8_t* p = data + size_t(c) * chunk_bytes;
    for (int i = 0; i < 4; i++) {
      const Bytes raw = load_bytes(p + i * 64);
      const Bytes lo = Bits == 4 ? low_nibbles(raw) : raw;
      const Bytes hi = Bits == 4 ? high_nibbles(raw) : load_bytes(p + (i + 4) * (chunk_bytes / 8));
      for (int r = 0; r < R; r++) {
        const int8_t* x = act.q + size_t(row + r) * act.ld + c * kGroup + i * 4;
        acc[r] = dot4(acc[r], lo, load_quad(x));
        acc[r] = dot4(acc[r], hi, load_quad(x + 16));
      }
    }
    const vf scale = load_f16(scales + c / per_group * kTileN);
    const vf min = mins ? load_f16(mins + c / per_group * kTileN) : vf{};
    for (int r = 0; r < R; r++) {
      const float x_scale = act.scale[(row + r) * act_groups + c];
      const int32_t x_sum = act.group_sums[(row + r) * act_groups + c];
      total[r] = total[r] + (scale * to_float(finish(acc[r]) - zero * x_sum)) * splat(x_scale);
      if (mins) total[r] = total[r] + min * splat(x_scale * float(x_sum));
    }
  }
  for (int r = 0; r < R; r++) put(t, row + r, tile, total[r]);
}

// bf16, summed in the order of TDPBF16PS (see mill.h).
template <int R> static void bf16_block(const LinearTask& t, int row, int tile) {
  const Act& act = *t.act;
  const uint16_t* data = (const uint16_t*)t.w->data + size_t(tile) * act.ld * kTileN;
  vf total[R] = {};
  for (int chunk = 0; chunk < act.ld / 32; chunk++) {
    vf even[R] = {}, odd[R] = {};
    for (int pair = 0; pair < 16; pair++) {
      const vu wp = load<vu>(data + chunk * 512 + pair * 32);
      const vf we = even_bf16(wp), wo = odd_bf16(wp);
      for (int r = 0; r < R; r++) {
        const uint16_t* x = act.b + size_t(row + r) * act.ld + chunk * 32 + pair * 2;
        even[r] = madd_exact(we, splat(from_bf16(x[0])), even[r]);
        odd[r] = madd_exact(wo, splat(from_bf16(x[1])), odd[r]);
      }
    }
    for (int r = 0; r < R; r++) total[r] = total[r] + (even[r] + odd[r]);
  }
  for (int r = 0; r < R; r++) put(t, row + r, tile, total[r]);
}

template <int R> static void rows_by_tiles(const LinearTask& t, int row, int tile0, int tile1) {
  constexpr int C = R == 1 ? 4 : 2;
  int tile = tile0;
  switch (t.w->kind) {
    case LinearKind::i8c:
      for (; tile + C <= tile1; tile += C) i8c_block<R, C>(t, row, tile);
      for (; tile < tile1; tile++) i8c_block<R, 1>(t, row, tile);
      break;
    case LinearKind::i8g:
      for (; tile < tile1; tile++) group_block<8, R>(t, row, tile);
      break;
    case LinearKind::i4g:
      for (; tile < tile1; tile++) group_block<4, R>(t, row, tile);
      break;
    case LinearKind::bf16:
      for (; tile < tile1; tile++) bf16_block<R>(t, row, tile);
      break;
  }
}

// Panels of tiles that stay in the nearest cache while all rows pass over them.
static void linear_generic(const LinearTask& t, int tile0, int tile1) {
  constexpr int panel = 4;
  for (int tile = tile0; tile < tile1; tile += panel) {
    const int stop = tile + panel < tile1 ? tile + panel : tile1;
    int row = 0;
    for (; row + 4 <= t.rows; row += 4) rows_by_tiles<4>(t, row, tile, stop);
    for (; row < t.rows; row++) rows_by_tiles<1>(t, row, tile, stop);
  }
}

}  // namespace mill::MILL_ISA
