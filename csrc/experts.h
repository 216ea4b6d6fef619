// The routed part of a plan: which rows go to which expert in the current step, the inputs of the experts'
// linears, sorted by expert, and the products. Every member is called by all threads of the pool together.
#pragma once
#include <atomic>
#include <vector>

#include "array.h"
#include "expert_cache.h"
#include "mill.h"
#include "threads.h"

namespace mill {

// `count` experts, of which a row is sent to `active`; `inner` is their inner width.
struct ExpertShape { int count = 0, active = 0, inner = 0; };

// One matrix of every expert: the first, and the bytes from each to the next.
struct ExpertWeights {
  LinearWeight first{};
  size_t data_step = 0, scales_step = 0;
  int unit = 0;  // number of the first in the cache

  LinearWeight at(int expert) const;
};

class Experts {
 public:
  Experts(const ExpertShape&, const Kernels&, Pool&, int max_rows, int hidden, size_t cache_bytes);

  int capacity() const { return capacity_; }
  // Pairs of a row and an expert in this step, in order of expert, then of row.
  int num_pairs() const { return int(pair_rows_.size()); }
  const ExpertStats& stats() const { return cache_.stats(); }
  // Numbers the matrices for the cache.
  void add(ExpertWeights&);

  // route [rows][experts] from x [rows][hidden]. `normed` is scratch of the size of x.
  void route(const float* x, int rows, const float* norm, float eps, const float* router, bool renormalise,
             float* normed, float* route, int thread);
  // Sorts the pairs that `route` names, and copies their rows of `act`. False, for all threads, if there are more
  // than there is room for.
  bool gather(const float* route, int rows, const Act& act, ActKind, int thread);
  // The inputs of the next linear, from src [pairs][inner].
  void quantize(const float* src, ActKind, int thread);
  // dst [pairs][ld_dst] = the rows of each expert times its matrix. False, for all threads, if a matrix could not
  // be read.
  bool linear(const ExpertWeights&, Activation gated, float* dst, int ld_dst, int thread);
  // After a step: throws what kept a matrix from being read.
  void check() { cache_.check(); }
  // x [rows][hidden] += the weighted sum of the pairs' rows of src.
  void combine(const float* route, const float* src, float* x, int thread) const;

 private:
  struct Segment { int expert, first, count, at; };  // pairs [first, first + count), in `act_` from row `at`

  bool sort(const float* route, int rows);
  void order(const ExpertWeights&);
  LinearWeight weight(const ExpertWeights&, int expert) const;
  Act inputs(int row, int lines, ActKind) const;

  const ExpertShape shape_;
  const Kernels& kernels_;
  Pool& pool_;
  const int hidden_, capacity_;
  Array<uint8_t> data_;
  Array<float> scale_;
  Array<int32_t> sums_, groups_;
  ExpertCache cache_;

  // Of the current step.
  std::vector<Segment> segments_;                 // experts that have rows; each from a new tile of 16 on
  std::vector<int> pair_rows_, pair_at_;          // [pairs] row, place among the inputs
  std::vector<int> row_starts_{0}, row_pairs_, row_experts_;  // the pairs of each row
  std::vector<int> units_, counts_, places_;
  bool fits_ = true;
  int wave_end_ = 0;
  std::atomic<int> next_task_{0};
};

}  // namespace mill
