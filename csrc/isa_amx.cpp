// AMX tiles for 8-bit and bf16 products and for attention; AVX-512 VNNI for everything else.
// All eight tiles are 16 rows of 64 bytes in every thread, configured once a step.
#define MILL_ISA amx
#include "dot_vnni.h"
#include "groups_amx.h"
#include "table.h"
#include "tile.h"

namespace mill::MILL_ISA {

static void begin_thread() {
  TileConfig config;
  for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
  tile_configure(config);
}
static void end_thread() { tile_release(); }

struct alignas(64) Sums {
  int32_t at[2][2][16][16];  // row half, tile, row, column
};

// One line of inputs: up to 32 rows by a pair of tiles.
template <int R, bool Int8> MILL_INLINE void multiply_line() {
  if (Int8) {
    tile_dot_su<0, 4, 6>(), tile_dot_su<1, 4, 7>();
    if (R == 2) tile_dot_su<2, 5, 6>(), tile_dot_su<3, 5, 7>();
  } else {
    tile_dot_bf16<0, 4, 6>(), tile_dot_bf16<1, 4, 7>();
    if (R == 2) tile_dot_bf16<2, 5, 6>(), tile_dot_bf16<3, 5, 7>();
  }
}

// Up to 16 rows (R = 1) or 32 rows (R = 2) by a pair of tiles. `ahead` is fetched on the way: the weights
// come from memory in the first pass over them, and the hardware alone is late.
template <int R, bool Int8>
static void products(const LinearTask& t, int row, int pair, const uint8_t* ahead, Sums& sums) {
  const Act& act = *t.act;
  const uint8_t *a0 = act.tiles(row), *a1 = act.tiles(row + 16);
  const uint8_t* b = t.w->data + size_t(pair) * act.lines * 2048;
  tile_zero<0>(), tile_zero<1>();
  if (R == 2) tile_zero<2>(), tile_zero<3>();
  for (int line = 0; line < act.lines; line++) {
    tile_load<4>(a0 + size_t(line) * 1024, 64);
    if (R == 2) tile_load<5>(a1 + size_t(line) * 1024, 64);
    tile_load<6>(b + size_t(line) * 2048, 64);
    tile_load<7>(b + size_t(line) * 2048 + 1024, 64);
    if (ahead)
      for (int i = 0; i < 2048; i += 64) _mm_prefetch((const char*)ahead + size_t(line) * 2048 + i, _MM_HINT_T1);
    multiply_line<R, Int8>();
  }
  tile_store<0>(sums.at[0][0], 64), tile_store<1>(sums.at[0][1], 64);
  if (R == 2) tile_store<2>(sums.at[1][0], 64), tile_store<3>(sums.at[1][1], 64);
}

template <bool Int8> static void put_sums(const LinearTask& t, int row, int pair, const Sums& sums) {
  const Act& act = *t.act;
  const float* scales = (const float*)t.w->scales + pair * 2 * kTileN;
  const vf scale0 = Int8 ? load<vf>(scales) : vf{}, scale1 = Int8 ? load<vf>(scales + kTileN) : vf{};
  const int rows = t.rows - row < 32 ? t.rows - row : 32;
  for (int r = 0; r < rows; r++) {
    const vi s0 = load<vi>(sums.at[r / 16][0][r % 16]), s1 = load<vi>(sums.at[r / 16][1][r % 16]);
    if (Int8) {
      const vi zero = splat_i(128 * act.row_sum[row + r]);
      const vf x_scale = splat(act.scale[row + r]);
      put_pair(t, row + r, pair, (to_float(s0 - zero) * scale0) * x_scale, (to_float(s1 - zero) * scale1) * x_scale);
    } else {
      put_pair(t, row + r, pair, (vf)s0, (vf)s1);
    }
  }
}

template <bool Int8> static void linear_tiles(const LinearTask& t, int pair0, int pair1) {
  Sums sums;
  const size_t pair_bytes = size_t(t.act->lines) * 2048;
  for (int pair = pair0; pair < pair1; pair++)
    for (int row = 0; row < t.rows; row += 32) {
      const uint8_t* ahead = row == 0 && pair + 1 < pair1 ? t.w->data + (pair + 1) * pair_bytes : nullptr;
      t.rows - row > 16 ? products<2, Int8>(t, row, pair, ahead, sums) : products<1, Int8>(t, row, pair, ahead, sums);
      put_sums<Int8>(t, row, pair, sums);
    }
}

// Whose tiles are narrower.
static void linear_grouped(const LinearTask& t, int pair0, int pair1) {
  if (t.rows < kLeastTileRows) return linear_groups(t, pair0, pair1);
  linear_groups_tiles(t, pair0, pair1);
  begin_thread();
}

static void linear(const LinearTask& t, int pair0, int pair1) {
  switch (t.w->kind) {
    case LinearKind::i8c: return t.rows < 4 ? linear_generic(t, pair0, pair1) : linear_tiles<true>(t, pair0, pair1);
    case LinearKind::bf16: return linear_tiles<false>(t, pair0, pair1);
    default: return linear_grouped(t, pair0, pair1);
  }
}

struct TileAttend {
  static void scores(const AttendTask& t, const uint16_t* k, float* dst) {
    tile_zero<0>(); tile_zero<1>();
    for (int chunk = 0; chunk < t.head_pad / 32; chunk++) {
      tile_load<4>(t.q + chunk * 32, t.head_pad * 2);
      tile_load<6>(k + chunk * 1024, 64);
      tile_load<7>(k + chunk * 1024 + 512, 64);
      tile_dot_bf16<0, 4, 6>(), tile_dot_bf16<1, 4, 7>();
    }
    tile_store<0>(dst, kSpan * 4), tile_store<1>(dst + 16, kSpan * 4);
  }

