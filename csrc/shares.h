// Small arithmetic that the parts of the executor share.
#pragma once
#include <cstdint>

#include "mill.h"

namespace mill {

inline int round_up(int x, int to) { return (x + to - 1) / to * to; }

// Lines of 64 bytes that hold the inputs of a linear.
inline int lines_of(int inputs, ActKind act) {
  const int line = act == ActKind::bf16 ? 32 : 64;
  return round_up(inputs, line) / line;
}

inline ActKind act_of(LinearKind kind) {
  if (kind == LinearKind::i8c) return ActKind::int8;
  return kind == LinearKind::bf16 ? ActKind::bf16 : ActKind::int8_groups;
}

// The part of [0, total) that belongs to a thread.
struct Range { int begin, end; };
inline Range part(int total, int thread, int threads) {
  return {int(int64_t(total) * thread / threads), int(int64_t(total) * (thread + 1) / threads)};
}

}  // namespace mill
