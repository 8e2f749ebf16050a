// 16 lanes in the compiler's own vectors, for any processor. Included by simd.h.
#pragma once

namespace pronghorn {
namespace PRONGHORN_NAMESPACE {

typedef float F __attribute__((vector_size(64)));
typedef i32 I __attribute__((vector_size(64)));
constexpr int kRegisters = 4;

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
using ByteQuad = i32;
constexpr i32 kBytesOffset = 128;
inline I dot_bytes(I sum, Quads w, i32 quad) {
  const I v = I(w);
  for (int b = 0; b < 4; b++) sum += ((v >> (8 * b)) & 255) * i32(std::int8_t(u32(quad) >> (8 * b)));
  return sum;
}
using Nibbles = I;
inline Nibbles begin_nibbles(I sum) { return sum; }
inline Nibbles dot_nibbles(Nibbles sum, Quads w, i32 quad) { return dot_bytes(sum, w, quad); }
inline I end_nibbles(I, Nibbles sum) { return sum; }

inline F even_halves(I pairs) { return F(pairs << 16); }
inline F odd_halves(I pairs) { return F(pairs & i32(0xffff0000)); }

}  // namespace PRONGHORN_NAMESPACE
}  // namespace pronghorn
