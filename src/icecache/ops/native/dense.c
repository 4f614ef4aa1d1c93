/* Attend to all tokens of a layer: blocks of tokens, each with a softmax of its own, merged in
 * their order. So the result does not depend on how many threads share the blocks.
 *
 * The plain twin is ops/reference.py (attend_parts).
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "step.h"
#include "vector.h"

#define BLOCK 256
#define TILE 16
/* below so many multiplications a second thread costs more than it saves */
#define LEAST_WORK (1 << 20)

/* One block of a row: where its tokens are, and what attending to them gives. */
typedef struct {
    const Segment *segment;
    int64_t row, first, num; /* first: element of the segment's keys */
    float *top, *sum, *out;  /* [heads], [heads], [heads, dim] */
} Block;

static inline void tile_to_float(const void *data, int64_t first, int64_t num, int32_t dtype,
                                 float *out, int64_t dim) {
    for (int64_t k = 0; k < num; k++) to_float(data, first + k * dim, dtype, out + k * dim, dim);
}

static inline void score_block(int64_t dim, const Shape *s, const Block *b, const float *query,
                               float *logits) {
    _Alignas(64) float keys[TILE * MAX_DIM];
    for (int64_t at = 0; at < b->num; at += TILE) {
        int64_t num = b->num - at < TILE ? b->num - at : TILE;
        tile_to_float(b->segment->keys, b->first + at * dim, num, s->dtype, keys, dim);
        for (int64_t g = 0; g < s->heads; g++)
            for (int64_t k = 0; k < num; k++)
                logits[g * BLOCK + at + k] = s->scaling * dot(query + g * dim, keys + k * dim, dim);
    }
}

static inline void sum_block(int64_t dim, const Shape *s, const Block *b, const float *weight) {
    _Alignas(64) float values[TILE * MAX_DIM];
    memset(b->out, 0, sizeof(float) * (size_t)(s->heads * dim));
    for (int64_t at = 0; at < b->num; at += TILE) {
        int64_t num = b->num - at < TILE ? b->num - at : TILE;
        tile_to_float(b->segment->values, b->first + at * dim, num, s->dtype, values, dim);
        for (int64_t g = 0; g < s->heads; g++) {
            _Alignas(64) float sum[MAX_DIM];
            memcpy(sum, b->out + g * dim, sizeof(float) * (size_t)dim);
            for (int64_t k = 0; k < num; k++)
                add_scaled(sum, weight[g * BLOCK + at + k], values + k * dim, dim);
            memcpy(b->out + g * dim, sum, sizeof(float) * (size_t)dim);
        }
    }
}

CLONES static void attend_block(const Shape *s, const Block *b, const float *query, float *logits) {
    BY_DIM(s->dim, score_block, s, b, query, logits)
    for (int64_t g = 0; g < s->heads; g++) {
        float *row = logits + g * BLOCK, top = -1e30f, sum = 0.0f;
        if (s->softcap > 0.0f)
            for (int64_t k = 0; k < b->num; k++) row[k] = s->softcap * tanhf(row[k] / s->softcap);
        for (int64_t k = 0; k < b->num; k++) top = larger(top, row[k]);
        for (int64_t k = 0; k < b->num; k++) {
            row[k] = exponential(row[k] - top);
            sum += row[k];
        }
        b->top[g] = top;
        b->sum[g] = sum;
    }
    BY_DIM(s->dim, sum_block, s, b, logits)
}

/* Put the blocks of one row together, in their order. */
CLONES static void merge(const Shape *s, const Block *blocks, int64_t num,
                         const float *sink_logits, float *out) {
    memset(out, 0, sizeof(float) * (size_t)(s->heads * s->dim));
    for (int64_t g = 0; g < s->heads; g++) {
        float top = sink_logits ? sink_logits[g] : -1e30f, sum = 0.0f;
        for (int64_t i = 0; i < num; i++) top = larger(top, blocks[i].top[g]);
        if (sink_logits) sum = exponential(sink_logits[g] - top);
        for (int64_t i = 0; i < num; i++) sum += exponential(blocks[i].top[g] - top) * blocks[i].sum[g];
        for (int64_t i = 0; i < num; i++)
            add_scaled(out + g * s->dim, exponential(blocks[i].top[g] - top) / sum,
                       blocks[i].out + g * s->dim, s->dim);
    }
}

