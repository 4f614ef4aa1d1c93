/* Which pages the leaves of a build go to; the plain twin is store/packing.py. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vector.h"

/* Stable order by `key - low`, of numbers that are in `order` already. */
static void sort_by(const int64_t *key, int64_t low, int64_t range, const int32_t *order,
                    int64_t num, int32_t *count, int32_t *sorted) {
    memset(count, 0, sizeof(int32_t) * (size_t)(range + 1));
    for (int64_t i = 0; i < num; i++) count[key[i] - low + 1]++;
    for (int64_t k = 0; k < range; k++) count[k + 1] += count[k];
    for (int64_t i = 0; i < num; i++) sorted[count[key[order[i]] - low]++] = order[i];
}

/* Number leaves anew, so that those of one parent follow each other, each parent's in their old
 * order: `parents` [num] gets sorted, `ids` are the leaves' numbers [num_ids]. -1 without memory. */
EXPORT int icecache_siblings(int64_t *parents, int64_t num, int64_t *ids, int64_t num_ids) {
    int64_t low = num ? parents[0] : 0, high = low;
    for (int64_t i = 1; i < num; i++) {
        if (parents[i] < low) low = parents[i];
        if (parents[i] > high) high = parents[i];
    }
    int64_t range = high - low + 1;
    int32_t *number = malloc(sizeof(int32_t) * (size_t)(num + range + 1));
    if (!number) return -1;
    int32_t *next = number + num;
    memset(next, 0, sizeof(int32_t) * (size_t)(range + 1));
    for (int64_t i = 0; i < num; i++) next[parents[i] - low + 1]++;
    for (int64_t k = 0; k < range; k++) next[k + 1] += next[k];
    for (int64_t i = 0; i < num; i++) number[i] = next[parents[i] - low]++;
    for (int64_t k = 0, i = 0; k < range; k++)
        while (i < next[k]) parents[i++] = k + low;
    for (int64_t i = 0; i < num_ids; i++) ids[i] = number[ids[i]];
    free(number);
    return 0;
}

/* page_of: [num]. Returns the number of pages, -1 without memory. */
EXPORT int64_t icecache_pack(const int64_t *sizes, const int64_t *parents, int64_t num,
                             int64_t page_size, int64_t *page_of) {
    int64_t low = num ? parents[0] : 0, high = low, num_pages = 0;
    for (int64_t i = 1; i < num; i++) {
        if (parents[i] < low) low = parents[i];
        if (parents[i] > high) high = parents[i];
    }
    int64_t range = high - low + 1, widest = range > page_size ? range : page_size + 1;
    int32_t *memory = calloc((size_t)(3 * num + widest + 1 + page_size + 1), sizeof(int32_t));
    if (!memory) return -1;
    int32_t *order = memory, *by_size = order + num, *below = by_size + num;
    int32_t *open = below + num, *count = open + page_size + 1;

    /* backwards by size, so that reading backwards is largest first and stable */
    for (int64_t i = 0; i < num; i++) order[i] = (int32_t)(num - 1 - i);
    sort_by(sizes, 0, page_size + 1, order, num, count, by_size);
    for (int64_t i = 0; i < num; i++) order[i] = by_size[num - 1 - i];
    sort_by(parents, low, range, order, num, count, by_size);

    /* a stack of open pages for every room */
    for (int64_t room = 0; room <= page_size; room++) open[room] = -1;
    for (int64_t i = 0; i < num; i++) {
        int64_t size = sizes[by_size[i]], room = size, page;
        while (room <= page_size && open[room] < 0) room++;
        if (room <= page_size) {
            page = open[room];
            open[room] = below[page];
        } else {
            page = num_pages++;
            room = page_size;
        }
        page_of[by_size[i]] = page;
        below[page] = open[room - size];
        open[room - size] = (int32_t)page;
    }
    free(memory);
    return num_pages;
}
