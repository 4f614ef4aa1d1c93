/* The nearest of many parents, for many points: a matrix product that keeps the best only. */
#ifndef ICECACHE_NEAREST_H
#define ICECACHE_NEAREST_H

#include <stdint.h>

#include "vector.h"

enum { TILE_POINTS = 6, MOST_LANES = 16, PANEL_ROOM = 2 * MOST_LANES };

typedef struct {
    float *panels; /* [panel, dim, lane], 64-byte aligned */
    float *start;  /* [panel, lane], minus half the squared length; far below where no parent is */
    int64_t num_panels, num;
} Parents;

typedef void Tile(const float *points, const Parents *parents, int64_t dim, int32_t *nearest);

typedef struct {
    Tile *tile;
    int64_t lanes;
} Kernel;

static inline int32_t best_lane(const float *best, const int32_t *from, int32_t lanes) {
    float most = best[0];
    int32_t least = INT32_MAX;
    for (int32_t l = 1; l < lanes; l++) most = larger(most, best[l]);
    for (int32_t l = 0; l < lanes; l++) {
        int32_t number = from[l] * lanes + l;
        least = best[l] == most && number < least ? number : least;
    }
    return least;
}

#if defined(__GNUC__)
#define TILE_JOIN(a, b) a##b
#define TILE_NAME(a, b) TILE_JOIN(a, b)

#define TILE tile_of_4
#define TILE_TARGET
#define NUM_LANES 4
#include "nearest_tile.h"

#if defined(__x86_64__)
#define TILE tile_of_8
#define TILE_TARGET __attribute__((target("avx2,fma")))
#define NUM_LANES 8
#include "nearest_tile.h"

#define TILE tile_of_16
#define TILE_TARGET __attribute__((target("avx512f")))
#define NUM_LANES 16
#include "nearest_tile.h"
#endif

#else
static void tile_of_4(const float *points, const Parents *parents, int64_t dim, int32_t *nearest) {
    for (int i = 0; i < TILE_POINTS; i++) {
        float best[4] = {-3.4e38f, -3.4e38f, -3.4e38f, -3.4e38f};
        int32_t from[4] = {0};
        for (int64_t p = 0; p < parents->num_panels; p++)
            for (int l = 0; l < 4; l++) {
                float sum = parents->start[p * 4 + l];
                for (int64_t k = 0; k < dim; k++)
                    sum += points[k * TILE_POINTS + i] * parents->panels[(p * dim + k) * 4 + l];
                if (sum > best[l]) {
                    best[l] = sum;
                    from[l] = (int32_t)p;
                }
            }
        nearest[i] = best_lane(best, from, 4);
    }
}
#endif

static inline Kernel choose_kernel(void) {
#if defined(__GNUC__) && defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) return (Kernel){tile_of_16, 16};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return (Kernel){tile_of_8, 8};
#endif
    return (Kernel){tile_of_4, 4};
}

/* Lay out points [num, dim] as tiles [tile, dim, TILE_POINTS], zeros behind. */
static inline void pack_points(const float *x, int64_t num, int64_t dim, float *tiles) {
    for (int64_t i = 0; i < num; i += TILE_POINTS, tiles += TILE_POINTS * dim) {
        int64_t here = num - i < TILE_POINTS ? num - i : TILE_POINTS;
        if (here < TILE_POINTS) memset(tiles, 0, sizeof(float) * TILE_POINTS * dim);
        for (int64_t j = 0; j < here; j++)
            for (int64_t k = 0; k < dim; k++) tiles[k * TILE_POINTS + j] = x[(i + j) * dim + k];
    }
}

/* Lay out parents [num, dim] as panels; an even number of them, the last filled up. */
static inline void pack_parents(const float *x, int64_t num, int64_t dim, int64_t lanes,
                                Parents *out) {
    out->num = num;
    out->num_panels = (num + 2 * lanes - 1) / (2 * lanes) * 2;
    for (int64_t j = 0; j < out->num_panels * lanes; j++) {
        float *to = out->panels + j / lanes * lanes * dim + j % lanes;
        for (int64_t k = 0; k < dim; k++) to[k * lanes] = j < num ? x[j * dim + k] : 0.0f;
        out->start[j] = j < num ? -0.5f * dot(x + j * dim, x + j * dim, dim) : -3.3e38f;
    }
}

/* nearest has room for a last tile's unused points. */
static inline void find_nearest(const Kernel *kernel, const float *tiles, int64_t num, int64_t dim,
                                const Parents *parents, int32_t *nearest) {
    for (int64_t i = 0; i < num; i += TILE_POINTS)
        kernel->tile(tiles + i * dim, parents, dim, nearest + i);
    /* keys that overflow have no nearest */
    for (int64_t i = 0; i < num; i++)
        if (nearest[i] < 0 || nearest[i] >= parents->num) nearest[i] = 0;
}

#endif
