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
#define FXQUANT_FEATURES "avx2"
#define FXQUANT_DOT 0
#include "avx256.h"
#undef FXQUANT_WIDE
#undef FXQUANT_FEATURES
#undef FXQUANT_DOT
