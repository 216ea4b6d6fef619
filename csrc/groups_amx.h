// Grouped weights on AMX tiles: 16 rows by 32 outputs by one group of inputs at a time. The tiles give exact sums
// as integers; scaling and adding them up takes longer than the products, so both go on at once: while the sums
// of one run of groups are added up, those of the next are made.
#pragma once
#include "groups.h"
#include "tile.h"

namespace mill::MILL_ISA {

constexpr int kSlab = 24;          // groups whose widened weights stay in the nearest cache
constexpr int kRun = 4;            // groups whose sums wait to be added up
constexpr int kPanelRows = 64;     // rows that pass over a slab
constexpr int kLeastTileRows = 32; // for fewer, registers are as fast as tiles

// C += A * B, both of signed bytes.
template <int C, int A, int B> inline void tile_dot_ss() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// A group fills half a line: inputs are 16 rows of 32 bytes, weights 8 rows (4 inputs each) of 16 outputs.
inline void configure_groups() {
  TileConfig config;
  for (int i = 0; i < 8; i++) config.row_bytes[i] = i / 2 == 2 ? 32 : 64, config.rows[i] = i / 2 == 3 ? 8 : 16;
  tile_configure(config);
}

// Weights as signed bytes, scales and minima as floats.
struct alignas(64) WideGroup {
  int8_t values[2][8][64];
  vf scales[2], mins[2];
};
struct alignas(64) RunSums {
  int32_t at[kRun][2][16][16];
};

template <int Bits, bool Mins> static void widen(GroupBlock<Bits, Mins> block, WideGroup& wide) {
  const __m512i zero = _mm512_set1_epi8(char(block.zero));
  for (int h = 0; h < 2; h++) {
    for (int i = 0; i < 4; i++) {
      const Bytes raw = load_bytes(block.quads(h, i));
      const Bytes lo = Bits == 4 ? low_nibbles(raw) : raw;
      const Bytes hi = Bits == 4 ? high_nibbles(raw) : load_bytes(block.quads(h, i + 4));
      store(wide.values[h][i], _mm512_sub_epi8(lo, zero));
      store(wide.values[h][i + 4], _mm512_sub_epi8(hi, zero));
    }
    wide.scales[h] = load_f16(block.scales(h));
    if (Mins) wide.mins[h] = load_f16(block.mins(h));
  }
}

MILL_INLINE void multiply_group(const uint8_t* x, const WideGroup& wide, int32_t (&sums)[2][16][16]) {
  tile_load<4>(x, 64);
  tile_load<6>(wide.values[0], 64), tile_load<7>(wide.values[1], 64);
  tile_zero<0>(), tile_zero<1>();
  tile_dot_ss<0, 4, 6>(), tile_dot_ss<1, 4, 7>();
  tile_store<0>(sums[0], 64), tile_store<1>(sums[1], 64);
}

// Eight rows of a run; `scale` and `x_sum` are those of the first row and group, `step` leads to the next row.
template <bool Mins>
MILL_INLINE void add_groups(const float* scale, const int32_t* x_sum, size_t step, const WideGroup* wide, int count,
                            const RunSums& sums, int half, vf (*total)[2]) {
  vf y[8][2];
  memcpy(y, total, sizeof y);
  for (int c = 0; c < count; c++)
    for (int r = 0; r < 8; r++) {
      const vf x_scale = splat(scale[r * step + c]), terms = to_float(splat_i(x_sum[r * step + c]));
      for (int h = 0; h < 2; h++) {
        vf v = wide[c].scales[h] * to_float(load<vi>(sums.at[c][h][half * 8 + r]));
        if (Mins) v = fma16(wide[c].mins[h], terms, v);
        y[r][h] = fma16(v, x_scale, y[r][h]);
      }
    }
  memcpy(total, y, sizeof y);
}

// Rows that pass over a slab of widened weights.
struct Panel {
  int row, rows, group, count;
  const WideGroup* wide;
  const uint8_t* ahead;  // fetched on the way, `block_bytes` a group; or null
  int block_bytes;
  vf (*total)[2];
};

// 16 rows by a run of groups are a unit. Half of its products, then eight rows of the sums of the unit before.
template <bool Mins> static void groups_panel(const Act& act, const Panel& p) {
  RunSums sums[2];
  const size_t step = size_t(act.lines) * 2;
  const int runs = (p.count + kRun - 1) / kRun, units = (p.rows + 15) / 16 * runs;
  for (int unit = 0; unit <= units; unit++)
    for (int half = 0; half < 2; half++) {
      const int next = unit % runs * kRun, at = unit / runs * 16, begin = next + half * kRun / 2;
      for (int c = begin; unit < units && c < begin + kRun / 2 && c < p.count; c++) {
        const uint8_t* x = act.line(p.row + at, (p.group + c) / 2) + (p.group + c) % 2 * 32;
        multiply_group(x, p.wide[c], sums[unit % 2].at[c - next]);
        if (p.ahead && at == 0)
          for (int i = 0; i < p.block_bytes; i += 64) __builtin_prefetch(p.ahead + c * p.block_bytes + i, 0, 2);
      }
      const int before = unit - 1, done = before % runs * kRun, from = before / runs * 16 + half * 8;
      if (unit == 0 || from >= p.rows) continue;
      const size_t first = (p.row + from) * step + p.group + done;
      add_groups<Mins>(act.scale + first, act.group_sums + first, step, p.wide + done,
                       p.count - done < kRun ? p.count - done : kRun, sums[before % 2], half, p.total + from);
    }
}

template <int Bits, bool Mins> static void groups_tiles(const LinearTask& t, int pair0, int pair1) {
  using Block = GroupBlock<Bits, Mins>;
  const int groups = t.w->k / kGroup;
  const uint8_t* data = t.w->data + size_t(pair0) * groups * Block::bytes;
  WideGroup wide[kSlab];
  vf total[kPanelRows][2];
  for (int pair = pair0; pair < pair1; pair++, data += size_t(groups) * Block::bytes)
    for (int row = 0; row < t.rows; row += kPanelRows) {
      const int rows = t.rows - row < kPanelRows ? t.rows - row : kPanelRows;
      memset(total, 0, size_t(rows + 7) / 8 * 8 * sizeof *total);
      for (int group = 0; group < groups; group += kSlab) {
        const int count = groups - group < kSlab ? groups - group : kSlab;
        const uint8_t* from = data + size_t(group) * Block::bytes;
        for (int c = 0; c < count; c++) widen(Block{from + c * Block::bytes}, wide[c]);
        const uint8_t* ahead = row == 0 ? from + size_t(count) * Block::bytes : nullptr;
        groups_panel<Mins>(*t.act, {row, rows, group, count, wide, ahead, Block::bytes, total});
      }
      for (int r = 0; r < rows; r++) put_pair(t, row + r, pair, total[r][0], total[r][1]);
    }
}

static void linear_groups_tiles(const LinearTask& t, int pair0, int pair1) {
  configure_groups();
  if (t.w->kind == LinearKind::i8g) groups_tiles<8, false>(t, pair0, pair1);
  else t.w->symmetric ? groups_tiles<4, false>(t, pair0, pair1) : groups_tiles<4, true>(t, pair0, pair1);
}

}  // namespace mill::MILL_ISA
