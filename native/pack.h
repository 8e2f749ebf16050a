// Weights from the form of a file into the form that kernels read.
#pragma once

#include <string_view>

#include "kernels.h"
#include "threads.h"

namespace pronghorn {

// A matrix [n_out, n_in] as a file has it; [n_in, n_out] where `transposed`. A vector is one row.
struct Source {
  const std::uint8_t* data;
  std::string_view dtype;  // f32, f16, bf16, f64, or a block type of gguf.h
  i64 n_out, n_in;
  bool transposed;
};

// The bytes of such a source, or -1 for an unknown dtype or rows that are no whole number of blocks.
i64 source_size(const Source& source);

// Whether the source's own integers and scales are taken over as they are.
bool packs_exactly(const Source& source, Format format, i64 group, bool symmetric);

// Writes the target's bytes. A dense target keeps the source's order; int8 and int4 are packed (packed_size bytes):
//   int8: scale = max |w| / 127 of each group;  int4 symmetric: scale = w / -8 of the value furthest from 0;
//   int4: minimum and (maximum - minimum) / 15 of each group. Scales are rounded to f16 first, then integers are
//   rounded with what was stored; group 0 keeps f32 scales.
// Throws std::invalid_argument naming what is wrong (values that are not finite among them).
void pack(const Source& source, const Matrix& target, std::uint8_t* data, Pool& pool);

// CRC-32C (Castagnoli, RFC 3720), eight bytes at a time: what TensorFlow's checkpoints carry.
std::uint32_t crc32c(const std::uint8_t* data, i64 size);

}  // namespace pronghorn
