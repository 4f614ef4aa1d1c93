/* One row's part of a decode step, in parts that several threads can share. In order: begin, every
 * block of nodes scored, open, every block of leaves scored, select, every block added, finish.
 * Where there is no node to score, there are no blocks of nodes, and nothing to open. */
#ifndef ICECACHE_ROW_H
#define ICECACHE_ROW_H

#include "search.h"
#include "step.h"

/* The tokens that a row attends exactly. */
typedef struct {
    int64_t stride, num_fixed, num;
    float *logits;  /* [heads, stride] */
    float *lse;     /* [heads], of sink and window */
    int64_t *token; /* [room], element of the key in the pool */
} Exact;

/* What one row is worked on in. */
typedef struct {
    Exact exact;
    Found found;
    float *sums; /* [blocks of ADDED, heads, dim] */
} Room;

/* Bytes of a room for so many entries, and so many tokens of sink and window. */
int64_t icecache_room_bytes(const Shape *s, int64_t entries, int64_t fixed);
void icecache_make_room(const Shape *s, int64_t entries, int64_t fixed, char *memory, Room *room);

void icecache_begin_row(const Step *step, int64_t row, Room *room);
void icecache_score_block(const Step *step, int64_t row, int64_t block, Room *room);
void icecache_open_row(const Step *step, int64_t row, Room *room);
int icecache_select_row(const Step *step, int64_t row, Room *room); /* -1 without memory */
void icecache_add_block(const Step *step, int64_t row, int64_t block, Room *room);
void icecache_finish_row(const Step *step, int64_t row, Room *room);

static inline int64_t num_blocks(int64_t entries) { return (entries + BLOCK - 1) / BLOCK; }

/* Entries of a level that are looked at: 0 while it is another's turn. */
static inline int64_t to_score(const Room *room, int64_t level) {
    return room->found.at_level == level ? room->found.num - room->found.num_far : 0;
}

#endif
