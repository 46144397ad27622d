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

// erf(x / sqrt 2) for x around i * 0.375: polynomials in x / 0.375 - i, i modulo 32 the lane. From
// 5.4 on it is 1.
alignas(64) static const float erf_table[6][32] = {
    {0.0f, 0.292339534f, 0.5467453f, 0.739410937f, 0.866385579f, 0.939207256f, 0.975551069f,
     0.991335094f, 0.997300208f, 0.999261856f, 0.999823153f, 0.999962926f, 0.999993205f,
     0.999998927f, 0.999999821f, 1.0f, -1.0f, -1.0f, -0.999999821f, -0.999998927f, -0.999993205f,
     -0.999962926f, -0.999823153f, -0.999261856f, -0.997300208f, -0.991335094f, -0.975551069f,
     -0.939207256f, -0.866385579f, -0.739410937f, -0.5467453f, -0.292339534f},
    {0.299206704f, 0.278891325f, 0.225853071f, 0.158907488f, 0.0971381962f, 0.051589705f,
     0.0238047391f, 0.00954313576f, 0.00332388631f, 0.00100583921f, 0.000264446804f,
     6.04053566e-05f, 1.19878159e-05f, 2.06696041e-06f, 3.09636221e-07f, 0.0f, 0.0f, 0.0f,
     3.09636221e-07f, 2.06696041e-06f, 1.19878159e-05f, 6.04053566e-05f, 0.000264446804f,
     0.00100583921f, 0.00332388631f, 0.00954313576f, 0.0238047391f, 0.051589705f, 0.0971381962f,
     0.158907488f, 0.225853071f, 0.278891325f},
    {0.0f, -0.0196090341f, -0.031759996f, -0.0335192941f, -0.0273202453f, -0.018137278f,
     -0.0100428173f, -0.00469707092f, -0.00186966476f, -0.000636469864f, -0.000185913232f,
     -4.67075843e-05f, -1.01103333e-05f, -1.88806632e-06f, -3.04499338e-07f, 0.0f, 0.0f, 0.0f,
     3.04499338e-07f, 1.88806632e-06f, 1.01103333e-05f, 4.67075843e-05f, 0.000185913232f,
     0.000636469864f, 0.00186966476f, 0.00469707092f, 0.0100428173f, 0.018137278f, 0.0273202453f,
     0.0335192941f, 0.031759996f, 0.0196090341f},
    {-0.00701257074f, -0.00561726931f, -0.00231590122f, 0.000989231048f, 0.00284580491f,
     0.00304172584f, 0.00226658373f, 0.00131755648f, 0.000623234897f, 0.000244951749f,
     8.09587873e-05f, 2.26725588e-05f, 5.40784959e-06f, 1.1026226e-06f, 1.92700853e-07f, 0.0f,
     0.0f, 0.0f, 1.92700881e-07f, 1.1026226e-06f, 5.40784959e-06f, 2.26725588e-05f,
     8.09587873e-05f, 0.000244951749f, 0.000623234897f, 0.00131755648f, 0.00226658373f,
     0.00304172584f, 0.00284580491f, 0.000989231048f, -0.00231590122f, -0.00561726931f},
    {0.0f, 0.000651609211f, 0.000900907384f, 0.000678552489f, 0.000241475616f, -0.000106692256f,
     -0.000240664187f, -0.000213526917f, -0.000131689798f, -6.29892093e-05f, -2.43811683e-05f,
     -7.80319442e-06f, -2.09129757e-06f, -4.73187526e-07f, -9.09014801e-08f, 0.0f, 0.0f, 0.0f,
     9.09014659e-08f, 4.73187555e-07f, 2.09129757e-06f, 7.80319442e-06f, 2.43811683e-05f,
     6.29892093e-05f, 0.000131689798f, 0.000213526917f, 0.000240664187f, 0.000106692256f,
     -0.000241475616f, -0.000678552489f, -0.000900907384f, -0.000651609211f},
    {0.000146998151f, 9.94940565e-05f, -1.91416188e-06f, -7.769699e-05f, -8.66074188e-05f,
     -4.87355937e-05f, -7.05496677e-06f, 1.41920027e-05f, 1.636657e-05f, 1.06810585e-05f,
     5.09530219e-06f, 1.91238541e-06f, 5.83571534e-07f, 1.47417779e-07f, 3.11737089e-08f, 0.0f,
     0.0f, 0.0f, 3.1173645e-08f, 1.47417623e-07f, 5.83571421e-07f, 1.91238541e-06f,
     5.09530219e-06f, 1.06810585e-05f, 1.636657e-05f, 1.41920027e-05f, -7.05496723e-06f,
     -4.87355937e-05f, -8.66074188e-05f, -7.76969973e-05f, -1.91416211e-06f, 9.94940565e-05f}};

// erf(x / sqrt 2) within 1e-7, so that x / 2 * (1 + erf(x / sqrt 2)) is within 2^-23 |x|.
FXQUANT_INLINE __m512 erf_of_gelu(__m512 x) {
  // The smaller size with the sign of x.
  const __m512 at = _mm512_range_ps(_mm512_mul_ps(x, _mm512_set1_ps(2.66666675f)),
                                    _mm512_set1_ps(15.4f), 2);
  const __m512i index = _mm512_cvtps_epi32(at);
  const __m512 r = _mm512_reduce_ps(at, 0);
  __m512 y = _mm512_setzero_ps();
  FXQUANT_UNROLL
  for (int power = 5; power >= 0; --power) {
    const __m512 factor = _mm512_permutex2var_ps(_mm512_load_ps(erf_table[power]), index,
                                                 _mm512_load_ps(erf_table[power] + 16));
    y = power == 5 ? factor : _mm512_fmadd_ps(y, r, factor);
  }
  return y;
}

FXQUANT_INLINE __m512 gelu_of(__m512 x) {
  const __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
  return _mm512_fmadd_ps(half, erf_of_gelu(x), half);
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
