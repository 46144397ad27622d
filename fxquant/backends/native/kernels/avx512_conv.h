// Convolution as a matrix product without im2col, for AVX-512 VNNI.
#pragma once
#include "avx512_floats.h"

FXQUANT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")

namespace fxquant {
namespace avx512vnni {

// Up to 8 pixels of one panel.
struct ConvTile {
  const int64_t* x;         // offsets of the pixels
  const int64_t* y;
  const int64_t* residual;
  const uint8_t* x_base;
  const int8_t* weight;
  const int32_t* bias;
  const float* multiplier;
  const int32_t* row_start; // or null: what each pixel's sums start with besides the bias
  int64_t y_channel;        // the panel's first channel
  int outputs;              // of the panel
};

template <int VECTORS>
FXQUANT_INLINE void conv_store_codes(const ConvParams& p, const ConvTile& t, const Codes& to, int row,
                                     const __m512i* given) {
  __m512i codes[4];
  FXQUANT_UNROLL
  for (int v = 0; v < 4; ++v) codes[v] = given[v < VECTORS ? v : VECTORS - 1];
  const __m512i order =
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = packed(codes[0], codes[1], codes[2], codes[3], to);
  const __m512i result = looked_up(_mm512_permutexvar_epi32(order, bytes), to);
  uint8_t* y = static_cast<uint8_t*>(p.y) + t.y[row] + t.y_channel;
  if (__builtin_expect(t.outputs == 16 * VECTORS, 1))
    store_codes(y, result, 16 * VECTORS);
  else
    _mm512_mask_storeu_epi8(y, first_lanes(t.outputs), result);
}

// Codes of a GELU. It is nowhere far below 0, so that only what is too large must not be converted.
template <int VECTORS>
FXQUANT_INLINE void conv_store_gelu(const ConvParams& p, const ConvTile& t, const Codes& to, int row,
                                    const int32_t* sums) {
  __m512i codes[VECTORS];
  FXQUANT_UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    const __m512 real = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + 16 * v)),
                                      _mm512_loadu_ps(t.multiplier + 16 * v));
    const __m512 half = _mm512_mul_ps(real, _mm512_set1_ps(0.5f * p.inverse));
    const __m512 steps = _mm512_fmadd_ps(half, erf_of_gelu(real), half);
    codes[v] = _mm512_cvtps_epi32(_mm512_min_ps(steps, _mm512_set1_ps(1e9f)));
  }
  conv_store_codes<VECTORS>(p, t, to, row, codes);
}

// Results that are no plain codes, from sums in memory: int32, float32, or codes of a GELU.
template <int VECTORS>
static __attribute__((noinline)) void conv_store_others(const ConvParams& p, const ConvTile& t,
                                                        const Codes& to, int row,
                                                        const int32_t* sums) {
  if (p.kind == 3) return conv_store_gelu<VECTORS>(p, t, to, row, sums);
  for (int v = 0; v < VECTORS; ++v) {
    const __mmask16 mask = mask_of(t.outputs - 16 * v);
    const __m512i sum = _mm512_load_si512(sums + 16 * v);
    const __m512 real =
        _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(t.multiplier + 16 * v));
    char* y = static_cast<char*>(p.y) + t.y[row];
    _mm512_mask_storeu_epi32(y + 4 * (t.y_channel + 16 * v), mask,
                             p.kind == 1 ? sum : _mm512_castps_si512(real));
  }
}

template <int VECTORS, bool RESIDUAL>
FXQUANT_INLINE void conv_store_row(const ConvParams& p, const ConvTile& t, const Codes& to, int row,
                                   const __m512i* sums) {
  __m512i codes[VECTORS];
  FXQUANT_UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    __m512 real = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[v]), _mm512_loadu_ps(t.multiplier + 16 * v));
    if (RESIDUAL) {
      const uint8_t* residual = p.residual + t.residual[row] + t.y_channel + 16 * v;
      const __m512 centered =
          centered_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(residual)),
                         _mm512_set1_epi32(p.residual_zero_point));
      real = _mm512_add_ps(real, _mm512_mul_ps(centered, _mm512_set1_ps(p.residual_multiplier)));
    }
    codes[v] = _mm512_cvtps_epi32(real);
  }
  conv_store_codes<VECTORS>(p, t, to, row, codes);
}

