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

enum FloatFunction : int32_t { FLOAT_COPY = 0, FLOAT_RELU = 1, FLOAT_GELU = 2 };

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
    float inverse;
    int32_t zero_point;
    int32_t lo;
    int32_t hi;
};

enum FloatPair : int32_t { FLOAT_ADD = 0, FLOAT_SUB = 1, FLOAT_MUL = 2 };

// Of two tensors; b may broadcast along any dimension but the columns.
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
    int32_t kind;  // FloatPair
    float inverse;
    int32_t zero_point;
    int32_t lo;
    int32_t hi;
};

}  // namespace fxquant
