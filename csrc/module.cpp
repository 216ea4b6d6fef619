// Python bindings. Arrays are borrowed: the Python side keeps every weight alive as long as its plan.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "plan.h"
#include "probe.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Ints = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

const mill::Kernels& kernels_of(const std::string& isa) {
  const mill::Kernels* k = mill::find_kernels(isa.c_str());
  if (!k) throw std::invalid_argument("instruction set not available: " + isa);
  return *k;
}

mill::LinearKind linear_kind(const std::string& kind) {
  if (kind == "i8c") return mill::LinearKind::i8c;
  if (kind == "i8g") return mill::LinearKind::i8g;
  if (kind == "i4g") return mill::LinearKind::i4g;
  if (kind == "bf16") return mill::LinearKind::bf16;
  throw std::invalid_argument("unknown linear kind: " + kind);
}

mill::ActKind act_kind(const std::string& act) {
  if (act == "int8") return mill::ActKind::int8;
  if (act == "int8_groups") return mill::ActKind::int8_groups;
  if (act == "bf16") return mill::ActKind::bf16;
  if (act == "float32") return mill::ActKind::float32;
  throw std::invalid_argument("unknown activation format: " + act);
}

mill::Activation activation(const std::string& name) {
  if (name.empty()) return mill::Activation::none;
  if (name == "silu") return mill::Activation::silu;
  if (name == "gelu_tanh") return mill::Activation::gelu_tanh;
  if (name == "relu") return mill::Activation::relu;
  throw std::invalid_argument("unknown activation: " + name);
}

int buffer_id(const std::string& name) {
  const char* names[mill::kNumBuffers] = {"x", "y", "qkv", "z", "h", "o", "logits", "route", "eh", "eo"};
  for (int i = 0; i < mill::kNumBuffers; i++)
    if (name == names[i]) return i;
  throw std::invalid_argument("unknown buffer: " + name);
}

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

size_t round_up(size_t x, size_t to) { return (x + to - 1) / to * to; }

// The arrays of a matrix must be as large as the kernels believe (packing.py has the layouts).
void check_sizes(const mill::LinearWeight& w, size_t data, size_t scales) {
  const size_t n = w.n, k = w.k, n32 = round_up(n, 32);
  require(w.n > 0 && w.k > 0, "a linear without inputs or outputs");
  if (w.kind == mill::LinearKind::bf16) return require(data == n32 * round_up(k, 32) * 2, "size of bf16 weights");
  if (w.kind == mill::LinearKind::i8c)
    return require(data == n32 * round_up(k, 64) && scales == n32 * 4, "size of i8c weights");
  require(w.group > 0 && w.group % mill::kGroup == 0 && k % w.group == 0, "groups of a linear");
  const size_t tile = w.kind == mill::LinearKind::i4g ? 256 : 512, block = 2 * tile + (w.symmetric ? 64 : 128);
  require(data == n32 * k / 1024 * block, "size of grouped weights");
  require(scales == 0, "size of grouped scales");
}

// The arrays of an adapter's part of a linear (lowrank.py has the layout).
mill::LowRank low_rank(const mill::LinearWeight& w, int rank, float scale, const Bytes& down, const Bytes& up,
                       const Bytes& pairs) {
  const size_t width = round_up(w.k, 16), num_pairs = round_up(w.n, 32) / 32, rows = up.nbytes() / 64;
  require(rank > 0 && rank % 2 == 0 && down.nbytes() == rank * width * 2, "size of an adapter's inner matrix");
  require(up.nbytes() == rows * 64 && pairs.nbytes() == num_pairs * sizeof(mill::LowRankPair),
          "size of an adapter's outer matrix");
  const auto* at = (const mill::LowRankPair*)pairs.data();
  for (size_t i = 0; i < num_pairs; i++) {
    require(at[i].count >= 0 && at[i].row >= 0 && size_t(at[i].row) + at[i].count <= rows,
            "rows of an adapter's pair of tiles");
    for (int first : at[i].first)
      require(first >= 0 && int64_t(first) + at[i].count <= rank, "ranks of an adapter's pair of tiles");
  }
  return {rank, scale, (const uint16_t*)down.data(), (const uint16_t*)up.data(), at};
}

const void* pointer_or_null(const Bytes& a) { return a.size() ? a.data() : nullptr; }

