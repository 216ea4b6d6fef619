// Choosing the next token of a row: edits of the logits, filters, and a race of exponentials (the Gumbel
// maximum). src/tokenmill/kernels/sampling_twin.py says what it means and does it in numpy.
//
// A row is read in groups of 64 tokens. Of each group the largest logit and the smallest noise are known
// first; that bounds what any of its tokens can reach, so few groups are looked at token by token. Both
// filters keep the first tokens in the order of (distance from the largest logit, index), so a filter is a
// distance and the last index there. It is found by bisection over the floats; weights are multiples of 2^-32
// and their sums in double are exact, in any order.
#pragma once
#include "vec.h"

namespace mill::MILL_ISA {

typedef double vd __attribute__((vector_size(128)));
typedef uint64_t vq __attribute__((vector_size(128)));

constexpr int kRace = kRaceGroup;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kWeightless = 23.0f;  // a token this far from the largest rounds to no weight
constexpr float kSlack = 1e-3f;       // far above the rounding of a score, below 100 in magnitude

MILL_INLINE vu lanes() { return vu{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
MILL_INLINE vu splat_u(uint32_t x) { return x - vu{}; }

// Comparisons in pieces as wide as the registers: of wider ones the compiler makes sixteen single ones.
#if defined(__AVX512F__)
constexpr int kPiece = 64;
#elif defined(__AVX2__)
constexpr int kPiece = 32;
#else
constexpr int kPiece = 16;
#endif
typedef float vf_piece __attribute__((vector_size(kPiece)));
typedef int32_t vi_piece __attribute__((vector_size(kPiece)));

MILL_INLINE vi at_most(vf a, vf b) {
  vi result;
  for (int i = 0; i < 64; i += kPiece)
    store((char*)&result + i, load<vf_piece>((char*)&a + i) <= load<vf_piece>((char*)&b + i));
  return result;
}
MILL_INLINE vf choose(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
MILL_INLINE vf larger(vf a, vf b) {
  vf result;
  for (int i = 0; i < 64; i += kPiece) {
    const vf_piece x = load<vf_piece>((char*)&a + i), y = load<vf_piece>((char*)&b + i);
    store((char*)&result + i, x > y ? x : y);
  }
  return result;
}
MILL_INLINE float largest(vf v) {
#if defined(__AVX512F__)
  return max16(v);
#else
  float a[16];
  store(a, v);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) a[i] = a[i] > a[i + half] ? a[i] : a[i + half];
  return a[0];
#endif
}
MILL_INLINE bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#else
  int32_t a[16], all = 0;
  store(a, mask);
  for (int i = 0; i < 16; i++) all |= a[i];
  return all != 0;
#endif
}
MILL_INLINE double sum_doubles(vd v) {
  double total = 0;
  for (int l = 0; l < 16; l++) total += v[l];
  return total;
}
// Below 0 where the value is not a number.
MILL_INLINE vi number_sign(vf x) { return splat_i(0x7f800000) - ((vi)x & 0x7fffffff); }

// Philox 4x32 with 10 rounds (Salmon et al. 2011): four words for each counter.
MILL_INLINE void philox(vu c[4], uint64_t key) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; round++, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
    const vq a = __builtin_convertvector(c[0], vq) * 0xd2511f53u, b = __builtin_convertvector(c[2], vq) * 0xcd9e8d57u;
    c[0] = __builtin_convertvector(b >> 32, vu) ^ c[1] ^ splat_u(k0);
    c[2] = __builtin_convertvector(a >> 32, vu) ^ c[3] ^ splat_u(k1);
    c[1] = __builtin_convertvector(b, vu);
    c[3] = __builtin_convertvector(a, vu);
  }
}

