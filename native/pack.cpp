#include "pack.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "gguf.h"
#include "half.h"

namespace pronghorn {

namespace {

constexpr i64 kUnit = 1024;  // elements that a dense conversion takes at a time

i64 element_size(std::string_view dtype) {
  if (dtype == "f32") return 4;
  if (dtype == "f16" || dtype == "bf16") return 2;
  return dtype == "f64" ? 8 : 0;
}

// `n` values from element `at` on, as floats; in a block type, `at` and `n` are whole blocks.
void read(const Source& s, i64 at, i64 n, float* out) {
  if (s.dtype == "f32") {
    std::memcpy(out, s.data + at * 4, static_cast<size_t>(n) * 4);
  } else if (s.dtype == "f64") {
    for (i64 i = 0; i < n; i++) {
      double v;
      std::memcpy(&v, s.data + (at + i) * 8, 8);
      out[i] = static_cast<float>(v);
    }
  } else if (const BlockType* type = block_type(s.dtype)) {
    type->dequantize(s.data + at / type->values * type->bytes, n / type->values, out);
  } else {
    const bool bf16 = s.dtype == "bf16";
    for (i64 i = 0; i < n; i++) {
      std::uint16_t v;
      std::memcpy(&v, s.data + (at + i) * 2, 2);
      out[i] = bf16 ? bf16_to_float(v) : f16_to_float(v);
    }
  }
}

// A panel's rows as floats, [16][n_in]; outputs past the matrix are zero. A transposed source is dense.
void read_panel(const Source& s, i64 o, float* out) {
  const i64 n = std::min(kPanel, s.n_out - o);
  if (!s.transposed) {
    read(s, o * s.n_in, n * s.n_in, out);
  } else {
    float row[kPanel];
    for (i64 i = 0; i < s.n_in; i++) {
      read(s, i * s.n_out + o, n, row);
      for (i64 r = 0; r < n; r++) out[r * s.n_in + i] = row[r];
    }
  }
  std::fill(out + n * s.n_in, out + kPanel * s.n_in, 0.f);
}

struct Group {
  float scale, minimum;
};

// The range of a group's weights -> its scale and minimum, before they are rounded for storage.
Group range_of(const float* w, i64 n, Format format, bool symmetric) {
  float low = w[0], high = w[0];
  for (i64 i = 1; i < n; i++) low = std::min(low, w[i]), high = std::max(high, w[i]);
  if (format == Format::int8) return {std::max(-low, high) / 127, 0};
  if (symmetric) return {(-low > high ? low : high) / -8, 0};
  // Zero stays within the range, so that it is near to a code: weights of a group may all be of one sign.
  low = std::min(low, 0.f);
  return {(std::max(high, 0.f) - low) / 15, low};
}

int code(float w, Group g, int low, int high) {
  const float q = g.scale != 0 ? std::nearbyint((w - g.minimum) / g.scale) : 0;
  return static_cast<int>(std::clamp(q, static_cast<float>(low), static_cast<float>(high)));
}

void put_half(std::uint8_t* p, std::uint16_t v) { std::memcpy(p, &v, 2); }

// A panel's scales, minima and codes from its float rows; false if a scale or minimum is no finite f16.
bool pack_panel(const float* rows, const Matrix& m, const PanelLayout& layout, std::uint8_t* panel) {
  const i64 group = m.group ? m.group : m.n_in;
  std::memset(panel, 0, static_cast<size_t>(layout.size));
  if (m.format == Format::int8)
    std::memset(panel + layout.values, 128, static_cast<size_t>(layout.size - layout.values));
  for (i64 r = 0; r < kPanel; r++)
    for (i64 g = 0; g < layout.n_groups; g++) {
      const i64 first = g * group, n = std::min(group, m.n_in - first);
      const float* w = rows + r * m.n_in + first;
      Group range = range_of(w, n, m.format, m.symmetric);
      if (m.group == 0) {
        std::memcpy(panel + r * 4, &range.scale, 4);
      } else {
        const std::uint16_t scale = float_to_f16(range.scale), minimum = float_to_f16(range.minimum);
        range = {f16_to_float(scale), f16_to_float(minimum)};
        if (std::isinf(range.scale) || std::isinf(range.minimum)) return false;
        put_half(panel + (g * kPanel + r) * 2, scale);
        if (m.format == Format::int4 && !m.symmetric) put_half(panel + layout.minima + (g * kPanel + r) * 2, minimum);
      }
      for (i64 i = 0; i < n; i++) {
        const i64 input = first + i;
        if (m.format == Format::int8) {
          panel[layout.values + input / 4 * 64 + r * 4 + input % 4] =
              static_cast<std::uint8_t>(code(w[i], range, -127, 127) + 128);
        } else {
          const int q = m.symmetric ? code(w[i], range, -8, 7) + 8 : code(w[i], range, 0, 15);
          std::uint8_t& byte = panel[layout.values + (g * (group / 8) + i / 8) * 64 + r * 4 + i % 4];
          byte = static_cast<std::uint8_t>(byte | q << (i % 8 < 4 ? 0 : 4));
        }
      }
    }
  return true;
}

bool finite_half(const std::uint8_t* p) { return (p[1] & 0x7c) != 0x7c; }

// The same from GGUF's Q8_0, Q4_0 or Q4_1 blocks of 32, whose codes and scales are ours already.
bool repack_panel(const Source& s, i64 o, const Matrix& m, const PanelLayout& layout, std::uint8_t* panel) {
  const BlockType& type = *block_type(s.dtype);
  const i64 blocks = s.n_in / 32, outputs = std::min(kPanel, s.n_out - o);
  std::memset(panel, 0, static_cast<size_t>(layout.size));
  if (m.format == Format::int8)
    std::memset(panel + layout.values, 128, static_cast<size_t>(layout.size - layout.values));
  for (i64 r = 0; r < outputs; r++)
    for (i64 g = 0; g < blocks; g++) {
      const std::uint8_t* block = s.data + ((o + r) * blocks + g) * type.bytes;
      std::memcpy(panel + (g * kPanel + r) * 2, block, 2);
      if (!finite_half(block) || (m.format == Format::int4 && !m.symmetric && !finite_half(block + 2))) return false;
      if (m.format == Format::int8) {
        for (i64 i = 0; i < 32; i++)
          panel[layout.values + (g * 8 + i / 4) * 64 + r * 4 + i % 4] = static_cast<std::uint8_t>(block[2 + i] ^ 128);
        continue;
      }
      const std::uint8_t* nibbles = block + (m.symmetric ? 2 : 4);
      if (!m.symmetric) std::memcpy(panel + layout.minima + (g * kPanel + r) * 2, block + 2, 2);
      for (i64 i = 0; i < 32; i++) {
        const int q = i < 16 ? nibbles[i] & 15 : nibbles[i - 16] >> 4;
        std::uint8_t& byte = panel[layout.values + (g * 4 + i / 8) * 64 + r * 4 + i % 4];
        byte = static_cast<std::uint8_t>(byte | q << (i % 8 < 4 ? 0 : 4));
      }
    }
  return true;
}

bool all_finite(const float* x, i64 n) {
  float sum = 0;
  for (i64 i = 0; i < n; i++) sum += x[i] * 0;  // NaN and infinity times 0 are NaN
  return sum == 0;
}

void pack_dense(const Source& s, Format format, std::uint8_t* data, Pool& pool) {
  const BlockType* type = block_type(s.dtype);
  const i64 n = s.n_out * s.n_in, unit = type ? kUnit / type->values * type->values : kUnit;
  pool.run([&](int thread) {
    const Share share(n, unit, thread, pool.size());
    float values[kUnit];
    for (i64 at = share.begin; at < share.end; at += unit) {
      const i64 count = std::min(unit, share.end - at);
      read(s, at, count, values);
      if (format == Format::f32) {
        std::memcpy(data + at * 4, values, static_cast<size_t>(count) * 4);
      } else {
        for (i64 i = 0; i < count; i++)
          put_half(data + (at + i) * 2, format == Format::bf16 ? float_to_bf16(values[i]) : float_to_f16(values[i]));
      }
    }
  });
}

}  // namespace

i64 source_size(const Source& s) {
  if (const i64 element = element_size(s.dtype)) return s.n_out * s.n_in * element;
  const BlockType* type = block_type(s.dtype);
  return !type || s.transposed || s.n_in % type->values ? -1 : s.n_out * s.n_in / type->values * type->bytes;
}

bool packs_exactly(const Source& s, Format format, i64 group, bool symmetric) {
  if (group != 32) return false;
  if (format == Format::int8) return s.dtype == "q8_0";
  return format == Format::int4 && s.dtype == (symmetric ? "q4_0" : "q4_1");
}

void pack(const Source& s, const Matrix& m, std::uint8_t* data, Pool& pool) {
  if (!is_packed(m.format)) return pack_dense(s, m.format, data, pool);
  const PanelLayout layout = panel_layout(m.format, m.n_in, m.group, m.symmetric);
  const bool exact = packs_exactly(s, m.format, m.group, m.symmetric);
  std::atomic<bool> finite{true};
  std::vector<std::vector<float>> rows(static_cast<size_t>(pool.size()));
  if (!exact)
    for (auto& r : rows) r.resize(static_cast<size_t>(kPanel * m.n_in));
  pool.run([&](int thread) {
    const Share share(m.n_out, kPanel, thread, pool.size());
    for (i64 o = share.begin; o < share.end; o += kPanel) {
      std::uint8_t* panel = data + o / kPanel * layout.size;
      if (exact) {
        if (!repack_panel(s, o, m, layout, panel)) finite = false;
        continue;
      }
      float* w = rows[static_cast<size_t>(thread)].data();
      read_panel(s, o, w);
      if (!all_finite(w, kPanel * m.n_in) || !pack_panel(w, m, layout, panel)) finite = false;
    }
  });
  std::memset(data + div_up(m.n_out, kPanel) * layout.size, 0, kSlack);
  if (!finite)
    throw std::invalid_argument(
        "holds values that are not finite, or too large for f16 scales: it cannot be quantized");
}

std::uint32_t crc32c(const std::uint8_t* data, i64 size) {
  // tables[k][b]: what byte b, with k bytes of zeros behind it, adds.
  static const auto tables = [] {
    std::array<std::array<std::uint32_t, 256>, 8> t{};
    for (std::uint32_t b = 0; b < 256; b++) {
      std::uint32_t crc = b;
      for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0u);
      t[0][b] = crc;
    }
    for (size_t k = 1; k < 8; k++)
      for (size_t b = 0; b < 256; b++) t[k][b] = t[k - 1][b] >> 8 ^ t[0][t[k - 1][b] & 255];
    return t;
  }();
  std::uint32_t crc = ~0u;
  i64 i = 0;
  for (; i + 8 <= size; i += 8) {
    std::uint32_t next = 0;
    for (size_t k = 0; k < 8; k++) {
      const std::uint32_t byte = data[i + static_cast<i64>(k)] ^ (k < 4 ? crc >> 8 * k & 255 : 0);
      next ^= tables[7 - k][byte];
    }
    crc = next;
  }
  for (; i < size; i++) crc = crc >> 8 ^ tables[0][(crc ^ data[i]) & 255];
  return ~crc;
}

}  // namespace pronghorn
