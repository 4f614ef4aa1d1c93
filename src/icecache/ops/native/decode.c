/* One decode step of one layer in one call: take in a token of each row, let the oldest of the
 * window enter the tree, attend. cache/fused.py prepares what lasts from step to step.
 *
 * The plain twin is IceCacheLayer's append and attend.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "decode.h"
#include "vector.h"

enum { ATTENDED = 0, NOT_FINITE = 1, STOPPED = 2, NO_MEMORY = 3, OVERFLOWED = 4 };

/* Whether all bits of an exponent are set tells infinity and NaN from numbers. */
static int is_finite(const void *data, int64_t first, int64_t num, int32_t dtype) {
    int64_t bad = 0;
    if (dtype == FLOAT32) {
        const uint32_t *bits = (const uint32_t *)data + first;
        for (int64_t i = 0; i < num; i++) bad |= (bits[i] & 0x7f800000u) == 0x7f800000u;
    } else {
        const uint16_t *bits = (const uint16_t *)data + first;
        const uint16_t all = dtype == BFLOAT16 ? 0x7f80 : 0x7c00;
        for (int64_t i = 0; i < num; i++) bad |= (bits[i] & all) == all;
    }
    return !bad;
}

static int64_t head_of(const View *view, int64_t row, int64_t heads) {
    return row / heads * view->batch_stride + row % heads * view->head_stride;
}

static int all_finite(const Decode *d, const View *view, int64_t heads) {
    for (int64_t row = 0; row < d->shape.rows / d->kv_heads * heads; row++)
        if (!is_finite(view->data, head_of(view, row, heads), d->shape.dim, d->shape.dtype)) return 0;
    return 1;
}

static void append(const Decode *d) {
    int64_t size = d->shape.dtype == FLOAT32 ? 4 : 2, bytes = d->shape.dim * size;
    for (int64_t row = 0; row < d->shape.rows; row++) {
        int64_t to = (row * d->segments[0].row_stride + d->end * d->shape.dim) * size;
        memcpy((char *)d->segments[0].keys + to,
               (const char *)d->key.data + head_of(&d->key, row, d->kv_heads) * size, (size_t)bytes);
        memcpy((char *)d->segments[0].values + to,
               (const char *)d->value.data + head_of(&d->value, row, d->kv_heads) * size,
               (size_t)bytes);
    }
}

/* The window keeps its length: what lies before it, leaves. */
static void find_leaving(const Decode *d) {
    for (int64_t row = 0; row < d->shape.rows; row++)
        d->offset[row] = row * d->segments[0].row_stride +
                         (d->segments[0].start[row] - 1) * d->shape.dim;
}

CLONES static void widen(const Decode *d) {
    int64_t heads = d->kv_heads * d->shape.heads, dim = d->shape.dim;
    for (int64_t row = 0; row < d->shape.rows * d->shape.heads; row++)
        to_float(d->query.data, head_of(&d->query, row, heads), d->shape.dtype, d->wide + row * dim,
                 dim);
}

static uint16_t to_half(float value) {
    uint32_t bits, sign;
    memcpy(&bits, &value, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* rounds to more than 65504 */
    if (bits < 0x38800000) {
        /* adding 1/2 shifts a number below 2 ** -14 to where a half's last bit is, and rounds it */
        float shifted;
        memcpy(&shifted, &bits, 4);
        shifted += 0.5f;
        memcpy(&bits, &shifted, 4);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    return (uint16_t)(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

CLONES static void narrow(const Decode *d, const float *from) {
    int64_t num = d->shape.rows * d->shape.heads * d->shape.dim;
    if (d->shape.dtype == FLOAT32) {
        memcpy(d->out, from, sizeof(float) * (size_t)num);
    } else if (d->shape.dtype == BFLOAT16) {
        for (int64_t i = 0; i < num; i++) ((uint16_t *)d->out)[i] = to_bfloat16(from[i]);
    } else {
        for (int64_t i = 0; i < num; i++) ((uint16_t *)d->out)[i] = to_half(from[i]);
    }
}

static int attend(Decode *d) {
    widen(d);
    d->result.out = d->wide + d->shape.rows * d->shape.heads * d->shape.dim;
    if (icecache_sparse_step(&d->shape, d->tree, d->pages, d->segments, d->num_segments, d->wide,
                             d->sink_logits, d->threads, &d->result))
        return NO_MEMORY;
    narrow(d, d->result.out);
    return is_finite(d->result.out, 0, d->shape.rows * d->shape.heads * d->shape.dim, FLOAT32)
               ? ATTENDED
               : OVERFLOWED;
}

/* Let the leaving token of every row that waits enter the tree; rows share nothing that changes. */
static int enter(Decode *d) {
    int64_t failed = 0, rows = d->shape.rows, waiting = 0;
    for (int64_t row = 0; row < rows; row++) waiting += d->answers[row].status == WAITS;
    /* all threads or none: a smaller team would end those that it does not need */
#if defined(_OPENMP)
#pragma omp parallel for num_threads((int)d->threads) if (d->threads > 1 && waiting > 1) \
    reduction(+ : failed)
#endif
    for (int64_t row = 0; row < rows; row++)
        if (d->answers[row].status == WAITS)
            failed += icecache_insert(&d->shape, d->tree, d->pages, &d->leaving, row, row + 1,
                                      d->answers + row) < 0;
    return failed ? -1 : 0;
}

/* The first row whose token lacks something, or whose tree does; it will have got that when it is
 * its turn again. */
static int64_t next_stopped(Decode *d, Answer *answer) {
    int64_t row = 0;
    while (row < d->shape.rows && d->answers[row].status == INSERTED) row++;
    if (row < d->shape.rows) {
        *answer = d->answers[row];
        d->answers[row].status = answer->status == TOP_IS_WIDE ? INSERTED : WAITS;
    }
    return row;
}

/* `row` is -1; or, after STOPPED, as it was left, when that row has got what `answer` says that it
 * lacked. With NOT_FINITE nothing has changed. */
EXPORT int icecache_decode(Decode *d, int64_t *row, Answer *answer) {
    if (*row < 0) {
        int64_t heads = d->kv_heads * d->shape.heads;
        if (!all_finite(d, &d->query, heads) || !all_finite(d, &d->key, d->kv_heads) ||
            !all_finite(d, &d->value, d->kv_heads))
            return NOT_FINITE;
        append(d);
        if (d->tree) find_leaving(d);
        for (int64_t i = 0; d->tree && i < d->shape.rows; i++) d->answers[i].status = WAITS;
        *row = 0;
    }
    if (d->tree) {
        if (enter(d)) return NO_MEMORY;
        *row = next_stopped(d, answer);
        if (*row < d->shape.rows) return STOPPED;
    }
    return attend(d);
}
