// Kernels for AMX-INT8 (Sapphire Rapids and later), and what a process and a thread do to use it.
//
// A process asks Linux once for the tiles (`start_amx`). A thread configures them for every call of a
// kernel and releases them after it: the tiles' 8 KiB would otherwise be saved at each switch.
#pragma once
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "avx512vnni.h"

namespace fxquant {
namespace amx {
using namespace avx512vnni;
}

static inline bool has_avxvnni() {
  unsigned a, b, c, d;
  return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

static inline bool has_amx() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 25 & 1);
}

// Whether this process may use the tiles; 1 or 0.
static inline int start_amx() {
#if defined(__linux__)
  const long request_permission = 0x1023, tile_data = 18;
  return has_amx() && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return 0;
#endif
}

}  // namespace fxquant

FXQUANT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,amx-tile,amx-int8")

namespace fxquant {

// Tiles 0 to 3 hold 16 x 16 sums of `rows` pixels, 4 to 7 operands: `rows` pixels of 16 quads and 16
// quads of 16 outputs. With a `tail` of fewer quads 6 and 7 are the tail's, else a second pair.
static inline void configure_amx(int rows = 16, int tail = 0) {
  alignas(64) uint8_t config[64] = {1};
  for (int i = 0; i < 8; ++i) {
    const bool pixels = i < 5 || (i == 6 && tail) || (i == 5 && !tail);
    config[16 + 2 * i] = static_cast<uint8_t>(i == 6 && tail ? 4 * tail : 64);
    config[48 + i] = static_cast<uint8_t>(pixels ? rows : i == 7 && tail ? tail : 16);
  }
  // The intrinsic does not say that it reads all of it.
  __asm__ volatile("" : : "r"(config) : "memory");
  _tile_loadconfig(config);
}

static inline void release_amx() { _tile_release(); }

}  // namespace fxquant

FXQUANT_TARGET_END
