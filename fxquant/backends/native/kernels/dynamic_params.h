// What layers are told whose input is quantized when it is known. `range` is the scale of the
// codes, its inverse, and their zero point; tensors are dense.
#pragma once
#include <stdint.h>

namespace fxquant {

// range from the smallest and the largest of all elements. One work item.
struct DynamicRangeParams {
    const float* x;
    float* range;
    int64_t size;
};

// Work items are 1024 elements each.
struct DynamicQuantizeParams {
    const float* x;
    const float* range;
    uint8_t* y;
    int64_t size;
};

// y = sum of (x - zero point) * weight, times the scales of both, plus bias. Work items are pairs
// of a row and 16 outputs.
struct DynamicLinearParams {
    const uint8_t* x;      // [rows][depth]
    const float* range;    // of x
    const int8_t* weight;  // [outputs / 16, rounded up][depth][16]
    const float* scale;    // of the weight: [outputs]
    const float* bias;     // [outputs] or null
    float* y;              // [rows][outputs]
    int64_t rows;
    int64_t depth;
    int64_t outputs;
};

enum RecurrentKind : int32_t { LSTM = 0, GRU = 1 };

// One direction of one layer over all steps. One work item.
struct RecurrentParams {
    const float* x;        // what the layer makes of its input: [steps][batch][gates][hidden]
    const int8_t* weight;  // of the state, as above
    const float* scale;
    const float* bias;     // or null
    const float* h_first;  // [batch][hidden]; null: zeros
    const float* c_first;
    float* y;              // strides below, in elements
    float* h;              // the last: [batch][hidden]
    float* c;
    uint8_t* codes;        // room for those of the state
    float* gates;          // room: [batch][gates][hidden]
    int64_t steps;
    int64_t batch;
    int64_t hidden;
    int64_t y_step;
    int64_t y_sample;
    int32_t kind;  // RecurrentKind
    int32_t reverse;
};

}  // namespace fxquant
