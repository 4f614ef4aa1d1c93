/* Search one row of the tree: which nodes to expand, which leaves to attend.
 *
 * A row of few leaves is scanned flat. Others are searched from the top: the nodes of a level are
 * scored by their summaries, the best `field_of_view` are expanded into their children, the rest
 * stays as it is, a far field. The plain twin is tree/search.py with attention/select.py.
 */
#include "search.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "products.h"
#include "vector.h"

#define SAMPLED 128
#define NODES_AHEAD 12

static int64_t top_level(const Tree *t, int64_t row) {
    int64_t level = 0;
    while (level + 1 < t->num_levels && t->level[level + 1].num[row] > 0) level++;
    return level;
}

static int is_flat(const Shape *s, const Tree *t, int64_t row) {
    return t->level[0].num[row] <= s->crossover || top_level(t, row) == 0;
}

/* What stands beside the means, of all leaves of a row: vector code, unlike the general loop. */
static inline void read_all_leaves(const Level *leaves, int64_t first, int64_t num, float scaling,
                                   const float *log_of, Found *f, int64_t from) {
    const uint16_t *scale = leaves->key_scale + first, *spread = leaves->spread + first;
    const uint8_t *count = (const uint8_t *)leaves->count + first;
    for (int64_t i = 0; i < num; i++) f->scale[from + i] = scaling * from_bfloat16(scale[i]);
    for (int64_t i = 0; i < num; i++) f->spread[from + i] = from_bfloat16(spread[i]);
    for (int64_t i = 0; i < num; i++) f->count[from + i] = (float)count[i];
    for (int64_t i = 0; i < num; i++) f->log_count[from + i] = log_of[count[i]];
}

/* Logits and corrections of entries `from` on, whose ids are given. */
CLONES static void score(const Shape *s, const Tree *t, int64_t level, int64_t row,
                         const float *query, const float *log_of, int64_t from, int64_t num,
                         Found *f) {
    const Level *of = t->level + level;
    int64_t first = row * of->capacity;
    const float largest = level ? LARGEST_NODE_CORRECTION : LARGEST_LEAF_CORRECTION;
    int32_t *id = f->id + from;
    memset(f->level + from, (int)level, (size_t)num);
    PerHead logits = {f->logits + from, s->heads, f->stride};
    icecache_dot_entries(s->dim, query, of->key_mean + first * s->dim, id, num, logits);
    if (f->is_flat) {
        read_all_leaves(of, first + from, num, s->scaling, log_of, f, from);
    } else {
        for (int64_t i = 0; i < num; i++) {
            int64_t at = first + id[i], count = count_of(of, level, at);
            f->count[from + i] = (float)count;
            f->scale[from + i] = s->scaling * from_bfloat16(of->key_scale[at]);
            f->spread[from + i] = from_bfloat16(of->spread[at]);
            f->log_count[from + i] = count <= s->leaf_size ? log_of[count] : logf((float)count);
        }
    }
    const float *scale = f->scale + from, *spread = f->spread + from, *more = f->log_count + from;
    for (int64_t g = 0; g < s->heads; g++) {
        const float *q = query + g * s->dim;
        float half_norm = 0.5f * s->scaling * s->scaling / (float)s->dim * dot(q, q, s->dim);
        float centre = s->scaling * dot(q, t->centre + row * s->dim, s->dim);
        float *logit = f->logits + g * f->stride + from;
        float *correction = f->correction + g * f->stride + from;
        if (s->softcap <= 0.0f) {
            for (int64_t i = 0; i < num; i++) {
                float second = half_norm * spread[i];
                logit[i] = scale[i] * logit[i] + (centre + more[i]);
                correction[i] = second < largest ? second : largest;
            }
        } else {
            for (int64_t i = 0; i < num; i++) {
                float squashed = tanhf((scale[i] * logit[i] + centre) / s->softcap);
                float slope = 1.0f - squashed * squashed;
                float second = half_norm * spread[i] * slope * slope;
                logit[i] = s->softcap * squashed + more[i];
                correction[i] = second < largest ? second : largest;
            }
        }
    }
}

/* Summed over heads: an entry's share of all attention, times how wrong its estimate may be. */
CLONES static void weigh(const Shape *s, Found *f, int64_t from, int64_t num) {
    float *worth = f->worth, *share = f->share;
    memset(worth, 0, sizeof(float) * (size_t)num);
    for (int64_t g = 0; g < s->heads; g++) {
        const float *lg = f->logits + g * f->stride + from;
        const float *co = f->correction + g * f->stride + from;
        float top = f->lse[g];
        for (int64_t i = 0; i < num; i++) top = larger(top, lg[i] + co[i]);
        float sum = exponential(f->lse[g] - top);
        for (int64_t i = 0; i < num; i++) {
            share[i] = exponential(lg[i] + co[i] - top);
            sum += share[i];
        }
        float scale = 1.0f / sum;
        if (s->remainder)
            for (int64_t i = 0; i < num; i++) worth[i] += scale * share[i] * sqrtf(co[i]);
        else
            for (int64_t i = 0; i < num; i++) worth[i] += scale * share[i];
    }
}

