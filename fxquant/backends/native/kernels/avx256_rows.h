// Layer norm and sums of rows on registers of 256 bits: compilers take the vectors of 64 bytes of
// float_rows.h apart there. Included where FXQUANT_ROWS_OF_256 is set, as float_rows.h is.

// Some of a row's floats, and where their results go.
static inline void store_eight(float* y, uint8_t* codes, int64_t c, int64_t count, __m256 values,
                               const Quantizer& quantizer) {
    const int some = count < 8 ? static_cast<int>(count) : 8;
    if (y) _mm256_maskstore_ps(y + c, mask_of(some), values);
    if (codes) quantizer.store(codes + c, values, some);
}

static inline double sum_of_eight(__m256 values) {
    const __m256d four = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(values)),
                                       _mm256_cvtps_pd(_mm256_extractf128_ps(values, 1)));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

static inline __m256 load_eight(const float* p, int64_t count) {
    return count >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, mask_of(static_cast<int>(count)));
}

static inline void layer_norm_rows(const LayerNormRowsParams& p, int begin, int end) {
    const Quantizer quantizer = quantizer_of(p.inverse, p.zero_point, p.lo, p.hi);
    for_rows(p, begin, end, [&](int64_t s, int64_t o, int64_t i) {
        const float* x = p.x + row_offset(p.x_strides, s, o, i);
        float* y = p.y ? p.y + row_offset(p.y_strides, s, o, i) : nullptr;
        uint8_t* codes = p.codes ? p.codes + row_offset(p.codes_strides, s, o, i) : nullptr;
        const double count = static_cast<double>(p.columns);
        __m256 sums = _mm256_setzero_ps(), squares = _mm256_setzero_ps();
        for (int64_t c = 0; c < p.columns; c += 8)
            sums = _mm256_add_ps(sums, load_eight(x + c, p.columns - c));
        const __m256 center = _mm256_set1_ps(static_cast<float>(sum_of_eight(sums) / count));
        for (int64_t c = 0; c < p.columns; c += 8) {
            __m256 off = _mm256_sub_ps(load_eight(x + c, p.columns - c), center);
            if (p.columns - c < 8)
                off = _mm256_and_ps(
                    off, _mm256_castsi256_ps(mask_of(static_cast<int>(p.columns - c))));
            squares = _mm256_add_ps(squares, _mm256_mul_ps(off, off));
        }
        const double variance = sum_of_eight(squares) / count;
        const __m256 scale =
            _mm256_set1_ps(static_cast<float>(1.0 / __builtin_sqrt(variance + p.epsilon)));
        for (int64_t c = 0; c < p.columns; c += 8) {
            const int64_t rest = p.columns - c;
            __m256 value = _mm256_mul_ps(_mm256_sub_ps(load_eight(x + c, rest), center), scale);
            if (p.weight) value = _mm256_mul_ps(value, load_eight(p.weight + c, rest));
            if (p.bias) value = _mm256_add_ps(value, load_eight(p.bias + c, rest));
            store_eight(y, codes, c, rest, value, quantizer);
        }
    });
}

static inline void pair_rows(const PairRowsParams& p, int begin, int end) {
    const Quantizer quantizer = quantizer_of(p.inverse, p.zero_point, p.lo, p.hi);
    for_rows(p, begin, end, [&](int64_t s, int64_t o, int64_t i) {
        const float* a = p.a + row_offset(p.a_strides, s, o, i);
        const float* b = p.b + row_offset(p.b_strides, s, o, i);
        float* y = p.y ? p.y + row_offset(p.y_strides, s, o, i) : nullptr;
        uint8_t* codes = p.codes ? p.codes + row_offset(p.codes_strides, s, o, i) : nullptr;
        for (int64_t c = 0; c < p.columns; c += 8) {
            const __m256 left = load_eight(a + c, p.columns - c);
            const __m256 right =
                p.b_step ? load_eight(b + c, p.columns - c) : _mm256_set1_ps(*b);
            const __m256 value = p.kind == FLOAT_ADD   ? _mm256_add_ps(left, right)
                                 : p.kind == FLOAT_SUB ? _mm256_sub_ps(left, right)
                                 : p.kind == FLOAT_MUL ? _mm256_mul_ps(left, right)
                                                       : _mm256_div_ps(left, right);
            store_eight(y, codes, c, p.columns - c, value, quantizer);
        }
    });
}
