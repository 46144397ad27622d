// Operators on each code by itself, for AVX-512.
#pragma once
#include "avx512_floats.h"

FXQUANT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")

namespace fxquant {
namespace avx512vnni {

// Codes of a row in which nothing lies between two pixels are one long pixel.
struct Run {
  int count, pixels;
};

FXQUANT_INLINE Run run_of(int width, int channels, bool dense) {
  return dense ? Run{width * channels, 1} : Run{channels, width};
}

FXQUANT_INLINE __m512 floats_of(const uint8_t* x, __m512i zero_point) {
  return centered_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)), zero_point);
}

// clamp(round(value.at(i))) of 64 codes from `i` on.
template <class Value>
FXQUANT_INLINE __m512i codes_at(int i, const Codes& to, const Value& value) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = packed(_mm512_cvtps_epi32(value.at(i)), _mm512_cvtps_epi32(value.at(i + 16)),
                               _mm512_cvtps_epi32(value.at(i + 32)),
                               _mm512_cvtps_epi32(value.at(i + 48)), to);
  return looked_up(_mm512_permutexvar_epi32(order, bytes), to);
}

// y = clamp(round(value.at(i))) for `count` codes; `last`, which may end early, gives the rest.
template <class Value, class Last>
FXQUANT_INLINE void map_codes(uint8_t* y, int count, const Codes& to, const Value& value,
                              const Last& last) {
  int i = 0;
  for (; i + 64 <= count; i += 64) _mm512_storeu_si512(y + i, codes_at(i, to, value));
  if (i < count) store_codes(y + i, codes_at(i, to, last), count - i);
}

template <class Value>
FXQUANT_INLINE void map_codes(uint8_t* y, int count, const Codes& to, const Value& value) {
  map_codes(y, count, to, value, value);
}

static inline void lookup(const LookupParams& p, int begin, int end) {
  const Run run = run_of(p.width, p.channels, p.x_pixel == p.channels && p.y_pixel == p.channels);
  for (int item = begin; item < end; ++item) {
    const uint8_t* x = p.x + item / p.height * p.x_batch + item % p.height * p.x_row;
    uint8_t* y = p.y + item / p.height * p.y_batch + item % p.height * p.y_row;
    for (int pixel = 0; pixel < run.pixels; ++pixel, x += p.x_pixel, y += p.y_pixel)
      for (int i = 0; i < run.count; i += 64)
        store_codes(y + i, table_of(p.table, _mm512_loadu_si512(x + i)),
                    run.count - i < 64 ? run.count - i : 64);
  }
}

struct SumOfTwo {
  const uint8_t *a, *b;
  __m512i a_zero_point, b_zero_point;
  __m512 a_multiplier, b_multiplier;

  FXQUANT_INLINE_MEMBER __m512 at(int i) const {
    return _mm512_add_ps(_mm512_mul_ps(floats_of(a + i, a_zero_point), a_multiplier),
                         _mm512_mul_ps(floats_of(b + i, b_zero_point), b_multiplier));
  }
};

static inline void add(const AddParams& p, int begin, int end) {
  const bool dense = p.a_pixel == p.channels && p.b_pixel == p.channels && p.y_pixel == p.channels;
  const Run run = run_of(p.width, p.channels, dense);
  const Codes to = codes_of(p);
  SumOfTwo sum;
  sum.a_zero_point = _mm512_set1_epi32(p.a_zero_point);
  sum.b_zero_point = _mm512_set1_epi32(p.b_zero_point);
  sum.a_multiplier = _mm512_set1_ps(p.a_multiplier);
  sum.b_multiplier = _mm512_set1_ps(p.b_multiplier);
  for (int item = begin; item < end; ++item) {
    const int n = item / p.height, oy = item % p.height;
    sum.a = p.a + n * p.a_batch + oy * p.a_row;
    sum.b = p.b + n * p.b_batch + oy * p.b_row;
    uint8_t* y = p.y + n * p.y_batch + oy * p.y_row;
    for (int pixel = 0; pixel < run.pixels; ++pixel, y += p.y_pixel) {
      map_codes(y, run.count, to, sum);
      sum.a += p.a_pixel;
      sum.b += p.b_pixel;
    }
  }
}

// A product of two centred codes is exact in float32.
struct ProductOfTwo {
  const uint8_t *a, *b;
  __m512i a_zero_point, b_zero_point;
  __m512 multiplier;

  FXQUANT_INLINE_MEMBER __m512 at(int i) const {
    return _mm512_mul_ps(
        _mm512_mul_ps(floats_of(a + i, a_zero_point), floats_of(b + i, b_zero_point)), multiplier);
  }
};

