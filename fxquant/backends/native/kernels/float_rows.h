// The float islands in the terms of the compiler's vectors of 16 floats: included once for each
// instruction set, and the same bits on each of them, because no operation is fused or reordered.
//
// More than 300 lines, because the text is one for all instruction sets.

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(128)));

static inline Floats in_all_lanes(float value) { return Floats{} + value; }

static inline Floats load_lanes(const float* p, int64_t count) {
    if (count >= 16) {
        Floats all;
        __builtin_memcpy(&all, p, 64);
        return all;
    }
    Floats result = {};
    __builtin_memcpy(&result, p, static_cast<size_t>(count) * 4);
    return result;
}

static inline void store_lanes(float* p, Floats values, int64_t count) {
    if (count >= 16)
        __builtin_memcpy(p, &values, 64);
    else
        __builtin_memcpy(p, &values, static_cast<size_t>(count) * 4);
}

// clamp(round_half_even(x * inverse) + zero_point), NaN as 0.
#if defined(FXQUANT_ROWS_OF_512)
template <class P>
static inline void store_lane_codes(uint8_t* p, Floats x, int64_t count, const P& params) {
    const Quantizer to = quantizer_of(params.inverse, params.zero_point, params.lo, params.hi);
    const __m128i bytes = _mm512_cvtepi32_epi8(to.codes(x));
    if (count >= 16)
        __builtin_memcpy(p, &bytes, 16);
    else
        __builtin_memcpy(p, &bytes, static_cast<size_t>(count));
}
#else
template <class P>
static inline void store_lane_codes(uint8_t* p, Floats x, int64_t count, const P& params) {
    Floats real = x * params.inverse;
    real = real == real ? real : Floats{};
    const Floats low = in_all_lanes(static_cast<float>(params.lo - params.zero_point));
    const Floats high = in_all_lanes(static_cast<float>(params.hi - params.zero_point));
    real = real < low ? low : real;
    real = real > high ? high : real;
    real = (real + 12582912.0f) - 12582912.0f;
    const Ints codes = __builtin_convertvector(real, Ints) + params.zero_point;
    const Bytes bytes = __builtin_convertvector(codes, Bytes);
    if (count >= 16)
        __builtin_memcpy(p, &bytes, 16);
    else
        __builtin_memcpy(p, &bytes, static_cast<size_t>(count));
}
#endif

template <class P>
static inline void store_both(const P& p, float* y, uint8_t* codes, int64_t c, Floats values) {
    if (y) store_lanes(y + c, values, p.columns - c);
    if (codes) store_lane_codes(codes + c, values, p.columns - c, p);
}

static inline int64_t row_offset(const int64_t* strides, int64_t sample, int64_t outer,
                                 int64_t inner) {
    return sample * strides[0] + outer * strides[1] + inner * strides[2];
}

// Calls f(sample, outer, inner) for the rows begin..end.
template <class P, class F>
static inline void for_rows(const P& p, int begin, int end, F f) {
    if (begin >= end) return;
    int64_t sample = begin / (p.outer * p.inner), outer = begin / p.inner % p.outer;
    int64_t inner = begin % p.inner;
    for (int row = begin; row < end; ++row) {
        f(sample, outer, inner);
        if (++inner < p.inner) continue;
        inner = 0;
        if (++outer == p.outer) outer = 0, ++sample;
    }
}

