/* What a build fills: leaves with their tokens, nodes with their children.
 *
 * The plain twins are `IndexedTokens._fill`, `LeafTable.summarize` and `Level.link` with
 * `merge_summaries`.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "layer.h"
#include "summary.h"
#include "vector.h"

#define LEAVES_AHEAD 3

/* A row's tokens and its new leaves, which lie in new pages. */
typedef struct {
    const void *keys, *values; /* [tokens, dim] */
    const int64_t *positions;  /* [tokens] */
    const int64_t *leaf_of;    /* [tokens], from `first_number` on */
    const int64_t *page_of;    /* [leaves], number within the row's pages */
    int64_t num_tokens, num_leaves, row, first_leaf, first_number;
} Build;

/* Of one call; keys and values of a leaf, where they have to be converted. */
typedef struct {
    int32_t *order, *start; /* the tokens by leaf: [tokens], [leaves + 1] */
    int32_t *number;        /* 0, 1, 2 ... */
    uint8_t *used;          /* [pages of the row] */
    float *mean, *keys, *values;
} Scratch;

static int64_t element_size(const Shape *s) { return s->dtype == FLOAT32 ? 4 : 2; }

/* Sort the tokens by leaf; returns the largest leaf's size. */
static int64_t sort_tokens(const Build *b, Scratch *x) {
    int64_t largest = 0;
    memset(x->start, 0, sizeof(int32_t) * (size_t)(b->num_leaves + 1));
    for (int64_t i = 0; i < b->num_tokens; i++) x->start[b->leaf_of[i] - b->first_number]++;
    for (int64_t leaf = 0, total = 0; leaf <= b->num_leaves; leaf++) {
        int64_t size = x->start[leaf];
        if (size > largest) largest = size;
        x->start[leaf] = (int32_t)total;
        total += size;
    }
    for (int64_t i = 0; i < b->num_tokens; i++)
        x->order[x->start[b->leaf_of[i] - b->first_number]++] = (int32_t)i;
    memmove(x->start + 1, x->start, sizeof(int32_t) * (size_t)b->num_leaves);
    x->start[0] = 0;
    return largest;
}

/* Read ahead: a leaf's tokens lie all over the context. */
static void prefetch_leaf(const Build *b, const Scratch *x, int64_t leaf, int64_t bytes) {
    if (leaf >= b->num_leaves) return;
    for (int64_t m = x->start[leaf]; m < x->start[leaf + 1]; m++) {
        prefetch((const char *)b->keys + x->order[m] * bytes, bytes);
        prefetch((const char *)b->values + x->order[m] * bytes, bytes);
    }
}

/* Copy a leaf's tokens to the next slots of its page and say so in the table. */
static inline void place_leaf(const Shape *s, Tree *t, const Pages *p, const Build *b,
                              const Scratch *x, int64_t leaf, int64_t dim) {
    int64_t row = b->row, at = row * t->level[0].capacity + b->first_leaf + leaf;
    int64_t page = b->page_of[leaf], in_pool = pool_page(p, row, page), slot = x->used[page];
    int64_t bytes = dim * element_size(s), bitmap = (s->page_size + 7) / 8;
    int64_t first = x->start[leaf], num = x->start[leaf + 1] - first;
    char *data = (char *)p->data + in_pool * 2 * s->page_size * bytes;
    t->page[at] = (int32_t)page;
    ((uint8_t *)t->level[0].count)[at] = (uint8_t)num;
    memset(t->slots + at * bitmap, 0, (size_t)bitmap);
    x->used[page] = (uint8_t)(slot + num);
    for (int64_t m = first; m < first + num; m++, slot++) {
        int64_t token = x->order[m];
        memcpy(data + slot * bytes, (const char *)b->keys + token * bytes, (size_t)bytes);
        memcpy(data + (s->page_size + slot) * bytes, (const char *)b->values + token * bytes,
               (size_t)bytes);
        p->positions[in_pool * s->page_size + slot] = (int32_t)b->positions[token];
        t->slots[at * bitmap + slot / 8] |= (uint8_t)(1 << slot % 8);
    }
}

