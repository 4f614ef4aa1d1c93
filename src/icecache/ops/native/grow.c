/* Leaves and nodes that grew too large are cut; the plain twin is tree/insert.py. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "grow.h"
#include "summary.h"
#include "vector.h"

#define POWER_ROUNDS 3

/* Stable order of `num` values, rising. */
static void sort_stable(const float *key, int32_t *order, int64_t num) {
    for (int64_t i = 0; i < num; i++) {
        int64_t j = i;
        for (; j > 0 && key[order[j - 1]] > key[i]; j--) order[j] = order[j - 1];
        order[j] = (int32_t)i;
    }
}

/* Cut the members along their main direction; upper[m] = 1 for the upper half. */
CLONES static void halve(int64_t dim, const float *keys, int64_t num, uint8_t *upper, Scratch *x) {
    float key[MOST_MEMBERS], *direction = x->direction, *mean = x->mean;
    int32_t order[MOST_MEMBERS];
    memset(mean, 0, sizeof(float) * (size_t)dim);
    for (int64_t m = 0; m < num; m++) add_scaled(mean, 1.0f, keys + m * dim, dim);
    for (int64_t m = 0; m < num; m++) {
        float *c = x->centred + m * dim;
        for (int64_t i = 0; i < dim; i++) c[i] = keys[m * dim + i] - mean[i] / (float)num;
        key[m] = dot(c, c, dim);
    }
    sort_stable(key, order, num);
    memcpy(direction, x->centred + order[num - 1] * dim, sizeof(float) * (size_t)dim);
    for (int round = 0; round < POWER_ROUNDS; round++) {
        for (int64_t m = 0; m < num; m++) key[m] = dot(x->centred + m * dim, direction, dim);
        memset(direction, 0, sizeof(float) * (size_t)dim);
        for (int64_t m = 0; m < num; m++)
            add_scaled(direction, key[m], x->centred + m * dim, dim);
        float norm = sqrtf(dot(direction, direction, dim));
        for (int64_t i = 0; i < dim; i++) direction[i] /= norm > 1e-20f ? norm : 1e-20f;
    }
    for (int64_t m = 0; m < num; m++) key[m] = dot(x->centred + m * dim, direction, dim);
    sort_stable(key, order, num);
    for (int64_t i = 0; i < num; i++) upper[order[i]] = i >= num - num / 2;
}

/* Make a leaf or node the first child of a node. */
static void adopt(Tree *t, int64_t level, int64_t row, int64_t node, int32_t child) {
    Level *of = t->level + level, *below = of - 1;
    below->next[row * below->capacity + child] = of->first[row * of->capacity + node];
    of->first[row * of->capacity + node] = child;
}

/* Give half of a node's children to a new node, if they are too many; returns it, or -1. */
static int32_t split_node(const Shape *s, Tree *t, int64_t level, int64_t row, int32_t node,
                          Scratch *x) {
    Level *of = t->level + level, *below = of - 1;
    int64_t first = row * below->capacity, num = 0;
    int32_t children[MOST_MEMBERS];
    uint8_t upper[MOST_MEMBERS] = {0};
    for (int32_t child = of->first[row * of->capacity + node]; child >= 0;
         child = below->next[first + child])
        children[num++] = child;
    if (num <= s->most_children) return -1;
    for (int64_t m = 0; m < num; m++)
        read_mean(below, first + children[m], s->dim, x->key + m * s->dim);
    halve(s->dim, x->key, num, upper, x);
    int32_t other = of->num[row]++;
    of->first[row * of->capacity + node] = of->first[row * of->capacity + other] = -1;
    while (num-- > 0) adopt(t, level, row, upper[num] ? other : node, children[num]);
    summarize_node(t, level, row, other, s->dim);
    return other;
}

/* Bring the nodes above a leaf up to date; `added`: a new leaf beside it, or -1. */
CLONES static void update(const Shape *s, Tree *t, int64_t row, const int32_t *path, int64_t top,
                          int32_t added, Scratch *x) {
    for (int64_t level = 1; level <= top; level++) {
        if (added >= 0) adopt(t, level, row, path[level], added);
        added = added >= 0 ? split_node(s, t, level, row, path[level], x) : -1;
        summarize_node(t, level, row, path[level], s->dim);
    }
}

void icecache_cut(int64_t dim, const float *keys, int64_t num, uint8_t *upper, Scratch *x) {
    halve(dim, keys, num, upper, x);
}

void icecache_follow(const Shape *s, Tree *t, int64_t row, const int32_t *path, int64_t top,
                     int32_t added, Scratch *x) {
    update(s, t, row, path, top, added, x);
}
