"""Laws of the door to configuration: nothing is ignored, nothing is guessed, and the nearest right name is said."""

import dataclasses
from typing import Any

import pytest
from ml_collections import ConfigDict

from hunyuan_jax.errors import UserError
from hunyuan_jax.settings import build


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oven:
    temperature: float
    minutes: int = 10
    trays: tuple[Any, ...] = ()
    names: Any = dataclasses.field(default_factory=dict)


def test_a_section_becomes_the_dataclass():
    section = ConfigDict({"temperature": 180.0, "trays": [[1, 2], [3]], "names": {"cake": [1]}})
    assert build(Oven, section, where="oven") == Oven(temperature=180.0, trays=((1, 2), (3,)), names={"cake": (1,)})


def test_an_unknown_key_is_refused_with_the_nearest_right_one():
    with pytest.raises(UserError, match=r"oven\.temprature is not known. Did you mean 'temperature'\?"):
        build(Oven, {"temprature": 180.0}, where="oven")


def test_an_unknown_key_near_to_nothing_is_refused_with_all_right_ones():
    with pytest.raises(UserError, match="Known: minutes, names, temperature, trays"):
        build(Oven, {"temperature": 1.0, "xyz": 1}, where="oven")


def test_a_missing_key_is_refused():
    with pytest.raises(UserError, match=r"oven\.temperature is missing"):
        build(Oven, {"minutes": 1}, where="oven")


def test_what_the_dataclass_refuses_is_refused():
    with pytest.raises(UserError, match="wrong type"):
        build(_Checked, {"size": "large"}, where="oven")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Checked:
    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError("size")
