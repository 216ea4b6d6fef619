// What this machine can do: read bandwidth for a working set, and multiply-add rates.
#pragma once
#include "threads.h"
#include "mill.h"

namespace mill {

// Bytes per second that `pool` reads from a buffer of `bytes`, each thread its own part, for `seconds`.
double read_bandwidth(const Kernels&, Pool&, size_t bytes, double seconds);
// Operations per second (a multiply-add is two) on all threads.
double op_rate(double (*ops)(int), Pool&, double seconds);

}  // namespace mill
