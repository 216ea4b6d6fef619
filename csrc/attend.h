// Causal attention of up to 16 rows over a list of KV blocks, with an online softmax over spans of 16
// blocks (Milakov and Gimelshein 2018; FlashAttention). Keys that a row may not see get the score minus
// infinity and the probability zero, which leaves every sum unchanged: the result of a row depends only
// on the blocks listed, not on the other rows of the tile.
//
// Layout of one block of one head, in bf16 (head_pad is head_dim rounded up to 32):
//   K  [head_pad / 32][2 halves of 16 keys][16 pairs of dims][16 keys][2]
//   V  [head_pad / 16][16 pairs of keys][16 dims][2]
// Both are the operand B of TDPBF16PS. Policy is a type with two static functions, so that the AMX form
// and the plain form share the softmax:
//   scores(task, k_block, rows, dst)          dst[r * kSpan + key], 32 keys
//   values(task, v, probs, blocks..., dst)    dst[r * head_pad + dim] over the blocks of a span
#pragma once
#include "vec.h"

namespace mill::MILL_ISA {

struct SpanBlocks {
  const uint16_t* v[kSpanBlocks];
  int count;
};

struct PlainAttend {
  template <int R> static void scores_rows(const AttendTask& t, const uint16_t* k, int row, float* dst) {
    for (int half = 0; half < 2; half++) {
      vf total[R] = {};
      for (int chunk = 0; chunk < t.head_pad / 32; chunk++) {
        const uint16_t* tile = k + (chunk * 2 + half) * 512;
        vf even[R] = {}, odd[R] = {};
        for (int pair = 0; pair < 16; pair++) {
          const vu kp = load<vu>(tile + pair * 32);
          const vf ke = even_bf16(kp), ko = odd_bf16(kp);
          for (int r = 0; r < R; r++) {
            const uint16_t* q = t.q + size_t(row + r) * t.head_pad + chunk * 32 + pair * 2;
            even[r] = madd_exact(ke, splat(from_bf16(q[0])), even[r]);
            odd[r] = madd_exact(ko, splat(from_bf16(q[1])), odd[r]);
          }
        }
        for (int r = 0; r < R; r++) total[r] = total[r] + (even[r] + odd[r]);
      }
      for (int r = 0; r < R; r++) store(dst + (row + r) * kSpan + half * 16, total[r]);
    }
  }
  static void scores(const AttendTask& t, const uint16_t* k, float* dst) {
    int row = 0;
    for (; row + 4 <= t.rows; row += 4) scores_rows<4>(t, k, row, dst);
    for (; row < t.rows; row++) scores_rows<1>(t, k, row, dst);
  }

