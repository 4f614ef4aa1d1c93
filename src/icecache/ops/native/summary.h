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

/* Recompute a node from its children; scratch: [3, dim]. */
static inline void summarize_node(Tree *t, int64_t level, int64_t row, int64_t node, int64_t dim,
                                  float *scratch) {
    Level *of = t->level + level, *below = of - 1;
    int64_t at = row * of->capacity + node, first = row * below->capacity, total = 0;
    float *keys = scratch, *values = keys + dim, *buffer = values + dim, spread = 0.0f;
    memset(keys, 0, sizeof(float) * 2 * (size_t)dim);
    for (int64_t child = of->first[at]; child >= 0; child = below->next[first + child]) {
        int64_t count = count_of(below, level - 1, first + child);
        total += count;
        read_mean(below, first + child, dim, buffer);
        add_scaled(keys, (float)count, buffer, dim);
        from_int8(below->value_mean + (first + child) * dim, buffer, dim);
        add_scaled(values, (float)count * from_bfloat16(below->value_scale[first + child]), buffer,
                   dim);
    }
    for (int64_t i = 0; i < dim; i++) keys[i] /= (float)total;
    for (int64_t i = 0; i < dim; i++) values[i] /= (float)total;
    for (int64_t child = of->first[at]; child >= 0; child = below->next[first + child]) {
        float squared = from_bfloat16(below->spread[first + child]);
        read_mean(below, first + child, dim, buffer);
        for (int64_t i = 0; i < dim; i++) squared += (buffer[i] - keys[i]) * (buffer[i] - keys[i]);
        spread += (float)count_of(below, level - 1, first + child) * squared;
    }
    ((int32_t *)of->count)[at] = (int32_t)total;
    quantize(keys, of->key_mean + at * dim, of->key_scale + at, dim);
    quantize(values, of->value_mean + at * dim, of->value_scale + at, dim);
    set_spread(of, at, dim, spread / (float)total);
}

#endif
