// The vector type that kernels are written over: 16 lanes, whatever the machine.
//
// Included by kernels.cpp only, once per instruction set, inside that set's own namespace, so that the linker can
// merge nothing across sets. No templates of the standard library here, for the same reason.
#pragma once

#include <cstdint>
#include <cstring>

#if PRONGHORN_ISA_avx512 || PRONGHORN_ISA_amx
#define PRONGHORN_AVX512 1
#include <immintrin.h>
#endif

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

#if PRONGHORN_AVX512

// ---- AVX-512 ---------------------------------------------------------------------------------------------------

using F = __m512;
using I = __m512i;
constexpr bool kManyRegisters = true;

inline F set(float x) { return _mm512_set1_ps(x); }
inline F zero() { return _mm512_setzero_ps(); }
inline I zero_int() { return _mm512_setzero_si512(); }
inline __mmask16 first(i64 n) { return __mmask16((1u << n) - 1); }  // n in 0..16

inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F load_first(const float* p, i64 n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline void store_first(float* p, F v, i64 n) { _mm512_mask_storeu_ps(p, first(n), v); }
inline F keep_first(F v, i64 n) { return _mm512_maskz_mov_ps(first(n), v); }
inline F keep_range(F v, i64 begin, i64 end, float other) {
  return _mm512_mask_mov_ps(set(other), __mmask16(first(end) & ~first(begin)), v);
}

inline F widen_bf16(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
inline F load_bf16(const void* p) { return widen_bf16(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
inline F load_bf16_first(const void* p, i64 n) { return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
inline F load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
inline F load_f16_first(const void* p, i64 n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
inline void store_bf16_first(void* p, F v, i64 n) {
  const I bits = _mm512_castps_si512(v);
  const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const I rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const I quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet)));
}

inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
// Where either is NaN, the second.
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F absolute(F a) { return _mm512_abs_ps(a); }
inline F square_root(F a) { return _mm512_sqrt_ps(a); }
inline F if_less(F a, F b, F yes, F no) { return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), yes); }
inline F as_float(I a) { return _mm512_castsi512_ps(a); }
inline I as_int(F a) { return _mm512_castps_si512(a); }
inline I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
inline I set_int(i32 a) { return _mm512_set1_epi32(a); }
inline I shift_left_23(I a) { return _mm512_slli_epi32(a, 23); }
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline I load_int(const i32* p) { return _mm512_loadu_si512(p); }
inline I load_halves_first(const void* p, i64 n) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p));
}
inline I pair_halves(I even, I odd) { return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)); }
// Into the second cache: the first has too few places for what is on its way (on Zen 4, half the speed).
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

inline float lanes_sum(F v) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
inline float lanes_max(F v) { return _mm512_reduce_max_ps(v); }

// 8-bit integers within +-127, round half to even (of a NaN: 0), -> their sum.
inline i32 store_int8_first(std::int8_t* p, F v, i64 n) {
  const I q = _mm512_maskz_cvtps_epi32(_mm512_mask_cmp_ps_mask(first(n), v, v, _CMP_ORD_Q), v);
  _mm_mask_storeu_epi8(p, first(n), _mm512_cvtsepi32_epi8(q));
  return _mm512_reduce_add_epi32(q);
}

