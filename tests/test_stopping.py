"""Ctrl-C in a command: one word and the exit code that shells give it, never a traceback."""

import signal

import pytest

from ogdm_jax import cli, startup

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def _handler():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_is_one_word_and_a_second_one_ends_the_process(capsys):
    with pytest.raises(SystemExit) as left, startup.one_sentence():
        raise KeyboardInterrupt
    assert left.value.code == 130 and capsys.readouterr().err == "stopped\n"
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_an_interrupt_while_a_command_is_read(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupted)
    assert cli.main(["sample"]) == 130 and capsys.readouterr().err == "stopped\n"
