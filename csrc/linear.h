// Matrix products over tile-packed weights, written once over small primitives that each instruction set
// defines before including this file (dot_*.h). For weights with a scale a group of inputs:
//   Acc / Bytes          16 int32 sums in the layout dot4 likes / 64 weight bytes (16 outputs x 4 inputs)
//   load_bytes, low_nibbles, high_nibbles
//   dot4(acc, bytes, x)  acc[n] += sum over j < 4 of unsigned bytes[n][j] * signed x[j], |x[j]| < 128
//   dot4_small           the same for bytes below 128, which some sets do faster
//   finish(acc)          the sums as 16 int32 lanes
// For 8-bit weights with a scale an output, register by register:
//   Chain / Weights      kWidth int32 sums, in order / kWidth x 4 weight bytes, less kZero
//   load_weights, add_chains, store_chain
//   dot(chain, w, x)     chain[n] += sum over j < 4 of (bytes[n][j] - kZero) * signed x[j], |x[j]| < 128
//   kRows, kColumns      rows, and registers of outputs, that one pass over the inputs multiplies
// Weights are stored unsigned with a zero point (128 for 8 bits, 8 or 0 for 4 bits), taken out again
// with the sums of the activations, which is exact. Work comes in pairs of tiles, 32 outputs.
#pragma once
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

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

// Byte of register `i` in a line of a pair of tiles, whose registers are `bytes` wide.
constexpr int register_at(int i, int bytes) { return i * bytes / 64 * 1024 + i * bytes % 64; }

// Weights come from memory in the first pass over them, and the hardware alone is late: one row fetches what comes a
// page later, many rows the next pair of tiles.
MILL_INLINE size_t fetch_distance(const LinearTask& t) { return t.rows == 1 ? 4096 : size_t(t.act->lines) * 2048; }
MILL_INLINE void fetch(const uint8_t* p) { __builtin_prefetch(p), __builtin_prefetch(p + 64); }

// R rows by C registers of outputs, from register `first` of a pair on. One row alone gets more chains of sums:
// a chain waits for itself.
template <int R, int C, bool Fetch>
static void i8c_columns(const LinearTask& t, int row, int pair, int first, int32_t* sums) {
  constexpr int chains = R == 1 && C < 4 ? 2 : 1;
  const int lines = t.act->lines;
  const size_t ahead = fetch_distance(t);
  const uint8_t *x = t.act->line(row, 0), *w = t.w->data + size_t(pair) * lines * 2048;
  Chain acc[chains][R][C] = {};
  for (int line = 0; line < lines; line++, x += 1024, w += 2048)
#pragma GCC unroll 4
    for (int quad = 0; quad < 16; quad++) {
      if (Fetch) fetch(w + ahead + quad * 128);
      Weights b[C];
      for (int c = 0; c < C; c++) b[c] = load_weights(w + register_at(first + c, 4 * kWidth) + quad * 64);
      for (int r = 0; r < R; r++) {
        const int32_t q = load_quad(x + r * 64 + quad * 4);
        for (int c = 0; c < C; c++) dot(acc[quad % chains][r][c], b[c], q);
      }
    }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) {
      for (int i = 1; i < chains; i++) acc[0][r][c] = add_chains(acc[0][r][c], acc[i][r][c]);
      store_chain(sums + r * 2 * kTileN + (first + c) * kWidth, acc[0][r][c]);
    }
}

// 8 bits, one scale an output: R rows, all of them in one tile of rows, by a pair of tiles. Rows past the last are
// multiplied and dropped.
template <int R> static void i8c_block(const LinearTask& t, int row, int pair) {
  constexpr int registers = 2 * kTileN / kWidth;
  alignas(64) int32_t sums[R * 2 * kTileN];
  constexpr int columns = R == 1 ? registers : kColumns;
  if (row == 0) i8c_columns<R, columns, true>(t, row, pair, 0, sums);
  for (int i = row == 0 ? columns : 0; i < registers; i += columns)
    i8c_columns<R, columns, false>(t, row, pair, i, sums);
  const float* scales = (const float*)t.w->scales + pair * 2 * kTileN;
  const vf scale0 = load<vf>(scales), scale1 = load<vf>(scales + kTileN);
  for (int r = 0; r < R && row + r < t.rows; r++) {
    const vi zero = splat_i((128 - kZero) * t.act->row_sum[row + r]);
    const vf x_scale = splat(t.act->scale[row + r]);
    const vi s0 = load<vi>(sums + r * 2 * kTileN), s1 = load<vi>(sums + r * 2 * kTileN + kTileN);
    put_pair(t, row + r, pair, (to_float(s0 - zero) * scale0) * x_scale, (to_float(s1 - zero) * scale1) * x_scale);
  }
}

