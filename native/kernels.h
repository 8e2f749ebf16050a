// The kernels: one table of functions for each instruction set, all with the same contract.
//
// Every function computes a range of its work, so that any number of threads may share it; what it computes for
// one row, output or head never depends on the range, nor on the other rows of the batch. That is how the same
// prompt gives the same tokens in any company.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pronghorn {

using i64 = std::int64_t;

enum class Format : int { f32, f16, bf16, int8, int4 };
enum class Order : int { out_in, in_out, packed };
enum class Activation : int { none, gelu, gelu_new, silu, relu };

constexpr i64 kPage = 32;          // tokens in a page of the KV cache
constexpr i64 kPanel = 16;         // outputs in a panel of a packed matrix
constexpr i64 kMaxHeadDim = 1024;  // integer sums of int8 keys stay under 2^31
constexpr i64 kMaxInputs = 65536;  // of a matrix: integer sums stay under 2^31
constexpr i64 kSlack = 1024;       // readable bytes after a packed matrix: a last tile may read past its end

// A weight matrix. Dense formats are in the file's order; int8 and int4 are in panels (see weights/types.py).
struct Matrix {
  const std::uint8_t* data = nullptr;
  Format format = Format::f32;
  Order order = Order::out_in;
  i64 n_out = 0, n_in = 0;
  i64 group = 0;           // 32 or a multiple of 64; for int8 also 0: one scale an output
  bool symmetric = false;  // int4: no minima are stored
};

// Each source's own (static), so that no instruction set's copy is linked into another.
static constexpr i64 div_up(i64 a, i64 b) { return (a + b - 1) / b; }
static constexpr i64 round_up(i64 a, i64 b) { return div_up(a, b) * b; }

static constexpr bool is_packed(Format format) { return format == Format::int8 || format == Format::int4; }

// The packed panel: where its parts are, in bytes from its start.
struct PanelLayout {
  i64 n_groups, minima, values, size;
};

static constexpr PanelLayout panel_layout(Format format, i64 n_in, i64 group, bool symmetric) {
  if (format == Format::int8) {
    const i64 n_groups = group ? div_up(n_in, group) : 1;
    const i64 values = group ? round_up(n_groups * kPanel * 2, 64) : kPanel * 4;
    return {n_groups, 0, values, values + div_up(n_in, 4) * 64};
  }
  const i64 n_groups = div_up(n_in, group), part = round_up(n_groups * kPanel * 2, 64);
  const i64 whole = n_in / group, rest = n_in % group;
  const i64 values = symmetric ? part : 2 * part;
  return {n_groups, part, values, values + (whole * div_up(group, 8) + div_up(rest, 8)) * 64};
}

static constexpr i64 packed_size(Format format, i64 n_out, i64 n_in, i64 group, bool symmetric) {
  return div_up(n_out, kPanel) * panel_layout(format, n_in, group, symmetric).size + kSlack;
}

// A linear layer's input, in the form that its weights' format asks for.
//   f32, f16: the values, `x`.
//   bf16:     rounded to bf16 in `values`, as bf16 or f32 (Kernels::rounded_size), rows of `stride` elements, zero
//             up to a multiple of 32.
//   int8, int4: 8-bit integers within +-127 in `values`, rows of `stride` bytes, zero up to a multiple of 64;
//             for each row and group a scale in `scales` and the sum of its integers in `sums` (as integers).
// `values` is readable for a multiple of 16 rows.
struct Input {
  const float* x = nullptr;
  i64 x_stride = 0;
  const void* values = nullptr;
  i64 stride = 0;
  const float* scales = nullptr;       // [n_rows][groups of the weights]
  const std::int32_t* sums = nullptr;  // the same
};

// y = activation(x @ w.T + bias) + residual
struct Linear {
  const Matrix* w;
  Input in;
  i64 n_rows;
  const float* bias;  // [n_out] or null
  Activation activation;
  const float* residual;  // may be y itself; null for none
  i64 residual_stride;
  float* y;
  i64 y_stride;
};

