/* The arrays of one layer, as Python hands them over; tree/table.py and store/ own them. */
#ifndef ICECACHE_LAYER_H
#define ICECACHE_LAYER_H

#include <stdint.h>

#define NO_SLOT 255

typedef struct {
    int64_t rows, heads, dim, leaf_size, page_size, capacity, room;
    int32_t dtype, remainder;
    float scaling, softcap, spread_weight;
} Shape;

typedef struct {
    int32_t *num_leaves; /* [rows] */
    uint8_t *count;      /* [rows, capacity] */
    float *spread;
    int8_t *key_mean; /* [rows, capacity, dim] */
    float *key_scale;
    int8_t *value_mean;
    float *value_scale;
    int32_t *page;
    uint8_t *slots; /* [rows, capacity, leaf_size] */
} Leaves;

#endif
