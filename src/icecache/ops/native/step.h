/* What a decode step is given beside the tree, and what it answers. */
#ifndef ICECACHE_STEP_H
#define ICECACHE_STEP_H

#include "layer.h"
#include "team.h"

typedef struct {
    const void *keys, *values;  /* a row's tokens are contiguous */
    int64_t row_stride;         /* elements */
    const int32_t *start, *len; /* [rows], tokens */
} Segment;

/* What a step gives. Without `out` it only searches. */
typedef struct {
    float *out;             /* [rows, heads, dim] */
    int32_t *num_attended;  /* [rows] */
    int32_t *positions;     /* [rows, room], of the selected tokens, -1 behind; may be null */
    const int32_t *given;   /* the same, of the tokens to attend exactly; null: choose them */
    int64_t nodes_scored, leaves_scored;
} Result;

/* Attend one query token per head on at most `threads` threads; without a tree, to the segments
 * alone. Returns 0, or -1 when there is no memory for scratch. Rows are independent. */
int icecache_sparse_step(const Shape *s, const Tree *tree, const Pages *pages,
                         const Segment *segments, int64_t num_segments, const float *query,
                         const float *sink_logits, int64_t threads, Result *result);

/* What is done with a row by the thread that has just attended it. */
typedef struct {
    void (*call)(void *data, int64_t row);
    void *data;
} Then;

/* The same, and `then` for every row; after -1 perhaps not for all. */
int icecache_sparse_step_then(const Shape *s, const Tree *tree, const Pages *pages,
                              const Segment *segments, int64_t num_segments, const float *query,
                              const float *sink_logits, Hands hands, Result *result,
                              const Then *then);

int icecache_dense_step(const Shape *s, const Segment *segments, int64_t num_segments,
                        const float *query, const float *sink_logits, Hands hands,
                        Result *result);

#endif