// 64 unsigned bytes: a quad of inputs for each of 16 outputs; `quad` is the same four signed inputs for all.
using Quads = __m512i;
inline Quads load_quads(const u8* p) { return _mm512_loadu_si512(p); }
inline Quads low_nibbles(Quads v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline Quads high_nibbles(Quads v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
inline void store_quads(u8* p, Quads v) { _mm512_storeu_si512(p, v); }
inline I dot(I sum, Quads w, i32 quad) { return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(quad)); }

// Rows of 16 pairs of bf16 to columns: out[j] has pair j of each row.
inline void transpose(I v[16]) {
  I t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
inline I load_pairs_first(const u16* p, i64 n) { return _mm512_maskz_loadu_epi16(n >= 32 ? ~0u : (1u << n) - 1, p); }
inline F even_halves(I pairs) { return as_float(_mm512_slli_epi32(pairs, 16)); }
inline F odd_halves(I pairs) { return as_float(_mm512_and_si512(pairs, set_int(i32(0xffff0000)))); }

#else

// ---- generic: the compiler's own vectors -------------------------------------------------------------------------

typedef float F __attribute__((vector_size(64)));
typedef i32 I __attribute__((vector_size(64)));
constexpr bool kManyRegisters = false;

inline F set(float x) { return F{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
inline F zero() { return F{}; }
inline I zero_int() { return I{}; }

inline F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline F load_first(const float* p, i64 n) {
  F v = {};
  std::memcpy(&v, p, size_t(n) * sizeof(float));
  return v;
}
inline void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
inline void store_first(float* p, F v, i64 n) { std::memcpy(p, &v, size_t(n) * sizeof(float)); }
inline F keep_range(F v, i64 begin, i64 end, float other) {
  for (i64 i = 0; i < kLanes; i++) v[i] = i >= begin && i < end ? v[i] : other;
  return v;
}
inline F keep_first(F v, i64 n) { return keep_range(v, 0, n, 0); }

inline u16 half_at(const void* p, i64 i) {
  u16 v;
  std::memcpy(&v, static_cast<const u8*>(p) + 2 * i, 2);
  return v;
}
inline F load_bf16_first(const void* p, i64 n) {
  F v = {};
  for (i64 i = 0; i < n; i++) v[i] = from_bf16(half_at(p, i));
  return v;
}
inline F load_bf16(const void* p) { return load_bf16_first(p, kLanes); }
inline F load_f16_first(const void* p, i64 n) {
  F v = {};
  for (i64 i = 0; i < n; i++) v[i] = from_f16(half_at(p, i));
  return v;
}
inline F load_f16(const void* p) { return load_f16_first(p, kLanes); }
inline void store_bf16_first(void* p, F v, i64 n) {
  for (i64 i = 0; i < n; i++) {
    const u16 h = to_bf16(v[i]);
    std::memcpy(static_cast<u8*>(p) + 2 * i, &h, 2);
  }
}

inline F fma(F a, F b, F c) { return a * b + c; }
inline F min(F a, F b) { return a < b ? a : b; }
inline F max(F a, F b) { return a > b ? a : b; }
inline F absolute(F a) { return F(I(a) & 0x7fffffff); }
inline F square_root(F a) {
  for (i64 i = 0; i < kLanes; i++) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
inline F if_less(F a, F b, F yes, F no) { return a < b ? yes : no; }
inline F as_float(I a) { return F(a); }
inline I as_int(F a) { return I(a); }
inline I add_int(I a, I b) { return a + b; }
inline I set_int(i32 a) { return I{} + a; }
inline I shift_left_23(I a) { return a << 23; }
inline F to_float(I a) { return __builtin_convertvector(a, F); }
inline I load_int(const i32* p) {
  I v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline I load_halves_first(const void* p, i64 n) {
  I v = {};
  for (i64 i = 0; i < n; i++) v[i] = half_at(p, i);
  return v;
}
inline I pair_halves(I even, I odd) { return even | odd << 16; }
inline void prefetch(const void* p) { __builtin_prefetch(p); }

inline float lanes_sum(F v) {
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; i++) v[i] += v[i + n];
  return v[0];
}
inline float lanes_max(F v) {
  float m = v[0];
  for (int i = 1; i < kLanes; i++) m = v[i] > m ? v[i] : m;
  return m;
}

inline i32 store_int8_first(std::int8_t* p, F v, i64 n) {
  i32 sum = 0;
  for (i64 i = 0; i < n; i++) {
    const float r = __builtin_rintf(v[i]);
    const i32 q = r >= -127 && r <= 127 ? i32(r) : 0;
    p[i] = std::int8_t(q);
    sum += q;
  }
  return sum;
}

typedef u8 Quads __attribute__((vector_size(64)));
inline Quads load_quads(const u8* p) {
  Quads v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Quads low_nibbles(Quads v) { return v & 15; }
inline Quads high_nibbles(Quads v) { return v >> 4; }
inline void store_quads(u8* p, Quads v) { std::memcpy(p, &v, sizeof v); }
inline I dot(I sum, Quads w, i32 quad) {
  const I v = I(w);
  for (int b = 0; b < 4; b++) sum += ((v >> (8 * b)) & 255) * i32(std::int8_t(u32(quad) >> (8 * b)));
  return sum;
}

inline void transpose(I v[16]) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < i; j++) {
      const i32 t = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = t;
    }
}
inline I load_pairs_first(const u16* p, i64 n) {
  I v = {};
  std::memcpy(&v, p, size_t(n < 32 ? n : 32) * 2);
  return v;
}
inline F even_halves(I pairs) { return F(pairs << 16); }
inline F odd_halves(I pairs) { return F(pairs & i32(0xffff0000)); }

#endif

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
