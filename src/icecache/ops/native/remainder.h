/* Attention to all that was not chosen, through summaries. */
#ifndef ICECACHE_REMAINDER_H
#define ICECACHE_REMAINDER_H

#include "search.h"

/* An entry whose weight is less than this part of 1 / entries for every head is not read;
 * ops/reference.py has the same number. */
#define NEGLIGIBLE 0.03f

/* Entries whose values are summed at a time. Sums are added block by block whoever made them, so
 * that a result does not depend on the number of threads. */
#define ADDED 512

/* Turn the weights of all entries, 0 where chosen, into those of the entries to be read: num_kept,
 * listed in `kept`. */
void icecache_keep_entries(const Shape *s, Found *f);

/* Write the sum of a block's values to out [heads, dim], once; an empty block writes nothing. */
void icecache_add_kept(const Shape *s, const Tree *t, int64_t row, const Found *f, int64_t block,
                       float *out);

static inline int64_t num_added(int64_t entries) { return (entries + ADDED - 1) / ADDED; }

#endif
