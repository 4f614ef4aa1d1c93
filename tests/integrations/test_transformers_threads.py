"""The threads of a cache: few at a time, ended with it."""

import threading

from icecache.integrations.transformers.threads import Threads


def test_a_task_more_than_workers_waits_for_room() -> None:
    threads, go = Threads(), threading.Event()
    executor = threads.executor()
    workers = executor._max_workers
    for _ in range(workers + 1):
        executor.submit(go.wait, 30)
    submitted = threading.Event()

    def one_more() -> None:
        executor.submit(go.wait, 30)
        submitted.set()

    thread = threading.Thread(target=one_more)
    thread.start()
    assert not submitted.wait(0.2), "the queue is full"
    go.set()
    assert submitted.wait(30)
    thread.join(30)
    threads.close()


def test_closing_ends_the_threads_and_a_later_use_makes_new_ones() -> None:
    threads = Threads()
    first = threads.executor()
    assert threads.executor() is first
    assert first.submit(threading.get_ident).result(30) != threading.get_ident()
    threads.close()
    threads.close()
    assert threads.executor() is not first
    threads.close()
