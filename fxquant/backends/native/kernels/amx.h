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

// All eight tiles are 16 rows of 64 bytes.
static inline void configure_amx() {
  alignas(64) static const uint8_t config[64] = {
      1,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,    // palette 1
      64, 0,  64, 0,  64, 0,  64, 0,  64, 0,  64, 0,  64, 0,  64, 0,    // bytes of a row
      0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,    //
      16, 16, 16, 16, 16, 16, 16, 16, 0,  0,  0,  0,  0,  0,  0,  0};   // rows
  _tile_loadconfig(config);
}

static inline void release_amx() { _tile_release(); }

}  // namespace fxquant

FXQUANT_TARGET_END
