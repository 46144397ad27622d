// Functions of one instruction set inside a unit that is compiled for any x86-64.
#pragma once
#include <immintrin.h>

#define FXQUANT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FXQUANT_TARGET_BEGIN(features) \
  FXQUANT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FXQUANT_TARGET_END _Pragma("clang attribute pop")
#else
// GCC 12 warns of the undefined vectors inside of its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define FXQUANT_TARGET_BEGIN(features) \
  _Pragma("GCC push_options") FXQUANT_PRAGMA(GCC target(features))
#define FXQUANT_TARGET_END _Pragma("GCC pop_options")
#endif

#define FXQUANT_INLINE static inline __attribute__((always_inline))
#define FXQUANT_INLINE_MEMBER inline __attribute__((always_inline))
// A loop over registers: it must vanish, or its array lives in memory.
#if defined(__clang__)
#define FXQUANT_UNROLL _Pragma("unroll")
#else
#define FXQUANT_UNROLL _Pragma("GCC unroll 64")
#endif
