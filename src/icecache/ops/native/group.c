/* Group points by nearness, row after row; the plain twin is tree/cluster.py. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cut.h"
#include "nearest.h"
#include "vector.h"

#define POINTS_AHEAD 16
#define WIDEST_SHARE 8

/* The points of a row, as they come. */
typedef struct {
    const void *data; /* [num, dim] */
    int64_t num, dim;
    int32_t dtype;
} Points;

typedef struct {
    int64_t target, largest, rounds, cuts, segment, seed, coarse_cell, most_cells;
} Rule;

/* Of one call, for the longest row. */
typedef struct {
    Kernel kernel;
    Parents packed;
    Cut cut;
    double *sum;
    float *centre, *x, *tiles, *parents, *reach;
    int32_t *order, *cell, *filled; /* of a row's points */
    int32_t *nearest, *group, *members, *start, *at, *next, *number;
} Scratch;

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t parts(int64_t total, int64_t size) { return (total + size - 1) / size; }

static int64_t coarse_stride(int64_t num, const Rule *rule) {
    int64_t stride = parts(num, rule->most_cells);
    return stride > rule->coarse_cell ? stride : rule->coarse_cell;
}

static void *take(char *base, size_t *used, int64_t num, size_t size) {
    void *at = base ? base + *used : NULL;
    *used += ((size_t)num * size + 63) / 64 * 64;
    return at;
}

/* Say where everything lies from `base` on; returns the bytes it takes. */
static size_t lay_out(Scratch *s, char *base, int64_t longest, int64_t dim, const Rule *rule) {
    int64_t points = smaller(longest, rule->segment), parents = parts(points, rule->target);
    int64_t cells = longest > rule->segment ? parts(longest, coarse_stride(longest, rule)) : 0;
    if (points < cells) points = cells;
    if (parents < cells) parents = cells;
    size_t used = 0;
    s->sum = take(base, &used, dim, sizeof(double));
    s->packed.panels = take(base, &used, (parents + PANEL_ROOM) * dim, sizeof(float));
    s->packed.start = take(base, &used, parents + PANEL_ROOM, sizeof(float));
    s->centre = take(base, &used, dim, sizeof(float));
    s->x = take(base, &used, points * dim, sizeof(float));
    s->tiles = take(base, &used, (points + TILE_POINTS) * dim, sizeof(float));
    s->parents = take(base, &used, parents * dim, sizeof(float));
    s->reach = take(base, &used, points, sizeof(float));
    s->cut.centred = take(base, &used, points * dim, sizeof(float));
    s->cut.key = take(base, &used, points, sizeof(float));
    s->cut.mean = take(base, &used, dim, sizeof(float));
    s->cut.direction = take(base, &used, dim, sizeof(float));
    int32_t **of_row[] = {&s->order, &s->cell, &s->filled};
    for (int i = 0; i < 3; i++) *of_row[i] = take(base, &used, longest + 1, sizeof(int32_t));
    int32_t **of_segment[] = {&s->nearest, &s->group,      &s->members,   &s->start, &s->at,
                              &s->next,    &s->number, &s->cut.sorted, &s->cut.spare};
    for (int i = 0; i < 9; i++)
        *of_segment[i] = take(base, &used, points + TILE_POINTS + 1, sizeof(int32_t));
    return used;
}

CLONES static void find_centre(Scratch *s, const Points *points) {
    int64_t dim = points->dim;
    memset(s->sum, 0, sizeof(double) * (size_t)dim);
    for (int64_t i = 0; i < points->num; i++) {
        to_float(points->data, i * dim, points->dtype, s->centre, dim);
        for (int64_t k = 0; k < dim; k++) s->sum[k] += s->centre[k];
    }
    for (int64_t k = 0; k < dim; k++) s->centre[k] = (float)(s->sum[k] / (double)points->num);
}

/* Read `num` points, centred: those of `numbers`, or every stride-th from the first on. */
CLONES static void gather(const Scratch *s, const Points *points, const int32_t *numbers,
                          int64_t first, int64_t stride, int64_t num) {
    int64_t dim = points->dim, bytes = dim * (points->dtype == FLOAT32 ? 4 : 2);
    for (int64_t i = 0; i < num; i++) {
        int64_t number = numbers ? numbers[i] : first + i * stride;
        if (numbers && i + POINTS_AHEAD < num)
            prefetch((const char *)points->data + numbers[i + POINTS_AHEAD] * bytes, bytes);
        float *out = s->x + i * dim;
        to_float(points->data, number * dim, points->dtype, out, dim);
        for (int64_t k = 0; k < dim; k++) out[k] -= s->centre[k];
    }
}