static inline void mul(const MulParams& p, int begin, int end) {
  const bool dense = p.a_pixel == p.channels && p.b_pixel == p.channels && p.y_pixel == p.channels;
  const Run run = run_of(p.width, p.channels, dense);
  const Codes to = codes_of(p);
  ProductOfTwo product;
  product.a_zero_point = _mm512_set1_epi32(p.a_zero_point);
  product.b_zero_point = _mm512_set1_epi32(p.b_zero_point);
  product.multiplier = _mm512_set1_ps(p.multiplier);
  for (int item = begin; item < end; ++item) {
    const int n = item / p.height, oy = item % p.height;
    product.a = p.a + n * p.a_batch + oy * p.a_row;
    product.b = p.b + n * p.b_batch + oy * p.b_row;
    uint8_t* y = p.y + n * p.y_batch + oy * p.y_row;
    for (int pixel = 0; pixel < run.pixels; ++pixel, y += p.y_pixel) {
      map_codes(y, run.count, to, product);
      product.a += p.a_pixel;
      product.b += p.b_pixel;
    }
  }
}

template <bool LAST>
struct Affine {
  const uint8_t* x;
  const float *multiplier, *offset;
  __m512i zero_point;
  int channels;

  // The arrays end with the channels.
  FXQUANT_INLINE_MEMBER __m512 at(int i) const {
    const __mmask16 mask = LAST ? mask_of(channels - i) : static_cast<__mmask16>(-1);
    return _mm512_add_ps(_mm512_mul_ps(floats_of(x + i, zero_point),
                                       _mm512_maskz_loadu_ps(mask, multiplier + i)),
                         _mm512_maskz_loadu_ps(mask, offset + i));
  }
};

static inline void channel_affine(const ChannelAffineParams& p, int begin, int end) {
  const Codes to = codes_of(p);
  const __m512i zero_point = _mm512_set1_epi32(p.x_zero_point);
  for (int item = begin; item < end; ++item) {
    const uint8_t* x = p.x + item / p.height * p.x_batch + item % p.height * p.x_row;
    uint8_t* y = p.y + item / p.height * p.y_batch + item % p.height * p.y_row;
    for (int ox = 0; ox < p.width; ++ox, x += p.x_pixel, y += p.y_pixel)
      map_codes(y, p.channels, to,
                Affine<false>{x, p.multiplier, p.offset, zero_point, p.channels},
                Affine<true>{x, p.multiplier, p.offset, zero_point, p.channels});
  }
}

FXQUANT_INLINE __m512 load_floats(const float* x, int count) {
  return _mm512_maskz_loadu_ps(mask_of(count), x);
}

// Images of three channels become pixels of four bytes; rows of floats become rows of codes.
static inline void quantize(const QuantizeParams& p, int begin, int end) {
  const bool image = p.channels == 3 && p.fill_channels == 4 && p.y_pixel == 4 && p.x_column == 1;
  const bool tokens = p.x_channel == 1 && p.fill_channels == p.channels;
  if (!image && !tokens) return portable::quantize(p, begin, end);
  const Quantizer quantizer = quantizer_of(p.inverse, p.zero_point, p.lo, p.hi);
  const bool dense = p.x_column == p.channels && p.y_pixel == p.channels;
  const Run run = run_of(p.width, p.channels, dense);
  for (int item = begin; item < end; ++item) {
    const int n = item / p.height, oy = item % p.height;
    const float* x = p.x + n * p.x_batch + oy * p.x_row;
    uint8_t* y = p.y + n * p.y_batch + oy * p.y_row;
    if (image) {
      for (int i = 0; i < p.width; i += 16) {
        const int count = p.width - i;
        __m512i pixels = quantizer.codes(load_floats(x + i, count));
        for (int c = 1; c < 3; ++c)
          pixels = _mm512_or_si512(
              pixels, _mm512_sllv_epi32(quantizer.codes(load_floats(x + c * p.x_channel + i, count)),
                                        _mm512_set1_epi32(8 * c)));
        _mm512_mask_storeu_epi32(y + 4 * i, static_cast<__mmask16>(first_lanes(count)), pixels);
      }
      continue;
    }
    for (int pixel = 0; pixel < run.pixels; ++pixel, x += p.x_column, y += p.y_pixel)
      for (int i = 0; i < run.count; i += 16) {
        const int count = run.count - i;
        _mm_mask_storeu_epi8(y + i, static_cast<__mmask16>(first_lanes(count)),
                             _mm512_cvtepi32_epi8(quantizer.codes(load_floats(x + i, count))));
      }
  }
}

static inline void dequantize(const DequantizeParams& p, int begin, int end) {
  if (p.y_channel != 1) return portable::dequantize(p, begin, end);
  const Run run = run_of(p.width, p.channels, p.x_pixel == p.channels && p.y_column == p.channels);
  const __m512i zero_point = _mm512_set1_epi32(p.x_zero_point);
  const __m512 scale = _mm512_set1_ps(p.scale);
  for (int item = begin; item < end; ++item) {
    const int n = item / p.height, oy = item % p.height;
    const uint8_t* x = p.x + n * p.x_batch + oy * p.x_row;
    float* y = p.y + n * p.y_batch + oy * p.y_row;
    for (int pixel = 0; pixel < run.pixels; ++pixel, x += p.x_pixel, y += p.y_column)
      for (int i = 0; i < run.count; i += 16)
        _mm512_mask_storeu_ps(y + i, static_cast<__mmask16>(first_lanes(run.count - i)),
                              _mm512_mul_ps(floats_of(x + i, zero_point), scale));
  }
}

}  // namespace avx512vnni
}  // namespace fxquant

FXQUANT_TARGET_END
