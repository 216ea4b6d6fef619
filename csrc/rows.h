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
  const vi x = nearest16(a * splat(inv)), y = nearest16(b * splat(inv));
  store(q, narrow16(x));
  store(q + 16, narrow16(y));
  return x + y;
}

MILL_INLINE int32_t sum_lanes(vi v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t lanes[16], sum = 0;
  store(lanes, v);
  for (int l = 0; l < 16; l++) sum += lanes[l];
  return sum;
#endif
}

// Rows below this are zero in 8 bits.
constexpr float kTiny = 1e-30f;

// The largest magnitudes as bits: those of what is not finite are larger than all others.
struct RowPeak {
  vi top{};
  MILL_INLINE void take(vf x) { top = max16(top, (vi)((vu)x & 0x7fffffffu)); }
  // Not a number if any value was not finite.
  MILL_INLINE float value() const {
    int32_t bits = 0;
#if defined(__AVX512F__)
    bits = _mm512_reduce_max_epi32((__m512i)top);
#else
    for (int l = 0; l < 16; l++) bits = top[l] > bits ? top[l] : bits;
#endif
    float peak;
    memcpy(&peak, &bits, sizeof peak);
    return bits > 0x7f7fffff ? std::numeric_limits<float>::quiet_NaN() : peak;
  }
};

// Rounds a row whose largest magnitude is `peak`; one that is not a number makes the scale, and so every output of
// the row, not a number.
static void round_row(const float* src, int d, float peak, const Act& act, int row) {
  const float inv = peak > kTiny ? 127.0f / peak : 0.0f;
  vi total{};
  uint8_t* q = act.line(row, 0);
  int i = 0;
  if (inv > 0) {
    const vf factor = splat(inv);
    for (; i + 64 <= d; i += 64, q += 1024)
      for (int j = 0; j < 64; j += 16) {
        const vi x = nearest16(load<vf>(src + i + j) * factor);
        store(q + j, narrow16(x));
        total += x;
      }
  }
  for (; i < act.lines * 64; i += 64, q += 1024)
    for (int j = 0; j < 64; j += 32)
      total += round_group(load_row(src, i + j, d), load_row(src, i + j + 16, d), inv, q + j);
  act.scale[row] = peak / 127.0f;
  act.row_sum[row] = sum_lanes(total);
}

static void quantize_int8(const float* src, int d, const Act& act, int row) {
  RowPeak peak;
  int i = 0;
  for (; i + 16 <= d; i += 16) peak.take(load<vf>(src + i));
  if (i < d) peak.take(load_head(src + i, d - i));
  round_row(src, d, peak.value(), act, row);
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
  RowPeak peak;
  for (i = 0; i + 16 <= d; i += 16) {
    const vf y = (load<vf>(src + i) * splat(inv)) * load<vf>(weight + i);
    peak.take(y);
    store(tmp + i, y);
  }
  if (i < d) {
    const vf y = (load_head(src + i, d - i) * splat(inv)) * load_head(weight + i, d - i);
    peak.take(y);
    memcpy(tmp + i, &y, (d - i) * sizeof(float));
  }
  if (kind == ActKind::int8) return round_row(tmp, d, peak.value(), act, row);
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

// Keys and values of one token and head into a block of the cache; attend.h has the layout. False if a value is not
// finite.
static bool put_kv(const uint16_t* key, const float* value, int head_dim, int slot, uint16_t* k_page,
                   uint16_t* v_page) {
  uint16_t *k = k_page + k_first(slot), *v = v_page + v_first(slot);
  int i = 0;
  for (; i + 2 <= head_dim; i += 2) memcpy(k + k_step(i), key + i, 4);
  RowPeak peak;
  for (i = 0; i + 16 <= head_dim; i += 16) {
    const vf x = load<vf>(value + i);
    peak.take(x);
#if defined(__AVX512BW__)
    const vu wide = __builtin_convertvector(to_bf16(x), vu);
    // The other token of the pair keeps its half of each word.
    _mm512_mask_storeu_epi16(v - slot % 2 + v_step(i), slot % 2 ? 0xaaaaaaaau : 0x55555555u,
                             (__m512i)(slot % 2 ? wide << 16 : wide));
#else
    const vh h = to_bf16(x);
    for (int j = 0; j < 16; j++) v[v_step(i + j)] = h[j];
#endif
  }
  if (i < head_dim) peak.take(load_head(value + i, head_dim - i));
  for (; i < head_dim; i++) v[v_step(i)] = to_bf16(value[i]);
  return peak.value() == peak.value();
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
