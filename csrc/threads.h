// A few persistent threads that meet at barriers inside one step. Workers spin for tens of microseconds
// after a step, then sleep, so that an idle engine costs nothing.
#pragma once
#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace mill {

class Pool {
 public:
  explicit Pool(int num_threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return num_threads_; }
  // Calls job(thread) on every thread, the caller being thread 0, and returns when all are done.
  void run(const std::function<void(int)>& job);
  // Inside a job: returns when every thread has come here.
  void barrier();

 private:
  void work(int thread);
  void end_workers();

  const int num_threads_;
  const int process_;  // a forked child has no workers
  const std::function<void(int)>* job_ = nullptr;
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int> running_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace mill
