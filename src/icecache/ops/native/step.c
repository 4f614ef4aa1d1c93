/* One sparse decode step of one layer: score every leaf, choose within the budget, attend.
 *
 * The plain twin is attention/attend.py (attend_sparse); names and order of the steps are the
 * same. Plain C without Python's headers, loaded by ctypes; rows are independent.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "layer.h"
#include "vector.h"

#define LARGEST_CORRECTION 2.0f

typedef struct {
    const void *keys, *values; /* a row's tokens are contiguous */
    int64_t row_stride;        /* elements */
    const int32_t *start, *len; /* [rows], tokens */
} Segment;

typedef struct {
    float worth;
    int32_t leaf;
} Candidate;

static int better(Candidate a, Candidate b) {
    return a.worth > b.worth || (a.worth == b.worth && a.leaf < b.leaf);
}

static int by_worth(const void *a, const void *b) {
    return better(*(const Candidate *)a, *(const Candidate *)b) ? -1 : 1;
}

/* Move the `want` best to the front, in no order (quickselect, median of three). */
static void select_best(Candidate *c, int64_t num, int64_t want) {
    int64_t low = 0, high = num - 1;
    while (low < high) {
        Candidate a = c[low], b = c[low + (high - low) / 2], d = c[high];
        Candidate pivot = better(a, b) ? (better(b, d) ? b : (better(a, d) ? d : a))
                                       : (better(a, d) ? a : (better(b, d) ? d : b));
        int64_t i = low, j = high;
        while (i <= j) {
            while (better(c[i], pivot)) i++;
            while (better(pivot, c[j])) j--;
            if (i <= j) {
                Candidate swap = c[i];
                c[i++] = c[j];
                c[j--] = swap;
            }
        }
        if (want - 1 <= j) high = j;
        else if (want - 1 >= i) low = i;
        else return;
    }
}

static float capped(float logit, float softcap, float *slope) {
    if (softcap <= 0.0f) {
        *slope = 1.0f;
        return logit;
    }
    float squashed = tanhf(logit / softcap);
    *slope = 1.0f - squashed * squashed;
    return softcap * squashed;
}

/* Logits of tokens against all heads: logits[head * stride + t]. */
static void score_token(const Shape *s, const float *query, const float *key, float *logits,
                        int64_t stride) {
    float slope;
    for (int64_t g = 0; g < s->heads; g++)
        logits[g * stride] =
            capped(s->scaling * dot(query + g * s->dim, key, s->dim), s->softcap, &slope);
}

static void attend_token(const Shape *s, const float *weight, int64_t stride, const float *value,
                         float *out) {
    for (int64_t g = 0; g < s->heads; g++)
        add_scaled(out + g * s->dim, weight[g * stride], value, s->dim);
}

/* Score the leaves of a row: estimate[g, l] and correction[g, l]. */
CLONES static void score_leaves(const Shape *s, const Leaves *t, int64_t row, const float *query,
                                const float *log_of, float *logits, float *correction,
                                float *buffer) {
    int64_t num = t->num_leaves[row], first = row * s->capacity;
    float half_norm[256];
    for (int64_t g = 0; g < s->heads; g++) {
        const float *q = query + g * s->dim;
        half_norm[g] = 0.5f * s->scaling * s->scaling / (float)s->dim * dot(q, q, s->dim);
    }
    for (int64_t l = 0; l < num; l++) {
        from_int8(t->key_mean + (first + l) * s->dim, buffer, s->dim);
        float scale = s->scaling * t->key_scale[first + l], spread = t->spread[first + l];
        float log_count = log_of[t->count[first + l]];
        for (int64_t g = 0; g < s->heads; g++) {
            float slope;
            float logit =
                capped(scale * dot(query + g * s->dim, buffer, s->dim), s->softcap, &slope);
            float second = half_norm[g] * spread * slope * slope;
            logits[g * num + l] = logit + log_count;
            correction[g * num + l] = second < LARGEST_CORRECTION ? second : LARGEST_CORRECTION;
        }
    }
}

