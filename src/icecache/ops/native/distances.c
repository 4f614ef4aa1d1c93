/* Distances of a point from int8 means; products.h says of what kind. */
#include "dots.h"
#include "layer.h"
#include "products.h"
#include "vector.h"
#include "wide.h"

static inline float half_squared(float scale, float with_self, float with_point) {
    return scale * (0.5f * scale * with_self - with_point);
}

#if defined(WIDE_TARGET)
enum { AT_ONCE = WIDE / 2 };

WIDE_INLINE void wide_distances(int64_t dim, const float *point, const int8_t *codes,
                                const uint16_t *scale, const int32_t *id, int64_t num, float *out) {
    for (int64_t i = 0; i < num; i += AT_ONCE) {
        const int8_t *entry[AT_ONCE];
        float found[WIDE];
        int64_t here = num - i < AT_ONCE ? num - i : AT_ONCE;
        /* behind the last entry, the last once more */
        for (int64_t k = 0; k < AT_ONCE; k++)
            entry[k] = codes + (int64_t)id[i + (k < here ? k : here - 1)] * dim;
        _mm512_storeu_ps(found, wide_with_self(dim, point, entry));
        for (int64_t k = 0; k < here; k++)
            out[i + k] = half_squared(from_bfloat16(scale[id[i + k]]), found[k], found[AT_ONCE + k]);
    }
}

WIDE_TARGET static void distances_wide(int64_t dim, const float *point, const int8_t *codes,
                                       const uint16_t *scale, const int32_t *id, int64_t num,
                                       float *out) {
    BY_DIM(dim, wide_distances, point, codes, scale, id, num, out)
}
#endif

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
#if defined(WIDE_TARGET)
    if (can_go_wide(dim)) {
        distances_wide(dim, point, codes, scale, id, num, out);
        return;
    }
#endif
    distances(dim, point, codes, scale, id, num, out);
}
