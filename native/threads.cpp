#include "threads.h"

#include <pthread.h>
#include <sys/mman.h>

#include <new>
#include <stdexcept>

namespace pronghorn {

namespace {

std::atomic<std::uint32_t> forks{0};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

std::uint32_t forks_so_far() { return forks.load(std::memory_order_relaxed); }

SignalsBlocked::SignalsBlocked() {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before_);
}

SignalsBlocked::~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

void Spin::pause() {
  // Some microseconds of waiting; past that, whom we wait for may need this very processor. (Spinning for 2,000 turns
  // made a token ten times slower where another process had one of two processors.)
  if (++turns_ < 200)
    relax();
  else
    std::this_thread::yield();
}

Pool::Pool(int n) : size_(n), forks_(forks_so_far()) {
  if (n < 1) throw std::invalid_argument("a pool has at least one thread");
  reached_ = std::make_unique<Count[]>(static_cast<size_t>(n));
  void* memory = mmap(nullptr, static_cast<size_t>(n * kScratch), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  scratch_ = static_cast<std::uint8_t*>(memory);
  const SignalsBlocked blocked;
  try {
    for (int i = 1; i < n; i++) threads_.emplace_back([this, i] { work(i); });
  } catch (...) {
    stop();
    throw;
  }
}

Pool::~Pool() {
  if (forks_so_far() != forks_) {
    new std::vector<std::thread>(std::move(threads_));  // they never were in this process: neither joined nor detached
    return;
  }
  stop();
}

void Pool::stop() {
  stop_ = true;
  started_.fetch_add(1, std::memory_order_release);
  started_.notify_all();
  for (std::thread& t : threads_) t.join();
  munmap(scratch_, static_cast<size_t>(size_ * kScratch));
}

void Pool::run(void (*job)(void*, int), void* context) {
  if (forks_so_far() != forks_)
    throw std::runtime_error("this process was forked after the model was loaded: load it in the child");
  const std::lock_guard lock(one_caller_);
  job_ = job;
  context_ = context;
  running_.store(size_ - 1, std::memory_order_relaxed);
  if (size_ > 1) {
    started_.fetch_add(1, std::memory_order_release);
    started_.notify_all();
  }
  {
    const FloatEnvironment environment;
    job(context, 0);
  }
  Spin spin;
  while (running_.load(std::memory_order_acquire) != 0) spin.pause();
}

void Pool::barrier(int thread) {
  const std::uint32_t now = reached_[thread].barriers.load(std::memory_order_relaxed) + 1;
  reached_[thread].barriers.store(now, std::memory_order_release);
  for (int other = 0; other < size_; other++) {
    Spin spin;  // one that is already past the next barrier has been at this one
    while (static_cast<std::int32_t>(reached_[other].barriers.load(std::memory_order_acquire) - now) < 0) spin.pause();
  }
}

void Pool::wait_for_job(std::uint32_t seen) {
  Spin spin;
  for (int turn = 0; turn < 500; turn++) {  // the next step mostly comes within a tenth of a millisecond
    if (started_.load(std::memory_order_acquire) != seen) return;
    spin.pause();
  }
  started_.wait(seen, std::memory_order_acquire);
}

void Pool::work(int thread) {
  const FloatEnvironment environment;
  for (std::uint32_t seen = 0;; seen++) {
    wait_for_job(seen);
    if (stop_) return;
    job_(context_, thread);
    running_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace pronghorn
