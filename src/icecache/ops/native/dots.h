/* Dot products of up to four queries with four vectors: the lanes of sixteen sums are added up
 * together, in a third of the shuffles that it takes one by one. */
#ifndef ICECACHE_DOTS_H
#define ICECACHE_DOTS_H

#include <stdint.h>
#include <string.h>

#include "vector.h"

enum { DOTS = 4, LANES = 16 };

#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
typedef float Lanes __attribute__((vector_size(4 * LANES)));

/* Lane i of x[0] becomes the sum of all lanes of x[i]: a fold in two, four times. */
static inline void sum_lanes(Lanes *x) {
    for (int i = 0; i < 8; i++) {
        Lanes a = x[2 * i], b = x[2 * i + 1];
        x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30,
                                       31);
    }
    for (int i = 0; i < 4; i++) {
        Lanes a = x[2 * i], b = x[2 * i + 1];
        x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
    for (int i = 0; i < 2; i++) {
        Lanes a = x[2 * i], b = x[2 * i + 1];
        x[i] = __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
               __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    }
    Lanes a = x[0], b = x[1];
    x[0] = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

/* out[q * stride + i] of `num` queries, [num, dim], and DOTS vectors, [DOTS, dim]. */
static inline void dots_of(int64_t dim, int64_t num, const float *query, const float *x, float *out,
                           int64_t stride) {
    Lanes sum[LANES];
    for (int i = 0; i < LANES; i++) sum[i] = (Lanes){0};
    for (int64_t at = 0; at < dim; at += LANES)
        for (int64_t q = 0; q < num; q++) {
            Lanes one, other;
            memcpy(&one, query + q * dim + at, sizeof(one));
            for (int64_t i = 0; i < DOTS; i++) {
                memcpy(&other, x + i * dim + at, sizeof(other));
                sum[q * DOTS + i] += one * other;
            }
        }
    sum_lanes(sum);
    for (int64_t q = 0; q < num; q++)
        memcpy(out + q * stride, (const float *)sum + q * DOTS, sizeof(float) * DOTS);
}

static inline int can_dots(int64_t dim, int64_t heads) { return dim % LANES == 0 && heads >= 3; }

/* The same of any number of queries. */
static inline void dots(int64_t dim, int64_t num, const float *query, const float *x, float *out,
                        int64_t stride) {
    for (; num >= DOTS; num -= DOTS, query += DOTS * dim, out += DOTS * stride)
        dots_of(dim, DOTS, query, x, out, stride);
    if (num == 3) dots_of(dim, 3, query, x, out, stride);
    if (num == 2) dots_of(dim, 2, query, x, out, stride);
    if (num == 1) dots_of(dim, 1, query, x, out, stride);
}
#else
static inline int can_dots(int64_t dim, int64_t heads) {
    (void)dim, (void)heads;
    return 0;
}

static inline void dots(int64_t dim, int64_t num, const float *query, const float *x, float *out,
                        int64_t stride) {
    for (int64_t q = 0; q < num; q++)
        for (int64_t i = 0; i < DOTS; i++)
            out[q * stride + i] = dot(query + q * dim, x + i * dim, dim);
}
#endif

#endif
