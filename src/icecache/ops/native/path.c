/* The way to the nearest leaf; the plain twin is tree/insert.py (find_path). */
#include <stdint.h>

#include "grow.h"
#include "layer.h"
#include "products.h"
#include "vector.h"

#define BEAM 16
#define MOST_FOUND (BEAM * MOST_MEMBERS)

typedef struct {
    int32_t id[BEAM], from[BEAM];
    float distance[BEAM];
    int64_t num;
} Beam;

/* What may be on the way at one level: of the top a block of all, below it the children of a beam. */
typedef struct {
    int32_t id[MOST_FOUND], from[MOST_FOUND];
    float distance[MOST_FOUND];
    int64_t num;
} Found;

/* Keep the `most` nearest so far, nearest first; the first of equals stays ahead. */
static void keep_nearest(const Found *found, int64_t most, Beam *beam) {
    for (int64_t i = 0; i < found->num; i++) {
        float distance = found->distance[i];
        int64_t at = beam->num;
        if (at == most && !(distance < beam->distance[most - 1])) continue;
        if (at == most) at--;
        else beam->num++;
        for (; at > 0 && distance < beam->distance[at - 1]; at--) {
            beam->id[at] = beam->id[at - 1];
            beam->from[at] = beam->from[at - 1];
            beam->distance[at] = beam->distance[at - 1];
        }
        beam->id[at] = found->id[i];
        beam->from[at] = found->from[i];
        beam->distance[at] = distance;
    }
}

/* List the children of all that a beam holds, and ask for their summaries: they lie in many places. */
static void find_children(const Beam *beam, const Level *of, const Level *below, int64_t row,
                          int64_t dim, Found *found) {
    const int32_t *first = of->first + row * of->capacity;
    int64_t start = row * below->capacity;
    const int32_t *next = below->next + start;
    for (int64_t b = 0; b < beam->num; b++) prefetch(next + first[beam->id[b]], 4);
    found->num = 0;
    for (int32_t b = 0; b < beam->num; b++)
        for (int32_t id = first[beam->id[b]]; id >= 0; id = next[id]) {
            prefetch(below->key_mean + (start + id) * dim, dim);
            prefetch(below->key_scale + start + id, 2);
            found->id[found->num] = id;
            found->from[found->num++] = b;
        }
}

static void measure(const Level *level, int64_t row, const float *point, int64_t dim,
                    Found *found) {
    int64_t start = row * level->capacity;
    icecache_distances(dim, point, level->key_mean + start * dim, level->key_scale + start,
                       found->id, found->num, found->distance);
}

/* The nearest of the top, a block after the other. */
static void search_top(const Level *top, int64_t row, const float *point, int64_t dim,
                       int64_t most, Found *found, Beam *beam) {
    for (int32_t from = 0; from < top->num[row]; from += MOST_FOUND) {
        int32_t left = top->num[row] - from;
        found->num = left < MOST_FOUND ? left : MOST_FOUND;
        for (int32_t i = 0; i < found->num; i++) {
            found->id[i] = from + i;
            found->from[i] = -1;
        }
        measure(top, row, point, dim, found);
        keep_nearest(found, most, beam);
    }
}

int64_t icecache_find_path(const Shape *s, const Tree *t, int64_t row, const float *point,
                           int32_t *path) {
    Beam beam[MOST_LEVELS];
    Found found;
    int64_t top = 0;
    while (top + 1 < t->num_levels && t->level[top + 1].num[row] > 0) top++;
    for (int64_t level = top; level >= 0; level--) {
        const Level *of = t->level + level;
        int64_t most = level ? BEAM : 1;
        beam[level].num = 0;
        if (level == top) {
            search_top(of, row, point, s->dim, most, &found, beam + level);
            continue;
        }
        find_children(beam + level + 1, of + 1, of, row, s->dim, &found);
        measure(of, row, point, s->dim, &found);
        keep_nearest(&found, most, beam + level);
    }
    int32_t at = 0;
    for (int64_t level = 0; level <= top; level++) {
        path[level] = beam[level].num ? beam[level].id[at] : -1;
        at = beam[level].num ? beam[level].from[at] : 0;
    }
    return top;
}
