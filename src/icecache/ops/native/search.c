/* Score leaves and nodes by their summaries, and choose the leaves to attend exactly.
 *
 * The plain twin is tree/search.py with attention/select.py; descend.c says what is scored.
 */
#include "search.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "above.h"
#include "products.h"
#include "vector.h"

#define SAMPLED 128

/* What stands beside the means of a block of entries. */
typedef struct {
    float scale[BLOCK], spread[BLOCK], log_count[BLOCK];
} Beside;

/* Of all leaves of a row: vector code, unlike the general loop. */
static inline void read_all_leaves(const Level *leaves, int64_t first, int64_t num, float scaling,
                                   const float *log_of, float *counts, Beside *b) {
    const uint16_t *scale = leaves->key_scale + first, *spread = leaves->spread + first;
    const uint8_t *count = (const uint8_t *)leaves->count + first;
    for (int64_t i = 0; i < num; i++) b->scale[i] = scaling * from_bfloat16(scale[i]);
    for (int64_t i = 0; i < num; i++) b->spread[i] = from_bfloat16(spread[i]);
    for (int64_t i = 0; i < num; i++) counts[i] = (float)count[i];
    for (int64_t i = 0; i < num; i++) b->log_count[i] = log_of[count[i]];
}

static inline void read_entries(const Step *step, int64_t level, int64_t first, const int32_t *id,
                                int64_t num, float *counts, Beside *b) {
    const Level *of = step->tree->level + level;
    for (int64_t i = 0; i < num; i++) {
        int64_t at = first + id[i], count = count_of(of, level, at);
        counts[i] = (float)count;
        b->scale[i] = step->shape->scaling * from_bfloat16(of->key_scale[at]);
        b->spread[i] = from_bfloat16(of->spread[at]);
        b->log_count[i] = count < LOGS ? step->log_of[count] : logf((float)count);
    }
}

/* Logits and corrections of at most BLOCK entries from `from` on, whose ids are given. */
CLONES static void score(const Step *step, int64_t row, int64_t from, int64_t num, Found *f) {
    const Shape *s = step->shape;
    const Level *of = step->tree->level + f->at_level;
    const float *query = step->query + row * s->heads * s->dim;
    int64_t first = row * of->capacity;
    const float largest = f->at_level ? LARGEST_NODE_CORRECTION : LARGEST_LEAF_CORRECTION;
    Beside b;
    memset(f->level + from, (int)f->at_level, (size_t)num);
    PerHead logits = {f->logits + from, s->heads, f->stride};
    int64_t count_size = f->at_level ? 4 : 1;
    const char *counts = (const char *)of->count + first * count_size;
    Entries entries = {of->key_mean + first * s->dim, f->id + from, num, f->num - from,
                       {counts, of->key_scale + first, of->spread + first}, {count_size, 2, 2}};
    icecache_dot_entries(s->dim, query, &entries, logits);
    if (f->is_flat)
        read_all_leaves(of, first + from, num, s->scaling, step->log_of, f->count + from, &b);
    else
        read_entries(step, f->at_level, first, f->id + from, num, f->count + from, &b);
    for (int64_t g = 0; g < s->heads; g++) {
        const float *q = query + g * s->dim;
        float half_norm = 0.5f * s->scaling * s->scaling / (float)s->dim * dot(q, q, s->dim);
        float centre = s->scaling * dot(q, step->tree->centre + row * s->dim, s->dim);
        float *logit = f->logits + g * f->stride + from;
        float *correction = f->correction + g * f->stride + from;
        if (s->softcap <= 0.0f) {
            for (int64_t i = 0; i < num; i++) {
                float second = half_norm * b.spread[i];
                logit[i] = b.scale[i] * logit[i] + (centre + b.log_count[i]);
                correction[i] = second < largest ? second : largest;
            }
        } else {
            for (int64_t i = 0; i < num; i++) {
                float squashed = tanhf((b.scale[i] * logit[i] + centre) / s->softcap);
                float slope = 1.0f - squashed * squashed;
                float second = half_norm * b.spread[i] * slope * slope;
                logit[i] = s->softcap * squashed + b.log_count[i];
                correction[i] = second < largest ? second : largest;
            }
        }
    }
}