static int64_t num_blocks(const Shape *s, const Segment *segments, int64_t num_segments) {
    int64_t num = 0;
    for (int64_t row = 0; row < s->rows; row++)
        for (int64_t i = 0; i < num_segments; i++)
            num += (segments[i].len[row] + BLOCK - 1) / BLOCK;
    return num;
}

/* List the blocks row by row; returns the number of tokens of the row. */
static int64_t list_row(const Shape *s, const Segment *segments, int64_t num_segments, int64_t row,
                        Block *blocks, int64_t *num) {
    int64_t tokens = 0;
    for (int64_t i = 0; i < num_segments; i++) {
        const Segment *seg = segments + i;
        int64_t first = row * seg->row_stride + seg->start[row] * s->dim, len = seg->len[row];
        for (int64_t at = 0; at < len; at += BLOCK, (*num)++) {
            Block *b = blocks + *num;
            b->segment = seg;
            b->row = row;
            b->first = first + at * s->dim;
            b->num = len - at < BLOCK ? len - at : BLOCK;
        }
        tokens += len;
    }
    return tokens;
}

typedef struct {
    const Shape *shape;
    const Block *blocks;
    const float *query;
    int64_t num, next, failed;
} Blocks;

static void attend_blocks(void *work, int64_t member) {
    Blocks *b = work;
    const Shape *s = b->shape;
    float *logits = malloc(sizeof(float) * (size_t)(s->heads * BLOCK));
    (void)member;
    for (int64_t i; (i = __atomic_fetch_add(&b->next, 1, __ATOMIC_RELAXED)) < b->num;) {
        const Block *block = b->blocks + i;
        if (logits) attend_block(s, block, b->query + block->row * s->heads * s->dim, logits);
        else __atomic_store_n(&b->failed, 1, __ATOMIC_RELAXED);
    }
    free(logits);
}

int icecache_dense_step(const Shape *s, const Segment *segments, int64_t num_segments,
                        const float *query, const float *sink_logits, Hands hands,
                        Result *result) {
    int64_t per_row = s->heads * s->dim, most = num_blocks(s, segments, num_segments), num = 0;
    result->nodes_scored = result->leaves_scored = 0;
    int64_t each = per_row + 2 * s->heads, tokens = 0;
    char *memory = malloc((size_t)most * (sizeof(Block) + (size_t)each * sizeof(float)) + 64);
    if (!memory) return -1;
    Block *blocks = (Block *)memory;
    float *room = (float *)(blocks + most);
    for (int64_t row = 0; row < s->rows; row++) {
        int64_t own = list_row(s, segments, num_segments, row, blocks, &num);
        if (result->num_attended) result->num_attended[row] = (int32_t)own;
        tokens += own;
    }
    for (int64_t i = 0; i < num; i++, room += each) {
        blocks[i].top = room;
        blocks[i].sum = room + s->heads;
        blocks[i].out = room + 2 * s->heads;
    }
    if (tokens * per_row < LEAST_WORK) hands = (Hands){0, 1};
    Blocks all = {s, blocks, query, num, 0, 0};
    icecache_share(&hands, attend_blocks, &all);
    int64_t failed = all.failed;
    for (int64_t row = 0, at = 0; row < s->rows && !failed; row++) {
        int64_t end = at;
        while (end < num && blocks[end].row == row) end++;
        merge(s, blocks + at, end - at, sink_logits ? sink_logits + row * s->heads : 0,
              result->out + row * per_row);
        at = end;
    }
    free(memory);
    return failed ? -1 : 0;
}
