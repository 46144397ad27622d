// Kernels for AVX-512 with VNNI and VBMI: Ice Lake, Sapphire Rapids, Zen 4 and later.
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

// Up to 8 pixels of one panel.
struct ConvTile {
  const int64_t* x;         // offsets of the pixels
  const int64_t* y;
  const int64_t* residual;
  const uint8_t* x_base;
  const int8_t* weight;
  const int32_t* bias;
  const float* multiplier;
  int64_t y_channel;        // the panel's first channel
  int outputs;              // of the panel
};

template <int VECTORS>
FXQUANT_INLINE void conv_store_row(const ConvParams& p, const ConvTile& t, const Codes& to, int row,
                                   const __m512i* sums) {
  char* y = static_cast<char*>(p.y) + t.y[row];
  __m512 real[4];
  __m512i codes[4];
  FXQUANT_UNROLL
  for (int v = 0; v < VECTORS; ++v)
    real[v] = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[v]), _mm512_loadu_ps(t.multiplier + 16 * v));
  if (__builtin_expect(p.kind != 0, 0)) {
    FXQUANT_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      const __mmask16 mask = static_cast<__mmask16>(first_lanes(t.outputs - 16 * v));
      const __m512i words = p.kind == 1 ? sums[v] : _mm512_castps_si512(real[v]);
      _mm512_mask_storeu_epi32(y + 4 * (t.y_channel + 16 * v), mask, words);
    }
    return;
  }
  if (p.residual) {
    const uint8_t* residual = p.residual + t.residual[row] + t.y_channel;
    const __m512i zero_point = _mm512_set1_epi32(p.residual_zero_point);
    const __m512 multiplier = _mm512_set1_ps(p.residual_multiplier);
    FXQUANT_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(residual + 16 * v));
      real[v] = _mm512_add_ps(real[v], _mm512_mul_ps(centered_bytes(bytes, zero_point), multiplier));
    }
  }
  FXQUANT_UNROLL
  for (int v = 0; v < 4; ++v) codes[v] = _mm512_cvtps_epi32(real[v < VECTORS ? v : VECTORS - 1]);
  const __m512i order =
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = packed(codes[0], codes[1], codes[2], codes[3], to);
  store_codes(reinterpret_cast<uint8_t*>(y) + t.y_channel,
              looked_up(_mm512_permutexvar_epi32(order, bytes), to), t.outputs);
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
  FXQUANT_UNROLL
  for (int r = 0; r < ROWS; ++r) conv_store_row<VECTORS>(p, t, to, r, sums[r]);
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
    for (int i = 0; i < count; ++i) {
      x[i] = n * p.x_batch + oy * p.x_row + ox * p.x_column;
      y[i] = n * p.y_batch + oy * p.y_row + ox * p.y_pixel;
      residual[i] = n * p.residual_batch + oy * p.residual_row + ox * p.residual_pixel;
      if (++ox == p.width) {
        ox = 0;
        if (++oy == p.height) oy = 0, ++n;
      }
    }
  }
};

// One panel of the pixels: tiles of nearly equal height.
static inline void conv_panel(const ConvParams& p, const PixelOffsets& pixels, int group, int panel) {
  const int panels = (p.outputs + 63) / 64;
  const int64_t index = static_cast<int64_t>(group) * panels + panel;
  ConvTile t;
  t.x_base = p.x + group * p.x_group;
  t.weight = p.weight + index * p.segments * p.segment_quads * 256;
  t.bias = p.bias + index * 64;
  t.multiplier = p.multiplier + index * 64;
  t.y_channel = static_cast<int64_t>(group) * p.outputs + panel * 64;
  t.outputs = p.outputs - panel * 64 < 64 ? p.outputs - panel * 64 : 64;
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

static inline void conv(const ConvParams& p, int begin, int end) {
  const int panels = (p.outputs + 63) / 64, all = p.batch * p.height * p.width;
  const int first = p.by_panels ? 0 : begin, last = p.by_panels ? all : end;
  const int blocks = (last - first + PixelOffsets::MOST - 1) / PixelOffsets::MOST;
  PixelOffsets pixels;
  for (int block = 0, at = first; block < blocks; ++block) {
    const int count = (last - first) / blocks + (block < (last - first) % blocks);
    pixels.fill(p, at, at + count);
    at += count;
    for (int i = p.by_panels ? begin : 0; i < (p.by_panels ? end : p.groups * panels); ++i)
      conv_panel(p, pixels, i / panels, i % panels);
  }
}


// -------------------------------------------------------------------------------- depthwise

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
  uint8_t* y;
  int channels;
};

template <int HALVES>
FXQUANT_INLINE void depthwise_store(const DepthwiseRow& t, const Codes& to, uint8_t* y,
                                    const __m512i* sums) {
  __m512i codes[4];
  FXQUANT_UNROLL
  for (int v = 0; v < 2 * HALVES; ++v)
    codes[v] = _mm512_cvtps_epi32(
        _mm512_mul_ps(_mm512_cvtepi32_ps(sums[v]), _mm512_loadu_ps(t.multiplier + 16 * v)));
  const int last = 2 * HALVES - 2;
  const __m512i bytes = packed(codes[0], codes[1], codes[last], codes[last + 1], to);
  const __m512i natural = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  store_codes(y, looked_up(_mm512_permutexvar_epi64(natural, bytes), to), t.channels);
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
                                           const uint8_t* x, uint8_t*& y, bool stores,
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
      depthwise_store<HALVES>(t, to, y, sums[FIRST / STRIDE % PENDING]);
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
    uint8_t* y = t.y;
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
    uint8_t* y = p.y + n * p.y_batch + oy * p.y_row;
    for (int channel = 0; channel < p.channels;) {
      const int rest = p.channels - channel, halves = rest > 32 && rows[1] ? 2 : 1;
      DepthwiseRow t;
      t.x = x + channel;
      t.weight = p.weight + channel / 32 * block_weights;
      t.bias = p.bias + channel;
      t.multiplier = p.multiplier + channel;
      t.y = y + channel;
      t.channels = rest < 32 * halves ? rest : 32 * halves;
      rows[halves - 1](p, t, to);
      channel += 32 * halves;
    }
  }
}

}  // namespace avx512vnni
}  // namespace fxquant

FXQUANT_TARGET_END
