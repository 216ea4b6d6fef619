// Products over weights of 8 or 4 bits with a float16 scale, and maybe a minimum, for every group of 32 inputs,
// by inputs in 8 bits with a scale for the same 32. A block is 32 outputs by 32 inputs with its scales and minima
// (packing.py), so that a matrix is one stream. In each group
//   y = fma(fma(minimum, sum of inputs, scale * products), scale of inputs, y)
// where sums and products are exact integers; without minima the inner step is left out.
#pragma once
#include "linear.h"

namespace mill::MILL_ISA {

// What lies in memory for 32 outputs and 32 inputs.
template <int Bits, bool Mins> struct GroupBlock {
  static constexpr int tile = Bits * 64, bytes = 2 * tile + (Mins ? 128 : 64);
  static constexpr int zero = Bits == 8 ? 128 : Mins ? 0 : 8;
  const uint8_t* at;
  MILL_MEMBER const uint8_t* quads(int h, int i) const { return at + h * tile + i * 64; }
  MILL_MEMBER const uint16_t* scales(int h) const { return (const uint16_t*)(at + 2 * tile) + h * kTileN; }
  MILL_MEMBER const uint16_t* mins(int h) const { return scales(h) + 2 * kTileN; }
};

MILL_INLINE void fetch_all(const uint8_t* p, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

constexpr int kAhead = 4096;  // bytes: what arrives while a core computes, from memory that is slow to answer

template <int Bits, bool Mins, int R> static void groups_block(const LinearTask& t, int row, int pair) {
  using Block = GroupBlock<Bits, Mins>;
  const Act& act = *t.act;
  const int chunks = t.w->k / kGroup;
  const size_t act_groups = size_t(act.lines) * 2, first = row * act_groups;
  Block block{t.w->data + size_t(pair) * chunks * Block::bytes};
  const Lines<R> x(act, row);
  vf total[R][2] = {};
  for (int c = 0; c < chunks; c++, block.at += Block::bytes) {
    fetch_all(block.at + kAhead, Block::bytes);
    Acc acc[R][2] = {};
    for (int i = 0; i < 4; i++)
      for (int h = 0; h < 2; h++) {
        const Bytes raw = load_bytes(block.quads(h, i));
        const Bytes lo = Bits == 4 ? low_nibbles(raw) : raw;
        const Bytes hi = Bits == 4 ? high_nibbles(raw) : load_bytes(block.quads(h, i + 4));
        for (int r = 0; r < R; r++) {
          const uint8_t* q = x.line(r, c / 2) + c % 2 * 32 + i * 4;
          acc[r][h] = Bits == 4 ? dot4_small(acc[r][h], lo, load_quad(q)) : dot4(acc[r][h], lo, load_quad(q));
          acc[r][h] = Bits == 4 ? dot4_small(acc[r][h], hi, load_quad(q + 16)) : dot4(acc[r][h], hi, load_quad(q + 16));
        }
      }
    for (int h = 0; h < 2; h++) {
      const vf scale = load_f16(block.scales(h)), min = Mins ? load_f16(block.mins(h)) : vf{};
      for (int r = 0; r < R; r++) {
        const int32_t x_sum = act.group_sums[first + r * act_groups + c];
        vf y = scale * to_float(finish(acc[r][h]) - Block::zero * x_sum);
        if (Mins) y = fma16(min, splat(float(x_sum)), y);
        total[r][h] = fma16(y, splat(act.scale[first + r * act_groups + c]), total[r][h]);
      }
    }
  }
  for (int r = 0; r < R; r++) put_pair(t, row + r, pair, total[r][0], total[r][1]);
}

// Rows four at a time, and the rest together, so that weights are read and widened once for them.
template <int Bits, bool Mins> static void groups_pairs(const LinearTask& t, int pair0, int pair1) {
  for (int pair = pair0; pair < pair1; pair++) {
    int row = 0;
    for (; row + 4 <= t.rows; row += 4) groups_block<Bits, Mins, 4>(t, row, pair);
    switch (t.rows - row) {
      case 1: groups_block<Bits, Mins, 1>(t, row, pair); break;
      case 2: groups_block<Bits, Mins, 2>(t, row, pair); break;
      case 3: groups_block<Bits, Mins, 3>(t, row, pair); break;
    }
  }
}

static void linear_groups(const LinearTask& t, int pair0, int pair1) {
  if (t.w->kind == LinearKind::i8g) return groups_pairs<8, false>(t, pair0, pair1);
  t.w->symmetric ? groups_pairs<4, false>(t, pair0, pair1) : groups_pairs<4, true>(t, pair0, pair1);
}

static void linear_any(const LinearTask& t, int pair0, int pair1) {
  switch (t.w->kind) {
    case LinearKind::i8c: return linear_i8c(t, pair0, pair1);
    case LinearKind::bf16: return linear_bf16(t, pair0, pair1);
    default: return linear_groups(t, pair0, pair1);
  }
}

}  // namespace mill::MILL_ISA
