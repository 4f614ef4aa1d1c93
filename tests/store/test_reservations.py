"""Host memory set aside by name: never more than the limit, and given back."""

import pytest

from icecache.errors import ConfigError, InputError
from icecache.store.reservations import Reservations


def test_requests_fit_while_there_is_room() -> None:
    kept = Reservations(100, lambda tokens: 10 * tokens, longest=8)
    for name, tokens in (("a", 6), ("b", 5), ("c", 4)):
        kept.expect(name, tokens)
    kept.take("a")
    assert [kept.fits(name) for name in "abc"] == [True, False, True]
    kept.take("c")
    kept.take("c")
    assert (kept.reserved, kept.num_known) == (100, 3)
    kept.give_back("a")
    assert kept.fits("b") and kept.fits("a")
    kept.forget("c")
    kept.forget("never seen")
    assert (kept.reserved, kept.num_known) == (0, 2)
    with pytest.raises(InputError, match="request c must be announced"):
        kept.fits("c")


@pytest.mark.parametrize("limit", [79, -1, True, "80", 80.0])
def test_the_longest_request_must_fit_alone(limit: object) -> None:
    with pytest.raises(ConfigError, match="max_host_memory must be an integer of at least 80"):
        Reservations(limit, lambda tokens: 10 * tokens, longest=8)  # type: ignore[arg-type]
    assert Reservations(80, lambda tokens: 10 * tokens, longest=8).limit == 80


def test_a_default_limit_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icecache.store.reservations.available_host_bytes", lambda: 1000)
    assert Reservations(None, lambda tokens: tokens, longest=9, sharers=2).limit == 250
    monkeypatch.setattr("icecache.store.reservations.available_host_bytes", lambda: None)
    assert Reservations(None, lambda tokens: tokens, longest=9).limit == 1 << 62
