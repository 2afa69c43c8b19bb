"""The command line of every script, and its errors: each is one line that says what to correct. Nothing here is about
diffusion, and it imports nothing of ours.

A mistake of the user or a refusal of the machine is one line; anything else is a bug and keeps its traceback. With
TRACEBACK=1 in the environment the lines have tracebacks, too.
"""

import argparse
import os
import re
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can correct, said in one line. Any other exception but OSError is a bug: a traceback."""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations and without a usage before each error. Why: an error is one line."""

    def __init__(self, description):
        super().__init__(description=description, usage=argparse.SUPPRESS, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(message)


def between(kind, low, high):
    """An argparse type: an int or float from low to high."""
    def parse(text):
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {what} from {low:g} to {high:g}, not {text[:60]!r}")

    return parse


def path_type(text):
    """An argparse type: a path, ~ being the home directory, which a shell does not see after an =."""
    return Path(text).expanduser()


def existing_file(path):
    """`path` as a Path, if a regular file is there. Why: opening a pipe would wait for ever. Raises ValueError."""
    if not Path(path).is_file():
        raise ValueError("there is no such file")
    return Path(path)


@contextmanager
def reading(name, errors=Exception):
    """Turn what goes wrong while a library reads a file into one UserError that names the file. Why: for a damaged file
    libraries raise all sorts of exceptions. Around anything else name the errors to turn, or the bugs of whoever
    changes that code would look like damaged files."""
    try:
        yield
    except (UserError, NameError):
        raise
    except errors as error:
        text = getattr(error, "strerror", None) or str(error)
        if not isinstance(error, (ValueError, OSError)):
            text = f"{type(error).__name__}: {text} (TRACEBACK=1 shows where)"
        text = " ".join(re.sub(r" <_io[^>]*>", "", text).split())[:300]
        raise UserError(text if str(name) in text else f"{name}: {text}") from error


def run_main(main):
    """Run a script's main(): a UserError is one line and exit code 2, what the machine refuses is 1, Ctrl-C is 130."""
    try:
        try:
            main()
        except RuntimeError as error:
            if "gloo/transport" not in str(error):  # torch has no exception of its own for this
                raise
            text = "another process ended, or its node cannot be reached; start the same command again"
            raise OSError(text) from error
        finally:  # after --help too, which exits
            sys.stdout.flush()
    except (UserError, OSError, KeyboardInterrupt) as error:
        if os.environ.get("TRACEBACK"):
            raise
        if isinstance(error, BrokenPipeError):  # or Python tries to flush once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        text = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        if text:  # else another process says it
            print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)
        sys.exit({UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1))


def warn(text, end="\n"):
    """Print on stderr what the user should know. Why a function: of several processes only the first may say it."""
    if os.environ.get("RANK", "0") == "0":
        print(text, end=end, file=sys.stderr, flush=True)


def status(text, stays=True):
    """Print a line on stdout. On a terminal the next one overwrites it, unless it `stays`."""
    terminal = sys.stdout.isatty()
    print(f"\r\033[K{text}" if terminal else text, end="" if terminal and not stays else "\n", flush=True)


def track(items, what, total, size=lambda item: 1):
    """Yield `items`, and print how far they are, how fast, and the time left: on one line that is overwritten on a
    terminal, every 10 seconds elsewhere. size: how much of `total` an item is."""
    begin = shown = time.monotonic()
    terminal, done = sys.stderr.isatty(), 0
    for item in items:
        yield item
        done, now = done + size(item), time.monotonic()
        if done == total or now - shown >= (0.2 if terminal else 10):
            rate, shown = done / max(now - begin, 1e-9), now
            line = f"{what}: {done:,}/{total:,}  {rate:,.0f}/s  {(total - done) / rate:.0f} s left"
            warn(f"\r\033[K{line}" if terminal else line, end="" if terminal and done < total else "\n")


def differences(theirs, ours, leave_out=()):
    """In one line, what differs between two dicts: "seed = 0, not 1; ..."; empty if nothing does."""
    return "; ".join(f"{name} = {theirs.get(name)!r}, not {ours.get(name)!r}" for name in theirs | ours
                     if name not in leave_out and theirs.get(name) != ours.get(name))[:1000]
