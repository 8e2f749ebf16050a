// Fixed work for bench/guard.py, which counts its instructions under callgrind: each case is one call of
// guard_case, and its name is printed before it.
//
// usage: guard ISA | guard --compiler
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "pack.h"
#include "program.h"
#include "threads.h"
#include "twin.h"

using namespace pronghorn;

namespace {

// What is counted, once it is set up.
struct Case {
  virtual ~Case() = default;
  virtual void run() = 0;
};

template <typename F>
struct Call final : Case {
  explicit Call(F function) : function_(std::move(function)) {}
  void run() override { function_(); }
  F function_;
};

}  // namespace

// The name that callgrind is told; nothing may be inlined into it, nor it into main.
extern "C" __attribute__((noinline, visibility("default"))) void guard_case(void* work) {
  static_cast<Case*>(work)->run();
}

namespace {

template <typename F>
void count(const std::string& name, F function) {
  Call<F> call(std::move(function));
  std::printf("%s\n", name.c_str());
  guard_case(&call);
}

std::vector<float> values(i64 n) {
  twin::Random random(static_cast<std::uint64_t>(n));
  std::vector<float> list(static_cast<std::size_t>(n));
  for (float& value : list) value = random.uniform();
  return list;
}

constexpr i64 kIn = 768, kOut = 64, kRowsMax = 32;

struct Weights {
  const char* name;
  Format format;
  Order order;
  i64 group;
  bool symmetric;
};
constexpr Weights kWeights[] = {
    {"f32 [out,in]", Format::f32, Order::out_in, 0, false},
    {"f32 [in,out]", Format::f32, Order::in_out, 0, false},
    {"f16 [out,in]", Format::f16, Order::out_in, 0, false},
    {"bf16 [out,in]", Format::bf16, Order::out_in, 0, false},
    {"bf16 [in,out]", Format::bf16, Order::in_out, 0, false},
    {"int8 by 64", Format::int8, Order::packed, 64, false},
    {"int8 by output", Format::int8, Order::packed, 0, false},
    {"int4 by 32", Format::int4, Order::packed, 32, false},
    {"int4 by 32, symmetric", Format::int4, Order::packed, 32, true},
    {"int4 by 128", Format::int4, Order::packed, 128, false},
};

// Quantized and rounded inputs come from the kernels themselves, which are counted too.
void linears(const Kernels& kernels, Pool& pool, void* scratch) {
  const std::vector<float> x = values(kRowsMax * kIn), w = values(kOut * kIn);
  std::vector<float> y(kRowsMax * kOut), scales(kRowsMax * kIn / 32);
  std::vector<std::int8_t> bytes((kRowsMax + 16) * kIn);
  std::vector<float> rounded((kRowsMax + 16) * kIn);
  std::vector<std::int32_t> sums(kRowsMax * kIn / 32);
  count("round_rows", [&] { kernels.round_rows(x.data(), kIn, kIn, rounded.data(), kIn, 0, kRowsMax); });
  for (const Weights& kind : kWeights) {
    const bool packed = kind.order == Order::packed;
    Matrix matrix{nullptr, kind.format, kind.order, kOut, kIn, kind.group, kind.symmetric};
    const i64 size = packed ? packed_size(kind.format, kOut, kIn, kind.group, kind.symmetric) : kOut * kIn * 4;
    std::vector<std::uint8_t> memory(static_cast<std::size_t>(size) + 64);
    std::uint8_t* data = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) % 64;
    const bool transposed = kind.order == Order::in_out;
    pack({reinterpret_cast<const std::uint8_t*>(w.data()), "f32", kOut, kIn, transposed}, matrix, data, pool);
    matrix.data = data;
    if (packed) {
      const std::string name = "quantize_rows by " + std::to_string(kind.group);
      count(name, [&] {
        kernels.quantize_rows(x.data(), kIn, kIn, kind.group, bytes.data(), kIn, scales.data(), sums.data(), 0,
                              kRowsMax);
      });
    }
    Linear linear{};
    linear.w = &matrix;
    linear.in = {x.data(), kIn,           packed ? static_cast<const void*>(bytes.data()) : rounded.data(),
                 kIn,      scales.data(), sums.data()};
    linear.y = y.data();
    linear.y_stride = kOut;
    for (i64 n_rows : {1, 4, 32}) {
      linear.n_rows = n_rows;
      count("linear " + std::string(kind.name) + ", " + std::to_string(n_rows) + " rows",
            [&] { kernels.linear(linear, 0, kOut, scratch); });
    }
  }
}

