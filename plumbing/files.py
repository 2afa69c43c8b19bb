"""Files that are written whole or not at all, and .pt files that are refused when damaged. Nothing here is about
diffusion, and it imports nothing of ours."""

import hashlib
import os
import socket
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

FORMAT = 4  # of .pt files; in earlier ones the same weights meant something else
DIGEST = "archive/sha256"  # the entry of a .pt file that holds the digest of the others


def flush(file):
    """Wait until what was written to a file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def atomic_file(path):
    """A binary file to write: when it is closed it replaces `path` whole; after an error `path` is as it was before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.writing")
    try:
        with open(beside, "w+b") as file:
            yield file
            flush(file)
        os.replace(beside, path)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch.save hides a full disk behind a RuntimeError
            raise error.__context__
        raise
    finally:
        beside.unlink(missing_ok=True)


def digest(value, sha=None):
    """SHA-256 over a tree of dicts, lists, plain values and tensors: names, types, shapes and bytes. Raises ValueError
    for anything else, which torch.load(weights_only=True) could not read. Why: it does not notice a flipped bit."""
    sha = sha or hashlib.sha256()
    if torch.is_tensor(value):
        if value.nbytes > value.untyped_storage().nbytes():  # strides of 0 can claim any shape
            raise ValueError("holds a tensor larger than its storage")
        sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, (dict, list, tuple)):
        sha.update(f"{type(value).__name__}{len(value)}".encode())
        for part in value.items() if isinstance(value, dict) else value:
            digest(part, sha)
    elif type(value) in (str, int, float, bool, type(None)):
        sha.update(f"{type(value).__name__}{value!r};".encode())
    else:
        raise ValueError(f"holds a {type(value).__name__}, {str(value)[:60]!r}: only plain numbers, texts, lists, "
                         "dicts and tensors can be read again")
    return sha.hexdigest()


def save_file(path, content):
    """Write a dict of plain values and tensors, with a format number and its digest. Raises ValueError for others.
    Why the digest is the last entry of the file, which is a zip: so that a second thread can compute it while the
    others are written, and on their way to the disk."""
    with ThreadPoolExecutor(1) as pool, atomic_file(path) as file:
        hashing = pool.submit(digest, content)
        try:
            torch.save({"format": FORMAT} | content, file)
            flush(file)
        finally:
            try:
                sha256 = hashing.result()
            except ValueError as error:  # says more than torch.save, if that failed too
                raise ValueError(f"{path}: {error}") from None
        with zipfile.ZipFile(file, "a") as entries:
            entries.writestr(DIGEST, sha256)


def load_file(path, mmap=False):
    """What save_file() wrote, and its "sha256", on the CPU, no code unpickled. Raises ValueError for anything else."""
    try:
        if not Path(path).is_file():  # opening a pipe would wait for ever
            raise ValueError("there is no such file")
        with warnings.catch_warnings(action="ignore"):  # whatever matters is raised
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if content.pop("format", 1) != FORMAT:
            raise ValueError("was written by another version of this code; train again")
        sha256 = content.pop("sha256", None)  # where older code wrote it
        if sha256 is None:
            with zipfile.ZipFile(path) as entries:
                sha256 = entries.read(DIGEST).decode()
        if sha256 != digest(content):
            raise ValueError("damaged: its contents do not fit their SHA-256")
    except Exception as error:  # for a damaged file torch raises all sorts of exceptions
        text = str(error) if isinstance(error, ValueError) else getattr(error, "strerror", None)
        text = text or f"damaged, or not a file of this kind ({type(error).__name__})"
        raise ValueError(f"{path}: {text}") from error
    return content | {"sha256": sha256}


def save_picture(picture, path, **options):
    """Write a Pillow image as the kind of file that the suffix of `path` says. options: Pillow's."""
    with atomic_file(path) as file:
        picture.save(file, format=Path(path).suffix[1:].upper(), **options)


def download(url, path, sha256):
    """Fetch a file unless there is one at `path`. It appears there whole. Raises OSError.
    sha256: its hash, or the first digits of that; a file that is there already is not checked."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(30)  # torch.hub has no time-out of its own
        try:
            torch.hub.download_url_to_file(url, str(path), sha256)
        except (OSError, RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())[:300]
            raise OSError(f"cannot download {url}: {text}; try again, or put the file at {path}") from error