// Natural logarithm of normal positive numbers, relative error about 1e-7; exact at 1.
MILL_INLINE vf log16(vf x) {
  const vi e = ((vi)x - splat_i(0x3f3504f3)) >> 23;
  const vf f = (vf)((vi)x - (e << 23)) - splat(1.0f), square = f * f;
  vf p = splat(-0.076344304f);
  p = p * f + splat(0.12761557f);
  p = p * f + splat(-0.13160197f);
  p = p * f + splat(0.1420176f);
  p = p * f + splat(-0.16623355f);
  p = p * f + splat(0.20001227f);
  p = p * f + splat(-0.25000823f);
  p = p * f + splat(0.3333333f);
  return ((square * f) * p - square * splat(0.5f) + f) + __builtin_convertvector(e, vf) * splat(0.69314718f);
}

// Exponential noise -log(1 - u) with u = ((bits >> 1) + fraction) / 2^31, below 1; precise where u is small.
MILL_INLINE vf exponential16(vu bits, vf fraction) {
  const vf x = (__builtin_convertvector((vi)(bits >> 1), vf) + fraction) * splat(0x1p-31f);
  const vf below = splat(1.0f - 0x1p-24f);
  const vf u = choose(at_most(x, below), x, below);
  const vf rest = splat(1.0f) - u, gone = splat(1.0f) - rest;
  // `gone` is u as it was rounded: the quotient puts the rounding right.
  return choose(at_most(gone, vf{}), u, (vf{} - log16(rest)) * (u / gone));
}

// One row: the last group is a copy that ends in impossible tokens.
struct Logits {
  const float* at;
  int vocab, full, groups;
  float tail[kRace];

  MILL_MEMBER Logits(const float* row, int n) : at(row), vocab(n), full(n / kRace), groups((n + kRace - 1) / kRace) {
    for (int i = 0; i < kRace; i++) tail[i] = full * kRace + i < n ? row[full * kRace + i] : -kInf;
  }
  MILL_MEMBER const float* group(int g) const { return g < full ? at + size_t(g) * kRace : tail; }
};

struct Peak {
  float value;
  int index;  // the first, or -1: a value is not a number, or the largest is not finite
};

// The largest value of the row, and of each group.
static Peak find_peak(const Logits& x, float* peaks) {
  vi broken{};
  float top = -kInf;
  int best = 0;
  for (int g = 0; g < x.groups; g++) {
    const float* p = x.group(g);
    const vf a = load<vf>(p), b = load<vf>(p + 16), c = load<vf>(p + 32), d = load<vf>(p + 48);
    broken |= (number_sign(a) | number_sign(b)) | (number_sign(c) | number_sign(d));
    peaks[g] = largest(larger(larger(a, b), larger(c, d)));
    if (peaks[g] > top) top = peaks[g], best = g;
  }
  bool bad = !(top > -kInf && top < kInf);
  for (int l = 0; l < 16; l++) bad |= broken[l] < 0;
  if (bad) return {top, -1};
  int i = 0;
  while (x.group(best)[i] != top) i++;
  return {top, best * kRace + i};
}

static void penalise(const SampleTask& t, int32_t* counts, float* x) {
  for (int i = 0; i < t.num_tokens; i++) {
    const uint32_t id = uint32_t(t.tokens[i]);
    if (id < uint32_t(t.vocab)) counts[id] = (counts[id] + (i < t.num_prompt ? 0 : 2)) | 1;
  }
  for (int i = 0; i < t.num_tokens; i++) {
    const uint32_t id = uint32_t(t.tokens[i]);
    if (id >= uint32_t(t.vocab) || !counts[id]) continue;
    const int count = counts[id] >> 1;
    counts[id] = 0;
    x[id] = x[id] > 0 ? x[id] / t.repetition : x[id] * t.repetition;
    if (count) x[id] = (x[id] - t.frequency * float(count)) - t.presence;
  }
}

