/* One decode step of a whole model, as integrations/transformers/native.py prepares it. */
#ifndef ICECACHE_FORWARD_H
#define ICECACHE_FORWARD_H

#include "decode.h"
#include "linear.h"

/* A root mean square norm. */
typedef struct {
    const void *weight; /* [dim]; null: no norm */
    int64_t dim;        /* a vector is normed in pieces of so many */
    float eps;
} Norm;

enum { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3 };

/* What a decoder block does beside attention. */
typedef struct {
    Norm before_attention, of_query, of_key, before_mlp;
    Linear query, key, value, output, gate, up, down;
    int32_t activation, rotates;
    Decode **decodes; /* [num_caches], prepared for this step; null: a cache that is left out */
} Block;

/* Rows of the batch are the caches' own, as many for each: one cache of a batch, or several of one
 * row each. */
typedef struct {
    const Block *blocks;
    Norm norm;
    Linear head;
    const void *embedding; /* [tokens, hidden] */
    int64_t num_blocks, num_caches, batch, hidden, num_heads, num_kv_heads, head_dim, rotary_dim, inner;
    int64_t threads;
    float embedding_scale, residual_scale, logit_scale;
    int32_t dtype;            /* float32 or bfloat16, of weights, heads and logits */
    const int64_t *token_ids; /* [batch] */
    const float *cosines, *sines; /* [batch, rotary_dim] */
    float *hidden_states;     /* [batch, hidden] */
    float *products;          /* [batch, widest] */
    float *vectors, *inner_vectors; /* [batch, *], laid out for products */
    int64_t widest;
    void *query, *key, *value; /* [batch, heads or KV heads, head_dim], dtype */
    void *attended;           /* as query */
    void *logits;             /* [batch, tokens], dtype */
    const int64_t *watched;   /* [num_caches]: the block whose query is wanted, -1: none; or null */
    void *watched_query;      /* as query */
} Forward;

/* How far a step has got: a row of a cache of a block, as icecache_decode counts rows. */
typedef struct {
    int64_t block, cache, row;
} Place;

#endif
