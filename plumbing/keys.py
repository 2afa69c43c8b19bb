"""Keys of a configuration: a default, what it means, and its bounds. Standard library only; it goes with model.py."""

import typing
from dataclasses import dataclass, field, fields


def key(default, doc, low=-1e18, high=1e18, choices=None, resumable=False):
    """A documented configuration key: a dataclass field with the bounds of its numbers, or the words it may hold.
    resumable: whether a run may resume with another value; for other keys, another value is another experiment."""
    return field(default=default, metadata={"doc": doc, "bounds": (low, high, choices), "resumable": resumable})


def check_value(name, value, kind, low, high, choices):
    """`value` as type `kind`, within its bounds. Raises a ValueError whose message starts with the key's name.
    Why one function: command lines, TOML files and snapshots all pass through it, so a bad value is one clear line."""
    if typing.get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)) and value:
            return tuple(check_value(name, item, kind.__args__[0], low, high, choices) for item in value)
        good, what = False, "a list"
    elif choices:
        value = str(value).lower() if isinstance(value, bool) else value  # compile = true in TOML is a bool
        good, what = value in choices, f"one of {', '.join(choices)}"
    elif kind is str:
        good, what = isinstance(value, str) and value.isprintable(), "printable text"
        if isinstance(value, str) and set("\n\t\r\b\f") & set(value):  # of a path of Windows
            what += " (in TOML a backslash begins an escape: write C:/new, or 'C:\\new' in single quotes)"
    elif kind is bool:
        good, what = isinstance(value, bool), "true or false"
    else:
        good = type(value) in (int, kind) and low <= value <= high  # False for nan
        what = f"a {'whole ' if kind is int else ''}number from {low:g} to {high:g}"
    if not good:
        raise ValueError(f"{name}: must be {what}, not {repr(value)[:60]}")
    return kind(value)


def keys_of(Class):
    """{name: (type, bounds)} of the keys of a configuration class; fields that are configurations are left out."""
    kinds = typing.get_type_hints(Class)  # a file may postpone its annotations, which then are texts
    return {f.name: (kinds[f.name], f.metadata["bounds"]) for f in fields(Class) if f.metadata}


@dataclass
class Configuration:
    """The base of every configuration: its keys are checked when it is made, so that nobody can construct an invalid
    one. Raises a ValueError whose message starts with the key's name."""

    def __post_init__(self):
        for name, (kind, bounds) in keys_of(type(self)).items():
            setattr(self, name, check_value(name, getattr(self, name), kind, *bounds))
