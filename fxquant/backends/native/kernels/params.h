// What every kernel is told: one plain struct for each, strides in bytes, pointers to pixel (0, 0).
//
// A uint8 tensor is an image [batch][height][width][channels] with any strides and its channels
// next to each other. A kernel NAME is `void NAME(const NAMEParams&, int begin, int end)` over
// `NAME_items` independent pieces of work, and may read up to 256 bytes behind what it is told of;
// it writes nothing else than its output. Accumulators are int32 and must not overflow.
//
// Rescaling everywhere: clamp(round_half_even(float32(sum) * multiplier) + zero_point, lo, hi), then
// an optional table of 256 codes. `|float32(sum) * multiplier|` must stay below 2^30.
#pragma once
#include <stdint.h>

namespace fxquant {

// Convolution and linear layer, in groups or not.
//
// An output pixel reads `segments` runs of `segment_quads` * 4 bytes each; run s begins at
// x + n * x_batch + oy * x_row + ox * x_column + segment_offset[s] + group * x_group. A kernel row of
// a densely stored image is one run, a 1 x 1 convolution has one run altogether.
// `weight` is [groups][ceil(outputs / 64)][segments * segment_quads][64][4], zero where padded;
// `bias` (b_q - x_zero_point * sum(weight)) and `multiplier` are [groups][ceil(outputs / 64) * 64].
// Item: one output pixel of all panels, or with `by_panels` one panel (64 outputs) of all pixels.
struct ConvParams {
  const uint8_t* x;                // where the window of output (0, 0) begins: in the border if padded
  const int32_t* segment_offset;   // [segments], bytes
  const int8_t* weight;
  const int32_t* bias;
  const float* multiplier;
  const uint8_t* residual;         // or null: adds float32(r - residual_zero_point) * residual_multiplier
  const uint8_t* table;            // or null: uint8 [256], applied to the clamped code
  void* y;
  int64_t x_batch;
  int64_t x_row;                   // between output rows: stride times the image's row
  int64_t x_column;                // between output pixels of a row
  int64_t x_group;
  int64_t y_batch;
  int64_t y_row;
  int64_t y_pixel;
  int64_t residual_batch;
  int64_t residual_row;
  int64_t residual_pixel;
  int32_t batch;
  int32_t height;                  // of the output
  int32_t width;
  int32_t groups;
  int32_t outputs;                 // of one group
  int32_t segments;
  int32_t segment_quads;
  int32_t kind;                    // of y: 0 uint8 codes, 1 int32 sums, 2 float32(sum) * multiplier,
                                   // 3 uint8 codes of GELU of that (no residual, no table)
  int32_t zero_point;
  int32_t lo;
  int32_t hi;
  int32_t residual_zero_point;
  float residual_multiplier;
  float inverse;                   // of kind 3: float32(1) / float32(scale of the codes)
  int32_t by_panels;               // 1 where the weights are larger than the image: threads share them
};

// Depthwise convolution: one input and one output for each channel, dilation 1, kernels up to 7 x 7.
//
// `weight` is [blocks][kernel_width][ceil(kernel_height / 4)][2][16][4] for blocks of 32 channels, zero
// where padded: a lane of one of the two vectors holds the taps of four rows of one column. `bias`
// (b_q - x_zero_point * sum(weight)) and `multiplier` are [blocks][2][16] in the same order, in which
// lane i of vector v is channel 8 * (i / 4) + 4 * v + i % 4 of the block.
// Item: one output row of one image.
struct DepthwiseConvParams {
  const uint8_t* x;                // where the window of output (0, 0) begins
  const int8_t* weight;
  const int32_t* bias;
  const float* multiplier;
  const uint8_t* residual;         // or null
  const uint8_t* table;            // or null
  void* y;
  int64_t x_batch;
  int64_t x_row;                   // between rows of the image, not of windows
  int64_t x_pixel;
  int64_t y_batch;
  int64_t y_row;
  int64_t y_pixel;
  int64_t residual_batch;
  int64_t residual_row;
  int64_t residual_pixel;
  int32_t batch;
  int32_t height;                  // of the output
  int32_t width;
  int32_t channels;
  int32_t kernel_height;
  int32_t kernel_width;
  int32_t stride_height;
  int32_t stride_width;
  int32_t kind;                    // of y: 0 uint8 codes, 2 float32(sum) * multiplier
  int32_t zero_point;
  int32_t lo;
  int32_t hi;
  int32_t residual_zero_point;
  float residual_multiplier;
};

// Products of two activations, y[m][n] = sum over k of (a[m][k] - za)(b[k][n] - zb), rescaled.
//
// Two batch dimensions (images and heads). One of a_k and a_row, and one of b_k and b_column, is 1.
// With `by_sum` it is the mean of b weighted by a: float32(sum) / float32(sum of a[m][k] - za), 0 where
// that is 0, times the multiplier.
// Item: one (image, head).
struct MatmulParams {
  const uint8_t* a;
  const uint8_t* b;
  void* y;
  int64_t a_batch;
  int64_t a_head;
  int64_t a_row;
  int64_t a_k;
  int64_t b_batch;
  int64_t b_head;
  int64_t b_k;
  int64_t b_column;
  int64_t y_batch;
  int64_t y_head;
  int64_t y_row;                   // columns of y are next to each other
  int32_t batch;
  int32_t heads;
  int32_t rows;
  int32_t columns;
  int32_t depth;
  int32_t a_zero_point;
  int32_t b_zero_point;
  int32_t kind;                    // of y: 0 uint8, 2 float32
  int32_t by_sum;
  int32_t zero_point;
  int32_t lo;
  int32_t hi;
  float multiplier;
};

// Attention of one head: what a softmax's numerators weigh of the values, without a division before.
//
// For each query r = float32(sum over depth of (q - zq)(k - zk)) * score_multiplier over all keys,
// w = clamp(round(exp(r - max r) * inverse), 0, 255) and
// y = clamp(round(float32(float32(sum of w (v - zv)) / float32(sum of w)) * multiplier) + zero_point).
// Channels of q, k, v and y are next to each other. Needs columns <= 1024, depth and width <= 128,
// and both (columns rounded up to 64) * depth and columns * width at most 65536.
// Item: one (image, head).
struct AttentionParams {
  const uint8_t* q;
  const uint8_t* k;
  const uint8_t* v;
  uint8_t* y;
  int64_t q_batch;
  int64_t q_head;
  int64_t q_row;
  int64_t k_batch;
  int64_t k_head;
  int64_t k_row;
  int64_t v_batch;
  int64_t v_head;
  int64_t v_row;
  int64_t y_batch;
  int64_t y_head;
  int64_t y_row;
  int32_t batch;
  int32_t heads;
  int32_t rows;                    // queries
  int32_t columns;                 // keys
  int32_t depth;                   // channels of a query and a key
  int32_t width;                   // channels of a value
  int32_t q_zero_point;
  int32_t k_zero_point;
  int32_t v_zero_point;
  int32_t zero_point;
  int32_t lo;
  int32_t hi;
  float score_multiplier;
  float inverse;                   // float32(1) / float32(scale of the numerators' codes)
  float multiplier;
};

// y = table[x]. Item: one row of one image. In place (y = x) is allowed.
struct LookupParams {
  const uint8_t* x;
  const uint8_t* table;            // [256]
  uint8_t* y;
  int64_t x_batch;
  int64_t x_row;
  int64_t x_pixel;
  int64_t y_batch;
  int64_t y_row;
  int64_t y_pixel;
  int32_t batch;
  int32_t height;
  int32_t width;
  int32_t channels;
};

// float32(a - za) * ma + float32(b - zb) * mb, each product and the sum rounded; clamp and table as a
// convolution. A stride of 0 broadcasts. Item: one row of one image. In place is allowed.
struct AddParams {
  const uint8_t* a;
  const uint8_t* b;
  const uint8_t* table;            // or null
  uint8_t* y;
  int64_t a_batch;
  int64_t a_row;
  int64_t a_pixel;
  int64_t b_batch;
  int64_t b_row;
  int64_t b_pixel;
  int64_t y_batch;
  int64_t y_row;
  int64_t y_pixel;
  int32_t batch;
  int32_t height;
  int32_t width;
  int32_t channels;
  int32_t a_zero_point;
  int32_t b_zero_point;
  int32_t zero_point;
  int32_t lo;
  int32_t hi;
  float a_multiplier;
  float b_multiplier;
};

// float32((a - za)(b - zb)) * multiplier. With b_row = b_pixel = 0 it is squeeze-and-excitation's gate.
// Item: one row of one image. In place is allowed.
struct MulParams {
  const uint8_t* a;
  const uint8_t* b;
  const uint8_t* table;            // or null
  uint8_t* y;
  int64_t a_batch;
  int64_t a_row;
  int64_t a_pixel;
  int64_t b_batch;
  int64_t b_row;
  int64_t b_pixel;
  int64_t y_batch;
  int64_t y_row;
  int64_t y_pixel;
  int32_t batch;
  int32_t height;
  int32_t width;
  int32_t channels;
  int32_t a_zero_point;
  int32_t b_zero_point;
  int32_t zero_point;
  int32_t lo;
  int32_t hi;
  float multiplier;
};

// float32(x - zx) * multiplier[c] + offset[c]. Item: one row of one image. In place is allowed.
struct ChannelAffineParams {
  const uint8_t* x;
  const float* multiplier;         // [channels]
  const float* offset;             // [channels]
  const uint8_t* table;            // or null
  uint8_t* y;
  int64_t x_batch;
  int64_t x_row;
  int64_t x_pixel;
  int64_t y_batch;
  int64_t y_row;
  int64_t y_pixel;
  int32_t batch;
  int32_t height;
  int32_t width;
  int32_t channels;
  int32_t x_zero_point;
  int32_t zero_point;
  int32_t lo;
  int32_t hi;
};

// Average over windows: pooling, adaptive pooling, a mean over height and width.
//
// Output (oy, ox) averages rows row_range[2 oy] .. row_range[2 oy + 1] - 1 and the columns alike, all
// inside the image, times multiplier[oy * width + ox]; the sum has (x - zx).
// Item: 64 channels of one output row of one image.
struct AvgPoolParams {
  const uint8_t* x;                // pixel (0, 0) of the image
  const int32_t* row_range;        // [height][2]
  const int32_t* column_range;     // [width][2]
  const float* multiplier;         // [height][width]
  const uint8_t* table;            // or null
  uint8_t* y;
  int64_t x_batch;
  int64_t x_row;
  int64_t x_pixel;
  int64_t y_batch;
  int64_t y_row;
  int64_t y_pixel;
  int32_t batch;
  int32_t height;                  // of the output
  int32_t width;
  int32_t channels;
  int32_t x_zero_point;
  int32_t zero_point;
  int32_t lo;
  int32_t hi;
};

// Maximum over windows, given as in AvgPoolParams with an inner step (dilation).
// Item: one output row of one image.
struct MaxPoolParams {
  const uint8_t* x;
  const int32_t* row_range;        // [height][2], inside the image
  const int32_t* column_range;     // [width][2]
  uint8_t* y;
  int64_t x_batch;
  int64_t x_row;
  int64_t x_pixel;
  int64_t y_batch;
  int64_t y_row;
  int64_t y_pixel;
  int32_t batch;
  int32_t height;
  int32_t width;
  int32_t channels;
  int32_t row_step;
  int32_t column_step;
};

// float32 [batch][channels][height][width] to codes: clamp(round(x * inverse) + z), NaN as 0.
// Bytes of a pixel behind its channels, up to `fill_channels`, get 0. Item: one row of one image.
struct QuantizeParams {
  const float* x;
  uint8_t* y;
  int64_t x_batch;                 // strides of x in floats
  int64_t x_channel;
  int64_t x_row;
  int64_t x_column;
  int64_t y_batch;
  int64_t y_row;
  int64_t y_pixel;
  int32_t batch;
  int32_t height;
  int32_t width;
  int32_t channels;
  int32_t fill_channels;           // >= channels; 4 for a first layer of 3 channels
  int32_t zero_point;
  int32_t lo;
  int32_t hi;
  float inverse;                   // float32(1) / float32(scale)
};

// Codes to float32: float32(x - zx) * scale. Item: one row of one image.
struct DequantizeParams {
  const uint8_t* x;
  float* y;
  int64_t x_batch;
  int64_t x_row;
  int64_t x_pixel;
  int64_t y_batch;                 // strides of y in floats
  int64_t y_channel;
  int64_t y_row;
  int64_t y_column;
  int32_t batch;
  int32_t height;
  int32_t width;
  int32_t channels;
  int32_t x_zero_point;
  float scale;
};

// y[.. c * y_channel] = x[.. c * x_channel]: slices of concatenations, channel shuffles, transposes.
// Item: one row of one image.
struct CopyParams {
  const uint8_t* x;
  uint8_t* y;
  int64_t x_batch;
  int64_t x_row;
  int64_t x_pixel;
  int64_t x_channel;
  int64_t y_batch;
  int64_t y_row;
  int64_t y_pixel;
  int64_t y_channel;
  int32_t batch;
  int32_t height;
  int32_t width;
  int32_t channels;
};

// softmax_table over rows of codes: e = table[max - x], clamp(floor(e * numerator / (256 * sum) + 1/2)).
// Item: one row.
struct SoftmaxTableParams {
  const uint8_t* x;
  const int32_t* table;            // [256]
  uint8_t* y;
  int64_t x_row;
  int64_t y_row;
  int32_t rows;
  int32_t columns;
  int32_t numerator;
  int32_t lo;
  int32_t hi;
};

// Float32 islands. Rows of `columns` floats next to each other, strides in floats.

// softmax over each row. Item: one row.
struct SoftmaxFloatParams {
  const float* x;
  float* y;
  int64_t x_row;
  int64_t y_row;
  int32_t rows;
  int32_t columns;
};

// x * (1 + erf(x / sqrt 2)) / 2. Item: one row.
struct GeluFloatParams {
  const float* x;
  float* y;
  int64_t x_row;
  int64_t y_row;
  int32_t rows;
  int32_t columns;
};

// (x - mean) / sqrt(variance + epsilon) * weight + bias over each row. With `codes` the result is
// quantized into it as well: clamp(round(y * inverse) + zero_point), and y may be null.
// Item: one row.
struct LayerNormFloatParams {
  const float* x;
  const float* weight;             // [columns] or null
  const float* bias;               // [columns] or null
  float* y;                        // or null
  uint8_t* codes;                  // or null
  int64_t x_row;
  int64_t y_row;
  int64_t codes_row;
  int32_t rows;
  int32_t columns;
  int32_t zero_point;
  int32_t lo;
  int32_t hi;
  float epsilon;
  float inverse;
};

// a + b of rows. Item: one row.
struct AddFloatParams {
  const float* a;
  const float* b;
  float* y;
  int64_t a_row;
  int64_t b_row;
  int64_t y_row;
  int32_t rows;
  int32_t columns;
};

}  // namespace fxquant
