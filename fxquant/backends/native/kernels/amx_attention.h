// Attention for AMX: both products of 16 queries on tiles, numerators between them.
#pragma once
#include "amx_conv.h"

FXQUANT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")

namespace fxquant {
namespace amx {

// A row of sums of 16 queries: [panels][16][64].
struct SumsOfRow {
  const int32_t* sums;
  __m512i start;

  FXQUANT_INLINE_MEMBER __m512i at(int i) const {
    return _mm512_add_epi32(_mm512_load_si512(sums + i / 64 * 1024 + i % 64), start);
  }
};

struct MeanOfRow {
  SumsOfRow row;
  __m512 total, multiplier;

  FXQUANT_INLINE_MEMBER __m512 at(int i) const {
    const __m512 sum = _mm512_cvtepi32_ps(row.at(i));
    return _mm512_mul_ps(_mm512_div_ps(sum, total), multiplier);
  }
};

}  // namespace amx
}  // namespace fxquant

FXQUANT_TARGET_END
FXQUANT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,amx-tile,amx-int8")

namespace fxquant {
namespace amx {

// What all queries of a call are multiplied by, with depths padded to whole tiles.
struct Operand {
  int8_t* weight;           // [panels][steps * 16][64][4]
  int32_t* bias;            // [panels][64]
  int steps;                // of 64 products each
};

static inline void multiply_rows(const PixelTile& rows, int64_t stride, const Operand& by,
                                 int columns, int32_t* sums) {
  const int32_t no_offset = 0;
  ConvParams p = {};
  p.segment_offset = &no_offset;
  p.segments = 1;
  p.segment_quads = 16 * by.steps;
  p.x_column = stride;
  PendingRows nothing(p);
  for (int column = 0; column < columns; column += 32) {
    const int64_t panel = column / 64, part = column % 64;
    multiply_tiles<1, 2, false>(p, &rows, by.weight + panel * by.steps * 4096 + 4 * part,
                                by.bias + column, 0, sums + panel * 1024 + part, nothing);
  }
}

// clamp(round(exp(score - largest score) * inverse), 0, 255) of one query; their sum is returned.
static inline int32_t numerators_of(const AttentionParams& p, const SumsOfRow& row,
                                    uint8_t* weights) {
  __m512i top = _mm512_set1_epi32(INT32_MIN);
  for (int i = 0; i < p.columns; i += 16)
    top = _mm512_mask_max_epi32(top, mask_of(p.columns - i), top, row.at(i));
  const __m512 multiplier = _mm512_set1_ps(p.score_multiplier);
  // Rounding keeps the order, so that the largest sum has the largest score.
  const __m512 largest = _mm512_mul_ps(
      _mm512_cvtepi32_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(top))), multiplier);
  const __m512 inverse = _mm512_set1_ps(p.inverse), most = _mm512_set1_ps(255.0f);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i total = _mm512_setzero_si512();
  for (int i = 0; i < p.columns; i += 64) {
    __m512i codes[4];
    FXQUANT_UNROLL
    for (int v = 0; v < 4; ++v) {
      codes[v] = _mm512_setzero_si512();
      if (i + 16 * v >= p.columns) continue;
      const __m512 score = _mm512_mul_ps(_mm512_cvtepi32_ps(row.at(i + 16 * v)), multiplier);
      const __m512 e = _mm512_mul_ps(exp_of(_mm512_sub_ps(score, largest)), inverse);
      codes[v] = _mm512_cvtps_epi32(_mm512_min_ps(e, most));
    }
    const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(codes[0], codes[1]),
                                              _mm512_packs_epi32(codes[2], codes[3]));
    const __m512i kept = _mm512_maskz_mov_epi8(first_lanes(p.columns - i),
                                               _mm512_permutexvar_epi32(order, bytes));
    total = _mm512_add_epi64(total, _mm512_sad_epu8(kept, _mm512_setzero_si512()));
    _mm512_store_si512(weights + i, kept);
  }
  return static_cast<int32_t>(_mm512_reduce_add_epi64(total));
}