// A plan and the arrays it points into.
class NativePlan {
 public:
  NativePlan(const std::string& isa, int threads, int max_rows, int max_outs, int num_blocks, int max_inputs,
             int max_adapters, int hidden, int heads, int kv_heads, int head_dim, int inner, int vocab, int layers,
             float softmax_scale, Bytes cos, Bytes sin, bool kv_int8, int experts, int active,
             int expert_inner, size_t expert_cache_bytes)
      : hidden_(hidden), vocab_(vocab), experts_(experts),
        plan_({hidden, heads, kv_heads, head_dim, inner, vocab, layers, int(cos.shape(0)), softmax_scale,
               (const float*)cos.data(), (const float*)sin.data(), {experts, active, expert_inner}},
              kernels_of(isa), threads, max_rows, max_outs, num_blocks, max_inputs, max_adapters, kv_int8,
              expert_cache_bytes),
        adapter_arrays_(std::max(max_adapters, 0)) {
    require(cos.ndim() == 2 && cos.nbytes() == cos.shape(0) * (head_dim / 2) * 4 && sin.nbytes() == cos.nbytes(),
            "size of the rotation tables");
    owned_.insert(owned_.end(), {cos, sin});
  }

  void add_embed(Bytes table, Bytes scales) {
    mill::Op op{mill::OpKind::embed};
    const size_t values = size_t(vocab_) * hidden_;
    require(table.nbytes() == values * (scales.size() ? 1 : 2), "size of the embeddings");
    require(!scales.size() || (hidden_ % 32 == 0 && scales.nbytes() == values / 16), "size of the embedding scales");
    op.table = table.data();
    op.table_scales = (const uint16_t*)pointer_or_null(scales);
    keep(op, {table, scales});
  }
  void add_norm(const std::string& src, Bytes weight, float eps, const std::string& act, bool out_rows) {
    mill::Op op{mill::OpKind::norm, buffer_id(src)};
    require(weight.nbytes() == size_t(hidden_) * 4, "size of a norm weight");
    op.weight = (const float*)weight.data();
    op.eps = eps, op.act = act_kind(act), op.out_rows = out_rows;
    keep(op, {weight});
  }
  void add_add_norm(Bytes weight, float eps) {
    mill::Op op{mill::OpKind::add_norm};
    require(weight.nbytes() == size_t(hidden_) * 4, "size of a norm weight");
    op.weight = (const float*)weight.data(), op.eps = eps;
    keep(op, {weight});
  }
  void add_linear(const std::string& dst, const std::string& kind, int n, int k, int group, bool symmetric,
                  Bytes data, Bytes scales, Bytes bias, bool accumulate, const std::string& gated,
                  bool out_rows) {
    mill::Op op{mill::OpKind::linear};
    op.dst = buffer_id(dst);
    op.linear = {linear_kind(kind), n, k, group, symmetric, (const uint8_t*)data.data(),
                 pointer_or_null(scales)};
    check_sizes(op.linear, data.nbytes(), scales.nbytes());
    require(!bias.size() || bias.nbytes() == round_up(n, 32) * 4, "size of a bias");
    op.bias = (const float*)pointer_or_null(bias);
    op.accumulate = accumulate, op.gated = activation(gated), op.out_rows = out_rows;
    keep(op, {data, scales, bias});
  }
  void add_quantize(const std::string& src, const std::string& act, bool out_rows) {
    mill::Op op{mill::OpKind::quantize, buffer_id(src)};
    op.act = act_kind(act), op.out_rows = out_rows;
    plan_.add(op);
  }
  void add_rope_kv(int layer, bool rotary, Bytes q_norm, Bytes k_norm, float eps) {
    mill::Op op{mill::OpKind::rope_kv};
    op.layer = layer, op.rotary = rotary, op.eps = eps;
    op.q_norm = head_norm(q_norm), op.k_norm = head_norm(k_norm);
    keep(op, {q_norm, k_norm});
  }
  void add_attend(int layer, int window) {
    mill::Op op{mill::OpKind::attend};
    op.layer = layer, op.window = std::min(window, mill::kNoWindow);
    plan_.add(op);
  }
  void add_select() {
    mill::Op op{mill::OpKind::select};
    op.out_rows = true;
    plan_.add(op);
  }

