/* One sparse decode step of one layer. Plain C without Python's headers, loaded by ctypes. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "decode.h"
#include "layer.h"
#include "remainder.h"
#include "row.h"
#include "vector.h"

/* Of all rows: from which on a second thread is worth waking. */
#define LEAST_ENTRIES 1024
/* Of one row: from which on threads share it rather than wait for the one that has it. */
#define LEAST_SHARED 4096

/* A row that threads share goes through stages of blocks, each for whoever is at hand. */
enum { NODES, LEAVES, VALUES, STAGES };

typedef struct {
    int64_t num, next, done; /* blocks: in all, to be taken, finished */
    int32_t is_open;
} Stage;

/* Rows by the threads that are at hand: each a row, and all together those that are left over. */
typedef struct {
    Step step;
    const Then *then;
    uint8_t *attended; /* [rows], until a thread takes the row up again */
    Room *rooms; /* of the shared rows, which come first; then of threads, or of a row each */
    Stage (*stages)[STAGES]; /* [shared] */
    int64_t shared, threads, next; /* next: the first row that nobody has taken */
    int64_t nodes, leaves, failed;
} Work;

#define ADD(to, what) __atomic_fetch_add(&(to), what, __ATOMIC_ACQ_REL)

static void count(Work *w, const Room *room) {
    ADD(w->nodes, room->found.nodes_scored);
    ADD(w->leaves, room->found.num - room->found.num_far);
}

static void fail(Work *w) { ADD(w->failed, 1); }

static void mark_attended(Work *w, int64_t row) {
    if (w->then) __atomic_store_n(w->attended + row, 1, __ATOMIC_RELEASE);
}

/* Do what comes then with all rows that were attended meanwhile: who has nothing to attend need not
 * wait for the others. Each row that nobody took up is taken up by the thread that attended it. */
static void go_on(Work *w) {
    for (int64_t row = 0; w->then && row < w->step.shape->rows; row++)
        if (__atomic_exchange_n(w->attended + row, 0, __ATOMIC_ACQ_REL))
            w->then->call(w->then->data, row);
}

static void attend_row(Work *w, int64_t row, int64_t member) {
    const Step *step = &w->step;
    int64_t at = step->shape->rows - w->shared > w->threads ? member : row - w->shared;
    Room *room = w->rooms + w->shared + at;
    icecache_begin_row(step, row, room);
    for (int64_t block = 0; block < num_blocks(to_score(room, 1)); block++)
        icecache_score_block(step, row, block, room);
    icecache_open_row(step, row, room);
    for (int64_t block = 0; block < num_blocks(to_score(room, 0)); block++)
        icecache_score_block(step, row, block, room);
    count(w, room);
    if (icecache_select_row(step, row, room)) {
        fail(w);
        return;
    }
    if (!step->result->out) return;
    for (int64_t block = 0; block < num_added(room->found.num_kept); block++)
        icecache_add_block(step, row, block, room);
    icecache_finish_row(step, row, room);
    mark_attended(w, row);
}

static void end_stage(Work *w, int64_t row, int stage);

/* Let threads have the blocks of a stage. */
static void open_stage(Work *w, int64_t row, int stage, int64_t num) {
    Stage *s = w->stages[row] + stage;
    s->num = num;
    __atomic_store_n(&s->is_open, 1, __ATOMIC_RELEASE);
    if (num == 0) end_stage(w, row, stage);
}

/* What one thread does alone between two stages. */
static void end_stage(Work *w, int64_t row, int stage) {
    const Step *step = &w->step;
    Room *room = w->rooms + row;
    if (stage == NODES) {
        icecache_open_row(step, row, room);
        open_stage(w, row, LEAVES, num_blocks(to_score(room, 0)));
    } else if (stage == LEAVES) {
        count(w, room);
        int has_failed = icecache_select_row(step, row, room);
        if (has_failed) fail(w);
        if (has_failed || !step->result->out) room->found.num_kept = 0;
        open_stage(w, row, VALUES, num_added(room->found.num_kept));
    } else if (step->result->out) {
        icecache_finish_row(step, row, room);
        mark_attended(w, row);
    }
}

