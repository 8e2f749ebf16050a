// 16 lanes in one register of AVX-512. Included by simd.h.
#pragma once

#ifdef PRONGHORN_EMULATE_AVX512
#include "avx512.h"  // of the tests
#else
#include <immintrin.h>
#endif

namespace pronghorn {
namespace PRONGHORN_NAMESPACE {

using F = __m512;
using I = __m512i;
constexpr int kRegisters = 32;

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
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

inline float lanes_sum(F v) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
inline void lanes_sums(const F v[4], float* out) {
  const auto halves = [](F a, F b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  };
  const F a = halves(v[0], v[1]), b = halves(v[2], v[3]);
  const F c = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  const F d = _mm512_add_ps(c, _mm512_permute_ps(c, 0x4e)), e = _mm512_add_ps(d, _mm512_permute_ps(d, 0xb1));
  const I each = _mm512_castsi128_si512(_mm_setr_epi32(0, 4, 8, 12));
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(each, e)));
}
inline float lanes_max(F v) { return _mm512_reduce_max_ps(v); }

inline i32 store_int8_first(std::int8_t* p, F v, i64 n) {
  const I q = _mm512_maskz_cvtps_epi32(_mm512_mask_cmp_ps_mask(first(n), v, v, _CMP_ORD_Q), v);
  _mm_mask_storeu_epi8(p, first(n), _mm512_cvtsepi32_epi8(q));
  return _mm512_reduce_add_epi32(q);
}

using Quads = __m512i;
inline Quads load_quads(const u8* p) { return _mm512_loadu_si512(p); }
inline Quads low_nibbles(Quads v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline Quads high_nibbles(Quads v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
inline void store_quads(u8* p, Quads v) { _mm512_storeu_si512(p, v); }
using ByteQuad = i32;
constexpr i32 kBytesOffset = 128;
inline I dot_bytes(I sum, Quads w, i32 quad) { return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(quad)); }
using Nibbles = I;
inline Nibbles begin_nibbles(I sum) { return sum; }
inline Nibbles dot_nibbles(Nibbles sum, Quads w, i32 quad) { return dot_bytes(sum, w, quad); }
inline I end_nibbles(I, Nibbles sum) { return sum; }

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
inline void load_transposed(const u16* p, i64 stride, I v[16]) {
#pragma GCC unroll 16
  for (i64 r = 0; r < 16; r++) v[r] = load_pairs_first(p + r * stride, 32);
  transpose(v);
}
#if PRONGHORN_ISA_avx512bf16
inline I load_halves(const u16* p, i64 n) { return n == 32 ? _mm512_loadu_si512(p) : load_pairs_first(p, n); }
inline F dot_pairs(I x, I w, F sum) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w); }
inline void zip_halves(I a, I b, I& low, I& high) {
  low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
}
inline void unzip_quads(F& low, F& high) {
  const F a = _mm512_shuffle_f32x4(low, high, 0x44), b = _mm512_shuffle_f32x4(low, high, 0xee);
  low = _mm512_shuffle_f32x4(a, a, 0xd8), high = _mm512_shuffle_f32x4(b, b, 0xd8);
}
#endif
inline F even_halves(I pairs) { return as_float(_mm512_slli_epi32(pairs, 16)); }
inline F odd_halves(I pairs) { return as_float(_mm512_and_si512(pairs, set_int(i32(0xffff0000)))); }

}  // namespace PRONGHORN_NAMESPACE
}  // namespace pronghorn
