// Every kernel in plain C++17: what the fast versions are compared with, and what other CPUs run.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "params.h"

namespace fxquant {
namespace portable {

// round_half_even: the default rounding mode is what every kernel runs in.
static inline int32_t rounded(float value) { return static_cast<int32_t>(lrintf(value)); }

static inline int32_t clamped(int32_t value, int32_t lo, int32_t hi) {
  return value < lo ? lo : value > hi ? hi : value;
}

static inline uint8_t to_code(float real, int32_t zero_point, int32_t lo, int32_t hi,
                              const uint8_t* table) {
  const int32_t code = clamped(rounded(real) + zero_point, lo, hi);
  return static_cast<uint8_t>(table ? table[code] : code);
}

// The clamp comes before the conversion: nothing too large for an integer is ever converted.
static inline uint8_t quantized(float value, float inverse, int32_t zero_point, int32_t lo,
                                int32_t hi) {
  float real = value * inverse;
  if (real != real) real = 0.0f;
  const float low = static_cast<float>(lo - zero_point), high = static_cast<float>(hi - zero_point);
  real = real < low ? low : real > high ? high : real;
  return static_cast<uint8_t>(rounded(real) + zero_point);
}

static inline float gelu(float x) {
  return x * 0.5f * (1.0f + erff(x * 0.70710678118654752440f));
}

static inline int padded_to(int value, int step) { return (value + step - 1) / step * step; }

// ---------------------------------------------------------------------------------- convolution

static inline int conv_items(const ConvParams& p) {
  if (p.by_panels) return p.groups * (padded_to(p.outputs, 64) / 64);
  return p.batch * p.height * p.width;
}

// What an accumulator becomes at output channel `channel` of the pixel with these offsets.
static inline void conv_store(const ConvParams& p, int32_t sum, float multiplier, int64_t y_offset,
                              int64_t residual_offset, int channel) {
  if (p.kind == 1) {
    reinterpret_cast<int32_t*>(static_cast<char*>(p.y) + y_offset)[channel] = sum;
    return;
  }
  float real = static_cast<float>(sum) * multiplier;
  if (p.kind == 2) {
    reinterpret_cast<float*>(static_cast<char*>(p.y) + y_offset)[channel] = real;
    return;
  }
  if (p.kind == 3) {
    static_cast<uint8_t*>(p.y)[y_offset + channel] =
        quantized(gelu(real), p.inverse, p.zero_point, p.lo, p.hi);
    return;
  }
  if (p.residual) {
    const int32_t centered = p.residual[residual_offset + channel] - p.residual_zero_point;
    real += static_cast<float>(centered) * p.residual_multiplier;
  }
  static_cast<uint8_t*>(p.y)[y_offset + channel] = to_code(real, p.zero_point, p.lo, p.hi, p.table);
}

static inline void conv_tile(const ConvParams& p, int pixel, int group, int panel) {
  const int n = pixel / (p.height * p.width), oy = pixel / p.width % p.height, ox = pixel % p.width;
  const uint8_t* x = p.x + n * p.x_batch + oy * p.x_row + ox * p.x_column + group * p.x_group;
  const int panels = padded_to(p.outputs, 64) / 64, quads = p.segments * p.segment_quads;
  const int64_t index = static_cast<int64_t>(group) * panels + panel;
  const int8_t* weight = p.weight + index * quads * 256;
  int32_t sums[64];
  memcpy(sums, p.bias + index * 64, sizeof sums);
  for (int segment = 0; segment < p.segments; ++segment) {
    const uint8_t* run = x + p.segment_offset[segment];
    for (int quad = 0; quad < p.segment_quads; ++quad, run += 4, weight += 256)
      for (int j = 0; j < 64; ++j)
        for (int i = 0; i < 4; ++i) sums[j] += run[i] * weight[4 * j + i];
  }
  const int64_t y_offset = n * p.y_batch + oy * p.y_row + ox * p.y_pixel;
  const int64_t r_offset = n * p.residual_batch + oy * p.residual_row + ox * p.residual_pixel;
  for (int j = 0; j < 64 && panel * 64 + j < p.outputs; ++j)
    conv_store(p, sums[j], p.multiplier[index * 64 + j], y_offset, r_offset,
               group * p.outputs + panel * 64 + j);
}

static inline void conv(const ConvParams& p, int begin, int end) {
  const int panels = padded_to(p.outputs, 64) / 64, pixels = p.batch * p.height * p.width;
  if (p.by_panels) {
    for (int index = begin; index < end; ++index)
      for (int pixel = 0; pixel < pixels; ++pixel)
        conv_tile(p, pixel, index / panels, index % panels);
    return;
  }
  for (int pixel = begin; pixel < end; ++pixel)
    for (int index = 0; index < p.groups * panels; ++index)
      conv_tile(p, pixel, index / panels, index % panels);
}

// -------------------------------------------------------------------------------- depthwise

static inline int depthwise_conv_items(const DepthwiseConvParams& p) { return p.batch * p.height; }

// Where the packed arrays keep a channel: the number of its lane counted from the first one.
static inline int depthwise_lane(int channel) {
  const int inside = channel % 32;
  return channel - inside + inside / 4 % 2 * 16 + inside / 8 * 4 + inside % 4;
}

static inline void depthwise_conv(const DepthwiseConvParams& p, int begin, int end) {
  const int column_quads = (p.kernel_height + 3) / 4;
  for (int item = begin; item < end; ++item) {
    const int n = item / p.height, oy = item % p.height;
    for (int ox = 0; ox < p.width; ++ox) {
      const uint8_t* x = p.x + n * p.x_batch + oy * p.stride_height * p.x_row +
                         ox * p.stride_width * p.x_pixel;
      const int64_t y_offset = n * p.y_batch + oy * p.y_row + ox * p.y_pixel;
      const int64_t r_offset = n * p.residual_batch + oy * p.residual_row + ox * p.residual_pixel;
      for (int c = 0; c < p.channels; ++c) {
        const int lane = depthwise_lane(c);
        const int8_t* weight =
            p.weight + static_cast<int64_t>(c / 32) * p.kernel_width * column_quads * 128;
        int32_t sum = p.bias[lane];
        for (int ky = 0; ky < p.kernel_height; ++ky)
          for (int kx = 0; kx < p.kernel_width; ++kx)
            sum += x[ky * p.x_row + kx * p.x_pixel + c] *
                   weight[(kx * column_quads + ky / 4) * 128 + lane % 32 * 4 + ky % 4];
        float real = static_cast<float>(sum) * p.multiplier[lane];
        if (p.kind == 2) {
          reinterpret_cast<float*>(static_cast<char*>(p.y) + y_offset)[c] = real;
          continue;
        }
        if (p.residual)
          real += static_cast<float>(p.residual[r_offset + c] - p.residual_zero_point) *
                  p.residual_multiplier;
        static_cast<uint8_t*>(p.y)[y_offset + c] =
            to_code(real, p.zero_point, p.lo, p.hi, p.table);
      }
    }
  }
}

// ------------------------------------------------------------------------------------ matmul

static inline int matmul_items(const MatmulParams& p) { return p.batch * p.heads; }

static inline void matmul(const MatmulParams& p, int begin, int end) {
  for (int item = begin; item < end; ++item) {
    const int n = item / p.heads, head = item % p.heads;
    const uint8_t* a = p.a + n * p.a_batch + head * p.a_head;
    const uint8_t* b = p.b + n * p.b_batch + head * p.b_head;
    char* y = static_cast<char*>(p.y) + n * p.y_batch + head * p.y_head;
    for (int row = 0; row < p.rows; ++row) {
      int32_t total = 0;
      for (int k = 0; k < p.depth; ++k) total += a[row * p.a_row + k * p.a_k] - p.a_zero_point;
      for (int column = 0; column < p.columns; ++column) {
        int32_t sum = 0;
        for (int k = 0; k < p.depth; ++k)
          sum += (a[row * p.a_row + k * p.a_k] - p.a_zero_point) *
                 (b[k * p.b_k + column * p.b_column] - p.b_zero_point);
        float real = static_cast<float>(sum);
        if (p.by_sum) real = real / (total == 0 ? 1.0f : static_cast<float>(total));
        real = real * p.multiplier;
        if (p.kind == 2)
          reinterpret_cast<float*>(y + row * p.y_row)[column] = real;
        else
          reinterpret_cast<uint8_t*>(y + row * p.y_row)[column] =
              to_code(real, p.zero_point, p.lo, p.hi, nullptr);
      }
    }
  }
}

static inline int attention_items(const AttentionParams& p) { return p.batch * p.heads; }

static inline void attention(const AttentionParams& p, int begin, int end) {
  float scores[1024];
  int32_t codes[1024];
  for (int item = begin; item < end; ++item) {
    const int n = item / p.heads, head = item % p.heads;
    const uint8_t* keys = p.k + n * p.k_batch + head * p.k_head;
    const uint8_t* values = p.v + n * p.v_batch + head * p.v_head;
    for (int row = 0; row < p.rows; ++row) {
      const uint8_t* q = p.q + n * p.q_batch + head * p.q_head + row * p.q_row;
      uint8_t* y = p.y + n * p.y_batch + head * p.y_head + row * p.y_row;
      float largest = -INFINITY;
      for (int column = 0; column < p.columns; ++column) {
        int32_t sum = 0;
        for (int c = 0; c < p.depth; ++c)
          sum += (q[c] - p.q_zero_point) * (keys[column * p.k_row + c] - p.k_zero_point);
        scores[column] = static_cast<float>(sum) * p.score_multiplier;
        largest = scores[column] > largest ? scores[column] : largest;
      }
      int32_t total = 0;
      for (int column = 0; column < p.columns; ++column)
        total += codes[column] = quantized(expf(scores[column] - largest), p.inverse, 0, 0, 255);
      for (int c = 0; c < p.width; ++c) {
        int32_t sum = 0;
        for (int column = 0; column < p.columns; ++column)
          sum += codes[column] * (values[column * p.v_row + c] - p.v_zero_point);
        const float mean = static_cast<float>(sum) / (total ? static_cast<float>(total) : 1.0f);
        y[c] = to_code(mean * p.multiplier, p.zero_point, p.lo, p.hi, nullptr);
      }
    }
  }
}

// ------------------------------------------------------------------------------- elementwise

static inline int lookup_items(const LookupParams& p) { return p.batch * p.height; }

static inline void lookup(const LookupParams& p, int begin, int end) {
  for (int item = begin; item < end; ++item) {
    const uint8_t* x = p.x + item / p.height * p.x_batch + item % p.height * p.x_row;
    uint8_t* y = p.y + item / p.height * p.y_batch + item % p.height * p.y_row;
    for (int ox = 0; ox < p.width; ++ox, x += p.x_pixel, y += p.y_pixel)
      for (int c = 0; c < p.channels; ++c) y[c] = p.table[x[c]];
  }
}

static inline int add_items(const AddParams& p) { return p.batch * p.height; }

static inline void add(const AddParams& p, int begin, int end) {
  for (int item = begin; item < end; ++item) {
    const int n = item / p.height, oy = item % p.height;
    const uint8_t* a = p.a + n * p.a_batch + oy * p.a_row;
    const uint8_t* b = p.b + n * p.b_batch + oy * p.b_row;
    uint8_t* y = p.y + n * p.y_batch + oy * p.y_row;
    for (int ox = 0; ox < p.width; ++ox, a += p.a_pixel, b += p.b_pixel, y += p.y_pixel)
      for (int c = 0; c < p.channels; ++c) {
        const float left = static_cast<float>(a[c] - p.a_zero_point) * p.a_multiplier;
        const float right = static_cast<float>(b[c] - p.b_zero_point) * p.b_multiplier;
        y[c] = to_code(left + right, p.zero_point, p.lo, p.hi, p.table);
      }
  }
}

static inline int mul_items(const MulParams& p) { return p.batch * p.height; }

static inline void mul(const MulParams& p, int begin, int end) {
  for (int item = begin; item < end; ++item) {
    const int n = item / p.height, oy = item % p.height;
    const uint8_t* a = p.a + n * p.a_batch + oy * p.a_row;
    const uint8_t* b = p.b + n * p.b_batch + oy * p.b_row;
    uint8_t* y = p.y + n * p.y_batch + oy * p.y_row;
    for (int ox = 0; ox < p.width; ++ox, a += p.a_pixel, b += p.b_pixel, y += p.y_pixel)
      for (int c = 0; c < p.channels; ++c) {
        const int32_t product = (a[c] - p.a_zero_point) * (b[c] - p.b_zero_point);
        y[c] = to_code(static_cast<float>(product) * p.multiplier, p.zero_point, p.lo, p.hi,
                       p.table);
      }
  }
}

static inline int channel_affine_items(const ChannelAffineParams& p) { return p.batch * p.height; }

static inline void channel_affine(const ChannelAffineParams& p, int begin, int end) {
  for (int item = begin; item < end; ++item) {
    const uint8_t* x = p.x + item / p.height * p.x_batch + item % p.height * p.x_row;
    uint8_t* y = p.y + item / p.height * p.y_batch + item % p.height * p.y_row;
    for (int ox = 0; ox < p.width; ++ox, x += p.x_pixel, y += p.y_pixel)
      for (int c = 0; c < p.channels; ++c) {
        const float product = static_cast<float>(x[c] - p.x_zero_point) * p.multiplier[c];
        y[c] = to_code(product + p.offset[c], p.zero_point, p.lo, p.hi, p.table);
      }
  }
}

// ----------------------------------------------------------------------------------- pooling

static inline int avg_pool_items(const AvgPoolParams& p) {
  return p.batch * p.height * ((p.channels + 63) / 64);
}

static inline void avg_pool(const AvgPoolParams& p, int begin, int end) {
  const int blocks = (p.channels + 63) / 64;
  for (int item = begin; item < end; ++item) {
    const int block = item % blocks, oy = item / blocks % p.height, n = item / blocks / p.height;
    const int last = block * 64 + 64 < p.channels ? block * 64 + 64 : p.channels;
    const int top = p.row_range[2 * oy], bottom = p.row_range[2 * oy + 1];
    for (int ox = 0; ox < p.width; ++ox) {
      const int left = p.column_range[2 * ox], right = p.column_range[2 * ox + 1];
      const float multiplier = p.multiplier[oy * p.width + ox];
      for (int c = block * 64; c < last; ++c) {
        int32_t sum = 0;
        for (int iy = top; iy < bottom; ++iy)
          for (int ix = left; ix < right; ++ix)
            sum += p.x[n * p.x_batch + iy * p.x_row + ix * p.x_pixel + c] - p.x_zero_point;
        p.y[n * p.y_batch + oy * p.y_row + ox * p.y_pixel + c] =
            to_code(static_cast<float>(sum) * multiplier, p.zero_point, p.lo, p.hi, p.table);
      }
    }
  }
}

static inline int max_pool_items(const MaxPoolParams& p) { return p.batch * p.height; }

static inline void max_pool(const MaxPoolParams& p, int begin, int end) {
  for (int item = begin; item < end; ++item) {
    const int n = item / p.height, oy = item % p.height;
    const int top = p.row_range[2 * oy], bottom = p.row_range[2 * oy + 1];
    for (int ox = 0; ox < p.width; ++ox) {
      const int left = p.column_range[2 * ox], right = p.column_range[2 * ox + 1];
      for (int c = 0; c < p.channels; ++c) {
        uint8_t largest = 0;
        for (int iy = top; iy < bottom; iy += p.row_step)
          for (int ix = left; ix < right; ix += p.column_step) {
            const uint8_t code = p.x[n * p.x_batch + iy * p.x_row + ix * p.x_pixel + c];
            if (code > largest) largest = code;
          }
        p.y[n * p.y_batch + oy * p.y_row + ox * p.y_pixel + c] = largest;
      }
    }
  }
}

// ------------------------------------------------------------------- from floats and to floats

static inline int quantize_items(const QuantizeParams& p) { return p.batch * p.height; }

static inline void quantize(const QuantizeParams& p, int begin, int end) {
  for (int item = begin; item < end; ++item) {
    const int n = item / p.height, oy = item % p.height;
    const float* x = p.x + n * p.x_batch + oy * p.x_row;
    uint8_t* y = p.y + n * p.y_batch + oy * p.y_row;
    for (int ox = 0; ox < p.width; ++ox)
      for (int c = 0; c < p.fill_channels; ++c)
        y[ox * p.y_pixel + c] =
            c >= p.channels ? 0
                            : quantized(x[ox * p.x_column + c * p.x_channel], p.inverse,
                                        p.zero_point, p.lo, p.hi);
  }
}

static inline int dequantize_items(const DequantizeParams& p) { return p.batch * p.height; }

static inline void dequantize(const DequantizeParams& p, int begin, int end) {
  for (int item = begin; item < end; ++item) {
    const int n = item / p.height, oy = item % p.height;
    const uint8_t* x = p.x + n * p.x_batch + oy * p.x_row;
    float* y = p.y + n * p.y_batch + oy * p.y_row;
    for (int ox = 0; ox < p.width; ++ox)
      for (int c = 0; c < p.channels; ++c)
        y[ox * p.y_column + c * p.y_channel] =
            static_cast<float>(x[ox * p.x_pixel + c] - p.x_zero_point) * p.scale;
  }
}

static inline int copy_items(const CopyParams& p) { return p.batch * p.height; }

static inline void copy(const CopyParams& p, int begin, int end) {
  for (int item = begin; item < end; ++item) {
    const uint8_t* x = p.x + item / p.height * p.x_batch + item % p.height * p.x_row;
    uint8_t* y = p.y + item / p.height * p.y_batch + item % p.height * p.y_row;
    for (int ox = 0; ox < p.width; ++ox, x += p.x_pixel, y += p.y_pixel) {
      if (p.x_channel == 1 && p.y_channel == 1) {
        memcpy(y, x, p.channels);
        continue;
      }
      for (int c = 0; c < p.channels; ++c) y[c * p.y_channel] = x[c * p.x_channel];
    }
  }
}

// ----------------------------------------------------------------------------------- softmax

static inline int softmax_table_items(const SoftmaxTableParams& p) { return p.rows; }

static inline void softmax_table(const SoftmaxTableParams& p, int begin, int end) {
  for (int row = begin; row < end; ++row) {
    const uint8_t* x = p.x + row * p.x_row;
    uint8_t* y = p.y + row * p.y_row;
    int32_t largest = 0;
    for (int c = 0; c < p.columns; ++c) largest = x[c] > largest ? x[c] : largest;
    int64_t sum = 0;
    for (int c = 0; c < p.columns; ++c) sum += p.table[largest - x[c]];
    const int64_t divisor = 512 * sum > 0 ? 512 * sum : 1;
    for (int c = 0; c < p.columns; ++c) {
      const int64_t e = p.table[largest - x[c]];
      const int64_t code = (e * 2 * p.numerator + 256 * sum) / divisor;
      y[c] = static_cast<uint8_t>(code < p.lo ? p.lo : code > p.hi ? p.hi : code);
    }
  }
}

// ------------------------------------------------------------------------------ float islands

static inline int softmax_float_items(const SoftmaxFloatParams& p) { return p.rows; }

static inline void softmax_float(const SoftmaxFloatParams& p, int begin, int end) {
  for (int row = begin; row < end; ++row) {
    const float* x = p.x + row * p.x_row;
    float* y = p.y + row * p.y_row;
    float largest = -INFINITY;
    for (int c = 0; c < p.columns; ++c) largest = x[c] > largest ? x[c] : largest;
    float sum = 0.0f;
    for (int c = 0; c < p.columns; ++c) sum += y[c] = expf(x[c] - largest);
    for (int c = 0; c < p.columns; ++c) y[c] /= sum;
  }
}

static inline int gelu_float_items(const GeluFloatParams& p) { return p.rows; }

static inline void gelu_float(const GeluFloatParams& p, int begin, int end) {
  for (int row = begin; row < end; ++row)
    for (int c = 0; c < p.columns; ++c) p.y[row * p.y_row + c] = gelu(p.x[row * p.x_row + c]);
}

static inline int layer_norm_float_items(const LayerNormFloatParams& p) { return p.rows; }

static inline void layer_norm_float(const LayerNormFloatParams& p, int begin, int end) {
  for (int row = begin; row < end; ++row) {
    const float* x = p.x + row * p.x_row;
    double sum = 0.0, squares = 0.0;
    for (int c = 0; c < p.columns; ++c) sum += x[c];
    const double mean = sum / p.columns;
    for (int c = 0; c < p.columns; ++c) squares += (x[c] - mean) * (x[c] - mean);
    const float center = static_cast<float>(mean);
    const float scale = static_cast<float>(1.0 / sqrt(squares / p.columns + p.epsilon));
    for (int c = 0; c < p.columns; ++c) {
      float value = (x[c] - center) * scale;
      if (p.weight) value *= p.weight[c];
      if (p.bias) value += p.bias[c];
      if (p.y) p.y[row * p.y_row + c] = value;
      if (p.codes)
        p.codes[row * p.codes_row + c] = quantized(value, p.inverse, p.zero_point, p.lo, p.hi);
    }
  }
}

static inline int add_float_items(const AddFloatParams& p) { return p.rows; }

static inline void add_float(const AddFloatParams& p, int begin, int end) {
  for (int row = begin; row < end; ++row)
    for (int c = 0; c < p.columns; ++c)
      p.y[row * p.y_row + c] = p.a[row * p.a_row + c] + p.b[row * p.b_row + c];
}

}  // namespace portable
}  // namespace fxquant
