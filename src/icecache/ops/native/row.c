/* One row of a sparse decode step: search, then attend.
 *
 * The plain twin is attention/attend.py (attend_sparse); names and order of the steps are the same.
 */
#include "row.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "remainder.h"
#include "vector.h"

static inline void score_token(int64_t dim, const Shape *s, const float *query, const float *key,
                               float *logits, int64_t stride) {
    for (int64_t g = 0; g < s->heads; g++) {
        float logit = s->scaling * dot(query + g * dim, key, dim);
        logits[g * stride] = s->softcap > 0.0f ? s->softcap * tanhf(logit / s->softcap) : logit;
    }
}

static inline void score_tokens(int64_t dim, const Shape *s, const float *query, const void *data,
                                const int64_t *offset, int64_t first, int64_t num, float *logits,
                                int64_t stride) {
    _Alignas(64) float key[MAX_DIM];
    for (int64_t k = 0; k < num; k++) {
        to_float(data, offset ? offset[k] : first + k * dim, s->dtype, key, dim);
        score_token(dim, s, query, key, logits + k, stride);
    }
}

static inline void attend_tokens(int64_t dim, const Shape *s, const void *data,
                                 const int64_t *offset, int64_t first, int64_t num,
                                 const float *weight, int64_t stride, float *out) {
    _Alignas(64) float value[MAX_DIM];
    for (int64_t k = 0; k < num; k++) {
        to_float(data, offset ? offset[k] + s->page_size * dim : first + k * dim, s->dtype, value,
                 dim);
        for (int64_t g = 0; g < s->heads; g++)
            add_scaled(out + g * dim, weight[g * stride + k], value, dim);
    }
}

CLONES static void score_fixed(const Shape *s, const Segment *segments, int64_t num_segments,
                               const float *query, const float *sink_logits, int64_t row,
                               Exact *e) {
    e->num_fixed = 0;
    for (int64_t i = 0; i < num_segments; i++) {
        const Segment *seg = segments + i;
        int64_t first = row * seg->row_stride + seg->start[row] * s->dim, len = seg->len[row];
        BY_DIM(s->dim, score_tokens, s, query, seg->keys, 0, first, len, e->logits + e->num_fixed,
               e->stride)
        e->num_fixed += len;
    }
    for (int64_t g = 0; g < s->heads; g++) {
        const float *logits = e->logits + g * e->stride;
        float top = sink_logits ? sink_logits[g] : -1e30f, sum = 0.0f;
        for (int64_t k = 0; k < e->num_fixed; k++) top = larger(top, logits[k]);
        for (int64_t k = 0; k < e->num_fixed; k++) sum += exponential(logits[k] - top);
        if (sink_logits) sum += exponential(sink_logits[g] - top);
        e->lse[g] = sum > 0.0f ? top + logf(sum) : top;
    }
    e->num = e->num_fixed;
}

/* The first chosen entry from `i` on, f->num if there is none: few of many are. */
static inline int64_t next_chosen(const Found *f, int64_t i) {
    for (uint64_t eight = 0; i + 8 <= f->num; i += 8) {
        memcpy(&eight, f->chosen + i, 8);
        if (eight) break;
    }
    while (i < f->num && !f->chosen[i]) i++;
    return i;
}

/* Collect the tokens of the chosen leaves, leaf by leaf in their order; returns their number. */
static int64_t gather(const Shape *s, const Tree *t, const Pages *p, int64_t row, const Found *f,
                      int64_t *token, int32_t *positions) {
    int64_t size = s->dtype == FLOAT32 ? 4 : 2, n = 0;
    for (int64_t i = next_chosen(f, f->num_far); i < f->num; i = next_chosen(f, i + 1)) {
        int64_t leaf = row * t->level[0].capacity + f->id[i];
        int64_t page = pool_page(p, row, t->page[leaf]);
        uint8_t slots[256];
        int64_t num = slots_of(s, t, leaf, slots);
        for (int64_t k = 0; k < num; k++, n++) {
            token[n] = (page * 2 * s->page_size + slots[k]) * s->dim;
            const char *key = (const char *)p->data + token[n] * size;
            prefetch(key, s->dim * size);
            prefetch(key + s->page_size * s->dim * size, s->dim * size);
            if (positions) positions[n] = p->positions[page * s->page_size + slots[k]];
        }
    }
    return n;
}

