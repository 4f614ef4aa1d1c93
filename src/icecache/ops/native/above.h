/* List those of many numbers that are large enough, in their order and without a branch. */
#ifndef ICECACHE_ABOVE_H
#define ICECACHE_ABOVE_H

#include <stdint.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

/* Write to `out`, [num], which of x are `least` or more; returns their number. */
static inline int64_t list_above(const float *x, int64_t num, float least, int32_t *out) {
    int64_t found = 0, i = 0;
#if defined(__SSE2__)
    /* of four comparisons as bits: which are true, and how many */
    static const int32_t which[16][4] = {
        {0},    {0},    {1},    {0, 1},    {2},    {0, 2},    {1, 2},    {0, 1, 2},
        {3},    {0, 3}, {1, 3}, {0, 1, 3}, {2, 3}, {0, 2, 3}, {1, 2, 3}, {0, 1, 2, 3},
    };
    static const uint8_t many[16] = {0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4};
    for (; i + 4 <= num; i += 4) {
        int bits = _mm_movemask_ps(_mm_cmpge_ps(_mm_loadu_ps(x + i), _mm_set1_ps(least)));
        __m128i four = _mm_loadu_si128((const __m128i *)which[bits]);
        _mm_storeu_si128((__m128i *)(out + found), _mm_add_epi32(four, _mm_set1_epi32((int32_t)i)));
        found += many[bits];
    }
#endif
    for (; i < num; i++) {
        out[found] = (int32_t)i;
        found += x[i] >= least;
    }
    return found;
}

#endif
