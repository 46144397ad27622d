// Every kernel of every instruction set that this compiler can target.
//
// A namespace holds what its instruction set does better and takes the rest from the one before.
#pragma once
#include "params.h"
#include "portable.h"

#if defined(__x86_64__)
#include "amx.h"
namespace fxquant {
namespace avx2 { using namespace portable; }
namespace avxvnni { using namespace avx2; }
}  // namespace fxquant
#endif
