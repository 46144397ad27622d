// Plain kernels along rows: softmax, GELU, layer norm and division by the norm on integers.
//
// Dimension 5 is the row; work items are the pairs of an index of dimension 0 and one of 1.
#pragma once

#include <cmath>

#include "plain.h"

namespace fxquant {

enum SoftmaxKind : int32_t { SOFTMAX_TABLE = 0, SOFTMAX_I_VIT = 1, SOFTMAX_LOG2 = 2 };

struct PlainSoftmaxParams {
    const void* x;
    const uint8_t* mask;  // or null
    void* y;
    const int64_t* shape;
    const int64_t* x_strides;
    const int64_t* mask_strides;
    const int64_t* y_strides;
    const int64_t* table;   // exponentials by the distance from the largest code
    const int64_t* powers;  // of log2: the code of each exponent, 0 behind the last
    int64_t samples;
    int64_t numerator;  // of the table
    int32_t kind;
    int32_t bits;
    int32_t x_type;
    int32_t y_type;
    int64_t lo;
    int64_t hi;
};

struct PlainShiftGeluParams {
    const void* x;
    void* y;
    const int64_t* shape;
    const int64_t* x_strides;
    const int64_t* y_strides;
    const int64_t* table;
    int64_t samples;
    int32_t bits;
    int32_t x_type;
    int32_t y_type;
    int32_t x_zero_point;
};

enum NormKind : int32_t { NORM_INTEGER = 0, NORM_I_VIT = 1, NORM_POWER_OF_TWO = 2, NORM_UNIT = 3 };

struct PlainNormParams {
    const void* x;
    void* y;
    const int64_t* bias;    // [row] or null
    const int64_t* shifts;  // of power_of_two: [row]
    const int64_t* shape;
    const int64_t* x_strides;
    const int64_t* y_strides;
    int64_t samples;
    int32_t kind;
    int32_t x_type;
    int32_t y_type;
    int32_t x_zero_point;
};

namespace portable {

static const int64_t LARGEST_INT32 = 2147483647;

static inline int plain_softmax_items(const PlainSoftmaxParams& p) { return plain_items(p); }

// The code of one exponential e out of a row whose sum is total.
static inline int64_t softmax_code(const PlainSoftmaxParams& p, int64_t e, int64_t total) {
    if (p.kind == SOFTMAX_TABLE) {
        const int64_t divisor = total * 512 < 1 ? 1 : total * 512;
        return plain_clamp((e * 2 * p.numerator + total * 256) / divisor, p.lo, p.hi);
    }
    if (p.kind == SOFTMAX_I_VIT) {
        const int64_t factor = LARGEST_INT32 / plain_clamp(total, 1, LARGEST_INT32);
        return (e * factor) >> (32 - p.bits);
    }
    const int64_t last = int64_t(1) << p.bits;
    if (e == 0) return p.powers[last];
    const double ratio = std::nearbyint(static_cast<double>(total) / static_cast<double>(e));
    int64_t bits;
    std::memcpy(&bits, &ratio, 8);
    // The exponent of the double; the first bit of its mantissa rounds it.
    const int64_t exponent = (((bits >> 51) + 1) >> 1) - 1023;
    return p.powers[exponent < last ? exponent : last];
}

static inline void plain_softmax(const PlainSoftmaxParams& p, int begin, int end) {
    const int64_t sx = p.x_strides[5], sm = p.mask_strides[5], sy = p.y_strides[5];
    const int64_t least = p.x_type == I16 ? -32768 : p.x_type == I8 ? -128 : 0;
    walk<3>(p.shape, {p.x_strides, p.mask_strides, p.y_strides}, begin, end,
            [&](const int64_t* at, int64_t n) {
                auto is_in = [&](int64_t i) { return !p.mask || p.mask[at[1] + i * sm]; };
                auto code = [&](int64_t i) { return load(p.x, at[0] + i * sx, p.x_type) - least; };
                int64_t largest = 0, total = 0;
                for (int64_t i = 0; i < n; ++i)
                    if (is_in(i) && code(i) > largest) largest = code(i);
                auto exponential = [&](int64_t i) {
                    return is_in(i) ? p.table[largest - code(i)] : int64_t(0);
                };
                for (int64_t i = 0; i < n; ++i) total += exponential(i);
                for (int64_t i = 0; i < n; ++i)
                    store(p.y, at[2] + i * sy, p.y_type, softmax_code(p, exponential(i), total));
            });
}

static inline int plain_shift_gelu_items(const PlainShiftGeluParams& p) { return plain_items(p); }

static inline void plain_shift_gelu(const PlainShiftGeluParams& p, int begin, int end) {
    const int64_t sx = p.x_strides[5], sy = p.y_strides[5];
    walk<2>(p.shape, {p.x_strides, p.y_strides}, begin, end, [&](const int64_t* at, int64_t n) {
        auto value = [&](int64_t i) {
            return load(p.x, at[0] + i * sx, p.x_type) - p.x_zero_point;
        };
        int64_t top = 0;
        for (int64_t i = 0; i < n; ++i) top = value(i) > top ? value(i) : top;
        for (int64_t i = 0; i < n; ++i) {
            const int64_t e = p.table[top - value(i)];
            const int64_t total = e + p.table[top];
            const int64_t factor = LARGEST_INT32 / (total < LARGEST_INT32 ? total : LARGEST_INT32);
            store(p.y, at[1] + i * sy, p.y_type, value(i) * ((e * factor) >> (32 - p.bits)));
        }
    });
}

// floor(sqrt(v)) for v below 2^62.
static inline int64_t integer_root(int64_t v) {
    int64_t root = static_cast<int64_t>(std::sqrt(static_cast<double>(v)));
    while (root * root > v) --root;
    while ((root + 1) * (root + 1) <= v) ++root;
    return root;
}

// 1 / sqrt(v) = f / 2^e, as fxquant/integer/roots.py derives.
static inline void inverse_root(int64_t v, int64_t& factor, int64_t& exponent) {
    int64_t length = 0;
    while (length < 63 && (v >> length)) ++length;
    const int64_t j = (62 - length) >> 1;
    exponent = 52 - j;
    factor = v > 0 ? (int64_t(1) << 52) / integer_root(v << (2 * j)) : 0;
}

static inline int plain_norm_items(const PlainNormParams& p) { return plain_items(p); }

// What is normalized: of power_of_two in 8 bits and a power of two for each channel.
static inline int64_t norm_input(const PlainNormParams& p, int64_t at, int64_t i) {
    const int64_t q = load(p.x, at, p.x_type);
    if (p.kind == NORM_INTEGER) return q;
    if (p.kind != NORM_POWER_OF_TWO) return q - p.x_zero_point;
    const int64_t rounded = scaled(q - p.x_zero_point, 1, p.shifts[i]);
    return plain_clamp(rounded, -128, 127) * (int64_t(1) << p.shifts[i]);
}

static inline void plain_norm(const PlainNormParams& p, int begin, int end) {
    const int64_t sx = p.x_strides[5], sy = p.y_strides[5];
    walk<2>(p.shape, {p.x_strides, p.y_strides}, begin, end, [&](const int64_t* at, int64_t n) {
        auto value = [&](int64_t i) { return norm_input(p, at[0] + i * sx, i); };
        int64_t total = 0, squares = 0, factor = 0, exponent = 0;
        for (int64_t i = 0; i < n; ++i) {
            total += value(i);
            squares += value(i) * value(i);
        }
        int64_t mean = 0;
        if (p.kind == NORM_I_VIT) {
            mean = static_cast<int64_t>(
                std::nearbyint(static_cast<double>(total) / static_cast<double>(n)));
            int64_t off = 0, k = 65536;
            for (int64_t i = 0; i < n; ++i) off += (value(i) - mean) * (value(i) - mean);
            for (int step = 0; step < 10; ++step) k = (k + off / k) >> 1;
            factor = LARGEST_INT32 / k;
        } else if (p.kind == NORM_UNIT) {
            inverse_root(squares, factor, exponent);
        } else {
            inverse_root(n * squares - total * total, factor, exponent);
        }
        for (int64_t i = 0; i < n; ++i) {
            int64_t result;
            if (p.kind == NORM_I_VIT)
                result = ((value(i) - mean) * factor) >> 1;
            else if (p.kind == NORM_UNIT)
                result = plain_clamp(scaled(value(i), factor, exponent - 15), -32767, 32767);
            else
                result = scaled(n * value(i) - total, factor, exponent - 20);
            if (p.bias) result += p.bias[i];
            store(p.y, at[1] + i * sy, p.y_type, result);
        }
    });
}

}  // namespace portable
}  // namespace fxquant
