/* The way to the nearest leaf; the plain twin is tree/insert.py (find_path). */
#include <math.h>
#include <stdint.h>

#include "grow.h"
#include "layer.h"
#include "vector.h"

#define BEAM 16

typedef struct {
    int32_t id[BEAM], from[BEAM];
    float distance[BEAM];
    int64_t num;
} Beam;

/* Keep a candidate if it is among the `most` nearest; the first of equals stays ahead. */
static void offer(Beam *beam, int64_t most, float distance, int32_t id, int32_t from) {
    int64_t at = beam->num;
    if (at == most && !(distance < beam->distance[most - 1])) return;
    if (at == most) at--;
    else beam->num++;
    for (; at > 0 && distance < beam->distance[at - 1]; at--) {
        beam->id[at] = beam->id[at - 1];
        beam->from[at] = beam->from[at - 1];
        beam->distance[at] = beam->distance[at - 1];
    }
    beam->id[at] = id;
    beam->from[at] = from;
    beam->distance[at] = distance;
}

/* Ask for the children of all that a beam holds; they lie in many places. */
static void expect_children(const Beam *beam, const Level *of, const Level *below, int64_t row,
                            int64_t dim) {
    const int32_t *first = of->first + row * of->capacity;
    int64_t row_below = row * below->capacity;
    for (int64_t b = 0; b < beam->num; b++) prefetch(below->next + row_below + first[beam->id[b]], 4);
    for (int64_t b = 0; b < beam->num; b++)
        for (int32_t id = first[beam->id[b]]; id >= 0; id = below->next[row_below + id]) {
            prefetch(below->key_mean + (row_below + id) * dim, dim);
            prefetch(below->key_scale + row_below + id, 2);
        }
}

static inline void distance_of(int64_t dim, const Level *level, int64_t at, const float *point,
                               float *distance) {
    _Alignas(64) float mean[MAX_DIM];
    float scale = from_bfloat16(level->key_scale[at]);
    from_int8(level->key_mean + at * dim, mean, dim);
    *distance = scale * (0.5f * scale * dot(mean, mean, dim) - dot(mean, point, dim));
}

static inline float distance_to(const Level *level, int64_t at, const float *point, int64_t dim) {
    float distance;
    BY_DIM(dim, distance_of, level, at, point, &distance)
    return distance;
}

/* Find the leaf nearest to a point, counted from the row's centre, from the top down: path[level] is its ancestor, path[0] the leaf or -1. */
CLONES static int64_t descend(const Shape *s, const Tree *t, int64_t row, const float *point,
                                int32_t *path) {
    Beam beam[MOST_LEVELS];
    int64_t top = 0;
    while (top + 1 < t->num_levels && t->level[top + 1].num[row] > 0) top++;
    for (int64_t level = top; level >= 0; level--) {
        const Level *of = t->level + level;
        int64_t first = row * of->capacity, most = level ? BEAM : 1;
        Beam *found = beam + level, *above = found + 1;
        found->num = 0;
        if (level == top) {
            for (int32_t id = 0; id < of->num[row]; id++)
                offer(found, most, distance_to(of, first + id, point, s->dim), id, -1);
            continue;
        }
        expect_children(above, of + 1, of, row, s->dim);
        for (int32_t b = 0; b < above->num; b++) {
            int32_t id = t->level[level + 1].first[row * t->level[level + 1].capacity + above->id[b]];
            for (; id >= 0; id = of->next[first + id])
                offer(found, most, distance_to(of, first + id, point, s->dim), id, b);
        }
    }
    int32_t at = 0;
    for (int64_t level = 0; level <= top; level++) {
        path[level] = beam[level].num ? beam[level].id[at] : -1;
        at = beam[level].num ? beam[level].from[at] : 0;
    }
    return top;
}

int64_t icecache_find_path(const Shape *s, const Tree *t, int64_t row, const float *point,
                           int32_t *path) {
    return descend(s, t, row, point, path);
}