/* Choose leaves within the room; chosen[l] = 1. Returns their number of tokens. */
CLONES static int64_t choose(const Shape *s, const Leaves *t, int64_t row, const float *logits,
                             const float *correction, const float *fixed_lse, float *worth,
                             float *share, Candidate *candidates, uint8_t *chosen) {
    const int64_t num = t->num_leaves[row] > 0 ? t->num_leaves[row] : 0;
    const uint8_t *count = t->count + row * s->capacity;
    memset(worth, 0, sizeof(float) * (size_t)num);
    for (int64_t g = 0; g < s->heads; g++) {
        const float *lg = logits + g * num, *co = correction + g * num;
        float top = fixed_lse[g];
        for (int64_t l = 0; l < num; l++) top = larger(top, lg[l] + co[l]);
        float sum = exponential(fixed_lse[g] - top);
        for (int64_t l = 0; l < num; l++) {
            share[l] = exponential(lg[l] + co[l] - top);
            sum += share[l];
        }
        float scale = 1.0f / sum;
        if (s->remainder)
            for (int64_t l = 0; l < num; l++) worth[l] += scale * share[l] * sqrtf(co[l]);
        else
            for (int64_t l = 0; l < num; l++) worth[l] += scale * share[l];
    }
    for (int64_t l = 0; l < num; l++)
        candidates[l] = (Candidate){worth[l] / (float)count[l], (int32_t)l};
    int64_t want = s->room < num ? s->room : num, left = s->room;
    if (want < num) select_best(candidates, num, want);
    qsort(candidates, want, sizeof(Candidate), by_worth);
    memset(chosen, 0, (size_t)num);
    for (int64_t i = 0; i < want && left > 0; i++) {
        int32_t leaf = candidates[i].leaf;
        if (count[leaf] > left) continue;
        chosen[leaf] = 1;
        left -= count[leaf];
    }
    return s->room - left;
}