  void add_route(Bytes weight, Bytes norm, float eps, bool renormalise) {
    mill::Op op{mill::OpKind::route};
    require(weight.nbytes() == size_t(experts_) * hidden_ * 4 && norm.nbytes() == size_t(hidden_) * 4, "size of a router");
    op.router = (const float*)weight.data(), op.weight = (const float*)norm.data();
    op.eps = eps, op.renormalise = renormalise;
    keep(op, {weight, norm});
  }
  void add_gather(const std::string& act) {
    mill::Op op{mill::OpKind::gather};
    op.act = act_kind(act);
    plan_.add(op);
  }
  void add_expert_linear(const std::string& dst, const std::string& kind, int n, int k, int group, bool symmetric,
                         Bytes data, Bytes scales, const std::string& gated) {
    mill::Op op{mill::OpKind::expert_linear};
    const size_t x = size_t(experts_);
    require(x && data.nbytes() % x == 0 && scales.nbytes() % x == 0, "size of experts' weights");
    op.experts = {{linear_kind(kind), n, k, group, symmetric, (const uint8_t*)data.data(), pointer_or_null(scales)},
                  data.nbytes() / x, scales.nbytes() / x};
    check_sizes(op.experts.first, op.experts.data_step, op.experts.scales_step);
    op.dst = buffer_id(dst), op.gated = activation(gated);
    keep(op, {data, scales});
  }
  void add_combine() { plan_.add({mill::OpKind::combine}); }
  std::tuple<uint64_t, uint64_t, uint64_t, uint64_t, double> expert_stats() const {
    const mill::ExpertStats s = plan_.expert_stats();
    return {s.hits, s.misses, s.bytes_read, s.bytes_held, s.read_seconds};
  }
  int num_shared_blocks() const { return plan_.num_shared_blocks(); }
  void time_ops() { plan_.time_ops(); }
  std::vector<int64_t> op_ns() const { return plan_.op_ns(); }

  // One entry an operation in `ops`; none frees the slot. Nothing is changed if anything is wrong.
  void set_adapter(int slot, std::vector<int> ops, std::vector<int> ranks, std::vector<float> scales,
                   std::vector<Bytes> downs, std::vector<Bytes> ups, std::vector<Bytes> pairs) {
    std::vector<mill::LowRank> by_op(ops.empty() ? 0 : plan_.num_ops());
    for (size_t i = 0; i < ops.size(); i++) {
      require(ops[i] >= 0 && ops[i] < plan_.num_ops() && plan_.op(ops[i]).kind == mill::OpKind::linear,
              "an adapter for something else than a linear");
      by_op[ops[i]] = low_rank(plan_.op(ops[i]).linear, ranks.at(i), scales.at(i), downs.at(i), ups.at(i), pairs.at(i));
    }
    plan_.set_adapter(slot, std::move(by_op));
    std::vector<Bytes>& kept = adapter_arrays_[slot];
    kept.clear();
    for (const auto* arrays : {&downs, &ups, &pairs}) kept.insert(kept.end(), arrays->begin(), arrays->end());
  }

  void run(Ints tokens, Ints positions, Ints kv_slots, Ints row_starts, Ints block_starts, Ints blocks,
           Ints out_rows, Ints adapters, int first, int last) {
    const int rows = int(tokens.size()), sequences = int(row_starts.size()) - 1;
    if (int(positions.size()) != rows || int(kv_slots.size()) != rows)
      throw std::invalid_argument("tokens, positions and kv_slots differ in length");
    if (sequences < 1 || block_starts.size() != row_starts.size())
      throw std::invalid_argument("row_starts and block_starts differ in length or are empty");
    if (adapters.size() && int(adapters.size()) != sequences)
      throw std::invalid_argument("adapters are not one a sequence");
    const mill::Batch batch{rows, sequences, int(blocks.size() / 3), int(out_rows.size()), tokens.data(),
                          positions.data(), kv_slots.data(), row_starts.data(), block_starts.data(),
                          blocks.data(), out_rows.data(), adapters.size() ? adapters.data() : nullptr};
    nb::gil_scoped_release release;
    plan_.run(batch, first, last);
  }

  nb::ndarray<nb::numpy, float, nb::ndim<2>> buffer(const std::string& name) {
    int rows, width;
    float* data = plan_.buffer(buffer_id(name), rows, width);
    return nb::ndarray<nb::numpy, float, nb::ndim<2>>(data, {size_t(rows), size_t(width)}, nb::find(this));
  }
  nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>> block(int index) {
    return nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(plan_.block(index), {plan_.block_bytes()}, nb::find(this));
  }
  void copy_block(int from, int to) { plan_.copy_block(from, to); }
  mill::Pool& pool() { return plan_.pool(); }

