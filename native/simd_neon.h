// 16 lanes in four registers of NEON (aarch64); with the dot-product instructions where they are compiled for.
// Included by simd.h.
#pragma once

#include <arm_neon.h>

namespace pronghorn {
namespace PRONGHORN_NAMESPACE {

struct F {
  float32x4_t v[4];  // lanes 0 to 3, 4 to 7, ...
};
struct I {
  int32x4_t v[4];
};
struct Quads {
  uint8x16_t v[4];
};
struct Halves {
  uint16x4_t v[4];
};
constexpr int kRegisters = 8;

struct Part {
  float32x4_t v;
};
constexpr i64 kPartLanes = 4;
inline Part part_zero() { return {vdupq_n_f32(0)}; }
inline Part load_part(const float* p) { return {vld1q_f32(p)}; }
inline void store_part(float* p, Part x) { vst1q_f32(p, x.v); }
inline Part fma_part(Part x, Part y, Part z) { return {vfmaq_f32(z.v, x.v, y.v)}; }

// To each quarter of its arguments.
template <typename To, typename Op, typename... From>
inline To each(const Op& op, const From&... x) {
  return {{op(x.v[0]...), op(x.v[1]...), op(x.v[2]...), op(x.v[3]...)}};
}

inline F operator+(F x, F y) {
  return each<F>([](float32x4_t a, float32x4_t b) { return vaddq_f32(a, b); }, x, y);
}
inline F operator-(F x, F y) {
  return each<F>([](float32x4_t a, float32x4_t b) { return vsubq_f32(a, b); }, x, y);
}
inline F operator*(F x, F y) {
  return each<F>([](float32x4_t a, float32x4_t b) { return vmulq_f32(a, b); }, x, y);
}
inline F operator/(F x, F y) {
  return each<F>([](float32x4_t a, float32x4_t b) { return vdivq_f32(a, b); }, x, y);
}

inline F set(float x) { return {{vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}}; }
inline F zero() { return set(0); }
inline I set_int(i32 x) { return {{vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x)}}; }
inline I zero_int() { return set_int(0); }
inline F as_float(I x) {
  return each<F>([](int32x4_t a) { return vreinterpretq_f32_s32(a); }, x);
}
inline I as_int(F x) {
  return each<I>([](float32x4_t a) { return vreinterpretq_s32_f32(a); }, x);
}

inline F load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
inline F load_first(const float* p, i64 n) {
  if (n == kLanes) return load(p);
  float all[kLanes] = {};
  std::memcpy(all, p, size_t(n) * sizeof(float));
  return load(all);
}
inline void store(float* p, F v) {
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, v.v[i]);
}
inline void store_first(float* p, F v, i64 n) {
  if (n == kLanes) return store(p, v);
  std::memcpy(p, &v, size_t(n) * sizeof(float));
}
inline F keep_range(F v, i64 begin, i64 end, float other) {
  const i32 ascending[4] = {0, 1, 2, 3};
  for (int i = 0; i < 4; i++) {
    const int32x4_t lane = vaddq_s32(vld1q_s32(ascending), vdupq_n_s32(4 * i));
    const uint32x4_t keep = vandq_u32(vcgeq_s32(lane, vdupq_n_s32(i32(begin))), vcltq_s32(lane, vdupq_n_s32(i32(end))));
    v.v[i] = vbslq_f32(keep, v.v[i], vdupq_n_f32(other));
  }
  return v;
}
inline F keep_first(F v, i64 n) { return keep_range(v, 0, n, 0); }

inline Halves halves(const void* p) {
  const auto* h = static_cast<const u8*>(p);  // of any alignment
  const auto at = [&](int i) { return vreinterpret_u16_u8(vld1_u8(h + 8 * i)); };
  return {{at(0), at(1), at(2), at(3)}};
}
inline Halves halves_first(const void* p, i64 n) {
  if (n == kLanes) return halves(p);
  u16 all[kLanes] = {};
  std::memcpy(all, p, size_t(n) * 2);
  return halves(all);
}
inline F widen_bf16(Halves v) {
  return each<F>([](uint16x4_t h) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(h), 16)); }, v);
}
inline F widen_f16(Halves v) {
  return each<F>([](uint16x4_t h) { return vcvt_f32_f16(vreinterpret_f16_u16(h)); }, v);
}
inline F load_bf16(const void* p) { return widen_bf16(halves(p)); }
inline F load_bf16_first(const void* p, i64 n) { return widen_bf16(halves_first(p, n)); }
inline F load_f16(const void* p) { return widen_f16(halves(p)); }
inline F load_f16_first(const void* p, i64 n) { return widen_f16(halves_first(p, n)); }
inline void store_bf16_first(void* p, F v, i64 n) {
  const Halves h = each<Halves>(
      [](float32x4_t x) {
        const uint32x4_t bits = vreinterpretq_u32_f32(x), top = vshrq_n_u32(bits, 16);
        const uint32x4_t bias = vaddq_u32(vandq_u32(top, vdupq_n_u32(1)), vdupq_n_u32(0x7fff));
        const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, bias), 16);
        const uint32x4_t number = vceqq_f32(x, x);
        return vmovn_u32(vbslq_u32(number, rounded, vorrq_u32(top, vdupq_n_u32(0x40))));
      },
      v);
  std::memcpy(p, &h, size_t(n) * 2);
}

