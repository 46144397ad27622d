// Kernels on registers of 256 bits. Included twice: by avx2.h, where products are widened to 16 bits
// and exact, and by avxvnni.h, where one instruction adds up four of them.
//
// FXQUANT_WIDE is the namespace, FXQUANT_DOT says whether vpdpbusd is there.

FXQUANT_TARGET_BEGIN(FXQUANT_FEATURES)

namespace fxquant {
namespace FXQUANT_WIDE {

// ------------------------------------------------------------------------- four products a lane

#if FXQUANT_DOT
struct Weights {
  __m256i bytes;
};
struct Inputs {
  __m256i bytes;
};
FXQUANT_INLINE Weights weights_of(__m256i bytes) { return {bytes}; }
FXQUANT_INLINE Inputs inputs_of(__m256i bytes) { return {bytes}; }
FXQUANT_INLINE void multiply_add(__m256i& sum, const Inputs& x, const Weights& w) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(x.bytes), "x"(w.bytes));
}
enum { ROWS = 6 };
#else
// Bytes 0 and 2, and bytes 1 and 3, of each lane as 16 bits.
struct Weights {
  __m256i even, odd;
};
struct Inputs {
  __m256i even, odd;
};
FXQUANT_INLINE Weights weights_of(__m256i bytes) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
}
FXQUANT_INLINE Inputs inputs_of(__m256i bytes) {
  return {_mm256_and_si256(bytes, _mm256_set1_epi32(0x00ff00ff)), _mm256_srli_epi16(bytes, 8)};
}
FXQUANT_INLINE void multiply_add(__m256i& sum, const Inputs& x, const Weights& w) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x.even, w.even));
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x.odd, w.odd));
}
enum { ROWS = 5 };
#endif

// --------------------------------------------------------------------------------- sums to codes

struct Codes {
  __m128i zero_point, lo, hi;
  const uint8_t* table;
};

template <class Params>
FXQUANT_INLINE Codes codes_of(const Params& p) {
  return {_mm_set1_epi16(static_cast<short>(p.zero_point)), _mm_set1_epi8(static_cast<char>(p.lo)),
          _mm_set1_epi8(static_cast<char>(p.hi)), p.table};
}

// 16 codes in their order; saturation before and after the zero point: the same code, as lo >= 0.
FXQUANT_INLINE __m128i packed(__m256 low, __m256 high, const Codes& to) {
  const __m256i words = _mm256_permute4x64_epi64(
      _mm256_packs_epi32(_mm256_cvtps_epi32(low), _mm256_cvtps_epi32(high)), 0xd8);
  const __m128i bytes =
      _mm_packus_epi16(_mm_adds_epi16(_mm256_castsi256_si128(words), to.zero_point),
                       _mm_adds_epi16(_mm256_extracti128_si256(words, 1), to.zero_point));
  return _mm_min_epu8(_mm_max_epu8(bytes, to.lo), to.hi);
}

FXQUANT_INLINE void store_codes(uint8_t* y, __m128i codes, int count, const uint8_t* table) {
  if (!table && count >= 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y), codes);
    return;
  }
  alignas(16) uint8_t bytes[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(bytes), codes);
  for (int i = 0; i < 16 && i < count; ++i) y[i] = table ? table[bytes[i]] : bytes[i];
}

FXQUANT_INLINE __m256 centered_bytes(const uint8_t* x, __m256i zero_point) {
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_cvtepu8_epi32(eight), zero_point));
}

// ---------------------------------------------------------------------------------- convolution

// Sixteen outputs of up to ROWS pixels.
struct ConvTile {
  const uint8_t* x[8];
  int64_t y[8], residual[8];
  const int8_t* weight;
  const int32_t* bias;
  const float* multiplier;
  const int32_t* start;     // or null: what each pixel's sums start with besides the bias
  int channel, outputs;
};

