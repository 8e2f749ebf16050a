// The proof of the kernels: each one, on each instruction set of the machine, against its twin (twin.h).
//
// Three kinds of check:
// - exact: the inputs are small integers, so that any order of summation gives the same f32; equal to the bit.
// - near: random reals. However a sum of n terms is ordered, its rounding error is at most
//   n u / (1 - n u) * sum |term| with u = 2^-24 (Higham, Accuracy and Stability, section 4.2); the exact checks
//   find what such a bound forgives.
// - one answer: a row, an output or a head computed alone has the same bits as in any batch, tile or range.
// Inputs are followed by NaN, outputs stand between guard zones, and both are misaligned on purpose: an access out
// of range shows without a sanitizer, and under the address sanitizer the zones are poisoned as well.
//
// usage: native_tests [--isa NAME] [--list] [TEST...]

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cfenv>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>

#include "ahead.h"
#include "gguf.h"
#include "pack.h"
#include "program.h"
#include "sampling.h"
#include "threads.h"
#include "twin.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

using namespace pronghorn;
using twin::kUnit;
using twin::Quantized;
using twin::Random;

namespace {

__attribute__((format(printf, 1, 2))) std::string say(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return text;
}

// One test on one instruction set.
class Report {
 public:
  Report(const char* test, const char* isa) : test_(test), isa_(isa) {}
  void fail(const std::string& what) {
    if (++failures_ <= 8) std::printf("FAILED %s on %s: %s\n", test_, isa_, what.c_str());
  }
  // Where it happened is a string, or a function that makes one: most checks pass, and need none.
  template <typename Where>
  bool expect(bool ok, const Where& where) {
    ++checks_;
    if (!ok) fail(text(where));
    return ok;
  }
  // A NaN equals any NaN; nothing else is forgiven beyond the tolerance.
  template <typename Where>
  bool near(double got, double want, double tolerance, const Where& where) {
    ++checks_;
    const bool ok = std::isnan(want) ? std::isnan(got) : got == want || std::fabs(got - want) <= tolerance;
    if (!ok) fail(say("%s: %.9g, not %.9g (tolerance %.3g)", text(where).c_str(), got, want, tolerance));
    return ok;
  }
  long checks() const { return checks_; }
  int failures() const { return failures_; }

 private:
  template <typename Where>
  static std::string text(const Where& where) {
    if constexpr (std::is_invocable_v<Where>) {
      return where();
    } else {
      return where;
    }
  }

  const char *test_, *isa_;
  long checks_ = 0;
  int failures_ = 0;
};

// The same bits, or both NaN: which NaN it is depends on the order of operands, which says nothing.
template <typename T>
bool same_bits(const T* a, const T* b, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    if (std::memcmp(a + i, b + i, sizeof(T)) == 0) continue;
    if constexpr (std::is_same_v<T, float>) {
      if (std::isnan(a[i]) && std::isnan(b[i])) continue;
    }
    return false;
  }
  return true;
}

// n values between guard zones. Inputs are surrounded by NaN (0xFF); outputs are filled and surrounded by a
// signaling NaN, which no arithmetic leaves as it is.
enum class Role { input, output };

template <typename T>
class Guarded {
 public:
  explicit Guarded(i64 n, Role role = Role::input, i64 shift = 0) : n_(static_cast<std::size_t>(n)), role_(role) {
    const std::size_t before = kZone + static_cast<std::size_t>(shift) * sizeof(T);
    size_ = (before + n_ * sizeof(T) + kZone + 63) / 64 * 64;
    base_ = static_cast<unsigned char*>(std::aligned_alloc(64, size_));
    for (std::size_t i = 0; i < size_; ++i) base_[i] = pattern(i - before);
    data_ = reinterpret_cast<T*>(base_ + before);
    ASAN_POISON_MEMORY_REGION(base_, before);
    ASAN_POISON_MEMORY_REGION(end(), static_cast<std::size_t>(base_ + size_ - end()));
  }
  ~Guarded() {
    ASAN_UNPOISON_MEMORY_REGION(base_, size_);
    std::free(base_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](i64 i) { return data_[i]; }
  const T& operator[](i64 i) const { return data_[i]; }
  i64 size() const { return static_cast<i64>(n_); }
  bool same_bits(const Guarded& other) const { return ::same_bits(data_, other.data_, n_); }
  bool untouched(i64 i) const {  // the value is still as it was filled
    const auto* p = reinterpret_cast<const unsigned char*>(data_);
    for (std::size_t k = static_cast<std::size_t>(i) * sizeof(T), stop = k + sizeof(T); k < stop; ++k)
      if (p[k] != pattern(k)) return false;
    return true;
  }
  void check_zones(Report& report, const std::string& what) {
    ASAN_UNPOISON_MEMORY_REGION(base_, size_);
    const unsigned char* p = base_;
    const auto* data = reinterpret_cast<unsigned char*>(data_);
    for (; p < base_ + size_; ++p) {
      if (p == data) p = end();
      if (*p != pattern(static_cast<std::size_t>(p - data))) {
        report.fail(say("%s: wrote outside of its output, byte %td of %zu", what.c_str(), p - data, n_ * sizeof(T)));
        return;
      }
    }
  }

 private:
  static constexpr std::size_t kZone = 256;
  unsigned char pattern(std::size_t i) const {
    static constexpr unsigned char kSignaling[4] = {0xEF, 0xBE, 0xAD, 0x7F};
    return role_ == Role::input ? 0xFF : kSignaling[i % 4];
  }
  const unsigned char* end() const { return reinterpret_cast<const unsigned char*>(data_ + n_); }

  std::size_t n_, size_ = 0;
  Role role_;
  unsigned char* base_;
  T* data_;
};

using Floats = Guarded<float>;

void* scratch() {
  static Guarded<std::uint8_t> memory(kScratch, Role::output);
  return memory.data();
}

// ---------------------------------------------------------------------------------------------- linear

// The data of a case. exact: integers, and scales that are powers of two. real: anything. special: zeros,
// denormals, infinities, NaN. extreme: the largest integers, which saturate a careless product.
enum class Data { exact, real, special, extreme };
const char* const kDataNames[] = {"exact", "real", "special", "extreme"};
const char* const kFormatNames[] = {"f32", "f16", "bf16", "int8", "int4"};
const char* const kOrderNames[] = {"[out,in]", "[in,out]", "packed"};
const char* const kActivationNames[] = {"none", "gelu", "gelu_new", "silu", "relu"};
enum class Residual { none, apart, in_place };

struct Shape {
  Format format;
  Order order;
  i64 group;
  bool symmetric;
};

const std::vector<Shape>& shapes() {
  static const std::vector<Shape> all = [] {
    std::vector<Shape> list;
    for (Format format : {Format::f32, Format::f16, Format::bf16})
      for (Order order : {Order::out_in, Order::in_out}) list.push_back({format, order, 0, false});
    for (i64 group : {0, 32, 64, 128, 256}) list.push_back({Format::int8, Order::packed, group, false});
    for (bool symmetric : {false, true})
      for (i64 group : {32, 64, 128, 256}) list.push_back({Format::int4, Order::packed, group, symmetric});
    return list;
  }();
  return all;
}

std::uint16_t special_bfloat(Random& random) {
  const auto sign = static_cast<std::uint16_t>(random.in(0, 1) << 15);
  const i64 kind = random.in(0, 63);
  if (kind == 0) return sign | 0x7F80;                                          // infinity
  if (kind == 1) return sign | 0x7FC0;                                          // NaN
  if (kind < 8) return sign;                                                    // zero
  if (kind < 20) return static_cast<std::uint16_t>(sign | random.in(1, 0x7F));  // denormal
  if (kind < 40)
    return static_cast<std::uint16_t>(sign | random.in(0x1F80, 0x2100));  // products near the smallest normal
  if (kind < 48) return static_cast<std::uint16_t>(sign | random.in(0x7F00, 0x7F7F));  // near the largest
  return static_cast<std::uint16_t>(sign | random.in(0x3E00, 0x4100));
}

// A linear layer's problem, its packed or dense weights, and what the twin says of each output.
class Problem {
 public:
  Problem(const Shape& shape, Data data, i64 n_in, i64 n_out, i64 n_rows, std::uint64_t seed)
      : shape_(shape),
        data_(data),
        n_in_(n_in),
        n_out_(n_out),
        n_rows_(n_rows),
        random_(seed),
        activation_(data == Data::real ? random_.pick({Activation::none, Activation::gelu, Activation::gelu_new,
                                                       Activation::silu, Activation::relu})
                                       : Activation::none),
        residual_kind_(random_.pick({Residual::none, Residual::apart, Residual::in_place})),
        packed_(shape.order == Order::packed),
        x_stride_(n_in + random_.in(0, 3)),
        y_stride_(n_out + random_.in(0, 5)),
        stride_(round_up(n_in, packed_ ? 64 : 32)),
        x_(n_rows * x_stride_, Role::input, random_.in(0, 3)),
        halves_((round_up(n_rows, 16) + 16) * stride_),  // `values` is readable for a multiple of 16 rows
        widened_((round_up(n_rows, 16) + 16) * stride_),
        bytes_((round_up(n_rows, 16) + 16) * stride_),
        bias_(n_out, Role::input, random_.in(0, 3)),
        residual_(n_rows * y_stride_, Role::input, random_.in(0, 3)) {
    has_bias_ = random_.in(0, 1) == 1;
    for (i64 o = 0; o < n_out; ++o) bias_[o] = real();
    for (i64 i = 0; i < residual_.size(); ++i) residual_[i] = real();
    if (packed_) {
      make_integers();
    } else {
      make_dense();
    }
  }

  // Rows [first, last), outputs [begin, end), as the engine would call it.
  void run(const Kernels& kernels, Floats& y, i64 first, i64 last, i64 begin, i64 end) {
    kernels.linear(problem(y, first, last, begin, end), begin, end, scratch());
  }

  // One row by halves of the inputs, each in two ranges of outputs, and joined.
  void run_halves(const Kernels& kernels, Floats& y, i64 row, i64 cut) {
    const Linear linear = problem(y, row, row + 1, 0, n_out_);
    Floats sums(2 * n_out_, Role::output, random_.in(0, 3));
    for (const auto& [begin, end] : {std::pair{i64{0}, cut}, {cut, n_out_}})
      for (int half = 0; half < 2 && begin < end; half++)
        kernels.linear_half(linear, half, begin, end, sums.data() + half * n_out_, scratch());
    if (cut) kernels.join_halves(linear, sums.data(), 0, cut);
    kernels.join_halves(linear, sums.data(), cut, n_out_);
  }

 private:
  Linear problem(Floats& y, i64 first, i64 last, i64 begin, i64 end) {
    Linear linear{};
    linear.w = &matrix_;
    linear.in.x_stride = x_stride_;
    linear.in.stride = stride_;
    if (shape_.format == Format::f32 || shape_.format == Format::f16) linear.in.x = x_.data() + first * x_stride_;
    if (shape_.format == Format::bf16 && halved_) linear.in.values = halves_.data() + first * stride_;
    if (shape_.format == Format::bf16 && !halved_) linear.in.values = widened_.data() + first * stride_;
    if (packed_) {
      linear.in.values = bytes_.data() + first * stride_;
      linear.in.scales = scales_.data() + first * weights_.n_groups();
      linear.in.sums = sums_.data() + first * weights_.n_groups();
    }
    linear.n_rows = last - first;
    linear.bias = has_bias_ ? bias_.data() : nullptr;
    linear.activation = activation_;
    linear.y = y.data() + first * y_stride_;
    linear.y_stride = y_stride_;
    linear.residual_stride = y_stride_;
    if (residual_kind_ == Residual::apart) linear.residual = residual_.data() + first * y_stride_;
    if (residual_kind_ == Residual::in_place) {
      for (i64 r = first; r < last; ++r)
        for (i64 o = begin; o < end; ++o) y[r * y_stride_ + o] = residual_[r * y_stride_ + o];
      linear.residual = linear.y;
    }
    return linear;
  }

