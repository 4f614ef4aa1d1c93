/* Products of a row's queries with the int8 summaries of many leaves or nodes. */
#ifndef ICECACHE_PRODUCTS_H
#define ICECACHE_PRODUCTS_H

#include <stdint.h>

/* A number for each head and entry. */
typedef struct {
    float *data; /* [heads, stride] */
    int64_t heads, stride;
} PerHead;

/* out = dot products of queries [heads, dim] with the codes [*, dim] of entries id. */
void icecache_dot_entries(int64_t dim, const float *query, const int8_t *codes, const int32_t *id,
                          int64_t num, PerHead out);

/* out[i] = half the squared distance of a point from scale * codes of entry id[i], less what all
 * entries share; scales are bfloat16. */
void icecache_distances(int64_t dim, const float *point, const int8_t *codes,
                        const uint16_t *scale, const int32_t *id, int64_t num, float *out);

/* Add weight times codes of `num` entries, each at its own place, to out [heads, dim]. */
void icecache_add_entries(int64_t dim, PerHead weight, const int8_t *const *codes, int64_t num,
                          float *out);

#endif