 private:
  void keep(const mill::Op& op, std::initializer_list<Bytes> arrays) {
    plan_.add(op);
    owned_.insert(owned_.end(), arrays);
  }
  static mill::HeadNorm head_norm(const Bytes& weight) {
    return {(const float*)pointer_or_null(weight), int(weight.nbytes() / 4)};
  }

  const int hidden_, vocab_, experts_;
  mill::Plan plan_;
  std::vector<Bytes> owned_;
  std::vector<std::vector<Bytes>> adapter_arrays_;  // by slot
};

std::vector<std::string> available_isas() {
  const char* names[8];
  const int n = mill::detect_isas(names);
  return {names, names + n};
}

nb::ndarray<nb::numpy, double, nb::ndim<1>> log_sum_exp_rows(Floats logits, const std::string& isa) {
  const mill::Kernels& k = kernels_of(isa);
  const size_t rows = logits.shape(0);
  auto* out = new double[rows];
  nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<double*>(p); });
  {
    nb::gil_scoped_release release;
    for (size_t r = 0; r < rows; r++)
      out[r] = k.log_sum_exp(logits.data() + r * logits.shape(1), int(logits.shape(1)));
  }
  return {out, {rows}, owner};
}

using Words = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Integers = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Reals = nb::ndarray<const double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Values = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Columns of the two tables that `sample` takes, in the order of kernels/sampling.py.
enum Integer { kLogitsRow, kSeed, kPosition, kTopK, kNumPrompt, kNumBiases, kNumBanned, kEdited, kNumIntegers };
enum Real { kInverse, kTopP, kFarthest, kRepetition, kPresence, kFrequency, kNumReals };

mill::SampleTask sample_task(const Floats& logits, const int64_t* i, const double* f, const Ints& tokens,
                             const Words& mask) {
  mill::SampleTask t{};
  const int64_t rows = int64_t(logits.shape(0)), vocab = int64_t(logits.shape(1)), words = (vocab + 31) / 32;
  require(0 <= i[kLogitsRow] && i[kLogitsRow] < rows, "row of logits");
  require(i[kNumBiases] >= 0 && i[kNumBanned] >= 0, "negative count");
  require(mask.size() == 0 || int64_t(mask.size()) >= words, "size of a mask");
  require(tokens.size() < (size_t(1) << 30), "number of tokens");
  t.logits = logits.data() + i[kLogitsRow] * vocab;
  t.vocab = int(vocab);
  t.seed = uint64_t(i[kSeed]), t.position = uint32_t(i[kPosition]);
  t.top_k = int(std::clamp<int64_t>(i[kTopK], 0, vocab));
  t.num_prompt = int(std::clamp<int64_t>(i[kNumPrompt], 0, int64_t(tokens.size())));
  t.num_biases = int(i[kNumBiases]), t.num_banned = int(i[kNumBanned]), t.edited = i[kEdited] != 0;
  t.inverse_temperature = float(f[kInverse]), t.top_p = f[kTopP], t.farthest = float(f[kFarthest]);
  t.repetition = float(f[kRepetition]), t.presence = float(f[kPresence]), t.frequency = float(f[kFrequency]);
  require(t.inverse_temperature >= 0 && t.top_p > 0 && t.farthest >= 0, "temperature, top_p or min_p");
  t.tokens = tokens.data(), t.num_tokens = int(tokens.size());
  t.mask = mask.size() ? mask.data() : nullptr;
  return t;
}

// The shares of the flat lists that each row takes in turn.
void share_lists(std::vector<mill::SampleTask>& tasks, const Ints& bias_ids, const Values& bias_values,
                 const Ints& banned) {
  size_t bias = 0, ban = 0;
  for (mill::SampleTask& t : tasks) {
    t.bias_ids = bias_ids.data() + bias, t.bias_values = bias_values.data() + bias, t.banned = banned.data() + ban;
    bias += size_t(t.num_biases), ban += size_t(t.num_banned);
    require(bias <= bias_ids.size() && bias <= bias_values.size() && ban <= banned.size(), "size of a flat list");
  }
}

