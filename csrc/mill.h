// Shared by all kernels: what a weight matrix, a row of activations and an attention task look like in
// memory, and the table of functions that every instruction set fills.
//
// The arithmetic is defined once, with a fixed order of every sum and fused multiply-add only in the polynomial
// of 2^t (vec.h) and for groups of weights (groups.h), so that all instruction sets and the numpy twin
// (src/tokenmill/kernels/twin.py) agree bit for bit:
//   * integer products are exact;
//   * float sums over a row run in 16 lanes (lane j takes elements j, j+16, ...), then a fixed tree;
//   * bf16 products are summed as the AMX instruction TDPBF16PS does: in chunks of 32 inputs, even and
//     odd inputs in two chains that start at zero, then chunk = even + odd, then sum += chunk. A product
//     of two bf16 numbers is exact in float32, so a fused multiply-add gives the same bits there. (Tile
//     instructions flush denormal numbers, below 1e-38, to zero: there bits may differ.)
#pragma once
#include <cstddef>
#include <cstdint>

// Inlined always: a copy that was compiled for one instruction set must not serve another.
#define MILL_MEMBER __attribute__((always_inline)) inline

namespace mill {

constexpr int kTileN = 16;      // outputs in one weight tile
constexpr int kKvBlock = 32;    // tokens in one KV block
constexpr int kSpanBlocks = 16; // blocks between two rescalings of the online softmax
constexpr int kSpan = kKvBlock * kSpanBlocks;
constexpr int kAttendRows = 32; // rows that attention takes at once
constexpr int kGroup = 32;      // inputs that share one entry of Act::group_sums
constexpr int kSlackRows = 32;  // rows that kernels may read (never use) past the last one

enum class LinearKind { i8c, i8g, i4g, bf16 };

// What is done to the gates of a gated unit; `none` for a linear that is not one.
enum class Activation { none, silu, gelu_tanh, relu };

constexpr int kNoWindow = 1 << 30;  // a window that nothing lies outside of

// What a linear reads: 8 bits with a scale a row, 8 bits with a scale a group of 32 inputs, or bf16. No linear
// reads float32: a norm of this kind stays in its buffer.
enum class ActKind { int8, int8_groups, bf16, float32 };

// Quantised activations in the order of AMX tiles, [rows / 16][lines][16 rows][64 bytes], zero from K up to
// the padded width. A line is 64 inputs of one row in 8 bits, or 32 in bf16.
struct Act {
  uint8_t* data;
  int lines;             // of one row
  float* scale;          // [rows], or [rows][lines * 2] for groups
  int32_t* row_sum;      // [rows] sum of q
  int32_t* group_sums;   // [rows][lines * 2] sum of q over 32 inputs