 public:
  void check(const Kernels& kernels, Report& report) {
    halved_ = kernels.rounded_size == 2;
    pairs_ = std::strcmp(kernels.isa, "avx512bf16") == 0;
    const std::string what = describe();
    Floats whole(n_rows_ * y_stride_, Role::output, random_.in(0, 3));
    run(kernels, whole, 0, n_rows_, 0, n_out_);
    whole.check_zones(report, what);
    int wrong = 0;
    for (i64 r = 0; r < n_rows_ && wrong < 2; ++r) {
      for (i64 o = 0; o < n_out_ && wrong < 2; ++o) {
        double tolerance = 0;
        const double want = expected(r, o, &tolerance);
        wrong += !report.near(double{whole[r * y_stride_ + o]}, want, tolerance,
                              [&] { return say("%s row %lld output %lld", what.c_str(), (long long)r, (long long)o); });
      }
      for (i64 o = n_out_; o < y_stride_; ++o)
        wrong += !report.expect(whole.untouched(r * y_stride_ + o), [&] { return what + ": wrote between the rows"; });
    }
    // One answer: the outputs cut in two, and rows alone or in another batch.
    Floats parts(n_rows_ * y_stride_, Role::output, random_.in(0, 3));
    const i64 cut = std::min(n_out_, random_.in(0, div_up(n_out_, kPanel)) * kPanel);
    const i64 row = random_.in(0, n_rows_ - 1);
    for (const auto& [first, last] : {std::pair{i64{0}, row}, {row, row + 1}, {row + 1, n_rows_}}) {
      if (first == last) continue;
      if (cut) run(kernels, parts, first, last, 0, cut);
      if (cut < n_out_) run(kernels, parts, first, last, cut, n_out_);
    }
    if (kernels.halves(matrix_)) run_halves(kernels, parts, row, cut);
    report.expect(parts.same_bits(whole), [&] {
      return say("%s: not the same in rows [0,%lld) [%lld] and outputs [0,%lld)", what.c_str(), (long long)row,
                 (long long)row, (long long)cut);
    });
  }

  std::string describe() const {
    return say("%s %s%s group %lld, %s, n_in %lld n_out %lld rows %lld, %s%s%s", kFormatNames[int(shape_.format)],
               kOrderNames[int(shape_.order)], shape_.symmetric ? " symmetric" : "", (long long)shape_.group,
               kDataNames[int(data_)], (long long)n_in_, (long long)n_out_, (long long)n_rows_,
               kActivationNames[int(activation_)], has_bias_ ? " bias" : "",
               residual_kind_ == Residual::none    ? ""
               : residual_kind_ == Residual::apart ? " residual"
                                                   : " in place");
  }

 private:
  float real() { return data_ == Data::real ? random_.uniform() : static_cast<float>(random_.in(-8, 8)); }

  void make_dense() {
    const i64 n = n_in_ * n_out_, shift = random_.in(0, 3);
    for (i64 r = 0; r < n_rows_; ++r) {
      for (i64 i = 0; i < stride_; ++i) {
        const std::uint16_t b = data_ == Data::special ? special_bfloat(random_) : twin::to_bfloat(real());
        halves_[r * stride_ + i] = i < n_in_ ? b : std::uint16_t{0};
        widened_[r * stride_ + i] = twin::bfloat(halves_[r * stride_ + i]);
        if (i < n_in_) x_[r * x_stride_ + i] = real();
      }
    }
    // Weights at an odd place: files align elements, not vectors.
    if (shape_.format == Format::f32) {
      dense32_ = std::make_unique<Floats>(n, Role::input, shift);
      for (i64 i = 0; i < n; ++i) (*dense32_)[i] = real();
      matrix_.data = reinterpret_cast<const std::uint8_t*>(dense32_->data());
    } else {
      dense16_ = std::make_unique<Guarded<std::uint16_t>>(n, Role::input, shift);
      for (i64 i = 0; i < n; ++i) {
        std::uint16_t& w = (*dense16_)[i];
        if (shape_.format == Format::bf16) {
          w = data_ == Data::special ? special_bfloat(random_) : twin::to_bfloat(real());
        } else if (data_ == Data::exact) {  // an integer from 1 to 8, or its negative
          w = static_cast<std::uint16_t>(random_.in(0, 1) << 15 |
                                         random_.pick<int>({0x3C00, 0x4000, 0x4200, 0x4400, 0x4500, 0x4800}));
        } else {  // denormals included, no infinities
          w = static_cast<std::uint16_t>(random_.in(0, 1) << 15 | random_.in(0, 0x3C00));
        }
      }
      matrix_.data = reinterpret_cast<const std::uint8_t*>(dense16_->data());
    }
    matrix_.format = shape_.format;
    matrix_.order = shape_.order;
    matrix_.n_in = n_in_;
    matrix_.n_out = n_out_;
  }

  void make_integers() {
    const bool int8 = shape_.format == Format::int8;
    weights_ = {shape_.format, n_out_, n_in_, shape_.group, shape_.symmetric, {}, {}, {}, {}};
    const i64 n_groups = weights_.n_groups();
    for (i64 i = 0; i < n_out_ * n_in_; ++i) {
      const i64 low = int8 ? -128 : 0, high = int8 ? 127 : 15;
      i64 q = random_.in(low, high);
      if (data_ == Data::exact && int8) q = random_.in(-8, 8);
      if (data_ == Data::extreme) q = random_.in(0, 15) ? high : low;
      weights_.q.push_back(static_cast<int>(q));
    }
    for (i64 i = 0; i < n_out_ * n_groups; ++i) {
      // f16: 0.5, 1 and 2, or any from 2^-10 to 1; minima likewise, of either sign.
      const auto scale = [&] {
        return static_cast<std::uint16_t>(data_ == Data::real ? random_.in(0x1400, 0x3C00)
                                                              : random_.pick<i64>({0x3800, 0x3C00, 0x4000}));
      };
      weights_.scales.push_back(scale());
      weights_.minima.push_back(static_cast<std::uint16_t>(scale() | random_.in(0, 1) << 15));
    }
    for (i64 o = 0; o < n_out_; ++o)
      weights_.row_scales.push_back(data_ == Data::real ? random_.uniform() : random_.pick({0.5f, 1.f, 2.f}));
    for (i64 r = 0; r < n_rows_; ++r) {
      for (i64 i = 0; i < stride_; ++i) {
        i64 q = random_.in(-127, 127);
        if (data_ == Data::exact) q = random_.in(-7, 7);
        if (data_ == Data::extreme) q = random_.in(0, 15) ? 127 : -127;
        bytes_[r * stride_ + i] = static_cast<std::int8_t>(i < n_in_ ? q : 0);
      }
      for (i64 g = 0; g < n_groups; ++g) {
        scales_.push_back(data_ == Data::real ? random_.uniform() : random_.pick({0.5f, 1.f, 2.f}));
        std::int32_t sum = 0;
        for (i64 i = weights_.begin_of(g); i < weights_.begin_of(g + 1); ++i) sum += bytes_[r * stride_ + i];
        sums_.push_back(sum);
      }
    }
    const std::vector<std::uint8_t> packed = weights_.packed();
    panels_ = std::make_unique<Guarded<std::uint8_t>>(static_cast<i64>(packed.size()) + kSlack);
    std::memcpy(panels_->data(), packed.data(), packed.size());
    matrix_ = {panels_->data(), shape_.format, Order::packed, n_out_, n_in_, shape_.group, shape_.symmetric};
  }

  // The sum of x * w, and a bound of its rounding error.
  double sum(i64 r, i64 o, double* error) const {
    double total = 0, magnitude = 0;
    if (packed_) {
      // acc = fma(float(isum), s_w * s_x, acc), group by group: each term is rounded when it is converted and scaled,
      // and each addition rounds an accumulator within the sum of magnitudes. With minima there are twice as many.
      const i64 n_groups = weights_.n_groups();
      for (i64 g = 0; g < n_groups; ++g) {
        i64 products = 0;
        for (i64 i = weights_.begin_of(g); i < weights_.begin_of(g + 1); ++i)
          products += i64{bytes_[r * stride_ + i]} * weights_.at(o, i);
        const double x_scale = double{scales_[static_cast<std::size_t>(r * n_groups + g)]};
        const double terms[2] = {
            weights_.scale(o, g) * x_scale * static_cast<double>(products),
            weights_.minimum(o, g) * x_scale * double(sums_[static_cast<std::size_t>(r * n_groups + g)])};
        total += terms[0] + terms[1];
        magnitude += std::fabs(terms[0]) + std::fabs(terms[1]);
      }
      // An integer above 2^24 is rounded when it is converted, even where the scales are powers of two.
      *error = data_ == Data::exact ? 0 : double(2 * n_groups + 6) * kUnit * magnitude;
      return data_ == Data::extreme && n_groups == 1 && shape_.format == Format::int8
                 ? (*error = 0, double(float(total)))
                 : total;
    }
    const i64 step = shape_.order == Order::out_in ? 1 : n_out_, at = shape_.order == Order::out_in ? o * n_in_ : o;
    const bool bfloats = shape_.format == Format::bf16;
    if (bfloats && halved_) {
      *error = 0;
      const std::uint16_t *x = halves_.data() + r * stride_, *w = dense16_->data() + at;
      return double{pairs_ ? twin::bfloat_pairs_dot(x, w, step, n_in_, shape_.order)
                           : twin::bfloat_dot(x, w, step, n_in_)};
    }
    for (i64 i = 0; i < n_in_; ++i) {
      const i64 k = at + i * step;
      const double x = double{bfloats ? widened_[r * stride_ + i] : x_[r * x_stride_ + i]};
      const double term = x * (dense32_  ? double{(*dense32_)[k]}
                               : bfloats ? double{twin::bfloat((*dense16_)[k])}
                                         : twin::half((*dense16_)[k]));
      total += term;
      magnitude += std::fabs(term);
    }
    *error = data_ == Data::exact ? 0 : double(n_in_ + 2) * kUnit * magnitude;
    return total;
  }

  double expected(i64 r, i64 o, double* tolerance) const {
    double error = 0, y = sum(r, o, &error);
    const bool to_the_bit = error == 0;  // then so are the additions that follow
    const auto add = [&](float z) {
      y += double{z};
      if (to_the_bit && (activation_ == Activation::none || activation_ == Activation::relu)) y = double{float(y)};
      error += to_the_bit ? 0 : kUnit * std::fabs(y);
    };
    if (has_bias_) add(bias_[o]);
    if (activation_ != Activation::none) {
      if (to_the_bit) y = double{float(y)};
      error = twin::activation_error(activation_, y, error);
      y = twin::activate(activation_, y);
    }
    if (residual_kind_ != Residual::none) {
      add(residual_[r * y_stride_ + o]);
      if (error > 0) error += kUnit * std::fabs(y);
    }
    *tolerance = error;
    return y;
  }

