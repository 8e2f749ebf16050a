// The kernels, compiled once per instruction set (see CMakeLists.txt). The contract is in kernels.h.
//
// How one answer is kept: an output's terms are added in an order that its weights' shape alone fixes.
//   f32, f16 [out, in]:  16 partial sums, one a lane, input i in lane i % 16; then the tree of lanes_sum.
//   f32, f16 [in, out]:  one chain an output, inputs ascending.
//   bf16:                TDPBF16PS's: for 32 inputs an even and an odd chain from zero, added, then added to the sum.
//                        With VDPBF16PS and without tiles as f32, by pairs: the odd product, then the even one.
//   int8, int4:          exact integer sums of a group, then one float chain over the groups, ascending.
#include "kernels.h"

#if PRONGHORN_ISA_avx512
#define PRONGHORN_NAMESPACE avx512
#elif PRONGHORN_ISA_avx512bf16
#define PRONGHORN_NAMESPACE avx512bf16
#elif PRONGHORN_ISA_amx
#define PRONGHORN_NAMESPACE amx
#elif PRONGHORN_ISA_avx2
#define PRONGHORN_NAMESPACE avx2
#elif PRONGHORN_ISA_neon
#define PRONGHORN_NAMESPACE neon
#elif PRONGHORN_ISA_dotprod
#define PRONGHORN_NAMESPACE dotprod
#else
#define PRONGHORN_NAMESPACE generic
#endif
#define PRONGHORN_STRING_(x) #x
#define PRONGHORN_STRING(x) PRONGHORN_STRING_(x)

#include "simd.h"
#if PRONGHORN_ISA_amx
#include "tiles.h"
#endif

namespace pronghorn {
namespace PRONGHORN_NAMESPACE {
namespace {

constexpr i64 kAhead = 4096;  // bytes from a load to what is fetched meanwhile; past the end, a prefetch does nothing

inline i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
inline i64 larger(i64 a, i64 b) { return a > b ? a : b; }
inline i64 within(i64 n, i64 most) { return larger(0, smaller(n, most)); }

// Calls f with N as a compile-time constant, so that a kernel's accumulators stay in registers.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <int Max, typename Function>
inline void with_count(i64 n, const Function& f) {
  if constexpr (Max > 1) {
    if (n < Max) return with_count<Max - 1>(n, f);
  }
  f(Count<Max>{});
}

// What is fetched while other work is done: `share` bytes for each part of that work.
struct Ahead {
  const u8* from;
  i64 share;

