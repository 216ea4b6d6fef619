#include "expert_cache.h"

#include <algorithm>
#include <cerrno>
#include <new>

namespace mill {
namespace {

constexpr size_t kBlock = MappedFiles::kBlock;
constexpr size_t kPiece = size_t(4) << 20;  // as fast as whole matrices, and threads end together

size_t blocks_up(size_t bytes) { return (bytes + kBlock - 1) / kBlock * kBlock; }

}  // namespace

int ExpertCache::add(const Spans& spans) {
  Unit unit{};
  size_t pieces = 0;
  for (int i = 0; i < kSpans; i++) {
    Part& part = unit.parts[i];
    part = {spans[i], files_.find(spans[i].at, spans[i].bytes), unit.room};
    if (part.place.file < 0) continue;
    unit.bytes += part.span.bytes;
    unit.room += blocks_up(part.span.bytes) + kBlock;
    pieces += (part.span.bytes + kBlock) / kPiece + 1;
  }
  const int number = int(units_.size());
  unit.place = others_.insert(others_.end(), number);
  units_.push_back(std::move(unit));
  missing_.reserve(units_.size());
  reads_.reserve(reads_.capacity() + pieces);
  return number;
}

const void* ExpertCache::address(int unit, int span) const {
  const Part& part = units_[unit].parts[span];
  if (part.place.file < 0) return part.span.at;
  return units_[unit].buffer.get() + part.at + part.place.offset % kBlock;
}

int ExpertCache::admit(const std::vector<int>& units, int begin) {
  began_ = std::chrono::steady_clock::now();
  wave_++, missing_.clear(), reads_.clear();
  size_t wanted = 0;
  int end = begin;
  for (; end < int(units.size()); end++) {
    Unit& unit = units_[units[end]];
    if (end > begin && wanted + unit.bytes > budget_) break;
    wanted += unit.bytes;
    unit.wave = wave_;
    unit.held ? stats_.hits++ : stats_.misses++;
    if (unit.held) held_.splice(held_.begin(), held_, unit.place);
    else missing_.push_back(units[end]);
  }
  for (const int number : missing_) {
    Unit& unit = units_[number];
    const bool has_room = make_room(unit);
    held_.splice(held_.begin(), others_, unit.place);
    unit.held = true;
    stats_.bytes_held += unit.bytes;
    if (has_room) plan(unit);
  }
  next_.store(0, std::memory_order_relaxed), left_.store(reads_.size(), std::memory_order_relaxed);
  return end;
}

// Takes over the buffer of what goes, so that in the long run no memory is asked for or given back.
bool ExpertCache::make_room(Unit& unit) {
  while (stats_.bytes_held + unit.bytes > budget_) {
    Unit* old = oldest(unit.room);
    if (!old) break;
    if (old->room == unit.room) std::swap(unit.buffer, old->buffer);
    drop(*old);
  }
  if (unit.buffer.get() || !unit.room) return true;
  try {
    unit.buffer = Array<uint8_t>(unit.room);
  } catch (const std::bad_alloc&) {
    reads_.push_back({unit.parts[0].place.file, 0, 0, 0, nullptr, ENOMEM});
    failed_.store(&reads_.back(), std::memory_order_relaxed);
    return false;
  }
  return true;
}

// The unit not used for longest, of those of the same size if there are any, that is not wanted now.
ExpertCache::Unit* ExpertCache::oldest(size_t room) {
  Unit* any = nullptr;
  for (auto number = held_.rbegin(); number != held_.rend(); ++number) {
    Unit& unit = units_[*number];
    if (unit.wave == wave_ || !unit.bytes) continue;
    if (unit.room == room) return &unit;
    if (!any) any = &unit;
  }
  return any;
}

void ExpertCache::drop(Unit& unit) {
  unit.buffer = Array<uint8_t>();
  others_.splice(others_.begin(), held_, unit.place);
  unit.held = false;
  stats_.bytes_held -= unit.bytes;
}

void ExpertCache::plan(Unit& unit) {
  stats_.bytes_read += unit.bytes;
  for (const Part& part : unit.parts) {
    if (part.place.file < 0) continue;
    const size_t skipped = part.place.offset % kBlock, wanted = skipped + part.span.bytes, bytes = blocks_up(wanted);
    for (size_t i = 0; i < bytes; i += kPiece)
      reads_.push_back({part.place.file, part.place.offset - skipped + i, std::min(kPiece, bytes - i),
                        std::min(kPiece, wanted - i), unit.buffer.get() + part.at + i, 0});
  }
}

void ExpertCache::read() {
  for (size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < reads_.size();) {
    Read& own = reads_[i];
    if (own.to) own.error = files_.read(own.file, own.offset, own.bytes, own.wanted, own.to);
    if (own.error) failed_.store(&own, std::memory_order_release);
    if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1)
      stats_.read_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - began_).count();
  }
}

void ExpertCache::check() {
  const Read* failed = failed_.exchange(nullptr);
  if (!failed) return;
  for (const int number : missing_) drop(units_[number]);
  throw ReadError(files_.describe(failed->file, failed->error));
}

}  // namespace mill
