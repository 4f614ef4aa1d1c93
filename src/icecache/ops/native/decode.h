/* One decode step of one layer, as cache/fused.py prepares it. */
#ifndef ICECACHE_DECODE_H
#define ICECACHE_DECODE_H

#include "insert.h"
#include "step.h"

/* A tensor [batch, heads, 1, dim]; strides in elements, the last one is 1. */
typedef struct {
    const void *data;
    int64_t batch_stride, head_stride;
} View;

typedef struct {
    Shape shape;
    Tree *tree; /* null while all is attended */
    Pages *pages;
    Segment segments[2]; /* the tail: the window or everything; the sink */
    int64_t num_segments, kv_heads, threads;
    int64_t end;         /* token of the tail's buffer that the new one becomes */
    View query, key, value;
    const float *sink_logits; /* [rows, heads] */
    Tokens leaving;           /* those that enter the tree, one a row */
    int64_t *offset;          /* of `leaving`, to be written here */
    Answer *answers;          /* [rows], room to work in */
    float *wide;              /* [2, rows, heads, dim], query and output */
    void *out;                /* [rows, heads, dim] */
    int64_t status;           /* of the attention, while rows wait for what they lack */
    Result result;
    Team *team; /* that attends; null: one of `threads` is made */
} Decode;

#endif