  Shape shape_;
  Data data_;
  i64 n_in_, n_out_, n_rows_;
  Random random_;
  Activation activation_;
  Residual residual_kind_;
  bool has_bias_ = false, packed_, halved_ = false, pairs_ = false;
  i64 x_stride_, y_stride_, stride_;
  Floats x_;                        // f32 and f16
  Guarded<std::uint16_t> halves_;   // bf16
  Floats widened_;                  // the same, where they are multiplied in f32
  Guarded<std::int8_t> bytes_;      // int8 and int4
  std::vector<float> scales_;       // [rows][n_groups]
  std::vector<std::int32_t> sums_;  // [rows][n_groups]
  Floats bias_, residual_;
  std::unique_ptr<Floats> dense32_;
  std::unique_ptr<Guarded<std::uint16_t>> dense16_;
  std::unique_ptr<Guarded<std::uint8_t>> panels_;
  Quantized weights_;
  Matrix matrix_;
};

// Every remainder of every dimension, and sizes of real models.
struct Size {
  i64 n_in, n_out, n_rows;
};

std::vector<Size> sizes() {
  std::vector<Size> list{{768, 50, 1},  {768, 64, 7},    {1027, 130, 5}, {4096, 33, 2}, {3072, 16, 33},
                         {64, 1000, 3}, {2048, 17, 130}, {100, 49, 300}, {8192, 3, 1},  {160, 576, 18}};
  Random random(7);
  for (i64 n = 1; n <= 70; ++n) {
    list.push_back({n, random.in(1, 70), random.in(1, 5)});
    list.push_back({random.in(1, 300), n, random.in(1, 20)});
  }
  for (i64 n = 1; n <= 40; ++n) list.push_back({random.in(1, 200), random.in(1, 70), n});
  return list;
}

template <Format format>
void test_linear(const Kernels& kernels, Report& report) {
  std::uint64_t seed = 0;
  for (const Shape& shape : shapes()) {
    if (shape.format != format) continue;
    for (const Size& size : sizes())
      for (Data data : {Data::exact, Data::real, Data::special, Data::extreme}) {
        if (data == Data::special && (format != Format::bf16 || kernels.rounded_size != 2)) continue;
        if (data == Data::extreme && format < Format::int8) continue;
        Problem(shape, data, size.n_in, size.n_out, size.n_rows, ++seed).check(kernels, report);
      }
  }
}

// ---------------------------------------------------------------------------------------------- inputs

void test_quantize_rows(const Kernels& kernels, Report& report) {
  Random random(11);
  for (int trial = 0; trial < 600; ++trial) {
    const i64 n_in = trial < 200 ? trial + 1 : random.pick<i64>({768, 1027, 4096, random.in(1, 300)});
    const i64 group = random.pick<i64>({0, 32, 64, 128, 256}), n_groups = group ? div_up(n_in, group) : 1;
    const i64 n_rows = random.in(1, 6), x_stride = n_in + random.in(0, 3), stride = round_up(n_in, 64);
    Floats x(n_rows * x_stride, Role::input, random.in(0, 3));
    for (i64 r = 0; r < n_rows; ++r) {
      const float size = random.pick({1.f, 1e4f, 1e-4f, 0.f, 1e-36f, 1e-44f, 1e36f});
      for (i64 i = 0; i < n_in; ++i) x[r * x_stride + i] = random.uniform(size);
    }
    Guarded<std::int8_t> values(n_rows * stride, Role::output), again(n_rows * stride, Role::output);
    Floats scales(n_rows * n_groups, Role::output, random.in(0, 3)), scales2(n_rows * n_groups, Role::output);
    Guarded<std::int32_t> sums(n_rows * n_groups, Role::output, random.in(0, 3)),
        sums2(n_rows * n_groups, Role::output);
    const auto run = [&](Guarded<std::int8_t>& v, Floats& s, Guarded<std::int32_t>& t, i64 begin, i64 end) {
      kernels.quantize_rows(x.data(), x_stride, n_in, group, v.data(), stride, s.data(), t.data(), begin, end);
    };
    run(values, scales, sums, 0, n_rows);
    const std::string what =
        say("n_in %lld group %lld rows %lld", (long long)n_in, (long long)group, (long long)n_rows);
    values.check_zones(report, what);
    scales.check_zones(report, what);
    sums.check_zones(report, what);
    for (i64 r = 0; r < n_rows; ++r) {
      for (i64 g = 0; g < n_groups; ++g) {
        const i64 begin = g * group, end = group ? std::min(begin + group, n_in) : n_in;
        const std::string where = say("%s, row %lld group %lld", what.c_str(), (long long)r, (long long)g);
        double largest = 0;
        for (i64 i = begin; i < end; ++i) largest = std::max(largest, std::fabs(double{x[r * x_stride + i]}));
        const double scale = double{scales[r * n_groups + g]};
        // 127 steps to the largest value; a group this side of the smallest normal may vanish, or keep a scale.
        const double tiny = largest < 0x1p-118 ? largest : 0;
        report.near(scale, largest / 127, 3 * kUnit * largest / 127 + tiny, [&] { return where + ", scale"; });
        std::int32_t sum = 0;
        for (i64 i = begin; i < end; ++i) {
          const int q = values[r * stride + i];
          sum += q;
          // Rounded to the nearest step; x / scale itself is known to 4 roundings of at most 127.
          report.near(q * scale, double{x[r * x_stride + i]}, scale * (0.5 + 127 * 4 * kUnit) + tiny, where);
          report.expect(q >= -127 && q <= 127, [&] { return where + ": -128"; });
        }
        report.expect(sums[r * n_groups + g] == sum, [&] { return where + ": wrong sum"; });
      }
      for (i64 i = n_in; i < stride; ++i)
        report.expect(values[r * stride + i] == 0, [&] { return what + ": padding is not zero"; });
    }
    const i64 cut = random.in(0, n_rows);
    run(again, scales2, sums2, 0, cut);
    run(again, scales2, sums2, cut, n_rows);
    report.expect(again.same_bits(values) && scales2.same_bits(scales) && sums2.same_bits(sums),
                  [&] { return what + ": rows differ when alone"; });
  }
}

void test_round_rows(const Kernels& kernels, Report& report) {
  Random random(12);
  for (int trial = 0; trial < 300; ++trial) {
    const i64 n_in = trial < 140 ? trial + 1 : random.in(1, 2000), n_rows = random.in(1, 5);
    const i64 x_stride = n_in + random.in(0, 3), stride = round_up(n_in, 32);
    Floats x(n_rows * x_stride, Role::input, random.in(0, 3));
    for (i64 r = 0; r < n_rows; ++r)
      for (i64 i = 0; i < n_in; ++i)  // any bits at all, or the middle between two bf16 values
        x[r * x_stride + i] = twin::float_of_bits(static_cast<std::uint32_t>(random.bits()) &
                                                  (random.in(0, 1) ? 0xFFFFFFFFu : 0xFFFF8000u));
    const i64 halves = kernels.rounded_size / 2;  // as f32, a value has a lower half, which is zero
    Guarded<std::uint16_t> whole(n_rows * stride * halves, Role::output), parts(whole.size(), Role::output);
    kernels.round_rows(x.data(), x_stride, n_in, whole.data(), stride, 0, n_rows);
    const std::string what = say("n_in %lld rows %lld", (long long)n_in, (long long)n_rows);
    whole.check_zones(report, what);
    for (i64 r = 0; r < n_rows; ++r)
      for (i64 i = 0; i < stride; ++i) {
        const float value = i < n_in ? x[r * x_stride + i] : 0;
        const std::uint16_t* at = whole.data() + (r * stride + i) * halves;
        const std::uint16_t got = at[halves - 1], want = twin::to_bfloat(value);
        // A denormal may be flushed here already: the product flushes it anyway.
        const bool flushed = (twin::bits_of(value) & 0x7F800000) == 0 && (got & 0x7FFF) == 0;
        const bool right = got == want || flushed || (std::isnan(value) && std::isnan(twin::bfloat(got)));
        report.expect(right && (halves == 1 || at[0] == 0), [&] {
          return say("%s: %04x from %08x, not %04x", what.c_str(), got, twin::bits_of(value), want);
        });
      }
    for (i64 r = n_rows; r-- > 0;) kernels.round_rows(x.data(), x_stride, n_in, parts.data(), stride, r, r + 1);
    report.expect(parts.same_bits(whole), [&] { return what + ": rows differ when alone"; });
  }
}

void test_embed(const Kernels& kernels, Report& report) {
  Random random(13);
  for (const Shape& shape : shapes()) {
    if (shape.order == Order::in_out) continue;
    for (int trial = 0; trial < 120; ++trial) {
      const i64 width = trial < 70 ? trial + 1 : random.pick<i64>({768, 1027, 160}),
                vocabulary = random.pick<i64>({1, 3, 50, 33});
      const i64 n_rows = random.in(1, 40), y_stride = width + random.in(0, 5);
      const bool add = random.in(0, 1) == 1;
      Quantized q{shape.format, vocabulary, width, shape.group, shape.symmetric, {}, {}, {}, {}};
      std::unique_ptr<Floats> f32;
      std::unique_ptr<Guarded<std::uint16_t>> f16;
      std::unique_ptr<Guarded<std::uint8_t>> bytes;
      Matrix table{nullptr, shape.format, shape.order, vocabulary, width, shape.group, shape.symmetric};
      const i64 n = vocabulary * width, shift = random.in(0, 3);
      if (shape.format == Format::f32) {
        f32 = std::make_unique<Floats>(n, Role::input, shift);
        for (i64 i = 0; i < n; ++i) (*f32)[i] = random.uniform();
        table.data = reinterpret_cast<const std::uint8_t*>(f32->data());
      } else if (shape.order == Order::out_in) {
        f16 = std::make_unique<Guarded<std::uint16_t>>(n, Role::input, shift);
        for (i64 i = 0; i < n; ++i)
          (*f16)[i] = static_cast<std::uint16_t>(random.in(0, 1) << 15 |
                                                 random.in(shape.format == Format::bf16 ? 0x80 : 0, 0x7BFF));
        table.data = reinterpret_cast<const std::uint8_t*>(f16->data());
      } else {
        for (i64 i = 0; i < n; ++i)
          q.q.push_back(static_cast<int>(shape.format == Format::int8 ? random.in(-128, 127) : random.in(0, 15)));
        for (i64 i = 0; i < vocabulary * q.n_groups(); ++i) {
          q.scales.push_back(static_cast<std::uint16_t>(random.in(0x0400, 0x3C00)));
          q.minima.push_back(static_cast<std::uint16_t>(random.in(0, 1) << 15 | random.in(0x0400, 0x3C00)));
        }
        for (i64 o = 0; o < vocabulary; ++o) q.row_scales.push_back(random.uniform());
        const std::vector<std::uint8_t> packed = q.packed();
        bytes = std::make_unique<Guarded<std::uint8_t>>(static_cast<i64>(packed.size()) + kSlack);
        std::memcpy(bytes->data(), packed.data(), packed.size());
        table.data = bytes->data();
      }
      Guarded<std::int32_t> ids(n_rows);
      for (i64 r = 0; r < n_rows; ++r) ids[r] = static_cast<std::int32_t>(random.in(0, vocabulary - 1));
      Floats whole(n_rows * y_stride, Role::output, random.in(0, 3)), parts(n_rows * y_stride, Role::output),
          before(n_rows * y_stride);
      for (i64 r = 0; r < n_rows; ++r)
        for (i64 i = 0; i < width; ++i) {
          before[r * y_stride + i] = random.uniform();
          if (add) whole[r * y_stride + i] = parts[r * y_stride + i] = before[r * y_stride + i];
        }
      kernels.embed(table, ids.data(), whole.data(), y_stride, add, 0, n_rows);
      for (i64 r = n_rows; r-- > 0;) kernels.embed(table, ids.data(), parts.data(), y_stride, add, r, r + 1);
      const std::string what =
          say("%s group %lld%s, width %lld vocabulary %lld%s", kFormatNames[int(shape.format)], (long long)shape.group,
              shape.symmetric ? " symmetric" : "", (long long)width, (long long)vocabulary, add ? " add" : "");
      whole.check_zones(report, what);
      report.expect(parts.same_bits(whole), [&] { return what + ": rows differ when alone"; });
      for (i64 r = 0; r < n_rows; ++r) {
        for (i64 i = 0; i < width; ++i) {
          const i64 id = ids[r];
          // A dense value is exact; scale * q is rounded once; with a minimum there is one addition more.
          double want, tolerance = 0;
          if (f32) {
            want = double{(*f32)[id * width + i]};
          } else if (f16) {
            const std::uint16_t bits = (*f16)[id * width + i];
            want = shape.format == Format::bf16 ? double{twin::bfloat(bits)} : twin::half(bits);
          } else {
            const double a = q.scale(id, q.group_of(i)) * q.at(id, i), b = q.minimum(id, q.group_of(i));
            want = a + b;
            tolerance = shape.format == Format::int8 ? kUnit * std::fabs(a) : 2 * kUnit * (std::fabs(a) + std::fabs(b));
          }
          if (add) {
            want += double{before[r * y_stride + i]};
            tolerance += kUnit * std::fabs(want);
          }
          if (!report.near(double{whole[r * y_stride + i]}, want, tolerance,
                           [&] { return say("%s, row %lld value %lld", what.c_str(), (long long)r, (long long)i); }))
            break;
        }
        for (i64 i = width; i < y_stride; ++i)
          report.expect(whole.untouched(r * y_stride + i), [&] { return what + ": wrote between the rows"; });
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- by rows

// Runs a kernel over all rows, then over the rows one by one; checks the zones, the gaps and one answer.
template <typename Run>
void whole_and_alone(Report& report, const std::string& what, Floats& y, i64 n_rows, i64 width, i64 y_stride, Run run) {
  Floats alone(n_rows * y_stride, Role::output, 1);
  run(y.data(), i64{0}, n_rows);
  for (i64 r = n_rows; r-- > 0;) run(alone.data(), r, r + 1);
  y.check_zones(report, what);
  alone.check_zones(report, what);
  report.expect(alone.same_bits(y), [&] { return what + ": rows differ when alone"; });
  for (i64 r = 0; r < n_rows; ++r)
    for (i64 i = width; i < y_stride; ++i)
      report.expect(y.untouched(r * y_stride + i), [&] { return what + ": wrote between the rows"; });
}

void test_layer_norm(const Kernels& kernels, Report& report) {
  Random random(21);
  for (int trial = 0; trial < 200; ++trial) {
    const i64 width = trial < 130 ? trial + 1 : random.pick<i64>({768, 1600, 4099}), n_rows = random.in(1, 6);
    const i64 x_stride = width + random.in(0, 3), y_stride = width + random.in(0, 3);
    const bool has_bias = random.in(0, 1) == 1;
    const float eps = 1e-5f, offset = random.pick({0.f, 1.f, 100.f});
    Floats x(n_rows * x_stride, Role::input, random.in(0, 3)), weight(width, Role::input, random.in(0, 3)), bias(width);
    Floats y(n_rows * y_stride, Role::output, random.in(0, 3));
    for (i64 r = 0; r < n_rows; ++r)
      for (i64 i = 0; i < width; ++i) x[r * x_stride + i] = offset + random.uniform(3);
    for (i64 i = 0; i < width; ++i) weight[i] = random.uniform(2), bias[i] = random.uniform();
    const std::string what = say("width %lld rows %lld offset %g%s", (long long)width, (long long)n_rows,
                                 double{offset}, has_bias ? " bias" : "");
    whole_and_alone(report, what, y, n_rows, width, y_stride, [&](float* out, i64 begin, i64 end) {
      kernels.layer_norm(x.data(), x_stride, weight.data(), has_bias ? bias.data() : nullptr, eps, width, out, y_stride,
                         begin, end);
    });
    const double n = double(width);
    for (i64 r = 0; r < n_rows; ++r) {
      const float* row = x.data() + r * x_stride;
      double mean = 0, size = 0, variance = 0;
      for (i64 i = 0; i < width; ++i) mean += double{row[i]} / n, size += std::fabs(double{row[i]}) / n;
      for (i64 i = 0; i < width; ++i) variance += (double{row[i]} - mean) * (double{row[i]} - mean) / n;
      const double deviation = std::sqrt(variance + double{eps});
      // The mean is known to n u size; the centred values to that and one rounding; their variance relatively to
      // n + 4 roundings and the square of the mean's error (first-order errors cancel: the centred values sum to 0).
      const double mean_error = (n + 1) * kUnit * size;
      const double relative = (n + 8) * kUnit + mean_error * mean_error / (deviation * deviation);
      for (i64 i = 0; i < width; ++i) {
        const double centred = double{row[i]} - mean, w = double{weight[i]};
        const double want = centred / deviation * w + (has_bias ? double{bias[i]} : 0);
        const double tolerance = std::fabs(w) / deviation * (mean_error + std::fabs(centred) * relative) +
                                 2 * kUnit * (std::fabs(want) + std::fabs(double{bias[i]}));
        if (!report.near(double{y[r * y_stride + i]}, want, tolerance,
                         [&] { return say("%s, row %lld value %lld", what.c_str(), (long long)r, (long long)i); }))
          break;
      }
    }
  }
}

void test_rms_norm(const Kernels& kernels, Report& report) {
  Random random(22);
  for (int trial = 0; trial < 200; ++trial) {
    const i64 width = trial < 130 ? trial + 1 : random.pick<i64>({576, 2048, 4099}), runs = random.in(1, 4),
              n_rows = random.in(1, 6);
    const i64 all = width * runs, x_stride = all + random.in(0, 3), y_stride = all + random.in(0, 3);
    const float eps = random.pick({1e-5f, 1e-6f});
    Floats x(n_rows * x_stride, Role::input, random.in(0, 3)), weight(width, Role::input, random.in(0, 3));
    Floats y(n_rows * y_stride, Role::output, random.in(0, 3));
    for (i64 r = 0; r < n_rows; ++r)
      for (i64 i = 0; i < all; ++i) x[r * x_stride + i] = random.uniform(3);
    for (i64 i = 0; i < width; ++i) weight[i] = random.uniform(2);
    const std::string what =
        say("width %lld runs %lld rows %lld", (long long)width, (long long)runs, (long long)n_rows);
    whole_and_alone(report, what, y, n_rows, all, y_stride, [&](float* out, i64 begin, i64 end) {
      kernels.rms_norm(x.data(), x_stride, weight.data(), eps, width, runs, out, y_stride, begin, end);
    });
    for (i64 r = 0; r < n_rows; ++r)
      for (i64 run = 0; run < runs; ++run) {
        const float* row = x.data() + r * x_stride + run * width;
        double squares = 0;
        for (i64 i = 0; i < width; ++i) squares += double{row[i]} * double{row[i]};
        const double root = std::sqrt(squares / double(width) + double{eps});
        for (i64 i = 0; i < width; ++i) {
          const double want = double{row[i]} / root * double{weight[i]};
          const double tolerance = (double(width + 2) / 2 + 8) * kUnit * std::fabs(want);
          if (!report.near(double{y[r * y_stride + run * width + i]}, want, tolerance, [&] {
                return say("%s, row %lld run %lld value %lld", what.c_str(), (long long)r, (long long)run,
                           (long long)i);
              }))
            break;
        }
      }
  }
}

void test_gate_and_add(const Kernels& kernels, Report& report) {
  Random random(23);
  const Activation activations[] = {Activation::none, Activation::gelu, Activation::gelu_new, Activation::silu,
                                    Activation::relu};
  for (int trial = 0; trial < 300; ++trial) {
    const i64 width = trial < 130 ? trial + 1 : random.pick<i64>({1536, 3072, 4099}), n_rows = random.in(1, 6);
    const i64 a_stride = width + random.in(0, 3), b_stride = width + random.in(0, 3),
              y_stride = width + random.in(0, 3);
    const Activation activation = activations[trial % 5];
    Floats a(n_rows * a_stride, Role::input, random.in(0, 3)), b(n_rows * b_stride, Role::input, random.in(0, 3));
    Floats y(n_rows * y_stride, Role::output, random.in(0, 3)), sum(n_rows * y_stride, Role::output, random.in(0, 3));
    const bool hard = random.in(0, 3) == 0;  // far out, where exp over- and underflows
    for (i64 r = 0; r < n_rows; ++r)
      for (i64 i = 0; i < width; ++i) {
        a[r * a_stride + i] = hard ? random.pick({0.f, -0.f, 40.f, -40.f, 88.f, -88.f, 104.f, -104.f, 3e4f, -3e4f,
                                                  3e30f, -3e30f, 1e-20f, INFINITY, NAN})
                                   : random.uniform(8);
        b[r * b_stride + i] = random.uniform(2);
      }
    const std::string what =
        say("%s, width %lld rows %lld", kActivationNames[int(activation)], (long long)width, (long long)n_rows);
    whole_and_alone(report, "gate " + what, y, n_rows, width, y_stride, [&](float* out, i64 begin, i64 end) {
      kernels.gate(a.data(), a_stride, b.data(), b_stride, activation, width, out, y_stride, begin, end);
    });
    whole_and_alone(report, "add " + what, sum, n_rows, width, y_stride, [&](float* out, i64 begin, i64 end) {
      kernels.add(a.data(), a_stride, b.data(), b_stride, width, out, y_stride, begin, end);
    });
    for (i64 r = 0; r < n_rows; ++r)
      for (i64 i = 0; i < width; ++i) {
        const double gate = double{a[r * a_stride + i]}, up = double{b[r * b_stride + i]};
        const std::string where = say("%s: gate %g up %g", what.c_str(), gate, up);
        report.near(double{sum[r * y_stride + i]}, double{a[r * a_stride + i] + b[r * b_stride + i]}, 0,
                    [&] { return "add " + where; });
        if (activation == Activation::relu && std::isnan(gate)) continue;  // 0 or NaN
        const double active = twin::activate(activation, gate);
        const double tolerance =
            std::fabs(up) * (twin::activation_error(activation, gate, 0) + kUnit * std::fabs(active));
        report.near(double{y[r * y_stride + i]}, double{float(active * up)}, std::isinf(gate) ? 0 : tolerance,
                    [&] { return "gate " + where; });
      }
  }
}

// ---------------------------------------------------------------------------------------------- attention

void test_rotate(const Kernels& kernels, Report& report) {
  Random random(31);
  for (int trial = 0; trial < 260; ++trial) {
    const i64 head_dim = trial < 130 ? trial + 1 : random.pick<i64>({10, 16, 64, 80, 128}), n_heads = random.in(1, 5),
              n_rows = random.in(1, 9);
    const i64 stride = n_heads * head_dim + random.in(0, 3),
              n_pairs = random.in(0, 2) ? head_dim / 2 : random.in(0, head_dim / 2);
    const bool interleaved = random.in(0, 1) == 1;
    Floats cosines(n_rows * n_pairs), sines(n_rows * n_pairs), x(n_rows * stride, Role::output, random.in(0, 3));
    Floats before(n_rows * stride), alone(n_rows * stride, Role::output, 1);
    for (i64 i = 0; i < n_rows * n_pairs; ++i) cosines[i] = random.uniform(), sines[i] = random.uniform();
    for (i64 r = 0; r < n_rows; ++r)
      for (i64 i = 0; i < n_heads * head_dim; ++i)
        x[r * stride + i] = alone[r * stride + i] = before[r * stride + i] = random.uniform(3);
    const Rotation rotation{n_pairs, interleaved, cosines.data(), sines.data()};
    kernels.rotate(rotation, x.data(), stride, n_heads, head_dim, 0, n_rows);
    for (i64 r = n_rows; r-- > 0;) kernels.rotate(rotation, alone.data(), stride, n_heads, head_dim, r, r + 1);
    const std::string what =
        say("head_dim %lld pairs %lld heads %lld rows %lld%s", (long long)head_dim, (long long)n_pairs,
            (long long)n_heads, (long long)n_rows, interleaved ? " interleaved" : "");
    x.check_zones(report, what);
    report.expect(alone.same_bits(x), [&] { return what + ": rows differ when alone"; });
    for (i64 r = 0; r < n_rows; ++r) {
      for (i64 h = 0; h < n_heads; ++h) {
        const i64 head = r * stride + h * head_dim;
        for (i64 i = 0; i < n_pairs; ++i) {
          const i64 a = head + (interleaved ? 2 * i : i), b = head + (interleaved ? 2 * i + 1 : i + n_pairs);
          const double c = double{cosines[r * n_pairs + i]}, s = double{sines[r * n_pairs + i]}, xa = double{before[a]},
                       xb = double{before[b]};
          report.near(double{x[a]}, xa * c - xb * s, 2 * kUnit * (std::fabs(xa * c) + std::fabs(xb * s)), what);
          report.near(double{x[b]}, xb * c + xa * s, 2 * kUnit * (std::fabs(xb * c) + std::fabs(xa * s)), what);
        }
        for (i64 i = 2 * n_pairs; i < head_dim; ++i)
          report.expect(twin::bits_of(x[head + i]) == twin::bits_of(before[head + i]),
                        [&] { return what + ": changed a dimension that has no pair"; });
      }
      for (i64 i = n_heads * head_dim; i < stride; ++i)
        report.expect(x.untouched(r * stride + i), [&] { return what + ": wrote between the rows"; });
    }
  }
}

const char* const kKvNames[] = {"f32", "bf16", "int8"};

// Sequences with pages in any order. What no token has written is NaN: no kernel may let it through.
class Cache {
 public:
  Cache(Random& random, KvFormat format, i64 n_kv_heads, i64 head_dim, const std::vector<i64>& lengths)
      : format_(format), n_heads_(n_kv_heads), dim_(head_dim) {
    for (i64 length : lengths) width_ = std::max(width_, div_up(length, kPage));
    width_ += random.in(0, 2);
    i64 n_pages = random.in(0, 2);
    for (i64 length : lengths) n_pages += div_up(length, kPage);
    std::vector<std::int32_t> pages;
    for (i64 p = 0; p < n_pages; ++p) pages.insert(pages.begin() + random.in(0, p), static_cast<std::int32_t>(p));
    for (i64 length : lengths)
      for (i64 i = 0; i < width_; ++i) {
        const bool used = i < div_up(length, kPage);
        table_.push_back(used ? pages.back() : -1);  // no such page
        if (used) pages.pop_back();
      }
    group_ = format == KvFormat::f32 ? 1 : format == KvFormat::bf16 ? 2 : 4;
    scales_ = format == KvFormat::int8 ? 4 * kPage : 0;
    keys_ = div_up(dim_, group_) * kPage * 4;
    head_ = round_up(2 * scales_ + keys_ + kPage / group_ * dim_ * 4, 64);
    stride_ = n_heads_ * head_ + random.in(0, 2) * 64;  // other layers' parts
    data_ = std::make_unique<Guarded<std::uint8_t>>((n_pages - 1) * stride_ + n_heads_ * head_);
  }

  KvLayer layer() { return {data_->data(), format_, n_heads_, dim_, stride_}; }
  Rows rows(const std::vector<std::int32_t>& positions, const std::vector<std::int32_t>& sequence) const {
    return {static_cast<i64>(positions.size()), positions.data(), sequence.data(), table_.data(), width_};
  }
  double get(bool keys, i64 sequence, i64 position, i64 head, i64 d) const {
    const i64 at = element(keys, sequence, position, head, d);
    if (format_ == KvFormat::f32) return double{read<float>(at)};
    if (format_ == KvFormat::bf16) return double{twin::bfloat(read<std::uint16_t>(at))};
    return double{read<float>(scale(keys, sequence, position, head))} * (data_->data()[at] - 128);
  }
  // A token's keys or values of one head, rounded to the format.
  void set(bool keys, i64 sequence, i64 position, i64 head, const float* x) {
    float top = 0;
    for (i64 d = 0; d < dim_; ++d) top = std::isnan(x[d]) || x[d] * 0 != 0 ? NAN : std::max(top, std::fabs(x[d]));
    if (format_ == KvFormat::int8) write(scale(keys, sequence, position, head), top / 127);
    // Keys are padded to whole groups, with zeros.
    for (i64 d = 0; d < (keys ? round_up(dim_, group_) : dim_); ++d) {
      const i64 at = element(keys, sequence, position, head, d);
      const float v = d < dim_ ? x[d] : 0;
      if (format_ == KvFormat::f32) write(at, v);
      if (format_ == KvFormat::bf16) write(at, twin::to_bfloat(v));
      if (format_ == KvFormat::int8)
        write(at, static_cast<std::uint8_t>(top > 0 ? std::lrint(v * (127 / top)) + 128 : 128));
    }
  }
  void check_equal(Report& report, const Cache& want, const std::string& what) const {
    for (i64 i = 0; i < data_->size(); ++i)
      if (!report.expect(data_->data()[i] == want.data_->data()[i],
                         [&] { return say("%s: byte %lld of the cache", what.c_str(), (long long)i); }))
        return;
  }
  void check_zones(Report& report, const std::string& what) { data_->check_zones(report, what); }
  // The same pages, nothing written.
  std::unique_ptr<Cache> empty() const {
    auto copy = std::unique_ptr<Cache>(new Cache());
    copy->format_ = format_, copy->n_heads_ = n_heads_, copy->dim_ = dim_, copy->width_ = width_;
    copy->group_ = group_, copy->scales_ = scales_, copy->keys_ = keys_, copy->head_ = head_, copy->stride_ = stride_;
    copy->table_ = table_;
    copy->data_ = std::make_unique<Guarded<std::uint8_t>>(data_->size());
    return copy;
  }

 private:
  Cache() = default;
  i64 part(i64 sequence, i64 position, i64 head) const {
    return table_[static_cast<std::size_t>(sequence * width_ + position / kPage)] * stride_ + head * head_;
  }
  i64 scale(bool keys, i64 sequence, i64 position, i64 head) const {
    return part(sequence, position, head) + (keys ? 0 : scales_ + keys_) + position % kPage * 4;
  }
  i64 element(bool keys, i64 sequence, i64 position, i64 head, i64 d) const {
    const i64 slot = position % kPage;
    const i64 place =
        keys ? (d / group_ * kPage + slot) * group_ + d % group_ : (slot / group_ * dim_ + d) * group_ + slot % group_;
    return part(sequence, position, head) + scales_ + (keys ? 0 : keys_ + scales_) + place * (4 / group_);
  }
  template <typename T>
  T read(i64 at) const {
    T x;
    std::memcpy(&x, data_->data() + at, sizeof x);
    return x;
  }
  template <typename T>
  void write(i64 at, T x) {
    std::memcpy(data_->data() + at, &x, sizeof x);
  }

  KvFormat format_{};
  i64 n_heads_ = 0, dim_ = 0, width_ = 0, group_ = 0, scales_ = 0, keys_ = 0, head_ = 0, stride_ = 0;
  std::vector<std::int32_t> table_;
  std::unique_ptr<Guarded<std::uint8_t>> data_;
};

// A batch: of each sequence a chunk of its last positions; one alone is a decoding step.
struct Chunks {
  std::vector<i64> lengths;
  std::vector<std::int32_t> positions, sequence;

  Chunks(Random& random, i64 longest) {
    for (i64 s = 0, n = random.in(1, 4); s < n; ++s) {
      lengths.push_back(random.in(1, longest));
      const i64 chunk = random.in(0, 1) ? 1 : random.in(1, std::min<i64>(lengths.back(), 45));
      for (i64 p = lengths.back() - chunk; p < lengths.back(); ++p) {
        positions.push_back(static_cast<std::int32_t>(p));
        sequence.push_back(static_cast<std::int32_t>(s));
      }
    }
  }
};

void test_store_kv(const Kernels& kernels, Report& report) {
  Random random(32);
  for (int trial = 0; trial < 300; ++trial) {
    const i64 head_dim = trial < 70 ? trial + 1 : random.pick<i64>({10, 16, 64, 80, 128}), n_kv_heads = random.in(1, 4);
    const KvFormat format = random.pick({KvFormat::f32, KvFormat::bf16, KvFormat::int8});
    const Chunks batch(random, 120);
    Cache got(random, format, n_kv_heads, head_dim, batch.lengths);
    const auto want = got.empty();
    const i64 n = static_cast<i64>(batch.positions.size()), width = n_kv_heads * head_dim;
    const i64 k_stride = width + random.in(0, 3), v_stride = width + random.in(0, 3);
    Floats k(n * k_stride, Role::input, random.in(0, 3)), v(n * v_stride, Role::input, random.in(0, 3));
    for (i64 r = 0; r < n; ++r)
      for (i64 h = 0; h < n_kv_heads; ++h) {
        const float size = random.pick({3.f, 3.f, 1e-5f, 0.f});
        for (i64 i = h * head_dim; i < (h + 1) * head_dim; ++i)
          k[r * k_stride + i] = random.uniform(size), v[r * v_stride + i] = random.uniform(size);
      }
    const Rows rows = got.rows(batch.positions, batch.sequence);
    const i64 cut = random.in(0, n);
    // At once, as threads share the rows out: neither may touch what is the other's, be it in the same word.
    const auto part = [&](i64 begin, i64 end) {
      const FloatEnvironment environment;
      kernels.store_kv(got.layer(), rows, k.data(), k_stride, v.data(), v_stride, begin, end);
    };
    std::thread other(part, 0, cut);
    part(cut, n);
    other.join();
    for (i64 r = 0; r < n; ++r)
      for (i64 h = 0; h < n_kv_heads; ++h) {
        const i64 s = batch.sequence[static_cast<std::size_t>(r)], p = batch.positions[static_cast<std::size_t>(r)];
        want->set(true, s, p, h, k.data() + r * k_stride + h * head_dim);
        want->set(false, s, p, h, v.data() + r * v_stride + h * head_dim);
      }
    const std::string what = say("%s head_dim %lld kv_heads %lld rows %lld", kKvNames[int(format)], (long long)head_dim,
                                 (long long)n_kv_heads, (long long)n);
    got.check_zones(report, what);
    got.check_equal(report, *want, what);
  }
}

// An int8 token that is not finite is NaN as a whole, and no other token is touched by it.
void test_store_kv_not_finite(const Kernels& kernels, Report& report) {
  Random random(35);
  for (float bad : {NAN, INFINITY, -INFINITY}) {
    Cache cache(random, KvFormat::int8, 2, 20, {3});
    Floats k(3 * 40), v(3 * 40);
    for (i64 i = 0; i < 3 * 40; ++i) k[i] = v[i] = random.uniform();
    k[40 + 7] = v[40 + 27] = bad;  // row 1: of its keys head 0, of its values head 1
    const std::vector<std::int32_t> positions{0, 1, 2}, sequence{0, 0, 0};
    kernels.store_kv(cache.layer(), cache.rows(positions, sequence), k.data(), 40, v.data(), 40, 0, 3);
    for (i64 p = 0; p < 3; ++p)
      for (i64 h = 0; h < 2; ++h)
        for (i64 d = 0; d < 20; ++d) {
          report.expect(std::isnan(cache.get(true, 0, p, h, d)) == (p == 1 && h == 0), "a key that is not finite");
          report.expect(std::isnan(cache.get(false, 0, p, h, d)) == (p == 1 && h == 1), "a value that is not finite");
        }
  }
}

// All of a batch's attention, in the shares of so many threads, one after the other, the last first.
void attend_all(const Kernels& kernels, Attend attend, int threads) {
  AttendPlan plan(attend.rows, attend.n_heads, attend.kv.n_kv_heads, attend.kv.head_dim, attend.window, threads);
  Floats partials(std::max<i64>(1, plan.floats()), Role::output);
  plan.place(partials.data());
  const i64 y_stride = attend.y_stride;
  float* y = attend.y;
  Floats folded(attend.rows.n * y_stride, Role::output);
  attend.y = folded.data();
  for (int thread = threads; thread-- > 0;)
    for (const Piece *p = plan.begin(thread), *end = plan.end(thread); p < end; ++p)
      kernels.attend(attend, *p, p + 1 < end ? p + 1 : nullptr, scratch());
  const i64 half = attend.rows.n / 2, n = static_cast<i64>(plan.partials().size());
  kernels.merge(attend, plan.partials().data(), n, y, y_stride, half, attend.rows.n);
  kernels.merge(attend, plan.partials().data(), n, y, y_stride, 0, half);
}

void test_attend(const Kernels& kernels, Report& report) {
  Random random(33);
  for (int trial = 0; trial < 500; ++trial) {
    const i64 head_dim = trial < 130 ? trial + 1 : random.pick<i64>({10, 16, 64, 80, 128}),
              n_kv_heads = random.in(1, 3);
    const i64 share = trial == 300 ? 70 : random.pick<i64>({1, 1, 2, 3, 4, 7, 8}), n_heads = n_kv_heads * share;
    const KvFormat format = random.pick({KvFormat::f32, KvFormat::bf16, KvFormat::int8});
    const bool integers = format == KvFormat::int8;
    const i64 window = random.pick<i64>({0, 0, 1, 5, 32, 33, 100, 200});
    // Even: all scores are 0 and the values are integers, so that a power of two of keys gives an exact mean.
    const bool even = random.in(0, 3) == 0;
    const Chunks batch(random, trial % 5 == 4 ? 1100 : 150);
    Cache cache(random, format, n_kv_heads, head_dim, batch.lengths);
    std::vector<float> x(static_cast<std::size_t>(head_dim));
    for (i64 s = 0; s < static_cast<i64>(batch.lengths.size()); ++s)
      for (i64 p = 0; p < batch.lengths[static_cast<std::size_t>(s)]; ++p)
        for (i64 h = 0; h < n_kv_heads; ++h) {
          for (float& v : x) v = random.uniform(2);
          cache.set(true, s, p, h, x.data());
          for (float& v : x) v = even ? static_cast<float>(random.in(-8, 8)) : random.uniform(2);
          if (even && integers) x[0] = 127;  // then the scale is 1
          cache.set(false, s, p, h, x.data());
        }
    const i64 n = static_cast<i64>(batch.positions.size()), width = n_heads * head_dim;
    const i64 q_stride = width + random.in(0, 3), y_stride = width + random.in(0, 3);
    const i64 states_stride = 2 * n_heads + random.in(0, 3);
    Floats q(n * q_stride, Role::input, random.in(0, 3)), y(n * y_stride, Role::output, random.in(0, 3)),
        parts(n * y_stride, Role::output, 1), states(n * states_stride, Role::output, 1);
    for (i64 r = 0; r < n; ++r)
      for (i64 i = 0; i < width; ++i) q[r * q_stride + i] = even ? 0 : random.uniform(2);
    const float scale = random.pick({1.f, 0.125f, 1 / std::sqrt(static_cast<float>(head_dim))});
    Attend attend{cache.rows(batch.positions, batch.sequence),
                  q.data(),
                  q_stride,
                  cache.layer(),
                  n_heads,
                  scale,
                  window,
                  states.data(),
                  states_stride,
                  y.data(),
                  y_stride};
    attend_all(kernels, attend, 1);
    const std::string what = say("%s head_dim %lld heads %lld/%lld rows %lld sequences %zu window %lld%s",
                                 kKvNames[int(format)], (long long)head_dim, (long long)n_heads, (long long)n_kv_heads,
                                 (long long)n, batch.lengths.size(), (long long)window, even ? " even" : "");
    y.check_zones(report, what);
    states.check_zones(report, what);
    bool good = true;
    for (i64 r = 0; r < n && good; ++r) {
      const i64 s = batch.sequence[static_cast<std::size_t>(r)], p = batch.positions[static_cast<std::size_t>(r)],
                first = window ? std::max<i64>(0, p - window + 1) : 0;
      for (i64 i = width; i < y_stride; ++i)
        report.expect(y.untouched(r * y_stride + i), [&] { return what + ": wrote between the rows"; });
      if (n > 60 && r % 7 && r + 1 < n) continue;  // the twin is slow
      for (i64 h = 0; h < n_heads && good; ++h) {
        const i64 kv = h / share, keys = p - first + 1;
        std::vector<double> weights;
        double score_error = 0, largest = -INFINITY, total = 0, top_q = 0, top_v = 0;
        for (i64 d = 0; d < head_dim; ++d)
          top_q = std::max(top_q, std::fabs(double{q[r * q_stride + h * head_dim + d]}));
        for (i64 j = first; j <= p; ++j) {
          double score = 0, size = 0, rounding = 0;
          for (i64 d = 0; d < head_dim; ++d) {
            const double key = cache.get(true, s, j, kv, d) * double{scale};
            const double term = double{q[r * q_stride + h * head_dim + d]} * key;
            score += term;
            size += std::fabs(term);
            rounding += top_q / 32000 * std::fabs(key);  // queries in 15 bits
            top_v = std::max(top_v, std::fabs(cache.get(false, s, j, kv, d)));
          }
          weights.push_back(score);
          const double error = double(head_dim + 3) * kUnit * size + 2 * kUnit * std::fabs(score);
          score_error = std::max(score_error, integers ? rounding + 8 * kUnit * size : error);
          largest = std::max(largest, score);
        }
        for (double& w : weights) total += w = std::exp(w - largest);
        for (i64 d = 0; d < head_dim && good; ++d) {
          double want = 0, size = 0;
          for (i64 j = first; j <= p; ++j) {
            const double term = weights[static_cast<std::size_t>(j - first)] / total * cache.get(false, s, j, kv, d);
            want += term;
            size += std::fabs(term);
          }
          // A weight exp(s - m) is off by twice a score's error, the difference's rounding (|s - m| is under 2^8
          // here) and a few of exp's own; numerator and denominator each sum `keys` terms, block by block, and
          // every block's merge rescales both. In integers the weights are rounded to 15 bits of their largest.
          const double relative = 4 * score_error + (2 * double(keys) + 8 * double(keys / kBlock + 2) + 2 * 64) * kUnit;
          const bool exact = !integers && (keys == 1 || (even && (keys & (keys - 1)) == 0));
          double tolerance = exact ? 0 : relative * size;
          if (integers) tolerance = even ? 16 * kUnit * size : tolerance + double(keys) / total * top_v / 32000;
          good = report.near(double{y[r * y_stride + h * head_dim + d]}, want, tolerance, [&] {
            return say("%s: position %lld head %lld value %lld%s", what.c_str(), (long long)p, (long long)h,
                       (long long)d, exact ? " exact" : "");
          });
        }
      }
    }
    // One answer: on several threads; and a row alone in its batch, while all the others' queries, and all keys and
    // values that it does not see, are NaN.
    attend.y = parts.data();
    const int threads = static_cast<int>(random.in(2, 9));
    attend_all(kernels, attend, threads);
    report.expect(parts.same_bits(y), [&] { return say("%s: differs on %d threads", what.c_str(), threads); });
    const i64 row = random.in(0, n - 1);
    const auto same_row = [&](const float* alone) {
      return same_bits(alone, y.data() + row * y_stride, static_cast<std::size_t>(width));
    };
    Floats alone(y_stride, Role::output, 2);
    const std::vector<std::int32_t> position{batch.positions[static_cast<std::size_t>(row)]},
        sequence{batch.sequence[static_cast<std::size_t>(row)]};
    Attend one = attend;
    one.rows = cache.rows(position, sequence);
    one.q = q.data() + row * q_stride;
    one.y = alone.data();
    attend_all(kernels, one, static_cast<int>(random.in(1, 3)));
    report.expect(same_row(alone.data()),
                  [&] { return say("%s: row %lld differs when alone", what.c_str(), (long long)row); });
    for (i64 r = 0; r < n; ++r)
      for (i64 i = 0; i < width; ++i)
        if (r != row) q[r * q_stride + i] = NAN;
    for (float& v : x) v = NAN;
    for (i64 s = 0; s < static_cast<i64>(batch.lengths.size()); ++s)
      for (i64 p = 0; p < batch.lengths[static_cast<std::size_t>(s)]; ++p)
        if (s != sequence[0] || p > position[0] || (window && p <= position[0] - window))
          for (i64 h = 0; h < n_kv_heads; ++h) cache.set(true, s, p, h, x.data()), cache.set(false, s, p, h, x.data());
    attend_all(kernels, attend, threads);
    report.expect(same_row(parts.data() + row * y_stride),
                  [&] { return say("%s: row %lld differs beside rows of NaN", what.c_str(), (long long)row); });
  }
}

// Shares are even, and together everything once.
void test_attend_plan(Report& report) {
  Random random(36);
  for (int trial = 0; trial < 60; ++trial) {
    const Chunks batch(random, trial % 2 ? 3000 : 100);
    const i64 n = static_cast<i64>(batch.positions.size()), n_kv_heads = random.in(1, 4), repeat = random.in(1, 60);
    const i64 window = random.pick<i64>({0, 0, 1, 130, 500});
    const int threads = static_cast<int>(random.in(1, 9));
    const Rows rows{n, batch.positions.data(), batch.sequence.data(), nullptr, 0};
    AttendPlan plan(rows, n_kv_heads * repeat, n_kv_heads, 8, window, threads);
    std::vector<float> memory(static_cast<std::size_t>(plan.floats()));
    plan.place(memory.data());
    std::map<std::array<i64, 3>, int> seen;  // row, head, block
    i64 most = 0, total = 0, longest = 0;
    for (int thread = 0; thread < threads; ++thread) {
      i64 share = 0;
      for (const Piece* p = plan.begin(thread); p < plan.end(thread); ++p) {
        report.expect(p->begin < p->end && p->n_rows > 0, "a piece is empty");
        for (i64 r = p->row; r < p->row + p->n_rows; ++r)
          for (i64 b = p->begin; b < p->end; ++b) ++seen[{r, p->head, b}];
        const bool begins = p->begin == blocks_of(batch.positions[static_cast<std::size_t>(p->row)], window).begin;
        report.expect(begins == (p->partials == nullptr), "a tile's first piece, and no other, folds");
        const i64 cost = p->n_rows * repeat + 4;
        share += (p->end - p->begin) * cost, longest = std::max(longest, cost);
      }
      most = std::max(most, share), total += share;
    }
    report.expect(most <= total / threads + 2 * longest, "a share is too large");
    for (i64 r = 0; r < n; ++r)
      for (i64 h = 0; h < n_kv_heads; ++h) {
        const Blocks blocks = blocks_of(batch.positions[static_cast<std::size_t>(r)], window);
        for (i64 b = blocks.begin; b < blocks.end; ++b) report.expect(seen[{r, h, b}] == 1, "a block is read once");
      }
  }
}

// ---------------------------------------------------------------------------------------------- sampling

void test_arg_max(const Kernels& kernels, Report& report) {
  Random random(41);
  for (i64 trial = 1; trial <= 300; ++trial) {
    const i64 n = trial <= 200 ? trial : random.pick<i64>({32000, 50257, 49152, 151936});
    Floats x(n, Role::input, random.in(0, 3));
    const i64 levels = random.pick<i64>({0, 1, 3, 1000000});  // few levels: many ties
    const float low = random.pick({-INFINITY, -1e30f, -5.f});
    for (i64 i = 0; i < n; ++i) x[i] = levels ? low + static_cast<float>(random.in(0, levels)) : low;
    i64 want = 0;
    for (i64 i = 1; i < n; ++i)
      if (x[i] > x[want]) want = i;
    const i64 got = kernels.arg_max(x.data(), n);
    report.expect(got == want, [&] {
      return say("n %lld, %lld levels from %g: %lld, not %lld", (long long)n, (long long)levels, double{low},
                 (long long)got, (long long)want);
    });
  }
}

void test_noise(const Kernels& kernels, Report& report) {
  Random random(43);
  const auto word = [&] { return static_cast<std::uint32_t>(random.in(0, UINT32_MAX)); };
  for (int trial = 0; trial < 50; ++trial) {
    const std::uint64_t key = trial ? std::uint64_t{word()} << 32 | word() : UINT64_MAX;
    const std::uint32_t position = word(), first = trial % 5 ? static_cast<std::uint32_t>(random.in(0, 40000)) : word();
    std::uint32_t words[4][kNoiseCounters], most[kNoiseLanes], largest[kNoiseLanes] = {};
    kernels.noise(key, position, first, words[0], most);
    for (int i = 0; i < kNoiseCounters; ++i) {
      const auto want = philox({first + static_cast<std::uint32_t>(i), position, 0, 0}, key);
      for (int j = 0; j < 4; ++j) {
        report.expect(words[j][i] == want[static_cast<std::size_t>(j)], "a word is Philox's");
        largest[i % kNoiseLanes] = std::max(largest[i % kNoiseLanes], words[j][i]);
      }
    }
    report.expect(std::equal(most, most + kNoiseLanes, largest), "the largest words of the lanes");
  }
}

void test_sum_exp(const Kernels& kernels, Report& report) {
  Random random(42);
  for (i64 trial = 1; trial <= 300; ++trial) {
    const i64 n = trial <= 200 ? trial : random.pick<i64>({32000, 50257, 49152});
    Floats x(n, Role::input, random.in(0, 3));
    const float scale = random.pick({1.f, 0.5f, 4.f, 100.f}), spread = random.pick({0.f, 1.f, 30.f});
    float shift = -INFINITY;
    for (i64 i = 0; i < n; ++i) {
      x[i] = 3 + random.uniform(spread);
      if (i && random.in(0, 9) == 0) x[i] = -INFINITY;  // a token that is not allowed
      shift = std::max(shift, x[i]);
    }
    double want = 0, error = 0;
    for (i64 i = 0; i < n; ++i) {
      const double power = double{scale} * (double{x[i]} - double{shift}), term = std::exp(power);
      want += term;
      if (term > 0) error += term * (16 + 3 * std::fabs(power)) * kUnit;
    }
    // Terms known to a few roundings, summed in f32 within chunks. What underflows counts for nothing; ones are exact.
    const double tolerance =
        spread == 0 ? 0 : error + double(std::min<i64>(n, 4096)) * kUnit * want + double(n) * 1e-37;
    report.near(kernels.sum_exp(x.data(), n, shift, scale), want, tolerance,
                [&] { return say("n %lld scale %g spread %g", (long long)n, double{scale}, double{spread}); });
  }
}

// ---------------------------------------------------------------------------------------------- packing

void test_pack(Report& report) {
  Random random(51);
  Pool pool(2);
  for (int trial = 0; trial < 400; ++trial) {
    const Shape shape = shapes()[static_cast<std::size_t>(6 + trial % 10)];
    const i64 n_in = trial < 140 ? trial / 2 + 1 : random.pick<i64>({768, 1027, random.in(1, 600)}),
              n_out = random.in(1, 50);
    const bool transposed = random.in(0, 1) == 1;
    const std::string what =
        say("%s group %lld%s, n_in %lld n_out %lld%s", kFormatNames[int(shape.format)], (long long)shape.group,
            shape.symmetric ? " symmetric" : "", (long long)n_in, (long long)n_out, transposed ? " transposed" : "");
    Floats w(n_in * n_out, Role::input, random.in(0, 3));
    const float offset = random.pick({0.f, 0.f, 3.f, -3.f});
    for (i64 i = 0; i < w.size(); ++i) w[i] = random.in(0, 20) ? offset + random.uniform() : 0;
    Matrix matrix{nullptr, shape.format, Order::packed, n_out, n_in, shape.group, shape.symmetric};
    const i64 size = packed_size(shape.format, n_out, n_in, shape.group, shape.symmetric);
    Guarded<std::uint8_t> packed(size, Role::output);
    pack({reinterpret_cast<const std::uint8_t*>(w.data()), "f32", n_out, n_in, transposed}, matrix, packed.data(),
         pool);
    packed.check_zones(report, what);
    const Quantized q = Quantized::unpacked(packed.data(), shape.format, n_out, n_in, shape.group, shape.symmetric);
    report.expect(static_cast<i64>(q.packed().size()) == size - kSlack,
                  [&] { return what + ": another size than the layout's"; });
    for (i64 o = 0; o < n_out; ++o)
      for (i64 g = 0; g < q.n_groups(); ++g) {
        double low = 0, high = 0;  // zero is always within the range
        const auto at = [&](i64 i) { return double{w[transposed ? i * n_out + o : o * n_in + i]}; };
        for (i64 i = q.begin_of(g); i < q.begin_of(g + 1); ++i)
          low = std::min(low, at(i)), high = std::max(high, at(i));
        const double furthest = std::max(-low, high), steps = shape.format == Format::int8 ? 127 : 15;
        const double want = shape.format == Format::int8 ? furthest / 127
                            : shape.symmetric            ? furthest / 8
                                                         : (high - low) / 15;
        const double half_error = shape.group ? 0x1p-11 : 3 * kUnit;  // rounding a scale or a minimum for storage
        report.near(std::fabs(q.scale(o, g)), want, half_error * want + 0x1p-25, [&] { return what + ", scale"; });
        // A weight is within half a step of its code, but for what rounding the scale and the minimum cost; in a
        // symmetric group +8 is not a code, so that the largest of the other sign may be a whole step away.
        const double step =
            std::fabs(q.scale(o, g)) * (shape.symmetric ? 1 : 0.5) + (steps * want + furthest) * half_error + 1e-6;
        for (i64 i = q.begin_of(g); i < q.begin_of(g + 1); ++i) {
          const double got = q.scale(o, g) * q.at(o, i) + q.minimum(o, g);
          if (!report.near(got, at(i), step,
                           [&] { return say("%s, output %lld input %lld", what.c_str(), (long long)o, (long long)i); }))
            break;
        }
      }
  }
  // Q8_0, Q4_0 and Q4_1 are taken over as they are: what comes out is what the file's own reading gives.
  for (const auto& [name, shape] : {std::pair{"q8_0", Shape{Format::int8, Order::packed, 32, false}},
                                    {"q4_0", Shape{Format::int4, Order::packed, 32, true}},
                                    {"q4_1", Shape{Format::int4, Order::packed, 32, false}}}) {
    const BlockType* type = block_type(name);
    const i64 n_out = 37, n_in = 32 * 7, blocks = n_out * n_in / 32;
    Guarded<std::uint8_t> file(blocks * type->bytes, Role::input, 1);
    for (i64 i = 0; i < file.size(); ++i) file[i] = static_cast<std::uint8_t>(random.bits());
    for (i64 b = 0; b < blocks; ++b)  // scales and minima that are finite
      for (i64 at : {1, 3})
        if (at == 1 || shape.format == Format::int4) file[b * type->bytes + at] &= 0xBB;
    Floats floats(n_out * n_in, Role::output);
    type->dequantize(file.data(), blocks, floats.data());
    Matrix matrix{nullptr, shape.format, Order::packed, n_out, n_in, shape.group, shape.symmetric};
    Guarded<std::uint8_t> packed(packed_size(shape.format, n_out, n_in, 32, shape.symmetric), Role::output);
    const Source source{file.data(), name, n_out, n_in, false};
    report.expect(packs_exactly(source, shape.format, 32, shape.symmetric),
                  [&] { return say("%s is not taken over", name); });
    pack(source, matrix, packed.data(), pool);
    const Quantized q = Quantized::unpacked(packed.data(), shape.format, n_out, n_in, 32, shape.symmetric);
    for (i64 o = 0; o < n_out; ++o)
      for (i64 i = 0; i < n_in; ++i) {
        const double a = q.scale(o, i / 32) * q.at(o, i), b = q.minimum(o, i / 32);
        report.near(double{floats[o * n_in + i]}, a + b, 2 * kUnit * (std::fabs(a) + std::fabs(b)), name);
      }
  }
}

// ---------------------------------------------------------------------------------------------- threads

// Small enough for the thread sanitizer, which this is for. 1 thread = all.
void test_pool(Report& report) {
  for (int n : {1, 2, 3, 7}) {
    Pool pool(n);
    report.expect(pool.size() == n, "size");
    std::vector<int> calls(static_cast<std::size_t>(n));
    std::vector<i64> written(static_cast<std::size_t>(n));
    constexpr int kJobs = 300, kSteps = 5;
    for (int job = 0; job < kJobs; ++job) {
      std::atomic<int> wrong{0};
      // Each thread writes, all meet, each reads what its neighbour wrote: plain memory, ordered by the barrier alone.
      pool.run([&](int thread) {
        const auto self = static_cast<std::size_t>(thread), next = static_cast<std::size_t>((thread + 1) % n);
        volatile float tiny = 1e-38f;
        if (tiny * 0.125f != 0) ++wrong;  // the environment is set in every thread
        std::memset(pool.scratch(thread), thread, 64);
        ++calls[self];
        for (int step = 0; step < kSteps; ++step) {
          written[self] = job * kSteps + step;
          pool.barrier(thread);
          if (written[next] != job * kSteps + step) ++wrong;
          pool.barrier(thread);
        }
      });
      report.expect(wrong == 0, [&] { return say("%d threads, job %d: %d wrong reads", n, job, wrong.load()); });
    }
    for (int c : calls)
      report.expect(c == kJobs, [&] { return say("%d threads: a thread ran %d of %d jobs", n, c, kJobs); });
    for (i64 items : {0, 1, 15, 16, 17, 1000})
      for (i64 unit : {1, 16}) {
        i64 end = 0;
        for (int thread = 0; thread < n; ++thread) {
          const Share share(items, unit, thread, n);
          report.expect(share.begin == end && (share.begin % unit == 0 || share.begin == share.end),
                        "shares overlap or leave a gap");
          end = share.end;
        }
        report.expect(end == items, "shares leave items");
      }
  }
  Pool shared(3);  // callers take turns
  std::atomic<int> inside{0}, overlaps{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 3; ++c)
    callers.emplace_back([&] {
      for (int i = 0; i < 50; ++i)
        shared.run([&](int thread) {
          if (thread == 0 && inside++ != 0) ++overlaps;
          shared.barrier(thread);
          if (thread == 0) --inside;
        });
    });
  for (std::thread& caller : callers) caller.join();
  report.expect(overlaps == 0, "two jobs ran at once");
}

// A block of a model over all formats, as the program runs it on several threads: the same bits on each number of
// threads, and for a prompt whole, in chunks, or beside another sequence. Also what the thread sanitizer looks at.
void test_program(Report& report) {
  constexpr i64 kVocabulary = 37, kEmbd = 40, kHidden = 72, kHeads = 4, kKvHeads = 2, kDim = 10, kTokens = 290;
  Random random(52);
  Pool packer(2);
  std::vector<std::unique_ptr<Guarded<std::uint8_t>>> data;
  Floats norm(kEmbd);
  for (i64 i = 0; i < kEmbd; ++i) norm[i] = 1 + random.uniform(0.5f);

  Program program(300, kVocabulary);
  const auto matrix = [&](Format format, i64 group, i64 n_out, i64 n_in) {
    Floats w(n_out * n_in);
    for (i64 i = 0; i < w.size(); ++i) w[i] = random.uniform(0.3f);
    const bool dense = format < Format::int8;
    Matrix m{nullptr, format, dense ? Order::out_in : Order::packed, n_out, n_in, group, false};
    const i64 size =
        dense ? n_out * n_in * (format == Format::f32 ? 4 : 2) : packed_size(format, n_out, n_in, group, false);
    data.push_back(std::make_unique<Guarded<std::uint8_t>>(size));
    pack({reinterpret_cast<const std::uint8_t*>(w.data()), "f32", n_out, n_in, false}, m, data.back()->data(), packer);
    m.data = data.back()->data();
    return program.add_matrix(m);
  };
  const int scale = program.add_vector(norm.data(), kEmbd);
  const int table = matrix(Format::f32, 0, kVocabulary, kEmbd);
  const int rope = program.rope({1, 0.3, 0.1, 0.03, 0.01}, false, 1);
  View x = program.embed(table);
  const struct {
    Format format;
    i64 group;
  } layers[] = {{Format::f32, 0}, {Format::bf16, 0}, {Format::int8, 0}, {Format::int8, 32}, {Format::int4, 32}};
  i64 layer = 0;
  for (const auto& [format, group] : layers) {
    const auto linear = [&, format = format, group = group](View input, i64 n_out, View residual) {
      return program.linear(input, matrix(format, group, n_out, input.width), -1, Activation::none, residual);
    };
    const View h = program.rms_norm(x, scale, 1e-5f);
    const View q = linear(h, kHeads * kDim, {}), k = linear(h, kKvHeads * kDim, {}), v = linear(h, kKvHeads * kDim, {});
    x = linear(program.attention(q, k, v, layer++, kHeads, kKvHeads, kDim, 0.3f, 0, rope), kEmbd, x);
    const View g = program.rms_norm(x, scale, 1e-5f);
    x = linear(program.gate(linear(g, kHidden, {}), linear(g, kHidden, {}), Activation::silu), kEmbd, x);
  }
  program.logits(x, table, -1);
  program.finish();

  std::vector<std::int32_t> ids;
  for (i64 i = 0; i < kTokens; ++i) ids.push_back(static_cast<std::int32_t>(random.in(0, kVocabulary - 1)));
  // The last token's logits, with the prompt in chunks that end where `ends` says; `beside`: another sequence's token.
  const auto logits = [&](Pool& pool, KvFormat format, const std::vector<i64>& ends, bool beside) {
    const KvCache cache(layer, 12, kKvHeads, kDim, format);
    // Two sequences; the first is more than two blocks long.
    const std::int32_t pages[] = {4, 1, 0, 11, 9, 8, 7, 5, 2, 6, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    std::vector<float> last;
    i64 begin = 0;
    for (i64 end : ends) {
      std::vector<std::int32_t> token_ids(ids.begin() + begin, ids.begin() + end), positions, sequence;
      for (i64 i = begin; i < end; ++i) positions.push_back(static_cast<std::int32_t>(i)), sequence.push_back(0);
      if (beside)
        token_ids.push_back(5), positions.push_back(static_cast<std::int32_t>(end == ends.front() ? 0 : 1)),
            sequence.push_back(1);
      const auto row = static_cast<std::int32_t>(end - begin - 1);
      const Batch batch{token_ids.data(),
                        positions.data(),
                        sequence.data(),
                        static_cast<i64>(token_ids.size()),
                        pages,
                        2,
                        10,
                        &row,
                        1};
      const float* out = program.run(batch, cache, pool);
      last.assign(out, out + kVocabulary);
      begin = end;
    }
    return last;
  };
  Pool alone(1);
  for (KvFormat format : {KvFormat::f32, KvFormat::bf16, KvFormat::int8}) {
    const std::vector<float> want = logits(alone, format, {kTokens}, false);
    for (float z : want) report.expect(std::isfinite(z), "a logit is not finite");
    for (int n : {1, 2, 3, 5}) {
      Pool pool(n);
      for (const std::vector<i64>& ends : {std::vector<i64>{kTokens}, {130, kTokens}, {32, 128, kTokens - 1, kTokens}})
        for (bool beside : {false, true}) {
          const std::vector<float> got = logits(pool, format, ends, beside && ends.size() < 3);
          report.expect(same_bits(got.data(), want.data(), got.size()), [&] {
            return say("%s KV, %d threads, %zu chunks%s: other logits", kKvNames[int(format)], n, ends.size(),
                       beside ? ", in company" : "");
          });
        }
    }
  }
}

// A forked child has none of the pool's threads: it is told so, and does not hang.
void test_fork(Report& report) {
#ifndef __SANITIZE_THREAD__
  auto pool = std::make_unique<Pool>(2);
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    try {
      pool->run([](int) {});
    } catch (const std::runtime_error&) {
      pool.reset();  // nor does the end of the pool hang
      _exit(7);
    }
    _exit(1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  report.expect(WIFEXITED(status) && WEXITSTATUS(status) == 7,
                "a forked child is not told that its threads are missing");
  std::atomic<int> calls{0};
  pool->run([&](int) { ++calls; });
  report.expect(calls == 2, "the parent's pool is broken by a fork");
#else
  report.expect(true, "");
#endif
}

// Files read ahead: the checksum of one thread, however many read, and whether or not anyone waits for them.
void test_ahead(Report& report) {
  constexpr i64 kMegabyte = 1 << 20;
  std::vector<std::uint8_t> data(static_cast<std::size_t>(5 * kMegabyte + 77));
  std::uint32_t state = 1;
  for (std::uint8_t& byte : data) byte = static_cast<std::uint8_t>((state = state * 1664525 + 1013904223) >> 24);
  for (i64 size : {i64{0}, i64{1}, i64{63}, i64{64}, kMegabyte - 1, kMegabyte, kMegabyte + 1, 5 * kMegabyte + 76}) {
    const std::uint8_t* at = data.data() + 1;
    const std::uint64_t sum = checksum(at, size);
    for (int threads : {0, 1, 3, 9}) {
      report.expect(ReadAhead(at, size, true, threads).finish() == sum, [&] {
        return say("%d threads sum up %ld bytes to another checksum", threads, static_cast<long>(size));
      });
      ReadAhead(at, size, true, threads);  // not waited for
      ReadAhead(at, size, false, threads).finish();
    }
    if (size == 0) continue;
    for (const i64 wrong : {i64{0}, size / 2, size - 1}) {
      data[static_cast<std::size_t>(1 + wrong)] ^= 0x40;
      report.expect(checksum(at, size) != sum, "a bit more or less gives the same checksum");
      data[static_cast<std::size_t>(1 + wrong)] ^= 0x40;
    }
    report.expect(checksum(at, size - 1) != sum, "a byte less gives the same checksum");
  }
#ifndef __SANITIZE_THREAD__
  auto ahead = std::make_unique<ReadAhead>(data.data(), 5 * kMegabyte, true, 2);
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    const bool same = ahead->finish() == checksum(data.data(), 5 * kMegabyte);
    ahead.reset();
    _exit(same ? 7 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  report.expect(WIFEXITED(status) && WEXITSTATUS(status) == 7, "a forked child waits for threads that it has not");
#endif
}

// ---------------------------------------------------------------------------------------------- environment

void test_environment(const Kernels& kernels, Report& report) {
  volatile float small = 1e-38f;
  const auto flushes = [&] { return small * 0.125f == 0; };
  FloatEnvironment outer;  // main() has one as well: they nest
  report.expect(flushes(), "a denormal is not flushed");
  volatile float denormal = twin::float_of_bits(1);
  report.expect(denormal * 0x1p100f == 0, "a denormal operand is not taken for zero");
  volatile float one = 1, less_than_half_a_step = 0x1p-30f;
  std::fesetround(FE_UPWARD);
  {
    FloatEnvironment inner;
    report.expect(one + less_than_half_a_step == 1, "does not round to nearest");
  }
  report.expect(one + less_than_half_a_step > 1, "does not restore the rounding");
  std::fesetround(FE_TONEAREST);
  report.expect(kernels_named(kernels.isa) == &kernels, "not found by its name");
  report.expect(kernels_named("pentium") == nullptr, "an unknown name is taken");
}

struct Test {
  const char* name;
  void (*run)(const Kernels&, Report&);
};

const Test kTests[] = {
    {"environment", test_environment},
    {"linear_f32", test_linear<Format::f32>},
    {"linear_f16", test_linear<Format::f16>},
    {"linear_bf16", test_linear<Format::bf16>},
    {"linear_int8", test_linear<Format::int8>},
    {"linear_int4", test_linear<Format::int4>},
    {"quantize_rows", test_quantize_rows},
    {"round_rows", test_round_rows},
    {"embed", test_embed},
    {"layer_norm", test_layer_norm},
    {"rms_norm", test_rms_norm},
    {"gate_and_add", test_gate_and_add},
    {"rotate", test_rotate},
    {"store_kv", test_store_kv},
    {"store_kv_not_finite", test_store_kv_not_finite},
    {"attend", test_attend},
    {"arg_max", test_arg_max},
    {"sum_exp", test_sum_exp},
    {"noise", test_noise},
};

struct PlainTest {
  const char* name;
  void (*run)(Report&);
};

const PlainTest kPlainTests[] = {{"pack", test_pack},       {"pool", test_pool}, {"attend_plan", test_attend_plan},
                                 {"program", test_program}, {"fork", test_fork}, {"ahead", test_ahead}};

struct Job {
  std::string name, on;
  std::function<void(Report&)> run;
};

struct Totals {
  std::atomic<int> ran, failed;
  std::atomic<long> checks;
};

// Runs the jobs whose numbers the pipe gives.
void work(const std::vector<Job>& jobs, int pipe, Totals& totals) {
  const FloatEnvironment environment;
  for (std::uint16_t number; read(pipe, &number, sizeof number) == sizeof number;) {
    const Job& job = jobs[number];
    Report report(job.name.c_str(), job.on.c_str());
    job.run(report);
    if (report.failures())
      std::printf("FAILED %s on %s: %d of %ld checks\n", job.name.c_str(), job.on.c_str(), report.failures(),
                  report.checks());
    totals.failed += report.failures() > 0;
    totals.checks += report.checks();
    ++totals.ran;
  }
  std::fflush(stdout);
}

}  // namespace

// native_tests [--list] [--isa NAME] [--processes N] [TEST...]
int main(int argc, char** argv) {
  std::vector<std::string> wanted;
  std::string isa;
  bool list = false;
  int processes = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--list") {
      list = true;
    } else if (argument == "--isa" && i + 1 < argc) {
      isa = argv[++i];
    } else if (argument == "--processes" && i + 1 < argc) {
      processes = std::atoi(argv[++i]);
    } else {
      wanted.push_back(argument);
    }
  }
  std::vector<Job> jobs;
  const auto add = [&](const char* name, const char* on, std::function<void(Report&)> run) {
    if (!isa.empty() && isa != on) return;
    if (wanted.empty() || std::find(wanted.begin(), wanted.end(), name) != wanted.end())
      jobs.push_back({name, on, std::move(run)});
  };
  for (const PlainTest& test : kPlainTests) add(test.name, "any", test.run);
  for (auto table = available_kernels(); *table; ++table)
    for (const Test& test : kTests)
      add(test.name, (*table)->isa, [&test, table](Report& report) { test.run(**table, report); });
  if (list) {
    for (const Job& job : jobs) std::printf("%s %s\n", job.on.c_str(), job.name.c_str());
    return 0;
  }

  int ends[2];
  void* shared = mmap(nullptr, sizeof(Totals), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (pipe(ends) != 0 || shared == MAP_FAILED) return 2;
  Totals& totals = *new (shared) Totals();
  for (std::uint16_t number = 0; number < jobs.size(); ++number)
    if (write(ends[1], &number, sizeof number) != sizeof number) return 2;
  close(ends[1]);
  std::fflush(stdout);
  for (int i = 1; i < processes; ++i)
    if (fork() == 0) {
      work(jobs, ends[0], totals);
      std::exit(0);  // with the sanitizers' last checks
    }
  work(jobs, ends[0], totals);
  bool crashed = false;
  for (int status; wait(&status) > 0;) crashed |= status != 0;
  std::printf("native tests: %d run, %d failed (%ld checks)\n", totals.ran.load(), totals.failed.load(),
              totals.checks.load());
  return crashed || totals.failed || totals.ran != static_cast<int>(jobs.size()) || jobs.empty();
}
