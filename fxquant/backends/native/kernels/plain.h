// Plain kernels: any integer type, any rank up to 6, any strides. They are what runs where no fast
// kernel fits, and they are written to be read beside fxquant/integer.
//
// A loop nest has 6 dimensions; dimension 0 is the batch, whose length is `samples`. Tables of 6
// strides are in elements. Work items are the pairs of an index of dimension 0 and one of 1.
#pragma once

#include <cstdint>
#include <cstring>

namespace fxquant {

enum Type : int32_t { U8 = 0, I8 = 1, I16 = 2, I32 = 3, I64 = 4, F32 = 5, BOOL = 6 };

static inline int64_t type_size(int32_t type) {
    switch (type) {
        case I16: return 2;
        case I32:
        case F32: return 4;
        case I64: return 8;
        default: return 1;
    }
}

static inline int64_t load(const void* p, int64_t index, int32_t type) {
    switch (type) {
        case I8: return static_cast<const int8_t*>(p)[index];
        case I16: return static_cast<const int16_t*>(p)[index];
        case I32: return static_cast<const int32_t*>(p)[index];
        case I64: return static_cast<const int64_t*>(p)[index];
        default: return static_cast<const uint8_t*>(p)[index];
    }
}

static inline void store(void* p, int64_t index, int32_t type, int64_t value) {
    switch (type) {
        case I8: static_cast<int8_t*>(p)[index] = static_cast<int8_t>(value); break;
        case I16: static_cast<int16_t*>(p)[index] = static_cast<int16_t>(value); break;
        case I32: static_cast<int32_t*>(p)[index] = static_cast<int32_t>(value); break;
        case I64: static_cast<int64_t*>(p)[index] = value; break;
        default: static_cast<uint8_t*>(p)[index] = static_cast<uint8_t>(value);
    }
}

// clamp(round_half_even(real) + zero_point, lo, hi). The clamp comes first, with shifted bounds,
// which is the same integer; then adding and subtracting 1.5 * 2^23 rounds half to even.
static inline int64_t plain_code(float real, int32_t zero_point, int32_t lo, int32_t hi) {
    const float low = static_cast<float>(lo - zero_point), high = static_cast<float>(hi - zero_point);
    real = real < low ? low : real > high ? high : real;
    const float magic = 12582912.0f;
    const float shifted = real + magic;
    return static_cast<int64_t>(shifted - magic) + zero_point;
}

// round_half_even(x * m / 2^e), saturated at +-2^33.
static inline int64_t scaled(int64_t x, int64_t m, int64_t e) {
    const __int128 product = static_cast<__int128>(x) * m;
    __int128 result = product >> e;
    if (e > 0) {
        const __int128 rest = product - (result << e), half = static_cast<__int128>(1) << (e - 1);
        if (rest > half || (rest == half && (result & 1))) ++result;
    }
    const __int128 limit = static_cast<__int128>(1) << 33;
    return static_cast<int64_t>(result < -limit ? -limit : result > limit ? limit : result);
}

static inline int64_t plain_clamp(int64_t value, int64_t lo, int64_t hi) {
    return value < lo ? lo : value > hi ? hi : value;
}

// Calls f(offsets, length) for every line of dimension 5 of the work items begin..end.
template <int N, class F>
static inline void walk(const int64_t* shape, const int64_t* const (&strides)[N], int begin, int end,
                        F f) {
    for (int64_t item = begin; item < end; ++item) {
        const int64_t i0 = item / shape[1], i1 = item % shape[1];
        for (int64_t i2 = 0; i2 < shape[2]; ++i2)
            for (int64_t i3 = 0; i3 < shape[3]; ++i3)
                for (int64_t i4 = 0; i4 < shape[4]; ++i4) {
                    int64_t offsets[N];
                    for (int n = 0; n < N; ++n) {
                        const int64_t* s = strides[n];
                        offsets[n] = i0 * s[0] + i1 * s[1] + i2 * s[2] + i3 * s[3] + i4 * s[4];
                    }
                    f(offsets, shape[5]);
                }
    }
}

// y = x, element by element.
struct PlainCopyParams {
    const void* x;
    void* y;
    const int64_t* shape;
    const int64_t* x_strides;
    const int64_t* y_strides;
    int64_t samples;
    int32_t size;  // bytes an element
};

// For each sample, in the order of the loops over y: y = x[index], `fill` where that is negative.
struct PlainGatherParams {
    const void* x;
    void* y;
    const int64_t* index;
    const int64_t* shape;
    const int64_t* y_strides;
    int64_t samples;
    int64_t x_stride;  // of a sample, in elements
    int64_t fill;
    int32_t size;
};

// The border of an image of bytes: y is pixel (0, 0), strides are in bytes, `rows` above and below,
// `columns` on both sides. Work items are the rows of the bordered image.
struct FillBorderParams {
    uint8_t* y;
    int64_t y_batch;
    int64_t y_row;
    int64_t y_pixel;
    int32_t batch;
    int32_t height;
    int32_t width;
    int32_t rows;
    int32_t columns;
    int32_t value;
};

struct PlainFillParams {
    void* y;
    const int64_t* shape;
    const int64_t* y_strides;
    int64_t samples;
    int32_t y_type;
    int64_t value;
};

struct PlainQuantizeParams {
    const float* x;
    void* y;
    const int64_t* shape;
    const int64_t* x_strides;
    const int64_t* y_strides;
    int64_t samples;
    float inverse;
    int32_t y_type;
    int32_t zero_point;
    int32_t lo;
    int32_t hi;
};

struct PlainDequantizeParams {
    const void* x;
    float* y;
    const int64_t* shape;
    const int64_t* x_strides;
    const int64_t* y_strides;
    int64_t samples;
    float scale;
    int32_t x_type;
    int32_t x_zero_point;
};

struct PlainLookupParams {
    const uint8_t* x;
    uint8_t* y;
    const int64_t* shape;
    const int64_t* x_strides;
    const int64_t* y_strides;
    int64_t samples;
    const uint8_t* table;  // 256 entries
};

// multiplier and offset have an element for each index of the dimension that `c_strides` counts.
struct PlainChannelAffineParams {
    const void* x;
    void* y;
    const int64_t* shape;
    const int64_t* x_strides;
    const int64_t* y_strides;
    const int64_t* c_strides;
    int64_t samples;
    const float* multiplier;
    const float* offset;
    int32_t x_type;
    int32_t x_zero_point;
    int32_t y_type;
    int32_t zero_point;
    int32_t lo;
    int32_t hi;
};

struct PlainRescaleParams {
    const void* x;
    void* y;
    const int64_t* shape;
    const int64_t* x_strides;
    const int64_t* y_strides;
    const int64_t* c_strides;
    int64_t samples;
    const int64_t* multiplier;
    const int64_t* shift;
    int32_t x_type;
    int32_t y_type;
    int64_t x_zero_point;
    int64_t zero_point;
    int64_t lo;
    int64_t hi;
};

enum PairKind : int32_t { ADD = 0, MUL = 1, MUL_ACCUMULATE = 2, ADD_RESCALED = 3 };

struct PlainPairParams {
    const void* a;
    const void* b;
    void* y;
    const int64_t* shape;
    const int64_t* a_strides;
    const int64_t* b_strides;
    const int64_t* y_strides;
    int64_t samples;
    int32_t kind;  // PairKind
    int32_t a_type;
    int32_t b_type;
    int32_t y_type;
    int64_t a_zero_point;
    int64_t b_zero_point;
    int64_t zero_point;
    int64_t lo;
    int64_t hi;
    float a_multiplier;  // of a sum; of a product, its one multiplier
    float b_multiplier;
    int64_t a_factor;  // of a rescaled sum
    int64_t a_shift;
    int64_t b_factor;
    int64_t b_shift;
};

namespace portable {

template <class P>
static inline int plain_items(const P& p) {
    return static_cast<int>(p.samples * p.shape[1]);
}

static inline int plain_copy_items(const PlainCopyParams& p) { return plain_items(p); }

template <class T>
static inline void copy_lines(const PlainCopyParams& p, int begin, int end) {
    const T* x = static_cast<const T*>(p.x);
    T* y = static_cast<T*>(p.y);
    const int64_t sx = p.x_strides[5], sy = p.y_strides[5];
    walk<2>(p.shape, {p.x_strides, p.y_strides}, begin, end, [&](const int64_t* at, int64_t n) {
        for (int64_t i = 0; i < n; ++i) y[at[1] + i * sy] = x[at[0] + i * sx];
    });
}

static inline void plain_copy(const PlainCopyParams& p, int begin, int end) {
    switch (p.size) {
        case 1: copy_lines<uint8_t>(p, begin, end); break;
        case 2: copy_lines<uint16_t>(p, begin, end); break;
        case 4: copy_lines<uint32_t>(p, begin, end); break;
        default: copy_lines<uint64_t>(p, begin, end);
    }
}

static inline int plain_gather_items(const PlainGatherParams& p) { return plain_items(p); }

template <class T>
static inline void gather_lines(const PlainGatherParams& p, int begin, int end) {
    const int64_t lines = p.shape[2] * p.shape[3] * p.shape[4], sy = p.y_strides[5];
    T* y = static_cast<T*>(p.y);
    for (int item = begin; item < end; ++item) {
        const T* x = static_cast<const T*>(p.x) + item / p.shape[1] * p.x_stride;
        const int64_t* index = p.index + item % p.shape[1] * lines * p.shape[5];
        walk<1>(p.shape, {p.y_strides}, item, item + 1, [&](const int64_t* at, int64_t n) {
            for (int64_t i = 0; i < n; ++i, ++index)
                y[at[0] + i * sy] = *index < 0 ? static_cast<T>(p.fill) : x[*index];
        });
    }
}

static inline void plain_gather(const PlainGatherParams& p, int begin, int end) {
    switch (p.size) {
        case 1: gather_lines<uint8_t>(p, begin, end); break;
        case 2: gather_lines<uint16_t>(p, begin, end); break;
        case 4: gather_lines<uint32_t>(p, begin, end); break;
        default: gather_lines<uint64_t>(p, begin, end);
    }
}

static inline int fill_border_items(const FillBorderParams& p) {
    return p.batch * (p.height + 2 * p.rows);
}

static inline void fill_border(const FillBorderParams& p, int begin, int end) {
    const int lines = p.height + 2 * p.rows;
    const size_t side = static_cast<size_t>(p.columns * p.y_pixel);
    for (int item = begin; item < end; ++item) {
        const int row = item % lines - p.rows;
        uint8_t* line = p.y + item / lines * p.y_batch + row * p.y_row;
        if (row < 0 || row >= p.height) {
            std::memset(line - side, p.value, static_cast<size_t>(p.y_row));
        } else {
            std::memset(line - side, p.value, side);
            std::memset(line + p.width * p.y_pixel, p.value, side);
        }
    }
}

static inline int plain_fill_items(const PlainFillParams& p) { return plain_items(p); }

static inline void plain_fill(const PlainFillParams& p, int begin, int end) {
    const int64_t sy = p.y_strides[5];
    walk<1>(p.shape, {p.y_strides}, begin, end, [&](const int64_t* at, int64_t n) {
        for (int64_t i = 0; i < n; ++i) store(p.y, at[0] + i * sy, p.y_type, p.value);
    });
}

static inline int plain_quantize_items(const PlainQuantizeParams& p) { return plain_items(p); }

static inline void plain_quantize(const PlainQuantizeParams& p, int begin, int end) {
    const int64_t sx = p.x_strides[5], sy = p.y_strides[5];
    walk<2>(p.shape, {p.x_strides, p.y_strides}, begin, end, [&](const int64_t* at, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
            float real = p.x[at[0] + i * sx] * p.inverse;
            real = real == real ? real : 0.0f;
            store(p.y, at[1] + i * sy, p.y_type, plain_code(real, p.zero_point, p.lo, p.hi));
        }
    });
}

static inline int plain_dequantize_items(const PlainDequantizeParams& p) { return plain_items(p); }

static inline void plain_dequantize(const PlainDequantizeParams& p, int begin, int end) {
    const int64_t sx = p.x_strides[5], sy = p.y_strides[5];
    walk<2>(p.shape, {p.x_strides, p.y_strides}, begin, end, [&](const int64_t* at, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
            const int64_t q = load(p.x, at[0] + i * sx, p.x_type) - p.x_zero_point;
            p.y[at[1] + i * sy] = static_cast<float>(q) * p.scale;
        }
    });
}

