"""Settings from dictionaries and flags: types, nesting, round trips."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from driftar.settings import (
    add_flags,
    apply_overrides,
    differing_settings,
    flags_of,
    from_mapping,
    to_mapping,
)


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1  # how fast
    sizes: tuple[int, ...] = (1, 2)
    names: tuple[str, ...] = ("a",)
    limits: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    mode: Literal["fast", "slow"] = "fast"
    deep: bool = False
    label: str = "x"


def parse(*arguments: str) -> Outer:
    parser = argparse.ArgumentParser()
    add_flags(parser, Outer)
    return apply_overrides(Outer(), flags_of(parser.parse_args(arguments)))


def test_flags_reach_every_type() -> None:
    config = parse(
        *("--inner.rate", "1e-3", "--inner.sizes", "4,5,6", "--inner.names", "b,c"),
        *("--inner.limits", "1,2e-1", "--mode", "slow", "--deep", "true", "--label", "100"),
    )
    inner = Inner(0.001, (4, 5, 6), ("b", "c"), (1.0, 0.2))
    assert config == Outer(inner, "slow", True, "100")
    assert from_mapping(Outer, to_mapping(config)) == config
    assert parse("--inner.limits", "none") == Outer()


def test_help_shows_the_comment_and_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    assert "how fast (default: 0.1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ("--inner.rate", "fast"),
        ("--inner.rate", "inf"),
        ("--inner.sizes", "1,b"),
        ("--mode", "medium"),
        ("--deep", "3"),
        ("--inner.limits", "a,b"),
    ],
)
def test_values_of_another_type_are_refused(arguments: tuple[str, str]) -> None:
    with pytest.raises(SystemExit):
        parse(*arguments)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"inner": {"speed": 1}}, "unknown setting speed of Inner; known: .*rate"),
        ({"inner": 3}, "must be a mapping"),
        ({"deep": 1}, "deep must be bool, got 1"),
        ({"inner": {"sizes": [1.5]}}, "sizes must be int"),
        ({"inner": {"rate": True}}, "rate must be float"),
    ],
)
def test_bad_mappings_are_named(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        from_mapping(Outer, values)


def test_differences_are_listed_leaf_by_leaf() -> None:
    changed = apply_overrides(Outer(), {"inner": {"rate": 0.5}, "label": "y"})
    assert differing_settings(to_mapping(Outer()), to_mapping(changed)) == [
        "inner.rate: 0.1 -> 0.5",
        "label: 'x' -> 'y'",
    ]
