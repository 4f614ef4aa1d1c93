/* One sparse decode step of one layer: search, then attend.
 *
 * The plain twin is attention/attend.py (attend_sparse); names and order of the steps are the
 * same. Plain C without Python's headers, loaded by ctypes; rows are independent.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "decode.h"
#include "layer.h"
#include "products.h"
#include "search.h"
#include "vector.h"

/* Of all rows: from which on a second thread is worth waking. */
#define LEAST_ENTRIES 8192
#define ENTRIES_AHEAD 64

/* Room for the tokens that a row attends exactly. */
typedef struct {
    int64_t stride, num_fixed, num;
    float *logits;  /* [heads, stride] */
    float *lse;     /* [heads], of sink and window */
    int64_t *token; /* [room], element of the key in the pool */
} Exact;

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

/* Name the values of a block of entries, and ask for them. */
static int64_t name_values(const Shape *s, const Tree *t, int64_t row, const Found *f, int64_t from,
                           const int8_t **value) {
    int64_t num = f->num - from < ENTRIES_AHEAD ? f->num - from : ENTRIES_AHEAD;
    for (int64_t i = 0; i < num; i++) {
        const Level *of = t->level + f->level[from + i];
        value[i] = of->value_mean + (row * of->capacity + f->id[from + i]) * s->dim;
        prefetch(value[i], s->dim);
    }
    return num > 0 ? num : 0;
}

