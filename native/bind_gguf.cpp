// Lists of strings in a GGUF file's header: a vocabulary has 100,000 of them before the first tensor.
#include <cstdint>

#include "bindings.h"
#include "gguf.h"

namespace pronghorn {
namespace {

// The position after `count` strings, or -1 if they go past the end.
i64 skip_strings(nb::handle buffer, i64 at, std::uint64_t count) {
  const Bytes bytes(buffer);
  for (; count > 0 && at >= 0; --count) at = gguf_string_end(bytes.data(), bytes.size(), at);
  return at;
}

nb::list strings(nb::handle buffer, i64 at, std::uint64_t count) {
  const Bytes bytes(buffer);
  nb::list list;
  for (; count > 0; --count) {
    const i64 end = gguf_string_end(bytes.data(), bytes.size(), at);
    if (end < 0) throw nb::value_error("the strings go past the end of the buffer");
    const char* text = bytes.data<char>() + at + 8;
    PyObject* string = PyUnicode_DecodeUTF8(text, end - at - 8, nullptr);
    if (!string) throw nb::python_error();
    list.append(nb::steal(string));
    at = end;
  }
  return list;
}

}  // namespace

void bind_gguf(nb::module_& m) {
  m.def("gguf_skip_strings", &skip_strings, nb::arg("buffer"), nb::arg("offset"), nb::arg("count"));
  m.def("gguf_strings", &strings, nb::arg("buffer"), nb::arg("offset"), nb::arg("count"));
}

}  // namespace pronghorn
