/* A decode step reads every weight once, so a product is as fast as memory is: one row after the
 * other, asked for a little ahead, since a row is too short for the processor to foresee the next.
 * Up to four vectors meet a row at once.
 *
 * bfloat16 is widened in registers. Two neighbours come as one word, so vectors are laid out with
 * their even elements before their odd ones.
 *
 * A vector's products are the same bit for bit, however many others there are: each has its own two
 * sums of eight lanes, in an order that the compiler must not change, and what is left over is filled
 * up with zeros. The plain twin is ops/reference_model.py.
 */
#if defined(__clang__)
#pragma clang fp reassociate(off)
#elif defined(__GNUC__)
#pragma GCC optimize("no-associative-math")
#endif

#include "linear.h"

#include <string.h>

#include "vector.h"

/* bytes */
#define AHEAD 2048
#define CHUNK (1 << 15)

static inline float read_one(const void *data, int64_t i, int32_t dtype) {
    return dtype == FLOAT32 ? ((const float *)data)[i] : from_bfloat16(((const uint16_t *)data)[i]);
}

#if defined(__GNUC__)
#define LANES 8
#define VECTORS 4
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
#define INLINE __attribute__((always_inline)) static inline

/* Whole registers of a row with those of vectors: two of weights, of which bfloat16's are one word.
 * Elements of x that meet the second register are `second` further on. */
INLINE void add_products(int32_t dtype, const char *weight, const float *const *x, int64_t second,
                         int64_t num, Floats (*sum)[VECTORS]) {
    Floats a, b, u, v;
    if (dtype == FLOAT32) {
        memcpy(&a, weight, sizeof a);
        memcpy(&b, weight + sizeof a, sizeof b);
    } else {
        Words both;
        memcpy(&both, weight, sizeof both);
        a = (Floats)(both << 16);
        b = (Floats)(both & 0xffff0000u);
    }
    for (int64_t i = 0; i < num; i++) {
        memcpy(&u, x[i], sizeof u);
        memcpy(&v, x[i] + second, sizeof v);
        sum[0][i] += a * u;
        sum[1][i] += b * v;
    }
}

#if defined(__clang__)
#define SHUFFLED(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SHUFFLED(x, ...) __builtin_shuffle(x, (Words){__VA_ARGS__})
#endif

INLINE float sum_of(const Floats *a, const Floats *b) {
    Floats s = *a + *b;
    s += SHUFFLED(s, 4, 5, 6, 7, 0, 1, 2, 3);
    s += SHUFFLED(s, 2, 3, 0, 1, 6, 7, 4, 5);
    s += SHUFFLED(s, 1, 0, 3, 2, 5, 4, 7, 6);
    return s[0];
}

/* What is left of a row, filled up with zeros. */
INLINE void add_rest(int32_t dtype, const char *weight, const float *const *x, int64_t at,
                     int64_t dim, int64_t num, Floats (*sum)[VECTORS]) {
    int64_t left = dim - at;
    float wide[2 * LANES] = {0}, rest[VECTORS][2 * LANES] = {{0}};
    uint16_t narrow[2 * LANES] = {0};
    const float *of[VECTORS];
    if (dtype == FLOAT32) memcpy(wide, weight, sizeof(float) * (size_t)left);
    else memcpy(narrow, weight, sizeof(uint16_t) * (size_t)left);
    for (int64_t i = 0; i < num; i++) {
        for (int64_t k = 0; k < left; k++)
            rest[i][place_of(dtype, k, 2 * LANES)] = x[i][place_of(dtype, at + k, dim)];
        of[i] = rest[i];
    }
    add_products(dtype, dtype == FLOAT32 ? (const char *)wide : (const char *)narrow, of, LANES, num,
                 sum);
}

/* A row of weights with `num` vectors. */
INLINE void dots(int32_t dtype, int64_t num, const char *weight, const float *x, int64_t dim,
                 float *out) {
    const int64_t step = 2 * LANES, size = dtype == FLOAT32 ? 4 : 2;
    const int64_t second = dtype == FLOAT32 ? LANES : (dim + 1) / 2;
    Floats sum[2][VECTORS];
    const float *of[VECTORS];
    int64_t at = 0;
    memset(sum, 0, sizeof sum);
    for (; at + step <= dim; at += step) {
        for (int64_t i = 0; i < num; i++)
            of[i] = x + i * dim + (dtype == FLOAT32 ? at : at / 2);
        add_products(dtype, weight + at * size, of, second, num, sum);
    }
    for (int64_t i = 0; i < num; i++) of[i] = x + i * dim;
    if (at < dim) add_rest(dtype, weight + at * size, of, at, dim, num, sum);
    for (int64_t i = 0; i < num; i++) out[i] = sum_of(&sum[0][i], &sum[1][i]);
}
#else
#define VECTORS 1
#define INLINE static inline

INLINE void dots(int32_t dtype, int64_t num, const char *weight, const float *x, int64_t dim,
                 float *out) {
    float sum = 0.0f;
    for (int64_t k = 0; k < dim; k++)
        sum += x[place_of(dtype, k, dim)] * read_one(weight, k, dtype);
    out[0] = sum;
    (void)num;
}
#endif

/* Call dots with a number of vectors that the compiler knows. */
INLINE void some_dots(int32_t dtype, int64_t num, const char *weight, const float *x, int64_t dim,
                      float *out) {
    switch (num) {
    case 1: dots(dtype, 1, weight, x, dim, out); break;
#if VECTORS == 4
    case 2: dots(dtype, 2, weight, x, dim, out); break;
    case 3: dots(dtype, 3, weight, x, dim, out); break;
    default: dots(dtype, 4, weight, x, dim, out);
#endif
    }
}

INLINE void rows_of(int32_t dtype, const Linear *l, const Vectors *v, int64_t from, int64_t to,
                    float *out, int64_t stride) {
    int64_t dim = l->num_in, bytes = dim * (dtype == FLOAT32 ? 4 : 2);
    for (int64_t row = from; row < to; row++) {
        const char *weight = (const char *)l->weight + row * bytes;
        float bias = l->bias ? read_one(l->bias, row, dtype) : 0.0f;
        prefetch(weight + AHEAD, bytes < AHEAD ? bytes : AHEAD);
        for (int64_t i = 0; i < v->num; i += VECTORS) {
            int64_t num = v->num - i < VECTORS ? v->num - i : VECTORS;
            float found[VECTORS];
            some_dots(dtype, num, weight, v->data + i * dim, dim, found);
            for (int64_t k = 0; k < num; k++) out[(i + k) * stride + row] = found[k] + bias;
        }
    }
}

CLONES static void multiply(const Linear *l, const Vectors *v, int64_t from, int64_t to, float *out,
                            int64_t stride) {
    if (v->dtype == FLOAT32) rows_of(FLOAT32, l, v, from, to, out, stride);
    else rows_of(BFLOAT16, l, v, from, to, out, stride);
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
