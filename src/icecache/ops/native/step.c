/* One sparse decode step of one layer. Plain C without Python's headers, loaded by ctypes. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "decode.h"
#include "layer.h"
#include "remainder.h"
#include "row.h"
#include "vector.h"

/* Of all rows: from which on a second thread is worth waking. */
#define LEAST_ENTRIES 1024
/* Of one row: from which on threads share it rather than wait for the one that has it. */
#define LEAST_SHARED 4096

static int64_t this_thread(void) {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* Rows by the threads that are at hand: each a row, and all together those that are left over. */
typedef struct {
    Step step;
    const Then *then;
    uint8_t *attended; /* [rows], until a thread takes the row up again */
    Room *rooms; /* [num_rooms], of rows where there is one for each, else of threads */
    int64_t num_rooms, alone, shared, descends;
    int64_t blocks, sums; /* of a shared row at most */
    int64_t nodes, leaves, failed;
} Work;

static void count(Work *w, const Room *room) {
#if defined(_OPENMP)
#pragma omp atomic
#endif
    w->nodes += room->found.nodes_scored;
#if defined(_OPENMP)
#pragma omp atomic
#endif
    w->leaves += room->found.num - room->found.num_far;
}

static void fail(Work *w) {
#if defined(_OPENMP)
#pragma omp atomic
#endif
    w->failed++;
}

static void attend_row(Work *w, int64_t row) {
    const Step *step = &w->step;
    Room *room = w->rooms + (w->num_rooms < step->shape->rows ? this_thread() : row);
    icecache_begin_row(step, row, room);
    for (int64_t level = 1; level >= 0; level--) {
        for (int64_t block = 0; block < num_blocks(room->found.num); block++)
            icecache_score_block(step, row, level, block, room);
        if (level) icecache_open_row(step, row, room);
    }
    count(w, room);
    if (icecache_select_row(step, row, room)) {
        fail(w);
        return;
    }
    if (!step->result->out) return;
    for (int64_t block = 0; block < num_added(room->found.num_kept); block++)
        icecache_add_block(step, row, block, room);
    icecache_finish_row(step, row, room);
}

/* Score what the shared rows look at, a block a time. */
static void score_shared(Work *w, int64_t level) {
#if defined(_OPENMP)
#pragma omp for schedule(static, 1)
#endif
    for (int64_t part = 0; part < w->shared * w->blocks; part++) {
        int64_t i = part / w->blocks;
        icecache_score_block(&w->step, w->alone + i, level, part % w->blocks, w->rooms + i);
    }
}

static void mark_attended(Work *w, int64_t row) {
    if (w->then) __atomic_store_n(w->attended + row, 1, __ATOMIC_RELEASE);
}

/* Do what comes then with all rows that were attended meanwhile: who has nothing left to attend need
 * not wait for the others. Each row that nobody took up is taken up by the thread that attended it. */
static void go_on(Work *w) {
    for (int64_t row = 0; w->then && row < w->step.shape->rows; row++)
        if (__atomic_exchange_n(w->attended + row, 0, __ATOMIC_ACQ_REL))
            w->then->call(w->then->data, row);
}

/* Every loop ends with all threads waiting for each other: the parts of a row are in order. */
static void attend_shared(Work *w) {
    const Step *step = &w->step;
#if defined(_OPENMP)
#pragma omp for schedule(static, 1)
#endif
    for (int64_t i = 0; i < w->shared; i++) icecache_begin_row(step, w->alone + i, w->rooms + i);
    if (w->descends) {
        score_shared(w, 1);
#if defined(_OPENMP)
#pragma omp for schedule(static, 1)
#endif
        for (int64_t i = 0; i < w->shared; i++) icecache_open_row(step, w->alone + i, w->rooms + i);
    }
    score_shared(w, 0);
#if defined(_OPENMP)
#pragma omp for schedule(static, 1)
#endif
    for (int64_t i = 0; i < w->shared; i++) {
        count(w, w->rooms + i);
        if (icecache_select_row(step, w->alone + i, w->rooms + i)) fail(w);
    }
    if (w->failed || !step->result->out) return;
#if defined(_OPENMP)
#pragma omp for schedule(static, 1)
#endif
    for (int64_t part = 0; part < w->shared * w->sums; part++) {
        int64_t i = part / w->sums;
        icecache_add_block(step, w->alone + i, part % w->sums, w->rooms + i);
    }
#if defined(_OPENMP)
#pragma omp for schedule(static, 1)
#endif
    for (int64_t i = 0; i < w->shared; i++) {
        icecache_finish_row(step, w->alone + i, w->rooms + i);
        mark_attended(w, w->alone + i);
    }
}

static void attend_rows(Work *w, int64_t threads) {
#if defined(_OPENMP)
#pragma omp parallel num_threads((int)threads) if (threads > 1)
#else
    (void)threads;
#endif
    {
#if defined(_OPENMP)
#pragma omp for schedule(dynamic) nowait
#endif
        for (int64_t row = 0; row < w->alone; row++) {
            attend_row(w, row);
            mark_attended(w, row);
        }
        if (w->shared) attend_shared(w);
        go_on(w);
    }
}

static int64_t most_fixed(const Step *step) {
    int64_t most = 0;
    for (int64_t row = 0; row < step->shape->rows; row++) {
        int64_t fixed = 0;
        for (int64_t i = 0; i < step->num_segments; i++) fixed += step->segments[i].len[row];
        most = fixed > most ? fixed : most;
    }
    return most;
}

/* All rooms in one piece of memory, to be freed; null without memory. */
static Room *make_rooms(const Step *step, int64_t entries, int64_t num) {
    int64_t fixed = most_fixed(step), bytes = icecache_room_bytes(step->shape, entries, fixed);
    int64_t listed = (num * (int64_t)sizeof(Room) + 63) & ~(int64_t)63;
    Room *rooms = malloc((size_t)(listed + bytes * num));
    for (int64_t i = 0; rooms && i < num; i++)
        icecache_make_room(step->shape, entries, fixed, (char *)rooms + listed + i * bytes,
                           rooms + i);
    return rooms;
}

int icecache_sparse_step_then(const Shape *s, const Tree *tree, const Pages *pages,
                              const Segment *segments, int64_t num_segments, const float *query,
                              const float *sink_logits, int64_t threads, Result *result,
                              const Then *then) {
    if (!tree)
        return icecache_dense_step(s, segments, num_segments, query, sink_logits, threads, result);
    int64_t entries = icecache_most_entries(s, tree);
    /* all threads or one: a smaller team would end those that it does not need */
    if (entries * s->rows < LEAST_ENTRIES) threads = 1;
    Work w = {.step = {s, tree, pages, segments, num_segments, query, sink_logits, {0}, result},
              .then = then,
              .num_rooms = threads < s->rows ? threads : s->rows,
              .shared = entries < LEAST_SHARED ? 0 : s->rows % threads,
              .descends = icecache_descends(s, tree),
              .blocks = num_blocks(entries),
              .sums = num_added(entries)};
    w.alone = s->rows - w.shared;
    int64_t logs = w.descends ? LOGS - 1 : s->leaf_size;
    for (int64_t i = 1; i <= logs && i < LOGS; i++) w.step.log_of[i] = logf((float)i);
    w.rooms = make_rooms(&w.step, entries, w.num_rooms);
    w.attended = calloc((size_t)s->rows, 1);
    if (w.rooms && w.attended) attend_rows(&w, threads);
    else fail(&w);
    free(w.attended);
    free(w.rooms);
    result->nodes_scored = w.nodes;
    result->leaves_scored = w.leaves;
    return w.failed ? -1 : 0;
}

EXPORT int icecache_sparse_step(const Shape *s, const Tree *tree, const Pages *pages,
                                const Segment *segments, int64_t num_segments, const float *query,
                                const float *sink_logits, int64_t threads, Result *result) {
    return icecache_sparse_step_then(s, tree, pages, segments, num_segments, query, sink_logits,
                                     threads, result, 0);
}

/* Sizes of the structures that Python mirrors; a library of another version has others. */
EXPORT int64_t icecache_layout(void) {
    int64_t sizes[] = {sizeof(Shape), sizeof(Level), sizeof(Tree), sizeof(Pages), sizeof(Segment),
                       sizeof(Result), sizeof(Decode)};
    int64_t all = 8;
    for (int i = 0; i < 7; i++) all = all * 131 + sizes[i];
    return all;
}

/* Setuptools' linkers ask for a module's entry point; this library is loaded by ctypes. */
EXPORT void *PyInit__native(void) { return 0; }
