// A mapped file on its way into memory, beside all else that a start has to do.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "kernels.h"

namespace pronghorn {

// A 64-bit checksum of bytes: of each megabyte alone, then of these, so that threads can share the work.
std::uint64_t checksum(const std::uint8_t* data, i64 size);

// Threads of its own go through bytes, megabyte by megabyte: their pages are mapped, and, where asked for, summed up.
class ReadAhead {
 public:
  ReadAhead(const std::uint8_t* data, i64 size, bool sums, int threads);
  ~ReadAhead();  // what is not read by then stays unread
  ReadAhead(const ReadAhead&) = delete;
  ReadAhead& operator=(const ReadAhead&) = delete;

  // The same as checksum(data, size) where sums were asked for; the calling thread takes its part of what is left.
  std::uint64_t finish();

 private:
  void work();

  const std::uint8_t* const data_;
  const i64 size_;
  const std::uint32_t forks_;
  std::vector<std::uint64_t> sums_;  // of each chunk; empty where none are asked for
  std::atomic<i64> next_{0};         // the chunk that nobody has taken yet
  std::vector<std::thread> threads_;
};

}  // namespace pronghorn
