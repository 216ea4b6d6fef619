// Feeds every kernel of every instruction set of this machine with fixed pseudo-random inputs, and prints a digest
// of the bits that come out, a line a case: "SET CASE DIGEST". Builds for different processors must print the same.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/mill.h"
#include "../../csrc/shares.h"

namespace {

using namespace mill;

// SplitMix64 (Steele, Lea and Flood 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  float number() { return float(int64_t(bits() >> 40) - (1 << 23)) / float(1 << 22); }  // in [-2, 2)
  std::vector<float> numbers(size_t n) {
    std::vector<float> out(n);
    for (float& x : out) x = number();
    return out;
  }
  std::vector<uint16_t> bf16s(size_t n) {
    std::vector<uint16_t> out(n);
    for (uint16_t& h : out) {
      const float x = number();
      uint32_t u;
      memcpy(&u, &x, 4);
      h = uint16_t(u >> 16);
    }
    return out;
  }

 private:
  uint64_t state_;
};

// FNV-1a (Fowler, Noll and Vo).
class Digest {
 public:
  template <class T> void add(const T* p, size_t n) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(p);
    for (size_t i = 0; i < n * sizeof(T); i++) value_ = (value_ ^ bytes[i]) * 0x100000001b3u;
  }
  template <class T> void add(const std::vector<T>& v) { add(v.data(), v.size()); }
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 0xcbf29ce484222325u;
};

void print(const Kernels& k, const std::string& name, const Digest& digest) {
  printf("%s %s %016llx\n", k.name, name.c_str(), (unsigned long long)digest.value());
}

// Memory of quantised rows, on lines of 64 bytes.
struct Rows {
  std::vector<uint8_t> memory;
  std::vector<float> scale;
  std::vector<int32_t> row_sum, group_sums;
  Act act;

  Rows(int rows, int lines)
      : memory(size_t(round_up(rows, 16) + kSlackRows) * lines * 64 + 64), scale(size_t(rows) * lines * 2 + rows),
        row_sum(rows), group_sums(size_t(rows) * lines * 2),
        act{memory.data() + (64 - uintptr_t(memory.data()) % 64) % 64, lines, scale.data(), row_sum.data(),
            group_sums.data()} {}
  void add_to(Digest& d) const {
    d.add(act.data, size_t(round_up(int(row_sum.size()), 16)) * act.lines * 64);
    d.add(scale), d.add(row_sum), d.add(group_sums);
  }
};

struct Shape { int n, k, rows; };
constexpr Shape kShapes[] = {{32, 64, 1}, {48, 96, 2}, {80, 288, 5}, {64, 576, 17}, {96, 1536, 9}, {33, 160, 34}};

struct Matrix {
  std::vector<uint8_t> data;
  std::vector<float> scales;
  LinearWeight w;

  Matrix(Random& random, LinearKind kind, Shape s, int group, bool symmetric) {
    const int n32 = round_up(s.n, 32);
    if (kind == LinearKind::bf16) {
      const auto values = random.bf16s(size_t(n32) * round_up(s.k, 32));
      const auto* bytes = reinterpret_cast<const uint8_t*>(values.data());
      data.assign(bytes, bytes + values.size() * 2);
    } else if (kind == LinearKind::i8c) {
      data.resize(size_t(n32) * round_up(s.k, 64));
      for (uint8_t& b : data) b = uint8_t(random.bits());
    } else {
      add_groups(random, n32 / 32 * (s.k / kGroup), kind == LinearKind::i4g ? 512 : 1024, symmetric);
    }
    scales = random.numbers(n32);
    w = {kind, s.n, s.k, group, symmetric, data.data(), scales.data()};
  }

