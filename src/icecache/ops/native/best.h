/* The best of many candidates: those worth most, of equals those of the lower id. */
#ifndef ICECACHE_BEST_H
#define ICECACHE_BEST_H

#include <stdint.h>

typedef struct {
    float worth;
    int32_t id, entry;
} Candidate;

static inline int better(Candidate a, Candidate b) {
    return a.worth > b.worth || (a.worth == b.worth && a.id < b.id);
}

/* Move the `want` best to the front, in no order (quickselect, median of three). */
static inline void select_best(Candidate *c, int64_t num, int64_t want) {
    int64_t low = 0, high = num - 1;
    while (low < high) {
        Candidate a = c[low], b = c[low + (high - low) / 2], d = c[high];
        Candidate pivot = better(a, b) ? (better(b, d) ? b : (better(a, d) ? d : a))
                                       : (better(a, d) ? a : (better(b, d) ? d : b));
        int64_t i = low, j = high;
        while (i <= j) {
            while (better(c[i], pivot)) i++;
            while (better(pivot, c[j])) j--;
            if (i <= j) {
                Candidate swap = c[i];
                c[i++] = c[j];
                c[j--] = swap;
            }
        }
        if (want - 1 <= j) high = j;
        else if (want - 1 >= i) low = i;
        else return;
    }
}

static inline void sift_down(Candidate *heap, int64_t num, int64_t at) {
    Candidate moving = heap[at];
    for (int64_t child; (child = 2 * at + 1) < num; at = child) {
        if (child + 1 < num && better(heap[child + 1], heap[child])) child++;
        if (!better(heap[child], moving)) break;
        heap[at] = heap[child];
    }
    heap[at] = moving;
}

#endif