// The sums of ROWS pixels times VECTORS * 16 outputs stay in registers.
template <int ROWS, int VECTORS>
static void conv_block(const ConvParams& p, const ConvTile& t, const Codes& to) {
  __m512i sums[ROWS][VECTORS];
  const uint8_t* x[ROWS];
  FXQUANT_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    x[r] = t.x_base + t.x[r];
    FXQUANT_UNROLL
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_loadu_si512(t.bias + 16 * v);
    if (t.row_start) {
      const __m512i start = _mm512_set1_epi32(t.row_start[r]);
      FXQUANT_UNROLL
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_add_epi32(sums[r][v], start);
    }
  }
  const int8_t* weight = t.weight;
  const int64_t run = 4 * static_cast<int64_t>(p.segment_quads);
  for (int s = 0; s < p.segments; ++s) {
    int64_t at = p.segment_offset[s];
    const int8_t* last = weight + 64 * run;
    for (; weight != last; weight += 256, at += 4) {
      __m512i w[VECTORS];
      FXQUANT_UNROLL
      for (int v = 0; v < VECTORS; ++v) w[v] = _mm512_loadu_si512(weight + 64 * v);
      FXQUANT_UNROLL
      for (int r = 0; r < ROWS; ++r) {
        int32_t four;
        memcpy(&four, x[r] + at, 4);
        const __m512i input = _mm512_set1_epi32(four);
        FXQUANT_UNROLL
        for (int v = 0; v < VECTORS; ++v) multiply_add(sums[r][v], input, w[v]);
      }
    }
  }
  if (__builtin_expect(p.kind != 0, 0)) {
    FXQUANT_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      alignas(64) int32_t row[16 * VECTORS];
      FXQUANT_UNROLL
      for (int v = 0; v < VECTORS; ++v) _mm512_store_si512(row + 16 * v, sums[r][v]);
      conv_store_others<VECTORS>(p, t, to, r, row);
    }
  } else if (p.residual) {
    FXQUANT_UNROLL
    for (int r = 0; r < ROWS; ++r) conv_store_row<VECTORS, true>(p, t, to, r, sums[r]);
  } else {
    FXQUANT_UNROLL
    for (int r = 0; r < ROWS; ++r) conv_store_row<VECTORS, false>(p, t, to, r, sums[r]);
  }
}

using ConvBlock = void (*)(const ConvParams&, const ConvTile&, const Codes&);
static const ConvBlock conv_blocks[4][8] = {
    {conv_block<1, 1>, conv_block<2, 1>, conv_block<3, 1>, conv_block<4, 1>, conv_block<5, 1>,
     conv_block<6, 1>, conv_block<7, 1>, conv_block<8, 1>},
    {conv_block<1, 2>, conv_block<2, 2>, conv_block<3, 2>, conv_block<4, 2>, conv_block<5, 2>,
     conv_block<6, 2>, conv_block<7, 2>, conv_block<8, 2>},
    {conv_block<1, 3>, conv_block<2, 3>, conv_block<3, 3>, conv_block<4, 3>, conv_block<5, 3>,
     conv_block<6, 3>, conv_block<7, 3>, conv_block<8, 3>},
    {conv_block<1, 4>, conv_block<2, 4>, conv_block<3, 4>, conv_block<4, 4>, conv_block<5, 4>,
     conv_block<6, 4>, nullptr, nullptr}};

// The offsets of consecutive output pixels, found without a division for each.
struct PixelOffsets {
  enum { MOST = 128 };
  int64_t x[MOST], y[MOST], residual[MOST];
  int count;

  void fill(const ConvParams& p, int begin, int end) {
    int ox = begin % p.width, oy = begin / p.width % p.height, n = begin / p.width / p.height;
    count = end - begin;
    for (int i = 0; i < count;) {
      const int stop = p.width - ox < count - i ? i + p.width - ox : count;
      int64_t at_x = n * p.x_batch + oy * p.x_row + ox * p.x_column;
      int64_t at_y = n * p.y_batch + oy * p.y_row + ox * p.y_pixel;
      int64_t at_residual = n * p.residual_batch + oy * p.residual_row + ox * p.residual_pixel;
      for (; i < stop; ++i) {
        x[i] = at_x;
        y[i] = at_y;
        residual[i] = at_residual;
        at_x += p.x_column;
        at_y += p.y_pixel;
        at_residual += p.residual_pixel;
      }
      ox = 0;
      if (++oy == p.height) oy = 0, ++n;
    }
  }
};

static inline ConvTile conv_tile_of(const ConvParams& p, int group, int panel) {
  const int64_t index = static_cast<int64_t>(group) * ((p.outputs + 63) / 64) + panel;
  ConvTile t = {};
  t.x_base = p.x + group * p.x_group;
  t.weight = p.weight + index * p.segments * p.segment_quads * 256;
  t.bias = p.bias + index * 64;
  t.multiplier = p.multiplier + index * 64;
  t.y_channel = static_cast<int64_t>(group) * p.outputs + panel * 64;
  t.outputs = p.outputs - panel * 64 < 64 ? p.outputs - panel * 64 : 64;
  return t;
}

// One panel of the pixels: tiles of nearly equal height.
static inline void conv_panel(const ConvParams& p, const PixelOffsets& pixels, int group, int panel) {
  ConvTile t = conv_tile_of(p, group, panel);
  const int vectors = (t.outputs + 15) / 16, most = vectors == 4 ? 6 : 8;
  const int tiles = (pixels.count + most - 1) / most;
  const Codes to = codes_of(p);
  for (int tile = 0, first = 0; tile < tiles; ++tile) {
    const int rows = pixels.count / tiles + (tile < pixels.count % tiles);
    t.x = pixels.x + first;
    t.y = pixels.y + first;
    t.residual = pixels.residual + first;
    conv_blocks[vectors - 1][rows - 1](p, t, to);
    first += rows;
  }
}

}  // namespace avx512vnni
}  // namespace fxquant

FXQUANT_TARGET_END
