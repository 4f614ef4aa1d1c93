#include "products.h"

#include <string.h>

#include "dots.h"
#include "layer.h"
#include "vector.h"
#include "wide.h"

/* Entries asked for ahead. Asked for faster than they are used, many would be dropped. */
#define AHEAD 80

static inline void expect_entries(int64_t dim, const Entries *e, int64_t i, int64_t num) {
    int64_t from = i + AHEAD, end = from + num < e->known ? from + num : e->known;
    for (int64_t k = from; k < end; k++) prefetch(e->codes + (int64_t)e->id[k] * dim, dim);
    if (from < end)
        for (int64_t b = 0; b < BESIDE; b++)
            prefetch((const char *)e->beside[b] + e->id[from] * e->size[b], 1);
}

#if defined(WIDE_TARGET)
WIDE_INLINE void dot_wide_heads(int64_t heads, int64_t dim, const float *query, const Entries *e,
                                PerHead out) {
    int64_t num = e->num;
    for (int64_t i = 0; i < num; i += WIDE_ENTRIES) {
        expect_entries(dim, e, i, WIDE_ENTRIES);
        const int8_t *entry[WIDE_ENTRIES];
        /* behind the last entry, the last once more */
        for (int64_t k = 0; k < WIDE_ENTRIES; k++)
            entry[k] = e->codes + (int64_t)e->id[i + k < num ? i + k : num - 1] * dim;
        float found[WIDE];
        _mm512_storeu_ps(found, wide_dots(dim, heads, query, entry));
        int64_t here = num - i;
        for (int64_t g = 0; g < heads && here >= WIDE_ENTRIES; g++)
            memcpy(out.data + g * out.stride + i, found + WIDE_ENTRIES * g, sizeof(float) * WIDE_ENTRIES);
        for (int64_t g = 0; g < heads && here < WIDE_ENTRIES; g++)
            memcpy(out.data + g * out.stride + i, found + WIDE_ENTRIES * g, sizeof(float) * (size_t)here);
    }
}

WIDE_INLINE void dot_wide(int64_t dim, const float *query, const Entries *e, PerHead out) {
    for (int64_t g = 0; g < out.heads; g += WIDE_HEADS) {
        PerHead some = {out.data + g * out.stride, out.heads - g, out.stride};
        BY_HEADS(some.heads, dot_wide_heads, dim, query + g * dim, e, some)
    }
}

WIDE_TARGET static void dot_wide_entries(int64_t dim, const float *query, const Entries *e,
                                         PerHead out) {
    BY_DIM(dim, dot_wide, query, e, out)
}

WIDE_INLINE void add_wide_heads(int64_t heads, int64_t dim, PerHead weight,
                                const int8_t *const *codes, int64_t num, float *out) {
    int64_t at = 0;
    weight.heads = heads;
    for (; at + 4 * WIDE <= dim; at += 4 * WIDE) wide_add(4, weight, codes, at, num, out, dim);
    for (; at < dim; at += WIDE) wide_add(1, weight, codes, at, num, out, dim);
}

WIDE_TARGET static void add_wide_entries(int64_t dim, PerHead weight, const int8_t *const *codes,
                                         int64_t num, float *out) {
    for (int64_t g = 0; g < weight.heads; g += WIDE_HEADS) {
        PerHead some = {weight.data + g * weight.stride, WIDE_HEADS, weight.stride};
        BY_HEADS(weight.heads - g, add_wide_heads, dim, some, codes, num, out + g * dim)
    }
}
#endif

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
#if defined(WIDE_TARGET)
    if (can_go_wide(dim)) {
        dot_wide_entries(dim, query, e, out);
        return;
    }
#endif
    dot_all(dim, query, e, out);
}

void icecache_add_entries(int64_t dim, PerHead weight, const int8_t *const *codes, int64_t num,
                          float *out) {
#if defined(WIDE_TARGET)
    if (can_go_wide(dim)) {
        add_wide_entries(dim, weight, codes, num, out);
        return;
    }
#endif
    add_all(dim, weight, codes, num, out);
}
