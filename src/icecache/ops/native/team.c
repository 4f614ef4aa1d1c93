#include "team.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#define HAS_YIELD
#endif

/* `job` is odd while there is work, and another number for each piece of it. */
struct Team {
    Share *share;
    void *work;
    int64_t job, inside, is_over;
};

void icecache_rest(int64_t *waits) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_ia32_pause();
#endif
#if defined(HAS_YIELD)
    if (++*waits % 1024 == 0) sched_yield();
#else
    (void)waits;
#endif
}

#if defined(_OPENMP)
#define NOW(x) __atomic_load_n(&(x), __ATOMIC_SEQ_CST)

static void set_job(Team *t, int64_t job) { __atomic_store_n(&t->job, job, __ATOMIC_SEQ_CST); }

/* A member says that it is inside before it looks whether the work is still there, and who leads
 * ends the work before it looks who is inside: one of the two sees the other. */
static void follow(Team *t, int64_t member) {
    int64_t seen = 0, waits = 0;
    while (!NOW(t->is_over)) {
        int64_t job = NOW(t->job);
        if (job == seen || job % 2 == 0) {
            icecache_rest(&waits);
            continue;
        }
        __atomic_fetch_add(&t->inside, 1, __ATOMIC_SEQ_CST);
        if (NOW(t->job) == job) t->share(t->work, member);
        __atomic_fetch_sub(&t->inside, 1, __ATOMIC_SEQ_CST);
        seen = job;
    }
}

static void share_in_team(Team *t, Share *share, void *work) {
    t->share = share;
    t->work = work;
    set_job(t, t->job + 1);
    share(work, 0);
    set_job(t, t->job + 1);
    for (int64_t waits = 0; NOW(t->inside);) icecache_rest(&waits);
}
#endif

void icecache_share(const Hands *hands, Share *share, void *work) {
#if defined(_OPENMP)
    if (hands->team) {
        share_in_team(hands->team, share, work);
        return;
    }
#pragma omp parallel num_threads((int)hands->threads) if (hands->threads > 1)
    share(work, omp_get_thread_num());
#else
    (void)hands;
    share(work, 0);
#endif
}

void icecache_lead(int64_t threads, void (*lead)(void *work, Team *team), void *work) {
#if defined(_OPENMP)
    Team team = {0};
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        if (omp_get_thread_num() > 0) {
            follow(&team, omp_get_thread_num());
        } else {
            lead(work, threads > 1 ? &team : 0);
            __atomic_store_n(&team.is_over, 1, __ATOMIC_SEQ_CST);
        }
    }
#else
    (void)threads;
    lead(work, 0);
#endif
}
