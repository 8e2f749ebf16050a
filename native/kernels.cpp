// The kernels, compiled once per instruction set (see CMakeLists.txt). The contract is in kernels.h.
//
// How one answer is kept: an output's terms are added in an order that its weights' shape alone fixes.
//   dense, [out, in]:    16 partial sums, one a lane, input i in lane i % 16; then the tree of lanes_sum.
//   dense, [in, out]:    two chains an output, one a half of the inputs (cut_of), ascending; then their sum.
//   bf16 and VDPBF16PS:  the same by pairs of inputs: the odd product, then the even one.
//   bf16 and tiles:      TDPBF16PS's: for 32 inputs an even and an odd chain from zero, added, then added to the sum.
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

// Whether bf16 weights are multiplied by bf16 inputs, or both in f32.
#define PRONGHORN_HALF_INPUTS (PRONGHORN_ISA_avx512bf16 || PRONGHORN_ISA_amx)
// Whether F has Parts.
#define PRONGHORN_PARTS (PRONGHORN_ISA_avx2 || PRONGHORN_ISA_neon || PRONGHORN_ISA_dotprod)

namespace pronghorn {
namespace PRONGHORN_NAMESPACE {
namespace {

constexpr i64 kAhead = 4096;  // bytes from a load to what is fetched meanwhile; past the end, a prefetch does nothing
constexpr i64 kFirstCache = 32 << 10;  // bytes

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