  MILL_MEMBER uint8_t* tiles(int row) const { return data + size_t(row / 16) * lines * 1024; }
  MILL_MEMBER uint8_t* line(int row, int i) const { return tiles(row) + size_t(i) * 1024 + row % 16 * 64; }
};

// One weight matrix [N, K] in tile order; packing.py documents each layout.
struct LinearWeight {
  LinearKind kind;
  int n, k, group;
  bool symmetric;
  const uint8_t* data;
  const void* scales;      // float32 [N32] for i8c; grouped weights have theirs in `data`
};

// Which ranks the tiles of a pair add up: [first[h], first[h] + count), weights in rows [row, row + count) of `up`.
struct LowRankPair { int32_t first[2], count, row; };

// What one adapter adds to one linear: y += up . (scale * (down . x)) (LoRA, Hu et al. 2021). Everything that is
// multiplied is bf16, so that products are exact.
struct LowRank {
  int rank = 0;                        // even; 0: nothing is added
  float scale = 0;
  const uint16_t* down = nullptr;      // bf16 [rank / 2][K up to 16s][2 ranks]
  const uint16_t* up = nullptr;        // bf16 [rows][16 outputs][2 tiles]
  const LowRankPair* pairs = nullptr;
};

// The first half of that, for rows that share an adapter: low = scale * (down . x), in bf16, for pairs of ranks
// [begin, end).
struct ShrinkTask {
  const LowRank* w;
  const Act* act;
  ActKind kind;
  int k;
  const int32_t* rows;  // [count]
  int count, begin, end;
  float* x;             // scratch, [4][k up to 16s]
  float* low;           // row r at low + r * ld_low
  int ld_low;
};

struct LinearTask {
  const LinearWeight* w;
  const Act* act;
  float* dst;      // [rows][ld_dst]
  int ld_dst;
  int rows;
  bool accumulate;
  Activation gated;  // tiles come in pairs (gate, up); dst gets activation(gate) * up, half as wide
  const float* bias = nullptr;         // [n up to 32s], in the order of the tiles; added to what an adapter leaves
  const LowRank* low_ranks = nullptr;  // by adapter slot; null if no row of this step has one here
  const int32_t* slots = nullptr;      // [rows] adapter slot or -1
  const float* low = nullptr;          // [rows][ld_low], made by `shrink`
  int ld_low = 0;
  const uint8_t* next = nullptr;       // weights that this thread reads after these, or null
};

// Where a token's first dim, and from there each other dim, lies in a page of the KV cache: the orders of attend.h.
MILL_MEMBER int k_first(int slot) { return slot / 16 * 512 + slot % 16 * 2; }
MILL_MEMBER int k_step(int dim) { return dim / 32 * 1024 + dim % 32 / 2 * 32 + dim % 2; }
MILL_MEMBER int v_first(int slot) { return slot / 2 * 32 + slot % 2; }
MILL_MEMBER int v_step(int dim) { return dim / 16 * 512 + dim % 16 * 2; }

// Rows [rows][d] that have passed a norm against a router [experts][d], all in float32.
struct RouterTask {
  const float *x, *weight;
  int d, rows, experts;
  float* logits;  // [rows][experts]
};

// What attention knows of a row between two parts of its blocks; the sum of its values is where its result will be.
struct SoftmaxState { float top, sum; };

// Rows against blocks that all of them list, for one KV head. A row is a (token, query head) pair.
struct AttendTask {
  const uint16_t* q;         // [rows][head_pad] bf16, contiguous
  int rows;                  // 1..kAttendRows
  const int32_t* positions;  // [rows]
  int num_blocks;
  const int32_t* blocks;     // [num_blocks][3] block id, first position, rows in use
  const uint8_t* k;          // K of this layer and head: block b at k + b * block_stride
  const uint8_t* v;
  size_t block_stride;       // bytes
  bool kv_int8;              // attend.h has both layouts
  int head_dim, head_pad;
  float scale;               // softmax scale times log2(e)
  int window;                // a row sees positions above its own less this many
  float* out;                // row r at out + out_offset[r], head_dim values
  const size_t* out_offset;
  SoftmaxState* states = nullptr;  // row r at out_offset[r] / head_dim; null if all blocks are here
  bool resumes = false;      // or else begins; blocks before these were whole spans
  bool pauses = false;       // or else ends
};

struct AttendScratch {
  float* scores;    // [kAttendRows][kSpan]
  uint16_t* probs;  // [kAttendRows][kSpan]
  float* acc;       // [kAttendRows][head_pad]
  float* span;      // [kAttendRows][head_pad]
  uint16_t* wide;   // int8 only: [kSpanBlocks + 1][kKvBlock * head_pad], V of a span and one block of K
};

constexpr int kRaceGroup = 64;  // tokens whose noise is made together
constexpr size_t kMaxVocab = size_t(1) << 20;  // so that sums of weights are exact

// One row of logits to choose a token from; src/tokenmill/kernels/sampling_twin.py describes the fields.
struct SampleTask {
  const float* logits;
  int vocab;
  uint64_t seed;
  uint32_t position;
  float inverse_temperature;  // 0: greedy
  int top_k;                  // 0: no limit
  double top_p;
  float farthest;             // largest distance from the most likely token, after temperature
  bool edited;                // any of the following
  float repetition, presence, frequency;
  const int32_t* tokens;      // [num_tokens], those of the prompt first
  int num_tokens, num_prompt;
  const int32_t* bias_ids;
  const float* bias_values;
  int num_biases;
  const int32_t* banned;
  int num_banned;
  const uint32_t* mask;       // [ceil(vocab / 32)] bits of allowed tokens, or null
};

// In whole groups of tokens, and the groups in sixteens.
struct SampleScratch {
  float *peaks, *dist, *least, *bound;  // [groups]
  uint32_t* owner;                      // [groups]
  float *logits, *weights, *near_distance, *near_weight;  // [vocab]
  int32_t* near_index;                  // [vocab]
  int32_t* counts;                      // [vocab], zero before and after
};

struct Kernels {
  const char* name;
  void (*begin_thread)();
  void (*end_thread)();
  // Pairs of output tiles [pair0, pair1), 32 columns each.
  void (*linear)(const LinearTask&, int pair0, int pair1);
  void (*shrink)(const ShrinkTask&);
  void (*norm)(const float* src, int d, const float* weight, float eps, float* tmp, Act&, int row, ActKind);
  void (*quantize)(const float* src, int d, Act&, int row, ActKind);
  // cos and sin may be null: rounds only.
  void (*rope)(const float* src, int head_dim, const float* cos, const float* sin, uint16_t* dst);
  bool (*put_kv)(const uint16_t* key, const float* value, int head_dim, int slot, uint16_t* k_page, uint16_t* v_page);
  void (*attend)(const AttendTask&, const AttendScratch&);
  // Experts [begin, end).
  void (*router_logits)(const RouterTask&, int begin, int end);
  void (*choose_experts)(float* row, int experts, int active, bool renormalise);
  void (*add_experts)(float* x, int d, const float* src, const float* weights, const int* experts, const int* pairs,
                      int count);
  double (*log_sum_exp)(const float* row, int n);
  int (*sample)(const SampleTask&, const SampleScratch&);
  void (*top_ids)(const float* row, int n, int num, int32_t* ids);
  // One pass over `bytes` of memory; returns something that depends on all of it.
  uint64_t (*read_pass)(const uint8_t* p, size_t bytes);
  // `iters` rounds of the fastest multiply-add; returns operations done (a multiply-add is two).
  double (*int8_ops)(int iters);
  double (*bf16_ops)(int iters);
};

const Kernels* kernels_portable();
#if defined(__x86_64__)
const Kernels* kernels_avx2();
const Kernels* kernels_avxvnni();
const Kernels* kernels_avx512();
const Kernels* kernels_amx();
#elif defined(__aarch64__)
const Kernels* kernels_neon();
#endif

// Best first: names of the instruction sets this processor and kernel can run.
int detect_isas(const char** names);
const Kernels* find_kernels(const char* name);  // null if unknown or not available here

}  // namespace mill
