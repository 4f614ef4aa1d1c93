/* What wide_body.h makes of eight lanes, AVX2: sixteen registers hold the sums of three heads and
 * four entries, or of four and three.
 */
#ifndef ICECACHE_WIDE8_H
#define ICECACHE_WIDE8_H

#include <immintrin.h>
#include <stdint.h>

#include "products.h"

#define TARGET_8 __attribute__((target("avx2,fma")))
#define INLINE_8 TARGET_8 __attribute__((always_inline)) static inline
#define ENTRIES_8(heads) ((heads) < 4 ? 4 : 3)
#define CHUNKS_8(heads) ((heads) < 4 ? 4 : 2)

INLINE_8 __m256 widen_8(const int8_t *codes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)codes)));
}

/* Add neighbouring lanes of each 128-bit part of a, below those of b. */
INLINE_8 __m256 fold_8(__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
}

/* Lane i is the sum of all lanes of sum[i]. */
INLINE_8 __m128 sum_of_four(const __m256 *sum) {
    __m256 all = fold_8(fold_8(sum[0], sum[1]), fold_8(sum[2], sum[3]));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

/* Add the products of some elements of queries and entries to sum[head * num + i]: what is three
 * stays in registers, and what is four passes by. */
INLINE_8 void add_products(int64_t dim, int64_t heads, int64_t num, const float *query,
                           const int8_t *const *entry, int64_t at, __m256 *sum) {
    __m256 held[3];
    if (heads < num) {
        for (int64_t g = 0; g < heads; g++) held[g] = _mm256_loadu_ps(query + g * dim + at);
        for (int64_t i = 0; i < num; i++) {
            __m256 other = widen_8(entry[i] + at);
            for (int64_t g = 0; g < heads; g++)
                sum[g * num + i] = _mm256_fmadd_ps(held[g], other, sum[g * num + i]);
        }
    } else {
        for (int64_t i = 0; i < num; i++) held[i] = widen_8(entry[i] + at);
        for (int64_t g = 0; g < heads; g++) {
            __m256 one = _mm256_loadu_ps(query + g * dim + at);
            for (int64_t i = 0; i < num; i++)
                sum[g * num + i] = _mm256_fmadd_ps(one, held[i], sum[g * num + i]);
        }
    }
}

/* out[4 * head + i] = dot products of `heads` queries, [heads, dim], with ENTRIES_8 entries. */
INLINE_8 void dots_8(int64_t dim, int64_t heads, const float *query, const int8_t *const *entry,
                     float *out) {
    const int64_t num = ENTRIES_8(heads);
    __m256 sum[12];
    for (int64_t i = 0; i < heads * num; i++) sum[i] = _mm256_setzero_ps();
    for (int64_t at = 0; at < dim; at += 8) add_products(dim, heads, num, query, entry, at, sum);
    for (int64_t g = 0; g < heads; g++) {
        __m256 of[4] = {sum[g * num], sum[g * num + 1], sum[g * num + 2], sum[g * num + num - 1]};
        _mm_storeu_ps(out + 4 * g, sum_of_four(of));
    }
}

/* out = products of eight entries with themselves, then with the point, [dim]. */
INLINE_8 void with_self_8(int64_t dim, const float *point, const int8_t *const *entry,
                          float *out) {
    for (int64_t four = 0; four < 8; four += 4) {
        __m256 self[4], sum[4];
        for (int i = 0; i < 4; i++) self[i] = sum[i] = _mm256_setzero_ps();
        for (int64_t at = 0; at < dim; at += 8) {
            __m256 one = _mm256_loadu_ps(point + at);
            for (int i = 0; i < 4; i++) {
                __m256 other = widen_8(entry[four + i] + at);
                self[i] = _mm256_fmadd_ps(other, other, self[i]);
                sum[i] = _mm256_fmadd_ps(one, other, sum[i]);
            }
        }
        _mm_storeu_ps(out + four, sum_of_four(self));
        _mm_storeu_ps(out + 8 + four, sum_of_four(sum));
    }
}

/* Add weighted entries to `chunks` * 8 elements, from `at` on, of each head's out [heads, dim]. */
INLINE_8 void add_8(int64_t chunks, PerHead weight, const int8_t *const *value, int64_t at,
                    int64_t num, float *out, int64_t dim) {
    int64_t heads = weight.heads;
    __m256 sum[12];
    for (int64_t g = 0; g < heads; g++)
        for (int64_t c = 0; c < chunks; c++)
            sum[g * chunks + c] = _mm256_loadu_ps(out + g * dim + at + c * 8);
    for (int64_t i = 0; i < num; i++) {
        __m256 w[4];
        for (int64_t g = 0; g < heads; g++)
            w[g] = _mm256_broadcast_ss(weight.data + g * weight.stride + i);
        for (int64_t c = 0; c < chunks; c++) {
            __m256 part = widen_8(value[i] + at + c * 8);
            for (int64_t g = 0; g < heads; g++)
                sum[g * chunks + c] = _mm256_fmadd_ps(w[g], part, sum[g * chunks + c]);
        }
    }
    for (int64_t g = 0; g < heads; g++)
        for (int64_t c = 0; c < chunks; c++)
            _mm256_storeu_ps(out + g * dim + at + c * 8, sum[g * chunks + c]);
}

#endif