  template <int R>
  static void values_rows(const AttendTask& t, const SpanBlocks& span, const uint16_t* probs, int row, float* dst) {
    for (int dims = 0; dims < t.head_pad / 16; dims++) {
      vf total[R] = {};
      for (int b = 0; b < span.count; b++) {
        const uint16_t* tile = span.v[b] + dims * 512;
        vf even[R] = {}, odd[R] = {};
        for (int pair = 0; pair < 16; pair++) {
          const vu vp = load<vu>(tile + pair * 32);
          const vf ve = even_bf16(vp), vo = odd_bf16(vp);
          for (int r = 0; r < R; r++) {
            const uint16_t* p = probs + (row + r) * kSpan + b * kKvBlock + pair * 2;
            even[r] = madd_exact(ve, splat(from_bf16(p[0])), even[r]);
            odd[r] = madd_exact(vo, splat(from_bf16(p[1])), odd[r]);
          }
        }
        for (int r = 0; r < R; r++) total[r] = total[r] + (even[r] + odd[r]);
      }
      for (int r = 0; r < R; r++) store(dst + (row + r) * t.head_pad + dims * 16, total[r]);
    }
  }
  static void values(const AttendTask& t, const SpanBlocks& span, const uint16_t* probs, float* dst) {
    int row = 0;
    for (; row + 4 <= t.rows; row += 4) values_rows<4>(t, span, probs, row, dst);
    for (; row < t.rows; row++) values_rows<1>(t, span, probs, row, dst);
  }
};

struct SoftmaxState {
  float top[16], sum[16];
};

// Turns the scores of one row into probabilities; a score that is not finite makes the sum not a number. Returns the factor for what was summed before.
static float softmax_row(float* s, uint16_t* p, int keys, float scale, float& top, float& sum) {
  const float inf = std::numeric_limits<float>::infinity();
  vf peak = splat(-inf);
  for (int i = 0; i < keys; i += 16) peak = fmax16(peak, load<vf>(s + i));
  const float span_top = max16(peak);
  if (span_top == -inf) {
    memset(p, 0, keys * sizeof(uint16_t));
    return 1.0f;
  }
  const float new_top = span_top > top ? span_top : top;
  const vf low = splat(-125.0f), vtop = splat(new_top), vscale = splat(scale);
  vf lanes{}, poison{};
  for (int i = 0; i < keys; i += 16) {
    const vf x = load<vf>(s + i);
    const vf e = exp2_16(fmax16((x - vtop) * vscale, low));
    const auto masked = x == splat(-inf);
    poison = poison + (masked ? vf{} : x * splat(0.0f));
    const vh h = to_bf16(masked ? vf{} : e);
    store(p + i, h);
    lanes = lanes + from_bf16(h);
  }
  const vf alpha = exp2_16(fmax16(splat((top - new_top) * scale), low));
  sum = (sum * alpha[0] + sum16(lanes)) + sum16(poison);
  top = new_top;
  return alpha[0];
}

// Scores minus infinity for the keys of one block that each row may not see.
static void mask_block(const AttendTask& t, const int32_t* block, float* s) {
  for (int r = 0; r < t.rows; r++) {
    int seen = t.positions[r] - block[1] + 1;
    seen = seen < block[2] ? seen : block[2];
    for (int key = seen > 0 ? seen : 0; key < kKvBlock; key++)
      s[r * kSpan + key] = -std::numeric_limits<float>::infinity();
  }
}

static bool any_row_sees(const AttendTask& t, const int32_t* block) {
  if (block[2] <= 0) return false;
  for (int r = 0; r < t.rows; r++)
    if (t.positions[r] >= block[1]) return true;
  return false;
}

template <class Policy> static void attend(const AttendTask& t, const AttendScratch& scratch) {
  SoftmaxState state;
  for (int r = 0; r < 16; r++) state.top[r] = -std::numeric_limits<float>::infinity(), state.sum[r] = 0;
  memset(scratch.acc, 0, size_t(t.rows) * t.head_pad * sizeof(float));
  for (int first = 0; first < t.num_blocks; first += kSpanBlocks) {
    SpanBlocks span{};
    // A block that no row sees adds zeros: it is left out, and its place in the span with it.
    for (int b = first; b < t.num_blocks && b < first + kSpanBlocks; b++) {
      const int32_t* block = t.blocks + b * 3;
      if (!any_row_sees(t, block)) continue;
      float* s = scratch.scores + span.count * kKvBlock;
      Policy::scores(t, t.k + block[0] * t.block_stride, s);
      mask_block(t, block, s);
      span.v[span.count++] = t.v + block[0] * t.block_stride;
    }
    if (!span.count) continue;
    float alpha[16];
    for (int r = 0; r < t.rows; r++)
      alpha[r] = softmax_row(scratch.scores + r * kSpan, scratch.probs + r * kSpan, span.count * kKvBlock, t.scale,
                             state.top[r], state.sum[r]);
    Policy::values(t, span, scratch.probs, scratch.span);
    for (int r = 0; r < t.rows; r++)
      for (int d = 0; d < t.head_pad; d += 16) {
        float* a = scratch.acc + r * t.head_pad + d;
        store(a, load<vf>(a) * splat(alpha[r]) + load<vf>(scratch.span + r * t.head_pad + d));
      }
  }
  for (int r = 0; r < t.rows; r++) {
    const float inv = state.sum[r] == 0 ? 0.0f : 1.0f / state.sum[r];
    float* out = t.out + t.out_offset[r];
    for (int d = 0; d < t.head_dim; d++) out[d] = scratch.acc[r * t.head_pad + d] * inv;
  }
}

}  // namespace mill::MILL_ISA
