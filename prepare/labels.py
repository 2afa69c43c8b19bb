"""Labels from what lies around the images: folders of classes and of splits, dataset.json, tables. Names are compared
in Unicode's composed form, since macOS writes é as two characters and everybody else as one."""

import csv
import json
import re
import unicodedata
from collections import Counter
from itertools import zip_longest

import numpy as np

SPLIT_WORDS = {"train": False, "training": False, "test": True, "testing": True, "val": True, "valid": True,
               "validation": True, "dev": True, "eval": True, "holdout": True}  # True: held out
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
LITTER = re.compile(r"(^|/)([.@#$]|__)"  # hidden, or of a system or an editor: @eaDir, #recycle, $RECYCLE.BIN, __MACOSX
                    rf"|({'|'.join(map(re.escape, SUFFIXES))})(\.[^/]*)?/"  # in a folder named like a picture: previews
                    r"|(^|/)(Thumbs\.db|desktop\.ini)$", re.IGNORECASE)


def same_form(text):
    """A text in the form that all texts are compared in."""
    return unicodedata.normalize("NFC", text)


def as_labels(values, held_out, lines):
    """Labels 0, 1, ... and names of classes, in natural order: 2 before 10. Images held out of a class that has none to
    train on get the label -1. values: whole numbers, texts or one-hot; lines: gets what is odd."""
    values = np.asarray(values)
    values = values.ravel() if values.size == len(values) else values  # MedMNIST's are (N, 1)
    if values.ndim == 2 and np.isin(values, (0, 1)).all() and (values.sum(1) == 1).all():
        values = values.argmax(1)
    if values.dtype.kind == "f" and (abs(values) < 2**53).all() and (values % 1 == 0).all():
        values = values.astype(np.int64)
    if values.ndim != 1 or values.dtype.kind not in "iubU" or not "".join(values.astype(str)).isprintable():
        raise ValueError("labels must be one whole number, one text or one one-hot vector for each image, printable; "
                         "--labels=none takes the images without labels")
    names = np.array([same_form(name) for name in values.astype(str)])
    found = np.unique(names if held_out is None else names[~held_out]).tolist()
    classes = sorted(found, key=lambda name: re.sub("[0-9]+", lambda digits: digits[0].zfill(20), name))
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers.get(name, -1) for name in names.tolist()])
    every = np.unique(names).tolist()
    others = ", ".join(repr(name) for name in every if name not in numbers)
    if others:
        lines.append(f"left out: {sum(labels < 0):,} images held out of classes with none to train on: {others[:200]}")
    folded = Counter(map(str.casefold, every))
    alike = sorted((name for name in every if folded[name.casefold()] > 1), key=str.casefold)
    if alike:
        lines.append(f"classes that differ in case only: {', '.join(alike)[:200]}")
    return labels, classes


