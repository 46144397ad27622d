// Convolution and linear layers for AMX: products on tiles, sums stored by AVX-512.
#pragma once
#include "amx_pixels.h"

FXQUANT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,amx-tile,amx-int8")

namespace fxquant {
namespace amx {

enum Store { CODES, CODES_WITH_RESIDUAL, GELU_CODES, OTHERS };

// Stores the rows of a tile whose bits are set, from sums of 64 outputs a row.
using StoreRows = void (*)(const ConvParams&, const ConvTile&, const Codes&, uint32_t,
                           const int32_t*);

template <int VECTORS, int STORE>
static void store_rows(const ConvParams& p, const ConvTile& t, const Codes& given, uint32_t rows,
                       const int32_t* sums) {
  const Codes to = given;
  for (; rows; rows &= rows - 1) {
    const int row = __builtin_ctz(rows);
    const int32_t* from = sums + row * 64;
    if (STORE == OTHERS) {
      conv_store_others<VECTORS>(p, t, to, row, from);
    } else if (STORE == GELU_CODES) {
      conv_store_gelu<VECTORS>(p, t, to, row, from);
    } else {
      __m512i words[VECTORS];
      FXQUANT_UNROLL
      for (int v = 0; v < VECTORS; ++v) words[v] = _mm512_load_si512(from + 16 * v);
      conv_store_row<VECTORS, STORE == CODES_WITH_RESIDUAL>(p, t, to, row, words);
    }
  }
}

template <int STORE>
static StoreRows store_of(int vectors) {
  return vectors == 4   ? store_rows<4, STORE>
         : vectors == 3 ? store_rows<3, STORE>
         : vectors == 2 ? store_rows<2, STORE>
                        : store_rows<1, STORE>;
}

static inline StoreRows store_of(const ConvParams& p, int vectors) {
  return p.kind == 3                  ? store_of<GELU_CODES>(vectors)
         : p.kind != 0                ? store_of<OTHERS>(vectors)
         : p.residual                 ? store_of<CODES_WITH_RESIDUAL>(vectors)
                                      : store_of<CODES>(vectors);
}

// The sums of two tiles that are found and not yet stored. A few rows become codes between the
// multiplications of the next tiles, so that both units have something to do.
struct PendingRows {
  const ConvParams& p;
  const Codes to;
  ConvTile t;
  StoreRows store;
  const PixelTile* tiles;
  const int32_t* sums;      // 64 a row, 16 rows a tile
  int at, end;              // rows
  int each;                 // a power of 2 up to 16: rows to be stored with a step of the products

  explicit PendingRows(const ConvParams& params)
      : p(params), to(codes_of(params)), t{}, store(nullptr), tiles(nullptr), sums(nullptr), at(0),
        end(0), each(16) {}

  void take(const ConvTile& tile, const PixelTile* pixels, int count, const int32_t* found) {
    t = tile;
    store = store_of(p, (tile.outputs + 15) / 16);
    tiles = pixels;
    sums = found;
    at = 0;
    end = 16 * count;
  }

  // All are to be stored within so many steps, where that takes longer than the products.
  void spread(int steps) {
    each = p.kind == 3 ? 2 : 0;
    while (each && each < 16 && each * steps < end) each *= 2;
  }

  void some() {
    if (!each || at == end) return;
    const PixelTile& tile = tiles[at / 16];
    const uint32_t rows = static_cast<uint32_t>(tile.stored) & ((1u << each) - 1) << at % 16;
    t.y = tile.y;
    t.residual = tile.residual;
    if (rows) store(p, t, to, rows, sums + at / 16 * 16 * 64);
    at += each;
  }

