// Attention for AVX-512 VNNI: one head's scores, numerators and weighted mean in cache.
#pragma once
#include "avx512_conv.h"
#include "avx512_elementwise.h"

FXQUANT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")

namespace fxquant {
namespace avx512vnni {

// Rows [K][64] of weights as the multiply instruction wants them: quads of four rows, 64 columns, and
// what belongs to the zero points of both operands.
struct PackedPanel {
  int8_t* weight;           // [quads][64][4], shifted by 128 to int8
  int32_t* bias;            // [64]: - a_zero_point * sum of (b - b_zero_point)
};

// The sums over the quads of a packed panel, of b - 128.
FXQUANT_INLINE void finish_panel(const PackedPanel& panel, int quads, int depth, int a_zero_point,
                                 int b_zero_point) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (int v = 0; v < 4; ++v) {
    __m512i sum = _mm512_set1_epi32(depth * (128 - b_zero_point));
    for (int quad = 0; quad < quads; ++quad)
      sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(panel.weight + quad * 256 + 64 * v));
    _mm512_storeu_si512(panel.bias + 16 * v,
                        _mm512_mullo_epi32(sum, _mm512_set1_epi32(-a_zero_point)));
  }
}

// Keys: column j of the panel is a row of `depth` codes, whose quads lie together already.
FXQUANT_INLINE void pack_keys(const PackedPanel& panel, const uint8_t* b, int64_t row, int count,
                              int depth, int a_zero_point, int b_zero_point) {
  const int quads = (depth + 3) / 4;
  const __m512i sign = _mm512_set1_epi8(-128);
  for (int quad = 0; quad < quads; quad += 16) {
    const int here = quads - quad < 16 ? quads - quad : 16;
    const int bytes = depth - 4 * quad < 64 ? depth - 4 * quad : 64;
    const __mmask64 mask = first_lanes(bytes);
    for (int j = 0; j < 64; ++j) {
      const __m512i codes = j < count ? _mm512_maskz_xor_epi32(
                                            mask_of((bytes + 3) / 4),
                                            _mm512_maskz_loadu_epi8(mask, b + j * row + 4 * quad),
                                            _mm512_maskz_mov_epi8(mask, sign))
                                      : _mm512_setzero_si512();
      const __m512i places = _mm512_mullo_epi32(
          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
          _mm512_set1_epi32(64));
      _mm512_mask_i32scatter_epi32(panel.weight + quad * 256 + 4 * j, mask_of(here), places, codes,
                                   4);
    }
  }
  finish_panel(panel, quads, depth, a_zero_point, b_zero_point);
}

// Values: quad q holds rows 4 q to 4 q + 3 of 64 columns, interleaved.
FXQUANT_INLINE void pack_values(const PackedPanel& panel, const uint8_t* b, int64_t row, int count,
                                int depth, int a_zero_point, int b_zero_point) {
  const int quads = (depth + 3) / 4;
  const __mmask64 mask = first_lanes(count);
  const __m512i sign = _mm512_maskz_mov_epi8(mask, _mm512_set1_epi8(-128));
  for (int quad = 0; quad < quads; ++quad) {
    __m512i rows[4];
    for (int i = 0; i < 4; ++i)
      rows[i] = 4 * quad + i < depth
                    ? _mm512_xor_si512(
                          _mm512_maskz_loadu_epi8(mask, b + (4 * quad + i) * row), sign)
                    : _mm512_setzero_si512();
    const __m512i ab_low = _mm512_unpacklo_epi8(rows[0], rows[1]);
    const __m512i ab_high = _mm512_unpackhi_epi8(rows[0], rows[1]);
    const __m512i cd_low = _mm512_unpacklo_epi8(rows[2], rows[3]);
    const __m512i cd_high = _mm512_unpackhi_epi8(rows[2], rows[3]);
    // Vector v has four columns of every 16: 4 v to 4 v + 3, 16 + 4 v and so on.
    const __m512i a = _mm512_unpacklo_epi16(ab_low, cd_low);
    const __m512i b4 = _mm512_unpackhi_epi16(ab_low, cd_low);
    const __m512i c = _mm512_unpacklo_epi16(ab_high, cd_high);
    const __m512i d = _mm512_unpackhi_epi16(ab_high, cd_high);
    const __m512i ab0 = _mm512_shuffle_i32x4(a, b4, 0x44), ab1 = _mm512_shuffle_i32x4(a, b4, 0xee);
    const __m512i cd0 = _mm512_shuffle_i32x4(c, d, 0x44), cd1 = _mm512_shuffle_i32x4(c, d, 0xee);
    int8_t* to = panel.weight + quad * 256;
    _mm512_storeu_si512(to, _mm512_shuffle_i32x4(ab0, cd0, 0x88));
    _mm512_storeu_si512(to + 64, _mm512_shuffle_i32x4(ab0, cd0, 0xdd));
    _mm512_storeu_si512(to + 128, _mm512_shuffle_i32x4(ab1, cd1, 0x88));
    _mm512_storeu_si512(to + 192, _mm512_shuffle_i32x4(ab1, cd1, 0xdd));
  }
  finish_panel(panel, quads, depth, a_zero_point, b_zero_point);
}

