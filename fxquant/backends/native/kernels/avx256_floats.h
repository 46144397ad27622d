// Float32 between integers on registers of 256 bits. Included twice, as avx256.h is.

FXQUANT_TARGET_BEGIN(FXQUANT_FEATURES)

namespace fxquant {
namespace FXQUANT_WIDE {

// e^x within 2 ulp for x from -87 to 88; what is smaller counts as -87.
FXQUANT_INLINE __m256 exp_of(__m256 given) {
  const __m256 x = _mm256_max_ps(given, _mm256_set1_ps(-87.0f));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693145751953125f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(1.42860682030941723e-6f), r);
  __m256 e = _mm256_set1_ps(0.0013836839934810996f);
  e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(0.008374817669391632f));
  e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(0.04166822507977486f));
  e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(0.16666419804096222f));
  e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(0.49999991059303284f));
  e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(1.0f));
  e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(1.0f));
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(e),
                                              _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}

// As avx512_floats.h has it, with the same polynomials.
FXQUANT_INLINE __m256 erf_of(__m256 x) {
  const __m256 sign = _mm256_and_ps(x, _mm256_set1_ps(-0.0f));
  const __m256 size = _mm256_min_ps(_mm256_xor_ps(x, sign), _mm256_set1_ps(4.0f));
  const __m256 square = _mm256_mul_ps(size, size);
  __m256 p = _mm256_set1_ps(8.316772436955944e-05f);
  p = _mm256_fmadd_ps(p, square, _mm256_set1_ps(-0.0008130011847242713f));
  p = _mm256_fmadd_ps(p, square, _mm256_set1_ps(0.005199906416237354f));
  p = _mm256_fmadd_ps(p, square, _mm256_set1_ps(-0.026858940720558167f));
  p = _mm256_fmadd_ps(p, square, _mm256_set1_ps(0.11283687502145767f));
  p = _mm256_fmadd_ps(p, square, _mm256_set1_ps(-0.37612631916999817f));
  p = _mm256_fmadd_ps(p, square, _mm256_set1_ps(0.128379225730896f));
  const __m256 near = _mm256_fmadd_ps(p, size, size);
  __m256 q = _mm256_set1_ps(-2.1095051632810055e-05f);
  q = _mm256_fmadd_ps(q, size, _mm256_set1_ps(0.00043446263184013326f));
  q = _mm256_fmadd_ps(q, size, _mm256_set1_ps(-0.004171063101045884f));
  q = _mm256_fmadd_ps(q, size, _mm256_set1_ps(0.025119427571138348f));
  q = _mm256_fmadd_ps(q, size, _mm256_set1_ps(-0.1082800896864825f));
  q = _mm256_fmadd_ps(q, size, _mm256_set1_ps(-0.6333469061138093f));
  q = _mm256_fmadd_ps(q, size, _mm256_set1_ps(-1.1295149305519256f));
  q = _mm256_fmadd_ps(q, size, _mm256_set1_ps(0.00017468445176138658f));
  const __m256 far = _mm256_sub_ps(_mm256_set1_ps(1.0f), exp_of(q));
  const __m256 small = _mm256_cmp_ps(size, _mm256_set1_ps(0.92f), _CMP_LT_OQ);
  return _mm256_or_ps(_mm256_blendv_ps(far, near, small), sign);
}

