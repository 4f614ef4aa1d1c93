/* The best of many candidates: those worth most, of equals those of the lower id. */
#ifndef ICECACHE_BEST_H
#define ICECACHE_BEST_H

#include <stdint.h>
#include <string.h>

/* The better of two has the higher rank; no two ranks are the same. */
typedef struct {
    uint64_t rank;
    int32_t entry;
} Candidate;

/* Bits of a float that is not negative are in its order. */
static inline uint64_t rank_of(float worth, int32_t id) {
    uint32_t bits;
    memcpy(&bits, &worth, 4);
    return (uint64_t)bits << 32 | (uint32_t)~id;
}

static inline float worth_of(uint64_t rank) {
    uint32_t bits = (uint32_t)(rank >> 32);
    float worth;
    memcpy(&worth, &bits, 4);
    return worth;
}

/* The middle one of the first, the middle and the last of c[low..high), moved to the front. */
static inline Candidate take_pivot(Candidate *c, int64_t low, int64_t high) {
    int64_t first = low, middle = low + (high - low) / 2, last = high - 1, swap;
    if (c[first].rank < c[middle].rank) swap = first, first = middle, middle = swap;
    if (c[middle].rank < c[last].rank) middle = c[first].rank < c[last].rank ? first : last;
    Candidate pivot = c[middle];
    c[middle] = c[low];
    return pivot;
}

/* Move the `want` best to the front, in no order: quickselect, partitioned without branches. */
static inline void select_best(Candidate *c, int64_t num, int64_t want) {
    int64_t low = 0, high = num;
    while (low < want && want < high) {
        Candidate pivot = take_pivot(c, low, high);
        int64_t to = low;
        for (int64_t i = low + 1; i < high; i++) {
            Candidate here = c[i];
            c[i] = c[to + 1];
            c[to + 1] = here;
            to += here.rank > pivot.rank;
        }
        c[low] = c[to];
        c[to] = pivot;
        if (to < want) low = to + 1;
        else high = to;
    }
}

/* Down to the end by the better child, then up: what comes from there mostly stays there. */
static inline void sift_down(Candidate *heap, int64_t num, int64_t at) {
    Candidate moving = heap[at];
    int64_t top = at, child;
    for (; (child = 2 * at + 1) < num; at = child) {
        if (child + 1 < num) child += heap[child + 1].rank > heap[child].rank;
        heap[at] = heap[child];
    }
    for (; at > top && heap[(at - 1) / 2].rank < moving.rank; at = (at - 1) / 2)
        heap[at] = heap[(at - 1) / 2];
    heap[at] = moving;
}

#endif
