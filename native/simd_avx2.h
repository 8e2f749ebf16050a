// 16 lanes in two registers of AVX2, with FMA and F16C. Included by simd.h.
#pragma once

#include <immintrin.h>

namespace pronghorn {
namespace PRONGHORN_NAMESPACE {

struct F {
  __m256 a, b;  // lanes 0 to 7, 8 to 15
};
struct I {
  __m256i a, b;
};
constexpr int kRegisters = 8;

struct Part {
  __m256 v;
};
constexpr i64 kPartLanes = 8;
inline Part part_zero() { return {_mm256_setzero_ps()}; }
inline Part load_part(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store_part(float* p, Part x) { _mm256_storeu_ps(p, x.v); }
inline Part fma_part(Part x, Part y, Part z) { return {_mm256_fmadd_ps(x.v, y.v, z.v)}; }

inline F operator+(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F operator-(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F operator*(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F operator/(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }

inline F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline I set_int(i32 x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I zero_int() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline F as_float(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline I as_int(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }

// All ones in the first n of 8 lanes: none below 1, all from 8 on.
inline __m256i first(i64 n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(i32(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F load_first(const float* p, i64 n) {
  if (n == kLanes) return load(p);
  return {_mm256_maskload_ps(p, first(n)), _mm256_maskload_ps(p + 8, first(n - 8))};
}
inline void store(float* p, F v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}
inline void store_first(float* p, F v, i64 n) {
  if (n == kLanes) return store(p, v);  // masked stores are slow on AMD's processors
  _mm256_maskstore_ps(p, first(n), v.a);
  _mm256_maskstore_ps(p + 8, first(n - 8), v.b);
}
inline F keep_first(F v, i64 n) {
  return {_mm256_and_ps(v.a, _mm256_castsi256_ps(first(n))), _mm256_and_ps(v.b, _mm256_castsi256_ps(first(n - 8)))};
}
inline F keep_range(F v, i64 begin, i64 end, float other) {
  const auto keep = [&](__m256 x, i64 at) {
    const __m256i mask = _mm256_andnot_si256(first(begin - at), first(end - at));
    return _mm256_blendv_ps(_mm256_set1_ps(other), x, _mm256_castsi256_ps(mask));
  };
  return {keep(v.a, 0), keep(v.b, 8)};
}

// 16 halves; there are no masked loads and stores of them.
struct Halves {
  __m128i a, b;
};
inline Halves halves(const void* p) {
  const auto* parts = static_cast<const __m128i*>(p);
  return {_mm_loadu_si128(parts), _mm_loadu_si128(parts + 1)};
}
inline Halves halves_first(const void* p, i64 n) {
  if (n == kLanes) return halves(p);
  u16 all[kLanes] = {};
  std::memcpy(all, p, size_t(n) * 2);
  return halves(all);
}
inline I widen(Halves v) { return {_mm256_cvtepu16_epi32(v.a), _mm256_cvtepu16_epi32(v.b)}; }
inline I shift_left_16(I v) { return {_mm256_slli_epi32(v.a, 16), _mm256_slli_epi32(v.b, 16)}; }
inline F widen_f16(Halves v) { return {_mm256_cvtph_ps(v.a), _mm256_cvtph_ps(v.b)}; }

inline F load_bf16(const void* p) { return as_float(shift_left_16(widen(halves(p)))); }
inline F load_bf16_first(const void* p, i64 n) { return as_float(shift_left_16(widen(halves_first(p, n)))); }
inline F load_f16(const void* p) { return widen_f16(halves(p)); }
inline F load_f16_first(const void* p, i64 n) { return widen_f16(halves_first(p, n)); }
inline void store_bf16_first(void* p, F v, i64 n) {
  const auto round = [](__m256 x) {
    const __m256i bits = _mm256_castps_si256(x), top = _mm256_srli_epi32(bits, 16);
    const __m256i bias = _mm256_add_epi32(_mm256_and_si256(top, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i quiet = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
    return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  };
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(round(v.a), round(v.b)), 0xd8);
  if (n == kLanes) return _mm256_storeu_si256(static_cast<__m256i*>(p), packed);
  std::memcpy(p, &packed, size_t(n) * 2);
}

inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F absolute(F x) {
  const __m256 sign = _mm256_set1_ps(-0.f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline F square_root(F x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
inline F if_less(F x, F y, F yes, F no) {
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
inline I add_int(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I shift_left_23(I x) { return {_mm256_slli_epi32(x.a, 23), _mm256_slli_epi32(x.b, 23)}; }
inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I load_int(const i32* p) {
  const auto* parts = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(parts), _mm256_loadu_si256(parts + 1)};
}
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

inline float lanes_sum(F v) {
  const __m256 a = _mm256_add_ps(v.a, v.b);
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
inline float lanes_max(F v) {
  const __m256 a = _mm256_max_ps(v.a, v.b);
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

inline i32 store_int8_first(std::int8_t* p, F v, i64 n) {
  const auto round = [](__m256 x, __m256i mask) {
    const __m256 number = _mm256_and_ps(_mm256_castsi256_ps(mask), _mm256_cmp_ps(x, x, _CMP_ORD_Q));
    return _mm256_cvtps_epi32(_mm256_and_ps(x, number));
  };
  const __m256i a = round(v.a, first(n)), b = round(v.b, first(n - 8));
  const __m256i in_16_bits = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(in_16_bits), _mm256_extracti128_si256(in_16_bits, 1));
  if (n == kLanes)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  else
    std::memcpy(p, &bytes, size_t(n));
  const __m256i sum = _mm256_add_epi32(a, b);
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

struct Quads {
  __m256i a, b;
};
inline Quads load_quads(const u8* p) {
  const auto* parts = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(parts), _mm256_loadu_si256(parts + 1)};
}
inline Quads low_nibbles(Quads v) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(v.a, mask), _mm256_and_si256(v.b, mask)};
}
inline Quads high_nibbles(Quads v) { return low_nibbles({_mm256_srli_epi16(v.a, 4), _mm256_srli_epi16(v.b, 4)}); }

// maddubs would saturate: 2 * 255 * 127 needs more than 16 bits. So bytes and inputs are widened to 16 bits, the first
// and third of a quad apart from the second and fourth, and pairs of products are added in 32 bits.
struct ByteQuad {
  i32 even, odd;
};
// x is readable for a multiple of 64 bytes.
inline void widen_quads(const u8* x, i64 n, ByteQuad* quads) {
  for (i64 i = 0; i < n; i += 32) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), odd = _mm256_srai_epi16(v, 8);
    const __m256i a = _mm256_unpacklo_epi32(even, odd), b = _mm256_unpackhi_epi32(even, odd);
    auto* out = reinterpret_cast<__m256i*>(quads + i / 4);
    _mm256_storeu_si256(out, _mm256_permute2x128_si256(a, b, 0x20));
    _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(a, b, 0x31));
  }
}
// An addition that is done where it stands: GCC would put them all off, and spill what they add.
inline __m256i add_32(__m256i x, __m256i y) {
  __m256i sum = _mm256_add_epi32(x, y);
  asm("" : "+x"(sum));
  return sum;
}
inline __m256i add_16(__m256i x, __m256i y) {
  __m256i sum = _mm256_add_epi16(x, y);
  asm("" : "+x"(sum));
  return sum;
}
constexpr i32 kBytesOffset = 128;
inline I dot_bytes(I sum, Quads w, ByteQuad x) {
  const __m256i even = _mm256_set1_epi32(x.even), odd = _mm256_set1_epi32(x.odd), mask = _mm256_set1_epi16(255);
  const auto dot = [&](__m256i from, __m256i v) {
    from = add_32(from, _mm256_madd_epi16(_mm256_and_si256(v, mask), even));
    return add_32(from, _mm256_madd_epi16(_mm256_srli_epi16(v, 8), odd));
  };
  return {dot(sum.a, w.a), dot(sum.b, w.b)};
}
// Nibbles leave room for eight quads in 16 bits: 8 * 2 * 15 * 127 = 30480.
struct Nibbles {
  __m256i a, b;
};
inline Nibbles begin_nibbles(I) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Nibbles dot_nibbles(Nibbles sum, Quads w, i32 quad) {
  const __m256i x = _mm256_set1_epi32(quad);
  return {add_16(sum.a, _mm256_maddubs_epi16(w.a, x)), add_16(sum.b, _mm256_maddubs_epi16(w.b, x))};
}
inline I end_nibbles(I sum, Nibbles n) {
  const __m256i ones = _mm256_set1_epi16(1);
  return add_int(sum, {_mm256_madd_epi16(n.a, ones), _mm256_madd_epi16(n.b, ones)});
}

inline F even_halves(I pairs) { return as_float(shift_left_16(pairs)); }
inline F odd_halves(I pairs) {
  const __m256i mask = _mm256_set1_epi32(i32(0xffff0000));
  return as_float({_mm256_and_si256(pairs.a, mask), _mm256_and_si256(pairs.b, mask)});
}

}  // namespace PRONGHORN_NAMESPACE
}  // namespace pronghorn
