/* What a search finds of one row, and the room it works in. */
#ifndef ICECACHE_SEARCH_H
#define ICECACHE_SEARCH_H

#include "best.h"
#include "layer.h"
#include "step.h"

#define LARGEST_LEAF_CORRECTION 2.0f
#define LARGEST_NODE_CORRECTION 4.0f

/* Entries that are scored at a time. */
#define BLOCK 1024

/* Counts whose logarithms a step has at hand. */
#define LOGS 256

/* A step as its rows see it. */
typedef struct {
    const Shape *shape;
    const Tree *tree;
    const Pages *pages;
    const Segment *segments;
    int64_t num_segments;
    const float *query, *sink_logits; /* [rows, heads, dim], [rows, heads] or null */
    float log_of[LOGS];
    Result *result;
} Step;

/* Entries: the nodes that were scored, then the nodes or leaves of `at_level` that are looked at,
 * from num_far to num. Chosen are nodes that were expanded and leaves to be attended exactly; the
 * others are attended through their summaries. */
typedef struct {
    int64_t stride, num_far, num, at_level, nodes_scored, selected, num_kept;
    int is_flat; /* entry i is leaf i */
    int32_t *id;
    uint8_t *level, *chosen;
    float *logits, *correction; /* [heads, stride] */
    float *count, *worth, *share; /* [stride] */
    float *lse; /* [heads], of all that is attended beside the entries in question */
    float *scale, *total; /* [heads], of the weights: what makes them shares, and then their sum */
    int32_t *frontier, *kept; /* children to be; entries worth enough, to be chosen or to be read */
    Candidate *candidates;
} Found;

/* Whether any row has nodes to score. */
int icecache_descends(const Shape *s, const Tree *t);

/* Most entries of any row; the length that `lay_out` wants. */
int64_t icecache_most_entries(const Shape *s, const Tree *t);
int64_t icecache_found_bytes(int64_t stride, int64_t heads);
void icecache_lay_out(Found *f, void *memory, int64_t stride, int64_t heads);

/* Descend to the nodes right above the leaves, or to the leaves where no node must be scored. */
void icecache_find_nodes(const Step *step, int64_t row, const float *fixed_lse, Found *f);

/* Once these nodes are scored: expand the best, and name the leaves below them. */
void icecache_open_nodes(const Shape *s, const Tree *t, int64_t row, Found *f);

/* Score entries of the level that is looked at. */
void icecache_score_entries(const Step *step, int64_t row, int64_t from, int64_t num, Found *f);

/* Choose leaves within the room, once all are scored. */
void icecache_choose_leaves(const Shape *s, Found *f);

/* Name all leaves of a row, and choose none. */
void icecache_name_leaves(const Tree *t, int64_t row, Found *f);

/* What entries from `from` on are worth, summed over heads. */
void icecache_weigh(const Shape *s, Found *f, int64_t from, int64_t num);

/* Make candidates of all entries from `from` on, or of those worth at least as much as about the
 * `want`th best, which a sample shows: few of many are ever put in order. Returns their number. */
int64_t icecache_collect_all(Found *f, int64_t from, int64_t num);
int64_t icecache_collect_best(Found *f, int64_t from, int64_t num, int64_t want);

/* Once all leaves are scored: take the tokens at `wanted`, [room], -1 where there is none, and leave
 * the rest of their leaves. Writes each key's element in the pool; returns their number, -1 without
 * memory. */
int64_t icecache_take_given(const Shape *s, const Tree *t, const Pages *p, int64_t row,
                            const int32_t *wanted, Found *f, int64_t *token);

#endif
