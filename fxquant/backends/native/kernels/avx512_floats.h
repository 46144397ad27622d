// Float32 between integers for AVX-512: exponential, error function, quantizers, layer norm.
#pragma once
#include "avx512_codes.h"

FXQUANT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")

namespace fxquant {
namespace avx512vnni {

// e^x within 1 ulp of the real value; 0 below the smallest float, infinite above the largest.
// x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial of least relative error for e^r.
FXQUANT_INLINE __m512 exp_of(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145751953125f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860682030941723e-6f), r);
  __m512 e = _mm512_set1_ps(0.0013836839934810996f);
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(0.008374817669391632f));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(0.04166822507977486f));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(0.16666419804096222f));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(0.49999991059303284f));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(e, n);
}

// erf(x) within 2 ulp: x times a polynomial in x^2 up to 0.92, and from there 1 - e^q(|x|) with a
// polynomial q for the logarithm of 1 - erf. At 4 it is 1.
FXQUANT_INLINE __m512 erf_of(__m512 x) {
  const __m512 size = _mm512_min_ps(_mm512_abs_ps(x), _mm512_set1_ps(4.0f));
  const __m512 square = _mm512_mul_ps(size, size);
  __m512 p = _mm512_set1_ps(8.316772436955944e-05f);
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(-0.0008130011847242713f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(0.005199906416237354f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(-0.026858940720558167f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(0.11283687502145767f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(-0.37612631916999817f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(0.128379225730896f));
  const __m512 near = _mm512_fmadd_ps(p, size, size);
  __m512 q = _mm512_set1_ps(-2.1095051632810055e-05f);
  q = _mm512_fmadd_ps(q, size, _mm512_set1_ps(0.00043446263184013326f));
  q = _mm512_fmadd_ps(q, size, _mm512_set1_ps(-0.004171063101045884f));
  q = _mm512_fmadd_ps(q, size, _mm512_set1_ps(0.025119427571138348f));
  q = _mm512_fmadd_ps(q, size, _mm512_set1_ps(-0.1082800896864825f));
  q = _mm512_fmadd_ps(q, size, _mm512_set1_ps(-0.6333469061138093f));
  q = _mm512_fmadd_ps(q, size, _mm512_set1_ps(-1.1295149305519256f));
  q = _mm512_fmadd_ps(q, size, _mm512_set1_ps(0.00017468445176138658f));
  const __m512 far = _mm512_sub_ps(_mm512_set1_ps(1.0f), exp_of(q));
  const __mmask16 small = _mm512_cmp_ps_mask(size, _mm512_set1_ps(0.92f), _CMP_LT_OQ);
  const __m512 result = _mm512_mask_mov_ps(far, small, near);
  const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f));
  return _mm512_or_ps(result, sign);
}

FXQUANT_INLINE __m512 gelu_of(__m512 x) {
  const __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
  const __m512 erf = erf_of(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678118654752440f)));
  return _mm512_mul_ps(half, _mm512_add_ps(_mm512_set1_ps(1.0f), erf));
}

FXQUANT_INLINE __mmask16 mask_of(int count) {
  return static_cast<__mmask16>(first_lanes(count < 0 ? 0 : count));
}

// A NaN is not equal to itself and counts as 0; the clamp comes before the conversion.
struct Quantizer {
  __m512 inverse, low, high;
  __m512i zero_point;

  // As 32-bit codes.
  FXQUANT_INLINE_MEMBER __m512i codes(__m512 x) const {
    const __m512 real = _mm512_mul_ps(x, inverse);
    const __m512 number =
        _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(real, real, _CMP_ORD_Q), real);
    const __m512 clamped = _mm512_min_ps(_mm512_max_ps(number, low), high);
    return _mm512_add_epi32(_mm512_cvtps_epi32(clamped), zero_point);
  }
};

FXQUANT_INLINE Quantizer quantizer_of(float inverse, int zero_point, int lo, int hi) {
  return {_mm512_set1_ps(inverse), _mm512_set1_ps(static_cast<float>(lo - zero_point)),
          _mm512_set1_ps(static_cast<float>(hi - zero_point)), _mm512_set1_epi32(zero_point)};
}

static inline void softmax_float(const SoftmaxFloatParams& p, int begin, int end) {
  for (int row = begin; row < end; ++row) {
    const float* x = p.x + row * p.x_row;
    float* y = p.y + row * p.y_row;
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    __m512 top = lowest, sum = _mm512_setzero_ps();
    for (int i = 0; i < p.columns; i += 16)
      top = _mm512_max_ps(top, _mm512_mask_loadu_ps(lowest, mask_of(p.columns - i), x + i));
    const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int i = 0; i < p.columns; i += 16) {
      const __mmask16 mask = mask_of(p.columns - i);
      const __m512 e = exp_of(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), largest));
      sum = _mm512_mask_add_ps(sum, mask, sum, e);
      _mm512_mask_storeu_ps(y + i, mask, e);
    }
    const __m512 total = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
    for (int i = 0; i < p.columns; i += 16) {
      const __mmask16 mask = mask_of(p.columns - i);
      _mm512_mask_storeu_ps(y + i, mask, _mm512_div_ps(_mm512_maskz_loadu_ps(mask, y + i), total));
    }
  }
}

static inline void gelu_float(const GeluFloatParams& p, int begin, int end) {
  for (int row = begin; row < end; ++row)
    for (int i = 0; i < p.columns; i += 16) {
      const __mmask16 mask = mask_of(p.columns - i);
      const __m512 x = _mm512_maskz_loadu_ps(mask, p.x + row * p.x_row + i);
      _mm512_mask_storeu_ps(p.y + row * p.y_row + i, mask, gelu_of(x));
    }
}

static inline void add_float(const AddFloatParams& p, int begin, int end) {
  for (int row = begin; row < end; ++row)
    for (int i = 0; i < p.columns; i += 16) {
      const __mmask16 mask = mask_of(p.columns - i);
      const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, p.a + row * p.a_row + i),
                                       _mm512_maskz_loadu_ps(mask, p.b + row * p.b_row + i));
      _mm512_mask_storeu_ps(p.y + row * p.y_row + i, mask, sum);
    }
}

static inline void layer_norm_float(const LayerNormFloatParams& p, int begin, int end) {
  const Quantizer quantizer = quantizer_of(p.inverse, p.zero_point, p.lo, p.hi);
  const float count = static_cast<float>(p.columns);
  for (int row = begin; row < end; ++row) {
    const float* x = p.x + row * p.x_row;
    __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (int i = 0; i < p.columns; i += 16)
      sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask_of(p.columns - i), x + i));
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / count);
    for (int i = 0; i < p.columns; i += 16) {
      const __mmask16 mask = mask_of(p.columns - i);
      const __m512 difference = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + i), mean);
      squares = _mm512_fmadd_ps(difference, difference, squares);
    }
    const float variance = _mm512_reduce_add_ps(squares) / count;
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(variance + p.epsilon));
    for (int i = 0; i < p.columns; i += 16) {
      const __mmask16 mask = mask_of(p.columns - i);
      __m512 y = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), mean), scale);
      if (p.weight) y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(mask, p.weight + i));
      if (p.bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, p.bias + i));
      if (p.y) _mm512_mask_storeu_ps(p.y + row * p.y_row + i, mask, y);
      if (p.codes)
        _mm_mask_storeu_epi8(p.codes + row * p.codes_row + i, mask,
                             _mm512_cvtepi32_epi8(quantizer.codes(y)));
    }
  }
}

}  // namespace avx512vnni
}  // namespace fxquant

FXQUANT_TARGET_END
