// What the kernels for AVX-512 share: the multiply instruction, and sums that become codes.
#pragma once
#include "portable.h"
#include "target.h"

namespace fxquant {
namespace avx512vnni {
using namespace portable;
}
}  // namespace fxquant

FXQUANT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")

namespace fxquant {
namespace avx512vnni {

FXQUANT_INLINE __mmask64 first_lanes(int count) {
  return count >= 64 ? ~0ull : (1ull << count) - 1;
}

// sum += input (uint8) * weight (int8), four products a lane.
FXQUANT_INLINE void multiply_add(__m512i& sum, __m512i input, __m512i weight) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(input), "v"(weight));
}

FXQUANT_INLINE void multiply_add_from(__m512i& sum, __m512i input, const int8_t* weight) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(input), "m"(*reinterpret_cast<const __m512i_u*>(weight)));
}

// table[code] of 64 codes.
FXQUANT_INLINE __m512i table_of(const uint8_t* table, __m512i codes) {
  const __m512i* part = reinterpret_cast<const __m512i*>(table);
  const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(part), codes,
                                               _mm512_loadu_si512(part + 1));
  const __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(part + 2), codes,
                                                _mm512_loadu_si512(part + 3));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high);
}

// What turns rescaled sums into codes.
struct Codes {
  __m512i zero_point, lo, hi;
  const uint8_t* table;
};

template <class Params>
FXQUANT_INLINE Codes codes_of(const Params& p) {
  return {_mm512_set1_epi16(static_cast<short>(p.zero_point)),
          _mm512_set1_epi8(static_cast<char>(p.lo)), _mm512_set1_epi8(static_cast<char>(p.hi)),
          p.table};
}

// Saturation comes before the zero point is added and again after: the same code, as lo >= 0.
FXQUANT_INLINE __m512i packed(__m512i a, __m512i b, __m512i c, __m512i d, const Codes& to) {
  const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32(a, b), to.zero_point);
  const __m512i high = _mm512_adds_epi16(_mm512_packs_epi32(c, d), to.zero_point);
  const __m512i bytes = _mm512_packus_epi16(low, high);
  return _mm512_min_epu8(_mm512_max_epu8(bytes, to.lo), to.hi);
}

FXQUANT_INLINE __m512i looked_up(__m512i codes, const Codes& to) {
  return to.table ? table_of(to.table, codes) : codes;
}

FXQUANT_INLINE void store_codes(uint8_t* y, __m512i codes, int count) {
  if (count == 64)
    _mm512_storeu_si512(y, codes);
  else if (count == 32)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm512_castsi512_si256(codes));
  else if (count == 16)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm512_castsi512_si128(codes));
  else
    _mm512_mask_storeu_epi8(y, first_lanes(count), codes);
}

FXQUANT_INLINE __m512 centered_bytes(__m128i bytes, __m512i zero_point) {
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), zero_point));
}

}  // namespace avx512vnni
}  // namespace fxquant

FXQUANT_TARGET_END