enum class KvFormat : int { f32, bf16, int8 };

// One head's part of a page of the KV cache, in bytes from its start. Elements come in groups that fill 32 bits, of
// g = 1 (f32), 2 (bf16) or 4 (int8): keys are [head_dim / g][kPage][g], zero past head_dim, values [kPage /
// g][head_dim][g]. int8 is stored + 128, and each token has a scale, f32 [kPage].
struct KvLayout {
  i64 group, key_scales, keys, value_scales, values, size;
};

static constexpr KvLayout kv_layout(KvFormat format, i64 head_dim) {
  const i64 group = format == KvFormat::f32 ? 1 : format == KvFormat::bf16 ? 2 : 4;
  const i64 scales = format == KvFormat::int8 ? kPage * 4 : 0, keys = div_up(head_dim, group) * kPage * 4;
  const i64 size = round_up(2 * scales + keys + kPage / group * head_dim * 4, 64);
  return {group, 0, scales, scales + keys, 2 * scales + keys, size};
}

// The KV cache of one layer: head h of page p is at data + p * page_stride + h * kv_layout().size.
struct KvLayer {
  std::uint8_t* data;
  KvFormat format;
  i64 n_kv_heads, head_dim, page_stride;
};

struct Rotation {
  i64 n_pairs;  // 0: no rotation
  bool interleaved;
  const float* cos;  // [tokens][n_pairs]
  const float* sin;
};

// The step's shape, as attention needs it.
struct Rows {
  i64 n;
  const std::int32_t* positions;   // [n]
  const std::int32_t* sequence;    // [n]
  const std::int32_t* page_table;  // [sequences][table_width]
  i64 table_width;
};

struct Attend {
  Rows rows;
  const float* q;
  i64 q_stride;
  KvLayer kv;
  i64 n_heads;
  float scale;
  i64 window;     // 0: all
  float* states;  // [rows][n_heads][2]: the largest score so far, and the sum of the exponentials
  i64 states_stride;
  float* y;  // the output, not yet divided by the sum
  i64 y_stride;
};

// Part of a layer's attention: a tile of rows (one sequence's, at consecutive positions) under one key head, over
// blocks [begin, end) of kBlock keys each. The part that has the tile's first block folds into y and states. What other
// threads do is left in `partials`, for each block and query (rows, then heads): the largest, the sum, the output.
struct Piece {
  i64 row, n_rows, head, begin, end;
  float* partials;  // null: y and states
};
constexpr i64 kBlock = 4 * kPage;  // keys that share one maximum: it is part of the numerics
static constexpr i64 partial_size(i64 head_dim) { return head_dim + 2; }
// The blocks of keys that a row sees: [begin, end).
struct Blocks {
  i64 begin, end;
};
static constexpr Blocks blocks_of(i64 position, i64 window) {
  return {window && position >= window ? (position + 1 - window) / kBlock : 0, position / kBlock + 1};
}

// A thread's own memory for unpacked weights and the like; kScratch bytes, 64-byte aligned.
constexpr i64 kScratch = 4 << 20;

// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): its factors, and its key's steps.
constexpr std::uint32_t kPhiloxFactors[2] = {0xD2511F53, 0xCD9E8D57}, kPhiloxKeys[2] = {0x9E3779B9, 0xBB67AE85};
constexpr int kNoiseCounters = 64, kNoiseLanes = 16;  // see Kernels::noise

struct Kernels {
  const char* isa;

