// Packing, and the reading of what was packed, in Python.
#include <nanobind/stl/string.h>

#include "ahead.h"
#include "bindings.h"
#include "pack.h"
#include "program.h"

namespace pronghorn {

namespace {

Source source_of(const Bytes& bytes, const std::string& dtype, i64 n_out, i64 n_in, bool transposed) {
  const Source source{bytes.data<const std::uint8_t>(), dtype, n_out, n_in, transposed};
  if (n_out <= 0 || n_in <= 0 || source_size(source) != bytes.size())
    throw std::invalid_argument("its data is not as long as its shape asks for");
  return source;
}

// Bytes that are being read, held until that has ended.
class HeldAhead {
 public:
  HeldAhead(nb::handle data, bool sums, int threads)
      : bytes_(data), ahead_(bytes_.data<const std::uint8_t>(), bytes_.size(), sums, threads) {}

  std::uint64_t finish() {
    const nb::gil_scoped_release release;
    return ahead_.finish();
  }

 private:
  Bytes bytes_;
  ReadAhead ahead_;
};

}  // namespace

void bind_pack(nb::module_& m) {
  m.def(
      "packed_size",
      [](const std::string& format, i64 n_out, i64 n_in, i64 group, bool symmetric) {
        Matrix m;
        m.format = format_named(format), m.n_out = n_out, m.n_in = n_in, m.group = group;
        check_matrix(m);
        return packed_size(m.format, n_out, n_in, group, symmetric);
      },
      nb::arg("format"), nb::arg("n_out"), nb::arg("n_in"), nb::arg("group"), nb::arg("symmetric"));
  m.def(
      "pack",
      [](nb::handle source, const std::string& dtype, i64 n_out, i64 n_in, bool transposed, nb::handle destination,
         const std::string& format, i64 group, bool symmetric, Pool& pool) {
        const Bytes from(source), to(destination, true);
        Matrix m;
        m.format = format_named(format), m.n_out = n_out, m.n_in = n_in, m.group = group, m.symmetric = symmetric;
        if (is_packed(m.format)) check_matrix(m);
        const i64 size = is_packed(m.format) ? packed_size(m.format, n_out, n_in, group, symmetric)
                                             : n_out * n_in * (m.format == Format::f32 ? 4 : 2);
        if (to.size() != size) throw std::invalid_argument("the destination's size is not the packed size");
        const Source s = source_of(from, dtype, n_out, n_in, transposed);
        const nb::gil_scoped_release release;
        pack(s, m, to.data<std::uint8_t>(), pool);
      },
      nb::arg("source"), nb::arg("dtype"), nb::arg("n_out"), nb::arg("n_in"), nb::arg("transposed"),
      nb::arg("destination"), nb::arg("format"), nb::arg("group"), nb::arg("symmetric"), nb::arg("pool"));
  m.def(
      "checksum",
      [](nb::handle data) {
        const Bytes bytes(data);
        return checksum(bytes.data<const std::uint8_t>(), bytes.size());
      },
      nb::arg("data"));
  m.def(
      "crc32c",
      [](nb::handle data) {
        const Bytes bytes(data);
        const nb::gil_scoped_release release;
        return crc32c(bytes.data<const std::uint8_t>(), bytes.size());
      },
      nb::arg("data"));
  nb::class_<HeldAhead>(m, "ReadAhead")
      .def(nb::init<nb::handle, bool, int>(), nb::arg("data"), nb::arg("sums"), nb::arg("threads"))
      .def("finish", &HeldAhead::finish);
}

}  // namespace pronghorn