CLONES static int step_row(const Shape *s, const Leaves *t, const void *data,
                           const Segment *segments, int64_t num_segments, const float *query,
                           const float *sink_logits, const float *log_of, int64_t row,
                           float *out, int32_t *num_attended) {
    int64_t num = t->num_leaves[row], heads = s->heads, dim = s->dim;
    int64_t num_fixed = 0;
    for (int64_t i = 0; i < num_segments; i++) num_fixed += segments[i].len[row];
    int64_t stride = num_fixed + (s->room > 0 ? s->room : 0);
    float *scratch =
        malloc(sizeof(float) * (heads * (stride + 2 * num + 1) + 2 * num + dim) +
               sizeof(Candidate) * num + sizeof(int64_t) * stride + num + 64);
    if (!scratch) return -1;
    float *logits = scratch + 0, *leaf_logits = logits + heads * stride;
    float *correction = leaf_logits + heads * num, *fixed_lse = correction + heads * num;
    float *worth = fixed_lse + heads, *share = worth + num, *buffer = share + num;
    int64_t *token = (int64_t *)(((uintptr_t)(buffer + dim) + 7) & ~(uintptr_t)7);
    Candidate *candidates = (Candidate *)(token + stride);
    uint8_t *chosen = (uint8_t *)(candidates + num);

    int64_t at = 0;
    for (int64_t i = 0; i < num_segments; i++) {
        const Segment *seg = segments + i;
        for (int64_t k = 0; k < seg->len[row]; k++) {
            int64_t offset = row * seg->row_stride + (seg->start[row] + k) * dim;
            to_float(seg->keys, offset, s->dtype, buffer, dim);
            score_token(s, query, buffer, logits + at++, stride);
        }
    }
    for (int64_t g = 0; g < heads; g++) {
        float top = sink_logits ? sink_logits[g] : -1e30f, sum = 0.0f;
        for (int64_t k = 0; k < num_fixed; k++) top = larger(top, logits[g * stride + k]);
        for (int64_t k = 0; k < num_fixed; k++) sum += exponential(logits[g * stride + k] - top);
        if (sink_logits) sum += exponential(sink_logits[g] - top);
        fixed_lse[g] = sum > 0.0f ? top + logf(sum) : top;
    }
    score_leaves(s, t, row, query, log_of, leaf_logits, correction, buffer);
    int64_t selected = 0;
    if (num > 0 && s->room > 0)
        selected = choose(s, t, row, leaf_logits, correction, fixed_lse, worth, share,
                          candidates, chosen);
    else
        memset(chosen, 0, num);
    for (int64_t l = 0; l < num; l++) {
        if (!chosen[l]) continue;
        int64_t leaf = row * s->capacity + l;
        for (int64_t i = 0; i < t->count[leaf]; i++) {
            int64_t slot = t->slots[leaf * s->leaf_size + i];
            token[at - num_fixed] = ((int64_t)t->page[leaf] * 2 * s->page_size + slot) * dim;
            to_float(data, token[at - num_fixed], s->dtype, buffer, dim);
            score_token(s, query, buffer, logits + at++, stride);
        }
    }
    int64_t num_exact = num_fixed + selected;

    for (int64_t g = 0; g < heads; g++) {
        float *exact = logits + g * stride, *rest = leaf_logits + g * num;
        const float *co = correction + g * num;
        float top = sink_logits ? sink_logits[g] : -1e30f, sum = 0.0f;
        for (int64_t k = 0; k < num_exact; k++) top = larger(top, exact[k]);
        if (s->remainder) {
            for (int64_t l = 0; l < num; l++)
                rest[l] = chosen[l] ? -1e30f : rest[l] + s->spread_weight * co[l];
            for (int64_t l = 0; l < num; l++) top = larger(top, rest[l]);
            for (int64_t l = 0; l < num; l++) {
                rest[l] = exponential(rest[l] - top);
                sum += rest[l];
            }
        }
        for (int64_t k = 0; k < num_exact; k++) {
            exact[k] = exponential(exact[k] - top);
            sum += exact[k];
        }
        if (sink_logits) sum += exponential(sink_logits[g] - top);
        float scale = 1.0f / sum;
        for (int64_t k = 0; k < num_exact; k++) exact[k] *= scale;
        if (s->remainder)
            for (int64_t l = 0; l < num; l++)
                rest[l] *= scale * t->value_scale[row * s->capacity + l];
    }

    memset(out, 0, sizeof(float) * heads * dim);
    at = 0;
    for (int64_t i = 0; i < num_segments; i++) {
        const Segment *seg = segments + i;
        for (int64_t k = 0; k < seg->len[row]; k++) {
            int64_t offset = row * seg->row_stride + (seg->start[row] + k) * dim;
            to_float(seg->values, offset, s->dtype, buffer, dim);
            attend_token(s, logits + at++, stride, buffer, out);
        }
    }
    for (int64_t k = 0; k < selected; k++) {
        to_float(data, token[k] + s->page_size * dim, s->dtype, buffer, dim);
        attend_token(s, logits + at++, stride, buffer, out);
    }
    if (s->remainder)
        for (int64_t l = 0; l < num; l++) {
            if (chosen[l]) continue;
            from_int8(t->value_mean + (row * s->capacity + l) * dim, buffer, dim);
            attend_token(s, leaf_logits + l, num, buffer, out);
        }
    *num_attended = (int32_t)num_exact;
    free(scratch);
    return 0;
}

/* Attend one query token per head. Returns 0, or -1 when there is no memory for scratch. */
EXPORT int icecache_sparse_step(const Shape *shape, const Leaves *leaves, const void *data,
                                const Segment *segments, int64_t num_segments, const float *query,
                                const float *sink_logits, float *out, int32_t *num_attended) {
    int64_t per_row = shape->heads * shape->dim;
    float log_of[256] = {0};
    for (int i = 1; i < 256; i++) log_of[i] = logf((float)i);
    for (int64_t row = 0; row < shape->rows; row++) {
        const float *sinks = sink_logits ? sink_logits + row * shape->heads : 0;
        int failed = step_row(shape, leaves, data, segments, num_segments, query + row * per_row,
                              sinks, log_of, row, out + row * per_row, num_attended + row);
        if (failed) return failed;
    }
    return 0;
}

/* Sizes of the structures that Python mirrors; a library of another version has others. */
EXPORT int64_t icecache_layout(void) {
    return (int64_t)(sizeof(Shape) * 1000000 + sizeof(Leaves) * 1000 + sizeof(Segment)) * 10 + 1;
}

/* Setuptools' linkers ask for a module's entry point; this library is loaded by ctypes. */
EXPORT void *PyInit__native(void) { return 0; }
