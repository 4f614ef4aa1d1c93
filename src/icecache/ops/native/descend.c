/* Which leaves a row's search looks at: all of a short row's, of others those below the best nodes.
 *
 * The nodes of a level are scored by their summaries, the best `field_of_view` are expanded into
 * their children, the rest stays as it is, a far field. The plain twin is tree/search.py.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "search.h"
#include "vector.h"

#define NODES_AHEAD 12
/* Of the list of a node's children, two lines mostly. */
#define CHILDREN_BYTES 65

static int64_t top_level(const Tree *t, int64_t row) {
    int64_t level = 0;
    while (level + 1 < t->num_levels && t->level[level + 1].num[row] > 0) level++;
    return level;
}

static int is_flat(const Shape *s, const Tree *t, int64_t row) {
    return t->level[0].num[row] <= s->crossover || top_level(t, row) == 0;
}

/* Add the attention of entries that will not be looked at again to what is beside the others. */
CLONES static void set_aside(const Shape *s, Found *f, int64_t from, int64_t num) {
    for (int64_t g = 0; g < s->heads && num > 0; g++) {
        const float *lg = f->logits + g * f->stride + from;
        const float *co = f->correction + g * f->stride + from;
        float top = f->lse[g], sum = 0.0f;
        for (int64_t i = 0; i < num; i++) top = larger(top, lg[i] + co[i]);
        for (int64_t i = 0; i < num; i++) sum += exponential(lg[i] + co[i] - top);
        f->lse[g] = top + logf(sum + exponential(f->lse[g] - top));
    }
}

/* Name the children of the chosen entries `from` on; returns their number. A node's children mostly
 * lie together, but those of two nodes do not: lists are asked for ahead. */
static int64_t name_children(const Tree *t, int64_t level, int64_t row, int64_t from, int64_t num,
                             Found *f) {
    const Level *of = t->level + level, *below = of - 1;
    const int32_t *first = of->first + row * of->capacity;
    const int32_t *next = below->next + row * below->capacity;
    int64_t nodes = 0, children = 0;
    Candidate *node = f->candidates;
    for (int64_t i = 0; i < num; i++) {
        node[nodes].entry = f->id[from + i];
        nodes += f->chosen[from + i];
    }
    for (int64_t i = 0; i < nodes; i++) {
        if (i + 2 * NODES_AHEAD < nodes) prefetch(first + node[i + 2 * NODES_AHEAD].entry, 4);
        if (i + NODES_AHEAD < nodes) prefetch(next + first[node[i + NODES_AHEAD].entry], CHILDREN_BYTES);
        for (int32_t child = first[node[i].entry], last; child >= 0; child = next[last]) {
            for (last = child; next[last] == last + 1; last++) f->frontier[children++] = last;
            f->frontier[children++] = last;
        }
    }
    return children;
}

static int64_t field_at(const Shape *s, int64_t level) {
    return level > 1 ? (s->field_of_view + 1) / 2 : s->field_of_view;
}

/* Go on with the children of the chosen nodes; the others stay far. */
static void go_down(const Tree *t, int64_t row, int64_t from, int64_t num, Found *f) {
    int64_t children = name_children(t, f->at_level, row, from, num, f);
    f->at_level--;
    memcpy(f->id + f->num_far, f->frontier, sizeof(int32_t) * (size_t)children);
    f->num = f->num_far + children;
}

/* Let an expanded node weigh nothing: its children do. */
static void leave_out(const Shape *s, Found *f, int64_t at) {
    for (int64_t g = 0; g < s->heads; g++) {
        f->logits[g * f->stride + at] = -1e30f;
        f->correction[g * f->stride + at] = 0.0f;
    }
}

/* Put the `field` best first among the candidates. */
static void choose_nodes(Found *f, int64_t from, int64_t num, int64_t field) {
    int64_t candidates = icecache_collect_best(f, from, num, field);
    if (candidates < field) candidates = icecache_collect_all(f, from, num);
    select_best(f->candidates, candidates, field);
}

void icecache_open_nodes(const Shape *s, const Tree *t, int64_t row, Found *f) {
    int64_t from = f->num_far, num = f->num - from, field = field_at(s, f->at_level);
    if (f->at_level == 0) return;
    memset(f->chosen + from, 0, (size_t)num);
    f->nodes_scored += num;
    f->num_far += num;
    icecache_weigh(s, f, from, num);
    choose_nodes(f, from, num, field);
    for (int64_t i = 0; i < field; i++) {
        int64_t at = from + f->candidates[i].entry;
        f->chosen[at] = 1;
        leave_out(s, f, at);
    }
    set_aside(s, f, from, num);
    go_down(t, row, from, num, f);
}

/* Choose all entries in question, without a score. */
static void expand_all(const Shape *s, Found *f, int64_t num) {
    memset(f->chosen + f->num_far, 1, (size_t)num);
    for (int64_t i = f->num_far; i < f->num_far + num; i++) leave_out(s, f, i);
}

void icecache_find_nodes(const Step *step, int64_t row, const float *fixed_lse, Found *f) {
    const Shape *s = step->shape;
    const Tree *t = step->tree;
    f->is_flat = is_flat(s, t, row);
    f->at_level = f->is_flat ? 0 : top_level(t, row);
    f->num_far = f->num_kept = f->nodes_scored = 0;
    f->num = t->level[f->at_level].num[row];
    memcpy(f->lse, fixed_lse, sizeof(float) * (size_t)s->heads);
    for (int64_t i = 0; i < f->num; i++) f->id[i] = (int32_t)i;
    while (f->at_level > 0) {
        int64_t num = f->num - f->num_far;
        if (num <= field_at(s, f->at_level)) {
            expand_all(s, f, num);
            go_down(t, row, f->num_far, num, f);
            continue;
        }
        if (f->at_level == 1) return;
        icecache_score_entries(step, row, f->num_far, num, f);
        icecache_open_nodes(s, t, row, f);
    }
}

void icecache_name_leaves(const Tree *t, int64_t row, Found *f) {
    f->is_flat = 1;
    f->at_level = f->num_far = f->num_kept = f->nodes_scored = 0;
    f->num = t->level[0].num[row];
    for (int64_t i = 0; i < f->num; i++) f->id[i] = (int32_t)i;
    memset(f->chosen, 0, (size_t)f->num);
}

int icecache_descends(const Shape *s, const Tree *t) {
    for (int64_t row = 0; row < s->rows; row++)
        if (!is_flat(s, t, row)) return 1;
    return 0;
}

int64_t icecache_most_entries(const Shape *s, const Tree *t) {
    int64_t most = 1, children = s->field_of_view * s->most_children;
    for (int64_t row = 0; row < s->rows; row++) {
        int64_t level = is_flat(s, t, row) ? 0 : top_level(t, row);
        int64_t entries = t->level[level].num[row];
        while (level-- > 0) {
            int64_t num = t->level[level].num[row];
            entries += num < children ? num : children;
        }
        most = entries > most ? entries : most;
    }
    return most;
}
