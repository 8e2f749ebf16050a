#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>

#include "bindings.h"
#include "tokenizer.h"

namespace pronghorn {
namespace {

template <typename T>
std::vector<T> values(nb::handle buffer) {
  const Bytes bytes(buffer);
  const T* data = bytes.data<const T>();
  return {data, data + bytes.size<T>()};
}

nb::bytes build(nb::list tokens, nb::handle in_model, nb::handle merges, nb::handle bytes, nb::handle added,
                nb::handle classes, const std::vector<u32>& rules, nb::bytes about) {
  if (rules.size() != 6) throw nb::value_error("six rules");
  TokenizerParts parts;
  parts.rules = {static_cast<Cut>(rules[0]), rules[1], rules[2], rules[3], rules[4], static_cast<Prefix>(rules[5])};
  for (nb::handle token : tokens) parts.tokens.push_back(token.is_none() ? "" : nb::cast<std::string>(token));
  parts.in_model = values<std::uint8_t>(in_model);
  parts.merges = values<u32>(merges);
  parts.bytes = values<u32>(bytes);
  parts.added = values<u32>(added);
  parts.classes = values<std::uint8_t>(classes);
  parts.about.assign(about.c_str(), about.size());
  const std::string file = build_tokenizer(parts);
  return nb::bytes(file.data(), file.size());
}

// A text's bytes, for as long as it lives.
std::string_view utf8_of(nb::str text) {
  Py_ssize_t size;
  const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
  if (!data) {
    PyErr_Clear();
    throw nb::type_error("the text holds a lone surrogate");
  }
  return {data, static_cast<std::size_t>(size)};
}

// A mapped tokenizer together with the bytes that it reads.
class Held {
 public:
  explicit Held(nb::handle data)
      : bytes_(std::make_unique<Bytes>(data)), tokenizer_(bytes_->data(), static_cast<std::size_t>(bytes_->size())) {}

  nb::bytes about() const { return nb::bytes(tokenizer_.about().data(), tokenizer_.about().size()); }

  nb::object encode(nb::str text) const {
    const std::string_view utf8 = utf8_of(text);
    std::vector<u32> ids;
    bool certain;
    {
      const nb::gil_scoped_release release;
      certain = tokenizer_.encode(utf8, ids);
    }
    return certain ? nb::cast(ids) : nb::none();
  }

  nb::object token(std::int64_t id) const {
    if (id < 0 || id >= tokenizer_.size()) return nb::none();
    const std::string_view text = tokenizer_.token(static_cast<u32>(id));
    if (text.empty()) return nb::none();
    PyObject* string = PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace");
    if (!string) throw nb::python_error();
    return nb::steal(string);
  }

  nb::object find(nb::str text) const {
    const u32 id = tokenizer_.find(utf8_of(text));
    return id == kNoToken ? nb::none() : nb::cast(id);
  }

 private:
  std::unique_ptr<Bytes> bytes_;
  MappedTokenizer tokenizer_;
};

}  // namespace

void bind_tokenizer(nb::module_& m) {
  m.def("build_tokenizer", &build, nb::arg("tokens"), nb::arg("in_model"), nb::arg("merges"), nb::arg("bytes"),
        nb::arg("added"), nb::arg("classes"), nb::arg("rules"), nb::arg("about"));
  m.def(
      "tokenizer_checksum",
      [](nb::handle data) {
        const Bytes bytes(data);
        return tokenizer_checksum(bytes.data(), static_cast<std::size_t>(bytes.size()));
      },
      nb::arg("data"), "What a file's header should say, for tests.");
  nb::class_<Held>(m, "MappedTokenizer")
      .def(nb::init<nb::handle>(), nb::arg("data"))
      .def_prop_ro("about", &Held::about)
      .def("encode", &Held::encode, nb::arg("text"))
      .def("token", &Held::token, nb::arg("token_id"))
      .def("find", &Held::find, nb::arg("text"));
}

}  // namespace pronghorn
