/* One decode step of one layer in one call: take in a token of each row, attend, let the oldest of
 * the window enter the tree. cache/fused.py prepares what lasts from step to step.
 *
 * The plain twin is IceCacheLayer's append and attend. The tree changes last because attention has
 * just read the summaries that the way to the nearest leaf goes through.
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

/* The oldest of the window leaves. */
static void find_leaving(const Decode *d) {
    for (int64_t row = 0; row < d->shape.rows; row++) {
        d->offset[row] = row * d->segments[0].row_stride + d->segments[0].start[row] * d->shape.dim;
        d->answers[row].status = WAITS;
    }
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

/* Let a row's leaving token enter the tree; rows share nothing that changes. */
static void enter(void *decode, int64_t row) {
    Decode *d = decode;
    Answer *answer = d->answers + row;
    if (icecache_insert(&d->shape, d->tree, d->pages, &d->leaving, row, row + 1, answer) < 0)
        answer->status = NEEDS_MEMORY;
}

static int attend(Decode *d) {
    Then then = {enter, d};
    widen(d);
    d->result.out = d->wide + d->shape.rows * d->shape.heads * d->shape.dim;
    if (icecache_sparse_step_then(&d->shape, d->tree, d->pages, d->segments, d->num_segments,
                                  d->wide, d->sink_logits, (Hands){d->team, d->threads}, &d->result,
                                  d->tree ? &then : 0))
        return NO_MEMORY;
    narrow(d, d->result.out);
    return is_finite(d->result.out, 0, d->shape.rows * d->shape.heads * d->shape.dim, FLOAT32)
               ? ATTENDED
               : OVERFLOWED;
}

static int all_wait(const Decode *d) {
    for (int64_t row = 0; row < d->shape.rows; row++)
        if (d->answers[row].status != WAITS) return 0;
    return 1;
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
 * lacked. Nothing has changed while it is -1; all tokens are in the tree when it is behind the last,
 * whatever is returned. */
EXPORT int icecache_decode(Decode *d, int64_t *row, Answer *answer) {
    if (*row < 0) {
        int64_t heads = d->kv_heads * d->shape.heads;
        if (!all_finite(d, &d->query, heads) || !all_finite(d, &d->key, d->kv_heads) ||
            !all_finite(d, &d->value, d->kv_heads))
            return NOT_FINITE;
        append(d);
        if (d->tree) find_leaving(d);
        d->status = attend(d);
        if (!d->tree || all_wait(d)) return (int)d->status;
    }
    for (int64_t i = 0; i < d->shape.rows; i++)
        if (d->answers[i].status == WAITS) enter(d, i);
    *row = next_stopped(d, answer);
    if (*row == d->shape.rows) return (int)d->status;
    return answer->status == NEEDS_MEMORY ? NO_MEMORY : STOPPED;
}
