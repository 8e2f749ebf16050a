// Which kernels this machine can run, and the floating-point environment that they run in.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <xmmintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace pronghorn {

namespace generic {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512bf16 {
extern const Kernels table;
}
namespace amx {
extern const Kernels table;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels table;
}
namespace dotprod {
extern const Kernels table;
}
#endif

namespace {

#if defined(__x86_64__)

struct Cpu {
  bool avx2 = false, avx512 = false, bf16 = false, amx = false;

  Cpu() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const auto bit = [](unsigned word, int n) { return (word >> n & 1) != 0; };
    const bool has_avx2 = bit(b, 5);
    const bool has_avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && bit(c, 11);
    const bool has_tiles = bit(d, 22) && bit(d, 24) && bit(d, 25);
    const bool has_bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && bit(a, 5);
    if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return;  // OSXSAVE: XGETBV may be asked
    const bool has_fma_f16c = bit(c, 12) && bit(c, 29);
    unsigned low, high;
    asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    avx2 = has_avx2 && has_fma_f16c && (low & 6) == 6;
    avx512 = avx2 && has_avx512 && (low & 0xe6) == 0xe6;
    bf16 = avx512 && has_bf16;
    amx = avx512 && has_tiles && (low & 0x60000) == 0x60000 && permit_tiles();
#ifdef PRONGHORN_EMULATE_AVX512
    avx512 = bf16 = avx2;
#endif
  }

  // Linux gives the tiles' state only to processes that ask, before their other threads start.
  static bool permit_tiles() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
  }
};

#elif defined(__aarch64__)

bool has_dotprod() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & 1 << 20) != 0;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
  return true;  // since the first of their processors for computers
#else
  return false;
#endif
}

#endif

struct Available {
  const Kernels* list[6] = {};
  int count = 0;

  Available() {
#if defined(__x86_64__)
    const Cpu cpu;
#ifdef PRONGHORN_EMULATE_AMX
    if (cpu.avx512) list[count++] = &amx::table;
#else
    if (cpu.amx) list[count++] = &amx::table;
#endif
    if (cpu.bf16) list[count++] = &avx512bf16::table;
    if (cpu.avx512) list[count++] = &avx512::table;
    if (cpu.avx2) list[count++] = &avx2::table;
#elif defined(__aarch64__)
    if (has_dotprod()) list[count++] = &dotprod::table;
    list[count++] = &neon::table;
#endif
    list[count++] = &generic::table;
  }
};

const Available& available() {
  static const Available found;
  return found;
}

}  // namespace

const Kernels* const* available_kernels() { return available().list; }

const Kernels* kernels_named(const char* name) {
  for (const Kernels* const* k = available_kernels(); *k; k++)
    if (std::strcmp((*k)->isa, name) == 0) return *k;
  return nullptr;
}

namespace {

const Kernels& choose_kernels() {
  const char* name = std::getenv("PRONGHORN_ISA");
  if (!name || !*name) return **available_kernels();
  if (const Kernels* k = kernels_named(name)) return *k;
  std::string all;
  for (const Kernels* const* k = available_kernels(); *k; k++)
    all += (all.empty() ? "" : ", ") + std::string((*k)->isa);
  throw std::runtime_error("PRONGHORN_ISA=" + std::string(name) +
                           " is not an instruction set of this machine (it has " + all + ")");
}

}  // namespace

const Kernels& chosen_kernels() {
  static const Kernels& chosen = choose_kernels();  // once: nothing may change it in the middle, or in a thread
  return chosen;
}

#if defined(__x86_64__)

FloatEnvironment::FloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x9fc0); }  // FTZ, DAZ, nearest, all masked
FloatEnvironment::~FloatEnvironment() { _mm_setcsr(static_cast<unsigned>(saved_)); }

#elif defined(__aarch64__)

FloatEnvironment::FloatEnvironment() {
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  const std::uint64_t flush_to_zero = 1u << 24;
  asm volatile("msr fpcr, %0" ::"r"(flush_to_zero));
}
FloatEnvironment::~FloatEnvironment() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

#else

FloatEnvironment::FloatEnvironment() : saved_(0) {}
FloatEnvironment::~FloatEnvironment() = default;

#endif

}  // namespace pronghorn