// Scratch for the rows of a batch; what none of them needs is not allocated.
class SampleMemory {
 public:
  SampleMemory(const std::vector<mill::SampleTask>& tasks, size_t vocab) {
    bool edited = false, filtered = false, penalised = false;
    for (const mill::SampleTask& t : tasks)
      edited |= t.edited, filtered |= t.top_p < 1 || t.top_k > 0, penalised |= t.edited && t.num_tokens > 0;
    const size_t groups = round_up(vocab, mill::kRaceGroup * 16) / mill::kRaceGroup;
    // One more group: what is collected is written before it is known to count.
    const size_t tokens = (groups + 1) * mill::kRaceGroup;
    small_.reset(new float[groups * 4]);
    owner_.reset(new uint32_t[groups]);
    if (edited) logits_.reset(new float[tokens]);
    if (filtered) weights_.reset(new float[tokens * 3]), index_.reset(new int32_t[tokens]);
    if (penalised) counts_.reset(new int32_t[tokens]());
    float *at = small_.get(), *weights = weights_.get();
    scratch = {at, at + groups, at + groups * 2, at + groups * 3, owner_.get(), logits_.get(), weights,
               filtered ? weights + tokens : nullptr, filtered ? weights + tokens * 2 : nullptr, index_.get(), counts_.get()};
  }
  mill::SampleScratch scratch;

 private:
  std::unique_ptr<float[]> small_, logits_, weights_;
  std::unique_ptr<uint32_t[]> owner_;
  std::unique_ptr<int32_t[]> index_, counts_;
};

// Logits that are read in less time than it takes to wake a thread.
constexpr size_t kFewLogits = 1 << 15;

// With a plan its threads share the rows; no step of it may run meanwhile.
nb::ndarray<nb::numpy, int32_t, nb::ndim<1>> sample(Floats logits, Integers integers, Reals reals, Ints bias_ids,
                                                    Values bias_values, Ints banned, std::vector<Ints> tokens,
                                                    std::vector<Words> masks, const std::string& isa,
                                                    NativePlan* plan) {
  const size_t rows = integers.shape(0), vocab = logits.shape(1);
  const mill::Kernels& k = kernels_of(isa);
  require(0 < vocab && vocab <= mill::kMaxVocab, "size of the vocabulary");
  require(integers.shape(1) == kNumIntegers && reals.shape(1) == kNumReals && reals.shape(0) == rows &&
          (tokens.empty() || tokens.size() == rows) && (masks.empty() || masks.size() == rows),
          "shape of the tables");
  std::vector<mill::SampleTask> tasks;
  for (size_t r = 0; r < rows; r++)
    tasks.push_back(sample_task(logits, integers.data() + r * kNumIntegers, reals.data() + r * kNumReals,
                                tokens.empty() ? Ints() : tokens[r], masks.empty() ? Words() : masks[r]));
  share_lists(tasks, bias_ids, bias_values, banned);
  mill::Pool* pool = plan && rows > 1 && rows * vocab > kFewLogits ? &plan->pool() : nullptr;
  std::vector<SampleMemory> memory;
  for (int t = 0; t < (pool ? pool->size() : 1); t++) memory.emplace_back(tasks, vocab);
  auto* out = new int32_t[rows];
  nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<int32_t*>(p); });
  std::atomic<size_t> next{0};
  const auto work = [&](int thread) {
    for (size_t r; (r = next++) < rows;) out[r] = k.sample(tasks[r], memory[thread].scratch);
  };
  {
    nb::gil_scoped_release release;
    pool ? pool->run(work) : work(0);
  }
  return {out, {rows}, owner};
}

nb::ndarray<nb::numpy, int32_t, nb::ndim<2>> top_ids(Floats logits, int num, const std::string& isa) {
  const size_t rows = logits.shape(0), vocab = logits.shape(1);
  const mill::Kernels& k = kernels_of(isa);
  require(0 < vocab && vocab <= mill::kMaxVocab && 0 <= num && size_t(num) <= vocab, "number of top ids");
  auto* out = new int32_t[rows * size_t(num)];
  nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<int32_t*>(p); });
  {
    nb::gil_scoped_release release;
    for (size_t r = 0; r < rows; r++) k.top_ids(logits.data() + r * vocab, int(vocab), num, out + r * size_t(num));
  }
  return {out, {rows, size_t(num)}, owner};
}

double read_bandwidth(const std::string& isa, int threads, size_t bytes, double seconds) {
  nb::gil_scoped_release release;
  mill::Pool pool(threads);
  return mill::read_bandwidth(kernels_of(isa), pool, bytes, seconds);
}