// Half of erf(x / sqrt 2) for x around i * 0.84, as avx512_floats.h has it.
alignas(32) static const float half_erf_table[7][8] = {
    {0.0f, 0.299545795f, 0.453521341f, 0.494132251f, 0.499610275f, 0.499986649f, 0.499999762f,
     0.5f},
    {0.335111529f, 0.235489056f, 0.0817172527f, 0.0140027571f, 0.00118490763f, 4.95216409e-05f,
     1.02264698e-06f, 0.0f},
    {-3.49120313e-07f, -0.0830803514f, -0.057659667f, -0.0148206409f, -0.00167213124f,
     -8.73412646e-05f, -2.16298463e-06f, 0.0f},
    {-0.0394009352f, -0.00816127285f, 0.017508436f, 0.00881480239f, 0.00143374689f,
     9.65858198e-05f, 2.89994023e-06f, 0.0f},
    {-7.03240075e-05f, 0.0112052541f, 0.00060463004f, -0.00292010396f, -0.000815302017f,
     -7.51274129e-05f, -2.83725512e-06f, 0.0f},
    {0.0044459831f, -0.00065171445f, -0.00198596739f, 0.00027071379f, 0.0003088417f,
     4.52164932e-05f, 2.35384709e-06f, 0.0f},
    {-0.000500614522f, -0.00094433449f, 0.000399193872f, 0.000170702202f, -6.6332017e-05f,
     -1.85502904e-05f, -1.30560409e-06f, 0.0f}};

FXQUANT_INLINE __m256 gelu_of(__m256 x) {
  const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x), shift = _mm256_set1_ps(12582912.0f);
  const __m256 kept = _mm256_min_ps(size, _mm256_set1_ps(5.88f)), width = _mm256_set1_ps(1.19047618f);
  const __m256 shifted = _mm256_fmadd_ps(kept, width, shift);
  const __m256i index = _mm256_castps_si256(shifted);
  const __m256 r = _mm256_fmsub_ps(kept, width, _mm256_sub_ps(shifted, shift));
  __m256 y = _mm256_permutevar8x32_ps(_mm256_load_ps(half_erf_table[6]), index);
  FXQUANT_UNROLL
  for (int power = 5; power >= 0; --power)
    y = _mm256_fmadd_ps(y, r,
                        _mm256_permutevar8x32_ps(_mm256_load_ps(half_erf_table[power]), index));
  return _mm256_fmadd_ps(size, y, _mm256_mul_ps(x, _mm256_set1_ps(0.5f)));
}

FXQUANT_INLINE __m256i mask_of(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

FXQUANT_INLINE float sum_of(__m256 x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

FXQUANT_INLINE float largest_of(__m256 x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// NaN counts as 0; the clamp comes before the conversion.
struct Quantizer {
  __m256 inverse, low, high;
  __m256i zero_point;

  // As 32-bit codes.
  FXQUANT_INLINE_MEMBER __m256i codes(__m256 x) const {
    const __m256 real = _mm256_mul_ps(x, inverse);
    const __m256 number = _mm256_and_ps(real, _mm256_cmp_ps(real, real, _CMP_ORD_Q));
    const __m256 clamped = _mm256_min_ps(_mm256_max_ps(number, low), high);
    return _mm256_add_epi32(_mm256_cvtps_epi32(clamped), zero_point);
  }

  // Eight bytes.
  FXQUANT_INLINE_MEMBER void store(uint8_t* y, __m256 x, int count) const {
    const __m256i words = codes(x);
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(words),
                                         _mm256_extracti128_si256(words, 1));
    const __m128i bytes = _mm_packus_epi16(half, half);
    if (count >= 8) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(y), bytes);
      return;
    }
    alignas(16) uint8_t rest[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(rest), bytes);
    for (int i = 0; i < count; ++i) y[i] = rest[i];
  }
};

FXQUANT_INLINE Quantizer quantizer_of(float inverse, int zero_point, int lo, int hi) {
  return {_mm256_set1_ps(inverse), _mm256_set1_ps(static_cast<float>(lo - zero_point)),
          _mm256_set1_ps(static_cast<float>(hi - zero_point)), _mm256_set1_epi32(zero_point)};
}

