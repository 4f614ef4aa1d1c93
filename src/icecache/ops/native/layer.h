/* The arrays of one layer, as Python hands them over; tree/ and store/ own them. */
#ifndef ICECACHE_LAYER_H
#define ICECACHE_LAYER_H

#include <stdint.h>

#define MOST_LEVELS 12
#define MAX_DIM 512

typedef struct {
    int64_t rows, heads, dim, leaf_size, page_size, room;
    int64_t most_children, crossover, field_of_view;
    int32_t dtype, remainder;
    float scaling, softcap, spread_weight;
} Shape;

/* Summaries of one level of the tree: of leaves (level 0) or of nodes. */
typedef struct {
    int32_t *num;    /* [rows] */
    void *count;     /* [rows, capacity], tokens; uint8 of leaves, int32 of nodes */
    uint16_t *spread; /* bfloat16, as the scales */
    int8_t *key_mean; /* [rows, capacity, dim], from the row's centre */
    uint16_t *key_scale;
    int8_t *value_mean;
    uint16_t *value_scale;
    int32_t *next;  /* [rows, capacity], the next child of the same node, -1 behind the last */
    int32_t *first; /* [rows, capacity], a node's first child */
    int64_t capacity;
} Level;

typedef struct {
    Level level[MOST_LEVELS];
    int32_t *page;  /* [rows, capacity of leaves], number within the row's pages */
    uint8_t *slots; /* [rows, capacity of leaves, (page_size + 7) / 8], a bit each */
    const float *centre; /* [rows, dim], what key means are counted from */
    int64_t num_levels;
} Tree;

typedef struct {
    void *data;         /* [pool page, key|value, slot, dim] */
    int32_t *positions; /* [pool page, slot], -1 = free */
    const int32_t *holders;
    int32_t *num_pages; /* [rows] */
    int32_t *page_of;   /* [rows, capacity], the pool page */
    uint8_t *free;      /* [rows, capacity], free slots */
    int32_t *before, *after; /* [rows, capacity], neighbours among pages with as many free slots */
    int32_t *head;      /* [rows, page_size + 1], the first of them */
    int64_t capacity;
} Pages;

static inline int64_t pool_page(const Pages *p, int64_t row, int64_t page) {
    return p->page_of[row * p->capacity + page];
}

/* The slots of a leaf, rising; returns their number. */
static inline int64_t slots_of(const Shape *s, const Tree *t, int64_t leaf, uint8_t *slots) {
    int64_t bytes = (s->page_size + 7) / 8, num = 0;
    const uint8_t *bits = t->slots + leaf * bytes;
    for (int64_t i = 0; i < s->page_size; i++)
        if (bits[i / 8] >> (i % 8) & 1) slots[num++] = (uint8_t)i;
    return num;
}

static inline int64_t count_of(const Level *t, int64_t level, int64_t at) {
    return level ? ((const int32_t *)t->count)[at] : ((const uint8_t *)t->count)[at];
}

#endif
