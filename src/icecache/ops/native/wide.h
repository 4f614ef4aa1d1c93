/* Products by vector registers of a known width, where the processor has them. */
#ifndef ICECACHE_WIDE_H
#define ICECACHE_WIDE_H

#include "products.h"

/* What products.h says of icecache_dot_entries, icecache_add_entries and icecache_distances. */
typedef struct {
    void (*dot)(int64_t dim, const float *query, const Entries *e, PerHead out);
    void (*add)(int64_t dim, PerHead weight, const int8_t *const *codes, int64_t num, float *out);
    void (*distances)(int64_t dim, const float *point, const int8_t *codes, const uint16_t *scale,
                      const int32_t *id, int64_t num, float *out);
} Wide;

/* Null where there are none, or none for this head_dim. */
const Wide *icecache_wide(int64_t dim);

#endif