  // Blocks of 32 outputs and inputs: values, 32 scales, and 32 minima where they are not symmetric (csrc/groups.h).
  void add_groups(Random& random, int blocks, int values, bool symmetric) {
    for (int b = 0; b < blocks; b++) {
      for (int i = 0; i < values; i++) data.push_back(uint8_t(random.bits()));
      for (int i = 0; i < (symmetric ? 32 : 64); i++) {
        const auto half = uint16_t(random.bits() % 0x3c00 | (i < 32 ? 0 : 0x8000));  // below one, denormal too
        data.push_back(uint8_t(half & 255)), data.push_back(uint8_t(half >> 8));
      }
    }
  }
};

void run_linear(const Kernels& k, Digest& digest, const Matrix& m, const Rows& x, Shape s, Random& random,
                Activation gated) {
  const int pairs = round_up(s.n, 32) / 32, width = gated == Activation::none ? s.n : s.n / 2;
  for (bool accumulate : {false, true}) {
    std::vector<float> dst = random.numbers(size_t(s.rows) * width), bias = random.numbers(pairs * 32);
    LinearTask t{&m.w, &x.act, dst.data(), width, s.rows, accumulate, gated};
    if (accumulate) t.bias = bias.data();
    k.begin_thread();
    k.linear(t, 0, pairs / 2);
    k.linear(t, pairs / 2, pairs);
    k.end_thread();
    digest.add(dst);
  }
}

void linears(const Kernels& k, const char* name, LinearKind kind, int group, bool symmetric) {
  Random random(1);
  Digest plain, gated;
  for (const Shape& s : kShapes) {
    Rows x(s.rows, lines_of(s.k, act_of(kind)));
    for (int r = 0; r < s.rows; r++) k.quantize(random.numbers(s.k).data(), s.k, x.act, r, act_of(kind));
    const Matrix m(random, kind, s, group, symmetric);
    run_linear(k, plain, m, x, s, random, Activation::none);
    for (Activation a : {Activation::silu, Activation::gelu_tanh, Activation::relu})
      if (s.n % 32 == 0) run_linear(k, gated, m, x, s, random, a);
  }
  print(k, std::string("linear-") + name, plain);
  print(k, std::string("gated-") + name, gated);
}

// An adapter on one linear: its inner product, and the rows it is added to.
void adapters(const Kernels& k) {
  Random random(2);
  Digest digest;
  const Shape s{64, 96, 5};
  for (LinearKind kind : {LinearKind::i8c, LinearKind::i8g, LinearKind::bf16}) {
    Rows x(s.rows, lines_of(s.k, act_of(kind)));
    for (int r = 0; r < s.rows; r++) k.quantize(random.numbers(s.k).data(), s.k, x.act, r, act_of(kind));
    const Matrix m(random, kind, s, 32, true);
    const auto down = random.bf16s(4 * s.k), up = random.bf16s(8 * 32);
    const LowRankPair pairs[2] = {{{0, 0}, 4, 0}, {{1, 2}, 2, 4}};
    const LowRank w{4, 0.75f, down.data(), up.data(), pairs};
    const int32_t rows[5] = {0, 1, 2, 3, 4}, slots[5] = {0, -1, 0, 0, -1};
    std::vector<float> low(s.rows * 4), scratch(4 * 96), dst(s.rows * s.n);
    k.shrink({&w, &x.act, act_of(kind), s.k, rows, 5, 0, 2, scratch.data(), low.data(), 4});
    LinearTask t{&m.w, &x.act, dst.data(), s.n, s.rows, false, Activation::none};
    t.low_ranks = &w, t.slots = slots, t.low = low.data(), t.ld_low = 4;
    k.begin_thread();
    k.linear(t, 0, 2);
    k.end_thread();
    digest.add(low), digest.add(dst);
  }
  print(k, "adapters", digest);
}

