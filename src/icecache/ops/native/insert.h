/* Tokens for the tree, and what one of them lacks. */
#ifndef ICECACHE_INSERT_H
#define ICECACHE_INSERT_H

#include "layer.h"

enum {
    INSERTED = 0,
    NEEDS_PAGE = 1,
    NEEDS_COPY = 2,
    NEEDS_ROOM = 3,
    TOP_IS_WIDE = 4,
    WAITS = 5,
    NEEDS_MEMORY = 6
};

typedef struct {
    int32_t status, page; /* page: the one to be copied */
} Answer;

typedef struct {
    const void *keys, *values;
    const int64_t *row, *offset, *position; /* [tokens]; offset: element of key and value */
} Tokens;

/* Insert tokens one after the other until one lacks something. Returns how far it came, or -1
 * without memory; `answer` speaks of the token it stopped at, or of the one that it put in last. */
int64_t icecache_insert(const Shape *shape, Tree *tree, Pages *pages, const Tokens *tokens,
                        int64_t first, int64_t num_tokens, Answer *answer);

#endif
