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
  int32_t at[32][2][16];  // row, tile, column
};

// Up to 32 rows by a pair of tiles.
struct Block {
  int row = 0, pair = 0, rows = 0;
};

// How sums leave. Most linears have neither bias nor adapter and fill their last pair: they have leaner forms.
enum class Way { store, accumulate, silu, general };

static Way way_of(const LinearTask& t) {
  if (t.low_ranks || t.bias || t.w->n % (2 * kTileN)) return Way::general;
  if (t.gated == Activation::none) return t.accumulate ? Way::accumulate : Way::store;
  return t.gated == Activation::silu && !t.accumulate ? Way::silu : Way::general;
}

template <Way W> MILL_INLINE void put_out(const LinearTask& t, int row, int pair, vf y0, vf y1) {
  if (W == Way::general) return put_pair(t, row, pair, y0, y1);
  float* dst = t.dst + size_t(row) * t.ld_dst + pair * (W == Way::silu ? kTileN : 2 * kTileN);
  if (W == Way::silu) return store(dst, gated_unit(Activation::silu, y0, y1));
  store(dst, W == Way::accumulate ? load<vf>(dst) + y0 : y0);
  store(dst + kTileN, W == Way::accumulate ? load<vf>(dst + kTileN) + y1 : y1);
}

// Rows [from, to) of a block.
template <bool Int8, Way W>
MILL_INLINE void put_rows(const LinearTask& t, const Block& b, const Sums& sums, int from, int to) {
  const float *scales = (const float*)t.w->scales + b.pair * 2 * kTileN, *x_scale = t.act->scale + b.row;
  const int32_t* x_sum = t.act->row_sum + b.row;
  const vf scale0 = Int8 ? load<vf>(scales) : vf{}, scale1 = Int8 ? load<vf>(scales + kTileN) : vf{};
  for (int r = from; r < to; r++) {
    const vi s0 = load<vi>(sums.at[r][0]), s1 = load<vi>(sums.at[r][1]);
    if (Int8) {
      const vi zero = splat_i(128 * x_sum[r]);
      const vf x = splat(x_scale[r]);
      put_out<W>(t, b.row + r, b.pair, (to_float(s0 - zero) * scale0) * x, (to_float(s1 - zero) * scale1) * x);
    } else {
      put_out<W>(t, b.row + r, b.pair, (vf)s0, (vf)s1);
    }
  }
}

// One line of inputs: up to 16 rows (R = 1) or 32 rows (R = 2) by a pair of tiles. All loads come first:
// no other order was faster, and where the core is held back the others were slower (docs/log.md).
template <int R, bool Int8> MILL_INLINE void multiply_line(const uint8_t* a0, const uint8_t* a1, const uint8_t* b) {
  tile_load<4>(a0, 64);
  if (R == 2) tile_load<5>(a1, 64);
  tile_load<6>(b, 64), tile_load<7>(b + 1024, 64);
  if (Int8) {
    tile_dot_su<0, 4, 6>(), tile_dot_su<1, 4, 7>();
    if (R == 2) tile_dot_su<2, 5, 6>(), tile_dot_su<3, 5, 7>();
  } else {
    tile_dot_bf16<0, 4, 6>(), tile_dot_bf16<1, 4, 7>();
    if (R == 2) tile_dot_bf16<2, 5, 6>(), tile_dot_bf16<3, 5, 7>();
  }
}

// Weights that are fetched while a block is multiplied, `step` bytes a line: those of the next pair come from
// memory, and the hardware alone is late.
struct Ahead {
  const uint8_t* at;
  int step;
};

// The sums of one block, while those of the block before, `last`, go out between the lines: tile and vector
// instructions run side by side.
template <int R, bool Int8, Way W>
static void multiply_block(const LinearTask& t, const Block& b, Sums& sums, Ahead ahead, const Block& last,
                           const Sums& last_sums) {
  const int lines = t.act->lines, step = (last.rows + lines - 1) / lines;
  const uint8_t *a0 = t.act->tiles(b.row), *a1 = t.act->tiles(b.row + 16);
  const uint8_t* w = t.w->data + size_t(b.pair) * lines * 2048;
  tile_zero<0>(), tile_zero<1>();
  if (R == 2) tile_zero<2>(), tile_zero<3>();
  for (int line = 0, row = 0; line < lines; line++) {
    multiply_line<R, Int8>(a0 + size_t(line) * 1024, a1 + size_t(line) * 1024, w + size_t(line) * 2048);
    for (int i = 0; i < ahead.step; i += 64)
      _mm_prefetch((const char*)ahead.at + size_t(line) * ahead.step + i, _MM_HINT_T1);
    const int stop = row + step < last.rows ? row + step : last.rows;
    put_rows<Int8, W>(t, last, last_sums, row, stop);
    row = stop;
  }
  tile_store<0>(sums.at[0][0], 128), tile_store<1>(sums.at[0][1], 128);
  if (R == 2) tile_store<2>(sums.at[16][0], 128), tile_store<3>(sums.at[16][1], 128);
}