FXQUANT_INLINE int32_t sum_of_codes(const uint8_t* x, int count) {
  __m512i sum = _mm512_setzero_si512();
  for (int i = 0; i < count; i += 64)
    sum = _mm512_add_epi64(sum, _mm512_sad_epu8(_mm512_maskz_loadu_epi8(first_lanes(count - i), x + i),
                                                _mm512_setzero_si512()));
  return static_cast<int32_t>(_mm512_reduce_add_epi64(sum));
}

// One tile of pixels against one packed panel.
FXQUANT_INLINE void multiply_panel(ConvParams& p, ConvTile& t, const Codes& to, int rows) {
  conv_blocks[(t.outputs + 15) / 16 - 1][rows - 1](p, t, to);
}

struct MeanOfValues {
  const int32_t* sums;
  __m512 total, multiplier;

  FXQUANT_INLINE_MEMBER __m512 at(int i) const {
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums + (i < 128 ? i : 0)));
    return _mm512_mul_ps(_mm512_div_ps(sum, total), multiplier);
  }
};

static inline void attention(const AttentionParams& p, int begin, int end) {
  enum { TILE = 6, KEYS = 1024 };
  alignas(64) int8_t keys[65536], values[65536 + 1024];
  alignas(64) int32_t key_bias[KEYS], value_bias[128], sums[TILE * 128];
  alignas(64) float scores[TILE * KEYS], one[64];
  alignas(64) uint8_t weights[TILE * (KEYS + 64)];
  const int depth_quads = (p.depth + 3) / 4, key_quads = (p.columns + 3) / 4;
  const int panels = (p.columns + 63) / 64, value_panels = (p.width + 63) / 64;
  const int padded = panels * 64;
  const Quantizer quantizer = quantizer_of(p.inverse, 0, 0, 255);
  const int32_t no_offset = 0;
  for (float& value : one) value = p.score_multiplier;
  ConvParams score = {};
  score.segment_offset = &no_offset;
  score.segments = 1;
  score.segment_quads = depth_quads;
  score.kind = 2;
  score.y = scores;
  ConvParams product = score;
  product.segment_quads = key_quads;
  product.kind = 1;
  product.y = sums;
  const Codes to = {_mm512_set1_epi16(static_cast<short>(p.zero_point)),
                    _mm512_set1_epi8(static_cast<char>(p.lo)),
                    _mm512_set1_epi8(static_cast<char>(p.hi)), nullptr};
  for (int item = begin; item < end; ++item) {
    const int n = item / p.heads, head = item % p.heads;
    const uint8_t* k = p.k + n * p.k_batch + head * p.k_head;
    const uint8_t* v = p.v + n * p.v_batch + head * p.v_head;
    const uint8_t* q = p.q + n * p.q_batch + head * p.q_head;
    uint8_t* y = p.y + n * p.y_batch + head * p.y_head;
    for (int i = 0; i < panels; ++i) {
      const int count = p.columns - 64 * i < 64 ? p.columns - 64 * i : 64;
      pack_keys({keys + i * depth_quads * 256, key_bias + 64 * i}, k + 64 * i * p.k_row, p.k_row,
                count, p.depth, p.q_zero_point, p.k_zero_point);
    }
    for (int i = 0; i < value_panels; ++i) {
      const int count = p.width - 64 * i < 64 ? p.width - 64 * i : 64;
      pack_values({values + i * key_quads * 256, value_bias + 64 * i}, v + 64 * i, p.v_row, count,
                  p.columns, 0, p.v_zero_point);
    }
    for (int row = 0; row < p.rows; row += TILE) {
      const int rows = p.rows - row < TILE ? p.rows - row : TILE;
      int64_t x[TILE], score_rows[TILE], weight_rows[TILE], sum_rows[TILE];
      int32_t start[TILE], totals[TILE];
      for (int r = 0; r < rows; ++r) {
        x[r] = (row + r) * p.q_row;
        score_rows[r] = static_cast<int64_t>(r) * padded * 4;
        weight_rows[r] = static_cast<int64_t>(r) * (KEYS + 64);
        sum_rows[r] = static_cast<int64_t>(r) * 128 * 4;
        start[r] = (128 - p.k_zero_point) * sum_of_codes(q + x[r], p.depth);
      }
      ConvTile t = {};
      t.x = x;
      t.y = t.residual = score_rows;
      t.x_base = q;
      t.multiplier = one;
      t.row_start = start;
      for (int i = 0; i < panels; ++i) {
        t.weight = keys + i * depth_quads * 256;
        t.bias = key_bias + 64 * i;
        t.y_channel = 64 * i;
        t.outputs = p.columns - 64 * i < 64 ? p.columns - 64 * i : 64;
        multiply_panel(score, t, to, rows);
      }
      for (int r = 0; r < rows; ++r) {
        const float* from = scores + r * padded;
        const __m512 lowest = _mm512_set1_ps(-INFINITY);
        __m512 top = lowest;
        for (int i = 0; i < p.columns; i += 16)
          top = _mm512_max_ps(top, _mm512_mask_loadu_ps(lowest, mask_of(p.columns - i), from + i));
        const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
        __m512i total = _mm512_setzero_si512();
        for (int i = 0; i < p.columns; i += 16) {
          const __m512 e = exp_of(_mm512_sub_ps(_mm512_loadu_ps(from + i), largest));
          const __m512i codes = _mm512_maskz_mov_epi32(mask_of(p.columns - i), quantizer.codes(e));
          total = _mm512_add_epi32(total, codes);
          _mm_storeu_si128(reinterpret_cast<__m128i*>(weights + weight_rows[r] + i),
                           _mm512_cvtepi32_epi8(codes));
        }
        totals[r] = _mm512_reduce_add_epi32(total);
        start[r] = (128 - p.v_zero_point) * totals[r];
      }
      t.x = weight_rows;
      t.y = t.residual = sum_rows;
      t.x_base = weights;
      for (int i = 0; i < value_panels; ++i) {
        t.weight = values + i * key_quads * 256;
        t.bias = value_bias + 64 * i;
        t.y_channel = 64 * i;
        t.outputs = p.width - 64 * i < 64 ? p.width - 64 * i : 64;
        multiply_panel(product, t, to, rows);
      }
      for (int r = 0; r < rows; ++r) {
        const __m512 total = _mm512_set1_ps(totals[r] ? static_cast<float>(totals[r]) : 1.0f);
        MeanOfValues mean{sums + 128 * r, total, _mm512_set1_ps(p.multiplier)};
        map_codes(y + (row + r) * p.y_row, p.width, to, mean);
      }
    }
  }
}

}  // namespace avx512vnni
}  // namespace fxquant

FXQUANT_TARGET_END