FXQUANT_INLINE void conv_store(const ConvParams& p, const ConvTile& t, const Codes& to, int row,
                               __m256i low, __m256i high) {
  __m256 a = _mm256_mul_ps(_mm256_cvtepi32_ps(low), _mm256_loadu_ps(t.multiplier));
  __m256 b = _mm256_mul_ps(_mm256_cvtepi32_ps(high), _mm256_loadu_ps(t.multiplier + 8));
  if (p.kind == 3) {
    const Quantizer quantizer = quantizer_of(p.inverse, p.zero_point, p.lo, p.hi);
    uint8_t* y = static_cast<uint8_t*>(p.y) + t.y[row] + t.channel;
    quantizer.store(y, gelu_of(a), t.outputs < 8 ? t.outputs : 8);
    if (t.outputs > 8) quantizer.store(y + 8, gelu_of(b), t.outputs - 8);
    return;
  }
  if (p.kind != 0) {
    float* y = reinterpret_cast<float*>(static_cast<char*>(p.y) + t.y[row]) + t.channel;
    _mm256_maskstore_ps(y, mask_of(t.outputs), p.kind == 1 ? _mm256_castsi256_ps(low) : a);
    _mm256_maskstore_ps(y + 8, mask_of(t.outputs - 8), p.kind == 1 ? _mm256_castsi256_ps(high) : b);
    return;
  }
  if (p.residual) {
    const uint8_t* residual = p.residual + t.residual[row] + t.channel;
    const __m256i zero_point = _mm256_set1_epi32(p.residual_zero_point);
    const __m256 multiplier = _mm256_set1_ps(p.residual_multiplier);
    a = _mm256_add_ps(a, _mm256_mul_ps(centered_bytes(residual, zero_point), multiplier));
    b = _mm256_add_ps(b, _mm256_mul_ps(centered_bytes(residual + 8, zero_point), multiplier));
  }
  store_codes(static_cast<uint8_t*>(p.y) + t.y[row] + t.channel, packed(a, b, to), t.outputs,
              p.table);
}

template <int PIXELS>
static void conv_block(const ConvParams& p, const ConvTile& t, const Codes& to) {
  __m256i sums[PIXELS][2];
  FXQUANT_UNROLL
  for (int r = 0; r < PIXELS; ++r) {
    sums[r][0] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(t.bias));
    sums[r][1] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(t.bias + 8));
    if (t.start) {
      const __m256i start = _mm256_set1_epi32(t.start[r]);
      sums[r][0] = _mm256_add_epi32(sums[r][0], start);
      sums[r][1] = _mm256_add_epi32(sums[r][1], start);
    }
  }
  const int8_t* weight = t.weight;
  for (int s = 0; s < p.segments; ++s) {
    int64_t at = p.segment_offset[s];
    const int64_t last = at + 4 * static_cast<int64_t>(p.segment_quads);
    for (; at != last; at += 4, weight += 256) {
      const __m256i* vector = reinterpret_cast<const __m256i*>(weight);
      const Weights low = weights_of(_mm256_loadu_si256(vector));
      const Weights high = weights_of(_mm256_loadu_si256(vector + 1));
      FXQUANT_UNROLL
      for (int r = 0; r < PIXELS; ++r) {
        int32_t four;
        memcpy(&four, t.x[r] + at, 4);
        const Inputs input = inputs_of(_mm256_set1_epi32(four));
        multiply_add(sums[r][0], input, low);
        multiply_add(sums[r][1], input, high);
      }
    }
  }
  FXQUANT_UNROLL
  for (int r = 0; r < PIXELS; ++r) conv_store(p, t, to, r, sums[r][0], sums[r][1]);
}

using ConvBlock = void (*)(const ConvParams&, const ConvTile&, const Codes&);
static const ConvBlock conv_blocks[6] = {conv_block<1>, conv_block<2>, conv_block<3>,
                                         conv_block<4>, conv_block<5>, conv_block<6>};

// Where the pixels of a tile lie; `ox`, `oy` and `n` go on to the next pixel.
static inline void place_pixels(const ConvParams& p, ConvTile& t, int rows, int group, int& ox,
                                int& oy, int& n) {
  for (int r = 0; r < rows; ++r) {
    t.x[r] = p.x + n * p.x_batch + oy * p.x_row + ox * p.x_column + group * p.x_group;
    t.y[r] = n * p.y_batch + oy * p.y_row + ox * p.y_pixel;
    t.residual[r] = n * p.residual_batch + oy * p.residual_row + ox * p.residual_pixel;
    if (++ox == p.width) {
      ox = 0;
      if (++oy == p.height) oy = 0, ++n;
    }
  }
}

