/* Insert one token into the tree: its nearest leaf takes it, or is cut in two.
 *
 * The plain twin is tree/insert.py with cache/placer.py. A token that cannot go in yet changes
 * nothing; the answer says what it lacks.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "layer.h"
#include "vector.h"

#define MOST_MEMBERS 129 /* the largest leaf_size and one more */
#define POWER_ROUNDS 3

enum { INSERTED = 0, NEEDS_TWIN = 1, NEEDS_PAGE = 2, NEEDS_LEAF = 3 };

typedef struct {
    void *data;         /* [page, key|value, slot, dim] */
    int32_t *positions; /* [page, slot], -1 = free */
    const int32_t *holders;
    int32_t *num_pages; /* [rows] */
    int32_t *page_of;   /* [rows, page_capacity] */
    uint8_t *free;      /* [rows, page_capacity] */
    int64_t page_capacity;
} Pages;

/* The nearest leaf of a point, -1 where the row has none. */
CLONES static void nearest_of(const Shape *s, const Leaves *t, int64_t row, const float *point,
                              int64_t *nearest, float *buffer) {
    float least = 3e38f;
    *nearest = -1;
    for (int64_t l = 0; l < t->num_leaves[row]; l++) {
        int64_t leaf = row * s->capacity + l;
        from_int8(t->key_mean + leaf * s->dim, buffer, s->dim);
        float scale = t->key_scale[leaf];
        float distance = scale * (0.5f * scale * dot(buffer, buffer, s->dim) -
                                  dot(buffer, point, s->dim));
        if (distance < least) {
            least = distance;
            *nearest = l;
        }
    }
}

EXPORT int icecache_nearest_leaf(const Shape *shape, const Leaves *leaves, const float *points,
                                 const int64_t *row_of_point, int64_t num_points,
                                 int64_t *nearest) {
    float *buffer = malloc(sizeof(float) * shape->dim);
    if (!buffer) return -1;
    for (int64_t i = 0; i < num_points; i++)
        nearest_of(shape, leaves, row_of_point[i], points + i * shape->dim, nearest + i, buffer);
    free(buffer);
    return 0;
}

static int64_t element_size(const Shape *s) { return s->dtype == FLOAT32 ? 4 : 2; }

static int64_t key_of(const Shape *s, int64_t page, int64_t slot) {
    return (page * 2 * s->page_size + slot) * s->dim;
}

static int64_t find_page(const Pages *p, int64_t row, int32_t page) {
    for (int64_t at = 0; at < p->num_pages[row]; at++)
        if (p->page_of[row * p->page_capacity + at] == page) return at;
    return -1;
}

/* The fullest page of the row with room, not `besides`; -1 if there is none. */
static int64_t fullest_with(const Pages *p, int64_t row, int64_t room, int64_t besides) {
    const uint8_t *free_slots = p->free + row * p->page_capacity;
    int64_t best = -1;
    for (int64_t i = 0; i < p->num_pages[row]; i++)
        if (free_slots[i] >= room && i != besides && (best < 0 || free_slots[i] < free_slots[best]))
            best = i;
    return best;
}

static int64_t lowest_free(const Shape *s, const Pages *p, int64_t page) {
    int64_t slot = 0;
    while (slot < s->page_size - 1 && p->positions[page * s->page_size + slot] >= 0) slot++;
    return slot;
}

/* Move a token to the lowest free slot of another page; returns the slot. */
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

static void place(const Shape *s, Leaves *t, int64_t leaf, int64_t page, const uint8_t *slots,
                  int64_t num) {
    t->page[leaf] = (int32_t)page;
    t->count[leaf] = (uint8_t)num;
    for (int64_t i = 0; i < s->leaf_size; i++)
        t->slots[leaf * s->leaf_size + i] = i < num ? slots[i] : NO_SLOT;
}

static void quantize(const float *x, int8_t *codes, float *scale, int64_t dim) {
    float largest = 0.0f;
    for (int64_t i = 0; i < dim; i++) largest = fmaxf(largest, fabsf(x[i]));
    *scale = largest / 127.0f;
    float divisor = *scale > 1e-30f ? *scale : 1e-30f;
    for (int64_t i = 0; i < dim; i++) codes[i] = (int8_t)nearbyintf(x[i] / divisor);
}

