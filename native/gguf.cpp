// GGUF's block formats, after the description in ggml's documentation (docs/gguf.md and the block structures).
//
// Every product and sum below is one float operation in the order that the format's own decoder has, so that the
// values are the same to the last bit.
#include "gguf.h"

#include "half.h"

namespace pronghorn {
namespace {

using u8 = std::uint8_t;
using u32 = std::uint32_t;

u32 load_u32(const u8* p) { return p[0] | p[1] << 8 | p[2] << 16 | u32{p[3]} << 24; }

float load_f16(const u8* p) { return f16_to_float(static_cast<std::uint16_t>(p[0] | p[1] << 8)); }

// 32 values: the low nibbles of 16 bytes, then the high ones. f16 scale (and minimum) before them.
void q4_0(const u8* src, i64 n_blocks, float* dst) {
  for (; n_blocks > 0; --n_blocks, src += 18, dst += 32) {
    const float d = load_f16(src);
    for (int i = 0; i < 16; ++i) {
      dst[i] = d * static_cast<float>((src[2 + i] & 15) - 8);
      dst[i + 16] = d * static_cast<float>((src[2 + i] >> 4) - 8);
    }
  }
}

void q4_1(const u8* src, i64 n_blocks, float* dst) {
  for (; n_blocks > 0; --n_blocks, src += 20, dst += 32) {
    const float d = load_f16(src), m = load_f16(src + 2);
    for (int i = 0; i < 16; ++i) {
      dst[i] = d * static_cast<float>(src[4 + i] & 15) + m;
      dst[i + 16] = d * static_cast<float>(src[4 + i] >> 4) + m;
    }
  }
}

// As above, with a fifth bit for each value in a word of 32.
void q5_0(const u8* src, i64 n_blocks, float* dst) {
  for (; n_blocks > 0; --n_blocks, src += 22, dst += 32) {
    const float d = load_f16(src);
    const u32 high = load_u32(src + 2);
    for (int i = 0; i < 16; ++i) {
      dst[i] = d * static_cast<float>(static_cast<int>((src[6 + i] & 15) | (high >> i & 1) << 4) - 16);
      dst[i + 16] = d * static_cast<float>(static_cast<int>((src[6 + i] >> 4) | (high >> (i + 16) & 1) << 4) - 16);
    }
  }
}

void q5_1(const u8* src, i64 n_blocks, float* dst) {
  for (; n_blocks > 0; --n_blocks, src += 24, dst += 32) {
    const float d = load_f16(src), m = load_f16(src + 2);
    const u32 high = load_u32(src + 4);
    for (int i = 0; i < 16; ++i) {
      dst[i] = d * static_cast<float>((src[8 + i] & 15) | (high >> i & 1) << 4) + m;
      dst[i + 16] = d * static_cast<float>((src[8 + i] >> 4) | (high >> (i + 16) & 1) << 4) + m;
    }
  }
}

void q8_0(const u8* src, i64 n_blocks, float* dst) {
  for (; n_blocks > 0; --n_blocks, src += 34, dst += 32) {
    const float d = load_f16(src);
    for (int i = 0; i < 32; ++i) dst[i] = d * static_cast<float>(static_cast<std::int8_t>(src[2 + i]));
  }
}

// The 6-bit scale and minimum of group j of 8, packed in 12 bytes: the low six bits of bytes 0..7 are those of
// groups 0..3; groups 4..7 have their low four bits in bytes 8..11 and their high two on top of bytes 0..7.
void k_scales(const u8* p, int j, float* scale, float* minimum) {
  const int s = j < 4 ? p[j] & 63 : (p[j + 4] & 15) | p[j - 4] >> 6 << 4;
  const int m = j < 4 ? p[j + 4] & 63 : p[j + 4] >> 4 | p[j] >> 6 << 4;
  *scale = static_cast<float>(s);
  *minimum = static_cast<float>(m);
}

// 256 values in 8 groups of 32: f16 d and dmin, 12 bytes of scales, (q5: 32 bytes of fifth bits,) 128 of nibbles.
// A run of 32 bytes holds group 2k in its low nibbles and 2k+1 in its high ones.
void q45_k(const u8* src, i64 n_blocks, float* dst, bool five) {
  for (; n_blocks > 0; --n_blocks, src += five ? 176 : 144) {
    const float d = load_f16(src), dmin = load_f16(src + 2);
    const u8* high = src + 16;
    const u8* low = five ? src + 48 : src + 16;
    for (int j = 0; j < 8; ++j, dst += 32) {
      float scale, minimum;
      k_scales(src + 4, j, &scale, &minimum);
      scale *= d;
      minimum *= dmin;
      for (int i = 0; i < 32; ++i) {
        int q = low[j / 2 * 32 + i] >> j % 2 * 4 & 15;
        if (five) q |= (high[i] >> j & 1) << 4;
        dst[i] = scale * static_cast<float>(q) - minimum;
      }
    }
  }
}

void q4_k(const u8* src, i64 n_blocks, float* dst) { q45_k(src, n_blocks, dst, false); }
void q5_k(const u8* src, i64 n_blocks, float* dst) { q45_k(src, n_blocks, dst, true); }

// 256 values in two halves of four runs of 32: 128 bytes of low nibbles, 64 of high pairs of bits, 16 int8 scales
// (one for 16 values), f16 d.
void q6_k(const u8* src, i64 n_blocks, float* dst) {
  for (; n_blocks > 0; --n_blocks, src += 210) {
    const float d = load_f16(src + 208);
    for (int run = 0; run < 8; ++run, dst += 32) {
      const u8* low = src + run / 4 * 64 + run % 2 * 32;
      const u8* high = src + 128 + run / 4 * 32;
      const int nibble = run / 2 % 2 * 4, pair = run % 4 * 2;
      for (int i = 0; i < 32; ++i) {
        const float scale = d * static_cast<float>(static_cast<std::int8_t>(src[192 + run * 2 + i / 16]));
        dst[i] = scale * static_cast<float>(((low[i] >> nibble & 15) | (high[i] >> pair & 3) << 4) - 32);
      }
    }
  }
}

constexpr BlockType kTypes[] = {
    {"q4_0", 32, 18, q4_0}, {"q4_1", 32, 20, q4_1},   {"q5_0", 32, 22, q5_0},   {"q5_1", 32, 24, q5_1},
    {"q8_0", 32, 34, q8_0}, {"q4_k", 256, 144, q4_k}, {"q5_k", 256, 176, q5_k}, {"q6_k", 256, 210, q6_k},
};

}  // namespace

const BlockType* block_type(std::string_view name) {
  for (const BlockType& type : kTypes)
    if (type.name == name) return &type;
  return nullptr;
}

i64 gguf_string_end(const u8* data, i64 size, i64 at) {
  if (at < 0 || at > size - 8) return -1;
  std::uint64_t length = load_u32(data + at) | std::uint64_t{load_u32(data + at + 4)} << 32;
  at += 8;
  return length <= static_cast<std::uint64_t>(size - at) ? at + static_cast<i64>(length) : -1;
}

}  // namespace pronghorn
