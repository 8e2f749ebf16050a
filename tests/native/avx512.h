// What simd_avx512.h takes of AVX-512, on any x86-64 processor: by SIMDe (https://github.com/simd-everywhere/simde),
// and here what its version 0.7 lacks. For tests.
#pragma once

#include <immintrin.h>
#include <simde/x86/avx512.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

using F = simde__m512;
using I = simde__m512i;
using std::int32_t;
using std::uint16_t;
using std::uint32_t;
using std::uint8_t;

template <typename T, typename V>
struct Array {
  T at[sizeof(V) / sizeof(T)];
  Array() : at{} {}
  explicit Array(const V& v) { std::memcpy(at, &v, sizeof v); }
  operator V() const {
    V v;
    std::memcpy(&v, at, sizeof v);
    return v;
  }
};

template <typename T, typename V>
V load(uint32_t mask, const void* p) {
  Array<T, V> out;
  for (std::size_t i = 0; i < sizeof(V) / sizeof(T); i++)
    if (mask >> i & 1) std::memcpy(&out.at[i], static_cast<const T*>(p) + i, sizeof(T));
  return out;
}
template <typename T, typename V>
void store(void* p, uint32_t mask, V v) {
  const Array<T, V> in(v);
  for (std::size_t i = 0; i < sizeof(V) / sizeof(T); i++)
    if (mask >> i & 1) std::memcpy(static_cast<T*>(p) + i, &in.at[i], sizeof(T));
}
// To each lane of v.
template <typename From, typename To, typename V, typename W, typename Op>
W each(V v, Op op) {
  const Array<From, V> in(v);
  Array<To, W> out;
  for (int i = 0; i < 16; i++) out.at[i] = op(in.at[i]);
  return out;
}

inline __m256i low_halves(I v) {
  return each<uint32_t, uint16_t, I, __m256i>(v, [](uint32_t x) { return uint16_t(x); });
}
inline I widen_halves(__m256i v) {
  return each<uint16_t, uint32_t, __m256i, I>(v, [](uint16_t x) { return x; });
}
inline F to_float(I v) {
  return each<int32_t, float, I, F>(v, [](int32_t x) { return float(x); });
}
inline F widen_f16(__m256i v) {
  const Array<__m128i, __m256i> in(v);
  Array<__m256, F> out;
  for (int i = 0; i < 2; i++) out.at[i] = _mm256_cvtph_ps(in.at[i]);
  return out;
}
inline I round(uint32_t mask, F v) {
  Array<int32_t, I> out(each<float, int32_t, F, I>(v, [](float x) { return _mm_cvtss_si32(_mm_set_ss(x)); }));
  for (int i = 0; i < 16; i++)
    if (!(mask >> i & 1)) out.at[i] = 0;
  return out;
}
inline __m256 half(F v, int i) { return Array<__m256, F>(v).at[i]; }
inline F permute(F v, int order) {
  const Array<float, F> in(v);
  Array<float, F> out;
  for (int i = 0; i < 16; i++) out.at[i] = in.at[i / 4 * 4 + (order >> i % 4 * 2 & 3)];
  return out;
}
inline uint32_t compare(uint32_t mask, F x, F y, int how) {
  const Array<float, F> a(x), b(y);
  uint32_t out = 0;
  for (int i = 0; i < 16; i++) {
    const bool ordered = !std::isnan(a.at[i]) && !std::isnan(b.at[i]);
    if (how != _CMP_ORD_Q && how != _CMP_UNORD_Q && how != _CMP_LT_OQ) __builtin_trap();
    out |= uint32_t(how == _CMP_LT_OQ ? a.at[i] < b.at[i] : ordered == (how == _CMP_ORD_Q)) << i;
  }
  return out & mask;
}
inline int sum(I v) {
  const Array<int32_t, I> in(v);
  int out = 0;
  for (int x : in.at) out += x;
  return out;
}
inline float most(F v) {
  Array<float, F> in(v);
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; i++) in.at[i] = in.at[i] > in.at[i + n] ? in.at[i] : in.at[i + n];
  return in.at[0];
}
// VDPBF16PS: of each pair the odd halves' product is added first, each addition fused; denormals are zeros.
inline F dot_pairs(F sums, I x, I y) {
  const auto flush = [](float v) { return std::fpclassify(v) == FP_SUBNORMAL ? std::copysign(0.f, v) : v; };
  const auto widen = [&](uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float v;
    std::memcpy(&v, &bits, sizeof v);
    return flush(v);
  };
  Array<float, F> out(sums);
  const Array<uint16_t, I> a(x), b(y);
  for (int i = 0; i < 16; i++)
    for (int j = 2 * i + 1; j >= 2 * i; j--)
      out.at[i] = flush(std::fmaf(widen(a.at[j]), widen(b.at[j]), flush(out.at[i])));
  return out;
}

}  // namespace emulated

