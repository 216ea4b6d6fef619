// Causal attention of up to kAttendRows rows over a list of KV blocks, with an online softmax over spans of 16
// blocks (Milakov and Gimelshein 2018; FlashAttention). Keys that a row may not see get the score minus
// infinity and the probability zero, which leaves every sum unchanged: the result of a row depends only
// on the blocks listed, not on the other rows of the tile. A window (Child et al. 2019) hides old positions in
// the same way; what it hides from all rows of the tile is not read. For the same reason rows of several
// sequences may take the spans that these have in common in one tile, and go on alone (cascade attention; Hydragen,
// Juravsky et al. 2024): what a row knows then is kept, and no bit is different.
//
// Layout of one block of one head, in bf16 (head_pad is head_dim rounded up to 32):
//   K  [head_pad / 32][2 halves of 16 keys][16 pairs of dims][16 keys][2]
//   V  [head_pad / 16][16 pairs of keys][16 dims][2]
// Both are the operand B of TDPBF16PS. In int8 the order is the same, one byte a value, and behind the
// values lie 32 float scales, one a key. The bytes are widened to bf16, which holds them exactly; a key's
// scale multiplies its scores, a value's scale its probability. The sum of the softmax takes the
// probability as it is before that and before it is rounded. The scale of a key that a row may not see is never
// used. Policy is a type with two static functions, so that the AMX form and the plain form share the softmax:
//   scores(task, k_block, rows, dst)          dst[r * kSpan + key], 32 keys
//   values(task, v, probs, blocks..., dst)    dst[r * head_pad + dim] over the blocks of a span
#pragma once
#include "vec.h"

namespace mill::MILL_ISA {

struct SpanBlocks {
  const uint16_t* v[kSpanBlocks];
  const float* v_scale[kSpanBlocks];  // int8 only
  int count;
};

MILL_INLINE vf from_int8(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(p)));
#else
  // By way of 16 bits: GCC makes one step from 8 to 32 value by value.
  typedef int16_t vs __attribute__((vector_size(32)));
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(load<vb>(p), vs), vi), vf);
#endif
}

