"""train.py --profile FIRST,LAST: which steps are traced, and which words are refused.
test_places.py writes a trace.
"""

import jax
import pytest

from ogdm_jax import places
from ogdm_jax.config import ConfigError
from ogdm_jax.training import profile
from tests.support import tiny
from tests.support.commands import entry


@pytest.mark.parametrize(
    "text", ["5", "5,3", "0,2", "-1,3", "a,b", "1,2,3", "1.5,2", ",", "1," + "9" * 13]
)
def test_what_is_no_range_is_refused(text):
    with pytest.raises(
        ConfigError, match="--profile: .* given; expected FIRST,LAST with 1 <= FIRST <= LAST"
    ):
        profile.parse(text)


def test_ranges_are_read():
    assert (
        profile.parse("") is None
        and profile.parse("3,3") == (3, 3)
        and profile.parse("10, 12") == (10, 12)
    )
    profile.check(None, 5)
    profile.check((2, 5), 5)


def test_train_refuses_steps_that_never_come(tmp_path):
    for words, sentence in (
        ("5,3", "expected FIRST,LAST"),
        ("4,6", "expected steps up to 5, where the run ends"),
    ):
        flags = tiny.flags(*tiny.SMALLEST, "methods=", "train.duration=5 steps")
        done = entry(tmp_path, "train.py", "--workdir", "run", "--profile", words, *flags)
        assert (
            done.returncode == 1
            and done.stdout.count("\n") == done.stdout.count("without effect")
            and done.stderr.startswith("error: --profile: ")
        ), done
        assert (
            sentence in done.stderr
            and done.stderr.count("\n") == 1
            and not (tmp_path / "run").exists()
        )


@pytest.fixture
def calls(monkeypatch):
    """What is asked of jax.profiler."""
    made = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: made.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append("stop"))
    return made


@pytest.mark.parametrize(
    "first,last,traced,said",
    [
        (1, 9, [3, 4, 5], "profiled steps 3 to 5"),
        (4, 9, [4, 5], "profiled steps 3 to 5"),  # resumed among them: what is left of them
        (6, 9, [], "lie before step 5; none is traced"),
        (1, 4, [3], ""),  # stopped among them: the trace is closed
    ],
)
def test_the_steps_from_first_to_last_are_traced(first, last, traced, said, calls, tmp_path):
    lines, inside = [], []
    with profile.Profiler((3, 5), places.place(tmp_path), lines.append) as profiler:
        profiler.skipped(first - 1)
        for step in range(first, last):
            profiler.before(step)
            if calls[-1:] == [str(tmp_path / "profile")]:
                inside.append(step)
            profiler.after(step, ())
    assert inside == traced and said in " ".join(lines)
    assert calls == ([str(tmp_path / "profile"), "stop"] if traced else [])


def test_without_the_flag_nothing_is_traced(calls, tmp_path):
    with profile.Profiler(None, places.place(tmp_path), print) as profiler:
        profiler.skipped(3)
        profiler.before(1)
        profiler.after(1, ())
    assert not calls
