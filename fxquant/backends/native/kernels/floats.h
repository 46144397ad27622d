// The float islands and the dynamic layers for every instruction set: one text, compiled for each.
#pragma once
#include "dynamic_params.h"
#include "float_params.h"
#include "all.h"

namespace fxquant {
namespace portable {
#include "float_rows.h"
#include "dynamic.h"
}  // namespace portable
}  // namespace fxquant

#if defined(__x86_64__)
#define FXQUANT_ROWS_OF_256
FXQUANT_TARGET_BEGIN("avx2,fma")
namespace fxquant {
namespace avx2 {
#include "float_rows.h"
#include "avx256_rows.h"
#include "dynamic.h"
}  // namespace avx2
}  // namespace fxquant
FXQUANT_TARGET_END
FXQUANT_TARGET_BEGIN("avx2,fma,avxvnni")
namespace fxquant {
namespace avxvnni {
#include "float_rows.h"
#include "avx256_rows.h"
#include "dynamic.h"
}  // namespace avxvnni
}  // namespace fxquant
FXQUANT_TARGET_END
#undef FXQUANT_ROWS_OF_256
#define FXQUANT_ROWS_OF_512
FXQUANT_TARGET_BEGIN("avx2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")
namespace fxquant {
namespace avx512vnni {
#include "float_rows.h"
#include "dynamic.h"
}  // namespace avx512vnni
}  // namespace fxquant
FXQUANT_TARGET_END
#undef FXQUANT_ROWS_OF_512
#endif