  // Outputs [begin, end) of all rows; begin is a multiple of kPanel.
  void (*linear)(const Linear&, i64 begin, i64 end, void* scratch);
  // Whether one row's products with such weights can be shared out by halves of the inputs, too, so that each thread
  // reads long stretches of them. linear_half: a half's sums of outputs [begin, end) into its sums [n_out].
  // join_halves: from both, [2][n_out], what `linear` gives, to the bit.
  bool (*halves)(const Matrix&);
  void (*linear_half)(const Linear&, int half, i64 begin, i64 end, float* sums, void* scratch);
  void (*join_halves)(const Linear&, const float* sums, i64 begin, i64 end);
  // Rows [begin, end) of x into the form that `format` and `group` ask for; group 0 is the whole row.
  void (*quantize_rows)(const float* x, i64 x_stride, i64 n_in, i64 group, std::int8_t* values, i64 stride,
                        float* scales, std::int32_t* sums, i64 begin, i64 end);
  void (*round_rows)(const float* x, i64 x_stride, i64 n_in, void* values, i64 stride, i64 begin, i64 end);
  i64 rounded_size;  // bytes of a value of round_rows

  // y[row] = table[ids[row]] for rows [begin, end); `add` adds instead.
  void (*embed)(const Matrix& table, const std::int32_t* ids, float* y, i64 y_stride, bool add, i64 begin, i64 end);
  // Rows [begin, end) of `width` values; bias may be null.
  void (*layer_norm)(const float* x, i64 x_stride, const float* weight, const float* bias, float eps, i64 width,
                     float* y, i64 y_stride, i64 begin, i64 end);
  // Each run of `width` of `runs` runs in a row.
  void (*rms_norm)(const float* x, i64 x_stride, const float* weight, float eps, i64 width, i64 runs, float* y,
                   i64 y_stride, i64 begin, i64 end);
  void (*gate)(const float* gate, i64 gate_stride, const float* up, i64 up_stride, Activation activation, i64 width,
               float* y, i64 y_stride, i64 begin, i64 end);
  void (*add)(const float* x, i64 x_stride, const float* z, i64 z_stride, i64 width, float* y, i64 y_stride, i64 begin,
              i64 end);

  // Turns the heads of rows [begin, end) in place.
  void (*rotate)(const Rotation&, float* x, i64 x_stride, i64 n_heads, i64 head_dim, i64 begin, i64 end);
  // Writes k and v of rows [begin, end) into their pages.
  void (*store_kv)(const KvLayer&, const Rows&, const float* k, i64 k_stride, const float* v, i64 v_stride, i64 begin,
                   i64 end);
  // `next`: the piece that this thread attends to afterwards, whose first keys are fetched meanwhile; or null.
  void (*attend)(const Attend&, const Piece&, const Piece* next, void* scratch);
  // y of rows [begin, end): what attend has left, with what stands in partials, over the sums.
  void (*merge)(const Attend&, const Piece* partials, i64 n_partials, float* y, i64 y_stride, i64 begin, i64 end);

  // For sampling: the largest value (NaN is none; -inf if there is no other), its first index (-1 if there is none),
  // and the sum of exp(scale * (x - shift)) in chunks fixed by n.
  float (*largest)(const float* x, i64 n);
  i64 (*arg_max)(const float* x, i64 n);
  double (*sum_exp)(const float* x, i64 n, float shift, float scale);
  // kNoiseCounters blocks of Philox4x32-10 side by side: words[j][i] is word j of the counter (first + i, position, 0,
  // 0). most[l] is the largest of the words that stand at l modulo kNoiseLanes.
  void (*noise)(std::uint64_t key, std::uint32_t position, std::uint32_t first, std::uint32_t* words,
                std::uint32_t* most);

  // Reads `size` bytes as fast as the machine can: the ceiling that decoding is measured against.
  std::uint64_t (*read)(const void* p, i64 size);
};

// The tables that this machine can run, best first, ended by null.
const Kernels* const* available_kernels();
// The one of this name, or null if it is unknown or the machine lacks it.
const Kernels* kernels_named(const char* name);
// The one in use: PRONGHORN_ISA's, or the best. Throws std::runtime_error if PRONGHORN_ISA names none of these.
const Kernels& chosen_kernels();

// FTZ and DAZ, round to nearest: the environment that every kernel runs in, restored at the end of the scope.
class FloatEnvironment {
 public:
  FloatEnvironment();
  ~FloatEnvironment();
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
  std::uint64_t saved_;
};

}  // namespace pronghorn
