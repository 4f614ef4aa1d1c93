/* Attend to tokens that are given instead of chosen: another layer's selection.
 *
 * Every leaf is scored for the remainder, which takes what a leaf has beside the given tokens. The
 * plain twin is attention/given.py.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "search.h"

/* A bit for each position up to the last of those wanted; null without memory. */
static uint8_t *mark(const int32_t *wanted, int64_t num_wanted, int64_t most, int64_t *end) {
    *end = 0;
    for (int64_t i = 0; i < num_wanted; i++)
        if (wanted[i] >= *end && wanted[i] < most) *end = (int64_t)wanted[i] + 1;
    uint8_t *marks = calloc((size_t)(*end / 8 + 1), 1);
    for (int64_t i = 0; marks && i < num_wanted; i++)
        if (wanted[i] >= 0 && wanted[i] < *end) marks[wanted[i] / 8] |= (uint8_t)(1 << wanted[i] % 8);
    return marks;
}

/* A position behind those of all tokens in the row's pages. */
static int64_t past_all(const Shape *s, const Pages *p, int64_t row) {
    int64_t most = 0;
    for (int64_t i = 0; i < p->num_pages[row]; i++) {
        const int32_t *position = p->positions + pool_page(p, row, i) * s->page_size;
        for (int64_t k = 0; k < s->page_size; k++) most = position[k] >= most ? position[k] + 1 : most;
    }
    return most;
}

int64_t icecache_take_given(const Shape *s, const Tree *t, const Pages *p, int64_t row,
                            const int32_t *wanted, Found *f, int64_t *token) {
    const Level *leaves = t->level;
    int64_t end, taken = 0, room = s->room > 0 ? s->room : 0;
    uint8_t *marks = mark(wanted, room, past_all(s, p, row), &end), slots[256];
    if (!marks) return -1;
    for (int64_t i = 0; i < f->num; i++) {
        int64_t leaf = row * leaves->capacity + i, page = pool_page(p, row, t->page[leaf]);
        int64_t num = slots_of(s, t, leaf, slots), left = num;
        const int32_t *position = p->positions + page * s->page_size;
        for (int64_t k = 0; k < num; k++) {
            int64_t at = position[slots[k]];
            if (at >= end || !(marks[at / 8] >> at % 8 & 1)) continue;
            token[taken++] = (page * 2 * s->page_size + slots[k]) * s->dim;
            left--;
        }
        f->chosen[i] = left == 0;
        float less = left && left < num ? logf((float)left / (float)num) : 0.0f;
        for (int64_t g = 0; g < s->heads && less < 0.0f; g++) f->logits[g * f->stride + i] += less;
    }
    free(marks);
    return taken;
}
