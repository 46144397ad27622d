// Every kernel of every instruction set that this compiler can target.
//
// A namespace holds what its instruction set does better and takes the rest from the one before.
#pragma once
#include "params.h"
#include "portable.h"

#if defined(__x86_64__)
#include "amx_attention.h"
#include "avx2.h"
#include "avxvnni.h"
#endif
