/* Insert tokens: the nearest leaf takes one, or is cut in two; the nodes above it follow.
 *
 * The plain twin is tree/insert.py with cache/placer.py. A token that cannot go in yet changes
 * nothing; the answer says what it lacks.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "layer.h"
#include "pages.h"
#include "summary.h"
#include "vector.h"

#define MOST_MEMBERS 129 /* the largest leaf or node, and one more */
#define POWER_ROUNDS 3
#define BEAM 16
#define WIDE_TOP 256

enum { INSERTED = 0, NEEDS_PAGE = 1, NEEDS_COPY = 2, NEEDS_ROOM = 3, TOP_IS_WIDE = 4 };

typedef struct {
    int32_t status, page; /* page: the one to be copied */
} Answer;

typedef struct {
    float *key, *value, *centred; /* [MOST_MEMBERS, dim] */
    float *mean, *direction, *node; /* [dim], [dim], [3, dim] */
} Scratch;

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

static float distance_to(const Level *level, int64_t at, const float *point, int64_t dim) {
    float mean[MAX_DIM], scale = from_bfloat16(level->key_scale[at]);
    from_int8(level->key_mean + at * dim, mean, dim);
    return scale * (0.5f * scale * dot(mean, mean, dim) - dot(mean, point, dim));
}