static inline void set_part(const ConvParams& p, ConvTile& t, int index, int part) {
  const int panels = (p.outputs + 63) / 64, panel = index % panels;
  t.weight = p.weight + static_cast<int64_t>(index) * p.segments * p.segment_quads * 256 + 4 * part;
  t.bias = p.bias + static_cast<int64_t>(index) * 64 + part;
  t.multiplier = p.multiplier + static_cast<int64_t>(index) * 64 + part;
  t.channel = index / panels * p.outputs + panel * 64 + part;
  t.outputs = p.outputs - panel * 64 - part;
  if (t.outputs > 16) t.outputs = 16;
}

#if !FXQUANT_DOT
enum { MOST_WIDE = 12288, MOST_TILES = 32, MOST_WIDE_QUADS = 256 };

// The inputs of a tile in 16 bits, [quads][pixels][bytes 0 and 2, bytes 1 and 3]: they are read
// once for each 16 outputs, and widening costs as much as a multiplication.
static inline void widen(const ConvParams& p, const ConvTile& t, int pixels, int32_t* wide) {
  const __m128i low = _mm_set1_epi32(0x00ff00ff);
  for (int r = 0; r < pixels; ++r) {
    char* to = reinterpret_cast<char*>(wide + 2 * r);
    const int64_t step = 8 * pixels;
    for (int s = 0; s < p.segments; ++s) {
      const uint8_t* x = t.x[r] + p.segment_offset[s];
      int quad = 0;
      for (; quad + 4 <= p.segment_quads; quad += 4, x += 16, to += 4 * step) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
        const __m128i even = _mm_and_si128(bytes, low), odd = _mm_srli_epi16(bytes, 8);
        const __m128 first = _mm_castsi128_ps(_mm_unpacklo_epi32(even, odd));
        const __m128 second = _mm_castsi128_ps(_mm_unpackhi_epi32(even, odd));
        _mm_storel_pi(reinterpret_cast<__m64*>(to), first);
        _mm_storeh_pi(reinterpret_cast<__m64*>(to + step), first);
        _mm_storel_pi(reinterpret_cast<__m64*>(to + 2 * step), second);
        _mm_storeh_pi(reinterpret_cast<__m64*>(to + 3 * step), second);
      }
      for (; quad < p.segment_quads; ++quad, x += 4, to += step) {
        uint32_t four;
        memcpy(&four, x, 4);
        const uint32_t pair[2] = {four & 0x00ff00ff, four >> 8 & 0x00ff00ff};
        memcpy(to, pair, 8);
      }
    }
  }
}

// The weights of 16 outputs in 16 bits, [quads][even, odd][low, high]: worth it where several tiles
// read them.
static inline void widen_weights(const int8_t* weight, int quads, __m256i* wide) {
  for (int quad = 0; quad < quads; ++quad, weight += 256, wide += 4) {
    const __m256i* vector = reinterpret_cast<const __m256i*>(weight);
    const Weights low = weights_of(_mm256_loadu_si256(vector));
    const Weights high = weights_of(_mm256_loadu_si256(vector + 1));
    wide[0] = low.even, wide[1] = high.even, wide[2] = low.odd, wide[3] = high.odd;
  }
}

template <int PIXELS, bool WIDE_WEIGHTS>
static void conv_wide_block(const ConvParams& p, const ConvTile& t, const Codes& to,
                            const int32_t* wide, const __m256i* wide_weights) {
  __m256i sums[PIXELS][2];
  FXQUANT_UNROLL
  for (int r = 0; r < PIXELS; ++r) {
    sums[r][0] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(t.bias));
    sums[r][1] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(t.bias + 8));
  }
  const int8_t* weight = t.weight;
  const int quads = p.segments * p.segment_quads;
  for (int quad = 0; quad < quads; ++quad, weight += 256, wide_weights += 4, wide += 2 * PIXELS) {
    Weights low, high;
    if (WIDE_WEIGHTS) {
      low = {wide_weights[0], wide_weights[2]};
      high = {wide_weights[1], wide_weights[3]};
    } else {
      const __m256i* vector = reinterpret_cast<const __m256i*>(weight);
      low = weights_of(_mm256_loadu_si256(vector));
      high = weights_of(_mm256_loadu_si256(vector + 1));
    }
    FXQUANT_UNROLL
    for (int r = 0; r < PIXELS; ++r) {
      const __m256i even = _mm256_set1_epi32(wide[2 * r]);
      sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(even, low.even));
      sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(even, high.even));
      const __m256i odd = _mm256_set1_epi32(wide[2 * r + 1]);
      sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(odd, low.odd));
      sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(odd, high.odd));
    }
  }
  FXQUANT_UNROLL
  for (int r = 0; r < PIXELS; ++r) conv_store(p, t, to, r, sums[r][0], sums[r][1]);
}

