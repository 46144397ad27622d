// Averages and maxima over windows, for AVX-512.
#pragma once
#include "avx512_codes.h"

FXQUANT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")

namespace fxquant {
namespace avx512vnni {

// Sums of up to 257 codes a channel in 16 bits, those of even and of odd channels apart.
struct Halves {
  __m512i even, odd;
};

// Four vectors of 16 sums: vector v has the channels 4 * i + v.
struct ChannelSums {
  __m512i of[4];

  FXQUANT_INLINE_MEMBER void add(const Halves& part) {
    const __m512i low = _mm512_set1_epi32(0xffff);
    of[0] = _mm512_add_epi32(of[0], _mm512_and_si512(part.even, low));
    of[1] = _mm512_add_epi32(of[1], _mm512_and_si512(part.odd, low));
    of[2] = _mm512_add_epi32(of[2], _mm512_srli_epi32(part.even, 16));
    of[3] = _mm512_add_epi32(of[3], _mm512_srli_epi32(part.odd, 16));
  }
};

static inline void avg_pool(const AvgPoolParams& p, int begin, int end) {
  const int blocks = (p.channels + 63) / 64;
  const __m512i byte = _mm512_set1_epi16(0xff), lo = _mm512_set1_epi32(p.lo),
                hi = _mm512_set1_epi32(p.hi), zero_point = _mm512_set1_epi32(p.zero_point);
  for (int item = begin; item < end; ++item) {
    const int block = item % blocks, oy = item / blocks % p.height, n = item / blocks / p.height;
    const int rest = p.channels - 64 * block, top = p.row_range[2 * oy];
    const int bottom = p.row_range[2 * oy + 1];
    const uint8_t* image = p.x + n * p.x_batch + 64 * block;
    uint8_t* y = p.y + n * p.y_batch + oy * p.y_row + 64 * block;
    for (int ox = 0; ox < p.width; ++ox, y += p.y_pixel) {
      const int left = p.column_range[2 * ox], right = p.column_range[2 * ox + 1];
      ChannelSums sums = {{_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                           _mm512_setzero_si512()}};
      Halves part = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      int room = 256;
      for (int iy = top; iy < bottom; ++iy) {
        const uint8_t* x = image + iy * p.x_row + left * p.x_pixel;
        for (int ix = left; ix < right; ++ix, x += p.x_pixel) {
          const __m512i codes = _mm512_loadu_si512(x);
          part.even = _mm512_add_epi16(part.even, _mm512_and_si512(codes, byte));
          part.odd = _mm512_add_epi16(part.odd, _mm512_srli_epi16(codes, 8));
          if (--room) continue;
          sums.add(part);
          part = {_mm512_setzero_si512(), _mm512_setzero_si512()};
          room = 256;
        }
      }
      sums.add(part);
      const __m512i centre = _mm512_set1_epi32((bottom - top) * (right - left) * p.x_zero_point);
      const __m512 multiplier = _mm512_set1_ps(p.multiplier[oy * p.width + ox]);
      __m512i codes = _mm512_setzero_si512();
      FXQUANT_UNROLL
      for (int v = 0; v < 4; ++v) {
        const __m512 real =
            _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums.of[v], centre)), multiplier);
        const __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(real), zero_point);
        const __m512i bounded = _mm512_min_epi32(_mm512_max_epi32(code, lo), hi);
        codes = _mm512_or_si512(codes, _mm512_sllv_epi32(bounded, _mm512_set1_epi32(8 * v)));
      }
      store_codes(y, p.table ? table_of(p.table, codes) : codes, rest < 64 ? rest : 64);
    }
  }
}

static inline void max_pool(const MaxPoolParams& p, int begin, int end) {
  for (int item = begin; item < end; ++item) {
    const int n = item / p.height, oy = item % p.height;
    const int top = p.row_range[2 * oy], bottom = p.row_range[2 * oy + 1];
    const uint8_t* image = p.x + n * p.x_batch;
    uint8_t* y = p.y + n * p.y_batch + oy * p.y_row;
    for (int ox = 0; ox < p.width; ++ox, y += p.y_pixel) {
      const int left = p.column_range[2 * ox], right = p.column_range[2 * ox + 1];
      for (int channel = 0; channel < p.channels; channel += 64) {
        __m512i largest = _mm512_setzero_si512();
        for (int iy = top; iy < bottom; iy += p.row_step) {
          const uint8_t* x = image + iy * p.x_row + left * p.x_pixel + channel;
          for (int ix = left; ix < right; ix += p.column_step, x += p.column_step * p.x_pixel)
            largest = _mm512_max_epu8(largest, _mm512_loadu_si512(x));
        }
        const int rest = p.channels - channel;
        store_codes(y + channel, largest, rest < 64 ? rest : 64);
      }
    }
  }
}

}  // namespace avx512vnni
}  // namespace fxquant

FXQUANT_TARGET_END
