/* Products of queries with int8 summaries by AVX-512: codes are widened in registers, and sums stay
 * there. The loops beside the calls are the same for other processors and head_dims.
 */
#ifndef ICECACHE_WIDE_H
#define ICECACHE_WIDE_H

#include <stdint.h>

#include "products.h"

enum { WIDE = 16, WIDE_HEADS = 4, WIDE_ENTRIES = 4 };

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>

#define WIDE_TARGET __attribute__((target("avx512f")))
#define WIDE_INLINE WIDE_TARGET __attribute__((always_inline)) static inline

static inline int can_go_wide(int64_t dim) {
    __builtin_cpu_init();
    return dim % WIDE == 0 && __builtin_cpu_supports("avx512f");
}

WIDE_INLINE __m512 widen_codes(const int8_t *codes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes)));
}

/* Add neighbouring 128-bit parts of a, below those of b. */
WIDE_INLINE __m512 fold_parts(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

/* Add neighbouring lanes of each 128-bit part of a, below those of b. */
WIDE_INLINE __m512 fold_lanes(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

/* Lane 4 * i + j is the sum of all lanes of sum[4 * j + i]. */
WIDE_INLINE __m512 sum_of_lanes(__m512 *sum) {
    for (int i = 0; i < 8; i++) sum[i] = fold_parts(sum[2 * i], sum[2 * i + 1]);
    for (int i = 0; i < 4; i++) sum[i] = fold_parts(sum[2 * i], sum[2 * i + 1]);
    for (int i = 0; i < 2; i++) sum[i] = fold_lanes(sum[2 * i], sum[2 * i + 1]);
    return fold_lanes(sum[0], sum[1]);
}

/* Dot products of `heads` queries, [heads, dim], with four entries: lane 4 * head + entry. */
WIDE_INLINE __m512 wide_dots(int64_t dim, int64_t heads, const float *query,
                             const int8_t *const *entry) {
    __m512 sum[WIDE];
    for (int i = 0; i < WIDE; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t at = 0; at < dim; at += WIDE) {
        __m512 one[WIDE_HEADS];
        for (int64_t g = 0; g < heads; g++) one[g] = _mm512_loadu_ps(query + g * dim + at);
        for (int i = 0; i < WIDE_ENTRIES; i++) {
            __m512 other = widen_codes(entry[i] + at);
            for (int64_t g = 0; g < heads; g++)
                sum[4 * i + g] = _mm512_fmadd_ps(one[g], other, sum[4 * i + g]);
        }
    }
    return sum_of_lanes(sum);
}

/* Of eight entries: lane 8 + entry of the result is the entry's product with the point, [dim], lane
 * entry its product with itself. */
WIDE_INLINE __m512 wide_with_self(int64_t dim, const float *point, const int8_t *const *entry) {
    __m512 sum[WIDE];
    for (int i = 0; i < WIDE; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t at = 0; at < dim; at += WIDE) {
        __m512 one = _mm512_loadu_ps(point + at);
        for (int i = 0; i < WIDE / 2; i++) {
            /* where sum_of_lanes puts lane i */
            int to = 4 * (i % 4) + i / 4;
            __m512 other = widen_codes(entry[i] + at);
            sum[to] = _mm512_fmadd_ps(other, other, sum[to]);
            sum[to + 2] = _mm512_fmadd_ps(one, other, sum[to + 2]);
        }
    }
    return sum_of_lanes(sum);
}

/* Add weighted entries to `chunks` * 16 elements, from `at` on, of each head's output [heads, dim]. */
WIDE_INLINE void wide_add(int64_t chunks, PerHead weight, const int8_t *const *value, int64_t at,
                          int64_t num, float *out, int64_t dim) {
    int64_t heads = weight.heads;
    __m512 sum[WIDE_HEADS * 4];
    for (int64_t g = 0; g < heads; g++)
        for (int64_t c = 0; c < chunks; c++)
            sum[g * 4 + c] = _mm512_loadu_ps(out + g * dim + at + c * WIDE);
    for (int64_t i = 0; i < num; i++) {
        __m512 part[4];
        for (int64_t c = 0; c < chunks; c++) part[c] = widen_codes(value[i] + at + c * WIDE);
        for (int64_t g = 0; g < heads; g++) {
            __m512 w = _mm512_set1_ps(weight.data[g * weight.stride + i]);
            for (int64_t c = 0; c < chunks; c++)
                sum[g * 4 + c] = _mm512_fmadd_ps(w, part[c], sum[g * 4 + c]);
        }
    }
    for (int64_t g = 0; g < heads; g++)
        for (int64_t c = 0; c < chunks; c++)
            _mm512_storeu_ps(out + g * dim + at + c * WIDE, sum[g * 4 + c]);
}

/* Call f with a number of heads that the compiler knows. */
#define BY_HEADS(heads, f, ...)          \
    switch (heads) {                     \
    case 1: f(1, __VA_ARGS__); break;    \
    case 2: f(2, __VA_ARGS__); break;    \
    case 3: f(3, __VA_ARGS__); break;    \
    default: f(4, __VA_ARGS__);          \
    }
#endif
#endif