static inline void attention(const AttentionParams& p, int begin, int end) {
  enum { KEYS = 1024, MOST = 65536, ROW = KEYS + 64 };
  const int panels = (p.columns + 63) / 64, value_panels = (p.width + 63) / 64;
  const int depth_steps = (p.depth + 63) / 64, key_steps = panels;
  const int rows = p.rows < 16 ? p.rows : 16;
  // Few queries or keys and shallow ones fill no tiles.
  if (rows < 8 || p.columns < 64 || p.depth <= 32 || !(p.score_multiplier > 0) || !(p.inverse > 0) ||
      panels * depth_steps * 4096 > MOST || value_panels * key_steps * 4096 > MOST)
    return avx512vnni::attention(p, begin, end);
  alignas(64) int8_t keys[MOST], values[MOST];
  alignas(64) int32_t key_bias[KEYS], value_bias[128];
  alignas(64) int32_t scores[16 * KEYS], means[16 * 128];
  alignas(64) uint8_t weights[16 * ROW];
  const Operand key = {keys, key_bias, depth_steps}, value = {values, value_bias, key_steps};
  const Codes to = {_mm512_set1_epi16(static_cast<short>(p.zero_point)),
                    _mm512_set1_epi8(static_cast<char>(p.lo)),
                    _mm512_set1_epi8(static_cast<char>(p.hi)), nullptr};
  memset(keys, 0, static_cast<size_t>(panels * depth_steps * 4096));
  memset(values, 0, static_cast<size_t>(value_panels * key_steps * 4096));
  configure_amx(rows);
  for (int item = begin; item < end; ++item) {
    const int n = item / p.heads, head = item % p.heads;
    const uint8_t* k = p.k + n * p.k_batch + head * p.k_head;
    const uint8_t* v = p.v + n * p.v_batch + head * p.v_head;
    const uint8_t* q = p.q + n * p.q_batch + head * p.q_head;
    uint8_t* y = p.y + n * p.y_batch + head * p.y_head;
    for (int i = 0; i < panels; ++i)
      pack_keys({keys + i * depth_steps * 4096, key_bias + 64 * i}, k + 64 * i * p.k_row, p.k_row,
                p.columns - 64 * i < 64 ? p.columns - 64 * i : 64, p.depth, p.q_zero_point,
                p.k_zero_point);
    for (int i = 0; i < value_panels; ++i)
      pack_values({values + i * key_steps * 4096, value_bias + 64 * i}, v + 64 * i, p.v_row,
                  p.width - 64 * i < 64 ? p.width - 64 * i : 64, p.columns, 0, p.v_zero_point);
    for (int done = 0; done < p.rows; done += rows) {
      // The last queries are taken together with some that are done.
      const int first = done < p.rows - rows ? done : p.rows - rows;
      PixelTile tile = {};
      tile.x = q + first * p.q_row;
      multiply_rows(tile, p.q_row, key, p.columns, scores);
      int32_t totals[16];
      for (int r = 0; r < rows; ++r) {
        const int32_t codes = sum_of_codes(tile.x + r * p.q_row, p.depth);
        const SumsOfRow row = {scores + 64 * r, _mm512_set1_epi32((128 - p.k_zero_point) * codes)};
        totals[r] = numerators_of(p, row, weights + r * ROW);
      }
      tile.x = weights;
      multiply_rows(tile, ROW, value, p.width, means);
      for (int r = 0; r < rows; ++r) {
        const SumsOfRow row = {means + 64 * r, _mm512_set1_epi32((128 - p.v_zero_point) * totals[r])};
        const __m512 total = _mm512_set1_ps(totals[r] ? static_cast<float>(totals[r]) : 1.0f);
        map_codes(y + (first + r) * p.y_row, p.width, to,
                  MeanOfRow{row, total, _mm512_set1_ps(p.multiplier)});
      }
    }
  }
  release_amx();
}

}  // namespace amx
}  // namespace fxquant

FXQUANT_TARGET_END