inline F fma(F x, F y, F z) {
  return each<F>([](float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }, x, y, z);
}
inline F min(F x, F y) {
  return each<F>([](float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }, x, y);
}
inline F max(F x, F y) {
  return each<F>([](float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }, x, y);
}
inline F absolute(F x) {
  return each<F>([](float32x4_t a) { return vabsq_f32(a); }, x);
}
inline F square_root(F x) {
  return each<F>([](float32x4_t a) { return vsqrtq_f32(a); }, x);
}
inline F if_less(F x, F y, F yes, F no) {
  return each<F>(
      [](float32x4_t a, float32x4_t b, float32x4_t t, float32x4_t e) { return vbslq_f32(vcltq_f32(a, b), t, e); }, x, y,
      yes, no);
}
inline I add_int(I x, I y) {
  return each<I>([](int32x4_t a, int32x4_t b) { return vaddq_s32(a, b); }, x, y);
}
inline I shift_left_23(I x) {
  return each<I>([](int32x4_t a) { return vshlq_n_s32(a, 23); }, x);
}
inline F to_float(I x) {
  return each<F>([](int32x4_t a) { return vcvtq_f32_s32(a); }, x);
}
inline I load_int(const i32* p) {
  I v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }  // into the second cache

inline float lanes_sum(F v) {
  const float32x4_t b = vaddq_f32(vaddq_f32(v.v[0], v.v[2]), vaddq_f32(v.v[1], v.v[3]));
  const float32x2_t c = vadd_f32(vget_low_f32(b), vget_high_f32(b));
  return vget_lane_f32(c, 0) + vget_lane_f32(c, 1);
}
inline float lanes_max(F v) {
  return vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(v.v[0], v.v[1]), vmaxnmq_f32(v.v[2], v.v[3])));
}

inline i32 store_int8_first(std::int8_t* p, F v, i64 n) {
  const I q = each<I>([](float32x4_t x) { return vcvtnq_s32_f32(x); }, keep_first(v, n));
  const int16x8_t low = vcombine_s16(vqmovn_s32(q.v[0]), vqmovn_s32(q.v[1]));
  const int16x8_t high = vcombine_s16(vqmovn_s32(q.v[2]), vqmovn_s32(q.v[3]));
  const int8x16_t bytes = vcombine_s8(vqmovn_s16(low), vqmovn_s16(high));
  std::memcpy(p, &bytes, size_t(n));
  return vaddvq_s32(vaddq_s32(vaddq_s32(q.v[0], q.v[1]), vaddq_s32(q.v[2], q.v[3])));
}

inline Quads load_quads(const u8* p) { return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}}; }
inline Quads low_nibbles(Quads v) {
  return each<Quads>([](uint8x16_t a) { return vandq_u8(a, vdupq_n_u8(15)); }, v);
}
inline Quads high_nibbles(Quads v) {
  return each<Quads>([](uint8x16_t a) { return vshrq_n_u8(a, 4); }, v);
}

// Four products of signed bytes to a lane. Without the instruction, two products of 128 * 127 at most fit 16 bits.
inline int32x4_t dot_signed(int32x4_t sum, int8x16_t w, int8x16_t x) {
#if __ARM_FEATURE_DOTPROD
  return vdotq_s32(sum, w, x);
#else
  const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
  return vpadalq_s16(sum, vpaddq_s16(low, high));
#endif
}
using ByteQuad = i32;
constexpr i32 kBytesOffset = 0;
inline I dot_bytes(I sum, Quads w, i32 quad) {
  const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(quad));
  return each<I>(
      [&](int32x4_t s, uint8x16_t v) { return dot_signed(s, vreinterpretq_s8_u8(veorq_u8(v, vdupq_n_u8(128))), x); },
      sum, w);
}
using Nibbles = I;
inline Nibbles begin_nibbles(I sum) { return sum; }
inline Nibbles dot_nibbles(Nibbles sum, Quads w, i32 quad) {
  const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(quad));
  return each<I>([&](int32x4_t s, uint8x16_t v) { return dot_signed(s, vreinterpretq_s8_u8(v), x); }, sum, w);
}
inline I end_nibbles(I, Nibbles sum) { return sum; }

inline F even_halves(I pairs) {
  return each<F>([](int32x4_t p) { return vreinterpretq_f32_s32(vshlq_n_s32(p, 16)); }, pairs);
}
inline F odd_halves(I pairs) {
  return each<F>([](int32x4_t p) { return vreinterpretq_f32_s32(vandq_s32(p, vdupq_n_s32(i32(0xffff0000)))); }, pairs);
}

}  // namespace PRONGHORN_NAMESPACE
}  // namespace pronghorn
