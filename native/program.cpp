#include "program.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

namespace pronghorn {

namespace {

constexpr i64 kFewRows = 1;

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

}  // namespace

// ---- memory ------------------------------------------------------------------------------------------------------

Memory::Memory(i64 size) : size_(size) {
  if (size == 0) return;
  void* p = mmap(nullptr, static_cast<size_t>(size), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<std::uint8_t*>(p);
}
Memory::~Memory() {
  if (data_) munmap(data_, static_cast<size_t>(size_));
}
Memory::Memory(Memory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

KvCache::KvCache(i64 n_layers, i64 n_pages, i64 n_kv_heads, i64 head_dim, KvFormat format)
    : n_layers_(n_layers), n_pages_(n_pages), n_kv_heads_(n_kv_heads), head_dim_(head_dim), format_(format) {
  require(n_layers > 0 && n_pages > 0 && n_kv_heads > 0 && head_dim > 0, "a KV cache has at least one of everything");
  require(head_dim <= kMaxHeadDim, "a head has at most 1024 dimensions");
  const i64 page = n_layers * n_kv_heads * kv_layout(format, head_dim).size;
  require(double(n_pages) * double(page) < 1e16, "this KV cache is larger than any memory");
  memory_ = Memory(n_pages * page);
  madvise(memory_.data(), static_cast<size_t>(memory_.size()), MADV_HUGEPAGE);
}

void KvCache::copy_page(i64 source, i64 target) {
  if (source < 0 || source >= n_pages_ || target < 0 || target >= n_pages_)
    throw std::out_of_range("a page is outside of the cache");
  const i64 size = memory_.size() / n_pages_;  // of all layers
  std::memmove(memory_.data() + target * size, memory_.data() + source * size, static_cast<size_t>(size));
}

KvLayer KvCache::layer(i64 index) const {
  const i64 size = n_kv_heads_ * kv_layout(format_, head_dim_).size;
  return {memory_.data() + index * size, format_, n_kv_heads_, head_dim_, n_layers_ * size};
}

// ---- attention's shares ------------------------------------------------------------------------------------------

AttendPlan::AttendPlan(const Rows& rows, i64 n_heads, i64 n_kv_heads, i64 head_dim, i64 window, int threads) {
  struct Tile {
    i64 row, n_rows;
    Blocks blocks;
    i64 before, cost;  // of the tiles before it; of each of its blocks
  };
  constexpr i64 kQueries = 48;  // read a block while it is in the cache
  constexpr i64 kReading = 4;   // reading a block costs as much as so many queries
  const i64 repeat = n_heads / n_kv_heads, most = std::max<i64>(1, kQueries / repeat);
  std::vector<Tile> tiles;
  i64 total = 0;  // of one head
  for (i64 row = 0; row < rows.n;) {
    i64 n = 1;
    while (n < most && row + n < rows.n && rows.sequence[row + n] == rows.sequence[row] &&
           rows.positions[row + n] == rows.positions[row] + n)
      n++;
    const Blocks blocks{blocks_of(rows.positions[row], window).begin,
                        blocks_of(rows.positions[row + n - 1], window).end};
    tiles.push_back({row, n, blocks, total, n * repeat + kReading});
    total += (blocks.end - blocks.begin) * tiles.back().cost;
    row += n;
  }
  // Where a thread's share begins: in which tile of which head, and at which block.
  struct Place {
    size_t tile;
    i64 block;
  };
  const auto place_of = [&](int thread) -> Place {
    const i64 at = total * n_kv_heads * thread / threads, head = at / total;
    if (head == n_kv_heads) return {tiles.size() * static_cast<size_t>(n_kv_heads), 0};
    const auto after = std::upper_bound(tiles.begin(), tiles.end(), at % total,
                                        [](i64 cost, const Tile& tile) { return cost < tile.before; });
    const size_t tile = static_cast<size_t>(after - tiles.begin()) - 1;
    return {static_cast<size_t>(head) * tiles.size() + tile,
            tiles[tile].blocks.begin + (at % total - tiles[tile].before) / tiles[tile].cost};
  };
  for (int thread = 0; thread < threads; thread++) {
    begins_.push_back(pieces_.size());
    const Place from = place_of(thread), to = place_of(thread + 1);
    for (size_t i = from.tile; i <= to.tile && i < tiles.size() * static_cast<size_t>(n_kv_heads); i++) {
      const Tile& tile = tiles[i % tiles.size()];
      const i64 first = i == from.tile ? from.block : tile.blocks.begin,
                last = i == to.tile ? to.block : tile.blocks.end;
      if (first >= last) continue;
      pieces_.push_back({tile.row, tile.n_rows, static_cast<i64>(i / tiles.size()), first, last, nullptr});
      if (first == tile.blocks.begin) continue;
      left_.push_back({pieces_.size() - 1, floats_});
      floats_ += (last - first) * tile.n_rows * repeat * partial_size(head_dim);
    }
  }
  begins_.push_back(pieces_.size());
}

void AttendPlan::place(float* memory) {
  for (const auto& [piece, offset] : left_) {
    pieces_[piece].partials = memory + offset;
    partials_.push_back(pieces_[piece]);
  }
}

// ---- recording ---------------------------------------------------------------------------------------------------

Program::Program(i64 max_tokens, i64 vocab_size)
    : kernels_(chosen_kernels()), max_tokens_(max_tokens), vocab_size_(vocab_size) {
  require(max_tokens > 0 && vocab_size > 0, "a program has at least one token");
}

void check_matrix(const Matrix& m) {
  require(m.n_in > 0 && m.n_in <= kMaxInputs, "a matrix has 1 to 65536 inputs");
  require(m.n_out > 0 && m.n_out <= INT32_MAX, "a matrix has 1 to 2147483647 outputs");
  const bool none = m.group == 0 && m.format != Format::int4;
  require(none || m.group == 32 || (m.group > 0 && m.group % 64 == 0), "groups are of 32 or of a multiple of 64");
}

int Program::add_matrix(const Matrix& m) {
  require(is_packed(m.format) == (m.order == Order::packed), "int8 and int4 are packed, and nothing else is");
  check_matrix(m);
  matrices_.push_back(m);
  return static_cast<int>(matrices_.size()) - 1;
}

int Program::add_vector(const float* data, i64 n) {
  vectors_.push_back({data, n});
  return static_cast<int>(vectors_.size()) - 1;
}

const Program::Vector* Program::vector(int number, i64 n) const {
  if (number < 0) return nullptr;
  const Vector& v = vectors_.at(static_cast<size_t>(number));
  require(n == 0 || v.n == n, "a vector's length does not fit");
  return &v;
}

int Program::new_buffer(i64 row_bytes, bool logits) {
  buffers_.push_back({row_bytes, logits});
  return static_cast<int>(buffers_.size()) - 1;
}

View Program::new_view(i64 width, bool logits) { return {new_buffer(round_up(width, 16) * 4, logits), 0, width}; }

void Program::touch(int buffer) {
  if (buffer < 0) return;
  Buffer& b = buffers_.at(static_cast<size_t>(buffer));
  const i64 now = static_cast<i64>(instructions_.size()) - 1;
  if (b.first < 0) b.first = now;
  b.last = now;
}

Program::Instruction& Program::append(Kind kind, std::initializer_list<View> views,
                                      std::initializer_list<int> buffers) {
  require(!finished_, "the program is finished");
  instructions_.emplace_back().kind = kind;
  for (const View& v : views) touch(v.buffer);
  for (int b : buffers) touch(b);
  return instructions_.back();
}

View Program::embed(int table) {
  const Matrix& m = matrices_.at(static_cast<size_t>(table));
  require(m.order != Order::in_out, "an embedding table is [vocabulary, embd]");
  max_id_ = std::min(max_id_, m.n_out);
  const View out = new_view(m.n_in);
  Instruction& in = append(Kind::embed, {out});
  in.matrix = table, in.out = out;
  return out;
}

View Program::positions(View x, int table) {
  const Matrix& m = matrices_.at(static_cast<size_t>(table));
  require(m.order != Order::in_out && m.n_in == x.width, "a table of positions is [context, embd]");
  max_position_ = std::min(max_position_, m.n_out);
  Instruction& in = append(Kind::positions, {x});
  in.matrix = table, in.out = x;
  return x;
}

View Program::layer_norm(View x, int weight, int bias, float eps) {
  vector(weight, x.width), vector(bias, x.width);
  const View out = new_view(x.width);
  Instruction& in = append(Kind::layer_norm, {x, out});
  in.x = x, in.out = out, in.weight = weight, in.bias = bias, in.number = eps;
  return out;
}

View Program::rms_norm(View x, int weight, float eps) {
  const Vector* w = vector(weight, 0);
  require(w && w->n > 0 && x.width % w->n == 0, "a norm's weight divides the row");
  const View out = new_view(x.width);
  Instruction& in = append(Kind::rms_norm, {x, out});
  in.x = x, in.out = out, in.weight = weight, in.number = eps;
  return out;
}

// The linear without its output; its input is rounded first if the weights ask for it, once for all its readers.
Program::Instruction Program::linear_instruction(View x, int matrix, int bias, Activation activation, View residual) {
  const Matrix& m = matrices_.at(static_cast<size_t>(matrix));
  require(m.n_in == x.width, "a matrix's inputs do not fit");
  vector(bias, m.n_out);
  require(residual.buffer < 0 || residual.width == m.n_out, "a residual does not fit");
  const bool logits = buffers_.at(static_cast<size_t>(x.buffer)).logits;
  Instruction linear;
  linear.kind = Kind::linear;
  linear.x = x, linear.z = residual, linear.matrix = matrix, linear.bias = bias, linear.activation = activation;
  if (m.format == Format::f32 || m.format == Format::f16) return linear;
  const Kind kind = m.format == Format::bf16 ? Kind::round : Kind::quantize;
  for (auto it = instructions_.rbegin(); it != instructions_.rend(); ++it) {
    if (it->kind == kind && same(it->x, x) && it->group == m.group) {
      linear.values = it->values, linear.scales = it->scales, linear.sums = it->sums;
      return linear;
    }
    const bool rotated = it->kind == Kind::keys_values && (it->x.buffer == x.buffer || it->y.buffer == x.buffer);
    if (it->out.buffer == x.buffer || rotated) break;  // written since
  }
  const i64 groups = m.group ? div_up(m.n_in, m.group) : 1;
  Instruction rounding;
  rounding.kind = kind, rounding.x = x, rounding.group = m.group;
  if (kind == Kind::round) {
    rounding.values = new_buffer(round_up(m.n_in, 32) * kernels_.rounded_size, logits);
  } else {
    rounding.values = new_buffer(round_up(m.n_in, 64), logits);
    rounding.scales = new_buffer(groups * 4, logits);
    rounding.sums = new_buffer(groups * 4, logits);
  }
  append(kind, {x}, {rounding.values, rounding.scales, rounding.sums}) = rounding;
  linear.values = rounding.values, linear.scales = rounding.scales, linear.sums = rounding.sums;
  return linear;
}

View Program::linear(View x, int matrix, int bias, Activation activation, View residual) {
  Instruction linear = linear_instruction(x, matrix, bias, activation, residual);
  const Matrix& m = matrices_[static_cast<size_t>(matrix)];
  linear.out = new_view(m.n_out);
  if (kernels_.halves(m)) {
    linear.halves = new_buffer(2 * m.n_out * 4, false);
    buffers_.back().few = true;
  }
  append(Kind::linear, {x, residual, linear.out}, {linear.values, linear.scales, linear.sums, linear.halves}) = linear;
  if (linear.halves >= 0) {
    linear.kind = Kind::join;
    append(Kind::join, {residual, linear.out}, {linear.halves}) = linear;
  }
  return linear.out;
}

View Program::gate(View g, View up, Activation activation) {
  require(g.width == up.width, "a gate is as wide as what it gates");
  const View out = new_view(g.width);
  Instruction& in = append(Kind::gate, {g, up, out});
  in.x = g, in.y = up, in.out = out, in.activation = activation;
  return out;
}

View Program::add(View x, View y) {
  require(x.width == y.width, "a sum's terms are equally wide");
  const View out = new_view(x.width);
  Instruction& in = append(Kind::add, {x, y, out});
  in.x = x, in.y = y, in.out = out;
  return out;
}

int Program::rope(const std::vector<double>& frequencies, bool interleaved, double magnitude) {
  Rope rope{{frequencies.begin(), frequencies.end()}, interleaved, static_cast<float>(magnitude)};
  for (size_t i = 0; i < ropes_.size(); i++)
    if (ropes_[i].frequencies == rope.frequencies && ropes_[i].interleaved == interleaved &&
        ropes_[i].magnitude == rope.magnitude)
      return static_cast<int>(i);
  require(!rope.frequencies.empty(), "a rotation has frequencies");
  const i64 bytes = static_cast<i64>(rope.frequencies.size()) * 4;
  rope.cos = new_buffer(bytes, false), rope.sin = new_buffer(bytes, false);
  ropes_.push_back(std::move(rope));
  const int number = static_cast<int>(ropes_.size()) - 1;
  append(Kind::angles, {}, {ropes_.back().cos, ropes_.back().sin}).rope = number;
  return number;
}

View Program::attention(View q, View k, View v, i64 layer, i64 n_heads, i64 n_kv_heads, i64 head_dim, float scale,
                        i64 window, int rope) {
  require(layer >= 0 && n_kv_heads > 0 && n_heads % n_kv_heads == 0 && head_dim > 0,
          "query heads are a multiple of key heads");
  require(head_dim <= kMaxHeadDim, "a head has at most 1024 dimensions");
  require(q.width == n_heads * head_dim && k.width == n_kv_heads * head_dim && v.width == k.width,
          "q, k and v are as wide as their heads");
  Instruction in;
  in.x = q, in.y = k, in.z = v, in.layer = layer, in.n_heads = n_heads, in.n_kv_heads = n_kv_heads;
  in.head_dim = head_dim, in.number = scale, in.window = window, in.rope = rope;
  int cos = -1, sin = -1;
  if (rope >= 0) {
    const Rope& r = ropes_.at(static_cast<size_t>(rope));
    require(static_cast<i64>(r.frequencies.size()) * 2 <= head_dim, "a rotation is within a head");
    cos = r.cos, sin = r.sin;
  }
  in.kind = Kind::keys_values;
  append(in.kind, {q, k, v}, {cos, sin}) = in;
  in.out = new_view(q.width);
  in.y = new_view(2 * n_heads), in.z = {};  // the states
  in.kind = Kind::attend;
  const auto same_plan = [&](size_t i) {
    const Instruction& other = instructions_[i];
    return other.window == window && other.n_heads == n_heads && other.n_kv_heads == n_kv_heads &&
           other.head_dim == head_dim;
  };
  in.plan = static_cast<size_t>(std::find_if(planned_.begin(), planned_.end(), same_plan) - planned_.begin());
  if (in.plan == planned_.size()) planned_.push_back(instructions_.size());
  append(in.kind, {q, in.out, in.y}) = in;
  in.kind = Kind::merge;
  in.x = in.out, in.out = new_view(q.width);
  append(in.kind, {in.x, in.y, in.out}) = in;
  return in.out;
}

void Program::logits(View x, int matrix, int bias) {
  require(matrices_.at(static_cast<size_t>(matrix)).n_out == vocab_size_, "the head has an output for each token");
  const View rows = new_view(x.width, true);
  Instruction& in = append(Kind::gather, {x, rows});
  in.x = x, in.out = rows;
  Instruction linear = linear_instruction(rows, matrix, bias, Activation::none, {});
  linear.to_logits = true;
  append(Kind::linear, {rows}, {linear.values, linear.scales, linear.sums}) = linear;
}

Program::Accesses Program::accesses(const Instruction& in, Mode mode) const {
  constexpr i64 kNothing = -1, kLogits = -2, kPartials = -3;
  const i64 pages = -4 - in.layer;
  Accesses a;
  const auto read = [&](i64 n) { a.reads.push_back(n); };
  const auto write = [&](i64 n) { a.writes.push_back(n); };
  const i64 cos = in.rope < 0 ? kNothing : ropes_[static_cast<size_t>(in.rope)].cos;
  const i64 sin = in.rope < 0 ? kNothing : ropes_[static_cast<size_t>(in.rope)].sin;
  switch (in.kind) {
    case Kind::positions:
      read(in.out.buffer);
      [[fallthrough]];
    case Kind::embed:
      write(in.out.buffer);
      break;
    case Kind::quantize:
    case Kind::round:
      read(in.x.buffer), write(in.values), write(in.scales), write(in.sums);
      break;
    case Kind::linear:
      read(in.values < 0 ? in.x.buffer : in.values), read(in.scales), read(in.sums);
      if (mode == kFew && in.halves >= 0)
        write(in.halves);
      else
        read(in.z.buffer), write(in.to_logits ? kLogits : in.out.buffer);
      break;
    case Kind::join:
      if (mode == kFew) read(in.halves), read(in.z.buffer), write(in.out.buffer);
      break;
    case Kind::angles:
      write(cos), write(sin);
      break;
    case Kind::keys_values:
      read(cos), read(sin), read(in.x.buffer), read(in.y.buffer), read(in.z.buffer);
      write(in.x.buffer), write(in.y.buffer), write(pages);
      break;
    case Kind::attend:
      read(in.x.buffer), read(pages), write(in.out.buffer), write(in.y.buffer), write(kPartials);
      break;
    case Kind::merge:
      read(in.x.buffer), read(in.y.buffer), read(kPartials), write(in.out.buffer);
      break;
    default:  // norms, gate, add, gather
      read(in.x.buffer), read(in.y.buffer), write(in.out.buffer);
  }
  std::erase_if(a.reads, [](i64 n) { return n == kNothing; });
  std::erase_if(a.writes, [](i64 n) { return n == kNothing; });
  return a;
}

// A buffer is repeated if nothing but work on rows writes it, and that work then is.
void Program::find_repeated() {
  const auto repeatable = [](Kind k) { return k != Kind::linear && k != Kind::attend && k != Kind::keys_values; };
  for (Buffer& b : buffers_) b.repeated = true;
  for (const Instruction& in : instructions_)
    if (!repeatable(in.kind))
      for (const i64 n : accesses(in, kFew).writes)
        if (n >= 0) buffers_[static_cast<size_t>(n)].repeated = false;
  for (Instruction& in : instructions_) {
    const std::vector<i64> writes = accesses(in, kFew).writes;
    in.repeated = repeatable(in.kind) && std::all_of(writes.begin(), writes.end(),
                                                     [&](i64 n) { return buffers_[static_cast<size_t>(n)].repeated; });
  }
}

// A barrier stands before an instruction that needs what other threads have written since the last one, or would write
// over what they may still read. Work on rows alone meets only its own: all such work is shared out alike.
void Program::place_barriers(Mode mode) {
  const auto by_rows = [&](const Instruction& in) {
    return in.kind != Kind::linear && in.kind != Kind::attend && in.kind != Kind::gather &&
           !(mode == kFew && in.repeated);
  };
  const auto meet = [](const std::vector<i64>& a, const std::vector<i64>& b) {
    return std::any_of(a.begin(), a.end(), [&](i64 n) { return std::find(b.begin(), b.end(), n) != b.end(); });
  };
  const auto own = [&](i64 n) { return mode == kFew && n >= 0 && buffers_[static_cast<size_t>(n)].repeated; };
  size_t last = 0;  // the first instruction after the last barrier
  std::vector<Accesses> all;
  for (size_t i = 0; i < instructions_.size(); i++) {
    Instruction& in = instructions_[i];
    Accesses& now = all.emplace_back(accesses(in, mode));
    std::erase_if(now.reads, own), std::erase_if(now.writes, own);
    for (size_t j = last; j < i && !in.barrier[mode]; j++)
      in.barrier[mode] =
          !(by_rows(in) && by_rows(instructions_[j])) &&
          (meet(all[j].writes, now.reads) || meet(all[j].writes, now.writes) || meet(all[j].reads, now.writes));
    if (in.barrier[mode]) last = i;
  }
}

// First fit: a buffer takes the lowest place that is free as long as it lives. That is counted in phases, from barrier
// to barrier: within one, threads may be at different instructions. -> the bytes of all.
i64 Program::place_buffers(Mode mode, i64 rows) {
  struct Place {
    i64 begin, end, first, last;
  };
  std::vector<i64> phase(instructions_.size());
  for (size_t i = 1; i < instructions_.size(); i++) phase[i] = phase[i - 1] + instructions_[i].barrier[mode];
  std::vector<Place> places;
  i64 total = 0;
  for (Buffer& b : buffers_) {
    const i64 size = b.few && mode != kFew ? 0 : round_up(b.row_bytes * rows, 64);
    const i64 first = phase[static_cast<size_t>(b.first)], last = phase[static_cast<size_t>(b.last)];
    i64 at = 0;
    for (bool moved = true; moved;) {
      moved = false;
      for (const Place& p : places)
        if (p.last >= first && p.first <= last && at < p.end && p.begin < at + size) at = p.end, moved = true;
    }
    b.at[mode] = at;
    places.push_back({at, at + size, first, last});
    total = std::max(total, at + size);
  }
  return total;
}

void Program::finish() {
  require(!finished_ && !instructions_.empty() && instructions_.back().to_logits, "a program ends with its logits");
  find_repeated();
  place_barriers(kMany);
  place_barriers(kFew);
  arenas_[kMany] = Memory(place_buffers(kMany, round_up(max_tokens_, 16)));
  // A kernel may read (and ignore) 16 rows of its input, which for few rows are past its buffer.
  i64 widest = 0;
  for (const Buffer& b : buffers_) widest = std::max(widest, b.row_bytes);
  few_bytes_ = round_up(place_buffers(kFew, kFewRows) + 16 * widest, 4096);
  logits_ = Memory(max_tokens_ * vocab_size_ * 4);
  finished_ = true;
}

// ---- running -----------------------------------------------------------------------------------------------------

std::uint8_t* Program::Frame::buffer(int number) const {
  if (number < 0) return nullptr;
  const Buffer& b = program.buffers_[static_cast<size_t>(number)];
  const i64 own = mode == kFew && b.repeated ? thread * program.few_bytes_ : 0;
  return program.arenas_[mode].data() + own + b.at[mode];
}

float* Program::Frame::floats(const View& view) const {
  return reinterpret_cast<float*>(buffer(view.buffer)) + view.offset;
}

i64 Program::stride(const View& view) const { return buffers_[static_cast<size_t>(view.buffer)].row_bytes / 4; }

void Program::check(const Batch& batch, const KvCache& cache) const {
  require(finished_, "the program is not finished");
  require(batch.n_tokens > 0 && batch.n_tokens <= max_tokens_, "a batch has between 1 and max_tokens tokens");
  require(batch.n_logits >= 0 && batch.n_logits <= batch.n_tokens,
          "a batch has at most a row of logits for each token");
  for (i64 i = 0; i < batch.n_tokens; i++) {
    require(batch.token_ids[i] >= 0 && batch.token_ids[i] < max_id_, "a token id is outside of the vocabulary");
    require(batch.positions[i] >= 0 && batch.positions[i] < max_position_, "a position is outside of the context");
    require(batch.sequence[i] >= 0 && batch.sequence[i] < batch.n_sequences, "a token belongs to no sequence");
    require(batch.positions[i] / kPage < batch.table_width, "a position has no page");
    // All pages up to the token's own are read; the last token of a sequence has the most.
    if (i + 1 < batch.n_tokens && batch.sequence[i + 1] == batch.sequence[i] &&
        batch.positions[i + 1] > batch.positions[i])
      continue;
    for (i64 p = 0; p <= batch.positions[i] / kPage; p++) {
      const std::int32_t page = batch.page_table[batch.sequence[i] * batch.table_width + p];
      require(page >= 0 && page < cache.n_pages(), "a page is outside of the cache");
    }
  }
  for (i64 i = 0; i < batch.n_logits; i++)
    require(batch.logits_rows[i] >= 0 && batch.logits_rows[i] < batch.n_tokens,
            "a row of logits is outside of the batch");
  for (const Instruction& in : instructions_)
    if (in.kind == Kind::attend)
      require(in.layer < cache.n_layers() && in.n_kv_heads == cache.n_kv_heads() && in.head_dim == cache.head_dim(),
              "the KV cache is not this program's");
}

const float* Program::run(const Batch& batch, const KvCache& cache, Pool& pool) {
  check(batch, cache);
  const Mode mode = batch.n_tokens <= kFewRows ? kFew : kMany;
  if (mode == kFew && arenas_[kFew].size() < few_bytes_ * pool.size()) arenas_[kFew] = Memory(few_bytes_ * pool.size());
  const Rows rows{batch.n_tokens, batch.positions, batch.sequence, batch.page_table, batch.table_width};
  std::vector<AttendPlan> plans;
  for (size_t i : planned_) {
    const Instruction& in = instructions_[i];
    plans.emplace_back(rows, in.n_heads, in.n_kv_heads, in.head_dim, in.window, pool.size());
  }
  i64 floats = 0;
  for (const AttendPlan& plan : plans) floats = std::max(floats, plan.floats());
  if (floats * 4 > partials_.size()) partials_ = Memory(floats * 4);
  for (AttendPlan& plan : plans) plan.place(reinterpret_cast<float*>(partials_.data()));
  pool.run([&](int thread) {
    const Frame frame{*this, mode, thread};
    for (const Instruction& in : instructions_) {
      if (in.barrier[mode]) pool.barrier(thread);
      execute(in, batch, cache, frame, plans, pool.size(), pool.scratch(thread));
    }
  });
  return reinterpret_cast<const float*>(logits_.data());
}

void Program::execute(const Instruction& in, const Batch& batch, const KvCache& cache, const Frame& frame,
                      const std::vector<AttendPlan>& plans, int size, void* scratch) const {
  const auto matrix = [&]() -> const Matrix& { return matrices_[static_cast<size_t>(in.matrix)]; };
  const auto weights = [&](int number) { return number < 0 ? nullptr : vectors_[static_cast<size_t>(number)].data; };
  const auto buffer = [&](int number) { return frame.buffer(number); };
  const auto floats = [&](const View& view) { return frame.floats(view); };
  const View& shape = in.out.buffer >= 0 ? in.out : in.x;
  const bool of_logits = shape.buffer >= 0 && buffers_[static_cast<size_t>(shape.buffer)].logits;
  const i64 n = of_logits ? batch.n_logits : batch.n_tokens;
  const int thread = frame.thread;
  const bool repeat = in.repeated && frame.mode == kFew;
  const Share rows(n, 1, repeat ? 0 : thread, repeat ? 1 : size);
  const Rows all{batch.n_tokens, batch.positions, batch.sequence, batch.page_table, batch.table_width};

  switch (in.kind) {
    case Kind::embed:
      return kernels_.embed(matrix(), batch.token_ids, floats(in.out), stride(in.out), false, rows.begin, rows.end);
    case Kind::positions:
      return kernels_.embed(matrix(), batch.positions, floats(in.out), stride(in.out), true, rows.begin, rows.end);
    case Kind::layer_norm:
      return kernels_.layer_norm(floats(in.x), stride(in.x), weights(in.weight), weights(in.bias), in.number,
                                 in.x.width, floats(in.out), stride(in.out), rows.begin, rows.end);
    case Kind::rms_norm: {
      const i64 width = vectors_[static_cast<size_t>(in.weight)].n;
      return kernels_.rms_norm(floats(in.x), stride(in.x), weights(in.weight), in.number, width, in.x.width / width,
                               floats(in.out), stride(in.out), rows.begin, rows.end);
    }
    case Kind::quantize:
      return kernels_.quantize_rows(floats(in.x), stride(in.x), in.x.width, in.group,
                                    reinterpret_cast<std::int8_t*>(buffer(in.values)), round_up(in.x.width, 64),
                                    reinterpret_cast<float*>(buffer(in.scales)),
                                    reinterpret_cast<std::int32_t*>(buffer(in.sums)), rows.begin, rows.end);
    case Kind::round:
      return kernels_.round_rows(floats(in.x), stride(in.x), in.x.width, buffer(in.values), round_up(in.x.width, 32),
                                 rows.begin, rows.end);
    case Kind::linear:
    case Kind::join: {
      const Matrix& w = matrix();
      Linear l{};
      l.w = &w, l.n_rows = n, l.bias = weights(in.bias), l.activation = in.activation;
      l.in.x = floats(in.x), l.in.x_stride = stride(in.x);
      l.in.values = buffer(in.values);
      l.in.stride = round_up(w.n_in, w.format == Format::bf16 ? 32 : 64);
      l.in.scales = reinterpret_cast<const float*>(buffer(in.scales));
      l.in.sums = reinterpret_cast<const std::int32_t*>(buffer(in.sums));
      if (in.z.buffer >= 0) l.residual = floats(in.z), l.residual_stride = stride(in.z);
      l.y = in.to_logits ? reinterpret_cast<float*>(logits_.data()) : floats(in.out);
      l.y_stride = in.to_logits ? vocab_size_ : stride(in.out);
      if (in.halves >= 0 && frame.mode == kFew) {
        auto* sums = reinterpret_cast<float*>(buffer(in.halves));
        if (in.kind == Kind::join) return kernels_.join_halves(l, sums, rows.begin * w.n_out, rows.end * w.n_out);
        const i64 all_outputs = round_up(w.n_out, kPanel);
        const Share share(2 * all_outputs, kPanel, thread, size);
        for (int half = 0; half < 2; half++) {
          const i64 begin = std::max<i64>(share.begin - half * all_outputs, 0);
          const i64 end = std::min(share.end - half * all_outputs, w.n_out);
          if (begin < end) kernels_.linear_half(l, half, begin, end, sums + half * w.n_out, scratch);
        }
        return;
      }
      if (in.kind == Kind::join) return;
      const Share outputs(w.n_out, kPanel, thread, size);
      if (n && outputs.begin < outputs.end) kernels_.linear(l, outputs.begin, outputs.end, scratch);
      return;
    }
    case Kind::angles: {
      const Rope& rope = ropes_[static_cast<size_t>(in.rope)];
      auto *cos = reinterpret_cast<float*>(buffer(rope.cos)), *sin = reinterpret_cast<float*>(buffer(rope.sin));
      const i64 pairs = static_cast<i64>(rope.frequencies.size());
      for (i64 row = rows.begin; row < rows.end; row++)
        for (i64 i = 0; i < pairs; i++) {
          // The angle in f32, as every implementation has it; its sine and cosine as exact as f32 can say.
          const double angle = static_cast<float>(batch.positions[row]) * rope.frequencies[static_cast<size_t>(i)];
          cos[row * pairs + i] = static_cast<float>(std::cos(angle)) * rope.magnitude;
          sin[row * pairs + i] = static_cast<float>(std::sin(angle)) * rope.magnitude;
        }
      return;
    }
    case Kind::keys_values: {
      if (in.rope >= 0) {
        const Rope& rope = ropes_[static_cast<size_t>(in.rope)];
        const Rotation rotation{static_cast<i64>(rope.frequencies.size()), rope.interleaved,
                                reinterpret_cast<const float*>(buffer(rope.cos)),
                                reinterpret_cast<const float*>(buffer(rope.sin))};
        kernels_.rotate(rotation, floats(in.x), stride(in.x), in.n_heads, in.head_dim, rows.begin, rows.end);
        kernels_.rotate(rotation, floats(in.y), stride(in.y), in.n_kv_heads, in.head_dim, rows.begin, rows.end);
      }
      return kernels_.store_kv(cache.layer(in.layer), all, floats(in.y), stride(in.y), floats(in.z), stride(in.z),
                               rows.begin, rows.end);
    }
    case Kind::attend: {
      const Attend a{all,       floats(in.x), stride(in.x), cache.layer(in.layer), in.n_heads,    in.number,
                     in.window, floats(in.y), stride(in.y), floats(in.out),        stride(in.out)};
      const AttendPlan& plan = plans[in.plan];
      const Piece* end = plan.end(thread);
      for (const Piece* p = plan.begin(thread); p < end; p++)
        kernels_.attend(a, *p, p + 1 < end ? p + 1 : nullptr, scratch);
      return;
    }
    case Kind::merge: {
      const std::vector<Piece>& partials = plans[in.plan].partials();
      const Attend a{all,          nullptr,      0,           cache.layer(in.layer),
                     in.n_heads,   in.number,    in.window,   floats(in.y),
                     stride(in.y), floats(in.x), stride(in.x)};
      return kernels_.merge(a, partials.data(), static_cast<i64>(partials.size()), floats(in.out), stride(in.out),
                            rows.begin, rows.end);
    }
    case Kind::gate:
      return kernels_.gate(floats(in.x), stride(in.x), floats(in.y), stride(in.y), in.activation, in.x.width,
                           floats(in.out), stride(in.out), rows.begin, rows.end);
    case Kind::add:
      return kernels_.add(floats(in.x), stride(in.x), floats(in.y), stride(in.y), in.x.width, floats(in.out),
                          stride(in.out), rows.begin, rows.end);
    case Kind::gather:
      for (i64 row = rows.begin; row < rows.end; row++)
        std::memcpy(floats(in.out) + row * stride(in.out), floats(in.x) + batch.logits_rows[row] * stride(in.x),
                    static_cast<size_t>(in.x.width) * 4);
      return;
  }
}

}  // namespace pronghorn
