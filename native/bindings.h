// Each file of the core binds its own part; module.cpp lists them.
#pragma once

#include <nanobind/nanobind.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace pronghorn {

namespace nb = nanobind;

// A Python object's contiguous bytes, held for as long as this lives. The interpreter lock is needed to make and
// to destroy one, not to read through it.
class Bytes {
 public:
  explicit Bytes(nb::handle object, bool writable = false) {
    if (PyObject_GetBuffer(object.ptr(), &view_, writable ? PyBUF_CONTIG : PyBUF_CONTIG_RO) != 0)
      throw nb::python_error();
  }
  ~Bytes() { PyBuffer_Release(&view_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  template <typename T = unsigned char>
  T* data() const {
    return static_cast<T*>(view_.buf);
  }
  template <typename T = unsigned char>
  Py_ssize_t size() const {
    return view_.len / static_cast<Py_ssize_t>(sizeof(T));
  }

 private:
  Py_buffer view_{};
};

Format format_named(const std::string& name);

void bind_program(nb::module_& m);
void bind_pack(nb::module_& m);
void bind_gguf(nb::module_& m);
void bind_sampling(nb::module_& m);
void bind_tokenizer(nb::module_& m);
void bind_manners(nb::module_& m);

}  // namespace pronghorn
