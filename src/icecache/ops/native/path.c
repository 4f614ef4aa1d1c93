/* The way to the nearest leaf; the plain twin is tree/insert.py (find_path). */
#include <stdint.h>
#include <string.h>

#include "grow.h"
#include "layer.h"
#include "products.h"
#include "vector.h"

#define BEAM 16
#define MOST_FOUND (BEAM * MOST_MEMBERS)

/* The nodes of a level that are followed, nearest first, and whose children they are. */
typedef struct {
    int32_t id[BEAM], from[BEAM];
    int64_t num;
} Beam;

/* What may be on the way at one level: a block of the top, or the children of a beam. */
typedef struct {
    int32_t id[MOST_FOUND], from[MOST_FOUND];
    float distance[MOST_FOUND];
    int64_t num;
} Found;

/* Numbers of what is nearest so far, each below its distance, so that keys are in order; one place
 * ahead of the first, and all bits set where there is none yet. */
typedef struct {
    uint64_t key[1 + BEAM];
    int64_t num;
} Nearest;

/* Bits that are in the order of the numbers. */
static inline uint64_t ordered(float distance) {
    uint32_t bits;
    memcpy(&bits, &distance, 4);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

static void expect_nothing(Nearest *nearest) {
    memset(nearest->key, 0xff, sizeof(nearest->key));
    nearest->key[0] = 0;
    nearest->num = 0;
}

/* Put a key in its place without a branch; the last goes. */
static inline void put(Nearest *nearest, uint64_t key) {
    uint64_t moved[BEAM];
    for (int i = 0; i < BEAM; i++) {
        uint64_t here = nearest->key[1 + i], before = nearest->key[i];
        uint64_t least = key < here ? key : here;
        moved[i] = least > before ? least : before;
    }
    memcpy(nearest->key + 1, moved, sizeof(moved));
}

/* Keep the nearest so far; of equals, the first. The found are numbered from `first` on. */
static inline void keep_nearest(const Found *found, int64_t first, int64_t most, Nearest *nearest) {
    for (int64_t i = 0; i < found->num; i++) {
        uint64_t key = ordered(found->distance[i]) << 32 | (uint64_t)(first + i);
        if (key < nearest->key[most]) put(nearest, key);
    }
    nearest->num += found->num;
    if (nearest->num > most) nearest->num = most;
}

/* List the children of all that a beam holds, and ask for their summaries, which lie apart. */
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
    Nearest nearest;
    expect_nothing(&nearest);
    for (int32_t from = 0; from < top->num[row]; from += MOST_FOUND) {
        int32_t left = top->num[row] - from;
        found->num = left < MOST_FOUND ? left : MOST_FOUND;
        for (int32_t i = 0; i < found->num; i++) found->id[i] = from + i;
        measure(top, row, point, dim, found);
        keep_nearest(found, from, most, &nearest);
    }
    beam->num = nearest.num;
    for (int64_t i = 0; i < nearest.num; i++) beam->id[i] = (int32_t)nearest.key[1 + i];
}

/* The nearest of the children of the beam above. */
static void search_below(const Level *of, int64_t row, const float *point, int64_t dim,
                         int64_t most, Found *found, Beam *beam) {
    Nearest nearest;
    expect_nothing(&nearest);
    find_children(beam + 1, of + 1, of, row, dim, found);
    measure(of, row, point, dim, found);
    keep_nearest(found, 0, most, &nearest);
    beam->num = nearest.num;
    for (int64_t i = 0; i < nearest.num; i++) {
        uint32_t number = (uint32_t)nearest.key[1 + i];
        beam->id[i] = found->id[number];
        beam->from[i] = found->from[number];
    }
}

CLONES static int64_t descend(const Shape *s, const Tree *t, int64_t row, const float *point,
                              int32_t *path) {
    Beam beam[MOST_LEVELS];
    Found found;
    int64_t top = 0;
    while (top + 1 < t->num_levels && t->level[top + 1].num[row] > 0) top++;
    search_top(t->level + top, row, point, s->dim, top ? BEAM : 1, &found, beam + top);
    for (int64_t level = top - 1; level >= 0; level--)
        search_below(t->level + level, row, point, s->dim, level ? BEAM : 1, &found, beam + level);
    int32_t at = 0;
    for (int64_t level = 0; level <= top; level++) {
        path[level] = beam[level].num ? beam[level].id[at] : -1;
        if (level < top && beam[level].num) at = beam[level].from[at];
    }
    return top;
}

int64_t icecache_find_path(const Shape *s, const Tree *t, int64_t row, const float *point,
                           int32_t *path) {
    return descend(s, t, row, point, path);
}
