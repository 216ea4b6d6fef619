#include "expert_cache.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

namespace mill {
namespace {

// Older C libraries do not name them.
constexpr int kPageOut = 21, kPopulateRead = 22;

// Whole pages: all that the span touches, or only those that belong to nothing else.
struct Pages { char* at; size_t bytes; };
Pages pages(const ExpertCache::Span& span, bool inner) {
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), grow = inner ? page - 1 : 0;
  const uintptr_t from = uintptr_t(span.at), to = from + span.bytes;
  const uintptr_t begin = (from + grow) & ~(page - 1), end = (to + (page - 1 - grow)) & ~(page - 1);
  return {reinterpret_cast<char*>(begin), end > begin ? end - begin : 0};
}

// In pieces that a system reads whole, whatever its limit. Left to faults it would read on into what comes after
// the span, which nobody would give back.
void read_ahead(const ExpertCache::Span& span) {
  constexpr size_t piece = size_t(128) << 10;
  const Pages p = pages(span, false);
  for (size_t i = 0; i < p.bytes; i += piece) madvise(p.at + i, std::min(piece, p.bytes - i), MADV_WILLNEED);
}

// Waits for the pages; on systems without the call they come as they are touched.
void populate(const ExpertCache::Span& span) {
  const Pages p = pages(span, false);
  if (!p.bytes || madvise(p.at, p.bytes, kPopulateRead) == 0) return;
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  for (size_t i = 0; i < span.bytes; i += page) (void)static_cast<const volatile char*>(span.at)[i];
}

}  // namespace

int ExpertCache::add(std::vector<Span> spans) {
  Unit unit{std::move(spans), 0};
  for (const Span& span : unit.spans) unit.bytes += span.bytes;
  const int number = int(units_.size());
  unit.place = others_.insert(others_.end(), number);
  units_.push_back(std::move(unit));
  read_.reserve(units_.size());
  return number;
}

int ExpertCache::admit(const std::vector<int>& units, int begin) {
  const auto began = std::chrono::steady_clock::now();
  size_t wanted = 0;
  int end = begin;
  for (; end < int(units.size()); end++) {
    Unit& unit = units_[units[end]];
    if (end > begin && wanted + unit.bytes > budget_) break;
    wanted += unit.bytes;
    unit.held ? stats_.hits++ : stats_.misses++;
    if (unit.held) held_.splice(held_.begin(), held_, unit.place);
  }
  read_.clear();
  for (int i = begin; i < end; i++)
    if (!units_[units[i]].held) read_.push_back(units[i]);
  // Room is made while the disk reads. What is wanted now fits together, and is the last that would go.
  for (const int number : read_) {
    Unit& unit = units_[number];
    for (const Span& span : unit.spans) read_ahead(span);
    while (!held_.empty() && stats_.bytes_held + unit.bytes > budget_) drop(units_[held_.back()]);
    held_.splice(held_.begin(), others_, unit.place);
    unit.held = true;
    stats_.bytes_held += unit.bytes, stats_.bytes_read += unit.bytes;
  }
  for (const int number : read_)
    for (const Span& span : units_[number].spans) populate(span);
  stats_.read_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  return end;
}

// Never loses what memory holds: pages of a file leave memory if nobody else has mapped them, others stay.
void ExpertCache::drop(Unit& unit) {
  for (const Span& span : unit.spans) {
    const Pages p = pages(span, true);
    if (p.bytes) madvise(p.at, p.bytes, kPageOut);
  }
  others_.splice(others_.begin(), held_, unit.place);
  unit.held = false;
  stats_.bytes_held -= unit.bytes;
}

}  // namespace mill
