// Depthwise convolution for AVX-512 VNNI.
#pragma once
#include "avx512_codes.h"

FXQUANT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")

namespace fxquant {
namespace avx512vnni {

// The four taps of each channel are bytes of one lane: rows a, b, c, d of 32 channels, interleaved.
struct Interleaved {
  __m512i first, second;
};

FXQUANT_INLINE __m512i two_rows(const uint8_t* a, const uint8_t* b) {
  const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  return _mm512_inserti64x4(low, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)), 1);
}

// ROWS of 1 to 4; what stands for a missing one does not matter, its weight is 0.
template <int ROWS>
FXQUANT_INLINE Interleaved interleaved(const uint8_t* x, int64_t row, const Interleaved& order) {
  const __m512i low = two_rows(x, ROWS > 1 ? x + row : x);
  if (ROWS < 3)
    return {_mm512_permutexvar_epi8(order.first, low), _mm512_permutexvar_epi8(order.second, low)};
  const __m512i high = two_rows(x + 2 * row, ROWS > 3 ? x + 3 * row : x + 2 * row);
  return {_mm512_permutex2var_epi8(low, order.first, high),
          _mm512_permutex2var_epi8(low, order.second, high)};
}

// What one row of outputs of HALVES * 32 channels needs.
struct DepthwiseRow {
  const uint8_t* x;
  const int8_t* weight;
  const int32_t* bias;
  const float* multiplier;
  char* y;
  int channels;
};

template <int HALVES>
FXQUANT_INLINE void depthwise_store(int kind, const DepthwiseRow& t, const Codes& to,
                                    char* y, const __m512i* sums) {
  __m512 real[4];
  __m512i codes[4];
  FXQUANT_UNROLL
  for (int v = 0; v < 2 * HALVES; ++v)
    real[v] = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[v]), _mm512_loadu_ps(t.multiplier + 16 * v));
  if (__builtin_expect(kind == 2, 0)) {
    // Channels 0 to 3 and 8 to 11 and so on are in one vector, those between in the other.
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    FXQUANT_UNROLL
    for (int v = 0; v < 2 * HALVES; ++v)
      _mm512_mask_storeu_ps(
          y + 64 * v, static_cast<__mmask16>(first_lanes(t.channels > 16 * v ? t.channels - 16 * v : 0)),
          _mm512_permutex2var_ps(real[v & ~1], v & 1 ? high : low, real[v | 1]));
    return;
  }
  FXQUANT_UNROLL
  for (int v = 0; v < 2 * HALVES; ++v) codes[v] = _mm512_cvtps_epi32(real[v]);
  const int last = 2 * HALVES - 2;
  const __m512i bytes = packed(codes[0], codes[1], codes[last], codes[last + 1], to);
  const __m512i natural = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  store_codes(reinterpret_cast<uint8_t*>(y), looked_up(_mm512_permutexvar_epi64(natural, bytes), to), t.channels);
}

// A pass along one row: each column adds to the sums of all outputs whose windows hold it.
template <int KERNEL, int STRIDE, int HALVES>
struct DepthwisePass {
  enum {
    QUADS = (KERNEL + 3) / 4,
    PENDING = (KERNEL + STRIDE - 1) / STRIDE,  // outputs under way at any column
    PERIOD = PENDING * STRIDE,
    VECTORS = 2 * HALVES
  };

  // The column at `x`, number PHASE of a period, which ends an output or not.
  template <int PHASE>
  static FXQUANT_INLINE_MEMBER void column(const DepthwiseConvParams& p, const DepthwiseRow& t,
                                           const Codes& to, const Interleaved& order,
                                           const uint8_t* x, char*& y, bool stores,
                                           __m512i (&sums)[PENDING][VECTORS]) {
    if (PHASE % STRIDE == 0) {
      FXQUANT_UNROLL
      for (int v = 0; v < VECTORS; ++v)
        sums[PHASE / STRIDE][v] = _mm512_loadu_si512(t.bias + 16 * v);
    }
    FXQUANT_UNROLL
    for (int half = 0; half < HALVES; ++half) {
      FXQUANT_UNROLL
      for (int quad = 0; quad < QUADS; ++quad) {
        const uint8_t* rows = x + 32 * half + 4 * quad * p.x_row;
        const Interleaved taps =
            quad + 1 < QUADS ? interleaved<4>(rows, p.x_row, order)
                             : interleaved<KERNEL - 4 * (QUADS - 1)>(rows, p.x_row, order);
        FXQUANT_UNROLL
        for (int kx = 0; kx < KERNEL; ++kx)
          if ((PHASE + 2 * PERIOD - kx) % STRIDE == 0) {
            const int output = (PHASE + 2 * PERIOD - kx) / STRIDE % PENDING;
            const int8_t* weight = t.weight + ((half * KERNEL + kx) * QUADS + quad) * 128;
            multiply_add_from(sums[output][2 * half], taps.first, weight);
            multiply_add_from(sums[output][2 * half + 1], taps.second, weight + 64);
          }
      }
    }
    constexpr int FIRST = PHASE + 2 * PERIOD - (KERNEL - 1);
    if (FIRST % STRIDE == 0 && stores) {
      depthwise_store<HALVES>(p.kind, t, to, y, sums[FIRST / STRIDE % PENDING]);
      y += p.y_pixel;
    }
  }