// e^x for x <= 0 within 2 ulp: x = n ln 2 + r, a polynomial of r, and n goes into the exponent.
// Coefficients: S. Moshier, Cephes, expf.
static inline Floats exp_lanes(Floats x) {
    const Floats least = in_all_lanes(-87.3f);
    const Floats kept = x < least ? least : x;
    const Floats n = (kept * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
    const Floats r = (kept - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats y = in_all_lanes(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    Floats scale;
    __builtin_memcpy(&scale, &power, 64);
    const Floats result = y * scale;
    return x < in_all_lanes(-103.0f) ? Floats{} : result;
}

// erf(x): below 1 an odd polynomial, above 1 - e^(-x^2) times a polynomial of 1/x^2 over x.
// Coefficients: S. Moshier, Cephes, ndtrf.
static inline Floats erf_lanes(Floats x) {
    const Floats magnitude = x < Floats{} ? -x : x;
    const Floats z = x * x;
    Floats near = in_all_lanes(7.853861353153693e-5f);
    near = near * z + -8.010193625184903e-4f;
    near = near * z + 5.188327685732524e-3f;
    near = near * z + -2.685381193529856e-2f;
    near = near * z + 1.128358514861418e-1f;
    near = near * z + -3.761262582423300e-1f;
    near = near * z + 1.128379165726710f;
    near = near * x;
    const Floats safe = magnitude < in_all_lanes(1.0f) ? in_all_lanes(1.0f) : magnitude;
    const Floats q = 1.0f / safe, w = q * q;
    Floats middle = in_all_lanes(2.326819970068386e-2f);
    middle = middle * w + -1.387039388740657e-1f;
    middle = middle * w + 3.687424674597105e-1f;
    middle = middle * w + -5.824733027278666e-1f;
    middle = middle * w + 6.210004621745983e-1f;
    middle = middle * w + -4.944515323274145e-1f;
    middle = middle * w + 3.404879937665872e-1f;
    middle = middle * w + -2.741127028184656e-1f;
    middle = middle * w + 5.638259427386472e-1f;
    Floats far = in_all_lanes(-1.047766399936249e+1f);
    far = far * w + 1.297719955372516e+1f;
    far = far * w + -7.495518717768503e+0f;
    far = far * w + 2.921019019210786e+0f;
    far = far * w + -1.015265279202700e+0f;
    far = far * w + 4.218463358204948e-1f;
    far = far * w + -2.820767439740514e-1f;
    far = far * w + 5.641895067754075e-1f;
    const Floats tail = safe < in_all_lanes(2.0f) ? middle : far;
    const Floats outer = 1.0f - exp_lanes(-safe * safe) * q * tail;
    const Floats signed_outer = x < Floats{} ? -outer : outer;
    return magnitude < in_all_lanes(1.0f) ? near : signed_outer;
}

template <class P>
static inline int rows_items(const P& p) {
    return static_cast<int>(p.samples * p.outer * p.inner);
}

static inline int layer_norm_rows_items(const LayerNormRowsParams& p) { return rows_items(p); }

#if !defined(FXQUANT_ROWS_OF_256)
// The lanes in doubles, in pairs of halves.
static inline double sum_of(Floats values) {
    typedef float Half __attribute__((vector_size(32)));
    typedef double Eight __attribute__((vector_size(64)));
    typedef double Four __attribute__((vector_size(32)));
    Half halves[2];
    __builtin_memcpy(halves, &values, 64);
    const Eight eight =
        __builtin_convertvector(halves[0], Eight) + __builtin_convertvector(halves[1], Eight);
    Four fours[2];
    __builtin_memcpy(fours, &eight, 64);
    const Four four = fours[0] + fours[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// Rows that are taken together, so that one's sums need not wait for another's; the last of fewer
// stands for those that are missing.
struct NormRows {
    enum { MOST = 4 };
    const float* x[MOST];
    float* y[MOST];
    uint8_t* codes[MOST];
    int count = 0;
};

// Sums run in 16 lanes of floats, and the lanes are added as doubles.
static inline void norm_rows(const LayerNormRowsParams& p, const NormRows& rows) {
    const int64_t whole = p.columns / 16 * 16;
    const double count = static_cast<double>(p.columns);
    Floats sums[NormRows::MOST] = {}, squares[NormRows::MOST] = {};
    float center[NormRows::MOST], scale[NormRows::MOST];
    for (int64_t c = 0; c < whole; c += 16) {
        FXQUANT_UNROLL
        for (int r = 0; r < NormRows::MOST; ++r) sums[r] += load_lanes(rows.x[r] + c, 16);
    }
    for (int r = 0; r < rows.count; ++r) {
        if (whole < p.columns) sums[r] += load_lanes(rows.x[r] + whole, p.columns - whole);
        center[r] = static_cast<float>(sum_of(sums[r]) / count);
    }
    for (int r = rows.count; r < NormRows::MOST; ++r) center[r] = 0.0f;
    for (int64_t c = 0; c < whole; c += 16) {
        FXQUANT_UNROLL
        for (int r = 0; r < NormRows::MOST; ++r) {
            const Floats off = load_lanes(rows.x[r] + c, 16) - center[r];
            squares[r] += off * off;
        }
    }
    for (int r = 0; r < rows.count; ++r) {
        const float* x = rows.x[r];
        for (int64_t c = whole; c < p.columns; ++c)
            squares[r][c - whole] += (x[c] - center[r]) * (x[c] - center[r]);
        const double variance = sum_of(squares[r]) / count;
        scale[r] = static_cast<float>(1.0 / __builtin_sqrt(variance + p.epsilon));
    }
    for (int r = 0; r < rows.count; ++r)
        for (int64_t c = 0; c < p.columns; c += 16) {
            Floats value = (load_lanes(rows.x[r] + c, p.columns - c) - center[r]) * scale[r];
            if (p.weight) value = value * load_lanes(p.weight + c, p.columns - c);
            if (p.bias) value = value + load_lanes(p.bias + c, p.columns - c);
            store_both(p, rows.y[r], rows.codes[r], c, value);
        }
}

static inline void layer_norm_rows(const LayerNormRowsParams& p, int begin, int end) {
    NormRows rows;
    for_rows(p, begin, end, [&](int64_t s, int64_t o, int64_t i) {
        rows.x[rows.count] = p.x + row_offset(p.x_strides, s, o, i);
        rows.y[rows.count] = p.y ? p.y + row_offset(p.y_strides, s, o, i) : nullptr;
        rows.codes[rows.count] = p.codes ? p.codes + row_offset(p.codes_strides, s, o, i) : nullptr;
        if (++rows.count < NormRows::MOST) return;
        norm_rows(p, rows);
        rows.count = 0;
    });
    if (!rows.count) return;
    for (int r = rows.count; r < NormRows::MOST; ++r) rows.x[r] = rows.x[rows.count - 1];
    norm_rows(p, rows);
}
#endif

static inline int softmax_rows_items(const SoftmaxRowsParams& p) { return rows_items(p); }

static inline Floats masked_lanes(Floats x, const uint8_t* mask, int64_t count, float outside) {
    for (int64_t k = 0; k < 16; ++k)
        if (k >= count || (mask && !mask[k])) x[k] = outside;
    return x;
}

static inline void softmax_rows(const SoftmaxRowsParams& p, int begin, int end) {
    // A row of numerators that are to be divided is kept here.
    for_rows(p, begin, end, [&](int64_t s, int64_t o, int64_t i) {
        const float* x = p.x + row_offset(p.x_strides, s, o, i);
        const uint8_t* mask = p.mask ? p.mask + row_offset(p.mask_strides, s, o, i) : nullptr;
        float* y = p.y ? p.y + row_offset(p.y_strides, s, o, i) : nullptr;
        uint8_t* codes = p.codes ? p.codes + row_offset(p.codes_strides, s, o, i) : nullptr;
        const float lowest = -3.402823466e+38f;
        auto line = [&](int64_t c) {
            const Floats values = load_lanes(x + c, p.columns - c);
            if (!mask && c + 16 <= p.columns) return values;
            return masked_lanes(values, mask ? mask + c : nullptr, p.columns - c, lowest);
        };
        Floats most = in_all_lanes(lowest);
        for (int64_t c = 0; c < p.columns; c += 16) {
            const Floats values = line(c);
            most = values > most ? values : most;
        }
        float largest = lowest;
        for (int k = 0; k < 16; ++k) largest = most[k] > largest ? most[k] : largest;
        float total = 1.0f;
        if (p.divide) {
            Floats sums = {};
            for (int64_t c = 0; c < p.columns; c += 16) sums += exp_lanes(line(c) - largest);
            total = 0.0f;
            for (int k = 0; k < 16; ++k) total += sums[k];
        }
        for (int64_t c = 0; c < p.columns; c += 16) {
            Floats value = exp_lanes(line(c) - largest);
            if (mask) value = masked_lanes(value, mask + c, p.columns - c, 0.0f);
            if (p.divide) value = value / total;
            store_both(p, y, codes, c, value);
        }
    });
}

// A NaN stays one, as torch has it.
static inline Floats clamp_lanes(Floats x, float least, float most) {
    x = x < in_all_lanes(least) ? in_all_lanes(least) : x;
    return x > in_all_lanes(most) ? in_all_lanes(most) : x;
}

static inline int function_rows_items(const FunctionRowsParams& p) { return rows_items(p); }

static inline void function_rows(const FunctionRowsParams& p, int begin, int end) {
    for_rows(p, begin, end, [&](int64_t s, int64_t o, int64_t i) {
        const float* x = p.x + row_offset(p.x_strides, s, o, i);
        float* y = p.y ? p.y + row_offset(p.y_strides, s, o, i) : nullptr;
        uint8_t* codes = p.codes ? p.codes + row_offset(p.codes_strides, s, o, i) : nullptr;
        for (int64_t c = 0; c < p.columns; c += 16) {
            Floats value = load_lanes(x + c, p.columns - c);
            if (p.function == FLOAT_RELU)
                value = value < Floats{} ? Floats{} : value;
            else if (p.function == FLOAT_CLAMP)
                value = clamp_lanes(value, p.least, p.most);
            else if (p.function == FLOAT_GELU)
                value = value * 0.5f * (1.0f + erf_lanes(value * 0.70710678118654752440f));
            store_both(p, y, codes, c, value);
        }
    });
}

static inline int pair_rows_items(const PairRowsParams& p) { return rows_items(p); }

#if !defined(FXQUANT_ROWS_OF_256)
static inline void pair_rows(const PairRowsParams& p, int begin, int end) {
    for_rows(p, begin, end, [&](int64_t s, int64_t o, int64_t i) {
        const float* a = p.a + row_offset(p.a_strides, s, o, i);
        const float* b = p.b + row_offset(p.b_strides, s, o, i);
        float* y = p.y ? p.y + row_offset(p.y_strides, s, o, i) : nullptr;
        uint8_t* codes = p.codes ? p.codes + row_offset(p.codes_strides, s, o, i) : nullptr;
        for (int64_t c = 0; c < p.columns; c += 16) {
            const Floats left = load_lanes(a + c, p.columns - c);
            const Floats right = p.b_step ? load_lanes(b + c, p.columns - c) : in_all_lanes(*b);
            const Floats value = p.kind == FLOAT_ADD   ? left + right
                                 : p.kind == FLOAT_SUB ? left - right
                                 : p.kind == FLOAT_MUL ? left * right
                                                       : left / right;
            store_both(p, y, codes, c, value);
        }
    });
}
#endif

static inline int pool_rows_items(const PoolRowsParams& p) {
    return static_cast<int>(p.batch * p.height * ((p.channels + 63) / 64));
}

// 16 channels of one window.
static inline Floats pool_window(const PoolRowsParams& p, const float* x, int64_t count,
                                 int64_t row, int64_t column) {
    const int32_t *rows = p.row_range + 2 * row, *columns = p.column_range + 2 * column;
    Doubles sum = {};
    Floats largest = in_all_lanes(-__builtin_inff());
    for (int64_t i = rows[0]; i < rows[1]; i += p.row_step)
        for (int64_t j = columns[0]; j < columns[1]; j += p.column_step) {
            const Floats value = load_lanes(x + i * p.x_row + j * p.x_pixel, count);
            if (p.kind == FLOAT_MAX)
                largest = value > largest || value != value ? value : largest;
            else
                sum += __builtin_convertvector(value, Doubles);
        }
    if (p.kind == FLOAT_MAX) return largest;
    if (p.kind == FLOAT_MEAN) sum /= p.counts[row * p.width + column];
    return __builtin_convertvector(sum, Floats);
}

static inline void pool_rows(const PoolRowsParams& p, int begin, int end) {
    const int64_t blocks = (p.channels + 63) / 64;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t row = item / blocks % p.height, sample = item / blocks / p.height;
        const int64_t first = item % blocks * 64;
        const int64_t last = first + 64 < p.channels ? first + 64 : p.channels;
        for (int64_t column = 0; column < p.width; ++column)
            for (int64_t c = first; c < last; c += 16) {
                const float* x = p.x + sample * p.x_batch + c;
                float* y = p.y + sample * p.y_batch + row * p.y_row + column * p.y_pixel + c;
                store_lanes(y, pool_window(p, x, last - c, row, column), last - c);
            }
    }
}
