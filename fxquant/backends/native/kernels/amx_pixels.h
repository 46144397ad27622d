// The output pixels of a convolution in tiles of AMX.
#pragma once
#include "amx.h"

namespace fxquant {
namespace amx {

// Up to 16 output pixels whose windows are `x_column` apart, and where their codes go.
struct PixelTile {
  const uint8_t* x;
  int stored;               // bit i: pixel i is to be stored
  int64_t y[16], residual[16];
};

// Output pixels as lines of positions a constant distance apart: a row, a whole image in which the
// input's border makes positions that no pixel has, or all images where nothing is between them. A
// line's last tile is moved back to its end.
struct PixelWalk {
  const ConvParams& p;
  int pitch;                // positions from row to row of an image that is one line, else 0
  int images;               // of a line
  int line_pixels, positions, rows, lines;
  int line, at, from, to;   // positions [from, to) of this line are wanted; `at` is the next
  int begin, end;

  PixelWalk(const ConvParams& params, int first, int last) : p(params), begin(first), end(last) {
    const int64_t ratio = p.x_column ? p.x_row / p.x_column : 0;
    const bool even = p.x_column && p.x_row % p.x_column == 0 && ratio >= p.width;
    const int64_t by_image = (ratio * (p.height - 1) + p.width + 15) / 16;
    pitch = even && by_image <= static_cast<int64_t>(p.height) * ((p.width + 15) / 16)
                ? static_cast<int>(ratio)
                : 0;
    images = pitch == p.width && p.x_batch == p.height * p.x_row ? p.batch : 1;
    line_pixels = (pitch ? p.height * p.width : p.width) * images;
    positions = pitch ? pitch * (p.height * images - 1) + p.width : p.width;
    lines = images > 1 ? 1 : pitch ? p.batch : p.batch * p.height;
    rows = positions < 16 ? positions : 16;
    rewind();
  }

  int position(int pixel) const { return pitch ? pixel / p.width * pitch + pixel % p.width : pixel; }

  void enter(int index) {
    line = index;
    const int first = line * line_pixels;
    const int a = begin > first ? begin - first : 0;
    const int b = end < first + line_pixels ? end - first : line_pixels;
    from = at = position(a);
    to = b > a ? position(b - 1) + 1 : from;
  }

  void rewind() { enter(begin / line_pixels); }

  bool next(PixelTile& tile) {
    while (at >= to) {
      if (line + 1 >= lines || (line + 1) * line_pixels >= end) return false;
      enter(line + 1);
    }
    const int start = at < positions - rows ? at : positions - rows;
    const int row = pitch ? line * p.height + start / pitch : line;
    int n = row / p.height, oy = row % p.height, ox = pitch ? start % pitch : start;
    tile.x = p.x + n * p.x_batch + oy * p.x_row + ox * p.x_column;
    tile.stored = 0;
    for (int i = 0; i < rows; ++i) {
      if (start + i >= at && start + i < to && ox < p.width) tile.stored |= 1 << i;
      tile.y[i] = n * p.y_batch + oy * p.y_row + ox * p.y_pixel;
      tile.residual[i] = n * p.residual_batch + oy * p.residual_row + ox * p.residual_pixel;
      if (++ox == pitch) {
        ox = 0;
        // The positions behind the last row of an image in the border are no pixels of the next.
        if (++oy == p.height && images > 1) oy = 0, ++n;
      }
    }
    at = start + rows;
    return true;
  }
};

}  // namespace amx
}  // namespace fxquant
