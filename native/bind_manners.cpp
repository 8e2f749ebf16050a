// How the process ends when a mapped file does: in one line that names it.
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#include "bindings.h"

namespace pronghorn {
namespace {

constexpr int EXIT_STATUS = 2;  // a user's mistake
std::atomic_flag ending = ATOMIC_FLAG_INIT;
char line[4096 + 256];  // of /proc/self/maps; the first thread here has it alone

// A hexadecimal number, and the text after it and one character more.
const char* hexadecimal(const char* text, std::uintptr_t& value) {
  for (value = 0;; ++text) {
    const char c = *text;
    if (c >= '0' && c <= '9')
      value = value * 16 + static_cast<unsigned>(c - '0');
    else if (c >= 'a' && c <= 'f')
      value = value * 16 + static_cast<unsigned>(c - 'a' + 10);
    else
      return c ? text + 1 : text;
  }
}

// The path in a line of maps whose range has the address, or null: "from-to rights offset device inode   /path".
const char* path_in(const char* text, std::uintptr_t address) {
  std::uintptr_t from, to;
  text = hexadecimal(hexadecimal(text, from), to);
  return address >= from && address < to ? std::strchr(text, '/') : nullptr;
}

// The file that is mapped at an address, or null. In a signal handler: no allocation, no stdio.
const char* file_at(std::uintptr_t address) {
  const int maps = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
  if (maps < 0) return nullptr;
  const char* found = nullptr;
  std::size_t length = 0;
  char part[1024];
  for (ssize_t n; !found && (n = read(maps, part, sizeof part)) > 0;) {
    for (ssize_t i = 0; i < n && !found; ++i) {
      if (part[i] != '\n') {
        if (length + 1 < sizeof line) line[length++] = part[i];
        continue;
      }
      line[length] = 0;
      length = 0;
      found = path_in(line, address);
    }
  }
  close(maps);
  return found;
}

void say(const char* text) {
  for (std::size_t left = std::strlen(text); left > 0;) {
    const ssize_t n = write(STDERR_FILENO, text, left);
    if (n <= 0) return;
    text += n, left -= static_cast<std::size_t>(n);
  }
}

void on_bus_error(int, siginfo_t* info, void*) {
  if (ending.test_and_set())
    for (;;) pause();  // another thread is about to end them all
  const char* path = file_at(reinterpret_cast<std::uintptr_t>(info->si_addr));
  if (!path) {
    signal(SIGBUS, SIG_DFL);  // no file's fault: what is read again ends the process as ever
    ending.clear();
    return;
  }
  say("pronghorn: error: ");
  say(path);
  say(": cannot be read any more: it was cut short, or its disk failed, while it was in use\n");
  _exit(EXIT_STATUS);
}

void explain_bus_errors() {
  struct sigaction action = {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGBUS, &action, nullptr);
}

}  // namespace

void bind_manners(nb::module_& m) { m.def("explain_bus_errors", &explain_bus_errors); }

}  // namespace pronghorn