  static void row(const DepthwiseConvParams& p, const DepthwiseRow& t, const Codes& to) {
    const __m512i lane =
        _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    Interleaved order;
    order.first = _mm512_add_epi8(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x01010101)),
                                  _mm512_set1_epi32(0x60402000));
    order.second = _mm512_add_epi8(order.first, _mm512_set1_epi8(4));
    __m512i sums[PENDING][VECTORS];
    FXQUANT_UNROLL
    for (int i = 0; i < PENDING; ++i) {
      FXQUANT_UNROLL
      for (int v = 0; v < VECTORS; ++v) sums[i][v] = _mm512_setzero_si512();
    }
    const uint8_t* x = t.x;
    char* y = t.y;
    const int columns = (p.width - 1) * STRIDE + KERNEL;
#define FXQUANT_COLUMN(PHASE)                                                               \
  if (PHASE < PERIOD) {                                                                     \
    column<PHASE % PERIOD>(p, t, to, order, x, y, first + PHASE >= KERNEL - 1, sums);       \
    if (first + PHASE + 1 == columns) return;                                               \
    x += p.x_pixel;                                                                         \
  }
    for (int first = 0;; first += PERIOD) {
      FXQUANT_COLUMN(0)
      FXQUANT_COLUMN(1)
      FXQUANT_COLUMN(2)
      FXQUANT_COLUMN(3)
      FXQUANT_COLUMN(4)
      FXQUANT_COLUMN(5)
      FXQUANT_COLUMN(6)
      FXQUANT_COLUMN(7)
    }
#undef FXQUANT_COLUMN
  }
};

using DepthwiseRowFunction = void (*)(const DepthwiseConvParams&, const DepthwiseRow&, const Codes&);

// [3, 5, 7][stride 1, 2][32 or 64 channels]; 28 sums would not fit the registers.
static const DepthwiseRowFunction depthwise_rows[3][2][2] = {
    {{DepthwisePass<3, 1, 1>::row, DepthwisePass<3, 1, 2>::row},
     {DepthwisePass<3, 2, 1>::row, DepthwisePass<3, 2, 2>::row}},
    {{DepthwisePass<5, 1, 1>::row, DepthwisePass<5, 1, 2>::row},
     {DepthwisePass<5, 2, 1>::row, DepthwisePass<5, 2, 2>::row}},
    {{DepthwisePass<7, 1, 1>::row, nullptr}, {DepthwisePass<7, 2, 1>::row, DepthwisePass<7, 2, 2>::row}}};

static inline void depthwise_conv(const DepthwiseConvParams& p, int begin, int end) {
  const int kernel = p.kernel_width, stride = p.stride_width;
  if (kernel != p.kernel_height || stride != p.stride_height || kernel < 3 || kernel > 7 ||
      kernel % 2 == 0 || stride > 2 || p.residual)
    return portable::depthwise_conv(p, begin, end);
  const DepthwiseRowFunction* rows = depthwise_rows[kernel / 2 - 1][stride - 1];
  const int64_t block_weights = static_cast<int64_t>(kernel) * ((kernel + 3) / 4) * 128;
  const Codes to = codes_of(p);
  for (int item = begin; item < end; ++item) {
    const int n = item / p.height, oy = item % p.height;
    const uint8_t* x = p.x + n * p.x_batch + oy * stride * p.x_row;
    char* y = static_cast<char*>(p.y) + n * p.y_batch + oy * p.y_row;
    for (int channel = 0; channel < p.channels;) {
      const int rest = p.channels - channel, halves = rest > 32 && rows[1] ? 2 : 1;
      DepthwiseRow t;
      t.x = x + channel;
      t.weight = p.weight + channel / 32 * block_weights;
      t.bias = p.bias + channel;
      t.multiplier = p.multiplier + channel;
      t.y = y + channel * (p.kind == 2 ? 4 : 1);
      t.channels = rest < 32 * halves ? rest : 32 * halves;
      rows[halves - 1](p, t, to);
      channel += 32 * halves;
    }
  }
}

}  // namespace avx512vnni
}  // namespace fxquant

FXQUANT_TARGET_END
