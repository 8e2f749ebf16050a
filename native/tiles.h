// AMX tiles by number, on the hardware or (PRONGHORN_EMULATE_AMX) in plain code with the same results, so that
// what is built on them can be tested on any machine. Included like simd.h.
#pragma once

namespace pronghorn {
namespace PRONGHORN_NAMESPACE {

// The shapes of the eight tiles, as LDTILECFG reads them.
struct alignas(64) TileShapes {
  u8 palette = 1, start_row = 0, reserved[14] = {};
  u16 row_bytes[16] = {};
  u8 rows[16] = {};

  void set(int tile, i64 n_rows, i64 bytes) {
    rows[tile] = u8(n_rows);
    row_bytes[tile] = u16(bytes);
  }
};

#ifdef PRONGHORN_EMULATE_AMX

struct EmulatedTiles {
  TileShapes shapes;
  alignas(64) u8 data[8][16][64];
};
inline thread_local EmulatedTiles emulated;

inline void tiles_begin(const TileShapes& shapes) {
  emulated.shapes = shapes;
  std::memset(emulated.data, 0, sizeof emulated.data);
}
inline void tiles_end() {}
template <int T>
inline void tile_zero() {
  std::memset(emulated.data[T], 0, sizeof emulated.data[T]);
}
template <int T>
inline void tile_load(const void* p, i64 stride) {
  tile_zero<T>();
  for (int r = 0; r < emulated.shapes.rows[T]; r++)
    std::memcpy(emulated.data[T][r], static_cast<const u8*>(p) + r * stride, emulated.shapes.row_bytes[T]);
}
template <int T>
inline void tile_store(void* p, i64 stride) {
  for (int r = 0; r < emulated.shapes.rows[T]; r++)
    std::memcpy(static_cast<u8*>(p) + r * stride, emulated.data[T][r], emulated.shapes.row_bytes[T]);
}
// C += A (signed bytes) times B (unsigned bytes), exactly.
template <int C, int A, int B>
inline void tile_dot_su8() {
  for (int m = 0; m < emulated.shapes.rows[C]; m++)
    for (int n = 0; n < emulated.shapes.row_bytes[C] / 4; n++) {
      i32 sum;
      std::memcpy(&sum, &emulated.data[C][m][4 * n], 4);
      for (int k = 0; k < emulated.shapes.row_bytes[A]; k++)
        sum += i32(std::int8_t(emulated.data[A][m][k])) * i32(emulated.data[B][k / 4][4 * n + k % 4]);
      std::memcpy(&emulated.data[C][m][4 * n], &sum, 4);
    }
}
// C += A times B in bf16: an even and an odd chain from zero, added, then added to C (Intel's TDPBF16PS).
template <int C, int A, int B>
inline void tile_dot_bf16() {
  const auto half = [](int tile, int row, int i) {
    u16 v;
    std::memcpy(&v, &emulated.data[tile][row][2 * i], 2);
    return from_bf16(v);
  };
  for (int m = 0; m < emulated.shapes.rows[C]; m++)
    for (int n = 0; n < emulated.shapes.row_bytes[C] / 4; n++) {
      float sum, even = 0, odd = 0;
      std::memcpy(&sum, &emulated.data[C][m][4 * n], 4);
      for (int k = 0; k < emulated.shapes.row_bytes[A] / 4; k++) {
        even = __builtin_fmaf(half(A, m, 2 * k), half(B, k, 2 * n), even);
        odd = __builtin_fmaf(half(A, m, 2 * k + 1), half(B, k, 2 * n + 1), odd);
      }
      sum += even + odd;
      std::memcpy(&emulated.data[C][m][4 * n], &sum, 4);
    }
}

#else

// Written as assembly, since GCC's intrinsics take a tile's number only as a literal in the source.
inline void tiles_begin(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
inline void tiles_end() { asm volatile("tilerelease" ::: "memory"); }
template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void tile_load(const void* p, i64 stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* p, i64 stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void tile_dot_su8() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace PRONGHORN_NAMESPACE
}  // namespace pronghorn
