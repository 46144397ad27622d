// What float islands are told: rows of floats between integer operators, and the quantizer that
// follows. A tensor is [samples][outer][inner][columns], its columns next to each other; strides
// are in elements. `y` gets the floats and `codes` their codes; one of both may be null.
// Work items are rows.
#pragma once
#include <stdint.h>

namespace fxquant {

// (x - mean) / sqrt(variance + epsilon) * weight + bias over the columns.
struct LayerNormRowsParams {
    const float* x;
    const float* weight;  // or null
    const float* bias;    // or null
    float* y;
    uint8_t* codes;
    const int64_t* x_strides;
    const int64_t* y_strides;
    const int64_t* codes_strides;
    int64_t samples;
    int64_t outer;
    int64_t inner;
    int64_t columns;
    double epsilon;
    float inverse;
    int32_t zero_point;
    int32_t lo;
    int32_t hi;
};

// exp(x - largest of the row); with `divide` over the sum of the row. Where `mask` is 0 the result
// is 0 and x takes no part.
struct SoftmaxRowsParams {
    const float* x;
    const uint8_t* mask;  // or null
    float* y;
    uint8_t* codes;
    const int64_t* x_strides;
    const int64_t* mask_strides;
    const int64_t* y_strides;
    const int64_t* codes_strides;
    int64_t samples;
    int64_t outer;
    int64_t inner;
    int64_t columns;
    int32_t divide;
    float inverse;
    int32_t zero_point;
    int32_t lo;
    int32_t hi;
};

enum FloatFunction : int32_t { FLOAT_COPY = 0, FLOAT_RELU = 1, FLOAT_GELU = 2, FLOAT_CLAMP = 3 };

struct FunctionRowsParams {
    const float* x;
    float* y;
    uint8_t* codes;
    const int64_t* x_strides;
    const int64_t* y_strides;
    const int64_t* codes_strides;
    int64_t samples;
    int64_t outer;
    int64_t inner;
    int64_t columns;
    int32_t function;  // FloatFunction
    float least;       // of FLOAT_CLAMP
    float most;
    float inverse;
    int32_t zero_point;
    int32_t lo;
    int32_t hi;
};

enum FloatPair : int32_t { FLOAT_ADD = 0, FLOAT_SUB = 1, FLOAT_MUL = 2, FLOAT_DIV = 3 };

// Of two tensors; b may broadcast along any dimension.
struct PairRowsParams {
    const float* a;
    const float* b;
    float* y;
    uint8_t* codes;
    const int64_t* a_strides;
    const int64_t* b_strides;
    const int64_t* y_strides;
    const int64_t* codes_strides;
    int64_t samples;
    int64_t outer;
    int64_t inner;
    int64_t columns;
    int32_t kind;    // FloatPair
    int32_t b_step;  // 0: b broadcasts along the columns
    float inverse;
    int32_t zero_point;
    int32_t lo;
    int32_t hi;
};

enum FloatPool : int32_t { FLOAT_MAX = 0, FLOAT_MEAN = 1, FLOAT_SUM = 2 };

// Windows of an image whose channels lie next to each other: window i of a dimension starts at
// range[2 * i] and stops before range[2 * i + 1]. A sum runs over the rows of a window, in doubles,
// and is rounded to float once: that of a mean behind the division by its entry of `counts`.
// Work items are blocks of 64 channels of a row of the output.
struct PoolRowsParams {
    const float* x;
    float* y;
    const int32_t* row_range;
    const int32_t* column_range;
    const double* counts;  // [height][width]
    int64_t x_batch;
    int64_t x_row;
    int64_t x_pixel;
    int64_t y_batch;
    int64_t y_row;
    int64_t y_pixel;
    int64_t batch;
    int64_t height;  // of the output
    int64_t width;
    int64_t channels;
    int32_t row_step;  // inside of a window
    int32_t column_step;
    int32_t kind;  // FloatPool
};

}  // namespace fxquant