/* Order the row's points by promoted cell, cells so that near ones are near. */
static void coarse_order(Scratch *s, const Points *points, const Rule *rule) {
    int64_t num = points->num, dim = points->dim;
    int64_t stride = coarse_stride(num, rule), cells = parts(num, stride);
    int levels = -1;
    while ((int64_t)1 << (levels + 1) < cells) levels++;
    gather(s, points, NULL, 0, stride, cells);
    for (int64_t c = 0; c < cells; c++) s->members[c] = (int32_t)c;
    bisect(&s->cut, s->x, s->members, cells, dim, levels);
    for (int64_t c = 0; c < cells; c++)
        memcpy(s->parents + c * dim, s->x + s->members[c] * dim, sizeof(float) * dim);
    pack_parents(s->parents, cells, dim, s->kernel.lanes, &s->packed);
    for (int64_t i = 0; i < num; i += rule->segment) {
        int64_t here = smaller(rule->segment, num - i);
        gather(s, points, NULL, i, 1, here);
        pack_points(s->x, here, dim, s->tiles);
        find_nearest(&s->kernel, s->tiles, here, dim, &s->packed, s->nearest);
        memcpy(s->cell + i, s->nearest, sizeof(int32_t) * (size_t)here);
    }
    memset(s->filled, 0, sizeof(int32_t) * (size_t)(cells + 1));
    for (int64_t i = 0; i < num; i++) s->filled[s->cell[i] + 1]++;
    for (int64_t c = 0; c < cells; c++) s->filled[c + 1] += s->filled[c];
    for (int64_t i = 0; i < num; i++) s->order[s->filled[s->cell[i]]++] = (int32_t)i;
}

/* The first `num % segments` segments have one point more. */
static int64_t segment_start(int64_t segment, int64_t num, int64_t segments) {
    return segment * (num / segments) + smaller(segment, num % segments);
}

CLONES static void mean_parents(Scratch *s, int64_t num, int64_t num_parents, int64_t dim) {
    int32_t *count = s->start;
    memset(count, 0, sizeof(int32_t) * (size_t)num_parents);
    for (int64_t i = 0; i < num; i++) {
        float *parent = s->parents + s->nearest[i] * dim;
        if (count[s->nearest[i]]++ == 0) memset(parent, 0, sizeof(float) * dim);
        add_scaled(parent, 1.0f, s->x + i * dim, dim);
    }
    for (int64_t p = 0; p < num_parents; p++)
        if (count[p] > 1)
            for (int64_t k = 0; k < dim; k++) s->parents[p * dim + k] /= (float)count[p];
}

static void promote_and_refine(Scratch *s, int64_t num, int64_t dim, const Rule *rule) {
    int64_t num_parents = parts(num, rule->target);
    for (int64_t p = 0; p < num_parents; p++) {
        int64_t from = smaller(p * rule->target + rule->seed % rule->target, num - 1);
        memcpy(s->parents + p * dim, s->x + from * dim, sizeof(float) * dim);
    }
    pack_points(s->x, num, dim, s->tiles);
    for (int64_t round = 0;; round++) {
        pack_parents(s->parents, num_parents, dim, s->kernel.lanes, &s->packed);
        find_nearest(&s->kernel, s->tiles, num, dim, &s->packed, s->nearest);
        if (round == rule->rounds) return;
        mean_parents(s, num, num_parents, dim);
    }
}

/* Number the parents in use and list their members; returns how many they are. */
static int64_t list_members(Scratch *s, int64_t num, int64_t num_parents) {
    int32_t *count = s->next, groups = 0, total = 0;
    memset(count, 0, sizeof(int32_t) * (size_t)num_parents);
    for (int64_t i = 0; i < num; i++) count[s->nearest[i]]++;
    for (int64_t p = 0; p < num_parents; p++) {
        s->number[p] = groups;
        s->at[groups] = s->start[groups] = total;
        total += count[p];
        groups += count[p] > 0;
    }
    s->start[groups] = total;
    for (int64_t i = 0; i < num; i++) {
        int32_t group = s->number[s->nearest[i]];
        s->group[i] = group;
        s->members[s->at[group]++] = (int32_t)i;
    }
    return groups;
}

/* How far each group's farthest member is from its mean, squared and negative: widest first. */
CLONES static void measure_reach(Scratch *s, int64_t groups, int64_t dim) {
    for (int64_t g = 0; g < groups; g++)
        s->reach[g] = -centre_members(&s->cut, s->x, s->members + s->start[g],
                                      s->start[g + 1] - s->start[g], dim);
}

/* In every round, cut the eighth of the groups in two whose farthest member is farthest from the
 * mean: one key unlike its group would hide in it. Returns how many groups there are then. */
static int64_t cut_widest(Scratch *s, const int32_t *order, int64_t num, int64_t groups,
                          int64_t dim, int64_t rounds) {
    for (int64_t round = 0; round < rounds; round++) {
        int64_t more = groups;
        measure_reach(s, groups, dim);
        sort_stable(s->reach, groups, s->at, s->next);
        memcpy(s->nearest, s->group, sizeof(int32_t) * (size_t)num);
        for (int64_t i = 0; i < groups / WIDEST_SHARE; i++) {
            const int32_t *members = s->members + s->start[s->at[i]];
            int64_t count = s->start[s->at[i] + 1] - s->start[s->at[i]], first = 0;
            for (int64_t m = 1; order && m < count; m++)
                if (order[members[m]] < order[members[first]]) first = m;
            more += part_at_mean(&s->cut, s->x, members, count, dim, first, s->nearest,
                                 (int32_t)more);
        }
        groups = list_members(s, num, more);
    }
    return groups;
}