static inline int plain_lookup_items(const PlainLookupParams& p) { return plain_items(p); }

static inline void plain_lookup(const PlainLookupParams& p, int begin, int end) {
    const int64_t sx = p.x_strides[5], sy = p.y_strides[5];
    walk<2>(p.shape, {p.x_strides, p.y_strides}, begin, end, [&](const int64_t* at, int64_t n) {
        for (int64_t i = 0; i < n; ++i) p.y[at[1] + i * sy] = p.table[p.x[at[0] + i * sx]];
    });
}

static inline int plain_channel_affine_items(const PlainChannelAffineParams& p) {
    return plain_items(p);
}

static inline void plain_channel_affine(const PlainChannelAffineParams& p, int begin, int end) {
    const int64_t sx = p.x_strides[5], sy = p.y_strides[5], sc = p.c_strides[5];
    walk<3>(p.shape, {p.x_strides, p.y_strides, p.c_strides}, begin, end,
            [&](const int64_t* at, int64_t n) {
                for (int64_t i = 0; i < n; ++i) {
                    const int64_t q = load(p.x, at[0] + i * sx, p.x_type) - p.x_zero_point;
                    const float product = static_cast<float>(q) * p.multiplier[at[2] + i * sc];
                    const float real = product + p.offset[at[2] + i * sc];
                    store(p.y, at[1] + i * sy, p.y_type, plain_code(real, p.zero_point, p.lo, p.hi));
                }
            });
}

