"""How fast a run trains, told soon after it has begun."""

from types import SimpleNamespace

import pytest

from ogdm_jax.training import logs

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("seconds", "after", "speed"),
    [
        ([20, 1, 1], 1, (1, 1, 20)),  # one very slow step is all there is
        ([4, 1], 2, (2, 2, 1)),
        ([0.3] * 8, 8, (5, 8, 0.3)),
        ([0.001] * 4096, 2048, (1025, 2048, 0.001)),
    ],
)
def test_the_first_speed_is_that_of_the_newer_steps(monkeypatch, seconds, after, speed):
    clock, waits, found = [0.0], [], []
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(logs.jax, "block_until_ready", waits.append)
    interval = logs.Interval()
    for each in seconds[:after]:
        clock[0] += each
        interval.add({})
        found.append(interval.first_speed(None))
    assert found[:-1] == [None] * (after - 1)
    assert found[-1] == (*speed[:2], pytest.approx(speed[2]))
    assert len(waits) == after.bit_length()  # the device is waited for as rarely as that