/* Cut groups above the largest size in halves; new ones are numbered in rounds over all of them. */
static int64_t cut_groups(Scratch *s, int64_t groups, int64_t dim, int64_t largest) {
    int32_t *first = s->at, *size = s->next, *number = s->number;
    int64_t open = 0;
    for (int64_t g = 0; g < groups; g++) {
        int32_t count = s->start[g + 1] - s->start[g];
        if (count <= largest) continue;
        first[open] = s->start[g];
        size[open++] = count;
    }
    while (open) {
        int64_t lower_open = 0, upper_open = 0;
        int32_t *upper = s->nearest;
        for (int64_t i = 0; i < open; i++) {
            int32_t *members = s->members + first[i], lower, rest;
            lower = (int32_t)halve(&s->cut, s->x, members, size[i], dim);
            rest = size[i] - lower;
            for (int32_t m = lower; m < size[i]; m++) s->group[members[m]] = (int32_t)groups;
            groups++;
            if (rest > largest) {
                upper[upper_open] = first[i] + lower;
                number[upper_open++] = rest;
            }
            if (lower > largest) {
                first[lower_open] = first[i];
                size[lower_open++] = lower;
            }
        }
        memcpy(first + lower_open, upper, sizeof(int32_t) * (size_t)upper_open);
        memcpy(size + lower_open, number, sizeof(int32_t) * (size_t)upper_open);
        open = lower_open + upper_open;
    }
    return groups;
}

/* The means of a segment's groups, from the row's centre. */
CLONES static void mean_groups(const Scratch *s, int64_t num, int64_t groups, int64_t dim,
                               float *means) {
    int32_t *count = s->start;
    memset(count, 0, sizeof(int32_t) * (size_t)groups);
    memset(means, 0, sizeof(float) * (size_t)(groups * dim));
    for (int64_t i = 0; i < num; i++) {
        count[s->group[i]]++;
        add_scaled(means + s->group[i] * dim, 1.0f, s->x + i * dim, dim);
    }
    for (int64_t g = 0; g < groups; g++)
        for (int64_t k = 0; k < dim; k++) means[g * dim + k] /= (float)count[g];
}

static int64_t group_row(Scratch *s, const Points *points, const Rule *rule, int64_t first_group,
                         int64_t *ids, float *means) {
    int64_t num = points->num, dim = points->dim, groups = 0;
    int64_t segments = parts(num, rule->segment);
    find_centre(s, points);
    if (segments > 1) coarse_order(s, points, rule);
    for (int64_t g = 0; g < segments; g++) {
        int64_t first = segment_start(g, num, segments);
        int64_t here = segment_start(g + 1, num, segments) - first;
        const int32_t *order = segments > 1 ? s->order + first : NULL;
        gather(s, points, order, 0, 1, here);
        promote_and_refine(s, here, dim, rule);
        int64_t found = list_members(s, here, parts(here, rule->target));
        found = cut_widest(s, order, here, found, dim, rule->cuts);
        found = cut_groups(s, found, dim, rule->largest);
        for (int64_t i = 0; i < here; i++)
            ids[order ? order[i] : i] = first_group + groups + s->group[i];
        if (means) mean_groups(s, here, found, dim, means + groups * dim);
        groups += found;
    }
    return groups;
}

/* ids: each point's group; per_row: the rows' groups; means, optional: [groups, dim], room for as
 * many as points. -1 without memory. */
EXPORT int icecache_group(const void *data, int64_t dtype, const int64_t *row_lens,
                          int64_t num_rows, int64_t dim, const Rule *rule, int64_t *ids,
                          int64_t *per_row, float *means) {
    int64_t longest = 1, first = 0;
    for (int64_t r = 0; r < num_rows; r++)
        if (row_lens[r] > longest) longest = row_lens[r];
    Scratch s;
    size_t bytes = lay_out(&s, NULL, longest, dim, rule);
    char *memory = malloc(bytes + 64), *from = (char *)data;
    if (!memory) return -1;
    lay_out(&s, memory + (64 - (uintptr_t)memory % 64), longest, dim, rule);
    s.kernel = choose_kernel();
    for (int64_t r = 0; r < num_rows; r++) {
        Points points = {from, row_lens[r], dim, (int32_t)dtype};
        per_row[r] = group_row(&s, &points, rule, first, ids, means ? means + first * dim : NULL);
        first += per_row[r];
        from += row_lens[r] * dim * (dtype == FLOAT32 ? 4 : 2);
        ids += row_lens[r];
    }
    free(memory);
    return 0;
}