#define __m512 simde__m512
#define __m512i simde__m512i
#define __m512bh simde__m512i
#define _mm256_mask_storeu_epi16 (emulated::store<std::uint16_t, __m256i>)
#define _mm256_maskz_loadu_epi16 (emulated::load<std::uint16_t, __m256i>)
#define _mm512_abs_ps simde_mm512_abs_ps
#define _mm512_add_epi32 simde_mm512_add_epi32
#define _mm512_add_ps simde_mm512_add_ps
#define _mm512_and_si512 simde_mm512_and_si512
#define _mm512_castps512_ps128 simde_mm512_castps512_ps128
#define _mm512_castps512_ps256 simde_mm512_castps512_ps256
#define _mm512_castps_si512 simde_mm512_castps_si512
#define _mm512_castsi128_si512 simde_mm512_castsi128_si512
#define _mm512_castsi512_ps simde_mm512_castsi512_ps
#define _mm512_cmp_ps_mask(x, y, how) emulated::compare(0xffff, x, y, how)
#define _mm512_cvtepi32_epi16 emulated::low_halves
#define _mm512_cvtepi32_ps emulated::to_float
#define _mm512_cvtepu16_epi32 emulated::widen_halves
#define _mm512_cvtph_ps emulated::widen_f16
#define _mm512_cvtsepi32_epi8 simde_mm512_cvtsepi32_epi8
#define _mm512_dpbf16_ps emulated::dot_pairs
#define _mm512_dpbusd_epi32 simde_mm512_dpbusd_epi32
#define _mm512_extractf32x8_ps emulated::half
#define _mm512_fmadd_ps simde_mm512_fmadd_ps
#define _mm512_loadu_ps simde_mm512_loadu_ps
#define _mm512_loadu_si512 simde_mm512_loadu_si512
#define _mm512_mask_cmp_ps_mask emulated::compare
#define _mm512_mask_mov_epi32 simde_mm512_mask_mov_epi32
#define _mm512_mask_mov_ps simde_mm512_mask_mov_ps
#define _mm512_mask_storeu_ps (emulated::store<float, simde__m512>)
#define _mm512_maskz_cvtps_epi32 emulated::round
#define _mm512_maskz_loadu_epi16 (emulated::load<std::uint16_t, simde__m512i>)
#define _mm512_maskz_loadu_ps (emulated::load<float, simde__m512>)
#define _mm512_maskz_mov_ps simde_mm512_maskz_mov_ps
#define _mm512_max_ps simde_mm512_max_ps
#define _mm512_min_ps simde_mm512_min_ps
#define _mm512_or_si512 simde_mm512_or_si512
#define _mm512_permute_ps emulated::permute
#define _mm512_permutexvar_ps simde_mm512_permutexvar_ps
#define _mm512_reduce_add_epi32 emulated::sum
#define _mm512_reduce_max_ps emulated::most
#define _mm512_set1_epi32 simde_mm512_set1_epi32
#define _mm512_set1_epi8 simde_mm512_set1_epi8
#define _mm512_set1_ps simde_mm512_set1_ps
#define _mm512_setzero_ps simde_mm512_setzero_ps
#define _mm512_setzero_si512 simde_mm512_setzero_si512
#define _mm512_shuffle_f32x4 simde_mm512_shuffle_f32x4
#define _mm512_shuffle_i32x4 simde_mm512_shuffle_i32x4
#define _mm512_slli_epi32 simde_mm512_slli_epi32
#define _mm512_sqrt_ps simde_mm512_sqrt_ps
#define _mm512_srli_epi16 simde_mm512_srli_epi16
#define _mm512_srli_epi32 simde_mm512_srli_epi32
#define _mm512_storeu_ps simde_mm512_storeu_ps
#define _mm512_storeu_si512 simde_mm512_storeu_si512
#define _mm512_unpackhi_epi16 simde_mm512_unpackhi_epi16
#define _mm512_unpackhi_epi32 simde_mm512_unpackhi_epi32
#define _mm512_unpackhi_epi64 simde_mm512_unpackhi_epi64
#define _mm512_unpacklo_epi16 simde_mm512_unpacklo_epi16
#define _mm512_unpacklo_epi32 simde_mm512_unpacklo_epi32
#define _mm512_unpacklo_epi64 simde_mm512_unpacklo_epi64
#define _mm_mask_storeu_epi8 (emulated::store<std::uint8_t, __m128i>)