  void all() {
    for (each = 16, at &= ~15; at < end;) some();
  }
};

// The sums of PIXELS tiles times OUTPUTS * 16 outputs, into `sums` of 64 outputs a row.
template <int PIXELS, int OUTPUTS, bool TAIL>
static inline void multiply_tiles(const ConvParams& p, const PixelTile* tiles, const int8_t* weight,
                                  const int32_t* bias, int64_t x_offset, int32_t* sums,
                                  PendingRows& pending) {
  const int full = p.segment_quads / 16;
  const int64_t step = p.x_column;
  _tile_loadd(0, bias, 0);
  if (OUTPUTS > 1) _tile_loadd(1, bias + 16, 0);
  if (PIXELS > 1) _tile_loadd(2, bias, 0);
  if (PIXELS > 1 && OUTPUTS > 1) _tile_loadd(3, bias + 16, 0);
  for (int s = 0; s < p.segments; ++s) {
    const int64_t at = x_offset + p.segment_offset[s];
    const uint8_t* a = tiles[0].x + at;
    const uint8_t* b = tiles[PIXELS - 1].x + at;
    for (int k = 0; k < full; ++k, a += 64, b += 64, weight += 16 * 256) {
      _tile_loadd(4, a, step);
      if (TAIL) {
        // Tile 5 is the only one for weights.
        _tile_loadd(5, weight, 256);
        _tile_dpbusd(0, 4, 5);
        if (OUTPUTS > 1) {
          _tile_loadd(5, weight + 64, 256);
          _tile_dpbusd(1, 4, 5);
        }
        if (PIXELS > 1) {
          _tile_loadd(4, b, step);
          if (OUTPUTS > 1) {
            _tile_dpbusd(3, 4, 5);
            _tile_loadd(5, weight, 256);
          }
          _tile_dpbusd(2, 4, 5);
        }
      } else {
        _tile_loadd(6, weight, 256);
        if (PIXELS > 1) _tile_loadd(5, b, step);
        _tile_dpbusd(0, 4, 6);
        if (OUTPUTS > 1) {
          _tile_loadd(7, weight + 64, 256);
          _tile_dpbusd(1, 4, 7);
        }
        if (PIXELS > 1) {
          _tile_dpbusd(2, 5, 6);
          if (OUTPUTS > 1) _tile_dpbusd(3, 5, 7);
        }
      }
      pending.some();
    }
    if (TAIL) {
      _tile_loadd(6, a, step);
      _tile_loadd(7, weight, 256);
      _tile_dpbusd(0, 6, 7);
      if (OUTPUTS > 1) {
        _tile_loadd(7, weight + 64, 256);
        _tile_dpbusd(1, 6, 7);
      }
      if (PIXELS > 1) {
        _tile_loadd(6, b, step);
        if (OUTPUTS > 1) {
          _tile_dpbusd(3, 6, 7);
          _tile_loadd(7, weight, 256);
        }
        _tile_dpbusd(2, 6, 7);
      }
      weight += p.segment_quads % 16 * 256;
      pending.some();
    }
  }
  _tile_stored(0, sums, 256);
  if (OUTPUTS > 1) _tile_stored(1, sums + 16, 256);
  if (PIXELS > 1) _tile_stored(2, sums + 16 * 64, 256);
  if (PIXELS > 1 && OUTPUTS > 1) _tile_stored(3, sums + 16 * 64 + 16, 256);
}

using MultiplyTiles = void (*)(const ConvParams&, const PixelTile*, const int8_t*, const int32_t*,
                               int64_t, int32_t*, PendingRows&);
static const MultiplyTiles multiply[2][2][2] = {
    {{multiply_tiles<1, 1, false>, multiply_tiles<1, 1, true>},
     {multiply_tiles<1, 2, false>, multiply_tiles<1, 2, true>}},
    {{multiply_tiles<2, 1, false>, multiply_tiles<2, 1, true>},
     {multiply_tiles<2, 2, false>, multiply_tiles<2, 2, true>}}};

// The products of one pair of tiles are on their way while the sums of the pair before become codes.
static inline void conv_tiles(const ConvParams& p, const PixelTile* tiles, int count, int from,
                              int to_panel) {
  enum { PAIR = 2 * 16 * 64 };
  alignas(64) int32_t sums[2 * PAIR];
  const int panels = (p.outputs + 63) / 64;
  const bool tail = p.segment_quads % 16 != 0;
  const int steps = p.segments * ((p.segment_quads + 15) / 16);
  PendingRows pending(p);
  int parity = 0;
  for (int panel = from; panel < to_panel; ++panel) {
    const ConvTile t = conv_tile_of(p, panel / panels, panel % panels);
    const int vectors = (t.outputs + 15) / 16;
    for (int first = 0; first < count; first += 2, parity ^= 1) {
      const int pair = count - first > 1;
      int32_t* here = sums + parity * PAIR;
      pending.spread((vectors + 1) / 2 * steps);
      for (int v = 0; v < vectors; v += 2)
        multiply[pair][vectors - v > 1][tail](p, tiles + first, t.weight + 64 * v, t.bias + 16 * v,
                                              panel / panels * p.x_group, here + 16 * v, pending);
      pending.all();
      pending.take(t, tiles + first, pair + 1, here);
    }
  }
  pending.all();
}

static inline void conv(const ConvParams& given, int begin, int end) {
  ConvParams p = given;
  if (p.height * p.width == 1) {
    // Vectors: the images are the pixels of one row.
    p.width = p.batch;
    p.batch = 1;
    p.x_column = p.x_batch;
    p.y_pixel = p.y_batch;
    p.residual_pixel = p.residual_batch;
  }
  const int panels = (p.outputs + 63) / 64, all = p.batch * p.height * p.width;
  const int first = p.by_panels ? 0 : begin, last = p.by_panels ? all : end;
  if (first >= last || begin >= end) return;
  PixelWalk walk(p, first, last);
  // A tile of few pixels or few quads is mostly empty, and of few products moved for little.
  if (walk.rows < 4 || p.segment_quads < 4 || p.segments * p.segment_quads <= 8 || p.outputs < 16)
    return avx512vnni::conv(given, begin, end);
  configure_amx(walk.rows, p.segment_quads % 16);
  // Weights that the second cache does not hold are to be read seldom.
  enum { MOST = 32, LARGE = 1 << 19 };
  PixelTile tiles[MOST];
  const int64_t weights = static_cast<int64_t>(p.groups) * panels * p.segments * p.segment_quads * 256;
  const int block = weights > LARGE ? MOST : 8;
  const int from = p.by_panels ? begin : 0, to = p.by_panels ? end : p.groups * panels;
  for (bool more = true; more;) {
    int count = 0;
    while (count < block && (more = walk.next(tiles[count]))) ++count;
    if (count) conv_tiles(p, tiles, count, from, to);
  }
  release_amx();
}

}  // namespace amx
}  // namespace fxquant

FXQUANT_TARGET_END