// One head of an int8 block as bf16, exactly: |value| <= 127. A bf16 is the upper word of its float.
static const uint16_t* widen_block(const uint8_t* block, int head_pad, uint16_t* dst) {
  for (int i = 0; i < kKvBlock * head_pad; i += 32) {
    const vf low = from_int8(block + i), high = from_int8(block + i + 16);
#if defined(__AVX512BW__)
    const vu upper_words = vu{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * 0x00040004u + 0x00030001u;
    store(dst + i, _mm512_permutex2var_epi16((__m512i)low, (__m512i)upper_words, (__m512i)high));
#else
    store(dst + i, __builtin_convertvector((vu)low >> 16, vh));
    store(dst + i + 16, __builtin_convertvector((vu)high >> 16, vh));
#endif
  }
  return dst;
}

static const float* block_scales(const uint8_t* block, int head_pad) {
  return (const float*)(block + kKvBlock * head_pad);
}

static void scale_scores(const AttendTask& t, const float* scales, float* s) {
  const vf low = load<vf>(scales), high = load<vf>(scales + 16);
  for (int r = 0; r < t.rows; r++) {
    store(s + r * kSpan, load<vf>(s + r * kSpan) * low);
    store(s + r * kSpan + 16, load<vf>(s + r * kSpan + 16) * high);
  }
}

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

// Zero if all scores are minus infinity, else not a number.
static float none_seen(const float* s, int keys) {
  vf poison{};
  for (int i = 0; i < keys; i += 16) {
    const vf x = load<vf>(s + i);
    poison = poison + (x == splat(-std::numeric_limits<float>::infinity()) ? vf{} : x * splat(0.0f));
  }
  return sum16(poison);
}

// Turns the scores of one row into probabilities; a score that is not finite makes the sum not a number. Returns
// the factor for what was summed before. A key whose probability is below 2^-125 counts as one that is not seen.
template <bool Int8>
static float softmax_row(const float* s, uint16_t* p, const SpanBlocks& span, float scale, float& top, float& sum) {
  const int keys = span.count * kKvBlock;
  vf peak = load<vf>(s), peak1 = load<vf>(s + 16);
  for (int i = 32; i < keys; i += 32) {
    peak = fmax16(peak, load<vf>(s + i));
    peak1 = fmax16(peak1, load<vf>(s + i + 16));
  }
  const float span_top = max16(fmax16(peak, peak1));
  if (span_top == -std::numeric_limits<float>::infinity()) {
    memset(p, 0, keys * sizeof(uint16_t));
    sum = sum + none_seen(s, keys);
    return 1.0f;
  }
  const float new_top = span_top > top ? span_top : top;
  const vf vtop = splat(new_top), vscale = splat(scale);
  vf lanes{};
  for (int i = 0; i < keys; i += 16) {
    const vf e = exp2_or_zero((load<vf>(s + i) - vtop) * vscale);
    lanes = lanes + e;
    if constexpr (Int8) {
      const vf scaled = e * load<vf>(span.v_scale[i / kKvBlock] + i % kKvBlock);
      store(p + i, to_bf16(e == vf{} ? vf{} : scaled));
    } else {
      store(p + i, to_bf16(e));
    }
  }
  const vf alpha = exp2_or_zero(splat((top - new_top) * scale));
  sum = sum * alpha[0] + sum16(lanes);
  top = new_top;
  return alpha[0];
}

// Scores minus infinity for the keys of one block that each row may not see.
static void mask_block(const AttendTask& t, const int32_t* block, float* s) {
  const float hidden = -std::numeric_limits<float>::infinity();
  for (int r = 0; r < t.rows; r++) {
    const int seen = t.positions[r] - block[1] + 1, first = seen - t.window;
    const int stop = seen < block[2] ? seen : block[2];
    for (int key = 0; key < first && key < kKvBlock; key++) s[r * kSpan + key] = hidden;
    for (int key = stop > 0 ? stop : 0; key < kKvBlock; key++) s[r * kSpan + key] = hidden;
  }
}

// Positions that some row of the tile sees, [first, last], and those that all rows see.
struct Sight {
  int first, last, all_first, all_last;
  explicit Sight(const AttendTask& t) : first(t.positions[0]), last(t.positions[0]) {
    for (int r = 1; r < t.rows; r++) {
      first = t.positions[r] < first ? t.positions[r] : first;
      last = t.positions[r] > last ? t.positions[r] : last;
    }
    all_first = last - (t.window - 1), all_last = first;
    first -= t.window - 1;
  }
  bool covers(const int32_t* block) const {
    return block[2] == kKvBlock && block[1] >= all_first && block[1] + kKvBlock - 1 <= all_last;
  }
  bool meets(const int32_t* block) const {
    return block[2] > 0 && block[1] <= last && block[1] + block[2] > first;
  }
};

MILL_INLINE void prefetch(const uint8_t* at, int bytes) {
  for (int i = 0; i < bytes; i += 128) __builtin_prefetch(at + i, 0, 2);  // the hardware takes lines in pairs
}

// Scores of one block into `s`, and its values into the span. The values, and the keys of block `next`, are fetched
// on the way.
template <class Policy, bool Int8>
static void add_block(const AttendTask& t, const AttendScratch& scratch, int block, int next, float* s,
                      SpanBlocks& span) {
  const uint8_t *k = t.k + block * t.block_stride, *v = t.v + block * t.block_stride;
  const int size = kKvBlock * t.head_pad;
  // Few rows wait for memory, and each page is a place of its own, which the hardware does not foresee.
  if (t.rows <= 16) {
    const int bytes = Int8 ? size + kKvBlock * int(sizeof(float)) : size * 2;
    prefetch(v, bytes);
    if (next >= 0) prefetch(t.k + next * t.block_stride, bytes);
  }
  if constexpr (Int8) {
    Policy::scores(t, widen_block(k, t.head_pad, scratch.wide + kSpanBlocks * size), s);
    scale_scores(t, block_scales(k, t.head_pad), s);
    span.v_scale[span.count] = block_scales(v, t.head_pad);
    span.v[span.count] = widen_block(v, t.head_pad, scratch.wide + span.count * size);
  } else {
    Policy::scores(t, (const uint16_t*)k, s);
    span.v[span.count] = (const uint16_t*)v;
  }
  span.count++;
}

// Where a row was when its earlier blocks paused, or the beginning.
static void begin_rows(const AttendTask& t, float* acc, SoftmaxState* state) {
  memset(acc, 0, size_t(t.rows) * t.head_pad * sizeof(float));
  for (int r = 0; r < t.rows; r++) {
    state[r] = {-std::numeric_limits<float>::infinity(), 0};
    if (!t.resumes) continue;
    state[r] = t.states[t.out_offset[r] / t.head_dim];
    memcpy(acc + r * t.head_pad, t.out + t.out_offset[r], t.head_dim * sizeof(float));
  }
}

static void end_rows(const AttendTask& t, const float* acc, const SoftmaxState* state) {
  for (int r = 0; r < t.rows; r++) {
    float* out = t.out + t.out_offset[r];
    if (t.pauses) {
      t.states[t.out_offset[r] / t.head_dim] = state[r];
      memcpy(out, acc + r * t.head_pad, t.head_dim * sizeof(float));
      continue;
    }
    const float inv = state[r].sum == 0 ? 0.0f : 1.0f / state[r].sum;
    for (int d = 0; d < t.head_dim; d++) out[d] = acc[r * t.head_pad + d] * inv;
  }
}

template <class Policy, bool Int8> static void attend_blocks(const AttendTask& t, const AttendScratch& scratch) {
  SoftmaxState state[kAttendRows];
  const Sight sight(t);
  begin_rows(t, scratch.acc, state);
  for (int first = 0; first < t.num_blocks; first += kSpanBlocks) {
    SpanBlocks span{};
    // A block that no row sees adds zeros: it is left out, and its place in the span with it.
    for (int b = first; b < t.num_blocks && b < first + kSpanBlocks; b++) {
      const int32_t* block = t.blocks + b * 3;
      if (!sight.meets(block)) continue;
      float* s = scratch.scores + span.count * kKvBlock;
      add_block<Policy, Int8>(t, scratch, block[0], b + 1 < t.num_blocks ? block[3] : -1, s, span);
      if (!sight.covers(block)) mask_block(t, block, s);
    }
    if (!span.count) continue;
    float alpha[kAttendRows];
    for (int r = 0; r < t.rows; r++)
      alpha[r] = softmax_row<Int8>(scratch.scores + r * kSpan, scratch.probs + r * kSpan, span, t.scale,
                                   state[r].top, state[r].sum);
    Policy::values(t, span, scratch.probs, scratch.span);
    for (int r = 0; r < t.rows; r++)
      for (int d = 0; d < t.head_pad; d += 16) {
        float* a = scratch.acc + r * t.head_pad + d;
        store(a, load<vf>(a) * splat(alpha[r]) + load<vf>(scratch.span + r * t.head_pad + d));
      }
  }
  end_rows(t, scratch.acc, state);
}

template <class Policy> static void attend(const AttendTask& t, const AttendScratch& scratch) {
  t.kv_int8 ? attend_blocks<Policy, true>(t, scratch) : attend_blocks<Policy, false>(t, scratch);
}

}  // namespace mill::MILL_ISA