/* Recompute a leaf's summary from members of keys and values, [member, dim]. */
static void summarize(const Shape *s, Leaves *t, int64_t leaf, const float *keys,
                      const float *values, const int32_t *members, int64_t num, float *mean) {
    float weight = 1.0f / (float)num, spread = 0.0f;
    memset(mean, 0, sizeof(float) * s->dim);
    for (int64_t m = 0; m < num; m++) add_scaled(mean, 1.0f, values + members[m] * s->dim, s->dim);
    for (int64_t i = 0; i < s->dim; i++) mean[i] *= weight;
    quantize(mean, t->value_mean + leaf * s->dim, t->value_scale + leaf, s->dim);
    memset(mean, 0, sizeof(float) * s->dim);
    for (int64_t m = 0; m < num; m++) add_scaled(mean, 1.0f, keys + members[m] * s->dim, s->dim);
    for (int64_t i = 0; i < s->dim; i++) mean[i] *= weight;
    quantize(mean, t->key_mean + leaf * s->dim, t->key_scale + leaf, s->dim);
    for (int64_t m = 0; m < num; m++) {
        const float *key = keys + members[m] * s->dim;
        float squared = 0.0f;
        for (int64_t i = 0; i < s->dim; i++) squared += (key[i] - mean[i]) * (key[i] - mean[i]);
        spread += squared;
    }
    float scale = t->key_scale[leaf];
    t->spread[leaf] = spread * weight + scale * scale * ((float)s->dim / 12.0f);
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
static void cut(const Shape *s, const float *keys, int64_t num, uint8_t *upper, float *centred,
                float *mean, float *direction) {
    float key[MOST_MEMBERS];
    int32_t order[MOST_MEMBERS];
    memset(mean, 0, sizeof(float) * s->dim);
    for (int64_t m = 0; m < num; m++) add_scaled(mean, 1.0f, keys + m * s->dim, s->dim);
    for (int64_t m = 0; m < num; m++) {
        float *c = centred + m * s->dim;
        for (int64_t i = 0; i < s->dim; i++) c[i] = keys[m * s->dim + i] - mean[i] / (float)num;
        key[m] = dot(c, c, s->dim);
    }
    sort_stable(key, order, num);
    memcpy(direction, centred + order[num - 1] * s->dim, sizeof(float) * s->dim);
    for (int round = 0; round < POWER_ROUNDS; round++) {
        for (int64_t m = 0; m < num; m++) key[m] = dot(centred + m * s->dim, direction, s->dim);
        memset(direction, 0, sizeof(float) * s->dim);
        for (int64_t m = 0; m < num; m++)
            add_scaled(direction, key[m], centred + m * s->dim, s->dim);
        float norm = sqrtf(dot(direction, direction, s->dim));
        for (int64_t i = 0; i < s->dim; i++) direction[i] /= norm > 1e-20f ? norm : 1e-20f;
    }
    for (int64_t m = 0; m < num; m++) key[m] = dot(centred + m * s->dim, direction, s->dim);
    sort_stable(key, order, num);
    for (int64_t i = 0; i < num; i++) upper[order[i]] = i >= num - num / 2;
}

/* Needs the twin: a row without leaves, pages that other rows hold too. */
CLONES static int insert_token(const Shape *s, Leaves *t, Pages *p, int64_t row, const void *keys,
                               const void *values, int64_t index, int64_t position,
                               float *scratch) {
    int64_t dim = s->dim, size = element_size(s), nearest;
    float *key = scratch, *value = key + MOST_MEMBERS * dim, *centred = value + MOST_MEMBERS * dim;
    float *mean = centred + MOST_MEMBERS * dim, *direction = mean + dim;
    to_float(keys, index * dim, s->dtype, direction, dim);
    nearest_of(s, t, row, direction, &nearest, mean);
    if (nearest < 0) return NEEDS_TWIN;
    int64_t leaf = row * s->capacity + nearest, page = t->page[leaf], old = t->count[leaf];
    int64_t at = find_page(p, row, (int32_t)page);
    uint8_t *free_slots = p->free + row * p->page_capacity;
    if (at < 0 || p->holders[page] != 1) return NEEDS_TWIN;

    uint8_t slot[MOST_MEMBERS], upper[MOST_MEMBERS] = {0};
    for (int64_t m = 0; m < old; m++) {
        slot[m] = t->slots[leaf * s->leaf_size + m];
        to_float(p->data, key_of(s, page, slot[m]), s->dtype, key + m * dim, dim);
        to_float(p->data, key_of(s, page, slot[m] + s->page_size), s->dtype, value + m * dim, dim);
    }
    memcpy(key + old * dim, direction, sizeof(float) * dim);
    to_float(values, index * dim, s->dtype, value + old * dim, dim);
    int64_t num = old + 1, num_pieces = 1;
    if (num > s->leaf_size) {
        if (t->num_leaves[row] >= s->capacity) return NEEDS_LEAF;
        cut(s, key, num, upper, centred, mean, direction);
        num_pieces = 2;
    }
    int64_t len[2] = {0, 0};
    for (int64_t m = 0; m < num; m++) len[upper[m]]++;
    int64_t smallest = num_pieces == 2 && len[1] < len[0] ? 1 : 0;

    /* without a free slot, the smallest other leaf of the page moves, or else the smallest piece */
    int64_t target = page, target_at = at, leaving = -1;
    if (free_slots[at] == 0) {
        int64_t other = -1;
        for (int64_t l = row * s->capacity; l < row * s->capacity + t->num_leaves[row]; l++)
            if (t->page[l] == page && l != leaf && (other < 0 || t->count[l] < t->count[other]))
                other = l;
        int64_t moves_other = other >= 0 && t->count[other] < len[smallest];
        int64_t need = moves_other ? t->count[other] : len[smallest];
        target_at = fullest_with(p, row, need, at);
        if (target_at < 0) return NEEDS_PAGE;
        target = p->page_of[row * p->page_capacity + target_at];
        if (p->holders[target] != 1) return NEEDS_TWIN;
        if (moves_other) {
            uint8_t moved[MOST_MEMBERS];
            for (int64_t i = 0; i < need; i++)
                moved[i] = (uint8_t)move_token(s, p, page, t->slots[other * s->leaf_size + i], target);
            place(s, t, other, target, moved, need);
            free_slots[target_at] -= (uint8_t)need;
            free_slots[at] += (uint8_t)need;
        } else {
            leaving = smallest;
        }
    }
    for (int64_t m = 0; m < old; m++)
        if (leaving == upper[m]) {
            slot[m] = (uint8_t)move_token(s, p, page, slot[m], target);
            free_slots[target_at]--;
            free_slots[at]++;
        }
    int64_t home = leaving == upper[old] ? target : page;
    slot[old] = (uint8_t)lowest_free(s, p, home);
    free_slots[leaving == upper[old] ? target_at : at]--;
    char *data = p->data;
    memcpy(data + key_of(s, home, slot[old]) * size, (const char *)keys + index * dim * size,
           dim * size);
    memcpy(data + key_of(s, home, slot[old] + s->page_size) * size,
           (const char *)values + index * dim * size, dim * size);
    p->positions[home * s->page_size + slot[old]] = (int32_t)position;

    for (int64_t piece = 0; piece < num_pieces; piece++) {
        int32_t members[MOST_MEMBERS];
        uint8_t slots[MOST_MEMBERS];
        int64_t count = 0;
        for (int64_t m = 0; m < num; m++)
            if (upper[m] == piece) {
                slots[count] = slot[m];
                members[count++] = (int32_t)m;
            }
        int64_t number = piece == 0 ? leaf : row * s->capacity + t->num_leaves[row]++;
        place(s, t, number, leaving == piece ? target : page, slots, count);
        summarize(s, t, number, key, value, members, count, mean);
    }
    return INSERTED;
}

/* Insert tokens, at most one a row; answer[i] says whether it went in, or what it lacks. */
EXPORT int icecache_insert(const Shape *shape, Leaves *leaves, Pages *pages, const void *keys,
                           const void *values, const int64_t *row_of_token,
                           const int64_t *positions, int64_t num_tokens, uint8_t *answer) {
    float *scratch = malloc(sizeof(float) * (3 * MOST_MEMBERS + 2) * (size_t)shape->dim);
    if (!scratch) return -1;
    for (int64_t i = 0; i < num_tokens; i++)
        answer[i] = (uint8_t)insert_token(shape, leaves, pages, row_of_token[i], keys, values, i,
                                        positions[i], scratch);
    free(scratch);
    return 0;
}
