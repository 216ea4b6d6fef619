// Operations on one row of activations: norm, quantise, rotation, and the sum over a row of logits.
#pragma once
#include "vec.h"

namespace mill::MILL_ISA {

// 16 values from `at`, zeros past the end of the row.
MILL_INLINE vf load_row(const float* src, int at, int d) {
  return at + 16 <= d ? load<vf>(src + at) : load_head(src + at, d > at ? d - at : 0);
}

// Rounds 32 inputs to 8 bits; returns their sums by lane. `inv` is 0 for a row that has no scale: then the
// inputs may be anything, and count as 0.
MILL_INLINE vi round_group(vf a, vf b, float inv, uint8_t* q) {
  if (!(inv > 0)) a = b = vf{};
  const vi x = __builtin_convertvector(round16(a * splat(inv)), vi);
  const vi y = __builtin_convertvector(round16(b * splat(inv)), vi);
  store(q, __builtin_convertvector(x, vb));
  store(q + 16, __builtin_convertvector(y, vb));
  return x + y;
}

MILL_INLINE int32_t sum_lanes(vi v) {
  int32_t lanes[16], sum = 0;
  store(lanes, v);
  for (int l = 0; l < 16; l++) sum += lanes[l];
  return sum;
}

// Rows below this are zero in 8 bits.
constexpr float kTiny = 1e-30f;

// A value that is not finite makes the scale, and so every output of the row, not a number.
static void quantize_int8(const float* src, int d, const Act& act, int row) {
  vf top{}, poison{};
  for (int i = 0; i < d; i += 16) {
    const vf x = load_row(src, i, d);
    top = fmax16(top, fabs16(x));
    poison = poison + x * splat(0.0f);
  }
  const float peak = max16(top) + sum16(poison), inv = peak > kTiny ? 127.0f / peak : 0.0f;
  vi total{};
  for (int i = 0; i < act.lines * 2; i++)
    total += round_group(load_row(src, i * 32, d), load_row(src, i * 32 + 16, d), inv,
                         act.line(row, i / 2) + i % 2 * 32);
  act.scale[row] = peak / 127.0f;
  act.row_sum[row] = sum_lanes(total);
}

static void quantize_groups(const float* src, int d, const Act& act, int row) {
  const size_t first = size_t(row) * act.lines * 2;
  for (int g = 0; g < act.lines * 2; g++) {
    const vf a = load_row(src, g * kGroup, d), b = load_row(src, g * kGroup + 16, d);
    const float poison = sum16((a + b) * splat(0.0f));
    const float peak = max16(fmax16(fabs16(a), fabs16(b))) + poison, inv = peak > kTiny ? 127.0f / peak : 0.0f;
    act.group_sums[first + g] = sum_lanes(round_group(a, b, inv, act.line(row, g / 2) + g % 2 * 32));
    act.scale[first + g] = peak / 127.0f;
  }
}

static void quantize_bf16(const float* src, int d, const Act& act, int row) {
  for (int i = 0; i < act.lines * 2; i++)
    store(act.line(row, i / 2) + i % 2 * 32, to_bf16(load_row(src, i * 16, d)));
}

static void quantize(const float* src, int d, Act& act, int row, ActKind kind) {
  switch (kind) {
    case ActKind::int8: return quantize_int8(src, d, act, row);
    case ActKind::int8_groups: return quantize_groups(src, d, act, row);
    case ActKind::bf16: return quantize_bf16(src, d, act, row);
    case ActKind::float32: return;
  }
}

// tmp: d floats of scratch; it may be src, and is the result where the kind is float32.
static void norm(const float* src, int d, const float* weight, float eps, float* tmp, Act& act, int row,
                 ActKind kind) {
  vf sum{};
  int i = 0;
  for (; i + 16 <= d; i += 16) {
    const vf x = load<vf>(src + i);
    sum = sum + x * x;
  }
  if (i < d) {
    const vf x = load_head(src + i, d - i);
    sum = sum + x * x;
  }
  const float inv = 1.0f / std::sqrt(sum16(sum) / float(d) + eps);
  for (i = 0; i + 16 <= d; i += 16) store(tmp + i, (load<vf>(src + i) * splat(inv)) * load<vf>(weight + i));
  for (; i < d; i++) tmp[i] = (src[i] * inv) * weight[i];
  quantize(tmp, d, act, row, kind);
}

// Rotates one head; cos and sin are the rows of its position, head_dim / 2 values each, or null: rounds only.
static void rope(const float* src, int head_dim, const float* cos, const float* sin, uint16_t* dst) {
  if (!cos) {
    for (int i = 0; i < head_dim; i++) dst[i] = to_bf16(src[i]);
    return;
  }
  const int half = head_dim / 2;
  int i = 0;
  for (; i + 16 <= half; i += 16) {
    const vf a = load<vf>(src + i), b = load<vf>(src + half + i), c = load<vf>(cos + i), s = load<vf>(sin + i);
    store(dst + i, to_bf16(a * c - b * s));
    store(dst + half + i, to_bf16(b * c + a * s));
  }
  for (; i < half; i++) {
    dst[i] = to_bf16(src[i] * cos[i] - src[half + i] * sin[i]);
    dst[half + i] = to_bf16(src[half + i] * cos[i] + src[i] * sin[i]);
  }
}

// Not a number if any value of the row is not finite.
static double log_sum_exp(const float* row, int n) {
  vf top = splat(-std::numeric_limits<float>::infinity()), poison{};
  for (int i = 0; i < n; i += 16) {
    const int k = n - i < 16 ? n - i : 16;
    vf x = splat(row[i]);
    memcpy(&x, row + i, k * sizeof(float));
    top = fmax16(top, x);
    poison = poison + x * splat(0.0f);
  }
  const float peak = max16(top);
  const vf log2e = splat(1.44269504088896341f), low = splat(-125.0f);
  double total = 0;
  int i = 0;
  while (i + 16 <= n) {
    vf sum{};
    for (const int stop = i + 512; i + 16 <= n && i < stop; i += 16)
      sum = sum + exp2_16(fmax16((load<vf>(row + i) - splat(peak)) * log2e, low));
    total += double(sum16(sum));
  }
  for (; i < n; i++) total += std::exp(double(row[i]) - double(peak));
  return double(peak) + std::log(total) + double(sum16(poison));
}

}  // namespace mill::MILL_ISA
