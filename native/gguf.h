// GGUF's block formats: what their bytes mean.
#pragma once

#include <string_view>

#include "kernels.h"

namespace pronghorn {

struct BlockType {
  std::string_view name;  // lower case, as weights/gguf.py names it
  i64 values;             // in a block
  i64 bytes;              // of a block
  void (*dequantize)(const std::uint8_t* src, i64 n_blocks, float* dst);
};

// The type of this name, or null.
const BlockType* block_type(std::string_view name);

// The position after the string (u64 length, bytes) at `at`, or -1 if it goes past `size`.
i64 gguf_string_end(const std::uint8_t* data, i64 size, i64 at);

}  // namespace pronghorn
