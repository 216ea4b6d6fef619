#include "experts.h"

#include <algorithm>
#include <cstring>

#include "shares.h"

namespace mill {

LinearWeight ExpertWeights::at(int expert) const {
  LinearWeight w = first;
  w.data += expert * data_step;
  if (w.scales) w.scales = static_cast<const uint8_t*>(w.scales) + expert * scales_step;
  return w;
}

Experts::Experts(const ExpertShape& shape, const Kernels& kernels, Pool& pool, int max_rows, int hidden,
                 size_t cache_bytes)
    : shape_(shape), kernels_(kernels), pool_(pool), hidden_(hidden), capacity_(max_rows * shape.active),
      cache_(cache_bytes) {
  const size_t tiles = size_t(std::min(shape.count, capacity_)) + size_t(capacity_) / 16;
  const size_t rows = tiles * 16 + kSlackRows, width = round_up(std::max(hidden, shape.inner), 64);
  data_ = Array<uint8_t>(rows * width * 2);
  scale_ = Array<float>(rows * width / kGroup);
  sums_ = Array<int32_t>(rows);
  groups_ = Array<int32_t>(rows * width / kGroup);
  // A step allocates nothing: the other threads could not be told that there is no memory.
  segments_.reserve(shape.count), units_.reserve(shape.count), counts_.resize(shape.count), places_.resize(shape.count);
  row_starts_.reserve(max_rows + 1);
  for (auto* each : {&pair_rows_, &pair_at_, &row_pairs_, &row_experts_}) each->reserve(capacity_);
}

void Experts::add(ExpertWeights& w) {
  if (!cache_.is_bounded()) return;
  cache_.look();
  for (int e = 0; e < shape_.count; e++) {
    const LinearWeight one = w.at(e);
    const int unit = cache_.add({{one.data, w.data_step}, {one.scales, w.scales_step}});
    if (e == 0) w.unit = unit;
  }
}

// Threads share the rows, then the experts, then the rows, so that a single row keeps all of them busy.
void Experts::route(const float* x, int rows, const float* norm, float eps, const float* router, bool renormalise,
                    float* normed, float* route, int thread) {
  const Range own = part(rows, thread, pool_.size()), experts = part(shape_.count, thread, pool_.size());
  Act none{};
  for (int r = own.begin; r < own.end; r++)
    kernels_.norm(x + size_t(r) * hidden_, hidden_, norm, eps, normed + size_t(r) * hidden_, none, r, ActKind::float32);
  pool_.barrier();
  kernels_.router_logits({normed, router, hidden_, rows, shape_.count, route}, experts.begin, experts.end);
  pool_.barrier();
  for (int r = own.begin; r < own.end; r++)
    kernels_.choose_experts(route + size_t(r) * shape_.count, shape_.count, shape_.active, renormalise);
}

// A weight that is not a number is not zero.
bool Experts::sort(const float* route, int rows) {
  const int n = shape_.count;
  segments_.clear(), pair_rows_.clear(), pair_at_.clear(), row_pairs_.clear();
  row_starts_.assign(1, 0), row_experts_.clear();
  std::fill(counts_.begin(), counts_.end(), 0);
  for (int r = 0; r < rows; r++) {
    for (int e = 0; e < n; e++) {
      if (route[size_t(r) * n + e] == 0) continue;
      if (int(row_experts_.size()) == capacity_) return row_starts_.assign(1, 0), false;
      counts_[e]++, row_experts_.push_back(e);
    }
    row_starts_.push_back(int(row_experts_.size()));
  }
  for (int e = 0, first = 0, at = 0; e < n; e++) {
    if (!counts_[e]) continue;
    segments_.push_back({e, first, counts_[e], at});
    places_[e] = first;
    first += counts_[e], at += round_up(counts_[e], 16);
  }
  const size_t total = row_experts_.size();
  pair_rows_.resize(total), pair_at_.resize(total), row_pairs_.resize(total);
  for (int r = 0; r < rows; r++)
    for (int i = row_starts_[r]; i < row_starts_[r + 1]; i++) {
      row_pairs_[i] = places_[row_experts_[i]]++;
      pair_rows_[row_pairs_[i]] = r;
    }
  for (const Segment& s : segments_)
    for (int i = 0; i < s.count; i++) pair_at_[s.first + i] = s.at + i;
  return true;
}

// The inputs from a row on that begins a tile.
Act Experts::inputs(int row, int lines, ActKind kind) const {
  const size_t groups = kind == ActKind::int8_groups ? size_t(lines) * 2 : 1;
  return {data_.get() + size_t(row) * lines * 64, lines, scale_.get() + row * groups, sums_.get() + row,
          groups_.get() + row * groups};
}

bool Experts::gather(const float* route, int rows, const Act& act, ActKind kind, int thread) {
  if (thread == 0) fits_ = sort(route, rows);
  pool_.barrier();
  if (!fits_) return false;
  const Act to = inputs(0, act.lines, kind);
  const size_t groups = size_t(act.lines) * 2;
  const Range own = part(num_pairs(), thread, pool_.size());
  for (int p = own.begin; p < own.end; p++) {
    const int from = pair_rows_[p], at = pair_at_[p];
    for (int i = 0; i < act.lines; i++) std::memcpy(to.line(at, i), act.line(from, i), 64);
    if (kind == ActKind::int8) to.scale[at] = act.scale[from], to.row_sum[at] = act.row_sum[from];
    if (kind != ActKind::int8_groups) continue;
    std::memcpy(to.scale + at * groups, act.scale + from * groups, groups * sizeof(float));
    std::memcpy(to.group_sums + at * groups, act.group_sums + from * groups, groups * sizeof(int32_t));
  }
  return true;
}

void Experts::quantize(const float* src, ActKind kind, int thread) {
  Act act = inputs(0, lines_of(shape_.inner, kind), kind);
  const Range own = part(num_pairs(), thread, pool_.size());
  for (int p = own.begin; p < own.end; p++)
    kernels_.quantize(src + size_t(p) * shape_.inner, shape_.inner, act, pair_at_[p], kind);
}

// Experts in memory come first, so that reading the others cannot push them out.
void Experts::order(const ExpertWeights& w) {
  if (!cache_.is_bounded()) return;
  std::stable_partition(segments_.begin(), segments_.end(),
                        [&](const Segment& s) { return cache_.holds(w.unit + s.expert); });
  units_.clear();
  for (const Segment& s : segments_) units_.push_back(w.unit + s.expert);
}

LinearWeight Experts::weight(const ExpertWeights& w, int expert) const {
  LinearWeight own = w.at(expert);
  if (!cache_.is_bounded()) return own;
  const int unit = w.unit + expert;
  own.data = static_cast<const uint8_t*>(cache_.address(unit, 0));
  own.scales = cache_.address(unit, 1);
  return own;
}

// In waves of experts that are in memory together. Threads take runs of outputs of an expert, whoever is free.
bool Experts::linear(const ExpertWeights& w, Activation gated, float* dst, int ld_dst, int thread) {
  const ActKind kind = act_of(w.first.kind);
  const int lines = lines_of(w.first.k, kind), pairs = round_up(w.first.n, 2 * kTileN) / (2 * kTileN);
  const int count = int(segments_.size()), share = count * pairs / (8 * pool_.size());
  const int run = std::clamp(share, 2, 32), runs = (pairs + run - 1) / run;
  for (int begin = 0, end = 0; begin < count; begin = end) {
    if (thread == 0) {
      if (begin == 0) order(w);
      wave_end_ = cache_.is_bounded() ? cache_.admit(units_, begin) : count;
      next_task_.store(0, std::memory_order_relaxed);
    }
    pool_.barrier();
    end = wave_end_;
    if (cache_.is_bounded()) {
      cache_.read();
      pool_.barrier();
      if (cache_.failed()) return false;
    }
    for (int i; (i = next_task_.fetch_add(1, std::memory_order_relaxed)) < (end - begin) * runs;) {
      const Segment& s = segments_[begin + i / runs];
      const LinearWeight own = weight(w, s.expert);
      const Act act = inputs(s.at, lines, kind);
      const LinearTask task{&own, &act, dst + size_t(s.first) * ld_dst, ld_dst, s.count, false, gated};
      kernels_.linear(task, i % runs * run, std::min(pairs, (i % runs + 1) * run));
    }
    if (end < count) pool_.barrier();
  }
  return true;
}

void Experts::combine(const float* route, const float* src, float* x, int thread) const {
  const Range own = part(int(row_starts_.size()) - 1, thread, pool_.size());
  for (int r = own.begin; r < own.end; r++) {
    const int first = row_starts_[r];
    kernels_.add_experts(x + size_t(r) * hidden_, hidden_, src, route + size_t(r) * shape_.count,
                         row_experts_.data() + first, row_pairs_.data() + first, row_starts_[r + 1] - first);
  }
}

}  // namespace mill