/* Add the attention of entries that will not be looked at again to what is beside the others. */
CLONES static void set_aside(const Shape *s, Found *f, int64_t from, int64_t num) {
    for (int64_t g = 0; g < s->heads && num > 0; g++) {
        const float *lg = f->logits + g * f->stride + from;
        const float *co = f->correction + g * f->stride + from;
        float top = f->lse[g], sum = 0.0f;
        for (int64_t i = 0; i < num; i++) top = larger(top, lg[i] + co[i]);
        for (int64_t i = 0; i < num; i++) sum += exponential(lg[i] + co[i] - top);
        f->lse[g] = top + logf(sum + exponential(f->lse[g] - top));
    }
}

/* Candidates worth at least `least`, of every `stride`th entry; returns their number. */
static int64_t collect(Found *f, int64_t from, int64_t num, int64_t stride, float least) {
    int64_t kept = 0;
    for (int64_t i = 0; i < num; i += stride) {
        f->candidates[kept] = (Candidate){f->worth[i], f->id[from + i], (int32_t)i};
        kept += f->candidates[kept].worth >= least;
    }
    return kept;
}

/* Collect all candidates that are worth at least as much as about the `want`th best, which a
 * sample shows: few of many are ever put in order. */
static int64_t collect_best(Found *f, int64_t from, int64_t num, int64_t want) {
    int64_t rank = want * SAMPLED / num;
    if (num < 8 * SAMPLED || rank >= SAMPLED / 2) return collect(f, from, num, 1, -1.0f);
    int64_t sampled = collect(f, from, num, num / SAMPLED, -1.0f);
    select_best(f->candidates, sampled, rank + 8);
    float least = f->candidates[0].worth;
    for (int64_t i = 1; i < rank + 8; i++)
        least = least < f->candidates[i].worth ? least : f->candidates[i].worth;
    return collect(f, from, num, 1, least);
}

/* Append the children of the chosen entries `from` on. A node's children lie together, but those
 * of two nodes do not: what is read of them is asked for ahead. */
static int64_t append_children(const Shape *s, const Tree *t, int64_t level, int64_t row,
                               int64_t from, int64_t num, Found *f) {
    const Level *of = t->level + level, *below = of - 1;
    const int32_t *first = of->first + row * of->capacity;
    int64_t row_below = row * below->capacity, nodes = 0, children = 0;
    Candidate *node = f->candidates;
    for (int64_t i = 0; i < num; i++) {
        node[nodes].id = f->id[from + i];
        nodes += f->chosen[from + i];
    }
    for (int64_t i = 0; i < nodes; i++) {
        if (i + 2 * NODES_AHEAD < nodes) prefetch(first + node[i + 2 * NODES_AHEAD].id, 4);
        if (i + NODES_AHEAD < nodes)
            prefetch(below->next + row_below + first[node[i + NODES_AHEAD].id], 4);
        for (int32_t child = first[node[i].id]; child >= 0; child = below->next[row_below + child]) {
            int64_t at = row_below + child;
            prefetch(below->key_mean + at * s->dim, s->dim);
            prefetch(below->key_scale + at, 2);
            prefetch(below->value_scale + at, 2);
            prefetch(below->spread + at, 2);
            prefetch((const char *)below->count + at * (level > 1 ? 4 : 1), 1);
            f->frontier[children++] = child;
        }
    }
    return children;
}

/* Score the nodes of a level and expand the best; returns the number of children. */
static int64_t expand(const Shape *s, const Tree *t, int64_t level, int64_t row,
                      const float *query, const float *log_of, int64_t num, Found *f) {
    int64_t from = f->num_far, field = level > 1 ? (s->field_of_view + 1) / 2 : s->field_of_view;
    memset(f->chosen + from, num <= field, (size_t)num);
    if (num <= field) return append_children(s, t, level, row, from, num, f);
    score(s, t, level, row, query, log_of, from, num, f);
    f->nodes_scored += num;
    f->num_far += num;
    weigh(s, f, from, num);
    int64_t candidates = collect_best(f, from, num, field);
    if (candidates < field) candidates = collect(f, from, num, 1, -1.0f);
    select_best(f->candidates, candidates, field);
    for (int64_t i = 0; i < field; i++) {
        int64_t at = from + f->candidates[i].entry;
        f->chosen[at] = 1;
        for (int64_t g = 0; g < s->heads; g++) f->logits[g * f->stride + at] = -1e30f;
    }
    set_aside(s, f, from, num);
    return append_children(s, t, level, row, from, num, f);
}

/* Take leaves from the best down, of the `room` best whatever still fits; returns whether `num`
 * candidates were enough to know. */