CLONES static void score_selected(const Shape *s, const Pages *p, const float *query, Exact *e) {
    BY_DIM(s->dim, score_tokens, s, query, p->data, e->token, 0, e->num - e->num_fixed,
           e->logits + e->num_fixed, e->stride)
}

/* Turn logits into weights of one softmax over exact tokens, entries and learned sinks; those of
 * entries are still to be scaled. */
CLONES static void normalise(const Shape *s, const float *sink_logits, Exact *e, Found *f) {
    for (int64_t g = 0; g < s->heads; g++) {
        float *exact = e->logits + g * e->stride, *rest = f->logits + g * f->stride;
        const float *co = f->correction + g * f->stride;
        float top = sink_logits ? sink_logits[g] : -1e30f, all = 0.0f, share = s->spread_weight;
        for (int64_t k = 0; k < e->num; k++) top = larger(top, exact[k]);
        if (s->remainder) {
            for (int64_t i = next_chosen(f, f->num_far); i < f->num; i = next_chosen(f, i + 1))
                rest[i] = -1e30f;
            for (int64_t i = 0; i < f->num; i++) {
                rest[i] += share * co[i];
                top = larger(top, rest[i]);
            }
            for (int64_t i = 0; i < f->num; i++) {
                rest[i] = exponential(rest[i] - top);
                all += rest[i];
            }
        }
        float sum = all;
        for (int64_t k = 0; k < e->num; k++) {
            exact[k] = exponential(exact[k] - top);
            sum += exact[k];
        }
        if (sink_logits) sum += exponential(sink_logits[g] - top);
        for (int64_t k = 0; k < e->num; k++) exact[k] *= 1.0f / sum;
        f->scale[g] = 1.0f / sum;
        f->total[g] = all / sum;
    }
}

/* Attend to sink, window and selected tokens. */
CLONES static void attend_exact(const Step *step, int64_t row, const Exact *e, float *out) {
    const Shape *s = step->shape;
    int64_t at = 0;
    for (int64_t i = 0; i < step->num_segments; i++) {
        const Segment *seg = step->segments + i;
        int64_t first = row * seg->row_stride + seg->start[row] * s->dim, len = seg->len[row];
        BY_DIM(s->dim, attend_tokens, s, seg->values, 0, first, len, e->logits + at, e->stride, out)
        at += len;
    }
    if (e->num > at)
        BY_DIM(s->dim, attend_tokens, s, step->pages->data, e->token, 0, e->num - at,
               e->logits + at, e->stride, out)
}

/* Told by the bits: comparisons are compiled as if all were numbers. */
static int overflowed(const float *x, int64_t num) {
    int64_t bad = 0;
    for (int64_t i = 0; i < num; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bad |= (bits & 0x7f800000u) == 0x7f800000u;
    }
    return (int)bad;
}

