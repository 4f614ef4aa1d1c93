/* Body of the products by registers of NUM_LANES floats: some entries at a time with up to four
 * heads. Included once per vector width.
 */
#define OF(name) WIDE_NAME(name, NUM_LANES)

OF(INLINE_) void OF(dot_heads_)(int64_t heads, int64_t dim, const float *query, const Entries *e,
                                PerHead out) {
    const int64_t most = OF(ENTRIES_)(heads);
    int64_t num = e->num;
    for (int64_t i = 0; i < num; i += most) {
        expect_entries(dim, e, i, most);
        const int8_t *entry[4];
        /* behind the last entry, the last once more */
        for (int64_t k = 0; k < most; k++)
            entry[k] = e->codes + (int64_t)e->id[i + k < num ? i + k : num - 1] * dim;
        float found[4 * 4];
        OF(dots_)(dim, heads, query, entry, found);
        int64_t here = num - i;
        for (int64_t g = 0; g < heads && here >= most; g++)
            memcpy(out.data + g * out.stride + i, found + 4 * g, sizeof(float) * (size_t)most);
        for (int64_t g = 0; g < heads && here < most; g++)
            memcpy(out.data + g * out.stride + i, found + 4 * g, sizeof(float) * (size_t)here);
    }
}

OF(INLINE_) void OF(dot_some_)(int64_t dim, const float *query, const Entries *e, PerHead out) {
    for (int64_t g = 0; g < out.heads; g += 4) {
        PerHead some = {out.data + g * out.stride, out.heads - g, out.stride};
        BY_HEADS(some.heads, OF(dot_heads_), dim, query + g * dim, e, some)
    }
}

OF(TARGET_) static void OF(dot_)(int64_t dim, const float *query, const Entries *e, PerHead out) {
    BY_DIM(dim, OF(dot_some_), query, e, out)
}

OF(INLINE_) void OF(add_heads_)(int64_t heads, int64_t dim, PerHead weight,
                                const int8_t *const *codes, int64_t num, float *out) {
    const int64_t chunks = OF(CHUNKS_)(heads), lanes = NUM_LANES;
    int64_t at = 0;
    weight.heads = heads;
    for (; at + chunks * lanes <= dim; at += chunks * lanes)
        OF(add_)(chunks, weight, codes, at, num, out, dim);
    for (; at < dim; at += lanes) OF(add_)(1, weight, codes, at, num, out, dim);
}

OF(TARGET_) static void OF(add_all_)(int64_t dim, PerHead weight, const int8_t *const *codes,
                                     int64_t num, float *out) {
    for (int64_t g = 0; g < weight.heads; g += 4) {
        PerHead some = {weight.data + g * weight.stride, 4, weight.stride};
        BY_HEADS(weight.heads - g, OF(add_heads_), dim, some, codes, num, out + g * dim)
    }
}

OF(INLINE_) void OF(measure_)(int64_t dim, const float *point, const int8_t *codes,
                              const uint16_t *scale, const int32_t *id, int64_t num, float *out) {
    for (int64_t i = 0; i < num; i += 8) {
        const int8_t *entry[8];
        float found[2 * 8];
        int64_t here = num - i < 8 ? num - i : 8;
        for (int64_t k = 0; k < 8; k++)
            entry[k] = codes + (int64_t)id[i + (k < here ? k : here - 1)] * dim;
        OF(with_self_)(dim, point, entry, found);
        for (int64_t k = 0; k < here; k++)
            out[i + k] = half_squared(from_bfloat16(scale[id[i + k]]), found[k], found[8 + k]);
    }
}

OF(TARGET_) static void OF(distances_)(int64_t dim, const float *point, const int8_t *codes,
                                       const uint16_t *scale, const int32_t *id, int64_t num,
                                       float *out) {
    BY_DIM(dim, OF(measure_), point, codes, scale, id, num, out)
}

#undef OF
#undef NUM_LANES
