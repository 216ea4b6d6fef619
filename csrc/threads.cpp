#include "threads.h"

#include <unistd.h>

#include <chrono>
#include <stdexcept>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mill {
namespace {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins about 50 microseconds; true if `ready` became true on the way.
template <class Ready> bool spin(Ready ready) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
  do {
    for (int i = 0; i < 64; i++) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < until);
  return ready();
}

}  // namespace

Pool::Pool(int num_threads) : num_threads_(num_threads), process_(getpid()) {
  if (num_threads < 1) throw std::invalid_argument("a pool needs a thread");
  try {
    for (int t = 1; t < num_threads_; t++) workers_.emplace_back([this, t] { work(t); });
  } catch (...) {
    end_workers();
    throw;
  }
}

Pool::~Pool() {
  if (process_ == getpid()) {
    end_workers();
  } else {
    for (auto& w : workers_) w.detach();
  }
}

void Pool::end_workers() {
  stop_ = true;
  generation_.fetch_add(1);
  generation_.notify_all();
  for (auto& w : workers_) w.join();
}

void Pool::work(int thread) {
  uint32_t seen = 0;
  while (true) {
    if (!spin([&] { return generation_.load(std::memory_order_acquire) != seen; })) generation_.wait(seen);
    const uint32_t now = generation_.load(std::memory_order_acquire);
    if (now == seen) continue;
    seen = now;
    if (stop_) return;
    (*job_)(thread);
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_one();
  }
}

void Pool::run(const std::function<void(int)>& job) {
  if (process_ != getpid()) throw std::runtime_error("this process was forked from the one that made the executor");
  job_ = &job;
  running_.store(num_threads_ - 1, std::memory_order_relaxed);
  if (num_threads_ > 1) {
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
  }
  job(0);
  while (!spin([&] { return running_.load(std::memory_order_acquire) == 0; })) {
    const int left = running_.load(std::memory_order_acquire);
    if (left) running_.wait(left);
  }
}

void Pool::barrier() {
  if (num_threads_ == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    phase_.notify_all();
    return;
  }
  if (!spin([&] { return phase_.load(std::memory_order_acquire) != phase; })) phase_.wait(phase);
}

}  // namespace mill
