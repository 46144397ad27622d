// Attention on registers of 256 bits. Included twice, as avx256.h is.

FXQUANT_TARGET_BEGIN(FXQUANT_FEATURES)

namespace fxquant {
namespace FXQUANT_WIDE {

// b[row][column] of `depth` rows and up to 64 columns as [quads][64][4], less 128, and what the zero
// points of both operands make of its sums.
static inline void pack_panel(int8_t* weight, int32_t* bias, const uint8_t* b, int64_t row,
                              int64_t column, int count, int depth, int a_zero_point,
                              int b_zero_point) {
  memset(weight, 0, static_cast<size_t>((depth + 3) / 4 * 256));
  for (int j = 0; j < 64; ++j) {
    int32_t sum = 0;
    for (int k = 0; j < count && k < depth; ++k) {
      const int code = b[k * row + j * column];
      sum += code - b_zero_point;
      weight[k / 4 * 256 + 4 * j + k % 4] = static_cast<int8_t>(code - 128);
    }
    bias[j] = -a_zero_point * sum;
  }
}

struct MeanOfValues {
  const int32_t* sums;
  __m256 total, multiplier;

  FXQUANT_INLINE_MEMBER __m256 at(int i) const {
    const __m256i sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + i));
    return _mm256_mul_ps(_mm256_div_ps(_mm256_cvtepi32_ps(sum), total), multiplier);
  }
};

// A tile of rows against all packed panels.
static inline void multiply_panels(const ConvParams& p, ConvTile& t, const Codes& to,
                                   const int8_t* weight, const int32_t* bias, int columns, int rows) {
  for (int j = 0; j < columns; j += 16) {
    t.weight = weight + j / 64 * p.segment_quads * 256 + 4 * (j % 64);
    t.bias = bias + j;
    t.channel = j;
    t.outputs = columns - j < 16 ? columns - j : 16;
    conv_blocks[rows - 1](p, t, to);
  }
}

static inline void attention(const AttentionParams& p, int begin, int end) {
  enum { KEYS = 1024 };
  alignas(64) int8_t keys[65536], values[65536 + 1024];
  alignas(64) int32_t key_bias[KEYS], value_bias[128], sums[ROWS * 128];
  alignas(64) float scores[ROWS * KEYS], scales[16];
  alignas(64) uint8_t weights[ROWS * (KEYS + 64)];
  const int depth_quads = (p.depth + 3) / 4, key_quads = (p.columns + 3) / 4;
  const Quantizer quantizer = quantizer_of(p.inverse, 0, 0, 255);
  const int32_t no_offset = 0;
  for (float& scale : scales) scale = p.score_multiplier;
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
  const Codes to = {_mm_set1_epi16(static_cast<short>(p.zero_point)),
                    _mm_set1_epi8(static_cast<char>(p.lo)), _mm_set1_epi8(static_cast<char>(p.hi)),
                    nullptr};
  memset(weights, 0, sizeof weights);
  for (int item = begin; item < end; ++item) {
    const int n = item / p.heads, head = item % p.heads;
    const uint8_t* k = p.k + n * p.k_batch + head * p.k_head;
    const uint8_t* v = p.v + n * p.v_batch + head * p.v_head;
    const uint8_t* q = p.q + n * p.q_batch + head * p.q_head;
    uint8_t* y = p.y + n * p.y_batch + head * p.y_head;
    for (int j = 0; j < p.columns; j += 64)
      pack_panel(keys + j / 64 * depth_quads * 256, key_bias + j, k + j * p.k_row, 1, p.k_row,
                 p.columns - j < 64 ? p.columns - j : 64, p.depth, p.q_zero_point, p.k_zero_point);
    for (int j = 0; j < p.width; j += 64)
      pack_panel(values + j / 64 * key_quads * 256, value_bias + j, v + j, p.v_row, 1,
                 p.width - j < 64 ? p.width - j : 64, p.columns, 0, p.v_zero_point);
    for (int row = 0; row < p.rows; row += ROWS) {
      const int rows = p.rows - row < ROWS ? p.rows - row : ROWS;
      int32_t start[8], totals[8];
      ConvTile t = {};
      t.multiplier = scales;
      t.start = start;
      for (int r = 0; r < rows; ++r) {
        t.x[r] = q + (row + r) * p.q_row;
        t.y[r] = static_cast<int64_t>(r) * KEYS * 4;
        start[r] = 0;
        for (int c = 0; c < p.depth; ++c) start[r] += t.x[r][c];
        start[r] *= 128 - p.k_zero_point;
      }
      multiply_panels(score, t, to, keys, key_bias, p.columns, rows);
      for (int r = 0; r < rows; ++r) {
        const float* from = scores + r * KEYS;
        uint8_t* codes = weights + r * (KEYS + 64);
        __m256 top = _mm256_set1_ps(-INFINITY);
        for (int i = 0; i < p.columns; i += 8)
          top = _mm256_max_ps(
              top, _mm256_blendv_ps(top, _mm256_loadu_ps(from + i),
                                    _mm256_castsi256_ps(mask_of(p.columns - i))));
        const __m256 largest = _mm256_set1_ps(largest_of(top));
        totals[r] = 0;
        for (int i = 0; i < p.columns; i += 8)
          quantizer.store(codes + i, exp_of(_mm256_sub_ps(_mm256_loadu_ps(from + i), largest)),
                          p.columns - i);
        for (int i = 0; i < p.columns; ++i) totals[r] += codes[i];
        start[r] = (128 - p.v_zero_point) * totals[r];
        t.x[r] = codes;
        t.y[r] = static_cast<int64_t>(r) * 128 * 4;
      }
      multiply_panels(product, t, to, values, value_bias, p.width, rows);
      for (int r = 0; r < rows; ++r) {
        const __m256 total = _mm256_set1_ps(totals[r] ? static_cast<float>(totals[r]) : 1.0f);
        const MeanOfValues mean = {sums + 128 * r, total, _mm256_set1_ps(p.multiplier)};
        map_codes(y + (row + r) * p.y_row, p.width, to, mean);
      }
    }
  }
}

}  // namespace FXQUANT_WIDE
}  // namespace fxquant

FXQUANT_TARGET_END
