// The extension's table of contents.
#include "bindings.h"

NB_MODULE(_native, m) {
  m.doc() = "pronghorn's compiled core: private, see pronghorn.ops.cpu";
  pronghorn::bind_program(m);
  pronghorn::bind_pack(m);
  pronghorn::bind_gguf(m);
  pronghorn::bind_sampling(m);
  pronghorn::bind_tokenizer(m);
  pronghorn::bind_manners(m);
}