def split_of(folder):
    """What the name of a folder says of a split: whether it is held out, and the other words of the name without
    numbers. None if it says nothing, or two things. train2017, seg_test and DIV2K_valid_HR are such names."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", folder)]
    marks = [word for word in words if word in SPLIT_WORDS]
    if len(marks) != 1:
        return None
    return SPLIT_WORDS[marks[0]], " ".join(word for word in words if word != marks[0])


def find_split(level):
    """Of the folders at one level, one for each file: whether each is held out, and what its name says beside that;
    None if they are no splits. Raises ValueError where only some look like splits. Why all of them count: test tubes
    beside flasks are classes, training_set beside test_set are not."""
    splits = {folder: split_of(folder) for folder in sorted(set(level))}
    marked = [folder for folder in splits if splits[folder]]
    others = [folder or "files in none" for folder in splits if not splits[folder]]
    both = {splits[folder][0] for folder in marked} == {True, False}
    if both and not others:
        return np.array([splits[folder][0] for folder in level]), [splits[folder][1] for folder in level]
    if both or not all(splits[folder][1] for folder in marked):
        beside = f" beside {', '.join(others)[:60]}" if others else ""
        raise ValueError(f"has folders that look like splits, {', '.join(marked)[:60]}{beside}: splits are train and "
                         "one to hold out, or more, with no other folder beside them; a class needs another name")
    return None


def splits_by_folder(names, lines):
    """Of pictures by their paths: which are held out, or None if there are no splits, and the levels of folders at
    which those to train on differ, the outermost first. lines: gets which folders are splits."""
    levels = zip_longest(*(same_form(name).split("/")[:-1] for name in names), fillvalue="")
    levels = [level for level in levels if len(set(level)) > 1]
    for i, level in enumerate(levels):
        found = find_split(level)
        if found:
            held_out, levels[i] = found
            lines.append(f"the folders {', '.join(sorted(set(level)))} are splits: what is not train is held out")
            return held_out, [level for level in levels if len(set(np.array(level)[~held_out])) > 1]
    return None, levels


def are_shards(names):
    """Whether folders only divide a long list, as EDM's do: 00000/img00000999.png, 00001/img00001000.png; numbers run
    on from folder to folder, where in folders of classes they begin anew or mix."""
    files = [name.split("/")[-1] for name in sorted(names)]
    shaped = all(re.search(r"(^|/)\d{5}/[^/]*\d{8}\.\w+$", name) for name in names)
    return shaped and files == sorted(set(files))


def classes_by_folder(names, held_out, levels, lines):
    """The class of each picture, or None if there are none: the outermost folders that differ."""
    if are_shards(names):
        lines.append("the folders are numbered as EDM does it, so they are no classes; there is no dataset.json")
        return None
    if not levels:
        return None
    for i, folder in enumerate(levels[0]):
        if not folder and (held_out is None or not held_out[i]):
            raise ValueError(f"{names[i]} lies beside the folders of the classes; put it into one, or take it out")
    return levels[0]


def match_names(names, pairs, table, lines):
    """The value of each file out of pairs (name, value). Raises ValueError for files without one, or with two."""
    values = {same_form(name): value for name, value in pairs}
    missing = [name for name in names if same_form(name) not in values]
    if missing:
        raise ValueError(f"has no label for {missing[0]}")
    if len(values) < len(pairs):
        raise ValueError("has two labels for one image")
    if len(values) > len(names):
        lines.append(f"{table} names images that are not there: {len(values) - len(names):,}")
    return [values[same_form(name)] for name in names]


def labels_by_json(names, table, text, lines):
    """The value that a dataset.json [EDM] has for each file, or None if it has none at all."""
    pairs = json.loads(text)["labels"] or []
    pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
    if not pairs:
        lines.append("dataset.json has no labels")
        return None
    folder = table.removesuffix("dataset.json")
    return match_names(names, [(f"{folder}{name}", value) for name, value in pairs], "dataset.json", lines)


def rows_of(text):
    """The rows of a table in a CSV or text file, as lists of cells."""
    written = [line for line in text.splitlines() if line.strip()]
    mark = max("\t,;", key=text.count)
    if mark not in text:
        return [line.split() for line in written]
    return [[cell.strip() for cell in row] for row in csv.reader(written, delimiter=mark)]


def labels_by_table(names, text, column, lines):
    """The value that a CSV or a text file has for each file: one row for each, with the file's path, name or stem in
    one column and the label in another, called `column` ("": the only other one). The row before the first that names a
    file is the header; it may leave out the column of files, as CelebA's does."""
    files = {}  # by path, name and stem, where that is of one file alone; else None
    for name in map(same_form, names):
        last = name.split("/")[-1]
        for key in {name, last, last.rsplit(".", 1)[0]}:
            files[key] = None if key in files else name
    rows = rows_of(text)
    columns = list(zip_longest(*([files.get(same_form(cell)) for cell in row] for row in rows)))
    named = [len(set(column) - {None}) for column in columns]
    if not any(named):
        raise ValueError("names none of the images")
    place = named.index(max(named))
    first = next(i for i, name in enumerate(columns[place]) if name)
    header = rows[first - 1] if first else []
    if len(header) == len(rows[first]) - 1:
        header = [*header[:place], "", *header[place:]]
    others = [i for i in range(len(rows[first])) if i != place]
    if column:
        if column not in header:
            raise ValueError(f"has no column {column}, but {', '.join(filter(None, header))[:300] or 'no header'}")
        others = [header.index(column)]
    if len(others) != 1:
        raise ValueError(f"has {len(others)} columns beside the files': choose one with --labels=FILE:COLUMN, "
                         f"{', '.join(header[i] for i in others)[:300] if header else 'by the header that it lacks'}")
    pairs = []
    for number, row in enumerate(rows[first:], first):
        if len(row) != len(rows[first]):
            raise ValueError(f"row {number + 1} has {len(row)} columns, the first has {len(rows[first])}")
        if row[others[0]]:
            pairs.append((columns[place][number] or row[place], row[others[0]]))
    return match_names(names, pairs, "the table", lines)