double op_rate(const std::string& isa, int threads, bool int8, double seconds) {
  nb::gil_scoped_release release;
  mill::Pool pool(threads);
  const mill::Kernels& k = kernels_of(isa);
  return mill::op_rate(int8 ? k.int8_ops : k.bf16_ops, pool, seconds);
}

}  // namespace

NB_MODULE(_native, m) {
  nb::exception<mill::ReadError>(m, "ReadError", PyExc_OSError);
  m.def("available_isas", &available_isas);
  m.def("log_sum_exp_rows", &log_sum_exp_rows, "logits"_a, "isa"_a);
  m.def("sample", &sample, "logits"_a, "integers"_a, "reals"_a, "bias_ids"_a, "bias_values"_a, "banned"_a, "tokens"_a,
        "masks"_a, "isa"_a, "plan"_a.none());
  m.def("top_ids", &top_ids, "logits"_a, "num"_a, "isa"_a);
  m.def("read_bandwidth", &read_bandwidth, "isa"_a, "threads"_a, "bytes"_a, "seconds"_a);
  m.def("op_rate", &op_rate, "isa"_a, "threads"_a, "int8"_a, "seconds"_a);
  nb::class_<NativePlan>(m, "Plan")
      .def(nb::init<const std::string&, int, int, int, int, int, int, int, int, int, int, int, int, int, float, Bytes,
                    Bytes, bool, int, int, int, size_t>(),
           "isa"_a, "threads"_a, "max_rows"_a, "max_outs"_a, "num_blocks"_a, "max_inputs"_a, "max_adapters"_a, "hidden"_a, "heads"_a,
           "kv_heads"_a, "head_dim"_a, "inner"_a, "vocab"_a, "layers"_a, "softmax_scale"_a, "cos"_a, "sin"_a,
           "kv_int8"_a, "experts"_a, "active"_a, "expert_inner"_a, "expert_cache_bytes"_a)
      .def("add_embed", &NativePlan::add_embed, "table"_a, "scales"_a)
      .def("add_norm", &NativePlan::add_norm, "src"_a, "weight"_a, "eps"_a, "act"_a, "out_rows"_a)
      .def("add_add_norm", &NativePlan::add_add_norm, "weight"_a, "eps"_a)
      .def("add_linear", &NativePlan::add_linear, "dst"_a, "kind"_a, "n"_a, "k"_a, "group"_a, "symmetric"_a, "data"_a,
           "scales"_a, "bias"_a, "accumulate"_a, "gated"_a, "out_rows"_a)
      .def("add_quantize", &NativePlan::add_quantize, "src"_a, "act"_a, "out_rows"_a)
      .def("add_rope_kv", &NativePlan::add_rope_kv, "layer"_a, "rotary"_a, "q_norm"_a, "k_norm"_a, "eps"_a)
      .def("add_attend", &NativePlan::add_attend, "layer"_a, "window"_a)
      .def("add_select", &NativePlan::add_select)
      .def("add_route", &NativePlan::add_route, "weight"_a, "norm"_a, "eps"_a, "renormalise"_a)
      .def("add_gather", &NativePlan::add_gather, "act"_a)
      .def("add_expert_linear", &NativePlan::add_expert_linear, "dst"_a, "kind"_a, "n"_a, "k"_a, "group"_a, "symmetric"_a,
           "data"_a, "scales"_a, "gated"_a)
      .def("add_combine", &NativePlan::add_combine)
      .def("expert_stats", &NativePlan::expert_stats)
      .def("num_shared_blocks", &NativePlan::num_shared_blocks)
      .def("time_ops", &NativePlan::time_ops)
      .def("op_ns", &NativePlan::op_ns)
      .def("set_adapter", &NativePlan::set_adapter, "slot"_a, "ops"_a, "ranks"_a, "scales"_a, "downs"_a, "ups"_a,
           "pairs"_a)
      .def("run", &NativePlan::run, nb::arg("tokens").noconvert(), nb::arg("positions").noconvert(), nb::arg("kv_slots").noconvert(), nb::arg("row_starts").noconvert(), nb::arg("block_starts").noconvert(),
           nb::arg("blocks").noconvert(), nb::arg("out_rows").noconvert(),
           nb::arg("adapters").noconvert(), "first"_a, "last"_a)
      .def("buffer", &NativePlan::buffer, "name"_a)
      .def("block", &NativePlan::block, "index"_a)
      .def("copy_block", &NativePlan::copy_block, "source"_a, "target"_a);
}
