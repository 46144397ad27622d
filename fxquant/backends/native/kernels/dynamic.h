// Layers whose input is quantized when it is known: included once for each instruction set. Sums of
// products are integers, every float operation is rounded by itself: the same bits on all of them.

typedef int8_t Chars __attribute__((vector_size(16)));

static inline int dynamic_range_items(const DynamicRangeParams&) { return 1; }

// The rules are those of `choose_qparams` in fxquant/integer/dynamic.py, type by type.
static inline void choose_range(const float* x, int64_t size, float* range) {
    Floats least = {}, most = {};
    for (int64_t i = 0; i < size; i += 16) {
        const Floats values = load_lanes(x + i, size - i);
        least = values < least ? values : least;
        most = values > most ? values : most;
    }
    double low = 0.0, high = 0.0;
    for (int k = 0; k < 16; ++k) {
        low = least[k] < low ? least[k] : low;
        high = most[k] > high ? most[k] : high;
    }
    const float smallest = 6.1e-5f, largest_float = 3.402823466e+38f;
    double scale = (high - low) / 255;
    const float single = static_cast<float>(scale);
    if (single == 0.0f || !(1.0 / static_cast<double>(single) <= largest_float)) scale = 0.1;
    if (scale < smallest) {
        const float amplifier = smallest / static_cast<float>(scale);
        scale = smallest;
        if (low == 0.0) {
            high = smallest * 255.0f;
        } else if (high == 0.0) {
            low = -smallest * 255.0f;
        } else {
            low = static_cast<float>(low) * amplifier;
            high = static_cast<float>(high) * amplifier;
        }
    }
    const double below = low / scale < 0.0 ? -(low / scale) : low / scale;
    const double above = high / scale < 0.0 ? -(high / scale) : high / scale;
    double exact = below < 255 + above ? -low / scale : 255 - high / scale;
    exact = exact > 0.0 ? exact : 0.0;
    exact = exact < 255.0 ? exact : 255.0;
    range[0] = static_cast<float>(scale);
    range[1] = 1.0f / range[0];
    range[2] = static_cast<float>(__builtin_nearbyint(exact));
}

static inline void dynamic_range(const DynamicRangeParams& p, int begin, int end) {
    if (begin < end) choose_range(p.x, p.size, p.range);
}

static inline void quantize_dynamically(const float* x, int64_t size, const float* range,
                                        uint8_t* y) {
    struct {
        float inverse;
        int32_t zero_point, lo, hi;
    } codes = {range[1], static_cast<int32_t>(range[2]), 0, 255};
    for (int64_t i = 0; i < size; i += 16)
        store_lane_codes(y + i, load_lanes(x + i, size - i), size - i, codes);
}

static inline int dynamic_quantize_items(const DynamicQuantizeParams& p) {
    return static_cast<int>((p.size + 1023) / 1024);
}

static inline void dynamic_quantize(const DynamicQuantizeParams& p, int begin, int end) {
    const int64_t first = int64_t(begin) * 1024;
    const int64_t last = int64_t(end) * 1024 < p.size ? int64_t(end) * 1024 : p.size;
    quantize_dynamically(p.x + first, last - first, p.range, p.y + first);
}

// 16 outputs of one row.
static inline Floats dynamic_outputs(const DynamicLinearParams& p, const uint8_t* x,
                                     int64_t first) {
    const int64_t count = p.outputs - first;
    const int8_t* weight = p.weight + first * p.depth;
    const int32_t zero_point = static_cast<int32_t>(p.range[2]);
    Ints sum = {};
    for (int64_t k = 0; k < p.depth; ++k) {
        Chars line;
        __builtin_memcpy(&line, weight + k * 16, 16);
        sum += __builtin_convertvector(line, Ints) * (x[k] - zero_point);
    }
    const Doubles scales = __builtin_convertvector(load_lanes(p.scale + first, count), Doubles);
    const Doubles products = scales * static_cast<double>(p.range[0]);
    Floats y = __builtin_convertvector(sum, Floats) * __builtin_convertvector(products, Floats);
    if (p.bias) y = y + load_lanes(p.bias + first, count);
    return y;
}