using ConvWideBlock = void (*)(const ConvParams&, const ConvTile&, const Codes&, const int32_t*,
                               const __m256i*);
static const ConvWideBlock conv_wide_blocks[2][5] = {
    {conv_wide_block<1, false>, conv_wide_block<2, false>, conv_wide_block<3, false>,
     conv_wide_block<4, false>, conv_wide_block<5, false>},
    {conv_wide_block<1, true>, conv_wide_block<2, true>, conv_wide_block<3, true>,
     conv_wide_block<4, true>, conv_wide_block<5, true>}};

// The pixels of a run, as many tiles at a time as fit in 16 bits; 0 where not even one does.
static inline int conv_wide_range(const ConvParams& p, int first, int last, int from,
                                  int to_panel) {
  const int panels = (p.outputs + 63) / 64, quads = p.segments * p.segment_quads;
  const int tiles = (last - first + ROWS - 1) / ROWS, room = ROWS * quads * 2;
  if (room > MOST_WIDE) return 0;
  alignas(32) int32_t wide[MOST_WIDE];
  __m256i weights[4 * MOST_WIDE_QUADS];
  const int most = MOST_WIDE / room < MOST_TILES ? MOST_WIDE / room : MOST_TILES;
  const Codes to = codes_of(p);
  ConvTile at[MOST_TILES];
  for (int group = from / panels; group * panels < to_panel; ++group) {
    const int begin = group * panels > from ? group * panels : from;
    const int end = (group + 1) * panels < to_panel ? (group + 1) * panels : to_panel;
    int ox = first % p.width, oy = first / p.width % p.height, n = first / p.width / p.height;
    for (int done = 0; done < tiles; done += most) {
      const int count = tiles - done < most ? tiles - done : most;
      int rows[MOST_TILES];
      for (int i = 0; i < count; ++i) {
        rows[i] = (last - first) / tiles + (done + i < (last - first) % tiles);
        place_pixels(p, at[i], rows[i], group, ox, oy, n);
        widen(p, at[i], rows[i], wide + i * room);
      }
      for (int index = begin; index < end; ++index)
        for (int part = 0; part < 64 && index % panels * 64 + part < p.outputs; part += 16) {
          const bool widened = quads <= MOST_WIDE_QUADS && count > 1;
          for (int i = 0; i < count; ++i) {
            set_part(p, at[i], index, part);
            if (widened && !i) widen_weights(at[i].weight, quads, weights);
            conv_wide_blocks[widened][rows[i] - 1](p, at[i], to, wide + i * room, weights);
          }
        }
    }
  }
  return 1;
}
#endif

// The pixels of a run in tiles, each with all the outputs: a tile's inputs stay in the first cache.
static inline void conv_range(const ConvParams& p, int first, int last, int from, int to_panel) {
#if !FXQUANT_DOT
  if (conv_wide_range(p, first, last, from, to_panel)) return;
#endif
  const int panels = (p.outputs + 63) / 64;
  const Codes to = codes_of(p);
  const int tiles = (last - first + ROWS - 1) / ROWS;
  ConvTile t = {};
  for (int i = from; i < to_panel; ++i)
    for (int part = 0; part < 64 && i % panels * 64 + part < p.outputs; part += 16) {
      set_part(p, t, i, part);
      int ox = first % p.width, oy = first / p.width % p.height, n = first / p.width / p.height;
      for (int tile = 0; tile < tiles; ++tile) {
        const int rows = (last - first) / tiles + (tile < (last - first) % tiles);
        place_pixels(p, t, rows, i / panels, ox, oy, n);
        conv_blocks[rows - 1](p, t, to);
      }
    }
}

