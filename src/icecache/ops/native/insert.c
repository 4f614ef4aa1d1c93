/* Insert tokens: the nearest leaf takes one, or is cut in two; the nodes above it follow.
 *
 * The plain twin is cache/placer.py with tree/insert.py. A token that cannot go in yet changes
 * nothing; the answer says what it lacks.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "grow.h"
#include "insert.h"
#include "layer.h"
#include "pages.h"
#include "summary.h"
#include "vector.h"

#define WIDE_TOP 256

/* A leaf that takes a token: its members, the new one last, and where they go. */
typedef struct {
    int64_t row, leaf, top, page, num, num_pieces;
    int32_t path[MOST_LEVELS];
    int64_t target, leaving; /* another page, and the piece that moves there, or -1 */
    uint8_t slot[256], upper[256];
} Taking;

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

/* Read the leaf's members and the token, cut them in two if they are too many. */
static void read_members(const Shape *s, const Tree *t, const Pages *p, const Tokens *tokens,
                         int64_t index, Taking *k, Scratch *x) {
    int64_t dim = s->dim, source = pool_page(p, k->row, k->page);
    int64_t old = slots_of(s, t, k->leaf, k->slot);
    for (int64_t m = 0; m < old; m++) {
        to_float(p->data, key_of(s, source, k->slot[m]), s->dtype, x->key + m * dim, dim);
        to_float(p->data, key_of(s, source, k->slot[m] + s->page_size), s->dtype,
                 x->value + m * dim, dim);
    }
    to_float(tokens->keys, tokens->offset[index], s->dtype, x->key + old * dim, dim);
    to_float(tokens->values, tokens->offset[index], s->dtype, x->value + old * dim, dim);
    k->num = old + 1;
    k->num_pieces = k->num > s->leaf_size ? 2 : 1;
    memset(k->upper, 0, sizeof(k->upper));
    if (k->num_pieces == 2) icecache_cut(dim, x->key, k->num, k->upper, x);
}

/* Make room for one more token in the leaf's page: without a free slot, the smallest other leaf
 * moves out, or else the smallest piece will. */
static Answer make_room(const Shape *s, Tree *t, Pages *p, Taking *k) {
    int64_t len[2] = {0, 0};
    for (int64_t m = 0; m < k->num; m++) len[k->upper[m]]++;
    int64_t smallest = k->num_pieces == 2 && len[1] < len[0] ? 1 : 0;
    k->target = k->page;
    k->leaving = -1;
    if (p->free[k->row * p->capacity + k->page] > 0) return (Answer){INSERTED, 0};
    int64_t other = smallest_beside(t, k->row, k->path, k->top, (int32_t)k->page);
    int64_t moves_other = other >= 0 && count_of(t->level, 0, other) < len[smallest];
    int64_t need = moves_other ? count_of(t->level, 0, other) : len[smallest];
    int64_t target = fullest_with(s, p, k->row, need, k->page);
    if (target < 0) return (Answer){NEEDS_PAGE, 0};
    int64_t from = pool_page(p, k->row, k->page), to = pool_page(p, k->row, target);
    if (p->holders[to] != 1) return (Answer){NEEDS_COPY, (int32_t)target};
    if (!moves_other) {
        k->target = target;
        k->leaving = smallest;
        return (Answer){INSERTED, 0};
    }
    uint8_t moved[256];
    slots_of(s, t, other, moved);
    for (int64_t i = 0; i < need; i++) moved[i] = (uint8_t)move_token(s, p, from, moved[i], to);
    place(s, t, other, target, moved, need);
    change_free(s, p, k->row, target, -need);
    change_free(s, p, k->row, k->page, need);
    return (Answer){INSERTED, 0};
}

/* Move the piece that leaves, and store the token. */
static void store(const Shape *s, Pages *p, const Tokens *tokens, int64_t index, Taking *k) {
    int64_t old = k->num - 1, size = element_size(s), from = tokens->offset[index] * size;
    for (int64_t m = 0; m < old; m++)
        if (k->leaving == k->upper[m]) {
            k->slot[m] = (uint8_t)move_token(s, p, pool_page(p, k->row, k->page), k->slot[m],
                                             pool_page(p, k->row, k->target));
            change_free(s, p, k->row, k->target, -1);
            change_free(s, p, k->row, k->page, 1);
        }
    int64_t home = k->leaving == k->upper[old] ? k->target : k->page;
    int64_t page = pool_page(p, k->row, home), slot = lowest_free(s, p, page);
    char *data = p->data;
    memcpy(data + key_of(s, page, slot) * size, (const char *)tokens->keys + from,
           (size_t)(s->dim * size));
    memcpy(data + key_of(s, page, slot + s->page_size) * size, (const char *)tokens->values + from,
           (size_t)(s->dim * size));
    p->positions[page * s->page_size + slot] = (int32_t)tokens->position[index];
    change_free(s, p, k->row, home, -1);
    k->slot[old] = (uint8_t)slot;
}