  void fetch(i64 part) const {
    for (i64 i = 0; i < share; i += 64) prefetch(from + part * share + i);
  }
};

// ---- activations -------------------------------------------------------------------------------------------------

inline F activate(Activation activation, F x) {
  switch (activation) {
    case Activation::gelu: {  // x/2 erfc(-x / sqrt 2)
      const F half = set(0.5f) * erfc_positive(absolute(x) * set(0.70710678f));
      return x * if_less(x, zero(), half, set(1) - half);
    }
    case Activation::gelu_new: {  // (1 + tanh u) / 2 = sigmoid(2u)
      const F u = set(1.59576912f) * fma(set(0.044715f) * x * x, x, x);
      return x * sigmoid(u);
    }
    case Activation::silu:
      return x * sigmoid(x);
    case Activation::relu:
      return max(zero(), x);
    default:
      return x;
  }
}

// What follows a matrix product, for outputs [o, o + n) of a row: bias, activation, residual.
inline void finish(const Linear& l, i64 row, i64 o, i64 n, F sum) {
  if (l.bias) sum = sum + load_first(l.bias + o, n);
  sum = activate(l.activation, sum);
  if (l.residual) sum = sum + load_first(l.residual + row * l.residual_stride + o, n);
  store_first(l.y + row * l.y_stride + o, sum, n);
}

// ---- dense weights -------------------------------------------------------------------------------------------------

// A format's elements in registers. `Element` is a weight, `X` an input, `V` what holds kStep of either; multiply_add
// adds the products of x and w to 16 sums.
//
// In the [in, out] order inputs come in units of kUnit, whose weights for 16 P outputs are P registers (`unit`, in an
// order of outputs that `in_order` undoes), and whose inputs are the 4 bytes that `broadcast` takes.
struct F32 {
  using Element = float;
  using X = float;
  using V = F;
  static constexpr i64 kStep = kLanes, kUnit = 1;
  static const X* input(const Linear& l) { return l.in.x; }
  static i64 stride(const Linear& l) { return l.in.x_stride; }
  static V x(const X* p) { return load(p); }
  static V x_first(const X* p, i64 n) { return load_first(p, n); }
  static V w(const Element* p) { return load(p); }
  static V w_first(const Element* p, i64 n) { return load_first(p, n); }
  static F multiply_add(V x, V w, F sum) { return fma(x, w, sum); }
  static V broadcast(const X* p) { return set(*p); }
  static V stored(const u8* p) { return load(reinterpret_cast<const float*>(p)); }
  static void keep(u8* p, V v) { store(reinterpret_cast<float*>(p), v); }
  template <int P>
  static void unit(const Element* p, i64 n_out, V out[P]) {
    for (int v = 0; v < P; v++) out[v] = load(p + v * kLanes), prefetch(p + v * kLanes + 16 * n_out);
  }
  template <int P>
  static void unit_first(const Element* p, i64, i64, i64 n, V out[P]) {
    for (i64 v = 0; v < P; v++) out[v] = load_first(p + v * kLanes, within(n - v * kLanes, kLanes));
  }
  template <int P>
  static void in_order(F[P]) {}
  static void fetch(const Element* p, i64, i64 line) { prefetch(p + line * 16); }
};

struct F16 : F32 {
  using Element = u16;
  static V w(const Element* p) { return load_f16(p); }
  static V w_first(const Element* p, i64 n) { return load_f16_first(p, n); }
  template <int P>
  static void unit(const Element* p, i64 n_out, V out[P]) {
    for (int v = 0; v < P; v++) out[v] = load_f16(p + v * kLanes), prefetch(p + v * kLanes + 16 * n_out);
  }
  template <int P>
  static void unit_first(const Element* p, i64, i64, i64 n, V out[P]) {
    for (i64 v = 0; v < P; v++) out[v] = load_f16_first(p + v * kLanes, within(n - v * kLanes, kLanes));
  }
  static void fetch(const Element* p, i64, i64 line) { prefetch(p + line * 32); }
};

#if PRONGHORN_ISA_avx512bf16

struct Bf16 {
  using Element = u16;
  using X = u16;
  using V = I;
  static constexpr i64 kStep = 32, kUnit = 2;
  static const X* input(const Linear& l) { return static_cast<const X*>(l.in.values); }
  static i64 stride(const Linear& l) { return l.in.stride; }
  static V x(const X* p) { return load_halves(p, 32); }
  static V x_first(const X* p, i64) { return load_halves(p, 32); }  // inputs are zero up to a multiple of 32
  static V w(const Element* p) { return load_halves(p, 32); }
  static V w_first(const Element* p, i64 n) { return load_halves(p, n); }
  static F multiply_add(V x, V w, F sum) { return dot_pairs(x, w, sum); }
  static V stored(const u8* p) { return load_quads(p); }
  static void keep(u8* p, V v) { store_quads(p, v); }
  static V broadcast(const X* p) {
    i32 pair;
    std::memcpy(&pair, p, sizeof pair);
    return set_int(pair);
  }
  template <int P>
  static void unit(const Element* p, i64 n_out, V out[P]) {
    for (int v = 0; v < P; v += 2) {
      const u16* q = p + v * kLanes;
      prefetch(q + 32 * n_out), prefetch(q + 33 * n_out);
      zip_halves(load_halves(q, 32), load_halves(q + n_out, 32), out[v], out[v + 1]);
    }
  }
  template <int P>
  static void unit_first(const Element* p, i64 n_out, i64 inputs, i64 n, V out[P]) {
    for (i64 v = 0; v < P; v += 2) {
      const u16* q = p + v * kLanes;
      const i64 lanes = within(n - v * kLanes, 32);
      const V odd = inputs > 1 ? load_halves(q + n_out, lanes) : zero_int();
      zip_halves(load_halves(q, lanes), odd, out[v], out[v + 1]);
    }
  }
  template <int P>
  static void in_order(F sums[P]) {
    for (int v = 0; v < P; v += 2) unzip_quads(sums[v], sums[v + 1]);
  }
  static void fetch(const Element* p, i64 n_out, i64 line) { prefetch(p + line % 2 * n_out + line / 2 * 32); }
};

#endif

// [out, in]: R rows times O outputs, lanes are inputs; the sums go to out[r][0..O).
template <typename T, int R, int O>
inline void dot_rows(const typename T::X* x, i64 x_stride, const typename T::Element* w, i64 n_in, Ahead ahead,
                     float* out, i64 out_stride) {
  F sum[R][O];
  for (auto& row : sum)
    for (F& s : row) s = zero();
  i64 i = 0;
  for (; i + T::kStep <= n_in; i += T::kStep) {
    ahead.fetch(i / T::kStep);
    typename T::V wi[O];
    for (int o = 0; o < O; o++) wi[o] = T::w(w + o * n_in + i);
    for (int r = 0; r < R; r++) {
      const auto xi = T::x(x + r * x_stride + i);
      for (int o = 0; o < O; o++) sum[r][o] = T::multiply_add(xi, wi[o], sum[r][o]);
    }
  }
  if (i < n_in) {
    for (int o = 0; o < O; o++) {
      const auto wi = T::w_first(w + o * n_in + i, n_in - i);
      for (int r = 0; r < R; r++)
        sum[r][o] = T::multiply_add(T::x_first(x + r * x_stride + i, n_in - i), wi, sum[r][o]);
    }
  }
  for (int r = 0; r < R; r++) {
    int o = 0;
    if constexpr (O % 4 == 0)
      for (; o < O; o += 4) lanes_sums(sum[r] + o, out + r * out_stride + o);
    for (; o < O; o++) out[r * out_stride + o] = lanes_sum(sum[r][o]);
  }
}

template <typename T>
void linear_out_in(const Linear& l, i64 begin, i64 end) {
  const i64 n_in = l.w->n_in, x_stride = T::stride(l), row_bytes = n_in * i64(sizeof(typename T::Element));
  const auto* w = reinterpret_cast<const typename T::Element*>(l.w->data);
  // A block of outputs stays in the second cache while all rows pass, and the next one comes.
  constexpr i64 kRows = 4;
  const i64 most = larger(1, smaller(4, (256 << 10) / row_bytes / kPanel)) * kPanel;
  const i64 passes = div_up(l.n_rows, kRows);
  for (i64 block = begin; block < end; block += most) {
    const i64 block_end = smaller(end, block + most);
    for (i64 row = 0; row < l.n_rows; row += kRows) {
      const i64 rows = smaller(kRows, l.n_rows - row);
      const auto* x = T::input(l) + row * x_stride;
      for (i64 o = block; o < block_end; o += kPanel) {
        const i64 n = smaller(kPanel, block_end - o);
        alignas(64) float sums[kRows][kPanel];
        with_count<kRows>(rows, [&](auto count) {
          // As many sums as the registers hold beside what goes into them.
          constexpr int R = decltype(count)::value, O = kRegisters > 8 ? (R == 1 ? 8 : 4) : R == 1 ? 4 : R == 4 ? 1 : 2;
          const auto dots = [&](i64 j, auto outputs) {
            constexpr int N = decltype(outputs)::value;
            const i64 done = (row / kRows * most + o - block + j) / passes;  // of the next block
            const i64 first = passes == 1 ? o + j + N : block_end + done;
            const Ahead ahead{l.w->data + first * row_bytes, N * T::kStep * i64(sizeof(*w)) / passes};
            dot_rows<T, R, N>(x, x_stride, w + (o + j) * n_in, n_in, ahead, &sums[0][j], kPanel);
          };
          i64 j = 0;
          for (; j + O <= n; j += O) dots(j, Count<O>{});
          for (; j < n; j++) dots(j, Count<1>{});
        });
        for (i64 r = 0; r < rows; r++) finish(l, row + r, o, n, load_first(sums[r], n));
      }
    }
  }
}

// [in, out]: lanes are outputs. R rows times P registers of outputs, for units whose weights `next` gives.
template <typename T, int R, int P, typename Next>
inline void add_units(const typename T::X* x, i64 x_stride, i64 n_units, float* sums, i64 width, bool start,
                      const Next& next) {
  F sum[R][P];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < P; v++) sum[r][v] = start ? zero() : load(sums + r * width + v * kLanes);
#pragma GCC unroll 4
  for (i64 u = 0; u < n_units; u++) {
    typename T::V w[P];
    next(u, w);
    for (int r = 0; r < R; r++) {
      const auto xu = T::broadcast(x + r * x_stride + u * T::kUnit);
      for (int v = 0; v < P; v++) sum[r][v] = T::multiply_add(xu, w[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < P; v++) store(sums + r * width + v * kLanes, sum[r][v]);
}

template <typename T, int P>
inline void finish_sums(const Linear& l, i64 row, i64 n_rows, i64 o, i64 n, const float* sums, i64 width) {
  for (i64 r = 0; r < n_rows; r++)
    for (i64 v = 0; v < n; v += P * kLanes) {
      F sum[P];
      for (int k = 0; k < P; k++) sum[k] = load(sums + r * width + v + k * kLanes);
      T::template in_order<P>(sum);
      for (i64 k = 0; k < P && v + k * kLanes < n; k++)
        finish(l, row + r, o + v + k * kLanes, smaller(kLanes, n - v - k * kLanes), sum[k]);
    }
}

// Few rows: straight from the weights as they stand, a strip of outputs for some inputs at a time.
template <typename T, int R>
void in_out_few(const Linear& l, i64 begin, i64 end, float* sums) {
  constexpr int P = kRegisters > 8 ? 4 : R == 1 ? 4 : R == 2 ? 2 : 1;
  constexpr i64 kInputs = 16, kStrip = 4096 / R / 64 * 64;
  const i64 n_in = l.w->n_in, n_out = l.w->n_out, x_stride = T::stride(l);
  const auto* weights = reinterpret_cast<const typename T::Element*>(l.w->data);
  for (i64 o = begin; o < end; o += kStrip) {
    const i64 n = smaller(kStrip, end - o), width = round_up(n, P * kLanes);
    for (i64 i = 0; i < n_in; i += kInputs) {
      const i64 inputs = smaller(kInputs, n_in - i);
      const auto* x = T::input(l) + i;
      for (i64 v = 0; v < n; v += P * kLanes) {
        const auto* w = weights + i * n_out + o + v;
        const i64 outputs = n - v;
        if (inputs == kInputs && outputs >= P * kLanes) {
          add_units<T, R, P>(
              x, x_stride, kInputs / T::kUnit, sums + v, width, i == 0,
              [&](i64 u, typename T::V out[P]) { T::template unit<P>(w + u * T::kUnit * n_out, n_out, out); });
        } else {
          add_units<T, R, P>(
              x, x_stride, div_up(inputs, T::kUnit), sums + v, width, i == 0, [&](i64 u, typename T::V out[P]) {
                T::template unit_first<P>(w + u * T::kUnit * n_out, n_out, inputs - u * T::kUnit, outputs, out);
              });
        }
      }
    }
    finish_sums<T, P>(l, 0, R, o, n, sums, width);
  }
}

// Many rows: a strip's weights are first laid side by side.
template <typename T>
void in_out_many(const Linear& l, i64 begin, i64 end, void* scratch) {
  using V = typename T::V;
  constexpr int P = kRegisters > 8 ? 4 : 1;
  constexpr i64 kRows = 6, kUnits = 2048, kMany = 512, kWidth = P * kLanes;
  constexpr i64 kLines = kWidth * T::kUnit * i64(sizeof(typename T::Element)) / 64;  // in a unit
  static_assert((kUnits + kMany) * kWidth * 4 <= kScratch);
  const i64 n_out = l.w->n_out, x_stride = T::stride(l), n_units = div_up(l.w->n_in, T::kUnit);
  const auto* weights = reinterpret_cast<const typename T::Element*>(l.w->data);
  auto* strip = static_cast<u8*>(scratch);
  auto* sums = static_cast<float*>(scratch) + kUnits * kWidth;
  for (i64 o = begin; o < end; o += kWidth) {
    const i64 n = smaller(kWidth, end - o);
    for (i64 first_row = 0; first_row < l.n_rows; first_row += kMany) {
      const i64 n_rows = smaller(kMany, l.n_rows - first_row);
      for (i64 first = 0; first < n_units; first += kUnits) {
        const i64 units = smaller(kUnits, n_units - first);
        for (i64 u = 0; u < units; u++) {
          const i64 i = (first + u) * T::kUnit;
          V out[P];
          if (n == kWidth && i + T::kUnit <= l.w->n_in)
            T::template unit<P>(weights + i * n_out + o, n_out, out);
          else
            T::template unit_first<P>(weights + i * n_out + o, n_out, l.w->n_in - i, n, out);
          for (int v = 0; v < P; v++) T::keep(strip + (u * P + v) * kPanel * 4, out[v]);
        }
        const i64 lines = div_up(kLines, div_up(n_rows, kRows));  // of the next strip, fetched with each unit
        for (i64 row = 0; row < n_rows; row += kRows) {
          const auto* x = T::input(l) + (first_row + row) * x_stride + first * T::kUnit;
          const auto* next = weights + first * T::kUnit * n_out + o + kWidth;
          const i64 from = row / kRows * lines, to = smaller(from + lines, kLines);
          const auto stored = [&](i64 u, V out[P]) {
            for (int v = 0; v < P; v++) out[v] = T::stored(strip + (u * P + v) * kPanel * 4);
            for (i64 line = from; line < to; line++) T::fetch(next + u * T::kUnit * n_out, n_out, line);
          };
          with_count<kRows>(smaller(kRows, n_rows - row), [&](auto count) {
            constexpr int R = decltype(count)::value;
            add_units<T, R, P>(x, x_stride, units, sums + row * kWidth, kWidth, first == 0, stored);
          });
        }
      }
      finish_sums<T, P>(l, first_row, n_rows, o, n, sums, kWidth);
    }
  }
}

template <typename T>
void linear_dense(const Linear& l, i64 begin, i64 end, void* scratch) {
  constexpr i64 kFew = kRegisters > 8 ? 6 : 4;
  if (l.w->order == Order::out_in) return linear_out_in<T>(l, begin, end);
  if (l.n_rows > kFew) return in_out_many<T>(l, begin, end, scratch);
  with_count<kFew>(l.n_rows, [&](auto count) {
    in_out_few<T, decltype(count)::value>(l, begin, end, static_cast<float*>(scratch));
  });
}

// ---- bf16 in the order of tiles ------------------------------------------------------------------------------------

#if !PRONGHORN_ISA_avx512bf16

// 32 inputs of a panel of 16 outputs as pairs: out[j] has inputs (2j, 2j + 1) of each output; zero past the edges.
inline void load_pairs(const Matrix& w, i64 i, i64 o, I out[16]) {
  const auto* data = reinterpret_cast<const u16*>(w.data);
  const i64 inputs = smaller(32, w.n_in - i), outputs = smaller(kPanel, w.n_out - o);
  if (w.order == Order::out_in) {
    if (inputs == 32 && outputs == 16) {
      const u16* p = data + o * w.n_in + i;
      const auto* next =
          reinterpret_cast<const u8*>(data + (o + 16) * w.n_in + 16 * i);  // the panel after this, evenly
      for (i64 r = 0; r < 16; r++) prefetch(next + 64 * r);
      return load_transposed(p, w.n_in, out);
    }
    for (i64 r = 0; r < 16; r++)
      out[r] = r < outputs ? load_pairs_first(data + (o + r) * w.n_in + i, inputs) : zero_int();
    transpose(out);
  } else {
    const u16* p = data + i * w.n_out + o;
    for (i64 j = 0; j < 16; j++, p += 2 * w.n_out) {
      const I even = load_halves_first(p, 2 * j < inputs ? outputs : 0);
      out[j] = pair_halves(even, load_halves_first(p + w.n_out, 2 * j + 1 < inputs ? outputs : 0));
    }
  }
}

#if PRONGHORN_ISA_amx

void linear_bf16(const Linear& l, i64 begin, i64 end, void* scratch) {
  // Two panels of weights as pairs, then 16 rows of each of four tiles of sums.
  const i64 n_in = l.w->n_in, blocks = div_up(n_in, 32);
  constexpr i64 kBlocks = kMaxInputs / 32;  // two panels are the whole of the scratch memory
  static_assert(2 * kBlocks * 1024 <= kScratch);
  auto* panels = static_cast<u8*>(scratch);
  const auto* x = static_cast<const u16*>(l.in.values);
  alignas(64) float sums[16][kPanel];
  TileShapes shapes;
  for (int t = 0; t < 8; t++) shapes.set(t, 16, 64);
  tiles_begin(shapes);
  for (i64 o = begin; o < end; o += 2 * kPanel) {
    const i64 n_panels = o + kPanel < end ? 2 : 1;
    for (i64 p = 0; p < n_panels; p++)
      for (i64 b = 0; b < blocks; b++) {
        I pairs[16];
        load_pairs(*l.w, 32 * b, o + p * kPanel, pairs);
        std::memcpy(panels + (p * kBlocks + b) * 1024, pairs, 1024);
      }
    for (i64 row = 0; row < l.n_rows; row += 32) {
      const bool two_rows = row + 16 < l.n_rows, two_panels = n_panels == 2;
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      for (i64 b = 0; b < blocks; b++) {
        tile_load<4>(x + row * l.in.stride + 32 * b, l.in.stride * 2);
        if (two_rows) tile_load<5>(x + (row + 16) * l.in.stride + 32 * b, l.in.stride * 2);
        tile_load<6>(panels + b * 1024, 64);
        if (two_panels) tile_load<7>(panels + (kBlocks + b) * 1024, 64);
        tile_dot_bf16<0, 4, 6>();
        if (two_panels) tile_dot_bf16<1, 4, 7>();
        if (two_rows) tile_dot_bf16<2, 5, 6>();
        if (two_rows && two_panels) tile_dot_bf16<3, 5, 7>();
      }
      const auto write = [&](i64 first_row, i64 first_output) {
        const i64 n = smaller(kPanel, end - first_output);
        for (i64 r = 0; r < smaller(16, l.n_rows - first_row); r++)
          finish(l, first_row + r, first_output, n, load_first(sums[r], n));
      };
      tile_store<0>(sums, 64), write(row, o);
      if (two_panels) tile_store<1>(sums, 64), write(row, o + kPanel);
      if (two_rows) tile_store<2>(sums, 64), write(row + 16, o);
      if (two_rows && two_panels) tile_store<3>(sums, 64), write(row + 16, o + kPanel);
    }
  }
  tiles_end();
}

#else

// The [in, out] order's few rows: as linear_in_out, 32 inputs at a time, straight from the weights.
void linear_bf16_in_out(const Linear& l, i64 begin, i64 end, float* scratch) {
  const i64 n_in = l.w->n_in, n_out = l.w->n_out, width = round_up(n_in, 32);
  const auto* w = reinterpret_cast<const u16*>(l.w->data);
  float* x = scratch;  // [width], widened
  float* sums = scratch + width;
  constexpr i64 kStrip = 4096;
  for (i64 row = 0; row < l.n_rows; row++) {
    const auto* values = static_cast<const u16*>(l.in.values) + row * l.in.stride;
    for (i64 i = 0; i < width; i += kLanes) store(x + i, load_bf16(values + i));
    for (i64 o = begin; o < end; o += kStrip) {
      const i64 n = smaller(kStrip, end - o);
      std::memset(sums, 0, size_t(round_up(n, kLanes)) * sizeof(float));
      for (i64 i = 0; i < n_in; i += 32) {
        const i64 inputs = smaller(32, n_in - i);
        for (i64 v = 0; v < n; v += kLanes) {
          const u16* p = w + i * n_out + o + v;
          const i64 lanes = smaller(kLanes, n - v);
          F even = zero(), odd = zero();
          if (inputs == 32 && lanes == kLanes) {
#pragma GCC unroll 8
            for (i64 j = 0; j < 16; j++, p += 2 * n_out) {
              prefetch(p + 32 * n_out);
              even = fma(set(x[i + 2 * j]), load_bf16(p), even);
              prefetch(p + 33 * n_out);
              odd = fma(set(x[i + 2 * j + 1]), load_bf16(p + n_out), odd);
            }
          } else {
            for (i64 j = 0; j < inputs; j++, p += n_out) {
              F& sum = j % 2 ? odd : even;
              sum = fma(set(x[i + j]), load_bf16_first(p, lanes), sum);
            }
            even = even + zero(), odd = odd + zero();  // as zeros at the end do: -0 becomes 0
          }
          store(sums + v, load(sums + v) + (even + odd));
        }
      }
      for (i64 v = 0; v < n; v += kLanes) finish(l, row, o + v, smaller(kLanes, n - v), load(sums + v));
    }
  }
}

void linear_bf16(const Linear& l, i64 begin, i64 end, void* scratch) {
  if (l.w->order == Order::in_out && l.n_rows == 1)
    return linear_bf16_in_out(l, begin, end, static_cast<float*>(scratch));
  constexpr i64 kRows = kRegisters == 8 ? 2 : 4,
                kMany = 32;  // rows whose inputs stay in the second cache while a panel passes
  const i64 n_in = l.w->n_in, width = round_up(n_in, 32);
  auto* x = static_cast<float*>(scratch);  // [kMany][width], widened
  const i64 many = larger(1, smaller(kMany, kScratch / 8 / (width * 4)));
  auto* sums = x + many * width;  // [many][kPanel]
  for (i64 first_row = 0; first_row < l.n_rows; first_row += many) {
    const i64 n_rows = smaller(many, l.n_rows - first_row);
    const auto* values = static_cast<const u16*>(l.in.values) + first_row * l.in.stride;
    for (i64 r = 0; r < n_rows; r++)
      for (i64 i = 0; i < width; i += kLanes) store(x + r * width + i, load_bf16(values + r * l.in.stride + i));
    for (i64 o = begin; o < end; o += kPanel) {
      std::memset(sums, 0, size_t(n_rows * kPanel) * sizeof(float));
      for (i64 i = 0; i < n_in; i += 32) {
        I pairs[16];
        load_pairs(*l.w, i, o, pairs);
        for (i64 row = 0; row < n_rows; row += kRows) {
          with_count<kRows>(smaller(kRows, n_rows - row), [&](auto count) {
            constexpr int R = decltype(count)::value;
            const float* xi = x + row * width + i;
            F even[R], odd[R];
            for (int r = 0; r < R; r++) even[r] = odd[r] = zero();
#pragma GCC unroll 4
            for (int j = 0; j < 16; j++) {
              const F we = even_halves(pairs[j]), wo = odd_halves(pairs[j]);
              for (int r = 0; r < R; r++) {
                even[r] = fma(set(xi[r * width + 2 * j]), we, even[r]);
                odd[r] = fma(set(xi[r * width + 2 * j + 1]), wo, odd[r]);
              }
            }
            for (int r = 0; r < R; r++) {
              float* sum = sums + (row + r) * kPanel;
              store(sum, load(sum) + (even[r] + odd[r]));
            }
          });
        }
      }
      const i64 n = smaller(kPanel, end - o);
      for (i64 r = 0; r < n_rows; r++) finish(l, first_row + r, o, n, load_first(sums + r * kPanel, n));
    }
  }
}

#endif

#endif

// ---- int8 and int4 -----------------------------------------------------------------------------------------------

enum class Kind { int8, int4, int4_symmetric };

inline Kind kind_of(const Matrix& w) {
  return w.format == Format::int8 ? Kind::int8 : w.symmetric ? Kind::int4_symmetric : Kind::int4;
}
template <Kind K>
constexpr bool kNibbles = K != Kind::int8;
// Inputs in a unit of 64 bytes of a panel.
template <Kind K>
constexpr i64 kUnit = kNibbles<K> ? 8 : 4;

inline F load_scales(const Matrix& w, const u8* panel, i64 g) {
  return w.group == 0 ? load(reinterpret_cast<const float*>(panel)) : load_f16(panel + g * kPanel * 2);
}
template <Kind K>
inline F load_minima(const PanelLayout& layout, const u8* panel, i64 g) {
  return K == Kind::int4 ? load_f16(panel + layout.minima + g * kPanel * 2) : zero();
}

// What a group's integer sums start from, given the sum of its inputs: w = scale (stored - 128), or scale (q - 8).
template <Kind K>
inline I start_of(i32 sum) {
  return K == Kind::int4 ? zero_int() : set_int((K == Kind::int8 ? -kBytesOffset : -8) * sum);
}
// Adds one group's integer sums to the outputs' totals; for int4, w = scale q + minimum.
template <Kind K>
inline F add_group(F scales, F minima, I dots, float scale, i32 sum, F total) {
  total = fma(to_float(dots), scales * set(scale), total);
  return K == Kind::int4 ? fma(minima, set(scale) * to_float(set_int(sum)), total) : total;
}

// Whether a row's quads are widened before they are multiplied.
template <Kind K>
constexpr bool kWidens = K == Kind::int8 && sizeof(ByteQuad) > sizeof(i32);
template <Kind K>
constexpr i64 kQuadSize = kWidens<K> ? sizeof(ByteQuad) : sizeof(i32);

// P panels for R rows, whose quads are at `x`, `x_stride` bytes apart. Groups of U units are unrolled (0: of any size).
template <Kind K, int R, int P, int U>
inline void quantized_rows(const Linear& l, const PanelLayout& layout, const u8* panel, i64 o, i64 end, i64 row,
                           const u8* x, i64 x_stride, Ahead ahead) {
  const Matrix& w = *l.w;
  const i64 group = w.group ? w.group : round_up(w.n_in, 4);
  const float* x_scales = l.in.scales + row * layout.n_groups;
  const i32* x_sums = l.in.sums + row * layout.n_groups;
  F total[R][P];
  for (auto& row_totals : total)
    for (F& t : row_totals) t = zero();
  const auto add = [&](i64 g, i64 n_units, auto unrolled) {
    constexpr int N = decltype(unrolled)::value;
    const u8* values = panel + layout.values + g * (group / kUnit<K>)*64;
    const u8* xg = x + g * (group / 4) * kQuadSize<K>;
    ahead.fetch(g);
    I dots[R][P];
    for (int r = 0; r < R; r++)
      for (int p = 0; p < P; p++) dots[r][p] = start_of<K>(x_sums[r * layout.n_groups + g]);
    const auto quad = [&](int r, i64 q) {
      const u8* at = xg + r * x_stride + q * kQuadSize<K>;
      if constexpr (kWidens<K>) {
        return *reinterpret_cast<const ByteQuad*>(at);
      } else {
        i32 v;
        std::memcpy(&v, at, sizeof v);
        return v;
      }
    };
    const auto units = [&](i64 first_unit, i64 n) {  // at most 4
      if constexpr (kNibbles<K>) {
        Nibbles sums[R][P];
        for (int r = 0; r < R; r++)
          for (int p = 0; p < P; p++) sums[r][p] = begin_nibbles(dots[r][p]);
#pragma GCC unroll 4
        for (i64 u = first_unit; u < first_unit + n; u++)
          for (int p = 0; p < P; p++) {
            const Quads v = load_quads(values + p * layout.size + 64 * u), low = low_nibbles(v), high = high_nibbles(v);
            for (int r = 0; r < R; r++) {
              sums[r][p] = dot_nibbles(sums[r][p], low, quad(r, 2 * u));
              sums[r][p] = dot_nibbles(sums[r][p], high, quad(r, 2 * u + 1));
            }
          }
        for (int r = 0; r < R; r++)
          for (int p = 0; p < P; p++) dots[r][p] = end_nibbles(dots[r][p], sums[r][p]);
      } else {
#pragma GCC unroll 4
        for (i64 u = first_unit; u < first_unit + n; u++) {
          Quads v[P];
          for (int p = 0; p < P; p++) v[p] = load_quads(values + p * layout.size + 64 * u);
          for (int r = 0; r < R; r++) {
            const auto q = quad(r, u);
            for (int p = 0; p < P; p++) dots[r][p] = dot_bytes(dots[r][p], v[p], q);
          }
        }
      }
    };
    if constexpr (N > 0) {
#pragma GCC unroll 4
      for (i64 u = 0; u < N; u += 4) units(u, 4);
    } else {
      i64 u = 0;
      for (; u + 4 <= n_units; u += 4) units(u, 4);
      if (u < n_units) units(u, n_units - u);
    }
    for (int p = 0; p < P; p++) {
      const u8* at = panel + p * layout.size;
      const F scales = load_scales(w, at, g), minima = load_minima<K>(layout, at, g);
      for (int r = 0; r < R; r++) {
        const i64 i = r * layout.n_groups + g;
        total[r][p] = add_group<K>(scales, minima, dots[r][p], x_scales[i], x_sums[i], total[r][p]);
      }
    }
  };
  const i64 whole = w.group ? w.n_in / group : 0;
  for (i64 g = 0; g < whole; g++) add(g, group / kUnit<K>, Count<U>{});
  for (i64 g = whole; g < layout.n_groups; g++) add(g, div_up(w.n_in - g * group, kUnit<K>), Count<0>{});
  for (int r = 0; r < R; r++)
    for (i64 p = 0; p < P; p++) finish(l, row + r, o + p * kPanel, smaller(kPanel, end - o - p * kPanel), total[r][p]);
}

// Rows [first_row, first_row + n_rows) of outputs [begin, end); their quads are at `x`.
template <Kind K>
void quantized_panels(const Linear& l, i64 begin, i64 end, i64 first_row, i64 n_rows, const u8* x, i64 x_stride) {
  const Matrix& w = *l.w;
  const PanelLayout layout = panel_layout(w.format, w.n_in, w.group, w.symmetric);
  const i64 units = w.group / kUnit<K>;
  constexpr i64 kRows = 4, kPanels = kRegisters > 8 ? 2 : 1;
  const i64 width = n_rows > 1 ? kPanels * kPanel : kPanel, passes = div_up(n_rows, kRows);
  for (i64 o = begin; o < end; o += width) {
    const u8* panel = w.data + o / kPanel * layout.size;
    for (i64 i = 0; i < n_rows; i += kRows)
      with_count<kRows>(smaller(kRows, n_rows - i), [&](auto count) {
        constexpr int R = decltype(count)::value;
        const i64 row = first_row + i;
        const u8* xi = x + i * x_stride;
        const auto run = [&](i64 at, auto panels) {
          constexpr int P = decltype(panels)::value;
          const u8* from = panel + (at - o) / kPanel * layout.size;
          // For one pass evenly what is some way ahead; for several, each a part of the panels after these.
          const i64 bytes = P * layout.size / passes;
          const u8* next = passes == 1 ? from + (kNibbles<K> || kRegisters == 8 ? 2 : 1) * kAhead
                                       : from + P * layout.size + i / kRows * bytes;
          const Ahead ahead{next, bytes / layout.n_groups};
          // Groups of the usual sizes are unrolled, where registers are few for one row and for nibbles only.
          if constexpr (kRegisters > 8 || (kRegisters == 8 && (R == 1 || kNibbles<K>))) {
            if (units == 4) return quantized_rows<K, R, P, 4>(l, layout, from, at, end, row, xi, x_stride, ahead);
            if (units == 8) return quantized_rows<K, R, P, 8>(l, layout, from, at, end, row, xi, x_stride, ahead);
            if (units == 16) return quantized_rows<K, R, P, 16>(l, layout, from, at, end, row, xi, x_stride, ahead);
          }
          quantized_rows<K, R, P, 0>(l, layout, from, at, end, row, xi, x_stride, ahead);
        };
        if constexpr (kPanels > 1)
          if (width > kPanel && o + width - kPanel < end) return run(o, Count<kPanels>{});
        for (i64 at = o; at < smaller(end, o + width); at += kPanel) run(at, Count<1>{});
      });
  }
}

template <Kind K>
void linear_quantized(const Linear& l, i64 begin, i64 end, void* scratch) {
  if constexpr (kWidens<K>) {
    // As many rows at a time as fit into the scratch memory.
    const i64 stride = l.in.stride / 4 * kQuadSize<K>, many = kScratch / stride / 4 * 4;
    for (i64 row = 0; row < l.n_rows; row += many) {
      const i64 n_rows = smaller(many, l.n_rows - row);
      widen_quads(static_cast<const u8*>(l.in.values) + row * l.in.stride, n_rows * l.in.stride,
                  static_cast<ByteQuad*>(scratch));
      quantized_panels<K>(l, begin, end, row, n_rows, static_cast<const u8*>(scratch), stride);
    }
  } else {
    quantized_panels<K>(l, begin, end, 0, l.n_rows, static_cast<const u8*>(l.in.values), l.in.stride);
  }
}

#if PRONGHORN_ISA_amx

// The same on tiles: 16 rows times one panel; integers are exact, so the result is the same to the bit.
template <Kind K>
void linear_quantized_tiles(const Linear& l, i64 begin, i64 end, void* scratch) {
  const Matrix& w = *l.w;
  const PanelLayout layout = panel_layout(w.format, w.n_in, w.group, w.symmetric);
  const i64 group = w.group ? w.group : round_up(w.n_in, 4);
  const i64 step = smaller(64, group);          // inputs in a tile; zeros in x make what lies past a group's end vanish
  auto* totals = static_cast<float*>(scratch);  // [rows][kPanel]
  auto* unpacked = static_cast<u8*>(scratch) + kScratch / 2;  // a panel's group in 8 bits
  alignas(64) i32 dots[2][16][kPanel];
  TileShapes shapes;
  for (int t = 0; t < 2; t++) shapes.set(t, 16, 64);
  for (int t = 2; t < 4; t++) shapes.set(t, 16, step);
  shapes.set(4, step / 4, 64);
  constexpr i64 kMany = 512;
  tiles_begin(shapes);
  for (i64 o = begin; o < end; o += kPanel) {
    const u8* panel = w.data + o / kPanel * layout.size;
    const i64 n = smaller(kPanel, end - o);
    for (i64 first_row = 0; first_row < l.n_rows; first_row += kMany) {
      const i64 n_rows = smaller(kMany, l.n_rows - first_row);
      const auto* x = static_cast<const std::int8_t*>(l.in.values) + first_row * l.in.stride;
      std::memset(totals, 0, size_t(n_rows * kPanel) * sizeof(float));
      for (i64 g = 0; g < layout.n_groups; g++) {
        const i64 inputs = smaller(group, w.n_in - g * group);
        const u8* values = panel + layout.values + g * (group / kUnit<K>)*64;
        if constexpr (kNibbles<K>) {
          for (i64 u = 0; u < div_up(inputs, 8); u++) {
            const Quads v = load_quads(values + 64 * u);
            store_quads(unpacked + 128 * u, low_nibbles(v));
            store_quads(unpacked + 128 * u + 64, high_nibbles(v));
          }
          values = unpacked;
        }
        const F scales = load_scales(w, panel, g), minima = load_minima<K>(layout, panel, g);
        for (i64 row = 0; row < n_rows; row += 32) {
          const bool two = row + 16 < n_rows;
          tile_zero<0>(), tile_zero<1>();
          for (i64 i = 0; i < inputs; i += step) {
            tile_load<4>(values + i / 4 * 64, 64);
            tile_load<2>(x + row * l.in.stride + g * group + i, l.in.stride);
            tile_dot_su8<0, 2, 4>();
            if (!two) continue;
            tile_load<3>(x + (row + 16) * l.in.stride + g * group + i, l.in.stride);
            tile_dot_su8<1, 3, 4>();
          }
          tile_store<0>(dots[0], 64);
          if (two) tile_store<1>(dots[1], 64);
          for (i64 r = 0; r < smaller(32, n_rows - row); r++) {
            const i64 at = (first_row + row + r) * layout.n_groups + g;
            float* total = totals + (row + r) * kPanel;
            const I sums = add_int(load_int(dots[r / 16][r % 16]), start_of<K>(l.in.sums[at]));
            store(total, add_group<K>(scales, minima, sums, l.in.scales[at], l.in.sums[at], load(total)));
          }
        }
      }
      for (i64 r = 0; r < n_rows; r++) finish(l, first_row + r, o, n, load(totals + r * kPanel));
    }
  }
  tiles_end();
}

#endif

template <Kind K>
void linear_quantized_any(const Linear& l, i64 begin, i64 end, void* scratch) {
#if PRONGHORN_ISA_amx
  if (l.n_rows >= 4) return linear_quantized_tiles<K>(l, begin, end, scratch);
#endif
  linear_quantized<K>(l, begin, end, scratch);
}

void linear(const Linear& l, i64 begin, i64 end, void* scratch) {
  switch (l.w->format) {
    case Format::f32:
      return linear_dense<F32>(l, begin, end, scratch);
    case Format::f16:
      return linear_dense<F16>(l, begin, end, scratch);
    case Format::bf16:
#if PRONGHORN_ISA_avx512bf16
      return linear_dense<Bf16>(l, begin, end, scratch);
#else
      return linear_bf16(l, begin, end, scratch);
#endif
    case Format::int8:
    case Format::int4:
      break;
  }
  switch (kind_of(*l.w)) {
    case Kind::int8:
      return linear_quantized_any<Kind::int8>(l, begin, end, scratch);
    case Kind::int4:
      return linear_quantized_any<Kind::int4>(l, begin, end, scratch);
    case Kind::int4_symmetric:
      return linear_quantized_any<Kind::int4_symmetric>(l, begin, end, scratch);
  }
}

// ---- a linear's input in its weights' form -----------------------------------------------------------------------

void quantize_rows(const float* x, i64 x_stride, i64 n_in, i64 group, std::int8_t* values, i64 stride, float* scales,
                   std::int32_t* sums, i64 begin, i64 end) {
  if (group == 0) group = n_in;
  const i64 n_groups = div_up(n_in, group);
  for (i64 row = begin; row < end; row++) {
    const float* xr = x + row * x_stride;
    std::int8_t* out = values + row * stride;
    for (i64 g = 0; g < n_groups; g++) {
      const i64 first_input = g * group, last = smaller(n_in, first_input + group);
      F largest = zero(),
        bad = zero();  // what is not finite makes `bad` NaN, and with it the scale: it must not vanish
      for (i64 i = first_input; i < last; i += kLanes) {
        const F v = load_first(xr + i, smaller(kLanes, last - i));
        largest = max(absolute(v), largest);
        bad = fma(v, zero(), bad);
      }
      const float top = lanes_max(largest), inverse = top > 1e-36f ? 127 / top : 0;  // smaller: no finite inverse
      i32 sum = 0;
      for (i64 i = first_input; i < last; i += kLanes) {
        const i64 n = smaller(kLanes, last - i);
        sum += store_int8_first(out + i, load_first(xr + i, n) * set(inverse), n);
      }
      scales[row * n_groups + g] = top / 127 + lanes_sum(bad);
      sums[row * n_groups + g] = sum;
    }
    std::memset(out + n_in, 0, size_t(stride - n_in));
  }
}

void round_rows(const float* x, i64 x_stride, i64 n_in, std::uint16_t* values, i64 stride, i64 begin, i64 end) {
  for (i64 row = begin; row < end; row++) {
    for (i64 i = 0; i < n_in; i += kLanes) {
      const i64 n = smaller(kLanes, n_in - i);
      store_bf16_first(values + row * stride + i, load_first(x + row * x_stride + i, n), n);
    }
    std::memset(values + row * stride + n_in, 0, size_t(stride - n_in) * 2);
  }
}

// ---- rows --------------------------------------------------------------------------------------------------------

// One row of a table, 16 inputs from i on.
inline F table_values(const Matrix& w, i64 row, i64 i, i64 n) {
  switch (w.format) {
    case Format::f32:
      return load_first(reinterpret_cast<const float*>(w.data) + row * w.n_in + i, n);
    case Format::f16:
      return load_f16_first(w.data + (row * w.n_in + i) * 2, n);
    case Format::bf16:
      return load_bf16_first(w.data + (row * w.n_in + i) * 2, n);
    default:
      break;
  }
  const PanelLayout layout = panel_layout(w.format, w.n_in, w.group, w.symmetric);
  const u8* panel = w.data + row / kPanel * layout.size;
  const i64 lane = row % kPanel, group = w.group ? w.group : w.n_in;
  const auto half = [&](const u8* p, i64 g) {
    u16 v;
    std::memcpy(&v, p + (g * kPanel + lane) * 2, 2);
    return from_f16(v);
  };
  alignas(64) float out[kLanes] = {};
  for (i64 k = 0; k < n; k++) {
    const i64 input = i + k, g = input / group, at = input % group;
    if (w.format == Format::int8) {
      float scale;
      if (w.group == 0)
        std::memcpy(&scale, panel + lane * 4, 4);
      else
        scale = half(panel, g);
      out[k] = scale * float(i32(panel[layout.values + input / 4 * 64 + lane * 4 + input % 4]) - 128);
    } else {
      const u8 byte = panel[layout.values + (g * (group / 8) + at / 8) * 64 + lane * 4 + at % 4];
      const float q = float(at % 8 < 4 ? byte & 15 : byte >> 4), scale = half(panel, g);
      out[k] = w.symmetric ? scale * (q - 8) : scale * q + half(panel + layout.minima, g);
    }
  }
  return load(out);
}

void embed(const Matrix& table, const std::int32_t* ids, float* y, i64 y_stride, bool add, i64 begin, i64 end) {
  for (i64 row = begin; row < end; row++)
    for (i64 i = 0; i < table.n_in; i += kLanes) {
      const i64 n = smaller(kLanes, table.n_in - i);
      float* out = y + row * y_stride + i;
      const F v = table_values(table, ids[row], i, n);
      store_first(out, add ? load_first(out, n) + v : v, n);
    }
}

void layer_norm(const float* x, i64 x_stride, const float* weight, const float* bias, float eps, i64 width, float* y,
                i64 y_stride, i64 begin, i64 end) {
  for (i64 row = begin; row < end; row++) {
    const float* xr = x + row * x_stride;
    F sum = zero();
    for (i64 i = 0; i < width; i += kLanes) sum = sum + load_first(xr + i, smaller(kLanes, width - i));
    const F mean = set(lanes_sum(sum) / float(width));
    F squares = zero();
    for (i64 i = 0; i < width; i += kLanes) {
      const i64 n = smaller(kLanes, width - i);
      const F d = keep_first(load_first(xr + i, n) - mean, n);
      squares = fma(d, d, squares);
    }
    const F scale = set(1) / square_root(set(lanes_sum(squares) / float(width) + eps));
    for (i64 i = 0; i < width; i += kLanes) {
      const i64 n = smaller(kLanes, width - i);
      const F shift = bias ? load_first(bias + i, n) : zero();
      const F normal = (load_first(xr + i, n) - mean) * scale;
      store_first(y + row * y_stride + i, fma(normal, load_first(weight + i, n), shift), n);
    }
  }
}

void rms_norm(const float* x, i64 x_stride, const float* weight, float eps, i64 width, i64 runs, float* y, i64 y_stride,
              i64 begin, i64 end) {
  for (i64 item = begin * runs; item < end * runs; item++) {
    const float* xr = x + item / runs * x_stride + item % runs * width;
    float* yr = y + item / runs * y_stride + item % runs * width;
    F squares = zero();
    for (i64 i = 0; i < width; i += kLanes) {
      const F v = load_first(xr + i, smaller(kLanes, width - i));
      squares = fma(v, v, squares);
    }
    const F scale = set(1) / square_root(set(lanes_sum(squares) / float(width) + eps));
    for (i64 i = 0; i < width; i += kLanes) {
      const i64 n = smaller(kLanes, width - i);
      store_first(yr + i, load_first(xr + i, n) * scale * load_first(weight + i, n), n);
    }
  }
}

void gate(const float* g, i64 g_stride, const float* up, i64 up_stride, Activation activation, i64 width, float* y,
          i64 y_stride, i64 begin, i64 end) {
  for (i64 row = begin; row < end; row++)
    for (i64 i = 0; i < width; i += kLanes) {
      const i64 n = smaller(kLanes, width - i);
      const F a = activate(activation, load_first(g + row * g_stride + i, n));
      store_first(y + row * y_stride + i, a * load_first(up + row * up_stride + i, n), n);
    }
}

void add(const float* x, i64 x_stride, const float* z, i64 z_stride, i64 width, float* y, i64 y_stride, i64 begin,
         i64 end) {
  for (i64 row = begin; row < end; row++)
    for (i64 i = 0; i < width; i += kLanes) {
      const i64 n = smaller(kLanes, width - i);
      store_first(y + row * y_stride + i, load_first(x + row * x_stride + i, n) + load_first(z + row * z_stride + i, n),
                  n);
    }
}

// ---- attention ---------------------------------------------------------------------------------------------------

void rotate(const Rotation& rotation, float* x, i64 x_stride, i64 n_heads, i64 head_dim, i64 begin, i64 end) {
  const i64 n = rotation.n_pairs;
  const i64 step = rotation.interleaved ? 2 : 1, other = rotation.interleaved ? 1 : n;
  for (i64 row = begin; row < end; row++) {
    const float *cos = rotation.cos + row * n, *sin = rotation.sin + row * n;
    for (i64 h = 0; h < n_heads; h++) {
      float* head = x + row * x_stride + h * head_dim;
      for (i64 i = 0; i < n; i++) {
        float &a = head[i * step], &b = head[i * step + other];
        const float a0 = a, b0 = b;
        a = a0 * cos[i] - b0 * sin[i];
        b = b0 * cos[i] + a0 * sin[i];
      }
    }
  }
}

inline i64 page_of(const Rows& rows, i64 row, i64 position) {
  return rows.page_table[rows.sequence[row] * rows.table_width + position / kPage];
}

void store_kv(const KvLayer& kv, const Rows& rows, const float* k, i64 k_stride, const float* v, i64 v_stride,
              i64 begin, i64 end) {
  const i64 dim = kv.head_dim;
  for (i64 row = begin; row < end; row++) {
    const i64 slot = rows.positions[row] % kPage, page = page_of(rows, row, rows.positions[row]);
    for (i64 h = 0; h < kv.n_kv_heads; h++) {
      const i64 base = (page * kv.n_kv_heads + h) * dim * kPage;
      const float *kh = k + row * k_stride + h * dim, *vh = v + row * v_stride + h * dim;
      if (kv.format == KvFormat::f32) {
        for (i64 d = 0; d < dim; d++) static_cast<float*>(kv.keys)[base + d * kPage + slot] = kh[d];
        std::memcpy(static_cast<float*>(kv.values) + base + slot * dim, vh, size_t(dim) * sizeof(float));
      } else {
        for (i64 d = 0; d < dim; d++) static_cast<u16*>(kv.keys)[base + d * kPage + slot] = to_bf16(kh[d]);
        for (i64 d = 0; d < dim; d++) static_cast<u16*>(kv.values)[base + slot * dim + d] = to_bf16(vh[d]);
      }
    }
  }
}

struct KvF32 {
  using Element = float;
  static F get(const float* p) { return load(p); }
  static F get_first(const float* p, i64 n) { return load_first(p, n); }
};
struct KvBf16 {
  using Element = u16;
  static F get(const u16* p) { return load_bf16(p); }
  static F get_first(const u16* p, i64 n) { return load_bf16_first(p, n); }
};

// One query head of one row, as it goes through the pages.
struct Query {
  const float* q;
  float* y;
  i64 begin, end;  // the keys that it sees
  float largest, sum;
};

constexpr int kTile = 4;

// One page for T queries that see the same slots [lo, hi) of it: each gets the page's (largest, sum, output), which is
// merged into what it has. A query's result does not depend on its company.
template <typename T, int N>
inline void attend_page(Query* const* queries, const typename T::Element* keys, const typename T::Element* values,
                        i64 lo, i64 hi, float scale, i64 dim) {
  F low[N], high[N];
  for (int t = 0; t < N; t++) low[t] = high[t] = zero();
  for (i64 d = 0; d < dim; d++) {
    const F k0 = T::get(keys + d * kPage), k1 = T::get(keys + d * kPage + kLanes);
    for (int t = 0; t < N; t++) {
      const F q = set(queries[t]->q[d]);
      low[t] = fma(q, k0, low[t]);
      high[t] = fma(q, k1, high[t]);
    }
  }
  alignas(64) float p[N][kPage];
  float before[N], now[N];
  constexpr float kNone = -__builtin_inff();
  for (int t = 0; t < N; t++) {
    Query& query = *queries[t];
    low[t] = keep_range(low[t] * set(scale), smaller(lo, kLanes), smaller(hi, kLanes), kNone);
    high[t] = keep_range(high[t] * set(scale), larger(lo - kLanes, 0), larger(hi - kLanes, 0), kNone);
    const float top = lanes_max(max(low[t], high[t]));
    const F shift = set(top);
    const F p0 = exp(low[t] - shift), p1 = exp(high[t] - shift);
    store(p[t], p0);
    store(p[t] + kLanes, p1);
    const float all = query.largest > top ? query.largest : top;
    alignas(64) float factors[kLanes] = {query.largest - all, top - all};
    store(factors, exp(load(factors)));
    before[t] = factors[0], now[t] = factors[1];
    query.sum = query.sum * before[t] + lanes_sum(p0 + p1) * now[t];
    query.largest = all;
  }
  for (i64 d = 0; d < dim; d += kLanes) {
    const i64 n = smaller(kLanes, dim - d);
    F out[N];
    for (F& o : out) o = zero();
    for (i64 s = lo; s < hi; s++) {
      const F v = n == kLanes ? T::get(values + s * dim + d) : T::get_first(values + s * dim + d, n);
      for (int t = 0; t < N; t++) out[t] = fma(set(p[t][s]), v, out[t]);
    }
    for (int t = 0; t < N; t++) {
      float* y = queries[t]->y + d;
      store_first(y, load_first(y, n) * set(before[t]) + out[t] * set(now[t]), n);
    }
  }
}

template <typename T>
void attend_as(const Attend& a, i64 begin, i64 end) {
  const i64 dim = a.kv.head_dim, repeat = a.n_heads / a.kv.n_kv_heads;
  for (i64 item = begin; item < end;) {
    // Consecutive rows of one sequence under one key head make a tile.
    const i64 head = item / a.rows.n, row = item % a.rows.n;
    const i64 limit = smaller(larger(1, kTile / repeat), smaller(end - item, a.rows.n - row));
    i64 n_rows = 1;
    while (n_rows < limit && a.rows.sequence[row + n_rows] == a.rows.sequence[row]) n_rows++;
    item += n_rows;
    for (i64 first_head = 0; first_head < repeat; first_head += kTile) {
      const i64 n_heads = smaller(kTile, repeat - first_head), n = n_rows * n_heads;
      Query queries[kTile];
      i64 from = INT64_MAX, to = 0;
      for (i64 t = 0; t < n; t++) {
        const i64 r = row + t / n_heads, h = head * repeat + first_head + t % n_heads;
        const i64 last = a.rows.positions[r] + 1;
        Query& query = queries[t];
        query = {a.q + r * a.q_stride + h * dim,
                 a.y + r * a.y_stride + h * dim,
                 a.window ? larger(0, last - a.window) : 0,
                 last,
                 -__builtin_inff(),
                 0};
        std::memset(query.y, 0, size_t(dim) * sizeof(float));
        from = smaller(from, query.begin), to = larger(to, last);
      }
      for (i64 start = from / kPage * kPage; start < to; start += kPage) {
        const i64 base = (page_of(a.rows, row, start) * a.kv.n_kv_heads + head) * dim * kPage;
        const auto* keys = static_cast<const typename T::Element*>(a.kv.keys) + base;
        const auto* values = static_cast<const typename T::Element*>(a.kv.values) + base;
        for (i64 t = 0; t < n;) {
          const auto lo = [&](i64 i) { return larger(0, queries[i].begin - start); };
          const auto hi = [&](i64 i) { return smaller(kPage, queries[i].end - start); };
          Query* same[kTile];
          i64 count = 0, first_lo = lo(t), first_hi = hi(t);
          while (t < n && lo(t) == first_lo && hi(t) == first_hi) same[count++] = &queries[t++];
          if (first_lo >= first_hi) continue;
          with_count<kTile>(count, [&](auto c) {
            attend_page<T, decltype(c)::value>(same, keys, values, first_lo, first_hi, a.scale, dim);
          });
        }
      }
      for (i64 t = 0; t < n; t++) {
        const F inverse = set(1 / queries[t].sum);
        for (i64 d = 0; d < dim; d += kLanes) {
          const i64 lanes = smaller(kLanes, dim - d);
          store_first(queries[t].y + d, load_first(queries[t].y + d, lanes) * inverse, lanes);
        }
      }
    }
  }
}

void attend(const Attend& a, i64 begin, i64 end, void*) {
  if (a.kv.format == KvFormat::f32)
    attend_as<KvF32>(a, begin, end);
  else
    attend_as<KvBf16>(a, begin, end);
}

// ---- sampling ----------------------------------------------------------------------------------------------------

i64 arg_max(const float* x, i64 n) {
  if (n <= 0) return -1;
  F largest = set(-__builtin_inff());
  for (i64 i = 0; i < n; i += kLanes) {
    const i64 lanes = smaller(kLanes, n - i);
    const F v = load_first(x + i, lanes);
    largest = max(lanes == kLanes ? v : keep_range(v, 0, lanes, -__builtin_inff()), largest);
  }
  const float top = lanes_max(largest);
  for (i64 i = 0; i < n; i++)
    if (x[i] == top) return i;
  return -1;  // nothing but NaN
}

double sum_exp(const float* x, i64 n, float shift, float scale) {
  double total = 0;
  for (i64 chunk = 0; chunk < n; chunk += 1024) {
    F sum = zero();
    const i64 last = smaller(n, chunk + 1024);
    for (i64 i = chunk; i < last; i += kLanes) {
      const i64 lanes = smaller(kLanes, last - i);
      sum = sum + keep_first(exp((load_first(x + i, lanes) - set(shift)) * set(scale)), lanes);
    }
    total += double(lanes_sum(sum));
  }
  return total;
}

std::uint64_t read(const void* p, i64 size) {
  const auto* bytes = static_cast<const u8*>(p);
  I sums[4] = {zero_int(), zero_int(), zero_int(), zero_int()};
  i64 i = 0;
  for (; i + 256 <= size; i += 256)
    for (int k = 0; k < 4; k++) {
      prefetch(bytes + i + 64 * k + kAhead);
      sums[k] = add_int(sums[k], load_int(reinterpret_cast<const i32*>(bytes + i + 64 * k)));
    }
  std::uint64_t sum = 0;
  for (; i < size; i++) sum += bytes[i];
  alignas(64) i32 lanes[kLanes];
  for (const I& s : sums) {
    std::memcpy(lanes, &s, sizeof lanes);
    for (const i32 lane : lanes) sum += u32(lane);
  }
  return sum;
}

}  // namespace

extern const Kernels table;
const Kernels table = {
    PRONGHORN_STRING(PRONGHORN_NAMESPACE),
    linear,
    quantize_rows,
    round_rows,
    embed,
    layer_norm,
    rms_norm,
    gate,
    add,
    rotate,
    store_kv,
    attend,
    arg_max,
    sum_exp,
    read,
};

}  // namespace PRONGHORN_NAMESPACE
}  // namespace pronghorn
