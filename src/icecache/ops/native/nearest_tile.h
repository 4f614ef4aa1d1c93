/* Body of a tile: which of the parents is nearest to each of six points. Included once per vector
 * width, with TILE (name), LANES (vector and its attributes) and NUM_LANES defined.
 *
 * Accumulators start at minus half a parent's squared length and take up the dot product, so the
 * nearest parent is the largest; six points x two vectors fill sixteen registers.
 */
#define FLOATS TILE_NAME(TILE, _floats)
#define INTS TILE_NAME(TILE, _ints)
typedef float FLOATS __attribute__((vector_size(4 * NUM_LANES), may_alias));
typedef int32_t INTS __attribute__((vector_size(4 * NUM_LANES), may_alias));

/* the first of equals stays: only what is larger takes its place */
#define KEEP(acc, i, number)                                              \
    {                                                                     \
        INTS more = acc > best[i];                                        \
        best[i] = (FLOATS)((more & (INTS)acc) | (~more & (INTS)best[i])); \
        from[i] = (more & (number)) | (~more & from[i]);                  \
    }
#define OPEN(i) FLOATS a##i = first, b##i = second;
#define STEP(i)             \
    a##i += point[i] * low; \
    b##i += point[i] * high;
#define CLOSE(i)          \
    KEEP(a##i, i, number) \
    KEEP(b##i, i, number + 1)
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)

TILE_TARGET static void TILE(const float *points, const Parents *parents, int64_t dim,
                             int32_t *nearest) {
    FLOATS best[TILE_POINTS];
    INTS from[TILE_POINTS];
    for (int i = 0; i < TILE_POINTS; i++) {
        best[i] = (FLOATS){0} - 3.4e38f;
        from[i] = (INTS){0};
    }
    for (int64_t p = 0; p < parents->num_panels; p += 2) {
        const float *point = points, *panel = parents->panels + p * NUM_LANES * dim;
        FLOATS first = *(const FLOATS *)(parents->start + p * NUM_LANES);
        FLOATS second = *(const FLOATS *)(parents->start + (p + 1) * NUM_LANES);
        EACH(OPEN)
        for (int64_t k = 0; k < dim; k++, point += TILE_POINTS, panel += NUM_LANES) {
            FLOATS low = *(const FLOATS *)panel;
            FLOATS high = *(const FLOATS *)(panel + NUM_LANES * dim);
            EACH(STEP)
        }
        INTS number = (INTS){0} + (int32_t)p;
        EACH(CLOSE)
    }
    for (int i = 0; i < TILE_POINTS; i++)
        nearest[i] = best_lane((const float *)&best[i], (const int32_t *)&from[i], NUM_LANES);
}

#undef FLOATS
#undef INTS
#undef KEEP
#undef OPEN
#undef STEP
#undef CLOSE
#undef EACH
#undef TILE
#undef TILE_TARGET
#undef NUM_LANES
