// A model as a list of instructions, recorded once and executed for any batch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace pronghorn {

// Throws std::invalid_argument for sizes or groups that no kernel takes.
void check_matrix(const Matrix& matrix);

// Anonymous memory that takes space only where it is touched; zero at first.
class Memory {
 public:
  Memory() = default;
  explicit Memory(i64 size);
  ~Memory();
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;

  std::uint8_t* data() const { return data_; }
  i64 size() const { return size_; }

 private:
  std::uint8_t* data_ = nullptr;
  i64 size_ = 0;
};

class KvCache {
 public:
  KvCache(i64 n_layers, i64 n_pages, i64 n_kv_heads, i64 head_dim, KvFormat format);

  KvLayer layer(i64 index) const;
  void copy_page(i64 source, i64 target);  // in all layers; std::out_of_range for one that is not there
  i64 n_layers() const { return n_layers_; }
  i64 n_pages() const { return n_pages_; }
  i64 n_kv_heads() const { return n_kv_heads_; }
  i64 head_dim() const { return head_dim_; }

 private:
  i64 n_layers_, n_pages_, n_kv_heads_, head_dim_;
  KvFormat format_;
  Memory memory_;  // [n_pages][n_layers][n_kv_heads][kv_layout().size]
};

// What each thread does of a batch's attention: even shares of the blocks of keys that are read, in the order of heads,
// rows and blocks. A share may begin amid a tile's blocks: then it is left in partials, for merge.
class AttendPlan {
 public:
  AttendPlan(const Rows& rows, i64 n_heads, i64 n_kv_heads, i64 head_dim, i64 window, int threads);

  i64 floats() const { return floats_; }  // the partials' size
  void place(float* partials);            // where they stand; once, before anything below

  const Piece* begin(int thread) const { return pieces_.data() + begins_[static_cast<size_t>(thread)]; }
  const Piece* end(int thread) const { return begin(thread + 1); }
  const std::vector<Piece>& partials() const { return partials_; }

 private:
  struct Left {
    size_t piece;
    i64 offset;
  };

  std::vector<Piece> pieces_, partials_;
  std::vector<size_t> begins_;
  std::vector<Left> left_;
  i64 floats_ = 0;
};

// One step's work, flat; see ops.Batch. Everything in it is checked before it is used.
struct Batch {
  const std::int32_t *token_ids, *positions, *sequence;  // [n_tokens]
  i64 n_tokens;
  const std::int32_t* page_table;  // [n_sequences][table_width]
  i64 n_sequences, table_width;
  const std::int32_t* logits_rows;  // [n_logits]
  i64 n_logits;
};

// Columns [offset, offset + width) of a buffer.
struct View {
  int buffer = -1;
  i64 offset = 0, width = 0;
};

class Program {
 public:
  Program(i64 max_tokens, i64 vocab_size);

  // Recording. What does not fit together throws std::invalid_argument.
  int add_matrix(const Matrix& matrix);      // -> its number; the data must outlive the program
  int add_vector(const float* data, i64 n);  // -> its number
  View embed(int table);
  View positions(View x, int table);
  View layer_norm(View x, int weight, int bias, float eps);
  View rms_norm(View x, int weight, float eps);
  View linear(View x, int matrix, int bias, Activation activation, View residual);
  View gate(View g, View up, Activation activation);
  View add(View x, View y);
  int rope(const std::vector<double>& frequencies, bool interleaved, double magnitude);  // -> its number
  View attention(View q, View k, View v, i64 layer, i64 n_heads, i64 n_kv_heads, i64 head_dim, float scale, i64 window,
                 int rope);
  void logits(View x, int matrix, int bias);
  void set_data(int matrix, const std::uint8_t* data) { matrices_.at(static_cast<size_t>(matrix)).data = data; }
  void finish();  // places the buffers; the program can run from here on

