/* Cut points in two along their main direction; the plain twin is tree/cluster.py. */
#ifndef ICECACHE_CUT_H
#define ICECACHE_CUT_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "vector.h"

#define POWER_ROUNDS 3
#define SORTED_RUN 16

/* Room for as many points as are cut at once. */
typedef struct {
    float *centred;         /* [points, dim] */
    float *key;             /* [points] */
    float *mean, *direction; /* [dim] */
    int32_t *sorted, *spare; /* [points] */
} Cut;

/* Stable order of `num` keys, rising: runs by insertion, then merged. */
static inline void sort_stable(const float *key, int64_t num, int32_t *order, int32_t *spare) {
    for (int64_t run = 0; run < num; run += SORTED_RUN)
        for (int64_t i = run; i < (run + SORTED_RUN < num ? run + SORTED_RUN : num); i++) {
            int64_t j = i;
            for (; j > run && key[order[j - 1]] > key[i]; j--) order[j] = order[j - 1];
            order[j] = (int32_t)i;
        }
    for (int64_t run = SORTED_RUN; run < num; run *= 2) {
        for (int64_t low = 0; low < num; low += 2 * run) {
            int64_t middle = low + run < num ? low + run : num;
            int64_t high = low + 2 * run < num ? low + 2 * run : num, a = low, b = middle;
            for (int64_t i = low; i < high; i++)
                spare[i] = b >= high || (a < middle && key[order[a]] <= key[order[b]]) ? order[a++]
                                                                                        : order[b++];
        }
        memcpy(order, spare, sizeof(int32_t) * (size_t)num);
    }
}

/* Project members of x on their main direction, to c->key. */
static inline void project(const Cut *c, const float *x, const int32_t *members, int64_t num,
                           int64_t dim) {
    float *mean = c->mean, *direction = c->direction, farthest = -1.0f;
    memset(mean, 0, sizeof(float) * (size_t)dim);
    for (int64_t m = 0; m < num; m++) add_scaled(mean, 1.0f, x + members[m] * dim, dim);
    for (int64_t k = 0; k < dim; k++) mean[k] /= (float)num;
    for (int64_t m = 0; m < num; m++) {
        float *centred = c->centred + m * dim;
        const float *point = x + members[m] * dim;
        for (int64_t k = 0; k < dim; k++) centred[k] = point[k] - mean[k];
        float norm = dot(centred, centred, dim);
        if (norm >= farthest) {
            farthest = norm;
            memcpy(direction, centred, sizeof(float) * (size_t)dim);
        }
    }
    for (int round = 0; round < POWER_ROUNDS; round++) {
        for (int64_t m = 0; m < num; m++) c->key[m] = dot(c->centred + m * dim, direction, dim);
        memset(direction, 0, sizeof(float) * (size_t)dim);
        for (int64_t m = 0; m < num; m++)
            add_scaled(direction, c->key[m], c->centred + m * dim, dim);
        float norm = sqrtf(dot(direction, direction, dim));
        float weight = 1.0f / (norm > 1e-20f ? norm : 1e-20f);
        for (int64_t k = 0; k < dim; k++) direction[k] *= weight;
    }
    for (int64_t m = 0; m < num; m++) c->key[m] = dot(c->centred + m * dim, direction, dim);
}

#endif