/* Find the nearest leaf from the top down: path[level] is its ancestor, path[0] the leaf or -1. */
CLONES static int64_t find_path(const Shape *s, const Tree *t, int64_t row, const float *point,
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

static int64_t element_size(const Shape *s) { return s->dtype == FLOAT32 ? 4 : 2; }

static int64_t key_of(const Shape *s, int64_t page, int64_t slot) {
    return (page * 2 * s->page_size + slot) * s->dim;
}

static int64_t lowest_free(const Shape *s, const Pages *p, int64_t page) {
    int64_t slot = 0;
    while (slot < s->page_size - 1 && p->positions[page * s->page_size + slot] >= 0) slot++;
    return slot;
}

/* Move a token to the lowest free slot of another page of the pool; returns the slot. */
static int64_t move_token(const Shape *s, const Pages *p, int64_t page, int64_t slot,
                          int64_t target) {
    int64_t size = element_size(s), bytes = s->dim * size, to = lowest_free(s, p, target);
    char *data = p->data;
    for (int64_t half = 0; half < 2; half++)
        memcpy(data + (key_of(s, target, to) + half * s->page_size * s->dim) * size,
               data + (key_of(s, page, slot) + half * s->page_size * s->dim) * size, bytes);
    p->positions[target * s->page_size + to] = p->positions[page * s->page_size + slot];
    p->positions[page * s->page_size + slot] = -1;
    return to;
}

static void place(const Shape *s, Tree *t, int64_t leaf, int64_t page, const uint8_t *slots,
                  int64_t num) {
    t->page[leaf] = (int32_t)page;
    ((uint8_t *)t->level[0].count)[leaf] = (uint8_t)num;
    int64_t bytes = (s->page_size + 7) / 8;
    memset(t->slots + leaf * bytes, 0, (size_t)bytes);
    for (int64_t i = 0; i < num; i++)
        t->slots[leaf * bytes + slots[i] / 8] |= (uint8_t)(1 << slots[i] % 8);
}

/* Stable order of `num` values, rising. */
static void sort_stable(const float *key, int32_t *order, int64_t num) {
    for (int64_t i = 0; i < num; i++) {
        int64_t j = i;
        for (; j > 0 && key[order[j - 1]] > key[i]; j--) order[j] = order[j - 1];
        order[j] = (int32_t)i;
    }
}

/* Cut the members along their main direction; upper[m] = 1 for the upper half. */
CLONES static void cut(int64_t dim, const float *keys, int64_t num, uint8_t *upper, Scratch *x) {
    float key[MOST_MEMBERS], *direction = x->direction, *mean = x->mean;
    int32_t order[MOST_MEMBERS];
    memset(mean, 0, sizeof(float) * (size_t)dim);
    for (int64_t m = 0; m < num; m++) add_scaled(mean, 1.0f, keys + m * dim, dim);
    for (int64_t m = 0; m < num; m++) {
        float *c = x->centred + m * dim;
        for (int64_t i = 0; i < dim; i++) c[i] = keys[m * dim + i] - mean[i] / (float)num;
        key[m] = dot(c, c, dim);
    }
    sort_stable(key, order, num);
    memcpy(direction, x->centred + order[num - 1] * dim, sizeof(float) * (size_t)dim);
    for (int round = 0; round < POWER_ROUNDS; round++) {
        for (int64_t m = 0; m < num; m++) key[m] = dot(x->centred + m * dim, direction, dim);
        memset(direction, 0, sizeof(float) * (size_t)dim);
        for (int64_t m = 0; m < num; m++)
            add_scaled(direction, key[m], x->centred + m * dim, dim);
        float norm = sqrtf(dot(direction, direction, dim));
        for (int64_t i = 0; i < dim; i++) direction[i] /= norm > 1e-20f ? norm : 1e-20f;
    }
    for (int64_t m = 0; m < num; m++) key[m] = dot(x->centred + m * dim, direction, dim);
    sort_stable(key, order, num);
    for (int64_t i = 0; i < num; i++) upper[order[i]] = i >= num - num / 2;
}

/* Make a leaf or node the first child of a node. */
static void adopt(Tree *t, int64_t level, int64_t row, int64_t node, int32_t child) {
    Level *of = t->level + level, *below = of - 1;
    below->next[row * below->capacity + child] = of->first[row * of->capacity + node];
    of->first[row * of->capacity + node] = child;
}

/* Give half of a node's children to a new node, if they are too many; returns it, or -1. */
static int32_t split_node(const Shape *s, Tree *t, int64_t level, int64_t row, int32_t node,
                          Scratch *x) {
    Level *of = t->level + level, *below = of - 1;
    int64_t first = row * below->capacity, num = 0;
    int32_t children[MOST_MEMBERS];
    uint8_t upper[MOST_MEMBERS] = {0};
    for (int32_t child = of->first[row * of->capacity + node]; child >= 0;
         child = below->next[first + child])
        children[num++] = child;
    if (num <= s->most_children) return -1;
    for (int64_t m = 0; m < num; m++)
        read_mean(below, first + children[m], s->dim, x->key + m * s->dim);
    cut(s->dim, x->key, num, upper, x);
    int32_t other = of->num[row]++;
    of->first[row * of->capacity + node] = of->first[row * of->capacity + other] = -1;
    while (num-- > 0) adopt(t, level, row, upper[num] ? other : node, children[num]);
    summarize_node(t, level, row, other, s->dim, x->node);
    return other;
}

/* Bring the nodes above a leaf up to date; `added`: a new leaf beside it, or -1. */
CLONES static void follow(const Shape *s, Tree *t, int64_t row, const int32_t *path, int64_t top,
                          int32_t added, Scratch *x) {
    for (int64_t level = 1; level <= top; level++) {
        if (added >= 0) adopt(t, level, row, path[level], added);
        added = added >= 0 ? split_node(s, t, level, row, path[level], x) : -1;
        summarize_node(t, level, row, path[level], s->dim, x->node);
    }
}

/* The smallest other leaf of the page among the leaf's siblings, -1 if there is none. */
static int64_t smallest_beside(const Tree *t, int64_t row, const int32_t *path, int64_t top,
                               int32_t page) {
    const Level *leaves = t->level;
    int64_t first = row * leaves->capacity, best = -1;
    int32_t id = top ? t->level[1].first[row * t->level[1].capacity + path[1]] : 0;
    while (top ? id >= 0 : id < leaves->num[row]) {
        if (t->page[first + id] == page && id != path[0] &&
            (best < 0 || count_of(leaves, 0, first + id) < count_of(leaves, 0, best)))
            best = first + id;
        id = top ? leaves->next[first + id] : id + 1;
    }
    return best;
}

/* A row's first leaf. */
static Answer open_leaf(const Shape *s, Tree *t, Pages *p, int64_t row, int64_t *page) {
    if (t->level[0].capacity < 1) return (Answer){NEEDS_ROOM, 0};
    *page = fullest_with(s, p, row, 1, -1);
    if (*page < 0) return (Answer){NEEDS_PAGE, 0};
    if (p->holders[pool_page(p, row, *page)] != 1) return (Answer){NEEDS_COPY, (int32_t)*page};
    t->level[0].num[row] = 1;
    t->level[0].next[row * t->level[0].capacity] = -1;
    ((uint8_t *)t->level[0].count)[row * t->level[0].capacity] = 0;
    return (Answer){INSERTED, 0};
}

static int has_room(const Tree *t, int64_t row, int64_t top) {
    for (int64_t level = 0; level <= top; level++)
        if (t->level[level].num[row] >= t->level[level].capacity) return 0;
    return 1;
}

static Answer insert_token(const Shape *s, Tree *t, Pages *p, int64_t row, const void *keys,
                           const void *values, int64_t index, int64_t position, Scratch *x) {
    int64_t dim = s->dim, size = element_size(s), page;
    int32_t path[MOST_LEVELS];
    to_float(keys, index * dim, s->dtype, x->direction, dim);
    int64_t top = find_path(s, t, row, x->direction, path);
    if (path[0] < 0) {
        Answer opened = open_leaf(s, t, p, row, &page);
        if (opened.status != INSERTED) return opened;
        path[0] = 0;
        place(s, t, row * t->level[0].capacity, page, 0, 0);
    }
    int64_t leaf = row * t->level[0].capacity + path[0], old = count_of(t->level, 0, leaf);
    page = t->page[leaf];
    int64_t source = pool_page(p, row, page), free_slots = p->free[row * p->capacity + page];
    if (p->holders[source] != 1) return (Answer){NEEDS_COPY, (int32_t)page};

    uint8_t slot[256], upper[MOST_MEMBERS] = {0};
    slots_of(s, t, leaf, slot);
    for (int64_t m = 0; m < old; m++) {
        to_float(p->data, key_of(s, source, slot[m]), s->dtype, x->key + m * dim, dim);
        to_float(p->data, key_of(s, source, slot[m] + s->page_size), s->dtype, x->value + m * dim,
                 dim);
    }
    memcpy(x->key + old * dim, x->direction, sizeof(float) * (size_t)dim);
    to_float(values, index * dim, s->dtype, x->value + old * dim, dim);
    int64_t num = old + 1, num_pieces = 1;
    if (num > s->leaf_size) {
        if (!has_room(t, row, top)) return (Answer){NEEDS_ROOM, 0};
        cut(dim, x->key, num, upper, x);
        num_pieces = 2;
    }
    int64_t len[2] = {0, 0};
    for (int64_t m = 0; m < num; m++) len[upper[m]]++;
    int64_t smallest = num_pieces == 2 && len[1] < len[0] ? 1 : 0;

    /* without a free slot, the smallest other leaf of the page moves, or else the smallest piece */
    int64_t target = page, leaving = -1;
    if (free_slots == 0) {
        int64_t other = smallest_beside(t, row, path, top, (int32_t)page);
        int64_t moves_other = other >= 0 && count_of(t->level, 0, other) < len[smallest];
        int64_t need = moves_other ? count_of(t->level, 0, other) : len[smallest];
        target = fullest_with(s, p, row, need, page);
        if (target < 0) return (Answer){NEEDS_PAGE, 0};
        int64_t to = pool_page(p, row, target);
        if (p->holders[to] != 1) return (Answer){NEEDS_COPY, (int32_t)target};
        if (moves_other) {
            uint8_t moved[256];
            slots_of(s, t, other, moved);
            for (int64_t i = 0; i < need; i++)
                moved[i] = (uint8_t)move_token(s, p, source, moved[i], to);
            place(s, t, other, target, moved, need);
            change_free(s, p, row, target, -need);
            change_free(s, p, row, page, need);
        } else {
            leaving = smallest;
        }
    }
    for (int64_t m = 0; m < old; m++)
        if (leaving == upper[m]) {
            slot[m] = (uint8_t)move_token(s, p, source, slot[m], pool_page(p, row, target));
            change_free(s, p, row, target, -1);
            change_free(s, p, row, page, 1);
        }
    int64_t home = leaving == upper[old] ? target : page, in_pool = pool_page(p, row, home);
    slot[old] = (uint8_t)lowest_free(s, p, in_pool);
    change_free(s, p, row, home, -1);
    char *data = p->data;
    memcpy(data + key_of(s, in_pool, slot[old]) * size, (const char *)keys + index * dim * size,
           (size_t)(dim * size));
    memcpy(data + key_of(s, in_pool, slot[old] + s->page_size) * size,
           (const char *)values + index * dim * size, (size_t)(dim * size));
    p->positions[in_pool * s->page_size + slot[old]] = (int32_t)position;

    for (int64_t piece = 0; piece < num_pieces; piece++) {
        int32_t members[MOST_MEMBERS];
        uint8_t slots[MOST_MEMBERS];
        int64_t count = 0;
        for (int64_t m = 0; m < num; m++)
            if (upper[m] == piece) {
                slots[count] = slot[m];
                members[count++] = (int32_t)m;
            }
        int64_t number = piece == 0 ? leaf : row * t->level[0].capacity + t->level[0].num[row]++;
        if (piece) t->level[0].next[number] = -1;
        place(s, t, number, leaving == piece ? target : page, slots, count);
        summarize_leaf(t->level, number, x->key, x->value, members, count, dim, x->mean);
    }
    follow(s, t, row, path, top, num_pieces == 2 ? t->level[0].num[row] - 1 : -1, x);
    return (Answer){t->level[top].num[row] > WIDE_TOP ? TOP_IS_WIDE : INSERTED, 0};
}

/* Insert tokens one after the other until one lacks something. Returns how far it came, or -1
 * without memory; `answer` speaks of the token it stopped at, or of the one that it put in last. */
EXPORT int64_t icecache_insert(const Shape *shape, Tree *tree, Pages *pages, const void *keys,
                               const void *values, const int64_t *row_of_token,
                               const int64_t *positions, int64_t first, int64_t num_tokens,
                               Answer *answer) {
    int64_t dim = shape->dim, all = MOST_MEMBERS * dim;
    float *memory = malloc(sizeof(float) * (size_t)(3 * all + 5 * dim));
    if (!memory) return -1;
    Scratch x = {memory, memory + all, memory + 2 * all, memory + 3 * all, memory + 3 * all + dim,
                 memory + 3 * all + 2 * dim};
    *answer = (Answer){INSERTED, 0};
    int64_t i = first;
    while (i < num_tokens && answer->status == INSERTED) {
        *answer = insert_token(shape, tree, pages, row_of_token[i], keys, values, i, positions[i], &x);
        i += answer->status == INSERTED || answer->status == TOP_IS_WIDE;
    }
    free(memory);
    return i;
}