  // Executes the batch; the logits [n_logits][vocab_size] are valid until the next run. Throws std::invalid_argument
  // for a batch that does not fit the program or the cache.
  const float* run(const Batch& batch, const KvCache& cache, Pool& pool);

  i64 vocab_size() const { return vocab_size_; }

 private:
  enum class Kind {
    embed,
    positions,
    layer_norm,
    rms_norm,
    quantize,
    round,
    linear,
    join,
    angles,
    keys_values,
    attend,
    merge,
    gate,
    add,
    gather
  };

  struct Vector {
    const float* data;
    i64 n;
  };
  // How a step's work is shared out. Many rows: each thread has its own. Few: each thread computes them all into
  // buffers of its own, which costs less than to wait for the one that does.
  enum Mode { kMany, kFew, kModes };
  // A row of `row_bytes` for each token, or for each row of logits.
  struct Buffer {
    i64 row_bytes;
    bool logits;
    bool few = false;           // only for few rows
    i64 first = -1, last = -1;  // the instructions that it lives through
    bool repeated = false;      // for few rows each thread has one
    i64 at[kModes] = {};        // in a mode's arena
  };
  struct Rope {
    std::vector<float> frequencies;
    bool interleaved;
    float magnitude;
    int cos = -1, sin = -1;  // buffers
  };
  struct Instruction {
    Kind kind{};
    View x{}, y{}, z{}, out{};
    int matrix = -1, weight = -1, bias = -1, rope = -1;
    int values = -1, scales = -1, sums = -1;  // buffers of a linear's rounded input
    int halves = -1;                          // buffer: for few rows a linear leaves its sums there, for a join
    Activation activation = Activation::none;
    float number = 0;  // eps, or attention's scale
    i64 layer = 0, n_heads = 0, n_kv_heads = 0, head_dim = 0, window = 0, group = 0;
    size_t plan = 0;
    bool to_logits = false;
    bool repeated = false;      // for few rows each thread computes them all
    bool barrier[kModes] = {};  // before it: set by finish()
  };
  // What an instruction reads and writes: buffers, and what has numbers below zero (the logits, each layer's pages).
  struct Accesses {
    std::vector<i64> reads, writes;
  };

  int new_buffer(i64 row_bytes, bool logits);
  View new_view(i64 width, bool logits = false);
  Instruction& append(Kind kind, std::initializer_list<View> reads, std::initializer_list<int> buffers = {});
  void touch(int buffer);
  Instruction linear_instruction(View x, int matrix, int bias, Activation activation, View residual);
  const Vector* vector(int number, i64 n) const;
  void check(const Batch& batch, const KvCache& cache) const;
  Accesses accesses(const Instruction& instruction, Mode mode) const;
  void find_repeated();
  void place_barriers(Mode mode);
  i64 place_buffers(Mode mode, i64 rows);
  // A thread's view of the buffers.
  struct Frame {
    const Program& program;
    Mode mode;
    int thread;

    std::uint8_t* buffer(int number) const;
    float* floats(const View& view) const;
  };
  void execute(const Instruction& in, const Batch& batch, const KvCache& cache, const Frame& frame,
               const std::vector<AttendPlan>& plans, int size, void* scratch) const;
  i64 stride(const View& view) const;
  static bool same(const View& a, const View& b) {
    return a.buffer == b.buffer && a.offset == b.offset && a.width == b.width;
  }

  const Kernels& kernels_;
  i64 max_tokens_, vocab_size_;
  i64 max_position_ = INT64_MAX, max_id_ = INT64_MAX;
  bool finished_ = false;
  std::vector<Matrix> matrices_;
  std::vector<Vector> vectors_;
  std::vector<Rope> ropes_;
  std::vector<Buffer> buffers_;
  std::vector<Instruction> instructions_;
  std::vector<size_t> planned_;  // the instruction that each plan of a run is made for
  i64 few_bytes_ = 0;            // of a thread's part of the arena for few rows
  Memory arenas_[kModes], logits_, partials_;
};

}  // namespace pronghorn
