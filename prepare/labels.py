"""Labels from what lies around the images: folders of classes and of splits, dataset.json, tables. Names are compared
in Unicode's composed form, since macOS writes é as two characters and everybody else as one."""

import csv
import json
import re
import unicodedata
from itertools import zip_longest

import numpy as np

SPLIT_WORDS = {"train": False, "training": False, "test": True, "testing": True, "val": True, "valid": True,
               "validation": True, "dev": True, "eval": True, "holdout": True}  # True: held out
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def same_form(text):
    """A text in the form that all texts are compared in."""
    return unicodedata.normalize("NFC", text)


LITTER = re.compile(r"(^|/)([.@#$]|__)"  # hidden, or of a system or an editor: @eaDir, #recycle, $RECYCLE.BIN, __MACOSX
                    rf"|({'|'.join(map(re.escape, SUFFIXES))})(\.[^/]*)?/"  # in a folder named like a picture: previews
                    r"|(^|/)(Thumbs\.db|desktop\.ini)$", re.IGNORECASE)


def is_litter(name):
    """Whether a path is nothing that its owner put there."""
    return LITTER.search(name) is not None


def as_labels(values):
    """Labels 0, 1, ... and names of classes, in natural order: 2 before 10. values: whole numbers, texts or one-hot."""
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
    found, labels = np.unique(names, return_inverse=True)
    order = np.argsort([re.sub("[0-9]+", lambda digits: digits[0].zfill(20), name) for name in found], kind="stable")
    return np.argsort(order)[labels], found[order].tolist()