static inline void conv(const ConvParams& p, int begin, int end) {
  const int panels = (p.outputs + 63) / 64, all = p.batch * p.height * p.width;
  const int first = p.by_panels ? 0 : begin, last = p.by_panels ? all : end;
  const int blocks = (last - first + 127) / 128;
  for (int block = 0, at = first; block < blocks; ++block) {
    const int count = (last - first) / blocks + (block < (last - first) % blocks);
    conv_range(p, at, at + count, p.by_panels ? begin : 0,
               p.by_panels ? end : p.groups * panels);
    at += count;
  }
}

// ------------------------------------------------------------------------------------ depthwise

// Rows a, b, c, d of 32 channels as quads: channels 4 v to 4 v + 3 of either 16, for v = 0 to 3.
struct Quads {
  Inputs of[4];
};

FXQUANT_INLINE Quads quads_of(const uint8_t* x, int64_t row, int rows) {
  const __m256i* at[4];
  for (int i = 0; i < 4; ++i)
    at[i] = reinterpret_cast<const __m256i*>(x + (i < rows ? i : 0) * row);
  const __m256i a = _mm256_loadu_si256(at[0]), b = _mm256_loadu_si256(at[1]);
  const __m256i c = _mm256_loadu_si256(at[2]), d = _mm256_loadu_si256(at[3]);
  const __m256i ab = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
  const __m256i cd = _mm256_unpacklo_epi8(c, d), cd_high = _mm256_unpackhi_epi8(c, d);
  return {{inputs_of(_mm256_unpacklo_epi16(ab, cd)), inputs_of(_mm256_unpackhi_epi16(ab, cd)),
           inputs_of(_mm256_unpacklo_epi16(ab_high, cd_high)),
           inputs_of(_mm256_unpackhi_epi16(ab_high, cd_high))}};
}

// The packed order has channels 0-3, 8-11, 16-19, 24-27 in one vector and the others in the next.
FXQUANT_INLINE __m256i two_fours(const void* packed_lanes, int v) {
  const char* four = static_cast<const char*>(packed_lanes) + v % 2 * 64 + v / 2 * 16;
  return _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(four))),
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(four + 32)), 1);
}

static inline void depthwise_store(const DepthwiseConvParams& p, const Codes& to, int64_t y_offset,
                                   int64_t residual_offset, int channel, const __m256i* sums) {
  const int count = p.channels - channel < 32 ? p.channels - channel : 32;
  __m256 real[4];
  for (int v = 0; v < 4; ++v)
    real[v] = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[v]),
                            _mm256_castsi256_ps(two_fours(p.multiplier + channel, v)));
  if (p.kind == 2 || p.residual) {
    alignas(32) float values[32];
    for (int v = 0; v < 4; ++v) {
      _mm_store_ps(values + 4 * v, _mm256_castps256_ps128(real[v]));
      _mm_store_ps(values + 16 + 4 * v, _mm256_extractf128_ps(real[v], 1));
    }
    char* y = static_cast<char*>(p.y) + y_offset;
    for (int c = 0; c < count; ++c) {
      if (p.kind == 2) {
        reinterpret_cast<float*>(y)[channel + c] = values[c];
        continue;
      }
      const int32_t centered = p.residual[residual_offset + channel + c] - p.residual_zero_point;
      const float sum = values[c] + static_cast<float>(centered) * p.residual_multiplier;
      reinterpret_cast<uint8_t*>(y)[channel + c] =
          portable::to_code(sum, p.zero_point, p.lo, p.hi, p.table);
    }
    return;
  }
  // Packing interleaves the lower and the upper channels just as they are stored.
  const __m256i zero_point = _mm256_set1_epi16(static_cast<short>(p.zero_point));
  const __m256i low = _mm256_adds_epi16(
      _mm256_packs_epi32(_mm256_cvtps_epi32(real[0]), _mm256_cvtps_epi32(real[1])), zero_point);
  const __m256i high = _mm256_adds_epi16(
      _mm256_packs_epi32(_mm256_cvtps_epi32(real[2]), _mm256_cvtps_epi32(real[3])), zero_point);
  const __m256i bytes = _mm256_packus_epi16(low, high);
  const __m128i first =
      _mm_min_epu8(_mm_max_epu8(_mm256_castsi256_si128(bytes), to.lo), to.hi);
  const __m128i second =
      _mm_min_epu8(_mm_max_epu8(_mm256_extracti128_si256(bytes, 1), to.lo), to.hi);
  uint8_t* y = static_cast<uint8_t*>(p.y) + y_offset + channel;
  store_codes(y, first, count, p.table);
  if (count > 16) store_codes(y + 16, second, count - 16, p.table);
}