/* Write down the leaf's pieces; returns the new leaf, or -1. */
CLONES static int32_t settle(const Shape *s, Tree *t, const Taking *k, Scratch *x) {
    Level *leaves = t->level;
    int32_t added = -1;
    for (int64_t piece = 0; piece < k->num_pieces; piece++) {
        int32_t members[MOST_MEMBERS];
        uint8_t slots[MOST_MEMBERS];
        int64_t num = 0, leaf = k->leaf;
        for (int64_t m = 0; m < k->num; m++)
            if (k->upper[m] == piece) {
                slots[num] = k->slot[m];
                members[num++] = (int32_t)m;
            }
        if (piece) {
            added = leaves->num[k->row]++;
            leaf = k->row * leaves->capacity + added;
            leaves->next[leaf] = -1;
        }
        place(s, t, leaf, k->leaving == piece ? k->target : k->page, slots, num);
        summarize_leaf(t, k->row, leaf, x->key, x->value, members, num, s->dim, x->mean);
    }
    return added;
}

/* Ask for what the token's leaf, its page and the nodes above it take to be brought up to date:
 * none of it was on the way down. */
static void expect(const Shape *s, const Tree *t, const Pages *p, const Taking *k) {
    int64_t at = k->row * p->capacity, slot_bytes = (s->page_size + 7) / 8;
    prefetch(t->page + k->leaf, 4);
    prefetch(t->slots + k->leaf * slot_bytes, slot_bytes);
    for (int64_t level = 0; level < k->top; level++) {
        const Level *of = t->level + level, *above = of + 1;
        int64_t first = k->row * of->capacity, size = level ? 4 : 1;
        int32_t id = above->first[k->row * above->capacity + k->path[level + 1]];
        for (; id >= 0; id = of->next[first + id]) {
            prefetch(of->value_mean + (first + id) * s->dim, s->dim);
            prefetch(of->value_scale + first + id, 2);
            prefetch(of->spread + first + id, 2);
            prefetch((const char *)of->count + (first + id) * size, size);
        }
    }
    int64_t page = t->page[k->leaf], bytes = s->dim * element_size(s);
    prefetch(p->free + at + page, 1);
    prefetch(p->before + at + page, 4);
    prefetch(p->after + at + page, 4);
    int64_t pool = p->page_of[at + page];
    prefetch(p->holders + pool, 4);
    prefetch(p->positions + pool * s->page_size, 4 * s->page_size);
    uint8_t slot[256];
    for (int64_t m = slots_of(s, t, k->leaf, slot) - 1; m >= 0; m--)
        for (int64_t half = 0; half < 2; half++)
            prefetch((const char *)p->data +
                         key_of(s, pool, slot[m] + half * s->page_size) * element_size(s), bytes);
}

CLONES static Answer insert_token(const Shape *s, Tree *t, Pages *p, const Tokens *tokens,
                                  int64_t index, Scratch *x) {
    int64_t row = tokens->row[index];
    Taking k = {.row = row};
    to_float(tokens->keys, tokens->offset[index], s->dtype, x->direction, s->dim);
    add_scaled(x->direction, -1.0f, t->centre + row * s->dim, s->dim);
    k.top = icecache_find_path(s, t, row, x->direction, k.path);
    k.leaf = row * t->level[0].capacity;
    if (k.path[0] < 0) {
        Answer opened = open_leaf(s, t, p, row, &k.page);
        if (opened.status != INSERTED) return opened;
        k.path[0] = 0;
        place(s, t, k.leaf, k.page, 0, 0);
    }
    k.leaf += k.path[0];
    expect(s, t, p, &k);
    k.page = t->page[k.leaf];
    if (p->holders[pool_page(p, row, k.page)] != 1) return (Answer){NEEDS_COPY, (int32_t)k.page};
    read_members(s, t, p, tokens, index, &k, x);
    if (k.num_pieces == 2 && !has_room(t, row, k.top)) return (Answer){NEEDS_ROOM, 0};
    Answer lacks = make_room(s, t, p, &k);
    if (lacks.status != INSERTED) return lacks;
    store(s, p, tokens, index, &k);
    icecache_follow(s, t, row, k.path, k.top, settle(s, t, &k, x), x);
    return (Answer){t->level[k.top].num[row] > WIDE_TOP ? TOP_IS_WIDE : INSERTED, 0};
}

EXPORT int64_t icecache_insert(const Shape *shape, Tree *tree, Pages *pages, const Tokens *tokens,
                               int64_t first, int64_t num_tokens, Answer *answer) {
    int64_t leaf = shape->leaf_size, node = shape->most_children, dim = shape->dim;
    int64_t all = ((leaf > node ? leaf : node) + 1) * dim;
    float *memory = malloc(sizeof(float) * (size_t)(3 * all + 2 * dim));
    if (!memory) return -1;
    Scratch x = {memory, memory + all, memory + 2 * all, memory + 3 * all, memory + 3 * all + dim};
    *answer = (Answer){INSERTED, 0};
    int64_t i = first;
    while (i < num_tokens && answer->status == INSERTED) {
        *answer = insert_token(shape, tree, pages, tokens, i, &x);
        i += answer->status == INSERTED || answer->status == TOP_IS_WIDE;
    }
    free(memory);
    return i;
}