def split_of(folder):
    """What the name of a folder says of a split: whether it is held out, and the other words of the name without
    numbers. None if it says nothing, or two things. train2017, seg_test and DIV2K_valid_HR are such names."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", folder)]
    marks = [word for word in words if word in SPLIT_WORDS]
    if len(marks) != 1:
        return None
    return SPLIT_WORDS[marks[0]], tuple(word for word in words if word != marks[0] and not word.isdigit())


NO_SPLIT = ("if it is a split, splits must be the outermost folders, train among them, and no other folder; if it is a "
            "class, give it another name")


def find_split(level):
    """Whether each file is held out, if the folders at one level (one for each file) are splits; None if they are not.
    Raises ValueError for folders of which only some look like splits. Why all must agree but for the split's word: test
    tubes beside flasks are classes, training_set beside test_set are not."""
    folders = sorted(set(level))
    splits = {folder: split_of(folder) for folder in folders}
    sides = {}  # of names that are alike but for the split's word: whether some are held out, and some are not
    for split in filter(None, splits.values()):
        sides.setdefault(split[1], set()).add(split[0])
    whole = {rest for rest, held in sides.items() if held == {True, False}}
    odd = [folder for folder in folders if not splits[folder] or splits[folder][1] not in whole]
    if whole and not odd and len(whole) == 1:
        return np.array([splits[folder][0] for folder in level])
    if whole and odd:
        raise ValueError(f"has folders that look like splits beside others, {', '.join(odd)[:200]}: take those out, or "
                         "put the classes into folders train and test")
    for folder in folders:
        if splits[folder] and not splits[folder][1]:
            raise ValueError(f"has a folder {folder}: {NO_SPLIT}")
    return None


def are_shards(names):
    """Whether folders only divide a long list, as EDM's do: 00000/img00000999.png, 00001/img00001000.png; numbers run
    on from folder to folder, where in folders of classes they begin anew or mix."""
    pairs = [re.search(r"(?:^|/)(\d{5})/[^/]*?(\d{8})\.[^/]*$", name) for name in names]
    if not all(pairs):
        return False
    places = sorted((int(pair[2]), int(pair[1])) for pair in pairs)
    folders = [folder for _, folder in places]
    return len({number for number, _ in places}) == len(places) and folders == sorted(folders)


def splits_by_folder(names, lines):
    """Of pictures by their paths: which are held out, or None if there are no splits, and the levels of folders at
    which paths differ, the outermost first; inside of splits, at which those of train do. lines: gets what is worth
    knowing."""
    levels = zip_longest(*(same_form(name).split("/")[:-1] for name in names), fillvalue="")
    levels = [level for level in levels if len(set(level)) > 1]
    held_out = find_split(levels[0]) if levels else None
    if held_out is not None:
        lines.append(f"the folders {', '.join(sorted(set(levels[0])))} are splits: what is not train is held out")
        levels = [level for level in levels[1:] if len(set(np.array(level)[~held_out])) > 1]
    for level in levels if held_out is not None else levels[1:]:
        if find_split(level) is not None:
            raise ValueError(f"has a folder {level[0]}: {NO_SPLIT}")
    return held_out, levels


def classes_by_folder(names, held_out, levels, lines):
    """The class of each picture, or None if there are none: the outermost folders that differ. A picture that is held
    out in a folder that is no class of train has the class None."""
    if are_shards(names):
        lines.append("the folders are numbered as EDM does it, so they are no classes; there is no dataset.json")
        return None
    if not levels:
        return None
    held_out = np.zeros(len(names), bool) if held_out is None else held_out
    classes = list(levels[0])
    for name, folder, held in zip(names, classes, held_out):
        if not folder and not held:
            raise ValueError(f"{name} lies beside the folders of the classes; put it into one, or take it out")
    known = {name for name, held in zip(classes, held_out) if not held}
    unknown = sorted({name for name in classes if name not in known})
    say_alike(classes, lines)
    if unknown:
        count = sum(name in unknown for name in classes)
        folders = ", ".join(name or "the split's own" for name in unknown)
        lines.append(f"left out: {count:,} images held out in folders that are no class of train: {folders[:200]}")
    return [name if name in known else None for name in classes]


def say_alike(classes, lines):
    """Note names that differ in case only."""
    alike = {}
    for name in sorted(set(filter(None, classes))):
        alike.setdefault(name.casefold(), []).append(name)
    alike = [" and ".join(names) for names in alike.values() if len(names) > 1]
    if alike:
        lines.append(f"classes that differ in case only: {', '.join(alike)[:200]}")


def match_names(names, pairs, table, lines):
    """The value of each file out of pairs (name, value). Raises ValueError for files without one, or with two."""
    values = {same_form(name): value for name, value in pairs}
    missing = [name for name in names if same_form(name) not in values]
    if missing:
        why = "".join(f" ({line})" for line in lines if "code page" in line)
        raise ValueError(f"has no label for {missing[0]}{why}")
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


def labels_by_table(names, text, column, lines):
    """The value that a CSV or a text file has for each file: one row for each, with the file's name or its stem in a
    column and the label in another, of the name `column` ("": the only other one). A header is recognised by the first
    row that names a file; it may leave out the column of files, as CelebA's does."""
    written = [line for line in text.splitlines() if line.strip()]
    marks = [mark for mark in ("\t", ",", ";") if 2 * sum(mark in line for line in written) > len(written)]
    if marks:
        rows = [[cell.strip() for cell in row] for row in csv.reader(written, delimiter=marks[0])]
    else:
        rows = [line.split() for line in written]
    keys = {}  # of a file: its path, its name, its name without suffix, where these are its alone
    for name in map(same_form, names):
        for key in {name, name.split("/")[-1], name.split("/")[-1].rsplit(".", 1)[0]}:
            keys[key] = None if key in keys else name
    first = next((i for i, row in enumerate(rows) if any(keys.get(same_form(cell)) for cell in row)), None)
    if first is None:
        raise ValueError("names none of the images")
    place = next(i for i, cell in enumerate(rows[first]) if keys.get(same_form(cell)))
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
    for number, row in enumerate(rows[first:], first + 1):
        if len(row) != len(rows[first]):
            raise ValueError(f"row {number} has {len(row)} columns, the first has {len(rows[first])}")
        pairs.append((keys.get(same_form(row[place])) or row[place], row[others[0]]))
    return match_names(names, pairs, "the table", lines)
