// Plain kernels of sums of products: convolutions, linear layers, products of two activations.
#pragma once

#include "plain.h"

namespace fxquant {

enum Finish : int32_t { CODES = 0, FLOATS = 1, ACCUMULATORS = 2, MEAN_CODES = 3, MEAN_FLOATS = 4 };

// Entries of PlainConvParams::geometry. Spatial dimensions are depth, height and width; strides are
// those of sample, channel, depth, height and width.
enum Geometry : int {
    OUTPUT = 0,
    INPUT = 3,
    KERNEL = 6,
    HOP = 9,
    PADDING = 12,
    DILATION = 15,
    X_STRIDES = 18,
    Y_STRIDES = 23,
    RESIDUAL_STRIDES = 28,
    INNER = 33,  // input channels a group
    OUTER = 34,  // output channels a group
    GROUPS = 35,
    TRANSPOSED = 36,
    GEOMETRY_SIZE = 37,
};

// Convolutions and transposed ones of up to three dimensions; a linear layer is one of 1 x 1.
// Work items are rows of the output.
struct PlainConvParams {
    const void* x;
    void* y;
    const void* residual;      // or null
    const int16_t* weight;     // q_w - z_w: [outputs, taps, inner]
    const int64_t* bias;       // [outputs]
    const float* multiplier;   // [outputs]
    const int64_t* geometry;
    int64_t samples;
    int32_t finish;
    int32_t x_type;
    int32_t y_type;
    int32_t residual_type;
    int32_t x_zero_point;
    int32_t zero_point;
    int32_t lo;
    int32_t hi;
    int32_t residual_zero_point;
    float residual_multiplier;
};

// y[..., m, n] from a[..., m, k] and b[..., k, n]. Strides are those of the first four dimensions,
// of m (n for b) and of k. Work items are rows of the output.
struct PlainMatmulParams {
    const void* a;
    const void* b;
    void* y;
    const int64_t* shape;  // of y
    const int64_t* a_strides;
    const int64_t* b_strides;
    const int64_t* y_strides;
    int64_t samples;
    int64_t depth;
    int32_t finish;
    int32_t a_type;
    int32_t b_type;
    int32_t y_type;
    int32_t a_zero_point;
    int32_t b_zero_point;
    int32_t zero_point;
    int32_t lo;
    int32_t hi;
    float multiplier;
};

namespace portable {

static inline int plain_conv_items(const PlainConvParams& p) {
    return static_cast<int>(p.samples * p.geometry[OUTPUT] * p.geometry[OUTPUT + 1]);
}

// The input position that tap k of output o reads, or -1.
static inline int64_t tap_position(const int64_t* g, int axis, int64_t o, int64_t k) {
    int64_t at;
    if (g[TRANSPOSED]) {
        at = o + g[PADDING + axis] - k * g[DILATION + axis];
        if (at < 0 || at % g[HOP + axis]) return -1;
        at /= g[HOP + axis];
    } else {
        at = o * g[HOP + axis] - g[PADDING + axis] + k * g[DILATION + axis];
    }
    return at < 0 || at >= g[INPUT + axis] ? -1 : at;
}

static inline void plain_conv_output(const PlainConvParams& p, int64_t sum, int64_t channel,
                                     int64_t y_at, int64_t residual_at) {
    if (p.finish == ACCUMULATORS) return store(p.y, y_at, p.y_type, sum);
    float real = static_cast<float>(sum) * p.multiplier[channel];
    if (p.finish == FLOATS) {
        static_cast<float*>(p.y)[y_at] = real;
        return;
    }
    if (p.residual) {
        const int64_t q = load(p.residual, residual_at, p.residual_type) - p.residual_zero_point;
        const float extra = static_cast<float>(q) * p.residual_multiplier;
        real = real + extra;
    }
    store(p.y, y_at, p.y_type, plain_code(real, p.zero_point, p.lo, p.hi));
}

static inline void plain_conv(const PlainConvParams& p, int begin, int end) {
    const int64_t* g = p.geometry;
    const int64_t *sx = g + X_STRIDES, *sy = g + Y_STRIDES, *sr = g + RESIDUAL_STRIDES;
    const int64_t taps = g[KERNEL] * g[KERNEL + 1] * g[KERNEL + 2];
    for (int64_t item = begin; item < end; ++item) {
        const int64_t oh = item % g[OUTPUT + 1], rest = item / g[OUTPUT + 1];
        const int64_t od = rest % g[OUTPUT], sample = rest / g[OUTPUT];
        for (int64_t ow = 0; ow < g[OUTPUT + 2]; ++ow)
            for (int64_t o = 0; o < g[GROUPS] * g[OUTER]; ++o) {
                const int64_t first = o / g[OUTER] * g[INNER];
                const int16_t* w = p.weight + o * taps * g[INNER];
                int64_t sum = p.bias[o];
                for (int64_t kd = 0; kd < g[KERNEL]; ++kd)
                    for (int64_t kh = 0; kh < g[KERNEL + 1]; ++kh)
                        for (int64_t kw = 0; kw < g[KERNEL + 2]; ++kw, w += g[INNER]) {
                            const int64_t d = tap_position(g, 0, od, kd);
                            const int64_t h = tap_position(g, 1, oh, kh);
                            const int64_t v = tap_position(g, 2, ow, kw);
                            if (d < 0 || h < 0 || v < 0) continue;
                            const int64_t at = sample * sx[0] + first * sx[1] + d * sx[2] +
                                               h * sx[3] + v * sx[4];
                            for (int64_t c = 0; c < g[INNER]; ++c)
                                sum += (load(p.x, at + c * sx[1], p.x_type) - p.x_zero_point) * w[c];
                        }
                const int64_t y_at = sample * sy[0] + o * sy[1] + od * sy[2] + oh * sy[3] + ow * sy[4];
                const int64_t r_at = sample * sr[0] + o * sr[1] + od * sr[2] + oh * sr[3] + ow * sr[4];
                plain_conv_output(p, sum, o, y_at, r_at);
            }
    }
}

static inline int plain_matmul_items(const PlainMatmulParams& p) {
    return static_cast<int>(p.samples * p.shape[1] * p.shape[2] * p.shape[3] * p.shape[4]);
}

static inline void plain_matmul(const PlainMatmulParams& p, int begin, int end) {
    const int64_t *sa = p.a_strides, *sb = p.b_strides, *sy = p.y_strides;
    for (int64_t item = begin; item < end; ++item) {
        int64_t rest = item, at_a = 0, at_b = 0, at_y = 0;
        for (int axis = 4; axis >= 0; --axis) {
            const int64_t i = axis ? rest % p.shape[axis] : rest;
            rest /= axis ? p.shape[axis] : 1;
            at_a += i * sa[axis];
            at_b += axis < 4 ? i * sb[axis] : 0;
            at_y += i * sy[axis];
        }
        int64_t total = 0;
        if (p.finish == MEAN_CODES || p.finish == MEAN_FLOATS)
            for (int64_t k = 0; k < p.depth; ++k)
                total += load(p.a, at_a + k * sa[5], p.a_type) - p.a_zero_point;
        for (int64_t n = 0; n < p.shape[5]; ++n) {
            int64_t sum = 0;
            for (int64_t k = 0; k < p.depth; ++k)
                sum += (load(p.a, at_a + k * sa[5], p.a_type) - p.a_zero_point) *
                       (load(p.b, at_b + n * sb[4] + k * sb[5], p.b_type) - p.b_zero_point);
            const int64_t at = at_y + n * sy[5];
            if (p.finish == ACCUMULATORS) {
                store(p.y, at, p.y_type, sum);
                continue;
            }
            float real = static_cast<float>(sum);
            if (p.finish == MEAN_CODES || p.finish == MEAN_FLOATS)
                real = real / (total ? static_cast<float>(total) : 1.0f);
            real = real * p.multiplier;
            if (p.finish == FLOATS || p.finish == MEAN_FLOATS)
                static_cast<float*>(p.y)[at] = real;
            else
                store(p.y, at, p.y_type, plain_code(real, p.zero_point, p.lo, p.hi));
        }
    }
}

}  // namespace portable
}  // namespace fxquant
