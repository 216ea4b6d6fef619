// Which matrices of experts are in memory. The weights are a mapped file, which the system reads page by page as
// it is touched; here whole matrices are read at once, before they are needed, and the ones not used for longest
// are given back, so that a model larger than memory runs at the speed of the disk, within a budget.
#pragma once
#include <cstddef>
#include <cstdint>
#include <list>
#include <vector>

namespace mill {

struct ExpertStats {
  uint64_t hits = 0, misses = 0, bytes_read = 0, bytes_held = 0;
  double read_seconds = 0;
};

class ExpertCache {
 public:
  struct Span { const void* at; size_t bytes; };

  // A budget of 0 bytes: everything stays where the system puts it, and nothing is counted. For the moment that it
  // is read in, one unit may be beyond the budget.
  explicit ExpertCache(size_t budget) : budget_(budget) {}

  bool is_bounded() const { return budget_ > 0; }
  // A new unit, of the memory in `spans`; returns its number.
  int add(std::vector<Span> spans);
  bool holds(int unit) const { return units_[unit].held; }
  // Brings units [begin, n) of `units` into memory, as many from `begin` on as fit in the budget together, one at
  // the least; returns the first that was left out.
  int admit(const std::vector<int>& units, int begin);
  const ExpertStats& stats() const { return stats_; }

 private:
  struct Unit {
    std::vector<Span> spans;
    size_t bytes;
    bool held = false;
    std::list<int>::iterator place{};
  };

  void drop(Unit&);

  const size_t budget_;
  std::vector<Unit> units_;
  std::list<int> held_, others_;  // last used first; every unit is in one of them, so that nothing is allocated
  std::vector<int> read_;        // what the call of `admit` reads
  ExpertStats stats_;
};

}  // namespace mill