void icecache_score_entries(const Step *step, int64_t row, int64_t from, int64_t num, Found *f) {
    for (; num > 0; from += BLOCK, num -= BLOCK)
        score(step, row, from, num < BLOCK ? num : BLOCK, f);
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

static inline Candidate candidate(const Found *f, int64_t from, int64_t i) {
    return (Candidate){rank_of(f->worth[i], f->id[from + i]), (int32_t)i};
}

/* Candidates of every `stride`th entry; returns their number. */
static int64_t collect(Found *f, int64_t from, int64_t num, int64_t stride) {
    int64_t found = 0;
    for (int64_t i = 0; i < num; i += stride) f->candidates[found++] = candidate(f, from, i);
    return found;
}

int64_t icecache_collect_best(Found *f, int64_t from, int64_t num, int64_t want) {
    int64_t rank = want * SAMPLED / num;
    if (num < 8 * SAMPLED || rank >= SAMPLED / 2) return collect(f, from, num, 1);
    int64_t sampled = collect(f, from, num, num / SAMPLED);
    select_best(f->candidates, sampled, rank + 8);
    uint64_t least = f->candidates[0].rank;
    for (int64_t i = 1; i < rank + 8; i++)
        least = least < f->candidates[i].rank ? least : f->candidates[i].rank;
    int64_t found = list_above(f->worth, num, worth_of(least), f->kept);
    for (int64_t k = 0; k < found; k++) f->candidates[k] = candidate(f, from, f->kept[k]);
    return found;
}

int64_t icecache_collect_all(Found *f, int64_t from, int64_t num) {
    return collect(f, from, num, 1);
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
    if (take_best(s, f, icecache_collect_best(f, from, num, s->room / 2), num)) return;
    memset(f->chosen + from, 0, (size_t)num);
    take_best(s, f, collect(f, from, num, 1), num);
}

void icecache_weigh(const Shape *s, Found *f, int64_t from, int64_t num) { weigh(s, f, from, num); }

void icecache_choose_leaves(const Shape *s, Found *f) { choose(s, f, f->num - f->num_far); }

static int64_t aligned(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

int64_t icecache_found_bytes(int64_t stride, int64_t heads) {
    return aligned((2 * heads + 3) * stride * (int64_t)sizeof(float)) +
           aligned(3 * heads * (int64_t)sizeof(float)) + aligned(2 * stride * (int64_t)sizeof(int32_t)) +
           aligned(stride * (int64_t)sizeof(Candidate)) + aligned(2 * stride) + 64;
}

void icecache_lay_out(Found *f, void *memory, int64_t stride, int64_t heads) {
    char *at = (char *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    f->stride = stride;
    f->logits = (float *)at;
    f->correction = f->logits + heads * stride;
    float **arrays[] = {&f->count, &f->worth, &f->share};
    for (int64_t i = 0; i < 3; i++) *arrays[i] = f->correction + (heads + i) * stride;
    at += aligned((2 * heads + 3) * stride * (int64_t)sizeof(float));
    f->lse = (float *)at;
    f->scale = f->lse + heads;
    f->total = f->scale + heads;
    at += aligned(3 * heads * (int64_t)sizeof(float));
    f->id = (int32_t *)at;
    f->frontier = f->kept = f->id + stride;
    at += aligned(2 * stride * (int64_t)sizeof(int32_t));
    f->candidates = (Candidate *)at;
    at += aligned(stride * (int64_t)sizeof(Candidate));
    f->level = (uint8_t *)at;
    f->chosen = f->level + stride;
}