template <int KERNEL>
static void depthwise_row(const DepthwiseConvParams& p, const uint8_t* x, int64_t y_offset,
                          int64_t residual_offset, int channel, const Codes& to) {
  enum { QUADS = (KERNEL + 3) / 4 };
  const int8_t* packed_weights = p.weight + static_cast<int64_t>(channel / 32) * KERNEL * QUADS * 128;
  Weights weights[KERNEL * QUADS][4];
  for (int i = 0; i < KERNEL * QUADS; ++i)
    for (int v = 0; v < 4; ++v) weights[i][v] = weights_of(two_fours(packed_weights + 128 * i, v));
  // Columns wait here until the windows that hold them have passed.
  Quads columns[8][QUADS];
  int loaded = 0;
  for (int ox = 0; ox < p.width; ++ox) {
    const int first = ox * p.stride_width;
    for (; loaded < first + KERNEL; ++loaded)
      for (int quad = 0; quad < QUADS; ++quad)
        columns[loaded % 8][quad] =
            quads_of(x + loaded * p.x_pixel + 4 * quad * p.x_row, p.x_row, KERNEL - 4 * quad);
    __m256i sums[4];
    FXQUANT_UNROLL
    for (int v = 0; v < 4; ++v) sums[v] = two_fours(p.bias + channel, v);
    FXQUANT_UNROLL
    for (int kx = 0; kx < KERNEL; ++kx) {
      const Quads* column = columns[(first + kx) % 8];
      FXQUANT_UNROLL
      for (int quad = 0; quad < QUADS; ++quad) {
        FXQUANT_UNROLL
        for (int v = 0; v < 4; ++v)
          multiply_add(sums[v], column[quad].of[v], weights[kx * QUADS + quad][v]);
      }
    }
    depthwise_store(p, to, y_offset + ox * p.y_pixel, residual_offset + ox * p.residual_pixel,
                    channel, sums);
  }
}

static inline void depthwise_conv(const DepthwiseConvParams& p, int begin, int end) {
  const int kernel = p.kernel_width;
  if (kernel != p.kernel_height || (kernel != 3 && kernel != 5 && kernel != 7))
    return portable::depthwise_conv(p, begin, end);
  const auto row = kernel == 3 ? depthwise_row<3> : kernel == 5 ? depthwise_row<5> : depthwise_row<7>;
  const Codes to = codes_of(p);
  for (int item = begin; item < end; ++item) {
    const int n = item / p.height, oy = item % p.height;
    for (int channel = 0; channel < p.channels; channel += 32)
      row(p, p.x + n * p.x_batch + oy * p.stride_height * p.x_row + channel,
          n * p.y_batch + oy * p.y_row, n * p.residual_batch + oy * p.residual_row, channel, to);
  }
}

// ---------------------------------------------------------------------------------- elementwise

// y = clamp(round(value.at(i))) for `count` codes, eight at a time.
template <class Value>
FXQUANT_INLINE void map_codes(uint8_t* y, int count, const Codes& to, const Value& value) {
  for (int i = 0; i < count; i += 16)
    store_codes(y + i, packed(value.at(i), value.at(i + 8), to), count - i, to.table);
}

struct SumOfTwo {
  const uint8_t *a, *b;
  __m256i a_zero_point, b_zero_point;
  __m256 a_multiplier, b_multiplier;

  FXQUANT_INLINE_MEMBER __m256 at(int i) const {
    return _mm256_add_ps(_mm256_mul_ps(centered_bytes(a + i, a_zero_point), a_multiplier),
                         _mm256_mul_ps(centered_bytes(b + i, b_zero_point), b_multiplier));
  }
};

