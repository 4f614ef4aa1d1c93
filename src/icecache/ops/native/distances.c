/* Distances of a point from int8 means; products.h says of what kind. */
#include "dots.h"
#include "layer.h"
#include "products.h"
#include "vector.h"
#include "wide.h"

static inline void distances_of(int64_t dim, const float *point, const int8_t *codes,
                                const uint16_t *scale, const int32_t *id, int64_t num, float *out) {
    _Alignas(64) float mean[MAX_DIM];
    for (int64_t i = 0; i < num; i++) {
        from_int8(codes + (int64_t)id[i] * dim, mean, dim);
        out[i] = half_squared(from_bfloat16(scale[id[i]]), dot(mean, mean, dim),
                              dot(mean, point, dim));
    }
}

CLONES static void distances(int64_t dim, const float *point, const int8_t *codes,
                             const uint16_t *scale, const int32_t *id, int64_t num, float *out) {
    BY_DIM(dim, distances_of, point, codes, scale, id, num, out)
}

void icecache_distances(int64_t dim, const float *point, const int8_t *codes,
                        const uint16_t *scale, const int32_t *id, int64_t num, float *out) {
    const Wide *wide = icecache_wide(dim);
    if (wide) wide->distances(dim, point, codes, scale, id, num, out);
    else distances(dim, point, codes, scale, id, num, out);
}
