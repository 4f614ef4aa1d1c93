/* Attend through summaries to what was not chosen.
 *
 * Most of many entries weigh next to nothing, and reading their values is most of the work. So
 * the values of entries below a small part of the average weight are not read: what those weigh
 * goes to the others. The plain twin is ops/batched.py (attend_parts).
 */
#include "remainder.h"

#include <stdint.h>
#include <string.h>

#include "above.h"
#include "products.h"
#include "vector.h"

#define ENTRIES_AHEAD 64

static int64_t num_left(const Found *f) {
    int64_t chosen = 0;
    for (int64_t i = 0; i < f->num; i++) chosen += f->chosen[i];
    return f->num - chosen;
}

/* List the entries that weigh something for any head; returns their number. */
static int64_t list_kept(const Shape *s, Found *f) {
    float least = NEGLIGIBLE / (float)num_left(f), *most = f->share;
    memset(most, 0, sizeof(float) * (size_t)f->num);
    for (int64_t g = 0; g < s->heads; g++) {
        const float *weight = f->logits + g * f->stride, scale = f->scale[g];
        for (int64_t i = 0; i < f->num; i++) most[i] = larger(most[i], scale * weight[i]);
    }
    return list_above(most, f->num, least, f->kept);
}

CLONES static void keep(const Shape *s, Found *f) {
    f->num_kept = num_left(f) ? list_kept(s, f) : 0;
    for (int64_t g = 0; g < s->heads; g++) {
        float *weight = f->logits + g * f->stride, kept = 0.0f;
        for (int64_t k = 0; k < f->num_kept; k++) weight[k] = weight[f->kept[k]];
        for (int64_t k = 0; k < f->num_kept; k++) kept += weight[k];
        float scale = kept > 0.0f ? f->total[g] / kept : 0.0f;
        for (int64_t k = 0; k < f->num_kept; k++) weight[k] *= scale;
    }
}

void icecache_keep_entries(const Shape *s, Found *f) { keep(s, f); }

/* The values of some entries. */
typedef struct {
    int64_t num;
    const int8_t *mean[ENTRIES_AHEAD];
    const uint16_t *scale[ENTRIES_AHEAD];
} Values;

/* Name the values of at most ENTRIES_AHEAD entries, and ask for them. */
static void name_values(const Shape *s, const Tree *t, int64_t row, const Found *f, int64_t from,
                        int64_t end, Values *v) {
    v->num = end - from < ENTRIES_AHEAD ? end - from : ENTRIES_AHEAD;
    for (int64_t k = 0; k < v->num; k++) {
        int64_t i = f->kept[from + k];
        const Level *of = t->level + f->level[i];
        int64_t at = row * of->capacity + f->id[i];
        v->mean[k] = of->value_mean + at * s->dim;
        v->scale[k] = of->value_scale + at;
        prefetch(v->mean[k], s->dim);
        prefetch(v->scale[k], 2);
    }
}

/* Turn weights of values into weights of their codes. */
static void scale_weights(const Values *v, PerHead weight) {
    for (int64_t k = 0; k < v->num; k++) {
        float scale = from_bfloat16(*v->scale[k]);
        for (int64_t g = 0; g < weight.heads; g++) weight.data[g * weight.stride + k] *= scale;
    }
}

void icecache_add_kept(const Shape *s, const Tree *t, int64_t row, const Found *f, int64_t block,
                       float *out) {
    int64_t from = block * ADDED, end = from + ADDED < f->num_kept ? from + ADDED : f->num_kept;
    Values values[2];
    name_values(s, t, row, f, from, end, values);
    if (values->num > 0) memset(out, 0, sizeof(float) * (size_t)(s->heads * s->dim));
    for (int64_t which = 0; values[which].num > 0; which ^= 1) {
        Values *v = values + which;
        name_values(s, t, row, f, from + v->num, end, values + (which ^ 1));
        PerHead weight = {f->logits + from, s->heads, f->stride};
        scale_weights(v, weight);
        icecache_add_entries(s->dim, weight, v->mean, v->num, out);
        from += v->num;
    }
}
