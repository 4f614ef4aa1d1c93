/* A decoder block around its attention: norms, products, rotary embedding, the gated MLP.
 *
 * All numbers are float32, whatever the weights are: only query, key and value are rounded, for the
 * cache, and the logits. So a step of a bfloat16 model is nearer to what its weights say than one
 * that stores every intermediate in bfloat16. The plain twin is ops/reference_model.py.
 */
#include "block.h"

#include <math.h>
#include <string.h>

#include "vector.h"

static inline float read(const void *data, int64_t i, int32_t dtype) {
    return dtype == FLOAT32 ? ((const float *)data)[i] : from_bfloat16(((const uint16_t *)data)[i]);
}

static inline void write(void *data, int64_t i, int32_t dtype, float x) {
    if (dtype == FLOAT32) ((float *)data)[i] = x;
    else ((uint16_t *)data)[i] = to_bfloat16(x);
}

/* Norm `num` pieces of `x`, in place. */
CLONES static void norm_pieces(const Norm *n, int32_t dtype, int64_t num, float *x) {
    for (; num > 0; num--, x += n->dim) {
        float scale = 1.0f / sqrtf(dot(x, x, n->dim) / (float)n->dim + n->eps);
        for (int64_t k = 0; k < n->dim; k++) x[k] *= scale * read(n->weight, k, dtype);
    }
}

static Vectors vectors_of(const Forward *f) {
    return (Vectors){f->vectors, f->batch, f->dtype};
}

/* The normed hidden states become the vectors of the next product. */
static void lay_out_hidden(const Forward *f, const Norm *norm) {
    Vectors v = vectors_of(f);
    for (int64_t i = 0; i < f->batch; i++) {
        float *x = f->products + i * f->hidden;
        memcpy(x, f->hidden_states + i * f->hidden, sizeof(float) * (size_t)f->hidden);
        norm_pieces(norm, f->dtype, 1, x);
        icecache_lay_out_vector(&v, i, x, f->hidden);
    }
}

/* Add what a block has found to the hidden states. */
CLONES static void add_residual(const Forward *f) {
    for (int64_t i = 0; i < f->batch; i++) {
        float *x = f->hidden_states + i * f->hidden;
        const float *y = f->products + i * f->widest;
        add_scaled(x, f->residual_scale, y, f->hidden);
    }
}

void icecache_embed(const Forward *f) {
    for (int64_t i = 0; i < f->batch; i++)
        for (int64_t k = 0; k < f->hidden; k++)
            f->hidden_states[i * f->hidden + k] =
                f->embedding_scale * read(f->embedding, f->token_ids[i] * f->hidden + k, f->dtype);
}

static void rotate(const Forward *f, int64_t i, float *head) {
    const float *cosine = f->cosines + i * f->rotary_dim, *sine = f->sines + i * f->rotary_dim;
    int64_t half = f->rotary_dim / 2;
    for (int64_t k = 0; k < half; k++) {
        float a = head[k], b = head[half + k];
        head[k] = a * cosine[k] - b * sine[k];
        head[half + k] = b * cosine[half + k] + a * sine[half + k];
    }
}

/* Heads of a row of the batch, normed and rotated where they are, to where the cache reads them. */
CLONES static void place(const Forward *f, const Norm *norm, int64_t i, int64_t num, int rotates,
                         float *heads, void *to) {
    int64_t dim = f->head_dim;
    if (norm && norm->weight) norm_pieces(norm, f->dtype, num * dim / norm->dim, heads);
    for (int64_t h = 0; h < num; h++) {
        if (rotates) rotate(f, i, heads + h * dim);
        for (int64_t k = 0; k < dim; k++)
            write(to, (i * num + h) * dim + k, f->dtype, heads[h * dim + k]);
    }
}

void icecache_enter_block(const Forward *f, const Block *b, const Hands *hands) {
    const Linear *linears[] = {&b->query, &b->key, &b->value};
    Vectors v = vectors_of(f);
    lay_out_hidden(f, &b->before_attention);
    icecache_products(hands, linears, 3, &v, f->products, f->widest);
    for (int64_t i = 0; i < f->batch; i++) {
        float *query = f->products + i * f->widest, *key = query + b->query.num_out;
        place(f, &b->of_query, i, f->num_heads, b->rotates, query, f->query);
        place(f, &b->of_key, i, f->num_kv_heads, b->rotates, key, f->key);
        place(f, 0, i, f->num_kv_heads, 0, key + b->key.num_out, f->value);
    }
}

