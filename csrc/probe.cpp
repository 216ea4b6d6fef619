#include "probe.h"

#include <atomic>
#include <chrono>
#include <vector>

namespace mill {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

double read_bandwidth(const Kernels& kernels, Pool& pool, size_t bytes, double seconds) {
  const size_t each = bytes / pool.size() / 4096 * 4096;
  std::vector<uint8_t> memory(each * pool.size() + 64, 1);
  // On a cache line: a load that crosses two counts twice.
  const uint8_t* start_of_all = memory.data() + (64 - uintptr_t(memory.data()) % 64) % 64;
  std::vector<double> rates(pool.size());
  std::atomic<uint64_t> sink{0};
  pool.run([&](int t) {
    const uint8_t* own = start_of_all + t * each;
    sink ^= kernels.read_pass(own, each);
    pool.barrier();
    const double start = now();
    double end = start;
    size_t passes = 0;
    while (end - start < seconds) {
      sink ^= kernels.read_pass(own, each);
      passes++;
      end = now();
    }
    rates[t] = double(passes) * double(each) / (end - start);
  });
  double total = 0;
  for (double r : rates) total += r;
  return total;
}

double op_rate(double (*ops)(int), Pool& pool, double seconds) {
  std::vector<double> rates(pool.size());
  pool.run([&](int t) {
    ops(1000);
    pool.barrier();
    const double start = now();
    double done = 0, end = start;
    while (end - start < seconds) {
      done += ops(20000);
      end = now();
    }
    rates[t] = done / (end - start);
  });
  double total = 0;
  for (double r : rates) total += r;
  return total;
}

}  // namespace mill
