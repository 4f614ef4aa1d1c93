/* Short loops over head_dim that the compiler turns into vector code, one clone per x86 level. */
#ifndef ICECACHE_VECTOR_H
#define ICECACHE_VECTOR_H

#include <stdint.h>
#include <string.h>

#if !defined(__x86_64__) || !defined(__gnu_linux__) || !defined(__GNUC__) || defined(__clang__)
#define CLONES
#elif __GNUC__ < 12
#define CLONES __attribute__((target_clones("avx2", "default"), flatten))
#else
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

static inline float larger(float a, float b) { return a > b ? a : b; }

static inline float dot(const float *a, const float *b, int64_t dim) {
    float sum = 0.0f;
    for (int64_t i = 0; i < dim; i++) sum += a[i] * b[i];
    return sum;
}

static inline void add_scaled(float *out, float weight, const float *x, int64_t dim) {
    for (int64_t i = 0; i < dim; i++) out[i] += weight * x[i];
}

static inline void from_int8(const int8_t *codes, float *out, int64_t dim) {
    for (int64_t i = 0; i < dim; i++) out[i] = (float)codes[i];
}

static inline float from_half(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = (bits >> 10) & 31;
    uint32_t fraction = bits & 0x3ff, wide;
    float value;
    if (exponent == 0) {
        value = (float)fraction * 5.9604644775390625e-8f; /* 2 ** -24 */
        return sign ? -value : value;
    }
    wide = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    memcpy(&value, &wide, 4);
    return value;
}

/* Read `dim` elements from element `offset` on. */
static inline void to_float(const void *data, int64_t offset, int32_t dtype, float *out,
                            int64_t dim) {
    if (dtype == FLOAT32) {
        memcpy(out, (const float *)data + offset, sizeof(float) * dim);
    } else if (dtype == BFLOAT16) {
        const uint16_t *bits = (const uint16_t *)data + offset;
        for (int64_t i = 0; i < dim; i++) {
            uint32_t wide = (uint32_t)bits[i] << 16;
            memcpy(out + i, &wide, 4);
        }
    } else {
        const uint16_t *bits = (const uint16_t *)data + offset;
        for (int64_t i = 0; i < dim; i++) out[i] = from_half(bits[i]);
    }
}

/* exp(x) for x <= 0, relative error below 2e-7, 0 below -87; no branch. */
static inline float exponential(float x) {
    float clamped = larger(x, -87.0f);
    float scaled = clamped * 1.44269504088896341f;
    int32_t whole = (int32_t)(scaled - 0.5f);
    float rest = clamped - (float)whole * 0.693145751953125f;
    rest -= (float)whole * 1.428606765330187045e-6f;
    float series = 1.0f / 720.0f;
    series = series * rest + 1.0f / 120.0f;
    series = series * rest + 1.0f / 24.0f;
    series = series * rest + 1.0f / 6.0f;
    series = series * rest + 0.5f;
    series = series * rest + 1.0f;
    series = series * rest + 1.0f;
    union {
        int32_t bits;
        float value;
    } power = {((whole + 127) << 23) & -(x >= -87.0f)};
    return series * power.value;
}

#endif
