/* Products of a few vectors with a model's weights, read where they lie. */
#ifndef ICECACHE_LINEAR_H
#define ICECACHE_LINEAR_H

#include "team.h"

typedef struct {
    const void *weight; /* [num_out, num_in], float32 or bfloat16 */
    const void *bias;   /* [num_out] or null */
    int64_t num_out, num_in;
} Linear;

/* Vectors as products read them: [num, dim] */
typedef struct {
    float *data;
    int64_t num;
    int32_t dtype; /* of the weights that they will meet */
} Vectors;

/* Lay out vector `i` of `dim` numbers for products. */
void icecache_lay_out_vector(const Vectors *v, int64_t i, const float *x, int64_t dim);

/* Where element k of a vector of `dim` lies. */
static inline int64_t place_of(int32_t dtype, int64_t k, int64_t dim) {
    return dtype == 0 ? k : k / 2 + (k & 1) * ((dim + 1) / 2);
}

/* Rows `from` to `to` of a product: out[i * stride + row], of vector i. */
void icecache_multiply(const Linear *l, const Vectors *v, int64_t from, int64_t to, float *out,
                       int64_t stride);

/* Rows that one thread takes at a time, so that threads come and go within microseconds. */
int64_t icecache_rows_at_once(const Linear *l, int32_t dtype);

/* The products of all `linears` with each vector, one behind the other: out[i * stride + *]. */
void icecache_products(const Hands *hands, const Linear *const *linears, int64_t num_linears,
                       const Vectors *v, float *out, int64_t stride);

#endif