void rows(const Kernels& k) {
  Random random(3);
  Digest norms, quantised, rotated;
  for (ActKind kind : {ActKind::int8, ActKind::int8_groups, ActKind::bf16, ActKind::float32})
    for (int d : {16, 64, 96, 100, 576}) {
      Rows x(3, lines_of(d, kind)), y(3, lines_of(d, kind));
      for (int r = 0; r < 3; r++) {
        const auto src = random.numbers(d), weight = random.numbers(d);
        std::vector<float> tmp(d);
        k.norm(src.data(), d, weight.data(), 1e-5f, tmp.data(), x.act, r, kind);
        norms.add(tmp);
        k.quantize(src.data(), d, y.act, r, kind);
      }
      x.add_to(norms), y.add_to(quantised);
    }
  for (int head_dim : {32, 64, 80, 128}) {
    const auto src = random.numbers(head_dim), cos = random.numbers(head_dim / 2), sin = random.numbers(head_dim / 2);
    std::vector<uint16_t> dst(head_dim);
    k.rope(src.data(), head_dim, cos.data(), sin.data(), dst.data());
    rotated.add(dst);
    k.rope(src.data(), head_dim, nullptr, nullptr, dst.data());
    rotated.add(dst);
    std::vector<uint16_t> keys(kKvBlock * round_up(head_dim, 32)), values(keys.size());
    for (int slot : {0, 1, 17, 30})
      k.put_kv(dst.data(), src.data(), head_dim, slot, keys.data(), values.data());
    rotated.add(keys), rotated.add(values);
  }
  print(k, "norm", norms), print(k, "quantise", quantised), print(k, "rope", rotated);
}

// One head's blocks: keys and values, with their scales behind them where they are bytes.
std::vector<uint8_t> random_blocks(Random& random, int blocks, int head_pad, bool kv_int8) {
  std::vector<uint8_t> out;
  const auto append = [&](const auto& values) {
    const auto* p = reinterpret_cast<const uint8_t*>(values.data());
    out.insert(out.end(), p, p + values.size() * sizeof(values[0]));
  };
  for (int b = 0; b < blocks; b++) {
    if (!kv_int8) {
      append(random.bf16s(kKvBlock * head_pad));
      continue;
    }
    std::vector<int8_t> bytes(kKvBlock * head_pad);
    for (int8_t& x : bytes) x = int8_t(int(random.bits() % 255) - 127);
    auto scales = random.numbers(kKvBlock);
    for (float& x : scales) x = (x + 3) / 256;
    append(bytes), append(scales);
  }
  return out;
}

void attention(const Kernels& k, bool kv_int8) {
  Random random(4);
  Digest digest;
  for (int head_dim : {32, 64, 80})
    for (int rows : {1, 3, 4, 16, 30})
      for (int window : {40, kNoWindow}) {
        const int head_pad = round_up(head_dim, 32), num_blocks = kSpanBlocks + 3;
        const auto keys = random_blocks(random, num_blocks, head_pad, kv_int8);
        const auto values = random_blocks(random, num_blocks, head_pad, kv_int8);
        auto q = random.bf16s(kAttendRows * head_pad);
        std::vector<int32_t> blocks, positions;
        std::vector<size_t> offsets;
        for (int b = 0; b < num_blocks; b++) {
          const int used = b + 1 < num_blocks ? kKvBlock : 20;
          for (int x : {(b * 7) % num_blocks, b * kKvBlock, used}) blocks.push_back(x);
        }
        for (int r = 0; r < rows; r++) {
          positions.push_back((num_blocks - 1) * kKvBlock + r);
          offsets.push_back(size_t(r) * head_dim);
        }
        std::vector<float> scores(kAttendRows * kSpan), acc(kAttendRows * head_pad), span(kAttendRows * head_pad);
        std::vector<float> out(rows * head_dim);
        std::vector<uint16_t> probs(kAttendRows * kSpan), wide((kSpanBlocks + 1) * kKvBlock * head_pad);
        const AttendTask t{q.data(), rows, positions.data(), num_blocks, blocks.data(), keys.data(), values.data(),
                           keys.size() / num_blocks, kv_int8, head_dim, head_pad, 0.18f, window, out.data(),
                           offsets.data()};
        k.begin_thread();
        k.attend(t, {scores.data(), probs.data(), acc.data(), span.data(), wide.data()});
        k.end_thread();
        digest.add(out);
      }
  print(k, kv_int8 ? "attend-int8" : "attend-bf16", digest);
}

