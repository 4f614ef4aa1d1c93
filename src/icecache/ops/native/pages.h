/* Which pages of a row have room: lists of pages with equally many free slots. */
#ifndef ICECACHE_PAGES_H
#define ICECACHE_PAGES_H

#include "layer.h"

static inline void unlink_page(const Shape *s, Pages *p, int64_t row, int32_t page) {
    int64_t at = row * p->capacity;
    int32_t before = p->before[at + page], after = p->after[at + page];
    if (before >= 0) p->after[at + before] = after;
    else p->head[row * (s->page_size + 1) + p->free[at + page]] = after;
    if (after >= 0) p->before[at + after] = before;
}

static inline void link_page(const Shape *s, Pages *p, int64_t row, int32_t page) {
    int64_t at = row * p->capacity;
    int32_t *head = p->head + row * (s->page_size + 1) + p->free[at + page];
    p->before[at + page] = -1;
    p->after[at + page] = *head;
    if (*head >= 0) p->before[at + *head] = page;
    *head = page;
}

static inline void change_free(const Shape *s, Pages *p, int64_t row, int64_t page, int64_t change) {
    unlink_page(s, p, row, (int32_t)page);
    p->free[row * p->capacity + page] = (uint8_t)(p->free[row * p->capacity + page] + change);
    link_page(s, p, row, (int32_t)page);
}

/* The fullest page of the row with room, not `besides`; -1 if there is none. */
static inline int64_t fullest_with(const Shape *s, const Pages *p, int64_t row, int64_t room,
                                   int64_t besides) {
    const int32_t *head = p->head + row * (s->page_size + 1);
    for (int64_t free_slots = room; free_slots <= s->page_size; free_slots++) {
        int32_t page = head[free_slots];
        if (page >= 0 && page == besides) page = p->after[row * p->capacity + page];
        if (page >= 0) return page;
    }
    return -1;
}

#endif