static inline int plain_rescale_items(const PlainRescaleParams& p) { return plain_items(p); }

static inline void plain_rescale(const PlainRescaleParams& p, int begin, int end) {
    const int64_t sx = p.x_strides[5], sy = p.y_strides[5], sc = p.c_strides[5];
    walk<3>(p.shape, {p.x_strides, p.y_strides, p.c_strides}, begin, end,
            [&](const int64_t* at, int64_t n) {
                for (int64_t i = 0; i < n; ++i) {
                    const int64_t q = load(p.x, at[0] + i * sx, p.x_type) - p.x_zero_point;
                    const int64_t c = at[2] + i * sc;
                    const int64_t rounded = scaled(q, p.multiplier[c], p.shift[c]);
                    store(p.y, at[1] + i * sy, p.y_type,
                          plain_clamp(rounded + p.zero_point, p.lo, p.hi));
                }
            });
}

static inline int plain_pair_items(const PlainPairParams& p) { return plain_items(p); }

static inline int64_t pair_result(const PlainPairParams& p, int64_t a, int64_t b) {
    const int32_t zero_point = static_cast<int32_t>(p.zero_point);
    const int32_t lo = static_cast<int32_t>(p.lo), hi = static_cast<int32_t>(p.hi);
    switch (p.kind) {
        case ADD: {
            const float left = static_cast<float>(a) * p.a_multiplier;
            const float right = static_cast<float>(b) * p.b_multiplier;
            return plain_code(left + right, zero_point, lo, hi);
        }
        case MUL: return plain_code(static_cast<float>(a * b) * p.a_multiplier, zero_point, lo, hi);
        case MUL_ACCUMULATE: return a * b;
        default:
            return plain_clamp(scaled(a, p.a_factor, p.a_shift) + scaled(b, p.b_factor, p.b_shift) +
                             p.zero_point,
                         p.lo, p.hi);
    }
}

static inline void plain_pair(const PlainPairParams& p, int begin, int end) {
    const int64_t sa = p.a_strides[5], sb = p.b_strides[5], sy = p.y_strides[5];
    walk<3>(p.shape, {p.a_strides, p.b_strides, p.y_strides}, begin, end,
            [&](const int64_t* at, int64_t n) {
                for (int64_t i = 0; i < n; ++i) {
                    const int64_t a = load(p.a, at[0] + i * sa, p.a_type) - p.a_zero_point;
                    const int64_t b = load(p.b, at[1] + i * sb, p.b_type) - p.b_zero_point;
                    store(p.y, at[2] + i * sy, p.y_type, pair_result(p, a, b));
                }
            });
}

}  // namespace portable
}  // namespace fxquant