static inline int dynamic_linear_items(const DynamicLinearParams& p) {
    return static_cast<int>(p.rows * ((p.outputs + 15) / 16));
}

static inline void dynamic_linear(const DynamicLinearParams& p, int begin, int end) {
    const int64_t blocks = (p.outputs + 15) / 16;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t row = item / blocks, first = item % blocks * 16;
        store_lanes(p.y + row * p.outputs + first,
                    dynamic_outputs(p, p.x + row * p.depth, first), p.outputs - first);
    }
}

// In doubles, and rounded once: within one unit in the last place of the true value.
static inline float sigmoid_of(float x) {
    return static_cast<float>(1.0 / (1.0 + __builtin_exp(-static_cast<double>(x))));
}

static inline float tanh_of(float x) {
    return static_cast<float>(__builtin_tanh(static_cast<double>(x)));
}

// The new state of one sample: `x` and `g` are its gates, of the input and of the state.
static inline void lstm_cell(const float* x, const float* g, float* h, float* c, int64_t hidden) {
    for (int64_t i = 0; i < hidden; ++i) {
        const float in = sigmoid_of(g[i] + x[i]);
        const float forget = sigmoid_of(g[hidden + i] + x[hidden + i]);
        const float fresh = tanh_of(g[2 * hidden + i] + x[2 * hidden + i]);
        const float out = sigmoid_of(g[3 * hidden + i] + x[3 * hidden + i]);
        const float kept = forget * c[i];
        const float added = in * fresh;
        c[i] = kept + added;
        h[i] = out * tanh_of(c[i]);
    }
}

static inline void gru_cell(const float* x, const float* g, float* h, int64_t hidden) {
    for (int64_t i = 0; i < hidden; ++i) {
        const float reset = sigmoid_of(g[i] + x[i]);
        const float update = sigmoid_of(g[hidden + i] + x[hidden + i]);
        const float scaled = g[2 * hidden + i] * reset;
        const float fresh = tanh_of(x[2 * hidden + i] + scaled);
        const float moved = (h[i] - fresh) * update;
        h[i] = moved + fresh;
    }
}

static inline int recurrent_items(const RecurrentParams&) { return 1; }

static inline void recurrent(const RecurrentParams& p, int begin, int end) {
    if (begin >= end) return;
    const int64_t size = p.batch * p.hidden, gates = (p.kind == LSTM ? 4 : 3) * p.hidden;
    for (int64_t i = 0; i < size; ++i) {
        p.h[i] = p.h_first ? p.h_first[i] : 0.0f;
        if (p.kind == LSTM) p.c[i] = p.c_first ? p.c_first[i] : 0.0f;
    }
    float range[3];
    const DynamicLinearParams layer = {p.codes, range,   p.weight, p.scale, p.bias,
                                       p.gates, p.batch, p.hidden, gates};
    for (int64_t t = 0; t < p.steps; ++t) {
        const int64_t step = p.reverse ? p.steps - 1 - t : t;
        choose_range(p.h, size, range);
        quantize_dynamically(p.h, size, range, p.codes);
        dynamic_linear(layer, 0, dynamic_linear_items(layer));
        for (int64_t b = 0; b < p.batch; ++b) {
            const float *x = p.x + (step * p.batch + b) * gates, *g = p.gates + b * gates;
            float* h = p.h + b * p.hidden;
            if (p.kind == LSTM)
                lstm_cell(x, g, h, p.c + b * p.hidden, p.hidden);
            else
                gru_cell(x, g, h, p.hidden);
            __builtin_memcpy(p.y + step * p.y_step + b * p.y_sample, h,
                             static_cast<size_t>(p.hidden) * 4);
        }
    }
}
