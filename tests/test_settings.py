"""Settings are declared once: default, help, limits; every wrong value is one sentence."""

import dataclasses

import pytest

from ogdm_jax.config import ConfigError, check, parse, setting

pytestmark = pytest.mark.fast


@dataclasses.dataclass(frozen=True)
class Settings:
    rate: float = setting(0.2, "guidance rate", least=0, most=1)
    every: int = setting(1, "steps between two", least=1)
    scale: float = setting(1.0, "scale", above=0)
    kind: str = setting("a", "kind", choices=("a", "b"))
    betas: tuple[float, float] = setting(
        (0.9, 0.999), "of Adam", least=0, below=1, expected="two numbers in [0, 1)"
    )
    peak: float | None = setting(None, "open", above=0)
    flag: bool = setting(False, "switch")

    def __post_init__(self) -> None:
        check(self, "dsg")


@pytest.mark.parametrize(
    "given,sentence",
    [
        ({"rate": 2.0}, "config.dsg.rate: 2.0 given; expected a number from 0 to 1"),
        ({"every": 0}, "config.dsg.every: 0 given; expected a whole number of at least 1"),
        ({"scale": 0.0}, "config.dsg.scale: 0.0 given; expected a positive number"),
        ({"scale": float("nan")}, "config.dsg.scale: nan given; expected a number"),
        ({"kind": "c"}, "config.dsg.kind: unknown 'c'; expected one of a, b"),
        ({"betas": (0.9, 1.0)}, "config.dsg.betas: (0.9, 1.0) given; expected two numbers in"),
        ({"betas": ("x", 0.1)}, "config.dsg.betas: ('x', 0.1) has entries of another type"),
        ({"every": 1.5}, "config.dsg.every: 1.5 is of another type; expected int such as 1"),
        ({"every": True}, "config.dsg.every: True is of another type"),
        ({"flag": 1}, "config.dsg.flag: 1 is of another type; expected bool such as False"),
        ({"peak": -1.0}, "config.dsg.peak: -1.0 given; expected a positive number"),
        ({"rate": None}, "config.dsg.rate: None given; expected a number from 0 to 1"),
    ],
)
def test_a_wrong_value_is_one_sentence(given, sentence):
    with pytest.raises(ConfigError) as error:
        Settings(**given)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_right_values_become_the_field_s_type():
    settings = Settings(rate=1, betas=[0.5, 0.9], peak=2)
    assert settings.rate == 1.0 and isinstance(settings.rate, float)
    assert settings.betas == (0.5, 0.9) and isinstance(settings.peak, float)
    assert Settings().peak is None


def test_text_is_read_as_the_type_of_the_default():
    assert parse("dsg.every", "3", 1) == 3 and parse("dsg.flag", "true", False) is True
    with pytest.raises(ConfigError, match="^--dsg.every: 'x' is of another type; expected int"):
        parse("dsg.every", "x", 1, prefix="--")
