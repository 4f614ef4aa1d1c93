/* One decode step of a whole model in one call: blocks with their attention, from token ids to
 * logits. What a cache lacks on the way (a page, room) is Python's to give, as in decode.c.
 *
 * The plain twin is the model itself.
 */
#include "forward.h"

#include "block.h"
#include "vector.h"

int icecache_decode(Decode *d, int64_t *row, Answer *answer);

typedef struct {
    const Forward *forward;
    int64_t *block, *row;
    Answer *answer;
    int status;
} Call;

/* Let a block's cache take the token in, and attend. */
static int attend(const Forward *f, Team *team, int64_t block, int64_t *row, Answer *answer) {
    Decode *decode = f->blocks[block].decode;
    decode->team = team;
    int status = icecache_decode(decode, row, answer);
    decode->team = 0;
    return status;
}

static void run(void *work, Team *team) {
    Call *call = work;
    const Forward *f = call->forward;
    int64_t *block = call->block;
    Hands hands = {team, 1};
    if (*block < 0) {
        icecache_embed(f);
        icecache_enter_block(f, f->blocks, &hands);
        *block = 0;
    }
    while (*block < f->num_blocks) {
        call->status = attend(f, team, *block, call->row, call->answer);
        if (call->status) return;
        icecache_leave_block(f, f->blocks + *block, &hands);
        *call->row = -1;
        if (++*block < f->num_blocks) icecache_enter_block(f, f->blocks + *block, &hands);
    }
    icecache_predict(f, &hands);
}

/* `block` and `row` are -1; or, after STOPPED, as they were left, when that row of that block's
 * cache has got what `answer` says that it lacked. Returns ATTENDED with `block` behind the last; or
 * what icecache_decode says of `block`, and blocks before it have taken the token in. */
EXPORT int icecache_forward(Forward *f, int64_t *block, int64_t *row, Answer *answer) {
    Call call = {f, block, row, answer, 0};
    icecache_lead(f->threads, run, &call);
    return call.status;
}

/* As icecache_layout in step.c. */
EXPORT int64_t icecache_forward_layout(void) {
    int64_t sizes[] = {sizeof(Linear), sizeof(Norm), sizeof(Block), sizeof(Forward)}, all = 1;
    for (int i = 0; i < 4; i++) all = all * 131 + sizes[i];
    return all;
}