static void linear_i8c(const LinearTask& t, int pair0, int pair1) {
  for (int pair = pair0; pair < pair1; pair++) {
    int row = 0;
    for (; row + kRows / 2 < t.rows; row += kRows) i8c_block<kRows>(t, row, pair);
    if (row + 1 < t.rows) i8c_block<kRows / 2>(t, row, pair);
    else if (row < t.rows) i8c_block<1>(t, row, pair);
  }
}

// The rows' lines of 64 input bytes.
template <int R> struct Lines {
  const uint8_t* at[R];
  Lines(const Act& act, int row) {
    for (int r = 0; r < R; r++) at[r] = act.line(row + r, 0);
  }
  const uint8_t* line(int r, int i) const { return at[r] + size_t(i) * 1024; }
};

// One register of floats. Vectors that are wider are kept in memory by some compilers.
#if defined(__AVX512F__)
constexpr int kRegister = 64, kBf16Rows = 6, kBf16Columns = 2;
#elif defined(__AVX2__)
constexpr int kRegister = 32, kBf16Rows = 6, kBf16Columns = 1;
#else
constexpr int kRegister = 16, kBf16Rows = 4, kBf16Columns = 2;
#endif
typedef float vf_register __attribute__((vector_size(kRegister)));
typedef uint32_t vu_register __attribute__((vector_size(kRegister)));

// acc + a * b, where the product is exact: fused or not, the same bits.
MILL_INLINE vf_register madd_register(vf_register a, float b, vf_register acc) {
#if defined(__AVX512F__)
  return (vf_register)_mm512_fmadd_ps((__m512)a, _mm512_set1_ps(b), (__m512)acc);
#elif defined(__AVX2__)
  return (vf_register)_mm256_fmadd_ps((__m256)a, _mm256_set1_ps(b), (__m256)acc);
#elif defined(__ARM_NEON)
  return (vf_register)vfmaq_n_f32((float32x4_t)acc, (float32x4_t)a, b);
#else
  return acc + a * b;
#endif
}

// bf16, summed in the order of TDPBF16PS (see mill.h): R rows by C registers of outputs, from register `first` of a
// pair on. The inputs of a line are made floats first, for all its outputs.
template <int R, int C, bool Fetch>
static void bf16_columns(const LinearTask& t, int row, int pair, int first, float* sums) {
  const int lines = t.act->lines;
  const size_t ahead = fetch_distance(t);
  const uint8_t* w = t.w->data + size_t(pair) * lines * 2048;
  vf_register total[R][C] = {};
  for (int line = 0; line < lines; line++, w += 2048) {
    alignas(64) float x[R][32];
    for (int r = 0; r < R; r++) {
      const auto* values = (const uint16_t*)t.act->line(row + r, line);
      store(x[r], from_bf16(load<vh>(values))), store(x[r] + 16, from_bf16(load<vh>(values + 16)));
    }
    vf_register even[R][C] = {}, odd[R][C] = {};
    for (int i = 0; i < 16; i++) {
      if (Fetch) fetch(w + ahead + i * 128);
      vf_register we[C], wo[C];
      for (int c = 0; c < C; c++) {
        const auto pairs = load<vu_register>(w + register_at(first + c, kRegister) + i * 64);
        we[c] = (vf_register)(pairs << 16), wo[c] = (vf_register)(pairs & 0xffff0000u);
      }
      for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) {
          even[r][c] = madd_register(we[c], x[r][2 * i], even[r][c]);
          odd[r][c] = madd_register(wo[c], x[r][2 * i + 1], odd[r][c]);
        }
    }
    for (int r = 0; r < R; r++)
      for (int c = 0; c < C; c++) total[r][c] = total[r][c] + (even[r][c] + odd[r][c]);
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) store(sums + r * 2 * kTileN + (first + c) * (kRegister / 4), total[r][c]);
}

// R rows by a pair of tiles. Rows past the last are multiplied and dropped.
template <int R> static void bf16_block(const LinearTask& t, int row, int pair) {
  alignas(64) float sums[R * 2 * kTileN];
  constexpr int registers = 128 / kRegister, columns = R == 1 && registers < 8 ? registers : kBf16Columns;
  if (row == 0) bf16_columns<R, columns, true>(t, row, pair, 0, sums);
  for (int i = row == 0 ? columns : 0; i < registers; i += columns)
    bf16_columns<R, columns, false>(t, row, pair, i, sums);
  for (int r = 0; r < R && row + r < t.rows; r++)
    put_pair(t, row + r, pair, load<vf>(sums + r * 2 * kTileN), load<vf>(sums + r * 2 * kTileN + kTileN));
}

static void linear_bf16(const LinearTask& t, int pair0, int pair1) {
  for (int pair = pair0; pair < pair1; pair++) {
    int row = 0;
    for (; row + kBf16Rows / 2 < t.rows; row += kBf16Rows) bf16_block<kBf16Rows>(t, row, pair);
    if (row + 1 < t.rows) bf16_block<kBf16Rows / 2>(t, row, pair);
    else if (row < t.rows) bf16_block<1>(t, row, pair);
  }
}

}  // namespace mill::MILL_ISA