static inline void fill_leaf(int64_t dim, const Shape *s, Tree *t, const Pages *p, const Build *b,
                             const Scratch *x, int64_t leaf) {
    int64_t at = b->row * t->level[0].capacity + b->first_leaf + leaf;
    int64_t first = x->start[leaf], num = x->start[leaf + 1] - first;
    const int32_t *members = x->order + first;
    place_leaf(s, t, p, b, x, leaf, dim);
    if (s->dtype == FLOAT32) {
        summarize_leaf(t, b->row, at, b->keys, b->values, members, num, dim, x->mean);
        return;
    }
    for (int64_t m = 0; m < num; m++) {
        to_float(b->keys, members[m] * dim, s->dtype, x->keys + m * dim, dim);
        to_float(b->values, members[m] * dim, s->dtype, x->values + m * dim, dim);
    }
    summarize_leaf(t, b->row, at, x->keys, x->values, x->number, num, dim, x->mean);
}

CLONES static void fill_leaves(const Shape *s, Tree *t, const Pages *p, const Build *b,
                               const Scratch *x) {
    for (int64_t leaf = 0; leaf < b->num_leaves; leaf++) {
        prefetch_leaf(b, x, leaf + LEAVES_AHEAD, s->dim * element_size(s));
        BY_DIM(s->dim, fill_leaf, s, t, p, b, x, leaf)
    }
}

/* Store a row's tokens in its new leaves and summarise those; -1 without memory. */
EXPORT int icecache_fill(const Shape *s, Tree *t, const Pages *p, const Build *b) {
    int64_t pages = p->num_pages[b->row];
    int32_t *memory = malloc(sizeof(int32_t) * (size_t)(b->num_tokens + b->num_leaves + 1));
    uint8_t *used = calloc((size_t)pages + 1, 1);
    float *floats = NULL;
    Scratch x = {memory, memory + b->num_tokens, NULL, used, NULL, NULL, NULL};
    int failed = !memory || !used;
    if (!failed) {
        int64_t largest = sort_tokens(b, &x);
        floats = malloc(sizeof(float) * (size_t)(largest + (2 * largest + 1) * s->dim));
        failed = !floats;
        x.number = (int32_t *)floats;
        x.mean = floats + largest;
        x.keys = x.mean + s->dim;
        x.values = x.keys + largest * s->dim;
        for (int64_t m = 0; m < largest && !failed; m++) x.number[m] = (int32_t)m;
    }
    if (!failed) fill_leaves(s, t, p, b, &x);
    free(floats);
    free(used);
    free(memory);
    return failed ? -1 : 0;
}

/* Make children, those of a node one after the other, the children of nodes; summarise those.
 * row, child, node: [num], of each child of the level below. */
CLONES static void adopt_all(Tree *t, int64_t level, int64_t dim, const int64_t *row,
                             const int64_t *child, const int64_t *node, int64_t num) {
    Level *of = t->level + level, *below = of - 1;
    for (int64_t i = 0; i < num;) {
        int64_t end = i + 1, first = row[i] * below->capacity;
        while (end < num && node[end] == node[i] && row[end] == row[i]) end++;
        of->first[row[i] * of->capacity + node[i]] = (int32_t)child[i];
        for (int64_t c = i; c < end; c++)
            below->next[first + child[c]] = c + 1 < end ? (int32_t)child[c + 1] : -1;
        summarize_node(t, level, row[i], node[i], dim);
        i = end;
    }
}

EXPORT void icecache_adopt(Tree *t, int64_t level, int64_t dim, const int64_t *row,
                           const int64_t *child, const int64_t *node, int64_t num) {
    adopt_all(t, level, dim, row, child, node, num);
}
