// Kernels for AVX-VNNI: Alder Lake, Sierra Forest and later.
#pragma once
#include "portable.h"
#include "target.h"

namespace fxquant {
namespace avxvnni {
using namespace portable;
}
}  // namespace fxquant

#define FXQUANT_WIDE avxvnni
#define FXQUANT_FEATURES "avx2,fma,avxvnni"
#define FXQUANT_DOT 1
#include "avx256_floats.h"
#include "avx256.h"
#include "avx256_attention.h"
#undef FXQUANT_WIDE
#undef FXQUANT_FEATURES
#undef FXQUANT_DOT
