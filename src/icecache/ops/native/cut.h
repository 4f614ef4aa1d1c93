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

/* Centre members of x on their mean; returns the farthest's squared distance, c->direction points
 * to it. */
static inline float centre_members(const Cut *c, const float *x, const int32_t *members,
                                   int64_t num, int64_t dim) {
    float *mean = c->mean, farthest = -1.0f;
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
            memcpy(c->direction, centred, sizeof(float) * (size_t)dim);
        }
    }
    return farthest;
}

/* Project members of x on their main direction, to c->key. */
static inline void project(const Cut *c, const float *x, const int32_t *members, int64_t num,
                           int64_t dim) {
    float *direction = c->direction;
    centre_members(c, x, members, num, dim);
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

CLONES static void project_members(const Cut *cut, const float *x, const int32_t *members,
                                   int64_t num, int64_t dim) {
    project(cut, x, members, num, dim);
}

/* Reorder members, the lower half first, each half in its old order; returns the lower's number. */
static int64_t halve(const Cut *cut, const float *x, int32_t *members, int64_t num, int64_t dim) {
    int64_t lower = num - num / 2, low = 0, high = lower;
    project_members(cut, x, members, num, dim);
    sort_stable(cut->key, num, cut->sorted, cut->spare);
    for (int64_t i = 0; i < num; i++) cut->spare[cut->sorted[i]] = i >= lower;
    for (int64_t m = 0; m < num; m++) cut->sorted[cut->spare[m] ? high++ : low++] = members[m];
    memcpy(members, cut->sorted, sizeof(int32_t) * (size_t)num);
    return lower;
}

/* Cut members where their main direction passes their mean; the side without `first`, one of them,
 * gets the number. 0 if all are on one side. */
static int part_at_mean(const Cut *cut, const float *x, const int32_t *members, int64_t num,
                        int64_t dim, int64_t first, int32_t *group, int32_t number) {
    int64_t moved = 0;
    project_members(cut, x, members, num, dim);
    for (int64_t m = 0; m < num; m++)
        if ((cut->key[m] > 0.0f) != (cut->key[first] > 0.0f)) {
            group[members[m]] = number;
            moved++;
        }
    return moved > 0;
}

static void bisect(const Cut *cut, const float *x, int32_t *members, int64_t num, int64_t dim,
                   int levels) {
    if (levels <= 0 || num <= 2) return;
    int64_t lower = halve(cut, x, members, num, dim);
    bisect(cut, x, members, lower, dim, levels - 1);
    bisect(cut, x, members + lower, num - lower, dim, levels - 1);
}

#endif
