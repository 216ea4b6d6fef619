#include "attention.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "mill.h"

namespace mill {

// How many leading blocks two sequences have in common, at most `count`. A block must be full: its content is the same.
static int common_blocks(const Batch& b, int x, int y, int count) {
  const int32_t *p = b.block_list + size_t(b.block_starts[x]) * 3, *q = b.block_list + size_t(b.block_starts[y]) * 3;
  count = std::min({count, b.block_starts[x + 1] - b.block_starts[x], b.block_starts[y + 1] - b.block_starts[y]});
  int same = 0;
  while (same < count && p[same * 3 + 2] == kKvBlock && !std::memcmp(p + same * 3, q + same * 3, 3 * sizeof(int32_t)))
    same++;
  return same;
}

static int first_block(const Batch& b, int sequence) {
  const int at = b.block_starts[sequence];
  return at < b.block_starts[sequence + 1] ? b.block_list[size_t(at) * 3] : -1;
}

// Orders the sequences so that those which begin with the same blocks are neighbours. They take what all of them
// have in common, in whole spans, together: tiles that pause.
void AttentionTiles::share(const Batch& b) {
  sequences_.resize(b.sequences), num_shared_.assign(b.sequences, 0), order_.clear();
  std::iota(sequences_.begin(), sequences_.end(), 0);
  std::stable_sort(sequences_.begin(), sequences_.end(),
                   [&](int x, int y) { return first_block(b, x) < first_block(b, y); });
  for (int i = 0, stop; i < b.sequences; i = stop) {
    const int head = sequences_[i], first = int(order_.size());
    int blocks = b.block_starts[head + 1] - b.block_starts[head];
    for (stop = i; stop < b.sequences && first_block(b, sequences_[stop]) == first_block(b, head); stop++) {
      const int s = sequences_[stop];
      blocks = common_blocks(b, head, s, blocks);
      for (int r = b.row_starts[s]; r < b.row_starts[s + 1]; r++) order_.push_back(r);
    }
    blocks = stop - i < 2 ? 0 : blocks / kSpanBlocks * kSpanBlocks;
    if (!blocks) continue;
    for (int j = i; j < stop; j++) num_shared_[sequences_[j]] = blocks;
    add({first, int(order_.size()) - first, b.block_starts[head], blocks, false, true}, shared_);
  }
}

// Adds the tiles of something that is given in rows.
void AttentionTiles::add(const RowTile& rows, std::vector<RowTile>& tiles) const {
  const int pairs = rows.rows * group_;
  for (int r = 0; r < pairs; r += kAttendRows) {
    tiles.push_back(rows);
    tiles.back().first = rows.first * group_ + r, tiles.back().rows = std::min(kAttendRows, pairs - r);
  }
}

void AttentionTiles::plan(const Batch& b, int group) {
  group_ = group, shared_.clear(), own_.clear();
  share(b);
  int first = 0;
  for (int s : sequences_) {
    const int rows = b.row_starts[s + 1] - b.row_starts[s], block = b.block_starts[s] + num_shared_[s];
    add({first, rows, block, b.block_starts[s + 1] - block, num_shared_[s] > 0, false}, own_);
    first += rows;
  }
  const auto longer = [](const RowTile& x, const RowTile& y) { return x.blocks > y.blocks; };
  std::stable_sort(shared_.begin(), shared_.end(), longer);
  std::stable_sort(own_.begin(), own_.end(), longer);
}

int AttentionTiles::num_shared_blocks() const { return std::accumulate(num_shared_.begin(), num_shared_.end(), 0); }

}  // namespace mill
