/* A decode step reads every weight once, so a product is as fast as memory is: one row after the
 * other, asked for a little ahead, since a row is too short for the processor to foresee the next.
 *
 * bfloat16 is widened in registers. Two neighbours come as one word, so vectors are laid out with
 * their even elements before their odd ones. The plain twin is ops/reference_model.py.
 */
#include "linear.h"

#include <string.h>

#include "vector.h"

/* bytes */
#define AHEAD 2048
#define CHUNK (1 << 15)

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline float dot_bfloat16(const uint16_t *weight, const float *x, int64_t dim) {
    const float *even = x, *odd = x + (dim + 1) / 2;
    float low = 0.0f, high = 0.0f;
    for (int64_t i = 0; i < dim / 2; i++) {
        uint32_t two;
        memcpy(&two, weight + 2 * i, 4);
        low += as_float(two << 16) * even[i];
        high += as_float(two & 0xffff0000u) * odd[i];
    }
    if (dim & 1) low += from_bfloat16(weight[dim - 1]) * even[dim / 2];
    return low + high;
}

static inline float read_one(const void *data, int64_t i, int32_t dtype) {
    return dtype == FLOAT32 ? ((const float *)data)[i] : from_bfloat16(((const uint16_t *)data)[i]);
}

CLONES static void multiply(const Linear *l, const Vectors *v, int64_t from, int64_t to, float *out,
                            int64_t stride) {
    int64_t dim = l->num_in, bytes = dim * (v->dtype == FLOAT32 ? 4 : 2);
    for (int64_t row = from; row < to; row++) {
        const char *weight = (const char *)l->weight + row * bytes;
        prefetch(weight + AHEAD, bytes < AHEAD ? bytes : AHEAD);
        for (int64_t i = 0; i < v->num; i++) {
            const float *x = v->data + i * dim;
            float sum = v->dtype == FLOAT32 ? dot((const float *)weight, x, dim)
                                            : dot_bfloat16((const uint16_t *)weight, x, dim);
            out[i * stride + row] = l->bias ? sum + read_one(l->bias, row, v->dtype) : sum;
        }
    }
}

void icecache_multiply(const Linear *l, const Vectors *v, int64_t from, int64_t to, float *out,
                       int64_t stride) {
    multiply(l, v, from, to, out, stride);
}

void icecache_lay_out_vector(const Vectors *v, int64_t i, const float *x, int64_t dim) {
    float *to = v->data + i * dim;
    for (int64_t k = 0; k < dim; k++) to[place_of(v->dtype, k, dim)] = x[k];
}

int64_t icecache_rows_at_once(const Linear *l, int32_t dtype) {
    int64_t rows = CHUNK / (l->num_in * (dtype == FLOAT32 ? 4 : 2));
    return rows < 1 ? 1 : rows;
}

typedef struct {
    const Linear *const *linears;
    int64_t num_linears, next;
    const Vectors *vectors;
    float *out;
    int64_t stride;
} Products;

static void share_products(void *work, int64_t member) {
    Products *p = work;
    (void)member;
    for (int64_t chunk; (chunk = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) >= 0;) {
        int64_t first = 0, j = 0;
        for (; j < p->num_linears; j++) {
            const Linear *l = p->linears[j];
            int64_t rows = icecache_rows_at_once(l, p->vectors->dtype);
            int64_t from = chunk * rows, to = from + rows;
            if (from < l->num_out) {
                to = to < l->num_out ? to : l->num_out;
                multiply(l, p->vectors, from, to, p->out + first, p->stride);
                break;
            }
            chunk -= (l->num_out + rows - 1) / rows;
            first += l->num_out;
        }
        if (j == p->num_linears) return;
    }
}

void icecache_products(const Hands *hands, const Linear *const *linears, int64_t num_linears,
                       const Vectors *v, float *out, int64_t stride) {
    Products p = {linears, num_linears, 0, v, out, stride};
    icecache_share(hands, share_products, &p);
}