static inline void add(const AddParams& p, int begin, int end) {
  const Codes to = codes_of(p);
  SumOfTwo sum = {nullptr,
                  nullptr,
                  _mm256_set1_epi32(p.a_zero_point),
                  _mm256_set1_epi32(p.b_zero_point),
                  _mm256_set1_ps(p.a_multiplier),
                  _mm256_set1_ps(p.b_multiplier)};
  for (int item = begin; item < end; ++item) {
    const int n = item / p.height, oy = item % p.height;
    sum.a = p.a + n * p.a_batch + oy * p.a_row;
    sum.b = p.b + n * p.b_batch + oy * p.b_row;
    uint8_t* y = p.y + n * p.y_batch + oy * p.y_row;
    for (int ox = 0; ox < p.width; ++ox, y += p.y_pixel) {
      map_codes(y, p.channels, to, sum);
      sum.a += p.a_pixel;
      sum.b += p.b_pixel;
    }
  }
}

// A product of two centred codes is exact in float32.
struct ProductOfTwo {
  const uint8_t *a, *b;
  __m256i a_zero_point, b_zero_point;
  __m256 multiplier;

  FXQUANT_INLINE_MEMBER __m256 at(int i) const {
    return _mm256_mul_ps(_mm256_mul_ps(centered_bytes(a + i, a_zero_point),
                                       centered_bytes(b + i, b_zero_point)),
                         multiplier);
  }
};

static inline void mul(const MulParams& p, int begin, int end) {
  const Codes to = codes_of(p);
  ProductOfTwo product = {nullptr, nullptr, _mm256_set1_epi32(p.a_zero_point),
                          _mm256_set1_epi32(p.b_zero_point), _mm256_set1_ps(p.multiplier)};
  for (int item = begin; item < end; ++item) {
    const int n = item / p.height, oy = item % p.height;
    product.a = p.a + n * p.a_batch + oy * p.a_row;
    product.b = p.b + n * p.b_batch + oy * p.b_row;
    uint8_t* y = p.y + n * p.y_batch + oy * p.y_row;
    for (int ox = 0; ox < p.width; ++ox, y += p.y_pixel) {
      map_codes(y, p.channels, to, product);
      product.a += p.a_pixel;
      product.b += p.b_pixel;
    }
  }
}

struct Affine {
  const uint8_t* x;
  const float *multiplier, *offset;
  __m256i zero_point;

  FXQUANT_INLINE_MEMBER __m256 at(int i) const {
    return _mm256_add_ps(
        _mm256_mul_ps(centered_bytes(x + i, zero_point), _mm256_loadu_ps(multiplier + i)),
        _mm256_loadu_ps(offset + i));
  }
};

static inline void channel_affine(const ChannelAffineParams& p, int begin, int end) {
  const Codes to = codes_of(p);
  Affine affine = {nullptr, p.multiplier, p.offset, _mm256_set1_epi32(p.x_zero_point)};
  for (int item = begin; item < end; ++item) {
    affine.x = p.x + item / p.height * p.x_batch + item % p.height * p.x_row;
    uint8_t* y = p.y + item / p.height * p.y_batch + item % p.height * p.y_row;
    for (int ox = 0; ox < p.width; ++ox, affine.x += p.x_pixel, y += p.y_pixel)
      map_codes(y, p.channels, to, affine);
  }
}

// -------------------------------------------------------------------------------------- pooling

static inline void max_pool(const MaxPoolParams& p, int begin, int end) {
  for (int item = begin; item < end; ++item) {
    const int n = item / p.height, oy = item % p.height;
    const int top = p.row_range[2 * oy], bottom = p.row_range[2 * oy + 1];
    const uint8_t* image = p.x + n * p.x_batch;
    uint8_t* y = p.y + n * p.y_batch + oy * p.y_row;
    for (int ox = 0; ox < p.width; ++ox, y += p.y_pixel) {
      const int left = p.column_range[2 * ox], right = p.column_range[2 * ox + 1];
      for (int channel = 0; channel < p.channels; channel += 16) {
        __m128i largest = _mm_setzero_si128();
        for (int iy = top; iy < bottom; iy += p.row_step) {
          const uint8_t* x = image + iy * p.x_row + left * p.x_pixel + channel;
          for (int ix = left; ix < right; ix += p.column_step, x += p.column_step * p.x_pixel)
            largest = _mm_max_epu8(largest, _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
        }
        store_codes(y + channel, largest, p.channels - channel, nullptr);
      }
    }
  }
}

struct Mean {
  const __m256i* sums;
  __m256i centre;
  __m256 multiplier;

  FXQUANT_INLINE_MEMBER __m256 at(int i) const {
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(sums[i / 8], centre)), multiplier);
  }
};