static int take_best(const Shape *s, Found *f, int64_t num, int64_t of_all) {
    const float *count = f->count + f->num_far;
    Candidate *heap = f->candidates;
    uint8_t *chosen = f->chosen + f->num_far;
    int64_t most = s->room < of_all ? s->room : of_all, taken = 0;
    f->selected = 0;
    for (int64_t at = num / 2 - 1; at >= 0; at--) sift_down(heap, num, at);
    for (; taken < most && num > 0 && f->selected < s->room; taken++) {
        int64_t i = heap[0].entry, size = (int64_t)count[i];
        if (f->selected + size <= s->room) {
            chosen[i] = 1;
            f->selected += size;
        }
        heap[0] = heap[--num];
        sift_down(heap, num, 0);
    }
    return taken == most || f->selected == s->room;
}

/* Choose leaves by worth a token. */
static void choose(const Shape *s, Found *f, int64_t num) {
    int64_t from = f->num_far;
    memset(f->chosen + from, 0, (size_t)num);
    f->selected = 0;
    if (s->room <= 0 || num == 0) return;
    weigh(s, f, from, num);
    for (int64_t i = 0; i < num; i++) f->worth[i] /= f->count[from + i];
    /* half the room: the best leaves mostly have two tokens or more */
    if (take_best(s, f, collect_best(f, from, num, s->room / 2), num)) return;
    memset(f->chosen + from, 0, (size_t)num);
    take_best(s, f, collect(f, from, num, 1, -1.0f), num);
}

void icecache_find_leaves(const Shape *s, const Tree *t, int64_t row, const float *query,
                          const float *fixed_lse, const float *log_of, Found *f) {
    f->is_flat = is_flat(s, t, row);
    int64_t level = f->is_flat ? 0 : top_level(t, row), num = t->level[level].num[row];
    f->num_far = f->nodes_scored = 0;
    memcpy(f->lse, fixed_lse, sizeof(float) * (size_t)s->heads);
    for (int64_t i = 0; i < num; i++) f->id[i] = (int32_t)i;
    for (; level > 0; level--) {
        num = expand(s, t, level, row, query, log_of, num, f);
        memcpy(f->id + f->num_far, f->frontier, sizeof(int32_t) * (size_t)num);
    }
    f->num = f->num_far + num;
}

void icecache_score_leaves(const Shape *s, const Tree *t, int64_t row, const float *query,
                           const float *log_of, int64_t from, int64_t num, Found *f) {
    score(s, t, 0, row, query, log_of, from, num, f);
}

void icecache_choose_leaves(const Shape *s, Found *f) { choose(s, f, f->num - f->num_far); }

void icecache_name_leaves(const Tree *t, int64_t row, Found *f) {
    f->is_flat = 1;
    f->num_far = f->nodes_scored = 0;
    f->num = t->level[0].num[row];
    for (int64_t i = 0; i < f->num; i++) f->id[i] = (int32_t)i;
    memset(f->chosen, 0, (size_t)f->num);
}

int64_t icecache_most_entries(const Shape *s, const Tree *t) {
    int64_t most = 1, children = s->field_of_view * s->most_children;
    for (int64_t row = 0; row < s->rows; row++) {
        int64_t level = is_flat(s, t, row) ? 0 : top_level(t, row);
        int64_t entries = t->level[level].num[row];
        while (level-- > 0) {
            int64_t num = t->level[level].num[row];
            entries += num < children ? num : children;
        }
        most = entries > most ? entries : most;
    }
    return most;
}

static int64_t aligned(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

int64_t icecache_found_bytes(int64_t stride, int64_t heads) {
    return aligned((2 * heads + 6) * stride * (int64_t)sizeof(float)) +
           aligned(heads * (int64_t)sizeof(float)) + aligned(2 * stride * (int64_t)sizeof(int32_t)) +
           aligned(stride * (int64_t)sizeof(Candidate)) + aligned(2 * stride) + 64;
}

void icecache_lay_out(Found *f, void *memory, int64_t stride, int64_t heads) {
    char *at = (char *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    f->stride = stride;
    f->logits = (float *)at;
    f->correction = f->logits + heads * stride;
    float **arrays[] = {&f->count, &f->scale, &f->spread, &f->log_count, &f->worth, &f->share};
    for (int64_t i = 0; i < 6; i++) *arrays[i] = f->correction + (heads + i) * stride;
    at += aligned((2 * heads + 6) * stride * (int64_t)sizeof(float));
    f->lse = (float *)at;
    at += aligned(heads * (int64_t)sizeof(float));
    f->id = (int32_t *)at;
    f->frontier = f->id + stride;
    at += aligned(2 * stride * (int64_t)sizeof(int32_t));
    f->candidates = (Candidate *)at;
    at += aligned(stride * (int64_t)sizeof(Candidate));
    f->level = (uint8_t *)at;
    f->chosen = f->level + stride;
}
