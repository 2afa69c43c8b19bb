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
    """Labels 0, 1, ... and names of classes, in natural order: 2 before 10. An image has the label -1 if its value is
    None, or if it is held out of a class with none to train on. values: whole numbers, texts or one-hot; lines: gets
    what is odd."""
    there = np.array([value is not None for value in values])
    values = np.asarray([value for value in values if value is not None])
    values = values.ravel() if values.size == len(values) else values  # MedMNIST's are (N, 1)
    if values.ndim == 2 and np.isin(values, (0, 1)).all() and (values.sum(1) == 1).all():
        values = values.argmax(1)
    if values.dtype.kind == "f" and (abs(values) < 2**53).all() and (values % 1 == 0).all():
        values = values.astype(np.int64)
    if values.ndim != 1 or values.dtype.kind not in "iubU" or not "".join(values.astype(str)).isprintable():
        raise ValueError("labels must be one whole number, one text or one one-hot vector for each image, printable; "
                         "--labels=none takes the images without labels")
    names = np.array([same_form(name) for name in values.astype(str)])
    every = np.unique(names).tolist()
    trained = every if held_out is None else np.unique(names[~held_out[there]]).tolist()
    classes = sorted(trained, key=lambda name: re.sub("[0-9]+", lambda digits: digits[0].zfill(20), name))
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.full(len(there), -1)
    labels[there] = [numbers.get(name, -1) for name in names.tolist()]
    others = [repr(name) for name in every if name not in numbers]
    if others:
        count = sum(labels[there] < 0)
        lines.append(f"left out: {count:,} images held out of classes with none to train on: {', '.join(others)[:200]}")
    folded = Counter(map(str.casefold, every))
    alike = sorted((name for name in every if folded[name.casefold()] > 1), key=str.casefold)
    if alike:
        lines.append(f"classes that differ in case only: {', '.join(alike)[:200]}")
    return labels, classes


def split_of(folder):
    """What the name of a folder says of a split: whether it is held out, and the other words of the name. None if it
    says nothing, or two things. train2017, seg_test and DIV2K_valid_HR are such names."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", folder)]
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
    if both or not all(re.search("[a-z]", splits[folder][1]) for folder in marked):
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
            folders = ", ".join(sorted(set(level)))
            lines.append(f"the folders {folders[:200]} are splits: what is not train is held out")
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
    if len(levels) > 1:
        inner = ", ".join(sorted({*levels[1]} - {""}))
        lines.append(f"folders within the folders of the classes make no classes of their own: {inner[:200]}")
    return levels[0]


def match_names(names, pairs, table, lines):
    """The value of each file out of pairs (name, value), or None. Raises ValueError for two values of one file."""
    values = {}
    for name, value in pairs:
        if value not in (None, "") and values.setdefault(same_form(name), value) != value:
            raise ValueError(f"has two labels for {name}")
    without = [name for name in names if same_form(name) not in values]
    if len(without) == len(names):
        raise ValueError(f"has no label for any of the images, such as {names[0]}")
    if without:
        lines.append(f"left out: {len(without):,} images for which {table} has no label, {without[0]} first")
    if len(values) > len(names) - len(without):
        lines.append(f"{table} names images that are not there: {len(values) - len(names) + len(without):,}")
    return [values.get(same_form(name)) for name in names]


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
    """The value that a CSV or a text file has for each file, or None: a row for each, with the file's path or name, or
    else its stem, in the column that names most files, and the label in another, called `column` ("": the only other
    one). The header is the first row above that has as many columns, or one fewer, as CelebA's, which leaves the files'
    out."""
    whole, stems = {}, {}  # files by path or name, and by stem; None where that is of several
    for name in map(same_form, names):
        last = name.split("/")[-1]
        for files, key in ((whole, name), (whole, last), (stems, last.rsplit(".", 1)[0])):
            files[key] = name if files.get(key, name) == name else None
    rows = rows_of(text)
    for files in (whole, stems):
        columns = list(zip_longest(*([files.get(same_form(cell)) for cell in row] for row in rows)))
        named = [len(set(column) - {None}) for column in columns]
        if any(named):
            break
    else:
        raise ValueError(f"names none of the images, such as {names[0]}")
    place = named.index(max(named))
    first = next(i for i, name in enumerate(columns[place]) if name)
    width = len(rows[first])
    headers = [i for i, row in enumerate(rows[:first]) if width - 1 <= len(row) <= width]
    header, start = (rows[headers[0]], headers[0] + 1) if headers else ([], first)
    if len(header) == width - 1:
        header = [*header[:place], "", *header[place:]]
    others = [i for i in range(width) if i != place]
    if column:
        if column not in header:
            raise ValueError(f"has no column {column}, but {', '.join(filter(None, header))[:300] or 'no header'}")
        others = [header.index(column)]
    if len(others) != 1:
        raise ValueError(f"has {len(others)} columns beside the files': choose one with --labels=FILE:COLUMN, "
                         f"{', '.join(header[i] for i in others)[:300] if header else 'by the header that it lacks'}")
    pairs = []
    for number, row in enumerate(rows[start:], start):
        if len(row) != width:
            raise ValueError(f"row {number + 1} has {len(row)} columns, others have {width}")
        pairs.append((columns[place][number] or row[place], row[others[0]]))
    return match_names(names, pairs, "the table", lines)
