// Kernels for AVX-512 with VNNI and VBMI: Ice Lake, Sapphire Rapids, Zen 4 and later.
#pragma once
#include "avx512_attention.h"
#include "avx512_conv.h"
#include "avx512_depthwise.h"
#include "avx512_elementwise.h"
#include "avx512_floats.h"
#include "avx512_groups.h"
#include "avx512_pooling.h"
