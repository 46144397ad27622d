// Kernels for AVX2: Haswell, Zen and later.
#pragma once
#include "portable.h"
#include "target.h"

namespace fxquant {
namespace avx2 {
using namespace portable;
}
}  // namespace fxquant

#define FXQUANT_WIDE avx2
#define FXQUANT_FEATURES "avx2,fma"
#define FXQUANT_DOT 0
#include "avx256_floats.h"
#include "avx256.h"
#include "avx256_attention.h"
#undef FXQUANT_WIDE
#undef FXQUANT_FEATURES
#undef FXQUANT_DOT
