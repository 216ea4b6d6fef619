// The native step executor: a list of operations over buffers that it owns, and the paged KV cache.
// One call of `run` is one step (or a part of one, between two taps). Python describes the operations
// once; src/tokenmill/kernels/plan.py explains them.
#pragma once
#include <cstddef>
#include <memory>
#include <vector>

#include "array.h"
#include "attention.h"
#include "experts.h"
#include "threads.h"
#include "mill.h"
#include "shares.h"

namespace mill {

enum class OpKind {
  embed, norm, add_norm, linear, rope_kv, attend, quantize, select, route, gather, expert_linear, combine
};
enum Buffer { kX, kY, kQkv, kZ, kH, kO, kLogits, kRoute, kEh, kEo, kNumBuffers };

// Norm weights for a head, or for all heads at once; null for none.
struct HeadNorm {
  const float* weight = nullptr;
  int size = 0;
};

struct Op {
  OpKind kind;
  int src = 0, dst = 0, layer = 0, index = 0;
  int next = 0;  // the linear after this one, where both are in tile order; 0 for none
  bool accumulate = false, out_rows = false, rotary = true;
  Activation gated = Activation::none;
  int window = kNoWindow;
  ActKind act = ActKind::int8;
  float eps = 0;
  const float* weight = nullptr;
  HeadNorm q_norm{}, k_norm{};
  LinearWeight linear{};
  const float* bias = nullptr;          // [n up to 32s]
  const void* table = nullptr;          // embeddings: bf16 bits or int8
  const uint16_t* table_scales = nullptr;  // float16 a 32 inputs, or null for bf16
  const float* router = nullptr;        // [experts][hidden]
  bool renormalise = false;
  ExpertWeights experts{};
};

struct Shape {
  int hidden, heads, kv_heads, head_dim, inner, vocab, layers, positions;
  float softmax_scale;
  const float *cos, *sin;  // [positions][head_dim / 2]
  ExpertShape experts{};
};

class Plan {
 public:
  Plan(const Shape&, const Kernels&, int threads, int max_rows, int max_outs, int num_blocks, int max_inputs,
       int max_adapters, bool kv_int8, size_t expert_cache_bytes);

  // Throws std::invalid_argument if a linear does not fit the buffers.
  void add(const Op& op);
  int num_ops() const { return int(ops_.size()); }
  const Op& op(int index) const { return ops_.at(index); }
  // What the adapter in a slot adds, by operation; an empty list frees the slot. Not while a step runs.
  void set_adapter(int slot, std::vector<LowRank> by_op);
  // Throws std::invalid_argument if the batch does not fit; nothing is changed then.
  void run(const Batch&, int first, int last);
  float* buffer(int id, int& rows, int& width);
  // The bytes of one KV block: all layers and heads. Throws std::invalid_argument if there is no such block.
  uint8_t* block(int index);
  size_t block_bytes() const { return block_bytes_; }
  void copy_block(int from, int to);
  // From now on `run` adds the nanoseconds of each operation, as thread 0 sees it, to `op_ns`; counted from 0.
  void time_ops() { op_ns_.assign(ops_.size(), 0); }
  const std::vector<int64_t>& op_ns() const { return op_ns_; }
  // Entries of the last step's block list that were taken together with those of another sequence.
  int num_shared_blocks() const { return attention_.num_shared_blocks(); }
  ExpertStats expert_stats() const { return experts_ ? experts_->stats() : ExpertStats{}; }
  Pool& pool() { return pool_; }
  const Kernels& kernels() const { return kernels_; }

 private:
  struct Thread { Array<float> row, scores, acc, span; Array<uint16_t> probs, wide, q; Array<float> inputs; };
  struct AdapterRows { int slot, first, count; };

  void check(const Batch&, int first, int last) const;
  void plan_adapters(const Batch&);
  void wipe_new_blocks(const Batch&);
  void step(const Batch&, const Op&, int thread);
  void embed(const Batch&, const Op&, int row) const;
  void linear(const Batch&, const Op&, int thread);
  Range pairs_of(const LinearWeight&, int thread) const;
  bool has_low_ranks(const Op&) const;
  void shrink(const Op&, const Act&, int thread);
  void add_norm(const Op&, float* scratch, int row) const;
  void rope_kv(const Batch&, const Op&, float* scratch, int row);
  const float* norm_heads(const HeadNorm&, float eps, const float* src, int heads, float* scratch) const;
  void put_int8(const uint16_t* key, const float* value, int slot, uint8_t* k_page, uint8_t* v_page) const;
  void attend(const Batch&, const Op&, int thread);
  void attend_tasks(const Batch&, const Op&, int thread, const std::vector<RowTile>&, std::atomic<int>& next);
  static bool is_routed(const Op&);
  bool routed_step(const Batch&, const Op&, int thread);
  // Where the page of K (kind 0) or V (kind 1) of a layer and head lies inside a block, in bytes.
  size_t kv_offset(int layer, int kind, int head) const;
  int rows_of(const Batch&, const Op&) const;

  const Shape shape_;
  const Kernels& kernels_;
  Pool pool_;
  const int max_rows_, max_outs_, num_blocks_, max_inputs_, max_adapters_, head_pad_;
  const bool kv_int8_;
  const size_t page_bytes_, block_bytes_;  // of one head in one block, and of all layers and heads
  std::vector<Op> ops_;
  int last_linear_ = -1;  // in tile order
  std::vector<int64_t> op_ns_;  // empty: not timed
  Array<float> buffers_[kNumBuffers];
  int widths_[kNumBuffers], capacity_[kNumBuffers];
  Array<uint16_t> q_;   // [kv_heads][max_rows * heads / kv_heads][head_pad]
  Array<uint8_t> kv_;   // [num_blocks][layers][K, V][kv_heads][page_bytes]; attend.h has the pages
  Array<uint8_t> act_data_;
  Array<float> act_scale_;
  Array<int32_t> act_sums_, act_groups_;
  Act act_{};
  AttentionTiles attention_;     // of the current step
  Array<SoftmaxState> states_;   // [max_rows][heads]
  std::atomic<int> next_shared_{0}, next_task_{0};
  std::atomic<bool> busy_{false};
  // A value that is not finite was written in bf16: blocks are wiped before they serve the next sequence,
  // since a masked key counts as zero times its value. In int8 only the scale is not finite, and masked too.
  std::atomic<bool> poisoned_{false};
  std::vector<Thread> threads_;
  std::vector<std::vector<LowRank>> low_ranks_;  // [operation][slot]
  std::vector<bool> has_adapter_;                // [slot]
  Array<float> low_;                             // [max_rows][ld_low_]
  int ld_low_ = 0;
  std::vector<int32_t> slots_, adapter_rows_;    // of the current step: a slot a row; rows with one, by slot
  std::vector<AdapterRows> adapter_groups_;
  std::unique_ptr<Experts> experts_;             // null without experts
};

}  // namespace mill
