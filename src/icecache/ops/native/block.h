/* What a decoder block does between two attentions. */
#ifndef ICECACHE_BLOCK_H
#define ICECACHE_BLOCK_H

#include "forward.h"

/* Tokens to hidden states. */
void icecache_embed(const Forward *f);
/* Hidden states to query, key and value, normed and rotated. */
void icecache_enter_block(const Forward *f, const Block *b, const Hands *hands);
/* What was attended to hidden states. */
void icecache_leave_block(const Forward *f, const Block *b, const Hands *hands);
/* Hidden states to logits. */
void icecache_predict(const Forward *f, const Hands *hands);

#endif