  // (Inlined at once: GCC takes a function of nothing but prefetches for one without effect, and drops its calls.)
  __attribute__((always_inline)) void fetch(i64 part) const {
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

// Asks for where outputs [o, o + n) of some rows go: stores are done in order, so each line would be waited for alone.
__attribute__((always_inline)) inline void fetch_outputs(const Linear& l, i64 row, i64 n_rows, i64 o, i64 n) {
  for (i64 r = row; r < row + n_rows; r++)
    for (i64 i = kLanes - 1; i < n; i += kLanes) prefetch(l.y + r * l.y_stride + o + i);
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
// order of outputs that `in_order` undoes), and whose inputs are the 4 bytes that `broadcast` takes. `fetch` asks for
// one of the lines that a unit's weights are in, by its last byte: where the file does not lie in whole lines, that is
// in the next one, and the first has come with the outputs before.
struct Half {
  u16 bits;
};
struct Brain {
  u16 bits;
};
inline F widen(const float* p) { return load(p); }
inline F widen(const Half* p) { return load_f16(p); }
inline F widen(const Brain* p) { return load_bf16(p); }
inline F widen_first(const float* p, i64 n) { return load_first(p, n); }
inline F widen_first(const Half* p, i64 n) { return load_f16_first(p, n); }
inline F widen_first(const Brain* p, i64 n) { return load_bf16_first(p, n); }

template <typename E>
struct Floats {
  using Element = E;
  using X = float;
  using V = F;
  static constexpr i64 kStep = kLanes, kUnit = 1;
  static const X* input(const Linear& l) { return l.in.x; }
  static i64 stride(const Linear& l) { return l.in.x_stride; }
  static V x(const X* p) { return load(p); }
  static V x_first(const X* p, i64 n) { return load_first(p, n); }
  static V w(const Element* p) { return widen(p); }
  static V w_first(const Element* p, i64 n) { return widen_first(p, n); }
  static F multiply_add(V x, V w, F sum) { return fma(x, w, sum); }
  static V broadcast(const X* p) { return set(*p); }
  template <int P>
  static void unit(const Element* p, i64, V out[P]) {
    for (int v = 0; v < P; v++) out[v] = widen(p + v * kLanes);
  }
  template <int P>
  static void unit_first(const Element* p, i64, i64, i64 n, V out[P]) {
    for (i64 v = 0; v < P; v++) out[v] = widen_first(p + v * kLanes, within(n - v * kLanes, kLanes));
  }
  template <int P>
  static void in_order(F[P]) {}
  template <int P>
  __attribute__((always_inline)) static void fetch(const Element* p, i64, i64 line) {
    prefetch(reinterpret_cast<const u8*>(p) + smaller(line * 64 + 64, P * kLanes * i64(sizeof(Element))) - 1);
  }
};
using F32 = Floats<float>;
using F16 = Floats<Half>;

#if !PRONGHORN_HALF_INPUTS

struct Bf16 : Floats<Brain> {
  static const X* input(const Linear& l) { return static_cast<const X*>(l.in.values); }
  static i64 stride(const Linear& l) { return l.in.stride; }
};

#elif PRONGHORN_ISA_avx512bf16

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
  static V broadcast(const X* p) {
    i32 pair;
    std::memcpy(&pair, p, sizeof pair);
    return set_int(pair);
  }
  template <int P>
  static void unit(const Element* p, i64 n_out, V out[P]) {
    for (int v = 0; v < P; v += 2) {
      const u16* q = p + v * kLanes;
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
  template <int P>
  __attribute__((always_inline)) static void fetch(const Element* p, i64 n_out, i64 line) {
    prefetch(reinterpret_cast<const u8*>(p + line % 2 * n_out + line / 2 * 32) + 63);
  }
};

#endif

// [out, in]: R rows times O outputs, lanes are inputs. A row's sums of earlier inputs are in kept[r * kPanel + o], if
// these are not the first; they go back there, or after the last inputs to out[r][0..O).
template <typename T, int R, int O>
inline void dot_rows(const typename T::X* x, i64 x_stride, const typename T::Element* w, i64 w_stride, i64 n_in,
                     Ahead ahead, F* kept, bool first, bool last, float* out, i64 out_stride) {
  F sum[R][O];
  for (int r = 0; r < R; r++)
    for (int o = 0; o < O; o++) sum[r][o] = first ? zero() : kept[r * kPanel + o];
  i64 i = 0;
  for (; i + T::kStep <= n_in; i += T::kStep) {
    ahead.fetch(i / T::kStep);
    typename T::V wi[O];
    for (int o = 0; o < O; o++) wi[o] = T::w(w + o * w_stride + i);
    for (int r = 0; r < R; r++) {
      const auto xi = T::x(x + r * x_stride + i);
      for (int o = 0; o < O; o++) sum[r][o] = T::multiply_add(xi, wi[o], sum[r][o]);
    }
  }
  if (i < n_in) {
    for (int o = 0; o < O; o++) {
      const auto wi = T::w_first(w + o * w_stride + i, n_in - i);
      for (int r = 0; r < R; r++)
        sum[r][o] = T::multiply_add(T::x_first(x + r * x_stride + i, n_in - i), wi, sum[r][o]);
    }
  }
  if (!last) {
    for (int r = 0; r < R; r++)
      for (int o = 0; o < O; o++) kept[r * kPanel + o] = sum[r][o];
    return;
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
  // Of many inputs so many at a time that those of kRows rows stay in the first cache while a panel passes.
  constexpr i64 kInputs = kFirstCache / 2 / kRows / i64(sizeof(typename T::X));
  const i64 step = passes == 1 ? n_in : round_up(div_up(n_in, div_up(n_in, kInputs)), T::kStep);
  for (i64 block = begin; block < end; block += most) {
    const i64 block_end = smaller(end, block + most);
    for (i64 row = 0; row < l.n_rows; row += kRows) {
      const i64 rows = smaller(kRows, l.n_rows - row);
      const auto* x = T::input(l) + row * x_stride;
      for (i64 o = block; o < block_end; o += kPanel) {
        const i64 n = smaller(kPanel, block_end - o);
        alignas(64) float sums[kRows][kPanel];
        F kept[kRows * kPanel];
        with_count<kRows>(rows, [&](auto count) {
          // As many sums as the registers hold beside what goes into them.
          constexpr int R = decltype(count)::value, O = kRegisters > 8 ? (R == 1 ? 8 : 4) : R == 1 ? 4 : R == 4 ? 1 : 2;
          const auto dots = [&](i64 i, i64 j, auto outputs) {
            constexpr int N = decltype(outputs)::value;
            const i64 done = (row / kRows * most + o - block + j) / passes;  // of the next block
            const i64 first = passes == 1 ? o + j + N : block_end + done;
            const i64 inputs = smaller(step, n_in - i), share = N * T::kStep * i64(sizeof(*w)) / passes;
            const Ahead ahead{l.w->data + first * row_bytes + i / T::kStep * share, share};
            dot_rows<T, R, N>(x + i, x_stride, w + (o + j) * n_in + i, n_in, inputs, ahead, kept + j, i == 0,
                              i + inputs == n_in, &sums[0][j], kPanel);
          };
          for (i64 i = 0; i < n_in; i += step) {
            i64 j = 0;
            for (; j + O <= n; j += O) dots(i, j, Count<O>{});
            for (; j < n; j++) dots(i, j, Count<1>{});
          }
        });
        for (i64 r = 0; r < rows; r++) finish(l, row + r, o, n, load_first(sums[r], n));
      }
    }
  }
}

#if PRONGHORN_PARTS

// R rows times O outputs: n_steps products of one part of the lanes are added to kept[r * kept_stride + o * kLanes].
template <int R, int O>
inline void dot_parts(const float* x, i64 x_stride, const float* w, i64 n_steps, float* kept, i64 kept_stride,
                      bool first) {
  Part sum[R][O];
  for (int r = 0; r < R; r++)
    for (int o = 0; o < O; o++) sum[r][o] = first ? part_zero() : load_part(kept + r * kept_stride + o * kLanes);
#pragma GCC unroll 2
  for (i64 s = 0; s < n_steps; s++) {
    Part ws[O];
    for (int o = 0; o < O; o++) ws[o] = load_part(w + (s * O + o) * kLanes);
    for (int r = 0; r < R; r++) {
      const Part xs = load_part(x + r * x_stride + s * kLanes);
      for (int o = 0; o < O; o++) sum[r][o] = fma_part(xs, ws[o], sum[r][o]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int o = 0; o < O; o++) store_part(kept + r * kept_stride + o * kLanes, sum[r][o]);
}

// Many rows: the weights of some inputs of a few outputs are widened and laid side by side, before rows pass, part by
// part of the lanes, so that registers hold the sums of more rows and outputs; the next weights are fetched meanwhile.
// The sums are dot_rows'.
template <typename T>
void out_in_many(const Linear& l, i64 begin, i64 end, void* scratch) {
  constexpr int O = kPartLanes == 8 ? 3 : 6;
  constexpr i64 kRows = 4, kMany = 128, kWidth = 24, kInputs = 768, kKept = kWidth * kLanes;
  constexpr i64 kTiles = kWidth / O * (kLanes / kPartLanes), kLine = 64 / i64(sizeof(typename T::Element));
  static_assert((kWidth * kInputs + kMany * kKept) * 4 <= kScratch && kWidth % O == 0 && kWidth % 4 == 0);
  const i64 n_in = l.w->n_in, x_stride = T::stride(l);
  const i64 most = round_up(div_up(n_in, div_up(n_in, kInputs)), kLanes);  // inputs at a time
  const auto* weights = reinterpret_cast<const typename T::Element*>(l.w->data);
  auto *strip = static_cast<float*>(scratch), *kept = strip + kWidth * kInputs;  // [O-tuple][step][O], [row][output]
  for (i64 o = begin; o < end; o += kWidth) {
    const i64 n = smaller(kWidth, end - o);
    const auto finish_row = [&](i64 row, const float* lanes) {
      alignas(64) float sums[round_up(kWidth, kPanel)];
      for (i64 k = 0; k < n; k += 4) {
        const float* four = lanes + k * kLanes;
        const F v[4] = {load(four), load(four + kLanes), load(four + 2 * kLanes), load(four + 3 * kLanes)};
        lanes_sums(v, sums + k);
      }
      for (i64 k = 0; k < n; k += kPanel) {
        const i64 outputs = smaller(kPanel, n - k);
        finish(l, row, o + k, outputs, load_first(sums + k, outputs));
      }
    };
    for (i64 first_row = 0; first_row < l.n_rows; first_row += kMany) {
      const i64 n_rows = smaller(kMany, l.n_rows - first_row), tiles = div_up(n_rows, kRows) * kTiles;
      for (i64 i = 0; i < n_in; i += most) {
        const i64 inputs = smaller(most, n_in - i), steps = div_up(inputs, kLanes), whole = inputs / kLanes;
        for (i64 k = 0; k < kWidth; k++) {
          float* const to = strip + (k / O * steps * O + k % O) * kLanes;
          const auto* w = weights + (o + k) * n_in + i;
          for (i64 s = 0; s < steps; s++)
            store(to + s * O * kLanes, k >= n      ? zero()
                                       : s < whole ? T::w(w + s * kLanes)
                                                   : T::w_first(w + s * kLanes, inputs - s * kLanes));
        }
        const bool last = i + inputs == n_in;
        const auto* next = last ? weights + (o + kWidth) * n_in : weights + o * n_in + i + most;
        const i64 lines = div_up(inputs, kLine);  // of each output
        i64 tile = 0, fetched = 0;
        for (i64 row = 0; row < n_rows; row += kRows) {
          const i64 count = smaller(kRows, n_rows - row);
          const auto* x = T::input(l) + (first_row + row) * x_stride + i;
          float* const sums = kept + (most < n_in ? row * kKept : 0);
          alignas(64) float rest[kRows][kLanes];
          if (whole < steps)
            for (i64 r = 0; r < count; r++)
              store(rest[r], T::x_first(x + r * x_stride + whole * kLanes, inputs - whole * kLanes));
          with_count<kRows>(count, [&](auto c) {
            constexpr int R = decltype(c)::value;
            for (i64 k = 0; k < n; k += O)
              for (i64 p = 0; p < kLanes; p += kPartLanes) {
                for (const i64 to = ++tile * kWidth * lines / tiles; fetched < to; fetched++)
                  prefetch(next + fetched / lines * n_in + fetched % lines * kLine);
                const float* w = strip + k * steps * kLanes + p;
                float* const tuple = sums + k * kLanes + p;
                if (whole) dot_parts<R, O>(x + p, x_stride, w, whole, tuple, kKept, i == 0);
                if (whole < steps)
                  dot_parts<R, O>(rest[0] + p, kLanes, w + whole * O * kLanes, 1, tuple, kKept, i + whole == 0);
              }
          });
          if (!last) continue;
          fetch_outputs(l, first_row + row, count, o, n);
          for (i64 r = 0; r < count; r++) finish_row(first_row + row + r, sums + r * kKept);
        }
      }
    }
  }
}

#endif

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

// The lines that the weights of a unit and P registers of outputs are in.
template <typename T, int P>
constexpr i64 kLines = (P * kLanes * T::kUnit * i64(sizeof(typename T::Element)) + 63) / 64;
template <typename T, int P>
__attribute__((always_inline)) inline void fetch_unit(const typename T::Element* p, i64 n_out) {
  for (i64 line = 0; line < kLines<T, P>; line++) T::template fetch<P>(p, n_out, line);
}

// Inputs at a time where the file's pages count: so many stretches of it are read side by side.
constexpr i64 kFewInputs = 8;

// Where the inputs' second half begins (for kFewInputs and fewer: past them all). Each half has a chain of its own, so
// that threads can share out the inputs, too.
inline i64 cut_of(const Matrix& w) { return round_up(div_up(w.n_in, 2), kFewInputs); }

// The halves' sums, [2][n_rows][width], of outputs [o, o + n) of some rows.
template <typename T, int P>
inline void finish_sums(const Linear& l, i64 row, i64 n_rows, i64 o, i64 n, const float* sums, i64 width) {
  for (i64 r = 0; r < n_rows; r++)
    for (i64 v = 0; v < n; v += P * kLanes) {
      F sum[P];
      for (int k = 0; k < P; k++) {
        const float* first = sums + r * width + v + k * kLanes;
        sum[k] = load(first) + load(first + n_rows * width);
      }
      T::template in_order<P>(sum);
      for (i64 k = 0; k < P && v + k * kLanes < n; k++)
        finish(l, row + r, o + v + k * kLanes, smaller(kLanes, n - v - k * kLanes), sum[k]);
    }
}

template <int R>
constexpr int kFewPanels = kRegisters > 8 || R == 1 ? 4
                           : R == 2                 ? 2
                                                    : 1;

// Few rows: straight from the weights as they stand. Inputs [first, last) of outputs [o, o + n) -> sums [R][width].
template <typename T, int R>
void in_out_sums(const Linear& l, i64 first, i64 last, i64 o, i64 n, float* sums, i64 width) {
  constexpr int P = kFewPanels<R>;
  constexpr i64 kInputs = kRegisters > 8 && R > 3 ? 32 : kFewInputs;  // more, where the sums' way to memory counts
  const i64 n_out = l.w->n_out, x_stride = T::stride(l);
  const auto* weights = reinterpret_cast<const typename T::Element*>(l.w->data);
  if (first >= last) std::memset(sums, 0, size_t(R * width) * sizeof(float));
  for (i64 i = first; i < last; i += kInputs) {
    const i64 inputs = smaller(kInputs, last - i);
    const auto* x = T::input(l) + i;
    for (i64 v = 0; v < n; v += P * kLanes) {
      const auto* w = weights + i * n_out + o + v;
      const i64 outputs = n - v;
      if (inputs == kInputs && outputs >= P * kLanes) {
        add_units<T, R, P>(x, x_stride, kInputs / T::kUnit, sums + v, width, i == first,
                           [&](i64 u, typename T::V out[P]) {
                             const auto* wu = w + u * T::kUnit * n_out;
                             T::template unit<P>(wu, n_out, out);
                             fetch_unit<T, P>(wu + kInputs * n_out, n_out);
                           });
      } else {
        add_units<T, R, P>(
            x, x_stride, div_up(inputs, T::kUnit), sums + v, width, i == first, [&](i64 u, typename T::V out[P]) {
              T::template unit_first<P>(w + u * T::kUnit * n_out, n_out, inputs - u * T::kUnit, outputs, out);
            });
      }
    }
  }
}

template <typename T, int R>
void in_out_few(const Linear& l, i64 begin, i64 end, float* sums) {
  constexpr i64 kStrip = 4096 / R / 64 * 64;
  const i64 cut = cut_of(*l.w);
  for (i64 o = begin; o < end; o += kStrip) {
    const i64 n = smaller(kStrip, end - o), width = round_up(n, kFewPanels<R> * kLanes);
    in_out_sums<T, R>(l, 0, smaller(cut, l.w->n_in), o, n, sums, width);
    in_out_sums<T, R>(l, cut, l.w->n_in, o, n, sums + R * width, width);
    finish_sums<T, kFewPanels<R>>(l, 0, R, o, n, sums, width);
  }
}

// One row's products with one half of the inputs.
template <typename T>
void in_out_half(const Linear& l, int half, i64 begin, i64 end, float* sums, float* scratch) {
  constexpr int P = kFewPanels<1>;
  constexpr i64 kStrip = 4096;
  const i64 cut = cut_of(*l.w);
  for (i64 o = begin; o < end; o += kStrip) {
    const i64 n = smaller(kStrip, end - o);
    const i64 first = half ? cut : 0, last = half ? l.w->n_in : smaller(cut, l.w->n_in);
    in_out_sums<T, 1>(l, first, last, o, n, scratch, round_up(n, P * kLanes));
    for (i64 v = 0; v < n; v += P * kLanes) {
      F sum[P];
      for (int k = 0; k < P; k++) sum[k] = load(scratch + v + k * kLanes);
      T::template in_order<P>(sum);
      for (i64 k = 0; k < P && v + k * kLanes < n; k++)
        store_first(sums + o + v + k * kLanes, sum[k], smaller(kLanes, n - v - k * kLanes));
    }
  }
}

// Many rows, where registers hold 24 sums: some inputs' weights are taken as they stand, by one group of rows after the
// other. They stay in the second cache meanwhile, and the next ones come, `Across` lines with the first of each's,
// which may be gone since the outputs before.
template <typename T, bool Across>
void in_out_straight(const Linear& l, i64 begin, i64 end, void* scratch) {
  using V = typename T::V;
  constexpr int P = T::kUnit == 1 ? 3 : 4;  // (pairs of inputs come in pairs of registers)
  constexpr i64 kRows = 24 / P, kUnits = 192, kMany = 512, kWidth = P * kLanes, kShare = kLines<T, P> / T::kUnit;
  static_assert(2 * kMany * kWidth * 4 <= kScratch && kLines<T, P> % T::kUnit == 0);
  const i64 n_in = l.w->n_in, n_out = l.w->n_out, x_stride = T::stride(l), n_units = div_up(n_in, T::kUnit);
  const i64 cut = smaller(cut_of(*l.w) / T::kUnit, n_units);
  const auto* weights = reinterpret_cast<const typename T::Element*>(l.w->data);
  auto* sums = static_cast<float*>(scratch);
  for (i64 o = begin; o < end; o += kWidth) {
    const i64 n = smaller(kWidth, end - o);
    for (i64 first_row = 0; first_row < l.n_rows; first_row += kMany) {
      const i64 n_rows = smaller(kMany, l.n_rows - first_row), groups = div_up(n_rows, kRows);
      const i64 together = div_up(n_rows, groups), asking = smaller(groups, 2 * T::kUnit);  // groups that fetch
      if (cut == n_units) std::memset(sums + n_rows * kWidth, 0, size_t(n_rows * kWidth) * sizeof(float));
      for (i64 first = 0, units; first < n_units; first += units) {
        units = smaller(kUnits, (first < cut ? cut : n_units) - first);
        const i64 past = first + units;
        const bool whole = n == kWidth && past * T::kUnit <= n_in;
        float* const half = sums + (first < cut ? 0 : n_rows * kWidth);
        const auto* w = weights + first * T::kUnit * n_out + o;
        const auto* next = weights + (past < n_units ? past * T::kUnit * n_out + o : o + kWidth);
        for (i64 row = 0, group = 0; row < n_rows; row += together, group++) {
          const i64 count = smaller(together, n_rows - row), line = group * T::kUnit / asking * kShare;
          const auto* x = T::input(l) + (first_row + row) * x_stride + first * T::kUnit;
          const auto add = [&](const auto& unit) {
            with_count<kRows>(count, [&](auto c) {
              add_units<T, decltype(c)::value, P>(x, x_stride, units, half + row * kWidth, kWidth,
                                                  first == 0 || first == cut, unit);
            });
          };
          if (past == n_units) fetch_outputs(l, first_row + row, count, o, n);
          if (whole)
            add([&](i64 u, V out[P]) {
              T::template unit<P>(w + u * T::kUnit * n_out, n_out, out);
              if (group >= asking) return;
              if constexpr (Across) prefetch(next + u * n_out);
              for (i64 k = line; k < line + kShare; k++) T::template fetch<P>(next + u * T::kUnit * n_out, n_out, k);
            });
          else
            add([&](i64 u, V out[P]) {
              T::template unit_first<P>(w + u * T::kUnit * n_out, n_out, n_in - (first + u) * T::kUnit, n, out);
            });
        }
      }
      finish_sums<T, P>(l, first_row, n_rows, o, n, sums, kWidth);
    }
  }
}

// Many rows, elsewhere: the weights of some inputs of a strip of outputs are first widened and laid side by side, panel
// by panel. Of fewer rows the strip is wider: each input's weights are in a page of their own, and a longer stretch of
// it is read at once.
template <typename T>
void in_out_many(const Linear& l, i64 begin, i64 end, void* scratch) {
  constexpr i64 kRows = 6, kInputs = 1024, kMany = 512;
  static_assert((kInputs + 2 * kMany) * kLanes * 4 <= kScratch && T::kUnit == 1 && kLines<T, 1> == 1);
  const i64 n_in = l.w->n_in, n_out = l.w->n_out, x_stride = T::stride(l);
  const i64 cut = smaller(cut_of(*l.w), n_in), panels = larger(1, smaller(8, kMany / l.n_rows));
  const auto* weights = reinterpret_cast<const typename T::Element*>(l.w->data);
  auto *strip = static_cast<float*>(scratch), *sums = strip + kInputs * kLanes;
  for (i64 o = begin; o < end; o += panels * kLanes) {
    const i64 n = smaller(panels * kLanes, end - o), width = round_up(n, kLanes);
    for (i64 first_row = 0; first_row < l.n_rows; first_row += kMany) {
      const i64 n_rows = smaller(kMany, l.n_rows - first_row), together = div_up(n_rows, div_up(n_rows, kRows));
      if (cut == n_in) std::memset(sums + n_rows * width, 0, size_t(n_rows * width) * sizeof(float));
      for (i64 first = 0, inputs; first < n_in; first += inputs) {
        inputs = smaller(kInputs / panels, (first < cut ? cut : n_in) - first);
        float* const half = sums + (first < cut ? 0 : n_rows * width);
        for (i64 i = 0; i < inputs; i++)
          for (i64 v = 0; v < n; v += kLanes) {
            const auto* w = weights + (first + i) * n_out + o + v;
            fetch_unit<T, 1>(w + kFewInputs * n_out, n_out);
            store(strip + (v / kLanes * inputs + i) * kLanes, n - v < kLanes ? widen_first(w, n - v) : widen(w));
          }
        const i64 past = first + inputs;
        const auto* after = weights + (past < n_in ? past * n_out + o : o + panels * kLanes);
        for (i64 v = 0; v < n; v += kLanes) {
          const float* const panel = strip + v / kLanes * inputs * kLanes;
          for (i64 row = 0; row < n_rows; row += together) {
            const auto* x = T::input(l) + (first_row + row) * x_stride + first;
            const i64 count = smaller(together, n_rows - row);
            const auto stored = [&](i64 i, F out[1]) {
              out[0] = load(panel + i * kLanes);
              if (row == 0) fetch_unit<T, 1>(after + v + i * n_out, n_out);  // of the next strip
            };
            if (past == n_in) fetch_outputs(l, first_row + row, count, o + v, smaller(kLanes, n - v));
            with_count<kRows>(count, [&](auto c) {
              add_units<T, decltype(c)::value, 1>(x, x_stride, inputs, half + row * width + v, width,
                                                  first == 0 || first == cut, stored);
            });
          }
        }
      }
      finish_sums<T, 1>(l, first_row, n_rows, o, n, sums, width);
    }
  }
}

template <typename T>
void linear_dense(const Linear& l, i64 begin, i64 end, void* scratch) {
  constexpr i64 kFew = kRegisters > 8 ? 6 : 4;
#if PRONGHORN_PARTS
  if (l.w->order == Order::out_in && l.n_rows > 4) return out_in_many<T>(l, begin, end, scratch);
#endif
  if (l.w->order == Order::out_in) return linear_out_in<T>(l, begin, end);
  if (l.n_rows > kFew) {
    if constexpr (kRegisters > 8) {
      constexpr bool kSingle = T::kUnit == 1;
      const bool across = kSingle && l.n_rows > 8 && l.n_rows <= 24 && reinterpret_cast<std::uintptr_t>(l.w->data) % 64;
      if (across) return in_out_straight<T, kSingle>(l, begin, end, scratch);  // (fewer rows, and more, lose by it)
      return in_out_straight<T, false>(l, begin, end, scratch);
    } else {
      return in_out_many<T>(l, begin, end, scratch);
    }
  }
  with_count<kFew>(l.n_rows, [&](auto count) {
    in_out_few<T, decltype(count)::value>(l, begin, end, static_cast<float*>(scratch));
  });
}

// ---- bf16 in the order of tiles ------------------------------------------------------------------------------------

#if PRONGHORN_ISA_amx

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
  if (R > 1) fetch_outputs(l, row, R, o, P * kPanel);
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
#if PRONGHORN_ISA_amx
      return linear_bf16(l, begin, end, scratch);
#else
      return linear_dense<Bf16>(l, begin, end, scratch);
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

bool halves(const Matrix& w) {
#if PRONGHORN_ISA_amx
  if (w.format == Format::bf16) return false;
#endif
  return w.order == Order::in_out;
}

void linear_half(const Linear& l, int half, i64 begin, i64 end, float* sums, void* scratch) {
  auto* memory = static_cast<float*>(scratch);
  switch (l.w->format) {
    case Format::f32:
      return in_out_half<F32>(l, half, begin, end, sums, memory);
    case Format::f16:
      return in_out_half<F16>(l, half, begin, end, sums, memory);
    default:
#if PRONGHORN_ISA_amx
      return;  // tiles take all of it: see Kernels::halves
#else
      return in_out_half<Bf16>(l, half, begin, end, sums, memory);
#endif
  }
}

void join_halves(const Linear& l, const float* sums, i64 begin, i64 end) {
  for (i64 o = begin; o < end; o += kLanes) {
    const i64 n = smaller(kLanes, end - o);
    finish(l, 0, o, n, load_first(sums + o, n) + load_first(sums + l.w->n_out + o, n));
  }
}

// ---- a linear's input in its weights' form -----------------------------------------------------------------------

// What n values are divided by to fit into 8 bits: NaN if one is not finite, so that it does not vanish.
struct Scale {
  float scale, inverse;
};
inline Scale scale_of(const float* x, i64 n) {
  F largest = zero(), bad = zero();
  for (i64 i = 0; i < n; i += kLanes) {
    const F v = load_first(x + i, smaller(kLanes, n - i));
    largest = max(absolute(v), largest);
    bad = fma(v, zero(), bad);
  }
  const float top = lanes_max(largest);
  return {top / 127 + lanes_sum(bad), top > 1e-36f ? 127 / top : 0};  // smaller: no finite inverse
}

void quantize_rows(const float* x, i64 x_stride, i64 n_in, i64 group, std::int8_t* values, i64 stride, float* scales,
                   std::int32_t* sums, i64 begin, i64 end) {
  if (group == 0) group = n_in;
  const i64 n_groups = div_up(n_in, group);
  for (i64 row = begin; row < end; row++) {
    const float* xr = x + row * x_stride;
    std::int8_t* out = values + row * stride;
    for (i64 g = 0; g < n_groups; g++) {
      const i64 first_input = g * group, last = smaller(n_in, first_input + group);
      const Scale scale = scale_of(xr + first_input, last - first_input);
      i32 sum = 0;
      for (i64 i = first_input; i < last; i += kLanes) {
        const i64 n = smaller(kLanes, last - i);
        sum += store_int8_first(out + i, load_first(xr + i, n) * set(scale.inverse), n);
      }
      scales[row * n_groups + g] = scale.scale;
      sums[row * n_groups + g] = sum;
    }
    std::memset(out + n_in, 0, size_t(stride - n_in));
  }
}

#if PRONGHORN_HALF_INPUTS
using RoundedInput = u16;
#else
using RoundedInput = float;
#endif

void round_rows(const float* x, i64 x_stride, i64 n_in, void* values, i64 stride, i64 begin, i64 end) {
  for (i64 row = begin; row < end; row++) {
    auto* out = static_cast<RoundedInput*>(values) + row * stride;
    for (i64 i = 0; i < n_in; i += kLanes) {
      const i64 n = smaller(kLanes, n_in - i);
      const F v = load_first(x + row * x_stride + i, n);
#if PRONGHORN_HALF_INPUTS
      store_bf16_first(out + i, v, n);
#else
      u16 rounded[kLanes];
      store_bf16_first(rounded, v, kLanes);
      store_first(out + i, load_bf16(rounded), n);
#endif
    }
    std::memset(out + n_in, 0, size_t(stride - n_in) * sizeof(*out));
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
  for (i64 row = begin; row < end; row++) {
    const float *cos = rotation.cos + row * n, *sin = rotation.sin + row * n;
    for (i64 h = 0; h < n_heads; h++) {
      float* head = x + row * x_stride + h * head_dim;
      if (rotation.interleaved) {
        for (i64 i = 0; i < n; i++) {
          const float a = head[2 * i], b = head[2 * i + 1];
          head[2 * i] = a * cos[i] - b * sin[i];
          head[2 * i + 1] = b * cos[i] + a * sin[i];
        }
      } else {
        for (i64 i = 0; i < n; i += kLanes) {
          const i64 lanes = smaller(kLanes, n - i);
          const F a = load_first(head + i, lanes), b = load_first(head + n + i, lanes);
          const F c = load_first(cos + i, lanes), s = load_first(sin + i, lanes);
          store_first(head + i, a * c - b * s, lanes);
          store_first(head + n + i, b * c + a * s, lanes);
        }
      }
    }
  }
}

// (Inlined at once, as Ahead's.)
__attribute__((always_inline)) inline void fetch(const u8* ahead, i64 at, i64 size) {
  if (ahead)
    for (i64 i = 0; i < size; i += 64) prefetch(ahead + at + i);
}

inline u8* head_of(const KvLayer& kv, const KvLayout& layout, const Rows& rows, i64 row, i64 head, i64 position) {
  const i64 page = rows.page_table[rows.sequence[row] * rows.table_width + position / kPage];
  return kv.data + page * kv.page_stride + head * layout.size;
}

// Elements of one token in groups of G: element i to place i / G * stride + i % G.
template <int G, typename Element>
inline void scatter(const Element* x, i64 n, Element* out, i64 stride) {
  for (i64 i = 0; i < n; i += G) std::memcpy(out + i / G * stride, x + i, G * sizeof(Element));
}

void store_kv(const KvLayer& kv, const Rows& rows, const float* k, i64 k_stride, const float* v, i64 v_stride,
              i64 begin, i64 end) {
  const i64 dim = kv.head_dim;
  const KvLayout layout = kv_layout(kv.format, dim);
  // A token's keys are one group a line: a new page's lines are asked for a head ahead, or each would be waited for.
  const auto fetch_lines = [&](i64 row, i64 head) __attribute__((always_inline)) {
    const i64 position = rows.positions[row], slot = position % kPage;
    const u8* part = head_of(kv, layout, rows, row, head, position);
    for (i64 d = 0; d < dim; d += layout.group) prefetch(part + layout.keys + (d / layout.group * kPage + slot) * 4);
    fetch(part + layout.values + slot / layout.group * dim * 4, 0, dim * 4);
  };
  for (i64 row = begin; row < end; row++) {
    const i64 slot = rows.positions[row] % kPage;
    const bool fresh = row == begin || rows.sequence[row] != rows.sequence[row - 1] || slot == 0;
    if (fresh) fetch_lines(row, 0);
    for (i64 h = 0; h < kv.n_kv_heads; h++) {
      if (fresh && h + 1 < kv.n_kv_heads) fetch_lines(row, h + 1);
      u8* part = head_of(kv, layout, rows, row, h, rows.positions[row]);
      const float *kh = k + row * k_stride + h * dim, *vh = v + row * v_stride + h * dim;
      u8 *keys = part + layout.keys, *values = part + layout.values;
      if (kv.format == KvFormat::f32) {
        scatter<1>(kh, dim, reinterpret_cast<float*>(keys) + slot, kPage);
        std::memcpy(values + slot * dim * 4, vh, size_t(dim) * 4);
      } else if (kv.format == KvFormat::bf16) {
        alignas(64) u16 rounded[kMaxHeadDim];
        const auto round = [&](const float* x) {
          for (i64 i = 0; i < dim; i += kLanes) {
            const i64 n = smaller(kLanes, dim - i);
            store_bf16_first(rounded + i, load_first(x + i, n), n);
          }
        };
        round(kh);
        if (dim % 2) rounded[dim] = 0;
        scatter<2>(rounded, dim, reinterpret_cast<u16*>(keys) + slot * 2, kPage * 2);
        round(vh);
        // (Half by half: the other halves of these words may be another thread's.)
        auto* out = reinterpret_cast<u16*>(values) + slot / 2 * dim * 2 + slot % 2;
        for (i64 d = 0; d < dim; d++) out[2 * d] = rounded[d];
      } else {
        alignas(64) std::int8_t whole[kMaxHeadDim];
        alignas(64) u8 stored[kMaxHeadDim];
        const auto quantize = [&](const float* x) {
          const Scale s = scale_of(x, dim);
          for (i64 i = 0; i < dim; i += kLanes) {
            const i64 n = smaller(kLanes, dim - i);
            store_int8_first(whole + i, load_first(x + i, n) * set(s.inverse), n);
          }
          for (i64 i = 0; i < dim; i++) stored[i] = u8(whole[i]) ^ 128;
          for (i64 i = dim; i % 4; i++) stored[i] = 128;
          return s.scale;
        };
        reinterpret_cast<float*>(part + layout.key_scales)[slot] = quantize(kh);
        scatter<4>(stored, dim, keys + slot * 4, kPage * 4);
        reinterpret_cast<float*>(part + layout.value_scales)[slot] = quantize(vh);
        u8* out = values + slot / 4 * dim * 4 + slot % 4;
        for (i64 d = 0; d < dim; d++) out[4 * d] = stored[d];
      }
    }
  }
}

// Groups of elements as the cache has them, in 32 bits a lane, widened: G vectors for each of V.
struct KvF32 {
  static constexpr int kParts = 1;
  static constexpr int kGroup = 1;
  template <int V>
  static void get(const u8* p, i64 n, F (&out)[1][V]) {
    const auto* x = reinterpret_cast<const float*>(p);
    for (int v = 0; v < V; v++) out[0][v] = V == 1 && n < kLanes ? load_first(x, n) : load(x + v * kLanes);
  }
};
struct KvBf16 {
  static constexpr int kParts = 1;
  static constexpr int kGroup = 2;
  template <int V>
  static void get(const u8* p, i64 n, F (&out)[2][V]) {
    const auto* x = reinterpret_cast<const i32*>(p);
    for (int v = 0; v < V; v++) {
      const bool all = V > 1 || n == kLanes;
      const I pairs = all ? load_int(x + v * kLanes) : as_int(load_first(reinterpret_cast<const float*>(p), n));
      out[0][v] = even_halves(pairs);
      out[1][v] = odd_halves(pairs);
    }
  }
};

// 8-bit keys and values are multiplied in integers: queries and weights are rounded to 15 bits, in two parts of 8 where
// that is what the processor multiplies. (Next to what rounding to 8 bits did, that is 128 times as fine.)
constexpr int kWordParts = sizeof(ByteQuad) > sizeof(i32) ? 1 : 2;
struct Words {
  i32 sums[kWordParts];
  float scale;
};
struct WordSums {
  I parts[kWordParts];
};

// At most Width numbers into 2 * Width bytes: the high parts, then the low ones; or what a ByteQuad of 16 bits holds.
template <i64 Width>
inline Words split_words(const float* x, i64 n, u8* out) {
  alignas(64) std::int8_t parts[2 * Width];
  auto* high = kWordParts == 2 ? reinterpret_cast<std::int8_t*>(out) : parts;
  std::int8_t* low = high + Width;
  const Scale s = scale_of(x, n);
  i32 high_sum = 0, low_sum = 0;
  for (i64 i = 0; i < n; i += kLanes) {
    const i64 lanes = smaller(kLanes, n - i);
    const F v = load_first(x + i, lanes) * set(s.inverse), magic = set(12582912.f), whole = (v + magic) - magic;
    high_sum += store_int8_first(high + i, whole, lanes);
    low_sum += store_int8_first(low + i, (v - whole) * set(128), lanes);
  }
  for (i64 i = n; i % 4; i++) high[i] = low[i] = 0;
  Words words;
  words.scale = s.scale;
  words.sums[0] = high_sum, words.sums[kWordParts - 1] = low_sum;
  if constexpr (kWordParts == 1) {
    words.sums[0] = high_sum * 128 + low_sum;
    for (i64 i = 0; i < n; i += 4) {
      const auto word = [&](i64 k) { return u32(high[i + k] * 128 + low[i + k]) & 0xffff; };
      const u32 halves[2] = {word(0) | word(2) << 16, word(1) | word(3) << 16};
      std::memcpy(out + 2 * i, halves, 8);
    }
  }
  return words;
}
// What the sums start from: the stored bytes are 128 too large.
inline WordSums start_of(const Words& words) {
  WordSums sums;
  for (int i = 0; i < kWordParts; i++) sums.parts[i] = set_int(-kBytesOffset * words.sums[i]);
  return sums;
}
template <i64 Width>
inline void dot_words(WordSums& sums, Quads w, const u8* words, i64 at) {
  for (int i = 0; i < kWordParts; i++) {
    ByteQuad quad;
    std::memcpy(&quad, kWordParts == 1 ? words + 2 * at : words + i * Width + at, sizeof quad);
    sums.parts[i] = dot_bytes(sums.parts[i], w, quad);
  }
}
inline F value_of(const WordSums& sums) {
  const F low = to_float(sums.parts[kWordParts - 1]) * set(1 / 128.f);
  return kWordParts == 1 ? low : to_float(sums.parts[0]) + low;
}

struct KvInt8 {
  static constexpr int kParts = kWordParts;
};

template <typename A, typename B>
constexpr bool kIs = false;
template <typename A>
constexpr bool kIs<A, A> = true;

// One query head of one row: it sees keys [begin, end), of which [lo, hi) in the block at hand.
struct Query {
  float *y, *state;
  i64 begin, end, lo, hi;

  bool sees_block() const { return lo < hi; }
};

// How many sums the registers hold beside what goes into them, and the queries that are computed together.
constexpr int kSums = kRegisters == 32 ? 16 : kRegisters == 8 ? 6 : 2;
template <typename T>
constexpr int kTogether = kRegisters == 32 ? 8 : kSums / T::kParts;
// Vectors side by side for so many sums each.
constexpr int vectors_for(int sums, int most) { return sums * 4 <= kSums && most == 4 ? 4 : sums * 2 <= kSums ? 2 : 1; }

// A block of keys and values, and what is fetched while it is read.
struct Block {
  const u8* pages[kBlock / kPage];
  const u8* ahead[2 * (kBlock / kPage)];  // for the keys of each page, then for the values; null: nothing
  i64 from, to;                           // the slots that any of the queries sees
  KvLayout layout;
  i64 dim;
};

__attribute__((always_inline)) inline void fetch_scales(const u8* ahead) {
  if (ahead) fetch(ahead - kPage * 4, 0, kPage * 4);  // before the keys, and before the values
}

// scores[t][slot] = q . k of N queries and a page; `q` is [dim][N].
template <typename T, int N>
inline void score_page(const float* q, const Block& block, i64 page, float (*scores)[kBlock]) {
  constexpr int G = T::kGroup, V = vectors_for(N, 2);
  const u8* keys = block.pages[page] + block.layout.keys;
  for (i64 slot = 0; slot < kPage; slot += V * kLanes) {
    F sum[N][V];
    for (auto& row : sum)
      for (F& s : row) s = zero();
    for (i64 d = 0; d < block.dim; d += G) {
      F k[G][V];
      T::template get<V>(keys + (d / G * kPage + slot) * 4, kLanes, k);
      if constexpr (N <= 4) fetch(block.ahead[page], (d / G * kPage + slot) * 4, V * 64);
      for (int g = 0; g < G; g++)
        for (int t = 0; t < N; t++) {
          const F qt = set(q[(d + g) * N + t]);
          for (int v = 0; v < V; v++) sum[t][v] = fma(qt, k[g][v], sum[t][v]);
        }
    }
    for (int t = 0; t < N; t++)
      for (int v = 0; v < V; v++) store(scores[t] + page * kPage + slot + v * kLanes, sum[t][v]);
  }
}

// The same in integers; `q` is [N][2 * kMaxHeadDim], as split_words has it.
template <int N>
inline void score_page(const u8* q, const Words* words, const Block& block, i64 page, float (*scores)[kBlock]) {
  constexpr int V = vectors_for(N * kWordParts, 2);
  const u8* keys = block.pages[page] + block.layout.keys;
  const auto* scales = reinterpret_cast<const float*>(block.pages[page] + block.layout.key_scales);
  if constexpr (N <= 4) fetch_scales(block.ahead[page]);
  for (i64 slot = 0; slot < kPage; slot += V * kLanes) {
    WordSums sum[N][V];
    for (int t = 0; t < N; t++)
      for (WordSums& s : sum[t]) s = start_of(words[t]);
    for (i64 d = 0; d < block.dim; d += 4) {
      if constexpr (N <= 4) fetch(block.ahead[page], (d / 4 * kPage + slot) * 2, V * 32);  // and half with the softmax
      Quads k[V];
      for (int v = 0; v < V; v++) k[v] = load_quads(keys + (d / 4 * kPage + slot + v * kLanes) * 4);
      for (int t = 0; t < N; t++)
        for (int v = 0; v < V; v++) dot_words<kMaxHeadDim>(sum[t][v], k[v], q + t * 2 * kMaxHeadDim, d);
    }
    for (int t = 0; t < N; t++)
      for (int v = 0; v < V; v++) {
        const F scale = load(scales + slot + v * kLanes) * set(words[t].scale);
        store(scores[t] + page * kPage + slot + v * kLanes, value_of(sum[t][v]) * scale);
      }
  }
}

// The sums over the block's values, weighted; dimensions [d, d + V vectors), or the n from d on.
template <typename T, int N, int V>
inline void weigh(const Query* queries, const Block& block, i64 d, i64 n, const float (*weights)[kBlock],
                  F (&out)[N][V]) {
  constexpr int G = T::kGroup;
  for (auto& row : out)
    for (F& o : row) o = zero();
  // Slots that all queries see go in whole groups; others only to those who see them.
  i64 all_from = block.from, all_to = block.to;
  for (int t = 0; t < N; t++) {
    if (!queries[t].sees_block()) continue;
    all_from = larger(all_from, queries[t].lo), all_to = smaller(all_to, queries[t].hi);
  }
  all_from = round_up(all_from, G), all_to = all_to / G * G;
  if (all_to <= all_from) all_from = all_to = block.to;
  const auto group = [&](i64 slot, F(&v)[G][V]) {
    const i64 at = (slot % kPage / G * block.dim + d) * 4;
    T::template get<V>(block.pages[slot / kPage] + block.layout.values + at, n, v);
    if constexpr (N <= 4) fetch(block.ahead[kBlock / kPage + slot / kPage], at, V * 64);
  };
  const auto some = [&](i64 begin, i64 end) {
    for (i64 slot = begin; slot < end; slot++) {
      F v[G][V];
      group(slot, v);
      for (int t = 0; t < N; t++)
        if (queries[t].lo <= slot && slot < queries[t].hi)
          for (int i = 0; i < V; i++) out[t][i] = fma(set(weights[t][slot]), v[slot % G][i], out[t][i]);
    }
  };
  some(block.from, all_from);
  for (i64 slot = all_from; slot < all_to; slot += G) {
    F v[G][V];
    group(slot, v);
    for (int g = 0; g < G; g++)
      for (int t = 0; t < N; t++) {
        const F w = set(weights[t][slot + g]);
        for (int i = 0; i < V; i++) out[t][i] = fma(w, v[g][i], out[t][i]);
      }
  }
  some(all_to, block.to);
}

// The same in integers; the weights, scales of the values included, are in `parts`, as split_words has them.
template <int N, int V>
inline void weigh(const u8 (*parts)[2 * kBlock], const Words* words, const Block& block, i64 d, i64 n, F (&out)[N][V]) {
  WordSums sum[N][V];
  for (int t = 0; t < N; t++)
    for (WordSums& s : sum[t]) s = start_of(words[t]);
  for (i64 slot = block.from / 4 * 4; slot < block.to; slot += 4) {
    const i64 at = (slot % kPage / 4 * block.dim + d) * 4;
    const u8* values = block.pages[slot / kPage] + block.layout.values + at;
    const u8* ahead = block.ahead[kBlock / kPage + slot / kPage];
    if constexpr (N <= 4) fetch(ahead, at, V * 64);
    if (N <= 4 && d == 0 && slot % kPage == 0) fetch_scales(ahead);
    Quads v[V];
    for (int i = 0; i < V; i++) v[i] = V == 1 ? load_quads_first(values, n) : load_quads(values + i * 64);
    for (int t = 0; t < N; t++)
      for (int i = 0; i < V; i++) dot_words<kBlock>(sum[t][i], v[i], parts[t], slot);
  }
  for (int t = 0; t < N; t++)
    for (int i = 0; i < V; i++) out[t][i] = value_of(sum[t][i]) * set(words[t].scale);
}

// What a query has so far takes a block in: both are scaled to the larger maximum. The first block is taken as it is.
struct Factors {
  bool first;
  float before, now;
};
inline Factors fold(float* state, bool first, float top, float sum) {
  if (first) {
    state[0] = top, state[1] = sum;
    return {true, 0, 1};
  }
  const float all = state[0] > top ? state[0] : top;
  alignas(64) float factors[kLanes] = {state[0] - all, top - all};
  store(factors, exp(load(factors)));
  state[0] = all, state[1] = state[1] * factors[0] + sum * factors[1];
  return {false, factors[0], factors[1]};
}
inline F fold(const Factors& f, F before, F now) { return f.first ? now : before * set(f.before) + now * set(f.now); }

// A block for N queries: each gets the block's largest score, the sum of the exponentials and the output, which depend
// on nothing but the query and the keys that it sees.
template <typename T, int N>
void attend_block(const Attend& a, Query* queries, const void* q, const Words* q_words, Block& block, i64 number,
                  float* partials) {
  block.from = kBlock, block.to = 0;
  for (int t = 0; t < N; t++) {
    Query& query = queries[t];
    query.lo = larger(0, query.begin - number * kBlock), query.hi = smaller(kBlock, query.end - number * kBlock);
    if (query.sees_block()) block.from = smaller(block.from, query.lo), block.to = larger(block.to, query.hi);
  }
  if (block.from >= block.to) return;
  const i64 first = block.from / kPage * kPage, last = round_up(block.to, kPage);
  constexpr float kNone = -__builtin_inff();
  constexpr bool integers = kIs<T, KvInt8>;
  alignas(64) float weights[N][kBlock];
  alignas(64) u8 parts[N][2 * kBlock];
  Words words[N];
  Factors factors[N];
  float* out[N];
  for (i64 page = first / kPage; page < last / kPage; page++)
    if constexpr (integers)
      score_page<N>(static_cast<const u8*>(q), q_words, block, page, weights);
    else
      score_page<T, N>(static_cast<const float*>(q), block, page, weights);
  for (int t = 0; t < N; t++) {
    Query& query = queries[t];
    float* p = weights[t];
    if (!query.sees_block()) {
      std::memset(p + first, 0, size_t(last - first) * sizeof(float));
      words[t] = {};
      continue;
    }
    const auto keep = [&](F v, i64 i, float other) {
      if (query.lo <= i && i + kLanes <= query.hi) return v;
      return keep_range(v, smaller(larger(query.lo - i, 0), kLanes), smaller(larger(query.hi - i, 0), kLanes), other);
    };
    F largest = set(kNone), sum = zero();
    for (i64 i = first; i < last; i += kLanes) {
      const F v = keep(load(p + i) * set(a.scale), i, kNone);
      store(p + i, v);
      largest = max(v, largest);
    }
    const float top = lanes_max(largest);
    for (i64 i = first; i < last; i += kLanes) {
      const F v = exp(load(p + i) - set(top));
      if constexpr (integers && N <= 4) {
        const i64 half = block.dim * kPage / 2, at = t * kPage + i % kPage;
        const i64 from = half + half * at / (N * kPage), to = half + half * (at + kLanes) / (N * kPage);
        fetch(block.ahead[i / kPage], from, to - from);
      }
      sum = sum + v;
      store(p + i, v);
    }
    if (partials) {
      float* partial = partials + t * partial_size(block.dim);
      factors[t] = fold(partial, true, top, lanes_sum(sum));
      out[t] = partial + 2;
    } else {
      factors[t] = fold(query.state, number == query.begin / kBlock, top, lanes_sum(sum));
      out[t] = query.y;
    }
    if constexpr (integers) {
      for (i64 i = first; i < last; i += kLanes) {
        const u8* page = block.pages[i / kPage] + block.layout.value_scales;
        const F scale = load(reinterpret_cast<const float*>(page) + i % kPage);
        store(p + i, keep(load(p + i) * scale, i, 0));
      }
      std::memset(p, 0, size_t(first) * sizeof(float));
      words[t] = split_words<kBlock>(p, last, parts[t]);
    }
  }
  const auto output = [&](auto vectors, i64 d, i64 n) {
    constexpr int V = decltype(vectors)::value;
    F sums[N][V];
    if constexpr (integers)
      weigh<N, V>(parts, words, block, d, n, sums);
    else
      weigh<T, N, V>(queries, block, d, n, weights, sums);
    for (int t = 0; t < N; t++)
      for (int i = 0; i < V && queries[t].sees_block(); i++) {
        float* y = out[t] + d + i * kLanes;
        const i64 lanes = V == 1 ? n : kLanes;
        store_first(y, fold(factors[t], factors[t].first ? zero() : load_first(y, lanes), sums[t][i]), lanes);
      }
  };
  constexpr int V = vectors_for(N * T::kParts, 4);
  i64 d = 0;
  for (; d + V * kLanes <= block.dim; d += V * kLanes) output(Count<V>{}, d, kLanes);
  for (; d < block.dim; d += kLanes) output(Count<1>{}, d, smaller(kLanes, block.dim - d));
}

template <typename T>
void attend_as(const Attend& a, const Piece& piece, const Piece* next, void* scratch) {
  constexpr i64 kMany = 64;  // queries whose packed form fits into the scratch memory
  constexpr bool integers = kIs<T, KvInt8>;
  const i64 dim = a.kv.head_dim, repeat = a.n_heads / a.kv.n_kv_heads, n = piece.n_rows * repeat;
  const i64 width = round_up(dim, 4);
  static_assert(kMany * kMaxHeadDim * 4 <= kScratch);
  Block block;
  block.layout = kv_layout(a.kv.format, dim), block.dim = dim;
  const i64 distance = block.layout.size < 16384 ? 4 : 2;  // from what is read to what is fetched, in pages of keys
  // A block's reads in their order, at most so many: the keys of its pages, then the values. -> pages
  const auto reads_of = [&](const Piece& of, i64 number, const u8** reads, i64 most) {
    const i64 start = number * kBlock, last = a.rows.positions[of.row + of.n_rows - 1];
    const i64 n_pages = smaller(kBlock / kPage, last / kPage - start / kPage + 1);
    for (i64 p = 0; p < n_pages; p++) {
      const u8* page = head_of(a.kv, block.layout, a.rows, of.row, of.head, start + p * kPage);
      if (p < most) reads[p] = page + block.layout.keys;
      if (n_pages + p < most) reads[n_pages + p] = page + block.layout.values;
    }
    return n_pages;
  };
  for (i64 first = 0; first < n; first += kMany) {
    Query queries[kMany];
    Words words[kMany];
    const i64 count = smaller(kMany, n - first);
    const i64 stride_of_q = integers ? 2 * kMaxHeadDim : width * 4;  // bytes
    const auto packed = [&](i64 t) { return static_cast<u8*>(scratch) + t * stride_of_q; };
    for (i64 t = 0; t < count; t++) {
      const i64 row = piece.row + (first + t) / repeat, head = piece.head * repeat + (first + t) % repeat;
      const i64 position = a.rows.positions[row];
      const float* q = a.q + row * a.q_stride + head * dim;
      queries[t] = {a.y + row * a.y_stride + head * dim,
                    a.states + row * a.states_stride + head * 2,
                    a.window ? larger(0, position + 1 - a.window) : 0,
                    position + 1,
                    0,
                    0};
      const i64 together = t / kTogether<T> * kTogether<T>, stride = smaller(kTogether<T>, count - together);
      if constexpr (integers) {
        words[t] = split_words<kMaxHeadDim>(q, dim, packed(t));
      } else {
        float* out = reinterpret_cast<float*>(packed(together)) + t - together;
        for (i64 d = 0; d < dim; d++) out[d * stride] = q[d];
        for (i64 d = dim; d % T::kGroup; d++) out[d * stride] = 0;
      }
    }
    for (i64 b = piece.begin; b < piece.end; b++) {
      const u8* reads[3 * (kBlock / kPage)] = {};
      const i64 n_pages = reads_of(piece, b, reads, 2 * (kBlock / kPage));
      if (b + 1 < piece.end) reads_of(piece, b + 1, reads + 2 * n_pages, distance);
      if (b + 1 == piece.end && next) reads_of(*next, next->begin, reads + 2 * n_pages, distance);
      for (i64 p = 0; p < n_pages; p++) {
        block.pages[p] = reads[p] - block.layout.keys;
        block.ahead[p] = reads[p + smaller(distance, 2 * n_pages)];
        block.ahead[kBlock / kPage + p] = reads[n_pages + p + smaller(distance, 2 * n_pages)];
      }
      float* partials = piece.partials ? piece.partials + ((b - piece.begin) * n + first) * partial_size(dim) : nullptr;
      for (i64 t = 0; t < count; t += kTogether<T>)
        with_count<kTogether<T>>(smaller(kTogether<T>, count - t), [&](auto together) {
          attend_block<T, decltype(together)::value>(a, queries + t, packed(t), words + t, block, b,
                                                     partials ? partials + t * partial_size(dim) : nullptr);
        });
    }
  }
}

void attend(const Attend& a, const Piece& piece, const Piece* next, void* scratch) {
  switch (a.kv.format) {
    case KvFormat::f32:
      return attend_as<KvF32>(a, piece, next, scratch);
    case KvFormat::bf16:
      return attend_as<KvBf16>(a, piece, next, scratch);
    case KvFormat::int8:
      return attend_as<KvInt8>(a, piece, next, scratch);
  }
}

void merge(const Attend& a, const Piece* pieces, i64 n_pieces, float* y, i64 y_stride, i64 begin, i64 end) {
  const i64 dim = a.kv.head_dim, repeat = a.n_heads / a.kv.n_kv_heads;
  const auto fold_outputs = [&](const Factors& f, float* y, const float* out) {
    for (i64 d = 0; d < dim; d += kLanes) {
      const i64 n = smaller(kLanes, dim - d);
      store_first(y + d, fold(f, f.first ? zero() : load_first(y + d, n), load_first(out + d, n)), n);
    }
  };
  for (i64 row = begin; row < end; row++) {
    const Blocks seen = blocks_of(a.rows.positions[row], a.window);
    for (i64 h = 0; h < a.n_heads; h++) {
      const float *folded = a.y + row * a.y_stride + h * dim, *sums = a.states + row * a.states_stride + h * 2;
      float *out = y + row * y_stride + h * dim, state[2] = {sums[0], sums[1]};
      std::memcpy(out, folded, size_t(dim) * sizeof(float));
      for (const Piece* p = pieces; p < pieces + n_pieces; p++) {
        if (row < p->row || row >= p->row + p->n_rows || h / repeat != p->head) continue;
        for (i64 b = larger(p->begin, seen.begin); b < smaller(p->end, seen.end); b++) {
          const i64 query = (b - p->begin) * p->n_rows * repeat + (row - p->row) * repeat + h % repeat;
          const float* partial = p->partials + query * partial_size(dim);
          fold_outputs(fold(state, b == seen.begin, partial[0], partial[1]), out, partial + 2);
        }
      }
      const F inverse = set(1 / state[1]);
      for (i64 d = 0; d < dim; d += kLanes) {
        const i64 n = smaller(kLanes, dim - d);
        store_first(out + d, load_first(out + d, n) * inverse, n);
      }
    }
  }
}

// ---- sampling ----------------------------------------------------------------------------------------------------

float largest(const float* x, i64 n) {
  F found = set(-__builtin_inff());
  for (i64 i = 0; i < n; i += kLanes) {
    const i64 lanes = smaller(kLanes, n - i);
    const F v = load_first(x + i, lanes);
    found = max(lanes == kLanes ? v : keep_range(v, 0, lanes, -__builtin_inff()), found);
  }
  return lanes_max(found);
}

i64 arg_max(const float* x, i64 n) {
  constexpr i64 kChunk = 256;
  float top = -__builtin_inff();
  i64 begin = 0, end = n;
  for (i64 chunk = 0; chunk < n; chunk += kChunk) {
    const float found = largest(x + chunk, smaller(kChunk, n - chunk));
    if (found > top) top = found, begin = chunk, end = smaller(chunk + kChunk, n);
  }
  for (i64 i = begin; i < end; i++)
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

// In lanes of integers, which the compiler finds by itself.
void noise(std::uint64_t key, u32 position, u32 first, u32* words, u32* most) {
  constexpr int n = kNoiseCounters;
  u32 c0[n], c1[n], c2[n], c3[n];
  for (int i = 0; i < n; i++) c0[i] = first + u32(i), c1[i] = position, c2[i] = c3[i] = 0;
  u32 k0 = u32(key), k1 = u32(key >> 32);
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < n; i++) {
      const std::uint64_t p0 = std::uint64_t{kPhiloxFactors[0]} * c0[i], p1 = std::uint64_t{kPhiloxFactors[1]} * c2[i];
      c0[i] = u32(p1 >> 32) ^ c1[i] ^ k0;
      c2[i] = u32(p0 >> 32) ^ c3[i] ^ k1;
      c1[i] = u32(p1);
      c3[i] = u32(p0);
    }
    k0 += kPhiloxKeys[0], k1 += kPhiloxKeys[1];
  }
  for (int l = 0; l < kNoiseLanes; l++) most[l] = 0;
  const u32* const rows[4] = {c0, c1, c2, c3};
  for (int j = 0; j < 4; j++) {
    for (int i = 0; i < n; i++) words[j * n + i] = rows[j][i];
    for (int i = 0; i < n; i += kNoiseLanes)
      for (int l = 0; l < kNoiseLanes; l++) most[l] = most[l] > rows[j][i + l] ? most[l] : rows[j][i + l];
  }
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
    halves,
    linear_half,
    join_halves,
    quantize_rows,
    round_rows,
    sizeof(RoundedInput),
    embed,
    layer_norm,
    rms_norm,
    gate,
    add,
    rotate,
    store_kv,
    attend,
    merge,
    largest,
    arg_max,
    sum_exp,
    noise,
    read,
};

}  // namespace PRONGHORN_NAMESPACE
}  // namespace pronghorn