static inline void softmax_float(const SoftmaxFloatParams& p, int begin, int end) {
  for (int row = begin; row < end; ++row) {
    const float* x = p.x + row * p.x_row;
    float* y = p.y + row * p.y_row;
    __m256 top = _mm256_set1_ps(-INFINITY), sum = _mm256_setzero_ps();
    for (int i = 0; i < p.columns; i += 8) {
      const __m256i mask = mask_of(p.columns - i);
      top = _mm256_max_ps(top, _mm256_blendv_ps(top, _mm256_maskload_ps(x + i, mask),
                                                _mm256_castsi256_ps(mask)));
    }
    const __m256 largest = _mm256_set1_ps(largest_of(top));
    for (int i = 0; i < p.columns; i += 8) {
      const __m256i mask = mask_of(p.columns - i);
      const __m256 e = exp_of(_mm256_sub_ps(_mm256_maskload_ps(x + i, mask), largest));
      sum = _mm256_add_ps(sum, _mm256_and_ps(e, _mm256_castsi256_ps(mask)));
      _mm256_maskstore_ps(y + i, mask, e);
    }
    const __m256 total = _mm256_set1_ps(sum_of(sum));
    for (int i = 0; i < p.columns; i += 8) {
      const __m256i mask = mask_of(p.columns - i);
      _mm256_maskstore_ps(y + i, mask, _mm256_div_ps(_mm256_maskload_ps(y + i, mask), total));
    }
  }
}

static inline void gelu_float(const GeluFloatParams& p, int begin, int end) {
  for (int row = begin; row < end; ++row)
    for (int i = 0; i < p.columns; i += 8) {
      const __m256i mask = mask_of(p.columns - i);
      const __m256 x = _mm256_maskload_ps(p.x + row * p.x_row + i, mask);
      _mm256_maskstore_ps(p.y + row * p.y_row + i, mask, gelu_of(x));
    }
}

static inline void add_float(const AddFloatParams& p, int begin, int end) {
  for (int row = begin; row < end; ++row)
    for (int i = 0; i < p.columns; i += 8) {
      const __m256i mask = mask_of(p.columns - i);
      const __m256 sum = _mm256_add_ps(_mm256_maskload_ps(p.a + row * p.a_row + i, mask),
                                       _mm256_maskload_ps(p.b + row * p.b_row + i, mask));
      _mm256_maskstore_ps(p.y + row * p.y_row + i, mask, sum);
    }
}

static inline void layer_norm_float(const LayerNormFloatParams& p, int begin, int end) {
  const Quantizer quantizer = quantizer_of(p.inverse, p.zero_point, p.lo, p.hi);
  const float count = static_cast<float>(p.columns);
  for (int row = begin; row < end; ++row) {
    const float* x = p.x + row * p.x_row;
    __m256 sum = _mm256_setzero_ps(), squares = _mm256_setzero_ps();
    for (int i = 0; i < p.columns; i += 8)
      sum = _mm256_add_ps(sum, _mm256_maskload_ps(x + i, mask_of(p.columns - i)));
    const __m256 mean = _mm256_set1_ps(sum_of(sum) / count);
    for (int i = 0; i < p.columns; i += 8) {
      const __m256i mask = mask_of(p.columns - i);
      const __m256 difference = _mm256_and_ps(_mm256_sub_ps(_mm256_maskload_ps(x + i, mask), mean),
                                              _mm256_castsi256_ps(mask));
      squares = _mm256_fmadd_ps(difference, difference, squares);
    }
    const __m256 scale = _mm256_set1_ps(1.0f / sqrtf(sum_of(squares) / count + p.epsilon));
    for (int i = 0; i < p.columns; i += 8) {
      const __m256i mask = mask_of(p.columns - i);
      __m256 y = _mm256_mul_ps(_mm256_sub_ps(_mm256_maskload_ps(x + i, mask), mean), scale);
      if (p.weight) y = _mm256_mul_ps(y, _mm256_maskload_ps(p.weight + i, mask));
      if (p.bias) y = _mm256_add_ps(y, _mm256_maskload_ps(p.bias + i, mask));
      if (p.y) _mm256_maskstore_ps(p.y + row * p.y_row + i, mask, y);
      if (p.codes) quantizer.store(p.codes + row * p.codes_row + i, y, p.columns - i);
    }
  }
}

}  // namespace FXQUANT_WIDE
}  // namespace fxquant

FXQUANT_TARGET_END
