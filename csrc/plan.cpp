#include "plan.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>

#include "shares.h"

#define MILL_ISA baseline
#include "vec.h"

namespace mill {

using Clock = std::chrono::steady_clock;
using baseline::from_bf16;
using baseline::from_f16;
using baseline::to_bf16;

template <class T> Array<T>::Array(size_t count) : bytes_(count * sizeof(T)) {
  if (!count) return;
  void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  madvise(p, bytes_, MADV_HUGEPAGE);
  at_ = static_cast<T*>(p);
}
template <class T> Array<T>::~Array() {
  if (at_) munmap(at_, bytes_);
}

namespace {

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

bool all_within(const int32_t* at, int count, int32_t limit) {
  for (int i = 0; i < count; i++)
    if (at[i] < 0 || at[i] >= limit) return false;
  return true;
}

bool rises(const int32_t* starts, int sequences, int total) {
  if (starts[0] != 0 || starts[sequences] != total) return false;
  for (int s = 0; s < sequences; s++)
    if (starts[s + 1] < starts[s]) return false;
  return true;
}

// Whether weights lie in pairs of tiles of 2,048 bytes; those in groups do not.
bool in_tile_order(LinearKind kind) { return kind == LinearKind::i8c || kind == LinearKind::bf16; }

// Ends what `busy` guards.
struct Release {
  std::atomic<bool>& busy;
  ~Release() { busy = false; }
};

}  // namespace

Plan::Plan(const Shape& shape, const Kernels& kernels, int threads, int max_rows, int max_outs, int num_blocks,
           int max_inputs, int max_adapters, bool kv_int8, size_t expert_cache_bytes)
    : shape_(shape), kernels_(kernels), pool_(threads), max_rows_(max_rows), max_outs_(max_outs),
      num_blocks_(num_blocks), max_inputs_(max_inputs), max_adapters_(max_adapters), head_pad_(round_up(shape.head_dim, 32)),
      kv_int8_(kv_int8), page_bytes_(kKvBlock * (kv_int8 ? head_pad_ + sizeof(float) : head_pad_ * sizeof(uint16_t))),
      block_bytes_(size_t(shape.layers) * 2 * shape.kv_heads * page_bytes_) {
  require(max_rows > 0 && max_outs > 0 && num_blocks > 0 && max_inputs > 0, "an executor without room");
  require(max_adapters >= 0, "a negative number of adapters");
  has_adapter_.resize(max_adapters);
  require(shape.head_dim > 0 && shape.head_dim <= 512 && shape.head_dim % 2 == 0, "width of a head");
  require(shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0, "heads that share keys");
  const int qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
  const int widths[kNumBuffers] = {shape.hidden, shape.hidden, qkv, shape.heads * shape.head_dim,
                                   shape.inner, shape.hidden, shape.vocab, shape.experts.count, shape.experts.inner,
                                   shape.experts.count ? shape.hidden : 0};
  for (int b = 0; b < kNumBuffers; b++) {
    widths_[b] = widths[b];
    capacity_[b] = b == kY || b == kLogits ? max_outs : max_rows * (b == kEh || b == kEo ? shape.experts.active : 1);
    buffers_[b] = Array<float>(size_t(capacity_[b]) * widths[b] + 16);
  }
  const size_t rows = round_up(std::max(max_rows, max_outs), 16) + kSlackRows, inputs = round_up(max_inputs, 64);
  q_ = Array<uint16_t>(size_t(max_rows) * shape.heads * head_pad_);
  states_ = Array<SoftmaxState>(size_t(max_rows) * shape.heads);
  kv_ = Array<uint8_t>(size_t(num_blocks) * block_bytes_);
  act_data_ = Array<uint8_t>(rows * inputs * 2);
  act_scale_ = Array<float>(rows * inputs / kGroup);
  act_sums_ = Array<int32_t>(rows);
  act_groups_ = Array<int32_t>(rows * inputs / kGroup);
  act_ = {act_data_.get(), 0, act_scale_.get(), act_sums_.get(), act_groups_.get()};
  const ExpertShape& moe = shape.experts;
  require(moe.count >= 0 && moe.active >= 0 && moe.active <= moe.count && !moe.count == !moe.active &&
          !moe.count == !moe.inner, "numbers of experts");
  if (moe.count)
    experts_ = std::make_unique<Experts>(moe, kernels_, pool_, max_rows, shape.hidden, expert_cache_bytes);
  for (int t = 0; t < threads; t++)
    threads_.push_back({Array<float>(std::max({max_inputs, shape.hidden, qkv})), Array<float>(kAttendRows * kSpan),
                        Array<float>(kAttendRows * head_pad_), Array<float>(kAttendRows * head_pad_),
                        Array<uint16_t>(kAttendRows * kSpan),
                        Array<uint16_t>(kv_int8 ? size_t(kSpanBlocks + 1) * kKvBlock * head_pad_ : 0),
                        Array<uint16_t>(size_t(kAttendRows) * head_pad_),
                        Array<float>(max_adapters ? 4 * size_t(round_up(max_inputs, 16)) : 0)});
}

void Plan::add(const Op& op) {
  require(experts_ || !is_routed(op), "an operation on experts in a plan without any");
  if (op.kind == OpKind::expert_linear) {
    const LinearWeight& w = op.experts.first;
    const bool gated = op.gated != Activation::none;
    require((gated ? w.n / 2 : w.n) == widths_[op.dst] && (op.dst == kEh || op.dst == kEo) &&
            w.k == (op.dst == kEh ? shape_.hidden : shape_.experts.inner), "an experts' linear does not fit its buffers");
    require(!gated || w.n % (2 * kTileN) == 0, "a gated linear needs whole pairs of tiles");
  }
  if (op.kind == OpKind::linear) {
    const bool gated = op.gated != Activation::none;
    const int width = gated ? op.linear.n / 2 : op.linear.n;
    require(width == widths_[op.dst] && op.linear.k <= max_inputs_, "a linear does not fit its buffers");
    require(!gated || op.linear.n % (2 * kTileN) == 0, "a gated linear needs whole pairs of tiles");
  }
  if (op.kind == OpKind::rope_kv || op.kind == OpKind::attend)
    require(op.layer >= 0 && op.layer < shape_.layers, "layer out of range");
  const int e = shape_.head_dim, q = op.q_norm.size, k = op.k_norm.size;
  require((q == 0 || q == e || q == shape_.heads * e) && (k == 0 || k == e || k == shape_.kv_heads * e),
          "size of a norm of heads");
  require(op.window > 0, "a window of attention without positions");
  ops_.push_back(op);
  ops_.back().index = num_ops() - 1;
  if (op.kind == OpKind::linear && in_tile_order(op.linear.kind)) {
    if (last_linear_ >= 0) ops_[last_linear_].next = num_ops() - 1;
    last_linear_ = num_ops() - 1;
  }
  if (op.kind == OpKind::expert_linear) experts_->add(ops_.back().experts);
  low_ranks_.emplace_back(max_adapters_);
}

void Plan::set_adapter(int slot, std::vector<LowRank> by_op) {
  require(slot >= 0 && slot < max_adapters_, "adapter slot out of range");
  const bool filled = !by_op.empty();
  by_op.resize(ops_.size());
  int rank = ld_low_;
  for (int i = 0; i < num_ops(); i++) {
    require(by_op[i].rank == 0 || (ops_[i].kind == OpKind::linear && !ops_[i].out_rows),
            "an adapter for something else than a linear of all rows");
    rank = std::max(rank, by_op[i].rank);
  }
  require(!busy_.exchange(true), "an adapter is set between steps");
  const Release release{busy_};
  if (rank > ld_low_) low_ = Array<float>(size_t(max_rows_) * rank), ld_low_ = rank;
  for (int i = 0; i < num_ops(); i++) low_ranks_[i][slot] = by_op[i];
  has_adapter_[slot] = filled;
}

void Plan::check(const Batch& b, int first, int last) const {
  require(0 <= first && first <= last && last <= num_ops(), "operations out of range");
  require(b.rows >= 1 && b.rows <= max_rows_, "too many rows");
  require(b.outs <= max_outs_, "too many rows that need logits");
  require(all_within(b.tokens, b.rows, shape_.vocab), "token id out of range");
  require(all_within(b.positions, b.rows, shape_.positions), "position out of range");
  require(all_within(b.kv_slots, b.rows, num_blocks_ * kKvBlock), "KV slot out of range");
  require(all_within(b.out_rows, b.outs, b.rows), "output row out of range");
  require(rises(b.row_starts, b.sequences, b.rows), "row_starts must rise from 0 to the number of rows");
  require(rises(b.block_starts, b.sequences, b.blocks), "block_starts must rise from 0 to the number of blocks");
  for (int s = 0; b.adapters && s < b.sequences; s++) {
    const int slot = b.adapters[s];
    require(slot >= -1 && slot < max_adapters_ && (slot < 0 || has_adapter_[slot]), "adapter slot is not filled");
  }
  for (int i = 0; i < b.blocks; i++) {
    const int32_t* block = b.block_list + i * 3;
    require(block[0] >= 0 && block[0] < num_blocks_, "KV block out of range");
    require(block[2] >= 0 && block[2] <= kKvBlock, "rows of a KV block out of range");
  }
}

void Plan::run(const Batch& batch, int first, int last) {
  check(batch, first, last);
  require(!busy_.exchange(true), "an executor runs one step at a time");
  const Release release{busy_};
  if (first == 0 && poisoned_) wipe_new_blocks(batch);
  attention_.plan(batch, shape_.heads / shape_.kv_heads);
  plan_adapters(batch);
  std::atomic<bool> fits{true};
  pool_.run([&](int thread) {
    kernels_.begin_thread();
    const bool timed = thread == 0 && op_ns_.size() == ops_.size();
    auto from = timed ? Clock::now() : Clock::time_point{};
    for (int i = first; i < last && fits; i++) {
      if (is_routed(ops_[i]) && !routed_step(batch, ops_[i], thread)) fits = false;
      else if (!is_routed(ops_[i])) step(batch, ops_[i], thread);
      pool_.barrier();
      if (timed) {
        const auto now = Clock::now();
        op_ns_[i] += std::chrono::nanoseconds(now - from).count(), from = now;
      }
    }
    kernels_.end_thread();
  });
  if (experts_) experts_->check();
  require(fits, "rows are sent to more experts than there is room for");
}

bool Plan::is_routed(const Op& op) {
  switch (op.kind) {
    case OpKind::route: case OpKind::gather: case OpKind::expert_linear: case OpKind::combine: return true;
    default: return op.kind == OpKind::quantize && op.src == kEh;
  }
}

// False where the rows of the step have more experts than there is room for, or an expert cannot be read.
bool Plan::routed_step(const Batch& b, const Op& op, int thread) {
  float *x = buffers_[kX].get(), *route = buffers_[kRoute].get(), *eo = buffers_[kEo].get();
  Act act = act_;
  switch (op.kind) {
    case OpKind::route:  // eo is free until the experts have run
      experts_->route(x, b.rows, op.weight, op.eps, op.router, op.renormalise, eo, route, thread);
      return true;
    case OpKind::gather:
      act.lines = lines_of(shape_.hidden, op.act);
      return experts_->gather(route, b.rows, act, op.act, thread);
    case OpKind::quantize: experts_->quantize(buffers_[op.src].get(), op.act, thread); return true;
    case OpKind::expert_linear:
      return experts_->linear(op.experts, op.gated, buffers_[op.dst].get(), widths_[op.dst], thread);
    default: experts_->combine(route, eo, x, thread); return true;
  }
}

// A sequence fills a block from its first slot on.
void Plan::wipe_new_blocks(const Batch& b) {
  for (int r = 0; r < b.rows; r++)
    if (b.kv_slots[r] % kKvBlock == 0)
      std::memset(block(b.kv_slots[r] / kKvBlock), 0, block_bytes_);
}

// Rows that share an adapter, so that its weights are read once for them.
void Plan::plan_adapters(const Batch& b) {
  adapter_rows_.clear(), adapter_groups_.clear();
  if (!b.adapters) return;
  slots_.resize(b.rows);
  for (int s = 0; s < b.sequences; s++)
    std::fill(slots_.begin() + b.row_starts[s], slots_.begin() + b.row_starts[s + 1], b.adapters[s]);
  for (int slot = 0; slot < max_adapters_; slot++) {
    const int first = int(adapter_rows_.size());
    for (int r = 0; r < b.rows; r++)
      if (slots_[r] == slot) adapter_rows_.push_back(r);
    const int count = int(adapter_rows_.size()) - first;
    if (count) adapter_groups_.push_back({slot, first, count});
  }
}

int Plan::rows_of(const Batch& b, const Op& op) const { return op.out_rows ? b.outs : b.rows; }

void Plan::step(const Batch& b, const Op& op, int thread) {
  const Range rows = part(rows_of(b, op), thread, pool_.size());
  float *src = buffers_[op.src].get(), *scratch = threads_[thread].row.get();
  const int width = widths_[op.src];
  switch (op.kind) {
    case OpKind::linear: return linear(b, op, thread);
    case OpKind::attend: return attend(b, op, thread);
    default: break;
  }
  Act act = act_;
  act.lines = lines_of(width, op.act);
  for (int r = rows.begin; r < rows.end; r++) {
    float* row = src + size_t(r) * width;
    switch (op.kind) {
      case OpKind::embed: embed(b, op, r); break;
      case OpKind::norm:
        kernels_.norm(row, width, op.weight, op.eps, op.act == ActKind::float32 ? row : scratch, act, r, op.act);
        break;
      case OpKind::add_norm: add_norm(op, scratch, r); break;
      case OpKind::quantize: kernels_.quantize(row, width, act, r, op.act); break;
      case OpKind::rope_kv: rope_kv(b, op, scratch, r); break;
      case OpKind::select:
        std::memcpy(buffers_[kY].get() + size_t(r) * shape_.hidden,
                    buffers_[kX].get() + size_t(b.out_rows[r]) * shape_.hidden, shape_.hidden * sizeof(float));
        break;
      default: break;  // not row by row: done elsewhere
    }
  }
}

void Plan::embed(const Batch& b, const Op& op, int row) const {
  const int d = shape_.hidden;
  float* x = buffers_[kX].get() + size_t(row) * d;
  const size_t at = size_t(b.tokens[row]) * d;
  if (!op.table_scales) {
    const auto* table = static_cast<const uint16_t*>(op.table) + at;
    for (int i = 0; i < d; i++) x[i] = from_bf16(table[i]);
    return;
  }
  const auto* table = static_cast<const int8_t*>(op.table) + at;
  const uint16_t* scales = op.table_scales + at / kGroup;
  for (int i = 0; i < d; i++) x[i] = from_f16(scales[i / kGroup]) * float(table[i]);
}

void Plan::add_norm(const Op& op, float* scratch, int row) const {
  const int d = shape_.hidden;
  Act none{};
  kernels_.norm(buffers_[kO].get() + size_t(row) * d, d, op.weight, op.eps, scratch, none, row, ActKind::float32);
  float* x = buffers_[kX].get() + size_t(row) * d;
  for (int i = 0; i < d; i++) x[i] += scratch[i];
}

void Plan::linear(const Batch& b, const Op& op, int thread) {
  Act act = act_;
  act.lines = lines_of(op.linear.k, act_of(op.linear.kind));
  LinearTask task{&op.linear, &act, buffers_[op.dst].get(), widths_[op.dst], rows_of(b, op), op.accumulate, op.gated,
                  op.bias};
  if (has_low_ranks(op)) {
    shrink(op, act, thread);
    task.low_ranks = low_ranks_[op.index].data();
    task.slots = slots_.data(), task.low = low_.get(), task.ld_low = ld_low_;
    pool_.barrier();
  }
  const Range pairs = pairs_of(op.linear, thread);
  if (op.next) {
    const LinearWeight& w = ops_[op.next].linear;
    task.next = w.data + size_t(pairs_of(w, thread).begin) * lines_of(w.k, act_of(w.kind)) * 2048;
  }
  if (task.rows > 0) kernels_.linear(task, pairs.begin, pairs.end);
}

Range Plan::pairs_of(const LinearWeight& w, int thread) const {
  return part(round_up(w.n, 2 * kTileN) / (2 * kTileN), thread, pool_.size());
}

bool Plan::has_low_ranks(const Op& op) const {
  return std::any_of(adapter_groups_.begin(), adapter_groups_.end(),
                     [&](const AdapterRows& rows) { return low_ranks_[op.index][rows.slot].rank > 0; });
}

// Threads share the ranks, so that a single row keeps all of them busy.
void Plan::shrink(const Op& op, const Act& act, int thread) {
  for (const AdapterRows& rows : adapter_groups_) {
    const LowRank& w = low_ranks_[op.index][rows.slot];
    const Range pairs = part(w.rank / 2, thread, pool_.size());
    if (pairs.begin < pairs.end)
      kernels_.shrink({&w, &act, act_of(op.linear.kind), op.linear.k, &adapter_rows_[rows.first], rows.count,
                       pairs.begin, pairs.end, threads_[thread].inputs.get(), low_.get(), ld_low_});
  }
}

size_t Plan::kv_offset(int layer, int kind, int head) const {
  return ((size_t(layer) * 2 + kind) * shape_.kv_heads + head) * page_bytes_;
}

// Heads [heads][head_dim] as they are, or normed in `scratch`.
const float* Plan::norm_heads(const HeadNorm& norm, float eps, const float* src, int heads, float* scratch) const {
  if (!norm.weight) return src;
  Act none{};
  for (int at = 0; at < heads * shape_.head_dim; at += norm.size)
    kernels_.norm(src + at, norm.size, norm.weight, eps, scratch + at, none, 0, ActKind::float32);
  return scratch;
}

void Plan::rope_kv(const Batch& b, const Op& op, float* scratch, int row) {
  const int e = shape_.head_dim, group = shape_.heads / shape_.kv_heads;
  const float* qkv = buffers_[kQkv].get() + size_t(row) * widths_[kQkv];
  const size_t turn = size_t(b.positions[row]) * (e / 2);
  const float *cos = op.rotary ? shape_.cos + turn : nullptr, *sin = op.rotary ? shape_.sin + turn : nullptr;
  const float* queries = norm_heads(op.q_norm, op.eps, qkv, shape_.heads, scratch);
  const float* keys = norm_heads(op.k_norm, op.eps, qkv + shape_.heads * e, shape_.kv_heads, scratch + shape_.heads * e);
  for (int h = 0; h < shape_.heads; h++) {
    const size_t at = (size_t(h / group) * max_rows_ + row) * group + h % group;
    kernels_.rope(queries + h * e, e, cos, sin, q_.get() + at * head_pad_);
  }
  const int slot = b.kv_slots[row] % kKvBlock;
  uint8_t* pages = block(b.kv_slots[row] / kKvBlock);
  uint16_t key[512];
  for (int g = 0; g < shape_.kv_heads; g++) {
    kernels_.rope(keys + g * e, e, cos, sin, key);
    const float* value = qkv + (shape_.heads + shape_.kv_heads + g) * e;
    uint8_t *k_page = pages + kv_offset(op.layer, 0, g), *v_page = pages + kv_offset(op.layer, 1, g);
    if (kv_int8_) put_int8(key, value, slot, k_page, v_page);
    else if (!kernels_.put_kv(key, value, e, slot, (uint16_t*)k_page, (uint16_t*)v_page)) poisoned_ = true;
  }
}

// Rounds as the input of a linear is rounded; a vector that is not finite gets zeros and the scale NaN.
void Plan::put_int8(const uint16_t* key, const float* value, int slot, uint8_t* k_page, uint8_t* v_page) const {
  const int e = shape_.head_dim, scales = kKvBlock * head_pad_;
  float wide[512];
  uint8_t k[8 * 1024], v[8 * 1024];  // the first of 16 rows in each tile of 64 inputs
  int32_t k_sum, v_sum;
  Act k_act{k, lines_of(e, ActKind::int8), reinterpret_cast<float*>(k_page + scales) + slot, &k_sum, nullptr};
  Act v_act{v, k_act.lines, reinterpret_cast<float*>(v_page + scales) + slot, &v_sum, nullptr};
  for (int i = 0; i < e; i++) wide[i] = from_bf16(key[i]);
  kernels_.quantize(wide, e, k_act, 0, ActKind::int8);
  kernels_.quantize(value, e, v_act, 0, ActKind::int8);
  for (int i = 0; i < e; i++) {
    k_page[k_first(slot) + k_step(i)] = k_act.line(0, i / 64)[i % 64];
    v_page[v_first(slot) + v_step(i)] = v_act.line(0, i / 64)[i % 64];
  }
}

void Plan::attend(const Batch& b, const Op& op, int thread) {
  if (!attention_.shared().empty()) {
    attend_tasks(b, op, thread, attention_.shared(), next_shared_);
    pool_.barrier();
  }
  attend_tasks(b, op, thread, attention_.own(), next_task_);
  // The counters are ready for the next attention once everybody has left this one.
  pool_.barrier();
  if (thread == 0) next_shared_.store(0, std::memory_order_relaxed), next_task_.store(0, std::memory_order_relaxed);
}

void Plan::attend_tasks(const Batch& b, const Op& op, int thread, const std::vector<RowTile>& tasks,
                        std::atomic<int>& next) {
  const int group = shape_.heads / shape_.kv_heads, count = int(tasks.size()) * shape_.kv_heads;
  const Thread& own = threads_[thread];
  const AttendScratch scratch{own.scores.get(), own.probs.get(), own.acc.get(), own.span.get(), own.wide.get()};
  while (true) {
    const int i = next.fetch_add(1, std::memory_order_relaxed);
    if (i >= count) break;
    const RowTile& task = tasks[i / shape_.kv_heads];
    const int g = i % shape_.kv_heads;
    int32_t positions[kAttendRows];
    size_t out_offset[kAttendRows];
    for (int r = 0; r < task.rows; r++) {
      const int row = attention_.order()[(task.first + r) / group], pair = (task.first + r) % group;
      positions[r] = b.positions[row];
      out_offset[r] = size_t(row) * widths_[kZ] + size_t(g * group + pair) * shape_.head_dim;
      std::memcpy(own.q.get() + r * head_pad_,
                  q_.get() + ((size_t(g) * max_rows_ + row) * group + pair) * head_pad_, head_pad_ * sizeof(uint16_t));
    }
    kernels_.attend({own.q.get(), task.rows, positions, task.blocks, b.block_list + size_t(task.block) * 3,
                     kv_.get() + kv_offset(op.layer, 0, g), kv_.get() + kv_offset(op.layer, 1, g), block_bytes_,
                     kv_int8_, shape_.head_dim, head_pad_, shape_.softmax_scale * 1.44269504088896341f, op.window,
                     buffers_[kZ].get(), out_offset, states_.get(), task.resumes, task.pauses},
                    scratch);
  }
}

float* Plan::buffer(int id, int& rows, int& width) {
  rows = capacity_[id], width = widths_[id];
  return buffers_[id].get();
}

uint8_t* Plan::block(int index) {
  require(index >= 0 && index < num_blocks_, "KV block out of range");
  return kv_.get() + index * block_bytes_;
}

void Plan::copy_block(int from, int to) { std::memmove(block(to), block(from), block_bytes_); }

template class Array<float>;
template class Array<SoftmaxState>;
template class Array<uint8_t>;
template class Array<int32_t>;
template class Array<uint16_t>;

}  // namespace mill
