// A pool of threads that run one function together and meet at barriers.
#pragma once

#include <signal.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels.h"

namespace pronghorn {

// Forks that lie between this process and the first one: what was made before a fork has no threads after it.
std::uint32_t forks_so_far();

// While it lives, threads that are started take no signals: these are for the program's own threads.
class SignalsBlocked {
 public:
  SignalsBlocked();
  ~SignalsBlocked();
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

// Waits without sleeping at first (a step's parts are microseconds apart), then lets others run.
class Spin {
 public:
  void pause();

 private:
  int turns_ = 0;
};

class Pool {
 public:
  // n threads in all, of which the caller of run() is one.
  explicit Pool(int n);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return size_; }

  // Calls job(context, thread) once on each thread and returns when all are done; one caller at a time. The job must
  // not throw. Throws std::runtime_error in a child of fork(), where the threads are missing.
  void run(void (*job)(void*, int), void* context);

  template <typename Function>
  void run(Function&& f) {
    run([](void* context, int thread) { (*static_cast<std::remove_reference_t<Function>*>(context))(thread); }, &f);
  }

  // Within a job: returns when all threads have come here. `thread` is the caller's own number.
  void barrier(int thread);

  // A thread's own kScratch bytes, 64-byte aligned.
  void* scratch(int thread) const { return scratch_ + thread * kScratch; }

 private:
  void work(int thread);
  void stop();
  void wait_for_job(std::uint32_t seen);

  const int size_;
  const std::uint32_t forks_;
  std::uint8_t* scratch_;
  std::mutex one_caller_;
  std::vector<std::thread> threads_;
  void (*job_)(void*, int) = nullptr;
  void* context_ = nullptr;
  bool stop_ = false;
  alignas(64) std::atomic<std::uint32_t> started_{0};  // jobs started so far; what workers wait for
  alignas(64) std::atomic<int> running_{0};            // workers that have not finished the job

  struct alignas(64) Count {
    std::atomic<std::uint32_t> barriers{0};
  };
  std::unique_ptr<Count[]> reached_;  // by each thread; written by it alone, and read by the others
};

// The part of `n` items, in units of `unit`, that falls to one of `size` threads.
struct Share {
  i64 begin, end;

  Share(i64 n, i64 unit, int thread, int size) {
    const i64 units = div_up(n, unit);
    begin = units * thread / size * unit;
    end = units * (thread + 1) / size * unit;
    if (end > n) end = n;
    if (begin > end) begin = end;
  }
};

}  // namespace pronghorn
