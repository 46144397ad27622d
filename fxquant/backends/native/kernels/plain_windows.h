// Plain kernels over windows: maxima, sums and averages.
#pragma once

#include "plain.h"

namespace fxquant {

enum Reduction : int32_t { MAXIMUM = 0, AVERAGE = 1, SUM = 2 };

// The windows of dimension d start at windows[2 * (starts[d] + i)] and stop before
// windows[2 * (starts[d] + i) + 1], in steps of steps[d]; what lies outside of x is left out.
// Work items are the indices of dimension 0 and 1 of the output.
struct PlainReduceParams {
    const void* x;
    void* y;
    const int64_t* shape;  // of y
    const int64_t* x_strides;
    const int64_t* y_strides;
    const int64_t* f_strides;
    const int64_t* windows;
    const int64_t* starts;  // one for each of 6 dimensions, -1 where there are no windows
    const int64_t* steps;
    const float* factors;  // of averages, found by f_strides
    int64_t samples;
    int32_t kind;  // Reduction
    int32_t x_type;
    int32_t y_type;
    int32_t x_zero_point;
    int32_t zero_point;
    int32_t lo;
    int32_t hi;
};

namespace portable {

static inline int plain_reduce_items(const PlainReduceParams& p) {
    return static_cast<int>(p.samples * p.shape[1]);
}

static inline void reduce_window(const PlainReduceParams& p, const int64_t* index, int axis,
                                 int64_t at, int64_t& sum, int64_t& largest) {
    if (axis == 6) {
        const int64_t q = load(p.x, at, p.x_type);
        sum += q - p.x_zero_point;
        largest = q > largest ? q : largest;
        return;
    }
    if (p.starts[axis] < 0)
        return reduce_window(p, index, axis + 1, at + index[axis] * p.x_strides[axis], sum, largest);
    const int64_t* window = p.windows + 2 * (p.starts[axis] + index[axis]);
    for (int64_t i = window[0]; i < window[1]; i += p.steps[axis])
        reduce_window(p, index, axis + 1, at + i * p.x_strides[axis], sum, largest);
}

static inline void plain_reduce(const PlainReduceParams& p, int begin, int end) {
    int64_t index[6];
    for (int64_t item = begin; item < end; ++item) {
        index[0] = item / p.shape[1];
        index[1] = item % p.shape[1];
        for (index[2] = 0; index[2] < p.shape[2]; ++index[2])
            for (index[3] = 0; index[3] < p.shape[3]; ++index[3])
                for (index[4] = 0; index[4] < p.shape[4]; ++index[4])
                    for (index[5] = 0; index[5] < p.shape[5]; ++index[5]) {
                        int64_t sum = 0, largest = INT64_MIN, y_at = 0, f_at = 0;
                        reduce_window(p, index, 0, 0, sum, largest);
                        for (int axis = 0; axis < 6; ++axis) {
                            y_at += index[axis] * p.y_strides[axis];
                            f_at += index[axis] * p.f_strides[axis];
                        }
                        int64_t result = p.kind == MAXIMUM ? largest : sum;
                        if (p.kind == AVERAGE)
                            result = plain_code(static_cast<float>(sum) * p.factors[f_at], p.zero_point,
                                             p.lo, p.hi);
                        store(p.y, y_at, p.y_type, result);
                    }
    }
}

}  // namespace portable
}  // namespace fxquant
