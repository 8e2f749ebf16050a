// The slow twin: what every kernel must compute, in double precision and in the most obvious way, written from
// kernels.h and weights/types.py and sharing nothing with the implementation but the types of its arguments.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace twin {

using pronghorn::Activation;
using pronghorn::Format;
using pronghorn::i64;
using pronghorn::Order;

constexpr double kUnit = 0x1p-24;  // f32's unit roundoff: |fl(a op b) - (a op b)| <= kUnit |a op b|

// splitmix64: the same numbers everywhere.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t bits() {
    std::uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  i64 in(i64 low, i64 high) {  // both included
    return low + static_cast<i64>(bits() % static_cast<std::uint64_t>(high - low + 1));
  }
  float uniform(float scale = 1) {
    return scale * static_cast<float>(static_cast<double>(in(-1000000, 1000000)) * 1e-6);
  }
  template <typename T>
  T pick(std::initializer_list<T> values) {
    return values.begin()[in(0, static_cast<i64>(values.size()) - 1)];
  }

 private:
  std::uint64_t state_;
};

inline float float_of_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// IEEE 754 binary16: sign, 5 bits of exponent (bias 15), 10 of fraction.
inline double half(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

inline float bfloat(std::uint16_t bits) { return float_of_bits(std::uint32_t{bits} << 16); }

// Round to nearest, ties to even; a NaN stays a NaN.
inline std::uint16_t to_bfloat(float x) {
  if (std::isnan(x)) return 0x7FC0;
  const std::uint32_t bits = bits_of(x), low = bits & 0xFFFF, odd = bits >> 16 & 1;
  return static_cast<std::uint16_t>((bits >> 16) + (low > 0x8000 || (low == 0x8000 && odd)));
}

inline double activate(Activation a, double x) {
  switch (a) {
    case Activation::none:
      return x;
    case Activation::gelu:
      return x / 2 * std::erfc(-x * M_SQRT1_2);
    case Activation::gelu_new:  // 1 + tanh(t) = 2 / (1 + exp(-2 t))
      return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::silu:
      return x / (1 + std::exp(-x));
    case Activation::relu:
      return x < 0 ? 0 : x;  // a NaN stays
  }
  return NAN;
}

// How far activate() may be off: its slope is at most 1.13, and its own error is held to 16 roundings of |x|.
inline double activation_error(Activation a, double x, double error) {
  if (a == Activation::none || a == Activation::relu) return error;
  return 1.13 * error + 16 * kUnit * std::fabs(x);
}

// TDPBF16PS on 32 inputs at a time (Intel SDM): the even and the odd products are two chains of fused
// multiply-adds in f32 from zero; they are added to one another, and then to the sum. The caller has set
// the environment that flushes denormals.
inline float bfloat_dot(const std::uint16_t* x, const std::uint16_t* w, i64 w_stride, i64 n) {
  float sum = 0;
  for (i64 i = 0; i < n; i += 32) {
    float chain[2] = {0, 0};
    for (i64 j = i; j < i + 32; ++j) {
      const float a = j < n ? bfloat(x[j]) : 0, b = j < n ? bfloat(w[j * w_stride]) : 0;
      chain[j & 1] = std::fma(a, b, chain[j & 1]);
    }
    sum += chain[0] + chain[1];
  }
  return sum;
}

// VDPBF16PS's: each pair's odd product is added before its even one. In the [out, in] order pair p goes to chain p %
// 16, and the chains are added by lanes 8, 4, 2, 1 apart; in the other there is a chain for each half of the inputs.
inline float bfloat_pairs_dot(const std::uint16_t* x, const std::uint16_t* w, i64 w_stride, i64 n, Order order) {
  const i64 n_chains = order == Order::out_in ? 16 : 2, cut = ((n + 1) / 2 + 7) / 8 * 8;
  float chains[16] = {};
  for (i64 pair = 0; pair < (n + 31) / 32 * 16; ++pair)
    for (i64 i : {2 * pair + 1, 2 * pair}) {
      float& chain = chains[order == Order::out_in ? pair % n_chains : i64{i >= cut}];
      chain = std::fma(i < n ? bfloat(x[i]) : 0, i < n ? bfloat(w[i * w_stride]) : 0, chain);
    }
  for (i64 apart = n_chains / 2; apart > 0; apart /= 2)
    for (i64 lane = 0; lane < apart; ++lane) chains[lane] += chains[lane + apart];
  return chains[0];
}

// A matrix of small integers with scales: w[o][i] = scale[o][g] * q[o][i] + minimum[o][g]. For int8, q is
// stored - 128 and the minimum is 0; for a symmetric int4 the minimum is -8 * scale.
struct Quantized {
  Format format;
  i64 n_out, n_in, group;  // group 0 (int8 only): the whole row, with an f32 scale
  bool symmetric;
  std::vector<int> q;                         // [n_out][n_in]
  std::vector<std::uint16_t> scales, minima;  // f16 [n_out][n_groups]
  std::vector<float> row_scales;              // [n_out]

  i64 n_groups() const { return group ? (n_in + group - 1) / group : 1; }
  i64 group_of(i64 i) const { return group ? i / group : 0; }
  i64 begin_of(i64 g) const { return g == n_groups() ? n_in : g * group; }
  double scale(i64 o, i64 g) const {
    const auto at = static_cast<std::size_t>(o * n_groups() + g);
    return group ? half(scales[at]) : double{row_scales[static_cast<std::size_t>(o)]};
  }
  double minimum(i64 o, i64 g) const {
    if (format == Format::int8) return 0;
    return symmetric ? -8 * scale(o, g) : half(minima[static_cast<std::size_t>(o * n_groups() + g)]);
  }
  int at(i64 o, i64 i) const { return q[static_cast<std::size_t>(o * n_in + i)]; }

  // The panels of weights/types.py, and kSlack bytes of rubbish; so are the outputs past n_out.
  std::vector<std::uint8_t> packed() const {
    std::vector<std::uint8_t> bytes;
    const auto pad = [&] {
      while (bytes.size() % 64) bytes.push_back(0xFF);
    };
    const auto put = [&](const void* value, std::size_t size) {
      const auto* p = static_cast<const std::uint8_t*>(value);
      bytes.insert(bytes.end(), p, p + size);
    };
    for (i64 panel = 0; panel < n_out; panel += 16) {
      const auto real = [&](i64 lane) { return panel + lane < n_out; };
      const auto table = [&](const std::vector<std::uint16_t>& values) {
        for (i64 g = 0; g < n_groups(); ++g)
          for (i64 lane = 0; lane < 16; ++lane) {
            const std::uint16_t rubbish = 0xFFFF;
            put(real(lane) ? &values[static_cast<std::size_t>((panel + lane) * n_groups() + g)] : &rubbish, 2);
          }
        pad();
      };
      if (group) {
        table(scales);
      } else {
        const float rubbish = NAN;
        for (i64 lane = 0; lane < 16; ++lane)
          put(real(lane) ? &row_scales[static_cast<std::size_t>(panel + lane)] : &rubbish, 4);
      }
      if (format == Format::int8) {
        for (i64 quad = 0; quad < n_in; quad += 4)
          for (i64 lane = 0; lane < 16; ++lane)
            for (i64 i = quad; i < quad + 4; ++i)
              bytes.push_back(
                  static_cast<std::uint8_t>(i < n_in ? (real(lane) ? at(panel + lane, i) + 128 : 255) : 128));
        continue;
      }
      if (!symmetric) table(minima);
      for (i64 first = 0; first < n_in; first += group) {
        const i64 end = std::min(first + group, n_in);
        const auto nibble = [&](i64 lane, i64 i) {
          return static_cast<unsigned>(i < end && real(lane) ? at(panel + lane, i) : 13);
        };
        for (i64 eight = first; eight < end; eight += 8)
          for (i64 lane = 0; lane < 16; ++lane)
            for (i64 i = eight; i < eight + 4; ++i)
              bytes.push_back(static_cast<std::uint8_t>(nibble(lane, i) | nibble(lane, i + 4) << 4));
      }
    }
    return bytes;
  }

  // The same layout, read instead of written.
  static Quantized unpacked(const std::uint8_t* bytes, Format format, i64 n_out, i64 n_in, i64 group, bool symmetric) {
    Quantized m{format, n_out, n_in, group, symmetric, {}, {}, {}, {}};
    const i64 n_groups = m.n_groups(), table = (n_groups * 32 + 63) / 64 * 64;
    i64 units = (n_in + 3) / 4;  // of 64 bytes: 4 inputs in 8 bits, or 8 in 4 bits
    if (format == Format::int4) {
      units = 0;
      for (i64 g = 0; g < n_groups; ++g) units += (m.begin_of(g + 1) - m.begin_of(g) + 7) / 8;
    }
    const i64 values = (group ? table : 64) + (format == Format::int4 && !symmetric ? table : 0);
    for (i64 o = 0; o < n_out; ++o) {
      const std::uint8_t* panel = bytes + o / 16 * (values + units * 64);
      const i64 lane = o % 16;
      const auto half_at = [&](i64 at) {
        std::uint16_t h;
        std::memcpy(&h, panel + at, 2);
        return h;
      };
      float scale = 0;
      if (!group) std::memcpy(&scale, panel + lane * 4, 4);
      m.row_scales.push_back(scale);
      for (i64 g = 0; g < n_groups && group; ++g) {
        m.scales.push_back(half_at((g * 16 + lane) * 2));
        m.minima.push_back(format == Format::int4 && !symmetric ? half_at(table + (g * 16 + lane) * 2)
                                                                : std::uint16_t{0});
      }
      for (i64 i = 0; i < n_in; ++i) {
        if (format == Format::int8) {
          m.q.push_back(panel[values + i / 4 * 64 + lane * 4 + i % 4] - 128);
        } else {
          const i64 within = i % group;
          const int both = panel[values + (i / group * (group / 8) + within / 8) * 64 + lane * 4 + within % 4];
          m.q.push_back(within % 8 < 4 ? both & 15 : both >> 4);
        }
      }
    }
    return m;
  }
};

}  // namespace twin