// The row with every edit, in `x`, which has room for whole groups.
static void edit(const SampleTask& t, int32_t* counts, float* x) {
  memcpy(x, t.logits, t.vocab * sizeof(float));
  for (int i = 0; i < t.num_biases; i++)
    if (uint32_t(t.bias_ids[i]) < uint32_t(t.vocab)) x[t.bias_ids[i]] += t.bias_values[i];
  for (int i = 0; i < t.num_banned; i++)
    if (uint32_t(t.banned[i]) < uint32_t(t.vocab)) x[t.banned[i]] = -kInf;
  if (t.num_tokens) penalise(t, counts, x);
  if (!t.mask) return;
  for (int i = 0; i < t.vocab; i += 16) {
    const vu allowed = (splat_u(t.mask[i / 32] >> i % 32) >> lanes()) & 1u;
    store(x + i, choose(-(vi)allowed, load<vf>(x + i), splat(-kInf)));
  }
}

// The tokens nearer than `distance`, and of those exactly there the ones up to `last`.
struct Limit {
  float distance;
  int last;
};

struct Race {
  const Logits& x;
  float top, inverse;
  const float* dist;  // the nearest of each group

  MILL_MEMBER vf distance(int g, int i) const { return (splat(top) - load<vf>(x.group(g) + i)) * splat(inverse); }
  MILL_MEMBER vi kept(vf d, int g, int i, const Limit& limit) const {
    const vi behind = (splat_i(limit.last - g * kRace - i) - (vi)lanes()) >> 31;
    return at_most(d, splat(limit.distance)) & ~(behind & at_most(splat(limit.distance), d));
  }
};

MILL_INLINE uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
MILL_INLINE float of_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }

// Bisects over the floats (not below 0) in [low, top], of which `top` is enough, for the first that is.
struct Range {
  uint32_t low, top;

  template <class Enough> MILL_MEMBER void narrow(int steps, const Enough& enough) {
    while (steps-- > 0 && low < top) {
      const uint32_t middle = low + (top - low) / 2;
      enough(of_bits(middle)) ? top = middle : low = middle + 1;
    }
  }
};

// Sum of the weights up to a distance. Without weights each token has 1.
struct Weigh {
  const Race& race;
  const float* weights;

  MILL_MEMBER vf load_weights(int g, int i) const {
    return weights ? load<vf>(weights + size_t(g) * kRace + i) : splat(1.0f);
  }
  double operator()(float distance) const {
    vd sum{};
    for (int g = 0; g < race.x.groups; g++)
      if (race.dist[g] <= distance)
        for (int i = 0; i < kRace; i += 16) {
          const vi within = at_most(race.distance(g, i), splat(distance));
          sum += __builtin_convertvector((vf)((vi)load_weights(g, i) & within), vd);
        }
    return sum_doubles(sum);
  }
};

// Tokens in a range of distances, in the order of their indices.
struct Near {
  float *distance, *weight;
  int32_t* index;
  int count = 0;

  MILL_MEMBER void collect(const Weigh& weigh, float low, float top) {
    const Race& r = weigh.race;
    for (int g = 0; g < r.x.groups; g++) {
      if (r.dist[g] > top) continue;
      for (int i = 0; i < kRace; i += 16) {
        const vf dist = r.distance(g, i);
        if (!any(at_most(splat(low), dist) & at_most(dist, splat(top)))) continue;
        float d[16], w[16];
        store(d, dist);
        store(w, weigh.load_weights(g, i));
        for (int l = 0; l < 16; l++) {
          distance[count] = d[l], weight[count] = w[l], index[count] = g * kRace + i + l;
          count += low <= d[l] && d[l] <= top;
        }
      }
    }
    store(distance + count, splat(kInf));
    store(weight + count, vf{});
  }
  MILL_MEMBER double sum(float upto) const {
    vd total{};
    for (int i = 0; i < count; i += 16)
      total += __builtin_convertvector(
          (vf)((vi)load<vf>(weight + i) & at_most(load<vf>(distance + i), splat(upto))), vd);
    return sum_doubles(total);
  }
};

