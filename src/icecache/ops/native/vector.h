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

/* Bytes that will be read soon. */
static inline void prefetch(const void *data, int64_t bytes) {
#if defined(__GNUC__)
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)data + i);
#else
    (void)data, (void)bytes;
#endif
}

static inline float larger(float a, float b) { return a > b ? a : b; }

static inline float dot(const float *a, const float *b, int64_t dim) {
    float sum = 0.0f;
    for (int64_t i = 0; i < dim; i++) sum += a[i] * b[i];
    return sum;
}

static inline void add_scaled(float *out, float weight, const float *x, int64_t dim) {
    for (int64_t i = 0; i < dim; i++) out[i] += weight * x[i];
}

static inline float from_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* Nearest, ties to even, as torch rounds. */
static inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
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
        for (int64_t i = 0; i < dim; i++) out[i] = from_bfloat16(bits[i]);
    } else {
        const uint16_t *bits = (const uint16_t *)data + offset;
        for (int64_t i = 0; i < dim; i++) out[i] = from_half(bits[i]);
    }
}

/* Call f with a head_dim that the compiler knows, so that its loops are unrolled. */
#define BY_DIM(dim, f, ...)               \
    switch (dim) {                        \
    case 64: f(64, __VA_ARGS__); break;   \
    case 80: f(80, __VA_ARGS__); break;   \
    case 96: f(96, __VA_ARGS__); break;   \
    case 128: f(128, __VA_ARGS__); break; \
    case 256: f(256, __VA_ARGS__); break; \
    default: f(dim, __VA_ARGS__);         \
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
