"""Configuration dataclasses from YAML, dictionaries and command-line flags, and back.

Works for any (nested) dataclass of plain fields: int, float, bool, str, tuples of those, Literal
and Optional; the names and the types come from the dataclass alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

__all__ = [
    "add_flags",
    "apply_overrides",
    "differing_settings",
    "flags_of",
    "from_mapping",
    "read_yaml",
    "to_mapping",
]

T = TypeVar("T")


def to_mapping(config: Any) -> dict[str, Any]:
    """A dataclass as nested JSON-able dictionaries (tuples become lists)."""
    plain = _plain(dataclasses.asdict(config))
    if not isinstance(plain, dict):
        raise TypeError(f"config must be a dataclass instance, got {type(config).__name__}")
    return plain


def from_mapping(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build the dataclass `cls` from nested dictionaries; absent fields keep their defaults.

    Raises ValueError that names an unknown field (and the known ones) or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{cls.__name__} must be a mapping of settings, got {values!r}")
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        raise ValueError(
            f"unknown setting {', '.join(unknown)} of {cls.__name__}; "
            f"known: {', '.join(sorted(known))}"
        )
    return cls(**{name: _coerce(hints[name], value, name) for name, value in values.items()})


def apply_overrides(base: T, overrides: Mapping[str, Any]) -> T:
    """A copy of a dataclass with some fields replaced; `overrides` is nested like `to_mapping`."""
    merged = _merge(to_mapping(base), overrides)
    return from_mapping(type(base), merged)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file (an empty file is an empty mapping); ValueError otherwise."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"config file {path} cannot be read: {detail}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"config file {path} must hold a mapping of settings")
    return value


def differing_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """``name: old -> new`` for every setting in which two nested mappings differ."""
    old, new = dict(_leaves(first)), dict(_leaves(second))
    return [
        f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def add_flags(parser: argparse.ArgumentParser, cls: type[Any]) -> None:
    """Give `parser` one flag for each leaf field: ``--seed``, ``--mar.num_steps``, ...

    The help text is the comment at the end of the field's line in the class's source.
    """
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, hint, field, text in _fields(cls, ""):
        section = name.rpartition(".")[0]
        if section not in groups:
            title = f"settings of {section}" if section else "settings of the experiment"
            groups[section] = parser.add_argument_group(title)
        shown = (
            "" if field.default is dataclasses.MISSING else f" (default: {_show(field.default)})"
        )
        groups[section].add_argument(
            f"--{name}",
            dest=f"setting:{name}",
            type=_parser_of(hint, name),
            default=argparse.SUPPRESS,
            metavar=_metavar(hint),
            help=(text + shown).strip().replace("%", "%%"),
        )


def flags_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings given as flags, as nested dictionaries."""
    nested: dict[str, Any] = {}
    for key, value in vars(arguments).items():
        if key.startswith("setting:"):
            *sections, leaf = key.removeprefix("setting:").split(".")
            place = nested
            for section in sections:
                place = place.setdefault(section, {})
            place[leaf] = value
    return nested


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _merge(base: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        old = merged.get(key)
        merged[key] = (
            _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
        )
    return merged


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _fields(cls: type[Any], prefix: str) -> Iterator[tuple[str, Any, dataclasses.Field[Any], str]]:
    hints = typing.get_type_hints(cls)
    try:
        source = inspect.getsource(cls)
    except OSError:
        # Installed without sources: the flags work all the same, without their explanations.
        source = ""
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _fields(hint, f"{prefix}{field.name}.")
            continue
        found = re.search(rf"^ +{field.name}:[^#\n]*# *(.+)$", source, re.MULTILINE)
        text = found.group(1) if found else ""
        yield f"{prefix}{field.name}", hint, field, text


def _options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type alone."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _coerce(hint: Any, value: Any, name: str) -> Any:
    for option in _options(hint):
        try:
            return _coerce_one(option, value, name)
        except _Mismatch:
            continue
    raise ValueError(f"{name} must be {_metavar(hint).lower()}, got {value!r}")


class _Mismatch(Exception):
    """The value is not of this type; another alternative may take it."""


def _coerce_one(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_mapping(hint, value)
    if hint is type(None):
        if value is None:
            return None
    elif hint is bool or hint is str:
        if isinstance(value, hint):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
            return float(value)
    elif typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
    elif typing.get_origin(hint) is tuple:
        element = typing.get_args(hint)[0]
        if isinstance(value, list | tuple):
            return tuple(_coerce(element, entry, name) for entry in value)
    else:
        raise TypeError(f"{name}: settings of type {hint!r} are not supported")
    raise _Mismatch


def _parser_of(hint: Any, name: str) -> Any:
    options = _options(hint)

    def parse(text: str) -> Any:
        if str in options:
            value: Any = None if type(None) in options and text in ("none", "null") else text
        else:
            if any(typing.get_origin(option) is tuple for option in options) and text != "none":
                text = f"[{text.strip('[]()')}]"
            try:
                value = yaml.safe_load("null" if text == "none" else text)
                if isinstance(value, str):
                    # YAML 1.1 takes 1e-3 (no dot) for a string.
                    value = value if float not in options else float(value)
                elif isinstance(value, list) and tuple[float, ...] in options:
                    value = [float(entry) for entry in value]
            except (yaml.YAMLError, ValueError) as error:
                raise argparse.ArgumentTypeError(f"{text!r} cannot be read") from error
        try:
            return _coerce(hint, value, name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def _metavar(hint: Any) -> str:
    names = []
    for option in _options(hint):
        if typing.get_origin(option) is Literal:
            names.append("|".join(str(entry) for entry in typing.get_args(option)))
        elif typing.get_origin(option) is tuple:
            kind = _metavar(typing.get_args(option)[0])
            names.append(f"{kind},{kind},...")
        else:
            names.append("none" if option is type(None) else option.__name__.upper())
    return "|".join(names)


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(str(entry) for entry in value)
    return "none" if value is None else str(value)