/* Weights are 0 where chosen. */
static void attend_entries(const Shape *s, const Tree *t, int64_t row, const Found *f, float *out) {
    const int8_t *value[2][ENTRIES_AHEAD];
    int64_t num = name_values(s, t, row, f, 0, value[0]);
    for (int64_t from = 0, block = 0; num > 0; block ^= 1) {
        int64_t next = name_values(s, t, row, f, from + num, value[block ^ 1]);
        PerHead weight = {f->logits + from, s->heads, f->stride};
        icecache_add_entries(s->dim, weight, value[block], num, out);
        from += num;
        num = next;
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

/* Collect the tokens of the chosen leaves, leaf by leaf in their order. */
static void gather(const Shape *s, const Tree *t, const Pages *p, int64_t row, const Found *f,
                   Exact *e, int32_t *positions) {
    int64_t size = s->dtype == FLOAT32 ? 4 : 2;
    for (int64_t i = next_chosen(f, f->num_far); i < f->num; i = next_chosen(f, i + 1)) {
        int64_t leaf = row * t->level[0].capacity + f->id[i];
        int64_t page = pool_page(p, row, t->page[leaf]);
        uint8_t slots[256];
        int64_t num = slots_of(s, t, leaf, slots);
        for (int64_t k = 0; k < num; k++) {
            int64_t n = e->num++ - e->num_fixed;
            e->token[n] = (page * 2 * s->page_size + slots[k]) * s->dim;
            const char *key = (const char *)p->data + e->token[n] * size;
            prefetch(key, s->dim * size);
            prefetch(key + s->page_size * s->dim * size, s->dim * size);
            if (positions) positions[n] = p->positions[page * s->page_size + slots[k]];
        }
    }
}

CLONES static void score_selected(const Shape *s, const Pages *p, const float *query, Exact *e) {
    BY_DIM(s->dim, score_tokens, s, query, p->data, e->token, 0, e->num - e->num_fixed,
           e->logits + e->num_fixed, e->stride)
}

static inline void read_value_scales(const Tree *t, int64_t row, Found *f) {
    if (f->is_flat) {
        const uint16_t *scale = t->level[0].value_scale + row * t->level[0].capacity;
        for (int64_t i = 0; i < f->num; i++) f->scale[i] = from_bfloat16(scale[i]);
        return;
    }
    for (int64_t i = 0; i < f->num; i++) {
        const Level *of = t->level + f->level[i];
        f->scale[i] = from_bfloat16(of->value_scale[row * of->capacity + f->id[i]]);
    }
}

/* Turn logits into weights of one softmax over exact tokens, entries and learned sinks. */
CLONES static void normalise(const Shape *s, const Tree *t, int64_t row, const float *sink_logits,
                             Exact *e, Found *f) {
    if (s->remainder) read_value_scales(t, row, f);
    for (int64_t g = 0; g < s->heads; g++) {
        float *exact = e->logits + g * e->stride, *rest = f->logits + g * f->stride;
        const float *co = f->correction + g * f->stride;
        float top = sink_logits ? sink_logits[g] : -1e30f, sum = 0.0f, share = s->spread_weight;
        for (int64_t k = 0; k < e->num; k++) top = larger(top, exact[k]);
        if (s->remainder) {
            for (int64_t i = 0; i < f->num; i++) rest[i] += share * co[i];
            for (int64_t i = next_chosen(f, 0); i < f->num; i = next_chosen(f, i + 1))
                rest[i] = -1e30f;
            for (int64_t i = 0; i < f->num; i++) top = larger(top, rest[i]);
            for (int64_t i = 0; i < f->num; i++) {
                rest[i] = exponential(rest[i] - top);
                sum += rest[i];
            }
        }
        for (int64_t k = 0; k < e->num; k++) {
            exact[k] = exponential(exact[k] - top);
            sum += exact[k];
        }
        if (sink_logits) sum += exponential(sink_logits[g] - top);
        float scale = 1.0f / sum;
        for (int64_t k = 0; k < e->num; k++) exact[k] *= scale;
        if (s->remainder)
            for (int64_t i = 0; i < f->num; i++) rest[i] *= scale * f->scale[i];
    }
}

CLONES static void attend(const Shape *s, const Tree *t, const Pages *p, const Segment *segments,
                          int64_t num_segments, int64_t row, const Exact *e, const Found *f,
                          float *out) {
    memset(out, 0, sizeof(float) * (size_t)(s->heads * s->dim));
    int64_t at = 0;
    for (int64_t i = 0; i < num_segments; i++) {
        const Segment *seg = segments + i;
        int64_t first = row * seg->row_stride + seg->start[row] * s->dim, len = seg->len[row];
        BY_DIM(s->dim, attend_tokens, s, seg->values, 0, first, len, e->logits + at, e->stride, out)
        at += len;
    }
    if (e->num > at)
        BY_DIM(s->dim, attend_tokens, s, p->data, e->token, 0, e->num - at, e->logits + at,
               e->stride, out)
    if (s->remainder) attend_entries(s, t, row, f, out);
}

/* What one thread works in. */
typedef struct {
    Exact exact;
    Found found;
    char *memory;
} Room;

static int make_room(const Shape *s, int64_t stride, int64_t most_fixed, Room *room) {
    int64_t most = s->room > 0 ? s->room : 0, found_bytes = icecache_found_bytes(stride, s->heads);
    Exact *e = &room->exact;
    *room = (Room){.exact = {.stride = most_fixed + most}};
    room->memory = malloc((size_t)(found_bytes + most * (int64_t)sizeof(int64_t) +
                                   s->heads * (e->stride + 1) * (int64_t)sizeof(float)));
    if (!room->memory) return 0;
    icecache_lay_out(&room->found, room->memory, stride, s->heads);
    e->token = (int64_t *)(room->memory + found_bytes);
    e->logits = (float *)(e->token + most);
    e->lse = e->logits + s->heads * e->stride;
    return 1;
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

/* Returns 0, or -1 without memory. */
static int attend_row(const Shape *s, const Tree *tree, const Pages *pages,
                      const Segment *segments, int64_t num_segments, const float *query,
                      const float *sink_logits, const float *log_of, int64_t row, Room *room,
                      Result *result) {
    Exact *e = &room->exact;
    Found *f = &room->found;
    const float *q = query + row * s->heads * s->dim;
    const float *sinks = sink_logits ? sink_logits + row * s->heads : 0;
    score_fixed(s, segments, num_segments, q, sinks, row, e);
    int64_t listed = row * (s->room > 0 ? s->room : 0);
    if (result->given) {
        icecache_scan_row(s, tree, row, q, log_of, f);
        int64_t taken = icecache_take_given(s, tree, pages, row, result->given + listed, f, e->token);
        if (taken < 0) return -1;
        e->num += taken;
    } else {
        icecache_search_row(s, tree, row, q, e->lse, log_of, f);
        gather(s, tree, pages, row, f, e, result->positions ? result->positions + listed : 0);
    }
    if (result->num_attended) result->num_attended[row] = (int32_t)e->num;
    if (!result->out) return 0;
    if (e->num > e->num_fixed) score_selected(s, pages, q, e);
    int bad = 0;
    for (int64_t g = 0; g < s->heads; g++) bad |= overflowed(e->logits + g * e->stride, e->num);
    normalise(s, tree, row, sinks, e, f);
    attend(s, tree, pages, segments, num_segments, row, e, f, result->out + row * s->heads * s->dim);
    /* infinite logits give weights of nothing, which look like numbers: make the output say so */
    if (bad)
        memset(result->out + row * s->heads * s->dim, 0xff, sizeof(float) * (size_t)(s->heads * s->dim));
    return 0;
}

EXPORT int icecache_sparse_step(const Shape *s, const Tree *tree, const Pages *pages,
                                const Segment *segments, int64_t num_segments, const float *query,
                                const float *sink_logits, int64_t threads, Result *result) {
    if (!tree)
        return icecache_dense_step(s, segments, num_segments, query, sink_logits, threads, result);
    int64_t most_fixed = 0, nodes = 0, leaves = 0, failed = 0;
    for (int64_t row = 0; row < s->rows; row++) {
        int64_t fixed = 0;
        for (int64_t i = 0; i < num_segments; i++) fixed += segments[i].len[row];
        most_fixed = fixed > most_fixed ? fixed : most_fixed;
    }
    int64_t stride = icecache_most_entries(s, tree);
    float log_of[256] = {0};
    for (int i = 1; i < 256; i++) log_of[i] = logf((float)i);
    if (stride * s->rows < LEAST_ENTRIES) threads = 1;
    if (threads > s->rows) threads = s->rows;
#if defined(_OPENMP)
#pragma omp parallel num_threads((int)threads) if (threads > 1) reduction(+ : nodes, leaves, failed)
#endif
    {
        Room room;
        int made = make_room(s, stride, most_fixed, &room);
#if defined(_OPENMP)
#pragma omp for schedule(dynamic)
#endif
        for (int64_t row = 0; row < s->rows; row++) {
            if (!made || attend_row(s, tree, pages, segments, num_segments, query, sink_logits,
                                    log_of, row, &room, result)) {
                failed++;
                continue;
            }
            nodes += room.found.nodes_scored;
            leaves += room.found.num - room.found.num_far;
        }
        free(room.memory);
    }
    result->nodes_scored = nodes;
    result->leaves_scored = leaves;
    return failed ? -1 : 0;
}

/* Sizes of the structures that Python mirrors; a library of another version has others. */
EXPORT int64_t icecache_layout(void) {
    int64_t sizes[] = {sizeof(Shape), sizeof(Level), sizeof(Tree), sizeof(Pages), sizeof(Segment),
                       sizeof(Result), sizeof(Decode)};
    int64_t all = 7;
    for (int i = 0; i < 7; i++) all = all * 131 + sizes[i];
    return all;
}

/* Setuptools' linkers ask for a module's entry point; this library is loaded by ctypes. */
EXPORT void *PyInit__native(void) { return 0; }
