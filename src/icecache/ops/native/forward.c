/* One decode step of a whole model in one call: blocks with their attention, from token ids to
 * logits. What a cache lacks on the way (a page, room) is Python's to give, as in decode.c.
 *
 * The plain twin is the model itself.
 */
#include "forward.h"

#include <string.h>

#include "block.h"
#include "vector.h"

int icecache_decode(Decode *d, int64_t *row, Answer *answer);

typedef struct {
    const Forward *forward;
    Place *at;
    Answer *answer;
    int status;
} Call;

static void watch(const Forward *f, const Place *at) {
    int64_t rows = f->batch / f->num_caches, size = f->dtype == FLOAT32 ? 4 : 2;
    int64_t bytes = rows * f->num_heads * f->head_dim * size;
    if (!f->watched || f->watched[at->cache] != at->block) return;
    memcpy((char *)f->watched_query + at->cache * bytes, (const char *)f->query + at->cache * bytes,
           (size_t)bytes);
}

/* Let the caches of a block take their tokens in, and attend. */
static int attend(const Forward *f, Team *team, Place *at, Answer *answer) {
    for (; at->cache < f->num_caches; at->cache++, at->row = -1) {
        Decode *decode = f->blocks[at->block].decodes[at->cache];
        if (!decode) continue;
        watch(f, at);
        decode->team = team;
        int status = icecache_decode(decode, &at->row, answer);
        decode->team = 0;
        if (status) return status;
    }
    return 0;
}

static void run(void *work, Team *team) {
    Call *call = work;
    const Forward *f = call->forward;
    Place *at = call->at;
    Hands hands = {team, 1};
    if (at->block < 0) {
        icecache_embed(f);
        icecache_enter_block(f, f->blocks, &hands);
        *at = (Place){0, 0, -1};
    }
    while (at->block < f->num_blocks) {
        call->status = attend(f, team, at, call->answer);
        if (call->status) return;
        icecache_leave_block(f, f->blocks + at->block, &hands);
        *at = (Place){at->block + 1, 0, -1};
        if (at->block < f->num_blocks) icecache_enter_block(f, f->blocks + at->block, &hands);
    }
    icecache_predict(f, &hands);
}

/* `at.block` is -1; or, after STOPPED, `at` is as it was left, when that row of that cache has got
 * what `answer` says that it lacked. Returns ATTENDED with `at` behind the last block; or what
 * icecache_decode says of that cache of that block: what comes before it has taken its token in. To
 * go on without that cache, take it out of all blocks and go to the next one, with a row of -1. */
EXPORT int icecache_forward(Forward *f, Place *at, Answer *answer) {
    Call call = {f, at, answer, 0};
    icecache_lead(f->threads, run, &call);
    return call.status;
}

/* As icecache_layout in step.c. */
EXPORT int64_t icecache_forward_layout(void) {
    int64_t sizes[] = {sizeof(Linear), sizeof(Norm), sizeof(Block), sizeof(Forward),
                       sizeof(Place)},
            all = 1;
    for (int i = 0; i < 5; i++) all = all * 131 + sizes[i];
    return all;
}
