/* How a tree takes a token: the way to its leaf, the cut of a leaf, what follows above it. */
#ifndef ICECACHE_GROW_H
#define ICECACHE_GROW_H

#include "layer.h"

#define MOST_MEMBERS 129 /* of the largest leaf or node, and one more */

typedef struct {
    float *key, *value, *centred; /* [MOST_MEMBERS, dim] */
    float *mean, *direction;      /* [dim] */
} Scratch;

/* Find the nearest leaf: path[level] is its ancestor, path[0] the leaf or -1. Returns the top. */
int64_t icecache_find_path(const Shape *s, const Tree *t, int64_t row, const float *point,
                           int32_t *path);

/* Cut members along their main direction; upper[m] = 1 for the upper half. */
void icecache_cut(int64_t dim, const float *keys, int64_t num, uint8_t *upper, Scratch *x);

/* Bring the nodes above a leaf up to date; `added`: a leaf that was cut off it, or -1. */
void icecache_follow(const Shape *s, Tree *t, int64_t row, const int32_t *path, int64_t top,
                     int32_t added, Scratch *x);

#endif