void attention(const Kernels& kernels, void* scratch) {
  constexpr i64 kHeads = 4, kKvHeads = 2, kDim = 64, kTokens = 128, kWidth = kHeads * kDim;
  const std::vector<float> q = values(kTokens * kWidth);
  std::vector<float> y(kTokens * kWidth), folded(kTokens * kWidth), states(kTokens * kHeads * 2);
  const std::pair<const char*, KvFormat> formats[] = {
      {"f32", KvFormat::f32}, {"bf16", KvFormat::bf16}, {"int8", KvFormat::int8}};
  for (const auto& [kind, format] : formats) {
    KvCache cache(1, kTokens / kPage, kKvHeads, kDim, format);
    std::vector<std::int32_t> positions(kTokens), sequence(kTokens), pages(kTokens / kPage);
    for (std::size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<std::int32_t>(i);
    for (std::size_t i = 0; i < pages.size(); ++i) pages[i] = static_cast<std::int32_t>(i);
    Rows rows{kTokens, positions.data(), sequence.data(), pages.data(), static_cast<i64>(pages.size())};
    count("store_kv " + std::string(kind), [&] {
      kernels.store_kv(cache.layer(0), rows, q.data(), kWidth, q.data() + kKvHeads * kDim, kWidth, 0, kTokens);
    });
    for (i64 n_rows : {i64{1}, kTokens}) {
      rows.n = n_rows;
      rows.positions = positions.data() + kTokens - n_rows;
      const Attend attend{rows, q.data(),      kWidth,     cache.layer(0), kHeads, 0.125F,
                          0,    states.data(), kHeads * 2, folded.data(),  kWidth};
      AttendPlan plan(rows, kHeads, kKvHeads, kDim, 0, 1);
      std::vector<float> partials(static_cast<std::size_t>(plan.floats()));
      plan.place(partials.data());
      count("attend " + std::string(kind) + ", " + std::to_string(n_rows) + " rows", [&] {
        for (const Piece *p = plan.begin(0), *end = plan.end(0); p < end; ++p)
          kernels.attend(attend, *p, p + 1 < end ? p + 1 : nullptr, scratch);
        kernels.merge(attend, plan.partials().data(), static_cast<i64>(plan.partials().size()), y.data(), kWidth, 0,
                      n_rows);
      });
    }
  }
}

void rest(const Kernels& kernels) {
  const std::vector<float> x = values(16 * kIn), w = values(kIn);
  std::vector<float> y(16 * kIn);
  count("layer_norm", [&] { kernels.layer_norm(x.data(), kIn, w.data(), w.data(), 1e-5F, kIn, y.data(), kIn, 0, 16); });
  count("rms_norm", [&] { kernels.rms_norm(x.data(), kIn, w.data(), 1e-5F, kIn, 1, y.data(), kIn, 0, 16); });
  const std::pair<const char*, Activation> activations[] = {{"gelu_new", Activation::gelu_new},
                                                            {"silu", Activation::silu}};
  for (const auto& [name, activation] : activations)
    count("gate " + std::string(name),
          [&, kind = activation] { kernels.gate(x.data(), kIn, x.data(), kIn, kind, kIn, y.data(), kIn, 0, 16); });
  volatile double sink;
  count("arg_max", [&] { sink = static_cast<double>(kernels.arg_max(x.data(), 16 * kIn)); });
  count("sum_exp", [&] { sink = kernels.sum_exp(x.data(), 16 * kIn, 1.0F, 1.0F); });
  (void)sink;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--compiler") == 0) {
#if defined(__clang__)
    std::printf("%s\n", __VERSION__);  // names itself
#else
    std::printf("GCC %s\n", __VERSION__);
#endif
    return 0;
  }
  const Kernels* kernels = argc == 2 ? kernels_named(argv[1]) : nullptr;
  if (!kernels) {
    std::fprintf(stderr, "usage: guard ISA | guard --compiler; ISA is one that this machine has\n");
    return 2;
  }
  const FloatEnvironment environment;
  std::vector<std::uint8_t> memory(kScratch + 64);
  void* scratch = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) % 64;
  Pool pool(1);
  linears(*kernels, pool, scratch);
  attention(*kernels, scratch);
  rest(*kernels);
  return 0;
}