static int64_t aligned(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

static int64_t most_selected(const Shape *s) { return s->room > 0 ? s->room : 0; }

int64_t icecache_room_bytes(const Shape *s, int64_t entries, int64_t fixed) {
    int64_t sums = num_added(entries) * s->heads * s->dim;
    int64_t floats = s->heads * (fixed + most_selected(s) + 1) + sums;
    return aligned(icecache_found_bytes(entries, s->heads) +
                   most_selected(s) * (int64_t)sizeof(int64_t) + floats * (int64_t)sizeof(float));
}

void icecache_make_room(const Shape *s, int64_t entries, int64_t fixed, char *memory, Room *room) {
    Exact *e = &room->exact;
    e->stride = fixed + most_selected(s);
    icecache_lay_out(&room->found, memory, entries, s->heads);
    e->token = (int64_t *)(memory + icecache_found_bytes(entries, s->heads));
    e->logits = (float *)(e->token + most_selected(s));
    e->lse = e->logits + s->heads * e->stride;
    room->sums = e->lse + s->heads;
}

static const float *query_of(const Step *step, int64_t row) {
    return step->query + row * step->shape->heads * step->shape->dim;
}

static const float *sinks_of(const Step *step, int64_t row) {
    return step->sink_logits ? step->sink_logits + row * step->shape->heads : 0;
}

void icecache_begin_row(const Step *step, int64_t row, Room *room) {
    score_fixed(step->shape, step->segments, step->num_segments, query_of(step, row),
                sinks_of(step, row), row, &room->exact);
    if (step->result->given)
        icecache_name_leaves(step->tree, row, &room->found);
    else
        icecache_find_nodes(step, row, room->exact.lse, &room->found);
}

void icecache_open_row(const Step *step, int64_t row, Room *room) {
    icecache_open_nodes(step->shape, step->tree, row, &room->found);
}

void icecache_score_block(const Step *step, int64_t row, int64_t block, Room *room) {
    Found *f = &room->found;
    int64_t from = f->num_far + block * BLOCK, left = f->num - from;
    icecache_score_entries(step, row, from, left < BLOCK ? left : BLOCK, f);
}

/* Choose tokens, or take those that are given; returns their number, -1 without memory. */
static int64_t select_tokens(const Step *step, int64_t row, Room *room) {
    Exact *e = &room->exact;
    Found *f = &room->found;
    const Result *r = step->result;
    int64_t listed = row * most_selected(step->shape);
    if (r->given)
        return icecache_take_given(step->shape, step->tree, step->pages, row, r->given + listed, f,
                                   e->token);
    icecache_choose_leaves(step->shape, f);
    return gather(step->shape, step->tree, step->pages, row, f, e->token,
                  r->positions ? r->positions + listed : 0);
}

int icecache_select_row(const Step *step, int64_t row, Room *room) {
    const Shape *s = step->shape;
    Exact *e = &room->exact;
    int64_t selected = select_tokens(step, row, room);
    if (selected < 0) return -1;
    e->num += selected;
    if (step->result->num_attended) step->result->num_attended[row] = (int32_t)e->num;
    if (!step->result->out) return 0;
    if (selected > 0) score_selected(s, step->pages, query_of(step, row), e);
    /* infinite logits give weights of nothing, which look like numbers: make the output say so */
    int bad = 0;
    for (int64_t g = 0; g < s->heads; g++) bad |= overflowed(e->logits + g * e->stride, e->num);
    normalise(s, sinks_of(step, row), e, &room->found);
    if (s->remainder) icecache_keep_entries(s, &room->found);
    if (bad) memset(e->logits, 0xff, sizeof(float) * (size_t)(s->heads * e->stride));
    return 0;
}

void icecache_add_block(const Step *step, int64_t row, int64_t block, Room *room) {
    const Shape *s = step->shape;
    if (s->remainder)
        icecache_add_kept(s, step->tree, row, &room->found, block,
                          room->sums + block * s->heads * s->dim);
}

void icecache_finish_row(const Step *step, int64_t row, Room *room) {
    const Shape *s = step->shape;
    int64_t num = s->heads * s->dim;
    float *out = step->result->out + row * num;
    memset(out, 0, sizeof(float) * (size_t)num);
    attend_exact(step, row, &room->exact, out);
    for (int64_t block = 0; s->remainder && block < num_added(room->found.num_kept); block++)
        for (int64_t i = 0; i < num; i++) out[i] += room->sums[block * num + i];
}
