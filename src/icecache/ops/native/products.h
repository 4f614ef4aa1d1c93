/* Products of a row's queries with the int8 summaries of many leaves or nodes. */
#ifndef ICECACHE_PRODUCTS_H
#define ICECACHE_PRODUCTS_H

#include <stdint.h>

/* A number for each head and entry. */
typedef struct {
    float *data; /* [heads, stride] */
    int64_t heads, stride;
} PerHead;

/* Entries to be multiplied, and what else of them will be read soon. */
#define BESIDE 3
typedef struct {
    const int8_t *codes; /* [*, dim] */
    const int32_t *id;   /* [known] */
    int64_t num, known;  /* entries; those and the ones to come after them */
    const void *beside[BESIDE];
    int64_t size[BESIDE]; /* of an element, bytes */
} Entries;

/* out = dot products of queries [heads, dim] with entries. */
void icecache_dot_entries(int64_t dim, const float *query, const Entries *e, PerHead out);

/* out[i] = half the squared distance of a point from scale * codes of entry id[i], less what all
 * entries share; scales are bfloat16. */
void icecache_distances(int64_t dim, const float *point, const int8_t *codes,
                        const uint16_t *scale, const int32_t *id, int64_t num, float *out);

/* Add weight times codes of `num` entries, each at its own place, to out [heads, dim]. */
void icecache_add_entries(int64_t dim, PerHead weight, const int8_t *const *codes, int64_t num,
                          float *out);

#endif
