/* Summaries, recomputed from what they summarise: nothing runs on, so nothing drifts. */
#ifndef ICECACHE_SUMMARY_H
#define ICECACHE_SUMMARY_H

#include <math.h>

#include "layer.h"
#include "vector.h"

static inline void quantize(const float *x, int8_t *codes, uint16_t *scale, int64_t dim) {
    float largest = 0.0f;
    for (int64_t i = 0; i < dim; i++) largest = larger(largest, fabsf(x[i]));
    *scale = to_bfloat16(largest / 127.0f);
    float step = from_bfloat16(*scale), divisor = step > 1e-30f ? step : 1e-30f;
    for (int64_t i = 0; i < dim; i++) {
        float code = nearbyintf(x[i] / divisor);
        codes[i] = (int8_t)(code > 127.0f ? 127.0f : (code < -127.0f ? -127.0f : code));
    }
}

/* The key mean at `at`, decoded, from the row's centre. */
static inline void read_mean(const Level *level, int64_t at, int64_t dim, float *out) {
    float scale = from_bfloat16(level->key_scale[at]);
    from_int8(level->key_mean + at * dim, out, dim);
    for (int64_t i = 0; i < dim; i++) out[i] *= scale;
}

static inline void set_spread(Level *level, int64_t at, int64_t dim, float spread) {
    float scale = from_bfloat16(level->key_scale[at]);
    level->spread[at] = to_bfloat16(spread + scale * scale * ((float)dim / 12.0f));
}

/* Recompute a leaf of a row from members of keys and values, [member, dim]; leaf: over all rows. */
static inline void summarize_leaf(Tree *t, int64_t row, int64_t leaf, const float *keys,
                                  const float *values, const int32_t *members, int64_t num,
                                  int64_t dim, float *mean) {
    Level *leaves = t->level;
    const float *centre = t->centre + row * dim;
    float weight = 1.0f / (float)num, spread = 0.0f;
    memset(mean, 0, sizeof(float) * (size_t)dim);
    for (int64_t m = 0; m < num; m++) add_scaled(mean, 1.0f, values + members[m] * dim, dim);
    for (int64_t i = 0; i < dim; i++) mean[i] *= weight;
    quantize(mean, leaves->value_mean + leaf * dim, leaves->value_scale + leaf, dim);
    memset(mean, 0, sizeof(float) * (size_t)dim);
    for (int64_t m = 0; m < num; m++) add_scaled(mean, 1.0f, keys + members[m] * dim, dim);
    for (int64_t i = 0; i < dim; i++) mean[i] *= weight;
    for (int64_t m = 0; m < num; m++) {
        const float *key = keys + members[m] * dim;
        float squared = 0.0f;
        for (int64_t i = 0; i < dim; i++) squared += (key[i] - mean[i]) * (key[i] - mean[i]);
        spread += squared;
    }
    for (int64_t i = 0; i < dim; i++) mean[i] -= centre[i];
    quantize(mean, leaves->key_mean + leaf * dim, leaves->key_scale + leaf, dim);
    set_spread(leaves, leaf, dim, spread * weight);
}

/* Sums over the children of a node; returns their tokens. */
static inline int64_t sum_children(int64_t dim, const Tree *t, int64_t level, int64_t row,
                                   int64_t node, float *keys, float *values) {
    const Level *of = t->level + level, *below = of - 1;
    int64_t first = row * below->capacity, total = 0;
    float key_sum[MAX_DIM], value_sum[MAX_DIM];
    memset(key_sum, 0, sizeof(float) * (size_t)dim);
    memset(value_sum, 0, sizeof(float) * (size_t)dim);
    int64_t child = of->first[row * of->capacity + node];
    for (; child >= 0; child = below->next[first + child]) {
        const int8_t *key = below->key_mean + (first + child) * dim;
        const int8_t *value = below->value_mean + (first + child) * dim;
        int64_t count = count_of(below, level - 1, first + child);
        float key_scale = from_bfloat16(below->key_scale[first + child]);
        float value_scale = (float)count * from_bfloat16(below->value_scale[first + child]);
        total += count;
        for (int64_t i = 0; i < dim; i++) key_sum[i] += (float)count * ((float)key[i] * key_scale);
        for (int64_t i = 0; i < dim; i++) value_sum[i] += value_scale * (float)value[i];
    }
    for (int64_t i = 0; i < dim; i++) keys[i] = key_sum[i] / (float)total;
    for (int64_t i = 0; i < dim; i++) values[i] = value_sum[i] / (float)total;
    return total;
}

/* Sum of the children's spreads around the node's mean, by their tokens. */
static inline float spread_of_children(int64_t dim, const Tree *t, int64_t level, int64_t row,
                                       int64_t node, const float *keys) {
    const Level *of = t->level + level, *below = of - 1;
    int64_t first = row * below->capacity;
    float spread = 0.0f;
    int64_t child = of->first[row * of->capacity + node];
    for (; child >= 0; child = below->next[first + child]) {
        const int8_t *key = below->key_mean + (first + child) * dim;
        float scale = from_bfloat16(below->key_scale[first + child]), squared = 0.0f;
        for (int64_t i = 0; i < dim; i++) {
            float apart = (float)key[i] * scale - keys[i];
            squared += apart * apart;
        }
        spread += (float)count_of(below, level - 1, first + child) *
                  (from_bfloat16(below->spread[first + child]) + squared);
    }
    return spread;
}

static inline void summarize_node_of(int64_t dim, Tree *t, int64_t level, int64_t row,
                                     int64_t node) {
    Level *of = t->level + level;
    int64_t at = row * of->capacity + node;
    float keys[MAX_DIM], values[MAX_DIM];
    int64_t total = sum_children(dim, t, level, row, node, keys, values);
    float spread = spread_of_children(dim, t, level, row, node, keys);
    ((int32_t *)of->count)[at] = (int32_t)total;
    quantize(keys, of->key_mean + at * dim, of->key_scale + at, dim);
    quantize(values, of->value_mean + at * dim, of->value_scale + at, dim);
    set_spread(of, at, dim, spread / (float)total);
}

/* Recompute a node from its children. */
static inline void summarize_node(Tree *t, int64_t level, int64_t row, int64_t node, int64_t dim) {
    BY_DIM(dim, summarize_node_of, t, level, row, node)
}

#endif