  // Two tiles of dims (32) at a time: head_pad is a multiple of 32.
  static void values(const AttendTask& t, const SpanBlocks& span, const uint16_t* probs, float* dst) {
    for (int dims = 0; dims < t.head_pad / 16; dims += 2) {
      tile_zero<0>(); tile_zero<1>();
      for (int b = 0; b < span.count; b++) {
        tile_load<4>(probs + b * kKvBlock, kSpan * 2);
        tile_load<6>(span.v[b] + dims * 512, 64);
        tile_load<7>(span.v[b] + dims * 512 + 512, 64);
        tile_dot_bf16<0, 4, 6>(), tile_dot_bf16<1, 4, 7>();
      }
      tile_store<0>(dst + dims * 16, t.head_pad * 4), tile_store<1>(dst + dims * 16 + 16, t.head_pad * 4);
    }
  }
};

static double int8_ops(int iters) {
  begin_thread();
  alignas(64) uint8_t bytes[1024];
  for (int i = 0; i < 1024; i++) bytes[i] = uint8_t(i * 7);
  tile_zero<0>(); tile_zero<1>(); tile_zero<2>(); tile_zero<3>();
  tile_load<4>(bytes, 64), tile_load<5>(bytes, 64), tile_load<6>(bytes, 64), tile_load<7>(bytes, 64);
  for (int i = 0; i < iters; i++)
    tile_dot_su<0, 4, 6>(), tile_dot_su<1, 4, 7>(), tile_dot_su<2, 5, 6>(), tile_dot_su<3, 5, 7>();
  tile_store<0>(bytes, 64);
  end_thread();
  return double(iters) * 4 * 16 * 16 * 64 * 2 + (bytes[0] == 1 ? 1 : 0);
}

static double bf16_ops(int iters) {
  begin_thread();
  alignas(64) uint16_t words[512];
  for (int i = 0; i < 512; i++) words[i] = uint16_t(0x3f80 + i % 8);
  tile_zero<0>(); tile_zero<1>(); tile_zero<2>(); tile_zero<3>();
  tile_load<4>(words, 64), tile_load<5>(words, 64), tile_load<6>(words, 64), tile_load<7>(words, 64);
  for (int i = 0; i < iters; i++)
    tile_dot_bf16<0, 4, 6>(), tile_dot_bf16<1, 4, 7>(), tile_dot_bf16<2, 5, 6>(), tile_dot_bf16<3, 5, 7>();
  tile_store<0>(words, 64);
  end_thread();
  return double(iters) * 4 * 16 * 16 * 32 * 2 + (words[0] == 1 ? 1 : 0);
}

}  // namespace mill::MILL_ISA

namespace mill {
const Kernels* kernels_amx() {
  static const Kernels table = [] {
    Kernels k = amx::make_table("amx");
    k.begin_thread = amx::begin_thread;
    k.end_thread = amx::end_thread;
    k.linear = amx::linear;
    k.attend = amx::attend<amx::TileAttend>;
    k.int8_ops = amx::int8_ops;
    k.bf16_ops = amx::bf16_ops;
    return k;
  }();
  return &table;
}
}  // namespace mill
