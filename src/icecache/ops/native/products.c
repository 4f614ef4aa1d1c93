#include "products.h"

#include "dots.h"
#include "layer.h"
#include "vector.h"
#include "wide.h"

/* Dot products of at most DOTS entries with all heads. */
static inline void dot_block(int64_t dim, int64_t block, const float *query, const int8_t *codes,
                             const int32_t *id, PerHead out) {
    _Alignas(64) float mean[DOTS * MAX_DIM];
    for (int64_t k = 0; k < block; k++) from_int8(codes + (int64_t)id[k] * dim, mean + k * dim, dim);
    if (block == DOTS && can_dots(dim, out.heads)) {
        dots(dim, out.heads, query, mean, out.data, out.stride);
        return;
    }
    for (int64_t g = 0; g < out.heads; g++)
        for (int64_t k = 0; k < block; k++)
            out.data[g * out.stride + k] = dot(query + g * dim, mean + k * dim, dim);
}

static inline void dot_blocks(int64_t dim, const float *query, const Entries *e, PerHead out) {
    int64_t i = 0;
    for (; i + DOTS <= e->num; i += DOTS, out.data += DOTS) {
        expect_entries(dim, e, i, DOTS);
        dot_block(dim, DOTS, query, e->codes, e->id + i, out);
    }
    dot_block(dim, e->num - i, query, e->codes, e->id + i, out);
}

CLONES static void dot_all(int64_t dim, const float *query, const Entries *e, PerHead out) {
    BY_DIM(dim, dot_blocks, query, e, out)
}

static inline void add_blocks(int64_t dim, PerHead weight, const int8_t *const *codes, int64_t num,
                              float *out) {
    _Alignas(64) float value[MAX_DIM];
    for (int64_t i = 0; i < num; i++) {
        from_int8(codes[i], value, dim);
        for (int64_t g = 0; g < weight.heads; g++)
            add_scaled(out + g * dim, weight.data[g * weight.stride + i], value, dim);
    }
}

CLONES static void add_all(int64_t dim, PerHead weight, const int8_t *const *codes, int64_t num,
                           float *out) {
    BY_DIM(dim, add_blocks, weight, codes, num, out)
}

void icecache_dot_entries(int64_t dim, const float *query, const Entries *e, PerHead out) {
    const Wide *wide = icecache_wide(dim);
    if (wide) wide->dot(dim, query, e, out);
    else dot_all(dim, query, e, out);
}

void icecache_add_entries(int64_t dim, PerHead weight, const int8_t *const *codes, int64_t num,
                          float *out) {
    const Wide *wide = icecache_wide(dim);
    if (wide) wide->add(dim, weight, codes, num, out);
    else add_all(dim, weight, codes, num, out);
}
