// Convolution in groups of 8 channels (RegNet, ResNeXt-like networks) for AVX-512 VNNI.
#pragma once
#include "avx512_conv.h"

FXQUANT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")

namespace fxquant {
namespace avx512vnni {

// One register holds a tap: lane 2 o has input channels 0 to 3 of output o, lane 2 o + 1 the others.
FXQUANT_INLINE __m512i tap_of(const int8_t* weight) {
  const __m512i order =
      _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return _mm512_permutex2var_epi32(_mm512_loadu_si512(weight), order,
                                   _mm512_loadu_si512(weight + 256));
}

FXQUANT_INLINE __m512i broadcast_eight(const uint8_t* x) {
  int64_t eight;
  memcpy(&eight, x, 8);
  return _mm512_set1_epi64(eight);
}

// The 9 taps of a 3 x 3 kernel stay in registers while the pixels pass, eight at a time.
static inline void conv_group_of_eight(const ConvParams& p, const PixelOffsets& pixels, int group) {
  enum { TAPS = 9, PIXELS = 8 };
  const int8_t* weight = p.weight + static_cast<int64_t>(group) * TAPS * 2 * 256;
  // The bias counts once: in the even lanes.
  const __m512i bias = _mm512_maskz_expandloadu_epi32(0x5555, p.bias + 64 * group);
  const __m256 half = _mm256_loadu_ps(p.multiplier + 64 * group);
  const __m512 multiplier = _mm512_insertf32x8(_mm512_castps256_ps512(half), half, 1);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const Codes to = codes_of(p);
  __m512i taps[TAPS];
  FXQUANT_UNROLL
  for (int tap = 0; tap < TAPS; ++tap) taps[tap] = tap_of(weight + tap * 512);
  const uint8_t* base = p.x + group * p.x_group;
  uint8_t* y = static_cast<uint8_t*>(p.y) + 8 * group;
  for (int first = 0; first < pixels.count; first += PIXELS) {
    const int count = pixels.count - first < PIXELS ? pixels.count - first : PIXELS;
    __m512i sums[PIXELS], codes[4];
    FXQUANT_UNROLL
    for (int i = 0; i < PIXELS; ++i) {
      // Behind the last pixel its own sums are found again.
      const uint8_t* x = base + pixels.x[first + (i < count ? i : count - 1)];
      sums[i] = bias;
      FXQUANT_UNROLL
      for (int tap = 0; tap < TAPS; ++tap)
        multiply_add(sums[i], broadcast_eight(x + p.segment_offset[tap]), taps[tap]);
    }
    FXQUANT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const __m512i sum =
          _mm512_add_epi32(_mm512_permutex2var_epi32(sums[2 * i], even, sums[2 * i + 1]),
                           _mm512_permutex2var_epi32(sums[2 * i], odd, sums[2 * i + 1]));
      codes[i] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), multiplier));
    }
    alignas(64) uint8_t bytes[64];
    const __m512i result = packed(codes[0], codes[1], codes[2], codes[3], to);
    _mm512_store_si512(bytes, looked_up(_mm512_permutexvar_epi32(order, result), to));
    for (int i = 0; i < count; ++i) memcpy(y + pixels.y[first + i], bytes + 8 * i, 8);
  }
}

static inline bool in_groups_of_eight(const ConvParams& p) {
  return p.groups > 1 && p.outputs == 8 && p.segments == 9 && p.segment_quads == 2 &&
         p.kind == 0 && !p.residual;
}

static inline void conv(const ConvParams& p, int begin, int end) {
  const int panels = (p.outputs + 63) / 64, all = p.batch * p.height * p.width;
  const int first = p.by_panels ? 0 : begin, last = p.by_panels ? all : end;
  const int blocks = (last - first + PixelOffsets::MOST - 1) / PixelOffsets::MOST;
  const bool eights = in_groups_of_eight(p);
  PixelOffsets pixels;
  for (int block = 0, at = first; block < blocks; ++block) {
    const int count = (last - first) / blocks + (block < (last - first) % blocks);
    pixels.fill(p, at, at + count);
    at += count;
    for (int i = p.by_panels ? begin : 0; i < (p.by_panels ? end : p.groups * panels); ++i)
      if (eights)
        conv_group_of_eight(p, pixels, i);
      else
        conv_panel(p, pixels, i / panels, i % panels);
  }
}

}  // namespace avx512vnni
}  // namespace fxquant

FXQUANT_TARGET_END
