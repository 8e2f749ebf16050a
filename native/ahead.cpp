#include "ahead.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <system_error>

#include "threads.h"

namespace pronghorn {

namespace {

constexpr i64 kChunk = 1 << 20;

std::uint64_t mix(std::uint64_t h, std::uint64_t v) {
  h = (h ^ v) * 0x9e3779b97f4a7c15;
  return h ^ h >> 29;
}

std::uint64_t sum_of_chunk(const std::uint8_t* data, i64 size) {
  std::uint64_t lanes[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  i64 i = 0;
  for (; i + 64 <= size; i += 64)
    for (int k = 0; k < 8; k++) {
      std::uint64_t v;
      std::memcpy(&v, data + i + 8 * k, 8);
      lanes[k] = mix(lanes[k], v);
    }
  std::uint64_t h = static_cast<std::uint64_t>(size);
  for (const std::uint64_t lane : lanes) h = mix(h, lane);
  for (; i < size; i++) h = mix(h, data[i]);
  return h;
}

// A page that is read brings those around it into this process's tables, 64 KB of them in Linux, if they are in memory.
// (MADV_POPULATE_READ takes half as long again, and keeps the interpreter from mapping memory of its own meanwhile.)
void touch(const std::uint8_t* data, i64 size) {
  for (i64 i = 0; i < size; i += 1 << 16) static_cast<void>(*static_cast<const volatile std::uint8_t*>(data + i));
}

}  // namespace

std::uint64_t checksum(const std::uint8_t* data, i64 size) {
  std::uint64_t h = static_cast<std::uint64_t>(size);
  for (i64 at = 0; at < size; at += kChunk) h = mix(h, sum_of_chunk(data + at, std::min(kChunk, size - at)));
  return h;
}

ReadAhead::ReadAhead(const std::uint8_t* data, i64 size, bool sums, int threads)
    : data_(data), size_(size), forks_(forks_so_far()), sums_(sums ? static_cast<size_t>(div_up(size, kChunk)) : 0) {
  const SignalsBlocked blocked;
  try {
    while (static_cast<int>(threads_.size()) < threads) threads_.emplace_back([this] { work(); });
  } catch (const std::system_error&) {  // the system gives no more: then finish() reads what they do not
  }
}

ReadAhead::~ReadAhead() {
  next_ = div_up(size_, kChunk);
  if (forks_so_far() != forks_)
    new std::vector<std::thread>(std::move(threads_));  // they never were in this process
  else
    for (std::thread& t : threads_) t.join();
}

std::uint64_t ReadAhead::finish() {
  if (forks_so_far() != forks_) return checksum(data_, size_);
  work();
  for (std::thread& t : threads_) t.join();
  threads_.clear();
  std::uint64_t h = static_cast<std::uint64_t>(size_);
  for (const std::uint64_t sum : sums_) h = mix(h, sum);
  return h;
}

void ReadAhead::work() {
  for (;;) {
    const i64 chunk = next_.fetch_add(1, std::memory_order_relaxed);
    const i64 at = chunk * kChunk;
    if (at >= size_) return;
    const i64 size = std::min(kChunk, size_ - at);
    if (sums_.empty())
      touch(data_ + at, size);
    else
      sums_[static_cast<size_t>(chunk)] = sum_of_chunk(data_ + at, size);
  }
}

}  // namespace pronghorn