/* Begin a shared row; score its nodes, too, where other threads have rows of their own. */
static void begin_shared(Work *w, int64_t row) {
    Room *room = w->rooms + row;
    icecache_begin_row(&w->step, row, room);
    int64_t blocks = num_blocks(to_score(room, 1));
    if (w->shared == w->step.shape->rows) {
        open_stage(w, row, NODES, blocks);
        return;
    }
    for (int64_t block = 0; block < blocks; block++)
        icecache_score_block(&w->step, row, block, room);
    open_stage(w, row, NODES, 0);
}

/* Take blocks of a stage until there are none; what others have taken is theirs to finish. */
static void share_stage(Work *w, int64_t row, int stage) {
    Stage *s = w->stages[row] + stage;
    for (int64_t waits = 0; !__atomic_load_n(&s->is_open, __ATOMIC_ACQUIRE);) {
        go_on(w);
        icecache_rest(&waits);
    }
    for (int64_t block; (block = ADD(s->next, 1)) < s->num;) {
        if (stage == VALUES) icecache_add_block(&w->step, row, block, w->rooms + row);
        else icecache_score_block(&w->step, row, block, w->rooms + row);
        if (ADD(s->done, 1) + 1 == s->num) end_stage(w, row, stage);
    }
}

/* The shared rows are begun first, so that their blocks are there when threads run out of rows. */
static void attend_rows(void *work, int64_t member) {
    Work *w = work;
    for (int64_t row; (row = ADD(w->next, 1)) < w->step.shape->rows;) {
        if (row < w->shared) begin_shared(w, row);
        else attend_row(w, row, member);
    }
    for (int stage = 0; stage < STAGES; stage++)
        for (int64_t row = 0; row < w->shared; row++) share_stage(w, row, stage);
    go_on(w);
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

/* Rooms and stages in one piece of memory, to be freed; null without memory. */
static void *make_rooms(Work *w, int64_t entries) {
    const Shape *s = w->step.shape;
    int64_t alone = s->rows - w->shared, num = w->shared + (alone < w->threads ? alone : w->threads);
    int64_t fixed = most_fixed(&w->step), bytes = icecache_room_bytes(s, entries, fixed);
    int64_t staged = w->shared * (int64_t)sizeof(*w->stages) + s->rows;
    int64_t listed = (num * (int64_t)sizeof(Room) + staged + 63) & ~(int64_t)63;
    char *memory = malloc((size_t)(listed + bytes * num));
    if (!memory) return 0;
    w->rooms = (Room *)memory;
    w->stages = (Stage(*)[STAGES])(w->rooms + num);
    w->attended = (uint8_t *)(w->stages + w->shared);
    memset(w->stages, 0, (size_t)staged);
    for (int64_t i = 0; i < num; i++)
        icecache_make_room(s, entries, fixed, memory + listed + i * bytes, w->rooms + i);
    return memory;
}

int icecache_sparse_step_then(const Shape *s, const Tree *tree, const Pages *pages,
                              const Segment *segments, int64_t num_segments, const float *query,
                              const float *sink_logits, Hands hands, Result *result,
                              const Then *then) {
    if (!tree)
        return icecache_dense_step(s, segments, num_segments, query, sink_logits, hands, result);
    int64_t entries = icecache_most_entries(s, tree);
    /* all threads or one: a smaller team would end those that it does not need */
    if (entries * s->rows < LEAST_ENTRIES) hands = (Hands){0, 1};
    Work w = {.step = {s, tree, pages, segments, num_segments, query, sink_logits, {0}, result},
              .then = then,
              .shared = entries < LEAST_SHARED ? 0 : s->rows % hands.threads,
              .threads = hands.threads};
    int64_t logs = icecache_descends(s, tree) ? LOGS - 1 : s->leaf_size;
    for (int64_t i = 1; i <= logs && i < LOGS; i++) w.step.log_of[i] = logf((float)i);
    void *memory = make_rooms(&w, entries);
    if (!memory) return -1;
    icecache_share(&hands, attend_rows, &w);
    free(memory);
    result->nodes_scored = w.nodes;
    result->leaves_scored = w.leaves;
    return w.failed ? -1 : 0;
}

EXPORT int icecache_sparse_step(const Shape *s, const Tree *tree, const Pages *pages,
                                const Segment *segments, int64_t num_segments, const float *query,
                                const float *sink_logits, int64_t threads, Result *result) {
    return icecache_sparse_step_then(s, tree, pages, segments, num_segments, query, sink_logits,
                                     (Hands){0, threads}, result, 0);
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
