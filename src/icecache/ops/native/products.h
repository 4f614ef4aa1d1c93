/* Products of a row's queries with the int8 summaries of many leaves or nodes. */
#ifndef ICECACHE_PRODUCTS_H
#define ICECACHE_PRODUCTS_H

#include <stdint.h>

#include "vector.h"

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

/* Entries asked for ahead. Asked for faster than they are used, many would be dropped. */
#define AHEAD 80

static inline void expect_entries(int64_t dim, const Entries *e, int64_t i, int64_t num) {
    int64_t from = i + AHEAD, end = from + num < e->known ? from + num : e->known;
    for (int64_t k = from; k < end; k++) prefetch(e->codes + (int64_t)e->id[k] * dim, dim);
    if (from < end)
        for (int64_t b = 0; b < BESIDE; b++)
            prefetch((const char *)e->beside[b] + e->id[from] * e->size[b], 1);
}

/* out = dot products of queries [heads, dim] with entries. */
void icecache_dot_entries(int64_t dim, const float *query, const Entries *e, PerHead out);

/* out[i] = half the squared distance of a point from scale * codes of entry id[i], less what all
 * entries share; scales are bfloat16. */
void icecache_distances(int64_t dim, const float *point, const int8_t *codes,
                        const uint16_t *scale, const int32_t *id, int64_t num, float *out);

static inline float half_squared(float scale, float with_self, float with_point) {
    return scale * (0.5f * scale * with_self - with_point);
}

/* Add weight times codes of `num` entries, each at its own place, to out [heads, dim]. */
void icecache_add_entries(int64_t dim, PerHead weight, const int8_t *const *codes, int64_t num,
                          float *out);

#endif