void experts(const Kernels& k) {
  Random random(5);
  Digest digest;
  const int rows = 6, d = 100, count = 7, active = 3;
  const auto x = random.numbers(rows * d), weight = random.numbers(count * d), src = random.numbers(active * d);
  std::vector<float> logits(rows * count);
  k.router_logits({x.data(), weight.data(), d, rows, count, logits.data()}, 0, count);
  digest.add(logits);
  for (int r = 0; r < rows; r++) k.choose_experts(&logits[r * count], count, active, r % 2);
  digest.add(logits);
  std::vector<float> sum = random.numbers(d);
  const int chosen[active] = {1, 4, 6}, pairs[active] = {0, 1, 2};
  k.add_experts(sum.data(), d, src.data(), logits.data(), chosen, pairs, active);
  digest.add(sum);
  print(k, "experts", digest);
}

void sampling(const Kernels& k) {
  Random random(6);
  Digest tokens, sums;
  for (int vocab : {50, 1000, 4099}) {
    const int groups = round_up(vocab, kRaceGroup) / kRaceGroup, padded = round_up(groups, 16);
    auto room = [&](size_t n) { return std::vector<float>(n); };
    auto peaks = room(padded), dist = room(padded), least = room(padded), bound = room(padded);
    const size_t width = size_t(padded) * kRaceGroup;
    auto edited = room(width), weights = room(width), near_distance = room(width), near_weight = room(width);
    std::vector<uint32_t> owner(padded);
    std::vector<int32_t> near_index(width), counts(width);
    const SampleScratch scratch{peaks.data(), dist.data(), least.data(), bound.data(), owner.data(), edited.data(),
                                weights.data(), near_distance.data(), near_weight.data(), near_index.data(),
                                counts.data()};
    const int32_t seen[4] = {1, 7, 7, 30};
    for (int i = 0; i < 60; i++) {
      auto logits = random.numbers(vocab);
      for (float& x : logits) x *= 4;
      SampleTask t{};
      t.logits = logits.data(), t.vocab = vocab, t.seed = random.bits(), t.position = i;
      t.inverse_temperature = i % 5 ? 0.5f + float(i % 4) : 0.0f;
      t.top_k = i % 3 ? 0 : 10, t.top_p = i % 4 ? 0.9 : 1.0, t.farthest = i % 7 ? __FLT_MAX__ : 3.0f;
      t.edited = i % 2, t.repetition = 1.3f, t.presence = 0.2f, t.frequency = 0.1f;
      t.tokens = seen, t.num_tokens = 4, t.num_prompt = 2;
      const int token = k.sample(t, scratch);
      tokens.add(&token, 1);
      int32_t ids[5];
      k.top_ids(logits.data(), vocab, 5, ids);
      tokens.add(ids, 5);
      const double sum = k.log_sum_exp(logits.data(), vocab);
      sums.add(&sum, 1);
    }
  }
  print(k, "sample", tokens), print(k, "log-sum-exp", sums);
}

}  // namespace

int main() {
  const char* names[8];
  const int count = detect_isas(names);
  for (int i = 0; i < count; i++) {
    const Kernels& k = *find_kernels(names[i]);
    linears(k, "i8c", LinearKind::i8c, 32, true);
    linears(k, "bf16", LinearKind::bf16, 32, true);
    linears(k, "i8g", LinearKind::i8g, 32, true);
    linears(k, "i4g", LinearKind::i4g, 32, true);
    linears(k, "i4g-minima", LinearKind::i4g, 32, false);
    adapters(k), rows(k), attention(k, false), attention(k, true), experts(k), sampling(k);
  }
}