// The smallest set of nearest tokens that weighs `need`, as the tokens within `high` do.
static Limit nearest(const Weigh& weigh, float high, double need, const SampleScratch& s) {
  Range range{0, bits_of(high)};
  range.narrow(12, [&](float distance) { return weigh(distance) >= need; });
  Near near{s.near_distance, s.near_weight, s.near_index};
  near.collect(weigh, of_bits(range.low), of_bits(range.top));
  const double nearer = range.low ? weigh(of_bits(range.low - 1)) : 0;
  range.narrow(32, [&](float distance) { return nearer + near.sum(distance) >= need; });
  const float distance = of_bits(range.top);
  double sum = nearer + (range.top ? near.sum(of_bits(range.top - 1)) : 0);
  for (int i = 0; i < near.count; i++)
    if (near.distance[i] == distance && (sum += near.weight[i]) >= need) return {distance, near.index[i]};
  return {distance, weigh.race.x.vocab};
}

static Limit limit_count(const Race& r, int top_k, const SampleScratch& s) {
  Range range{0, bits_of(kLargest)};
  // Each of the k nearest groups has a token as near as the farthest of them.
  if (top_k <= r.x.groups)
    range.narrow(32, [&](float distance) {
      int n = 0;
      for (int g = 0; g < r.x.groups; g++) n += r.dist[g] <= distance;
      return n >= top_k;
    });
  const Weigh count{r, nullptr};
  const float high = of_bits(range.top);
  return count(high) < top_k ? Limit{kLargest, r.x.vocab} : nearest(count, high, top_k, s);
}

static Limit limit_mass(const Race& r, double top_p, const Limit& limit, const SampleScratch& s) {
  const float high = limit.distance < kWeightless ? limit.distance : kWeightless;
  const vf log2e = splat(1.44269504088896341f), low = splat(-125.0f), grid = splat(0x1p-9f);
  vd total{};
  for (int g = 0; g < r.x.groups; g++) {
    if (r.dist[g] > high) continue;
    for (int i = 0; i < kRace; i += 16) {
      const vf d = r.distance(g, i), w = exp2_16(larger((vf{} - d) * log2e, low));
      const vf rounded = choose(at_most(grid, w), w, (w + grid) - grid);
      const vf weight = choose(r.kept(d, g, i, limit), rounded, vf{});
      store(s.weights + size_t(g) * kRace + i, weight);
      total += __builtin_convertvector(weight, vd);
    }
  }
  return nearest({r, s.weights}, high, top_p * sum_doubles(total), s);
}

static Limit find_limit(const Race& r, const SampleTask& t, const SampleScratch& s) {
  Limit limit{kLargest, t.vocab};
  if (t.top_k > 0 && t.top_k < t.vocab) limit = limit_count(r, t.top_k, s);
  if (t.top_p < 1.0) limit = limit_mass(r, t.top_p, limit, s);
  return t.farthest < limit.distance ? Limit{t.farthest, t.vocab} : limit;
}

struct Best {
  float score;
  int index;
};

// Noise of a group: one token, the owner, has the least; the others have that and more (a minimum of
// exponentials is exponential, falls on each of them alike, and what the others have above it is exponential).
static void run_group(const Race& r, const SampleTask& t, const Limit& limit, int g, float least, int owner,
                      Best& best) {
  vu words[4] = {lanes() + splat_u(uint32_t(g) * 16), splat_u(t.position), splat_u(1), vu{}};
  philox(words, t.seed);
  float scores[kRace];
  for (int i = 0; i < 4; i++) {
    const vf d = r.distance(g, i * 16), more = splat(least) + exponential16(words[i], splat(0.5f));
    store(scores + i * 16, more);
    if (owner / 16 == i) scores[owner] = least;
    const vf score = d + log16(load<vf>(scores + i * 16));
    store(scores + i * 16, choose(r.kept(d, g, i * 16, limit), score, splat(kInf)));
  }
  for (int i = 0; i < kRace; i++) {
    const int index = g * kRace + i;
    if (scores[i] < best.score || (scores[i] == best.score && index < best.index)) best = {scores[i], index};
  }
}

