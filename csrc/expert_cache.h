// Which matrices of experts are in memory. The weights are a mapped file; within a budget they are not used
// through the mapping, which the system would read page by page and give back late, but read into memory of the
// cache, past the system's own, and the ones not used for longest make room. So a model larger than memory runs at
// the speed of the disk, and takes what the budget says.
#pragma once
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <list>
#include <vector>

#include "array.h"
#include "mapped_files.h"

namespace mill {

struct ExpertStats {
  uint64_t hits = 0, misses = 0, bytes_read = 0, bytes_held = 0;
  double read_seconds = 0;
};

class ExpertCache {
 public:
  struct Span { const void* at; size_t bytes; };
  static constexpr int kSpans = 3;
  using Spans = Span[kSpans];

  // A budget of 0 bytes: everything stays where it is, and nothing is counted. A unit that is larger than the
  // budget is alone in memory. To the bytes of a unit come the rest of its first and last blocks in the file.
  explicit ExpertCache(size_t budget) : budget_(budget) {}

  bool is_bounded() const { return budget_ > 0; }
  // Before units are added: the mappings they are in are looked up once.
  void look() { files_.look(); }
  // A new unit; returns its number. Spans that no file backs stay where they are, and count as no bytes.
  int add(const Spans&);
  bool holds(int unit) const { return units_[unit].held; }
  // Where a span of a unit is now, if it is held.
  const void* address(int unit, int span) const;

  // By one thread: makes room for units [begin, n) of `units`, as many from `begin` on as fit in the budget
  // together, one at the least; returns the first that was left out.
  int admit(const std::vector<int>& units, int begin);
  // By any number of threads after that: they share the reading, which is over when all have returned.
  void read();
  // Until `check`, which throws a ReadError; the units admitted last are then out of memory.
  bool failed() const { return failed_.load(std::memory_order_relaxed) != nullptr; }
  void check();
  const ExpertStats& stats() const { return stats_; }

 private:
  struct Part { Span span; MappedFiles::Place place; size_t at; };  // its blocks begin at `at` in the buffer
  struct Unit {
    Part parts[kSpans];
    size_t bytes = 0, room = 0;  // of the spans; of the buffer, which does not depend on where blocks begin
    Array<uint8_t> buffer{};
    bool held = false;
    uint64_t wave = 0;  // the last that it was wanted in
    std::list<int>::iterator place{};
  };
  struct Read { int file; uint64_t offset; size_t bytes, wanted; uint8_t* to; int error; };

  bool make_room(Unit&);
  Unit* oldest(size_t room);
  void drop(Unit&);
  void plan(Unit&);

  const size_t budget_;
  MappedFiles files_;
  std::vector<Unit> units_;
  std::list<int> held_, others_;  // last used first; every unit is in one of them, so that nothing is allocated
  ExpertStats stats_;

  // Of the current wave.
  uint64_t wave_ = 0;
  std::vector<int> missing_;
  std::vector<Read> reads_;
  std::atomic<size_t> next_{0}, left_{0};
  std::atomic<const Read*> failed_{nullptr};
  std::chrono::steady_clock::time_point began_{};
};

}  // namespace mill
