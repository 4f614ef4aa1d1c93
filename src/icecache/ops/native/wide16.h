/* What wide_body.h makes of sixteen lanes, AVX-512: codes are widened in registers, and sums stay
 * there.
 */
#ifndef ICECACHE_WIDE16_H
#define ICECACHE_WIDE16_H

#include <immintrin.h>
#include <stdint.h>

#include "products.h"

#define TARGET_16 __attribute__((target("avx512f")))
#define INLINE_16 TARGET_16 __attribute__((always_inline)) static inline
#define ENTRIES_16(heads) 4
#define CHUNKS_16(heads) 4

INLINE_16 __m512 widen_16(const int8_t *codes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes)));
}

/* Add neighbouring 128-bit parts of a, below those of b. */
INLINE_16 __m512 fold_parts(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

/* Add neighbouring lanes of each 128-bit part of a, below those of b. */
INLINE_16 __m512 fold_lanes(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

/* Lane 4 * i + j is the sum of all lanes of sum[4 * j + i]. */
INLINE_16 __m512 sum_of_lanes(__m512 *sum) {
    for (int i = 0; i < 8; i++) sum[i] = fold_parts(sum[2 * i], sum[2 * i + 1]);
    for (int i = 0; i < 4; i++) sum[i] = fold_parts(sum[2 * i], sum[2 * i + 1]);
    for (int i = 0; i < 2; i++) sum[i] = fold_lanes(sum[2 * i], sum[2 * i + 1]);
    return fold_lanes(sum[0], sum[1]);
}

/* out[4 * head + i] = dot products of `heads` queries, [heads, dim], with four entries. */
INLINE_16 void dots_16(int64_t dim, int64_t heads, const float *query, const int8_t *const *entry,
                       float *out) {
    __m512 sum[16];
    for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t at = 0; at < dim; at += 16) {
        __m512 one[4];
        for (int64_t g = 0; g < heads; g++) one[g] = _mm512_loadu_ps(query + g * dim + at);
        for (int i = 0; i < 4; i++) {
            __m512 other = widen_16(entry[i] + at);
            for (int64_t g = 0; g < heads; g++)
                sum[4 * i + g] = _mm512_fmadd_ps(one[g], other, sum[4 * i + g]);
        }
    }
    _mm512_storeu_ps(out, sum_of_lanes(sum));
}

/* out = products of eight entries with themselves, then with the point, [dim]. */
INLINE_16 void with_self_16(int64_t dim, const float *point, const int8_t *const *entry,
                            float *out) {
    __m512 sum[16];
    for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t at = 0; at < dim; at += 16) {
        __m512 one = _mm512_loadu_ps(point + at);
        for (int i = 0; i < 8; i++) {
            /* where sum_of_lanes puts lane i */
            int to = 4 * (i % 4) + i / 4;
            __m512 other = widen_16(entry[i] + at);
            sum[to] = _mm512_fmadd_ps(other, other, sum[to]);
            sum[to + 2] = _mm512_fmadd_ps(one, other, sum[to + 2]);
        }
    }
    _mm512_storeu_ps(out, sum_of_lanes(sum));
}

/* Add weighted entries to `chunks` * 16 elements, from `at` on, of each head's out [heads, dim]. */
INLINE_16 void add_16(int64_t chunks, PerHead weight, const int8_t *const *value, int64_t at,
                      int64_t num, float *out, int64_t dim) {
    int64_t heads = weight.heads;
    __m512 sum[4 * 4];
    for (int64_t g = 0; g < heads; g++)
        for (int64_t c = 0; c < chunks; c++)
            sum[g * 4 + c] = _mm512_loadu_ps(out + g * dim + at + c * 16);
    for (int64_t i = 0; i < num; i++) {
        __m512 part[4];
        for (int64_t c = 0; c < chunks; c++) part[c] = widen_16(value[i] + at + c * 16);
        for (int64_t g = 0; g < heads; g++) {
            __m512 w = _mm512_set1_ps(weight.data[g * weight.stride + i]);
            for (int64_t c = 0; c < chunks; c++)
                sum[g * 4 + c] = _mm512_fmadd_ps(w, part[c], sum[g * 4 + c]);
        }
    }
    for (int64_t g = 0; g < heads; g++)
        for (int64_t c = 0; c < chunks; c++)
            _mm512_storeu_ps(out + g * dim + at + c * 16, sum[g * 4 + c]);
}

#endif