// The token with the smallest distance + log(noise), the first of equals.
static int run_race(const Race& r, const SampleTask& t, const Limit& limit, const SampleScratch& s) {
  int first = 0;
  for (int g = 0; g < r.x.groups; g += 16) {
    vu words[4] = {lanes() + splat_u(uint32_t(g)), splat_u(t.position), vu{}, vu{}};
    philox(words, t.seed);
    const vf fraction = (__builtin_convertvector((vi)(words[1] >> 8), vf) + splat(0.5f)) * splat(0x1p-24f);
    const vf least = exponential16(words[0], fraction) * splat(1.0f / kRace);
    const vf d = load<vf>(r.dist + g), bound = d + log16(least);
    store(s.least + g, least);
    store(s.owner + g, words[2] >> 26);
    store(s.bound + g, choose(at_most(d, splat(limit.distance)), bound, splat(kInf)));
    for (int i = g; i < g + 16; i++)
      if (s.bound[i] < s.bound[first]) first = i;
  }
  Best best{kInf, t.vocab};
  run_group(r, t, limit, first, s.least[first], s.owner[first], best);
  for (int g = 0; g < r.x.groups; g++)
    if (g != first && s.bound[g] <= best.score + kSlack)
      run_group(r, t, limit, g, s.least[g], s.owner[g], best);
  return best.index;
}

// The chosen token; -1 if the row has none.
static int sample(const SampleTask& t, const SampleScratch& s) {
  const Logits raw(t.logits, t.vocab);
  Peak peak = find_peak(raw, s.peaks);
  if (peak.index < 0 || (!t.edited && t.inverse_temperature == 0)) return peak.index;
  // Of a row that is only masked the largest logit stays the largest, if it is allowed.
  const bool only_masked = t.mask && !t.num_biases && !t.num_banned && !t.num_tokens;
  if (only_masked && peak.index >= 0 && t.inverse_temperature == 0 && t.mask[peak.index / 32] >> peak.index % 32 & 1)
    return peak.index;
  if (t.edited) edit(t, s.counts, s.logits);
  const Logits x(t.edited ? s.logits : t.logits, t.vocab);
  if (t.edited) peak = find_peak(x, s.peaks);
  if (peak.index < 0 || t.inverse_temperature == 0) return peak.index;
  for (int g = 0; g < (x.groups + 15) / 16 * 16; g++)
    s.dist[g] = g < x.groups ? (peak.value - s.peaks[g]) * t.inverse_temperature : kInf;
  const Race race{x, peak.value, t.inverse_temperature, s.dist};
  return run_race(race, t, find_limit(race, t, s), s);
}

// The `num` largest values' ids, the first of equals first; of a row with NaN any ids.
static void top_ids(const float* row, int n, int num, int32_t* ids) {
  if (num == 0) return;
  float least = -kInf;
  int have = 0;
  const Logits x(row, n);
  for (int g = 0; g < x.groups; g++) {
    const float* p = x.group(g);
    const vf peaks = larger(larger(load<vf>(p), load<vf>(p + 16)), larger(load<vf>(p + 32), load<vf>(p + 48)));
    if (have == num && !(largest(peaks) > least)) continue;
    for (int i = 0; i < kRace && g * kRace + i < n; i++) {
      if (have == num && !(p[i] > least)) continue;
      int at = have < num ? have++ : num - 1;
      for (; at > 0 && p[i] > row[ids[at - 1]]; at--) ids[at] = ids[at - 1];
      ids[at] = g * kRace + i;
      least = row[ids[have - 1]];
    }
  }
}

}  // namespace mill::MILL_ISA
