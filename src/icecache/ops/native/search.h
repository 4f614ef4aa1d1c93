/* What a search finds of one row, and the room it works in. */
#ifndef ICECACHE_SEARCH_H
#define ICECACHE_SEARCH_H

#include "best.h"
#include "layer.h"

#define LARGEST_LEAF_CORRECTION 2.0f
#define LARGEST_NODE_CORRECTION 4.0f

/* Entries: the nodes that were scored, then the leaves. Chosen are nodes that were expanded and
 * leaves to be attended exactly; the others are attended through their summaries. */
typedef struct {
    int64_t stride, num_far, num, nodes_scored, selected;
    int is_flat; /* entry i is leaf i */
    int32_t *id;
    uint8_t *level, *chosen;
    float *logits, *correction; /* [heads, stride] */
    float *count, *scale, *spread, *log_count, *worth, *share; /* [stride] */
    float *lse; /* [heads], of all that is attended beside the entries in question */
    int32_t *frontier;
    Candidate *candidates;
} Found;

/* Most entries of any row; the length that `lay_out` wants. */
int64_t icecache_most_entries(const Shape *s, const Tree *t);
int64_t icecache_found_bytes(int64_t stride, int64_t heads);
void icecache_lay_out(Found *f, void *memory, int64_t stride, int64_t heads);

/* Score the nodes far from the query and name the leaves near it, entries num_far to num. */
void icecache_find_leaves(const Shape *s, const Tree *t, int64_t row, const float *query,
                          const float *fixed_lse, const float *log_of, Found *f);

/* Score some of them, from a multiple of DOTS behind the first on: then a part is as the whole. */
void icecache_score_leaves(const Shape *s, const Tree *t, int64_t row, const float *query,
                           const float *log_of, int64_t from, int64_t num, Found *f);

/* Choose leaves within the room, once all are scored. */
void icecache_choose_leaves(const Shape *s, Found *f);

/* Name all leaves of a row, and choose none. */
void icecache_name_leaves(const Tree *t, int64_t row, Found *f);

/* Once all leaves are scored: take the tokens at `wanted`, [room], -1 where there is none, and leave
 * the rest of their leaves. Writes each key's element in the pool; returns their number, -1 without
 * memory. */
int64_t icecache_take_given(const Shape *s, const Tree *t, const Pages *p, int64_t row,
                            const int32_t *wanted, Found *f, int64_t *token);

#endif
