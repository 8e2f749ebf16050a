// The vector type that kernels are written over: 16 lanes, whatever the machine.
//
// Included by kernels.cpp only, once per instruction set, inside that set's own namespace, so that the linker can
// merge nothing across sets. No templates of the standard library here, for the same reason.
#pragma once

#include <cstdint>
#include <cstring>

namespace pronghorn {
namespace PRONGHORN_NAMESPACE {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using i32 = std::int32_t;

constexpr i64 kLanes = 16;

// ---- scalars ---------------------------------------------------------------------------------------------------

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float from_bf16(u16 v) { return bit_cast<float>(u32(v) << 16); }

// Round to nearest, ties to even; a NaN stays one.
inline u16 to_bf16(float f) {
  const u32 bits = bit_cast<u32>(f);
  if ((bits & 0x7fffffff) > 0x7f800000) return u16(bits >> 16) | 0x40;
  return u16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_f16(u16 v) {
  const u32 sign = u32(v & 0x8000) << 16, exponent = (v >> 10) & 31, mantissa = v & 0x3ff;
  if (exponent == 31) return bit_cast<float>(sign | 0x7f800000 | mantissa << 13);
  if (exponent) return bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  return bit_cast<float>(bit_cast<u32>(float(mantissa) * 0x1p-24f) | sign);
}

}  // namespace PRONGHORN_NAMESPACE
}  // namespace pronghorn

// Each of these files gives F (16 floats), I (16 integers) and what follows.
//
// kRegisters: how many of them the processor's registers hold. Part: one of several registers that an F takes (AVX2,
// NEON), for kernels whose sums would not fit otherwise.
//
// *_first: for the first n in 0..16 lanes; nothing is read or written past them, and the rest is zero.
//
// min, max: where either is NaN, the second.
//
// prefetch: into the second cache; the first has too few places for what is on its way (on Zen 4, half the speed).
//
// lanes_sum: lanes n apart are added, for n = 8, 4, 2, 1. lanes_sums: of four registers.
//
// store_int8_first: 8-bit integers within +-127, rounded half to even (of a NaN: 0), -> their sum.
//
// Quads: 64 unsigned bytes, four inputs' weights for each of 16 outputs. dot_bytes adds the dot products of
// (w + kBytesOffset - 128) and a ByteQuad, four inputs within +-127; dot_nibbles those of weights up to 15, at most
// eight times between begin_nibbles(sum) and end_nibbles(sum, n). All are exact.
//
// With tiles also: transpose, rows of 16 pairs of bf16 to columns, v[j] gets pair j of each row; load_transposed, the
// same from memory.
//
// With VDPBF16PS also: dot_pairs adds to each sum the product of the odd, then of the even halves; zip_halves pairs the
// halves of two rows, which leaves the outputs in an order that unzip_quads undoes.
#if PRONGHORN_ISA_avx512 || PRONGHORN_ISA_avx512bf16 || PRONGHORN_ISA_amx
#include "simd_avx512.h"
#elif PRONGHORN_ISA_avx2
#include "simd_avx2.h"
#elif PRONGHORN_ISA_neon || PRONGHORN_ISA_dotprod
#include "simd_neon.h"
#else
#include "simd_generic.h"
#endif

namespace pronghorn {
namespace PRONGHORN_NAMESPACE {

// The first n in 0..16 quads; the others are zero.
inline Quads load_quads_first(const u8* p, i64 n) {
  if (n == kLanes) return load_quads(p);
  alignas(64) u8 all[64] = {};
  std::memcpy(all, p, size_t(n) * 4);
  return load_quads(all);
}

#if !(PRONGHORN_ISA_avx512 || PRONGHORN_ISA_avx512bf16 || PRONGHORN_ISA_amx)
inline void lanes_sums(const F v[4], float* out) {
  for (int i = 0; i < 4; i++) out[i] = lanes_sum(v[i]);
}
#endif

// Quads to ByteQuads, where these are wider (AVX2).
void widen_quads(const u8* x, i64 n, ByteQuad* quads);

// ---- functions of a real number ----------------------------------------------------------------------------------

// e^x within 2 ulp; exactly 1 at 0, exactly 0 under -87.33, and 2.4e38 from 88.37 on. A NaN stays one.
inline F exp(F x) {
  const F magic = set(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const F c = max(set(-87.33654f), min(set(88.37626f), x));
  const F t = fma(c, set(1.44269504f), magic), n = t - magic;
  F r = fma(n, set(-0.693359375f), c);  // ln 2 in two parts, so that the first product is exact
  r = fma(n, set(2.12194440e-4f), r);
  F p = set(1.f / 5040);
  constexpr float taylor[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
  for (const float k : taylor) p = fma(p, r, set(k));
  const I power = shift_left_23(add_int(as_int(t), set_int(127)));  // the magic's own bits are shifted out
  return if_less(x, set(-87.33654f), zero(), p * as_float(power));
}

inline F sigmoid(F x) { return set(1) / (set(1) + exp(zero() - x)); }

// erfc(z) = t exp(-z^2 + P(t)), t = 1 / (1 + z/2), for z >= 0; P is a least-squares Chebyshev fit (error 2e-7).
inline F erfc_positive(F z) {
  const F t = set(1) / fma(set(0.5f), z, set(1));
  F p = set(0.1521713f);
  constexpr float fit[] = {-0.7201576f, 1.2489851f,  -0.8185366f, 0.02035049f, -0.05186152f,
                           0.0525327f,  0.38292455f, 0.9990604f,  -1.2654687f};
  for (const float k : fit) p = fma(p, t, set(k));
  return t * exp(p - z * z);
}

}  // namespace PRONGHORN_NAMESPACE
}  // namespace pronghorn