template <bool Int8, Way W> static void linear_tiles(const LinearTask& t, int pair0, int pair1) {
  Sums sums[2];
  Block last;
  const size_t pair_bytes = size_t(t.act->lines) * 2048;
  const int shares = t.rows <= 32 ? 1 : t.rows <= 64 ? 2 : 4;  // row blocks that fetch a part of the next pair each
  int turn = 0;
  for (int pair = pair0; pair < pair1; pair++)
    for (int row = 0; row < t.rows; row += 32, turn ^= 1) {
      const Block block{row, pair, t.rows - row < 32 ? t.rows - row : 32};
      const uint8_t* next = pair + 1 < pair1 ? t.w->data + (pair + 1) * pair_bytes : t.next;
      const bool fetch = next && row / 32 < shares;
      const Ahead ahead{fetch ? next + pair_bytes / shares * (row / 32) : nullptr, fetch ? 2048 / shares : 0};
      if (block.rows > 16) multiply_block<2, Int8, W>(t, block, sums[turn], ahead, last, sums[turn ^ 1]);
      else multiply_block<1, Int8, W>(t, block, sums[turn], ahead, last, sums[turn ^ 1]);
      last = block;
    }
  put_rows<Int8, W>(t, last, sums[turn ^ 1], 0, last.rows);
}

template <bool Int8> static void linear_tiles(const LinearTask& t, int pair0, int pair1) {
  switch (way_of(t)) {
    case Way::store: return linear_tiles<Int8, Way::store>(t, pair0, pair1);
    case Way::accumulate: return linear_tiles<Int8, Way::accumulate>(t, pair0, pair1);
    case Way::silu: return linear_tiles<Int8, Way::silu>(t, pair0, pair1);
    case Way::general: return linear_tiles<Int8, Way::general>(t, pair0, pair1);
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
    case LinearKind::i8c: return t.rows < 4 ? linear_i8c(t, pair0, pair1) : linear_tiles<true>(t, pair0, pair1);
    case LinearKind::bf16: return linear_tiles<false>(t, pair0, pair1);
    default: return linear_grouped(t, pair0, pair1);
  }
}

// Up to 16 rows (R = 1) or 32 rows (R = 2) by two tiles. A's second 16 rows lie at a1.
template <int R> MILL_INLINE void multiply_bf16(const void* a0, const void* a1, size_t a_stride, const uint16_t* b) {
  tile_load<4>(a0, a_stride);
  if (R == 2) tile_load<5>(a1, a_stride);
  tile_load<6>(b, 64), tile_load<7>(b + 512, 64);
  tile_dot_bf16<0, 4, 6>(), tile_dot_bf16<1, 4, 7>();
  if (R == 2) tile_dot_bf16<2, 5, 6>(), tile_dot_bf16<3, 5, 7>();
}

template <int R> MILL_INLINE void store_sums(float* dst, size_t width) {
  tile_store<0>(dst, width * 4), tile_store<1>(dst + 16, width * 4);
  if (R == 2) tile_store<2>(dst + 16 * width, width * 4), tile_store<3>(dst + 16 * width + 16, width * 4);
}

template <int R> MILL_INLINE void zero_sums() {
  tile_zero<0>(), tile_zero<1>();
  if (R == 2) tile_zero<2>(), tile_zero<3>();
}

struct TileAttend {
  template <int R> static void score_rows(const AttendTask& t, const uint16_t* k, float* dst) {
    zero_sums<R>();
    for (int chunk = 0; chunk < t.head_pad / 32; chunk++) {
      const uint16_t* q = t.q + chunk * 32;
      multiply_bf16<R>(q, q + 16 * t.head_pad, t.head_pad * 2, k + chunk * 1024);
    }
    store_sums<R>(dst, kSpan);
  }
  static void scores(const AttendTask& t, const uint16_t* k, float* dst) {
    t.rows > 16 ? score_rows<2>(t, k, dst) : score_rows<1>(t, k, dst);
  }

  // Two tiles of dims (32) at a time: head_pad is a multiple of 32.
  template <int R>
  static void value_rows(const AttendTask& t, const SpanBlocks& span, const uint16_t* probs, float* dst) {
    for (int dims = 0; dims < t.head_pad / 16; dims += 2) {
      zero_sums<R>();
      for (int b = 0; b < span.count; b++) {
        const uint16_t* p = probs + b * kKvBlock;
        multiply_bf16<R>(p, p + 16 * kSpan, kSpan * 2, span.v[b] + dims * 512);
      }
      store_sums<R>(dst + dims * 16, t.head_pad);
    }
  }
  static void values(const AttendTask& t, const SpanBlocks& span, const uint16_t* probs, float* dst) {
    t.rows > 16 ? value_rows<2>(t, span, probs, dst) : value_rows<1>(t, span, probs, dst);
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
