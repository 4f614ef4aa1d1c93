/* Threads that share one piece of work after another without waiting for those who are late: on a
 * machine with other work a thread may be away for milliseconds, as long as a whole step takes. */
#ifndef ICECACHE_TEAM_H
#define ICECACHE_TEAM_H

#include <stdint.h>

typedef struct Team Team;

/* What members do of a piece of work: take parts of it until none is left to take. Whoever comes
 * when all is taken does nothing. `member` counts from 0. */
typedef void Share(void *work, int64_t member);

/* Who works: a team, or, without one, so many threads. */
typedef struct {
    Team *team;
    int64_t threads;
} Hands;

/* Let all who are at hand share a piece of work; back when it is done. */
void icecache_share(const Hands *hands, Share *share, void *work);

/* Call `lead` with a team of `threads`, who share what it gives to icecache_share. */
void icecache_lead(int64_t threads, void (*lead)(void *work, Team *team), void *work);

/* Wait a moment; now and then let others have the processor. `waits` is 0 at first. */
void icecache_rest(int64_t *waits);

#endif
