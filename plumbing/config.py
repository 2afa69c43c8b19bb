"""Configurations out of TOML files and --key=value, and the keys that a variant adds. Nothing here is about diffusion.

A configuration is a dataclass of keys (plumbing/keys.py), one of which, `model`, is itself such a dataclass; `variant`
says of which file under variants/ that one is."""

import argparse
import difflib
import hashlib
import importlib
import importlib.util
import json
import os
import sys
import tomllib
import typing
from dataclasses import asdict, fields
from pathlib import Path

from plumbing.command import Parser, UserError, existing_file, reading
from plumbing.keys import check_value, keys_of


def config_class(variant, default, where):
    """The class that configures the network: `default`, or Config of variants/<variant>.py. Raises UserError, which
    begins with `where` the variant is named; bugs in that file keep their traceback."""
    if not variant:
        return default
    if not (str(variant).isidentifier() and importlib.util.find_spec(f"variants.{variant}")):
        raise UserError(f"{where}: there is no variants/{str(variant)[:60]}.py")
    module = importlib.import_module(f"variants.{variant}")
    if not hasattr(module, "Config"):
        raise UserError(f"{where}: variants/{variant}.py is no network to train")
    return module.Config


def flatten(config):
    """The configuration by dotted names: {"seed": 0, ..., "model.depth": 12, ...}."""
    top = asdict(config)
    model = top.pop("model")
    return top | {f"model.{name}": value for name, value in model.items()}


def resumable_keys(config):
    """The dotted names of keys with which a run may resume although they have other values than before."""
    names = {f.name for f in fields(config) if f.metadata.get("resumable")}
    return names | {f"model.{f.name}" for f in fields(config.model) if f.metadata.get("resumable")}


def with_newer_keys(saved, config):
    """A saved configuration by dotted names, and the defaults of those keys of `config` that are newer than it. These
    may follow from keys that it has, as a residual weight does from the depth, so the classes work them out."""
    model = {name: saved[f"model.{name}"] for name in asdict(config.model) if f"model.{name}" in saved}
    return flatten(type(config)(model=type(config.model)(**model))) | saved


def experiment_id(config, *more):
    """A text that is the same for all runs with the same values of the keys that say what the experiment is: those that
    must not change when it resumes, and `more`."""
    resumable = resumable_keys(config) - set(more)
    keys = {name: value for name, value in flatten(config).items() if name not in resumable}
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]


def dataset_of(run):
    """Name of the dataset that a run directory was trained on. Raises UserError."""
    with reading(f"{run} is no run directory, or its config.toml is damaged"):
        return tomllib.loads(existing_file(Path(run) / "config.toml").read_text(encoding="utf-8"))["dataset"]


def parse_text(text, kind):
    """A word of the command line as TOML would give it: numbers, true and false, lists written a,b,c; else the text."""
    if typing.get_origin(kind) is tuple:
        return [parse_text(part.strip(), kind.__args__[0]) for part in text.strip("[]").split(",")]
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        return text


def read_table(path):
    """The keys of a TOML file by dotted names. Raises UserError."""
    with reading(path):
        table = tomllib.loads(existing_file(path).read_text(encoding="utf-8-sig"))
        model = table.pop("model", {})
        if not isinstance(model, dict):
            raise ValueError("model must be a table, [model]")
        return table | {f"model.{name}": value for name, value in model.items()}


def add_options(parser, Class, prefix=""):
    """An option for each key of a configuration class. Returns {name of the option: (type, bounds)}."""
    for f in fields(Class):
        if f.metadata:
            default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            text = f"{f.metadata['doc']} [{default}]".replace("%", "%%")  # which argparse would format
            parser.add_argument(f"--{prefix}{f.name}", metavar="", default=argparse.SUPPRESS, help=text)
    return {f"{prefix}{name}": key for name, key in keys_of(Class).items()}


def refuse_unknown(words, table, file, keys, hint):
    """Raises UserError for the first word of the command line or key of the file that is no key, with the nearest."""
    words = [word.split("=")[0] for word in words]
    known = {full.split(".")[-1]: full for full in ("config", *keys)}  # the right key may be in the other table
    for name in (*words, *(name for name in table if name not in keys)):
        near = [known[last] for last in difflib.get_close_matches(name.lstrip("-").split(".")[-1], known)]
        if name.endswith(".toml"):
            near = [f"config={name}"]
        if near:
            nearest = f"--{near[0]}" if name in words else near[0]
            hint = f"did you mean {nearest!r}?"
        raise UserError(f"{'' if name in words else f'{file}: '}{name[:300]}: unknown key; {hint}")


def load_config(Class, argv):
    """A `Class` from its defaults, then the TOML file of --config, then --key=value. Raises UserError that names the
    key and the file. Which keys there are depends on the variant, so the command line is parsed twice: once for
    --config and --variant, and again for all keys."""
    parser = Parser(sys.modules[Class.__module__].__doc__)
    parser.add_argument("--config", type=os.path.expanduser, metavar="FILE",
                        help="a TOML file of these keys, those with model. under [model]")
    keys = add_options(parser, Class)
    first, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    table = read_table(first.config) if first.config else {}
    Default, = (f.default_factory for f in fields(Class) if f.name == "model")
    where = "--variant" if "variant" in first else first.config
    Model = config_class(getattr(first, "variant", table.get("variant", "")), Default, where)
    keys |= add_options(parser, Model, "model.")
    given, unknown = parser.parse_known_args(argv)
    hint = "see --help" + "; keys of a variant need --variant=NAME" * (Model is Default)
    refuse_unknown(unknown, table, first.config, keys, hint)

    given = {name: parse_text(text, keys[name][0]) for name, text in vars(given).items() if name != "config"}
    for where, values in ((first.config, table), ("command line", given)):
        with reading(where, ValueError):
            for name, value in values.items():
                kind, bounds = keys[name]
                check_value(name, value, kind, *bounds)
    values = table | given
    model = {name.removeprefix("model."): values.pop(name) for name in list(values) if name.startswith("model.")}
    with reading("configuration", ValueError):
        return Class(model=Model(**model), **values)