static inline void avg_pool(const AvgPoolParams& p, int begin, int end) {
  const int blocks = (p.channels + 63) / 64;
  const Codes to = codes_of(p);
  for (int item = begin; item < end; ++item) {
    const int block = item % blocks, oy = item / blocks % p.height, n = item / blocks / p.height;
    const int rest = p.channels - 64 * block < 64 ? p.channels - 64 * block : 64;
    const int top = p.row_range[2 * oy], bottom = p.row_range[2 * oy + 1];
    uint8_t* y = p.y + n * p.y_batch + oy * p.y_row + 64 * block;
    for (int ox = 0; ox < p.width; ++ox, y += p.y_pixel) {
      const int left = p.column_range[2 * ox], right = p.column_range[2 * ox + 1];
      for (int part = 0; part < rest; part += 16) {
        __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        for (int iy = top; iy < bottom; ++iy) {
          const uint8_t* x =
              p.x + n * p.x_batch + iy * p.x_row + left * p.x_pixel + 64 * block + part;
          for (int ix = left; ix < right; ++ix, x += p.x_pixel) {
            const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
            sums[0] = _mm256_add_epi32(sums[0], _mm256_cvtepu8_epi32(codes));
            sums[1] = _mm256_add_epi32(sums[1], _mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8)));
          }
        }
        const Mean mean = {sums,
                           _mm256_set1_epi32((bottom - top) * (right - left) * p.x_zero_point),
                           _mm256_set1_ps(p.multiplier[oy * p.width + ox])};
        map_codes(y + part, rest - part < 16 ? rest - part : 16, to, mean);
      }
    }
  }
}

// ------------------------------------------------------------------------------------ quantizers

static inline void quantize(const QuantizeParams& p, int begin, int end) {
  const bool image = p.channels == 3 && p.fill_channels == 4 && p.y_pixel == 4 && p.x_column == 1;
  const bool tokens = p.x_channel == 1 && p.fill_channels == p.channels;
  if (!image && !tokens) return portable::quantize(p, begin, end);
  const Quantizer quantizer = quantizer_of(p.inverse, p.zero_point, p.lo, p.hi);
  const int whole = p.width / 8 * 8;
  for (int item = begin; item < end; ++item) {
    const int n = item / p.height, oy = item % p.height;
    const float* x = p.x + n * p.x_batch + oy * p.x_row;
    uint8_t* y = p.y + n * p.y_batch + oy * p.y_row;
    if (!image) {
      for (int ox = 0; ox < p.width; ++ox, x += p.x_column, y += p.y_pixel)
        for (int i = 0; i < p.channels; i += 8)
          quantizer.store(y + i, _mm256_maskload_ps(x + i, mask_of(p.channels - i)),
                          p.channels - i < 8 ? p.channels - i : 8);
      continue;
    }
    for (int i = 0; i < whole; i += 8) {
      const __m256i red = quantizer.codes(_mm256_loadu_ps(x + i));
      const __m256i green = quantizer.codes(_mm256_loadu_ps(x + p.x_channel + i));
      const __m256i blue = quantizer.codes(_mm256_loadu_ps(x + 2 * p.x_channel + i));
      const __m256i pixels = _mm256_or_si256(
          red, _mm256_or_si256(_mm256_slli_epi32(green, 8), _mm256_slli_epi32(blue, 16)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + 4 * i), pixels);
    }
    for (int i = whole; i < p.width; ++i)
      for (int c = 0; c < 4; ++c)
        y[4 * i + c] = c == 3 ? 0
                              : portable::quantized(x[c * p.x_channel + i], p.inverse,
                                                    p.zero_point, p.lo, p.hi);
  }
}

}  // namespace FXQUANT_WIDE
}  // namespace fxquant

FXQUANT_TARGET_END
