// Program, KvCache and Pool in Python.
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "bindings.h"
#include "program.h"

namespace pronghorn {

Format format_named(const std::string& name) {
  const char* names[] = {"f32", "f16", "bf16", "int8", "int4"};
  for (int i = 0; i < 5; i++)
    if (name == names[i]) return static_cast<Format>(i);
  throw std::invalid_argument("no such format: " + name);
}

namespace {

Activation activation_named(const std::string& name) {
  const char* names[] = {"", "gelu", "gelu_new", "silu", "relu"};
  for (int i = 0; i < 5; i++)
    if (name == names[i]) return static_cast<Activation>(i);
  throw std::invalid_argument("no such activation: " + name);
}

// A program together with the weights that it reads.
class Recorder : public Program {
 public:
  using Program::Program;

  int matrix(nb::handle data, const std::string& format, const std::string& order, i64 n_out, i64 n_in, i64 group,
             bool symmetric) {
    Matrix m;
    m.format = format_named(format);
    m.order = order == "out_in"   ? Order::out_in
              : order == "in_out" ? Order::in_out
              : order == "packed" ? Order::packed
                                  : throw std::invalid_argument("no such order: " + order);
    m.n_out = n_out, m.n_in = n_in, m.group = group, m.symmetric = symmetric;
    const int number = add_matrix(m);
    const i64 element = m.format == Format::f32 ? 4 : 2;
    const i64 size =
        m.order == Order::packed ? packed_size(m.format, n_out, n_in, group, symmetric) : n_out * n_in * element;
    set_data(number, static_cast<const std::uint8_t*>(hold(data, size)));
    return number;
  }
  int vector(nb::handle data, i64 n) { return add_vector(static_cast<const float*>(hold(data, n * 4)), n); }

 private:
  const void* hold(nb::handle data, i64 size) {
    held_.push_back(std::make_unique<Bytes>(data));
    if (held_.back()->size() < size) throw std::invalid_argument("a weight's data is shorter than its shape");
    return held_.back()->data();
  }

  std::vector<std::unique_ptr<Bytes>> held_;
};

}  // namespace

void bind_program(nb::module_& m) {
  m.attr("PAGE") = kPage;
  m.def(
      "isa", [] { return chosen_kernels().isa; }, "The instruction set in use.");
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const Kernels* const* k = available_kernels(); *k; k++) names.emplace_back((*k)->isa);
    return names;
  });

  nb::class_<Pool>(m, "Pool").def(nb::init<int>(), nb::arg("threads")).def_prop_ro("size", &Pool::size);

  m.def(
      "read_memory",
      [](nb::handle data, Pool& pool) {
        const Bytes bytes(data);
        const nb::gil_scoped_release release;
        std::atomic<std::uint64_t> sum{0};
        const Kernels& kernels = chosen_kernels();
        pool.run([&](int thread) {
          const Share share(bytes.size(), 4096, thread, pool.size());
          sum += kernels.read(bytes.data() + share.begin, share.end - share.begin);
        });
        return sum.load();
      },
      nb::arg("data"), nb::arg("pool"));

  nb::class_<KvCache>(m, "KvCache")
      .def("__init__",
           [](KvCache* self, i64 n_layers, i64 n_pages, i64 n_kv_heads, i64 head_dim, const std::string& format) {
             const char* names[] = {"f32", "bf16", "int8"};
             const auto* name = std::find(names, names + 3, format);
             if (name == names + 3) throw std::invalid_argument("no such KV format: " + format);
             new (self) KvCache(n_layers, n_pages, n_kv_heads, head_dim, static_cast<KvFormat>(name - names));
           })
      .def("copy_page", &KvCache::copy_page, nb::arg("source"), nb::arg("target"));

  nb::class_<View>(m, "View")
      .def("columns",
           [](const View& v, i64 begin, i64 end) {
             if (begin < 0 || begin >= end || end > v.width)
               throw std::invalid_argument("columns are outside of their view");
             return View{v.buffer, v.offset + begin, end - begin};
           })
      .def("__repr__", [](const View& v) {
        return "View(buffer=" + std::to_string(v.buffer) + ", offset=" + std::to_string(v.offset) +
               ", width=" + std::to_string(v.width) + ")";
      });

  nb::class_<Recorder>(m, "Program")
      .def(nb::init<i64, i64>(), nb::arg("max_tokens"), nb::arg("vocab_size"))
      .def("matrix", &Recorder::matrix, nb::arg("data"), nb::arg("format"), nb::arg("order"), nb::arg("n_out"),
           nb::arg("n_in"), nb::arg("group") = 0, nb::arg("symmetric") = false)
      .def("vector", &Recorder::vector, nb::arg("data"), nb::arg("n"))
      .def("embed", &Recorder::embed)
      .def("positions", &Recorder::positions)
      .def("layer_norm", &Recorder::layer_norm)
      .def("rms_norm", &Recorder::rms_norm)
      .def(
          "linear",
          [](Recorder& p, View x, int matrix, int bias, const std::string& activation, const View* residual) {
            return p.linear(x, matrix, bias, activation_named(activation), residual ? *residual : View{});
          },
          nb::arg("x"), nb::arg("matrix"), nb::arg("bias"), nb::arg("activation"), nb::arg("residual").none())
      .def("gate",
           [](Recorder& p, View g, View up, const std::string& a) { return p.gate(g, up, activation_named(a)); })
      .def("add", &Recorder::add)
      .def("rope",
           [](Recorder& p, nb::tuple frequencies, bool interleaved, double magnitude) {
             return p.rope(nb::cast<std::vector<double>>(frequencies), interleaved, magnitude);
           })
      .def("attention", &Recorder::attention, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("layer"),
           nb::arg("n_heads"), nb::arg("n_kv_heads"), nb::arg("head_dim"), nb::arg("scale"), nb::arg("window"),
           nb::arg("rope"))
      .def("logits", &Recorder::logits)
      .def("finish", &Recorder::finish)
      .def(
          "run",
          [](nb::handle self, nb::handle token_ids, nb::handle positions, nb::handle sequence, nb::handle page_table,
             i64 table_width, nb::handle logits_rows, const KvCache& cache, Pool& pool) {
            auto& program = nb::cast<Recorder&>(self);
            const Bytes ids(token_ids), at(positions), of(sequence), pages(page_table), rows(logits_rows);
            using Int = std::int32_t;
            const i64 n = ids.size<Int>();
            if (at.size<Int>() != n || of.size<Int>() != n)
              throw std::invalid_argument("token_ids, positions and sequence are equally long");
            if (table_width <= 0 || pages.size<Int>() % table_width != 0)
              throw std::invalid_argument("the page table is not [sequences, table_width]");
            const Batch batch{ids.data<Int>(),   at.data<Int>(),
                              of.data<Int>(),    n,
                              pages.data<Int>(), pages.size<Int>() / table_width,
                              table_width,       rows.data<Int>(),
                              rows.size<Int>()};
            const float* logits;
            {
              const nb::gil_scoped_release release;
              logits = program.run(batch, cache, pool);
            }
            const size_t shape[] = {static_cast<size_t>(batch.n_logits), static_cast<size_t>(program.vocab_size())};
            return nb::ndarray<nb::memview, const float>(logits, 2, shape, self);
          },
          nb::arg("token_ids"), nb::arg("positions"), nb::arg("sequence"), nb::arg("page_table"),
          nb::arg("table_width"), nb::arg("logits_rows"), nb::arg("cache"), nb::arg("pool"));
}

}  // namespace pronghorn
