// Who attends to what in a step: tiles of rows, and the blocks that all rows of a tile list. Blocks with which several
// sequences begin are taken by rows of all of them together (attend.h says why no bit is different).
#pragma once
#include <cstdint>
#include <vector>

namespace mill {

struct Batch {
  int rows, sequences, blocks, outs;
  const int32_t *tokens, *positions, *kv_slots, *row_starts, *block_starts, *block_list, *out_rows;
  const int32_t* adapters = nullptr;  // [sequences] slot or -1; null: none at all
};

// Up to kAttendRows pairs of a row and a query head, from pair `first` of the order on, against `blocks` entries of the
// block list from `block` on. What resumes was begun by a tile that pauses.
struct RowTile { int first, rows, block, blocks; bool resumes, pauses; };

class AttentionTiles {
 public:
  // `group` query heads share a KV head.
  void plan(const Batch&, int group);
  // Rows of the batch; those of sequences that begin with the same blocks beside each other.
  const std::vector<int32_t>& order() const { return order_; }
  // Blocks that several sequences have, and then those that each has of its own. The longest work first, so that
  // threads end together.
  const std::vector<RowTile>& shared() const { return shared_; }
  const std::vector<RowTile>& own() const { return own_; }
  // Entries of the block list that were taken together with those of another sequence.
  int num_shared_blocks() const;

 private:
  void share(const Batch&);
  void add(const RowTile& rows, std::vector<RowTile>& tiles) const;

  int group_ = 1;
  std::vector<int32_t> order_;
  std::vector<int> sequences_, num_shared_;  // in order; [sequence] leading blocks that are taken with others
  std::vector<RowTile> shared_, own_;
};

}  // namespace mill