static void lay_out_attended(const Forward *f) {
    Vectors v = vectors_of(f);
    int64_t dim = f->num_heads * f->head_dim;
    for (int64_t i = 0; i < f->batch; i++) {
        float *x = f->products + i * dim;
        to_float(f->attended, i * dim, f->dtype, x, dim);
        icecache_lay_out_vector(&v, i, x, dim);
    }
}

static inline float activated(int32_t activation, float x) {
    if (activation == RELU) return larger(x, 0.0f);
    if (activation == GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    if (activation == GELU_TANH) {
        float inner = 0.79788456080286536f * (x + 0.044715f * x * x * x);
        return 0.5f * x * (1.0f + tanhf(inner));
    }
    float small = exponential(x < 0.0f ? x : -x); /* exp(-|x|) */
    return x * (x < 0.0f ? small : 1.0f) / (1.0f + small);
}

/* Work that members take by rows: of the inner vectors of a block, or of the logits. */
typedef struct {
    const Forward *forward;
    const Block *block;
    int64_t rows, num, next; /* at once, in all, the first that nobody has taken */
} Rows;

static int take_rows(Rows *r, int64_t *from, int64_t *to) {
    *from = __atomic_fetch_add(&r->next, r->rows, __ATOMIC_RELAXED);
    *to = *from + r->rows < r->num ? *from + r->rows : r->num;
    return *from < r->num;
}

CLONES static void activate(const Forward *f, int32_t activation, int64_t from, int64_t to) {
    for (int64_t i = 0; i < f->batch; i++) {
        const float *gate = f->products + i * f->widest, *up = gate + f->inner;
        float *out = f->inner_vectors + i * f->inner;
        for (int64_t k = from; k < to; k++)
            out[place_of(f->dtype, k, f->inner)] = activated(activation, gate[k]) * up[k];
    }
}

static void share_inner(void *work, int64_t member) {
    Rows *r = work;
    const Forward *f = r->forward;
    Vectors v = vectors_of(f);
    (void)member;
    for (int64_t from, to; take_rows(r, &from, &to);) {
        icecache_multiply(&r->block->gate, &v, from, to, f->products, f->widest);
        icecache_multiply(&r->block->up, &v, from, to, f->products + f->inner, f->widest);
        activate(f, r->block->activation, from, to);
    }
}

void icecache_leave_block(const Forward *f, const Block *b, const Hands *hands) {
    const Linear *output[] = {&b->output}, *down[] = {&b->down};
    Vectors v = vectors_of(f), inner = {f->inner_vectors, f->batch, f->dtype};
    lay_out_attended(f);
    icecache_products(hands, output, 1, &v, f->products, f->widest);
    add_residual(f);
    lay_out_hidden(f, &b->before_mlp);
    Rows rows = {f, b, icecache_rows_at_once(&b->gate, f->dtype), f->inner, 0};
    icecache_share(hands, share_inner, &rows);
    icecache_products(hands, down, 1, &inner, f->products, f->widest);
    add_residual(f);
}

static void share_logits(void *work, int64_t member) {
    Rows *r = work;
    const Forward *f = r->forward;
    Vectors v = vectors_of(f);
    (void)member;
    for (int64_t from, to; take_rows(r, &from, &to);) {
        icecache_multiply(&f->head, &v, from, to, f->products, f->widest);
        for (int64_t i = 0; i < f->batch; i++)
            for (int64_t k = from; k < to; k++)
                write(f->logits, i * r->num + k, f->dtype,
                      f->logit_scale * f->products[i * f->widest + k]);
    }
}

void icecache_predict(const Forward *f, const Hands *hands) {
    lay_out_hidden(f, &f->norm);
    Rows rows = {f, 0, icecache_rows_at_once(&f->head, f->dtype), f->head.num_out, 0};
    icecache_share(hands, share_logits, &rows);
}
