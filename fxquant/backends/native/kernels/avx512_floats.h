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

// Half of erf(x / sqrt 2) for x around i * 0.375: polynomials in x / 0.375 - i, one a lane. From 5.4 on
// it is 1/2.
alignas(64) static const float half_erf_table[6][16] = {
    {0.0f, 0.146169767f, 0.27337265f, 0.369705468f, 0.43319279f, 0.469603628f, 0.487775534f,
     0.495667547f, 0.498650104f, 0.499630928f, 0.499911577f, 0.499981463f, 0.499996603f,
     0.499999464f, 0.499999911f, 0.5f},
    {0.149603352f, 0.139445662f, 0.112926535f, 0.079453744f, 0.0485690981f, 0.0257948525f,
     0.0119023696f, 0.00477156788f, 0.00166194316f, 0.000502919604f, 0.000132223402f,
     3.02026783e-05f, 5.99390796e-06f, 1.0334802e-06f, 1.5481811e-07f, 0.0f},
    {9.30181177e-09f, -0.00980451703f, -0.015879998f, -0.0167596471f, -0.0136601226f,
     -0.00906863902f, -0.00502140867f, -0.00234853546f, -0.00093483238f, -0.000318234932f,
     -9.29566158e-05f, -2.33537921e-05f, -5.05516664e-06f, -9.44033161e-07f, -1.52249669e-07f,
     0.0f},
    {-0.00350647117f, -0.00280863466f, -0.00115795061f, 0.000494615524f, 0.00142290245f,
     0.00152086292f, 0.00113329187f, 0.000658778241f, 0.000311617448f, 0.000122475874f,
     4.04793936e-05f, 1.13362794e-05f, 2.70392479e-06f, 5.51311302e-07f, 9.63504263e-08f, 0.0f},
    {7.207463e-07f, 0.000325804605f, 0.000450453692f, 0.000339276245f, 0.000120737808f,
     -5.3346128e-05f, -0.000120332094f, -0.000106763458f, -6.58448989e-05f, -3.14946046e-05f,
     -1.21905841e-05f, -3.90159721e-06f, -1.04564879e-06f, -2.36593749e-07f, -4.54507187e-08f,
     0.0f},
    {7.27110746e-05f, 4.97470282e-05f, -9.57081056e-07f, -3.88484987e-05f, -4.33037094e-05f,
     -2.43677969e-05f, -3.52748361e-06f, 7.09600135e-06f, 8.18328499e-06f, 5.34052924e-06f,
     2.54765109e-06f, 9.56192707e-07f, 2.91785767e-07f, 7.37088541e-08f, 1.55868598e-08f, 0.0f}};

// x * (1 + erf(x / sqrt 2)) / 2 as x / 2 + |x| * half_erf(|x|), the latter within 6e-8.
FXQUANT_INLINE __m512 gelu_of(__m512 x) {
  const __m512 size = _mm512_abs_ps(x), shift = _mm512_set1_ps(12582912.0f);
  const __m512 kept = _mm512_min_ps(size, _mm512_set1_ps(5.625f));
  const __m512 width = _mm512_set1_ps(2.66666675f);
  const __m512 shifted = _mm512_fmadd_ps(kept, width, shift);
  // The lowest bits of a number of this size are its integer.
  const __m512i index = _mm512_castps_si512(shifted);
  const __m512 r = _mm512_fmsub_ps(kept, width, _mm512_sub_ps(shifted, shift));
  __m512 y = _mm512_permutexvar_ps(index, _mm512_load_ps(half_erf_table[5]));
  FXQUANT_UNROLL
  for (int power = 4; power >= 0; --power)
    y = _mm512_fmadd_ps(y, r, _mm512_permutexvar_ps(index, _mm512_load_ps(half_erf_table[power])));
  return _mm512_fmadd_ps(size, y, _mm512_mul_ps(x, _mm512_set1_ps(0.5f)));
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
