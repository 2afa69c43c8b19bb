import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import struct
import tarfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import prepare.public
from data import batch_indices, from_network, load_dataset, to_network, to_picture
from helpers import Job, call
from plumbing.command import UserError, reading

DIGITS, GENERATOR = load_dataset("digits"), np.random.default_rng(0)


@pytest.fixture(autouse=True)
def datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DATASETS", tmp_path / "datasets")
    data.DATASETS.mkdir()


def test_the_digits_that_ship_are_the_uci_images():
    """Against what the documentations of UCI (counts) and scikit-learn (first row, mean) say of them."""
    parts = DIGITS, DIGITS.holdout
    sixteenths = np.concatenate([part.images for part in parts]) / 255 * 16
    assert DIGITS.shape == (1, 8, 8) and DIGITS.images.dtype == np.uint8 and len(DIGITS.holdout) == 100
    assert np.abs(sixteenths - sixteenths.round()).max() < 0.04 and sixteenths.max() == 16
    assert sixteenths.round()[0, 0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert sixteenths.round().mean() == pytest.approx(4.884164579855314)
    labels = np.concatenate([part.labels for part in parts])
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_network_input_has_mean_0_std_half_and_is_undone():
    x = to_network(torch.from_numpy(np.array(DIGITS.images)), DIGITS.facts)
    assert abs(x.mean()) < 1e-4 and abs(x.std() - 0.5) < 1e-3 and x.dtype == torch.float32
    assert np.array_equal(from_network(x, DIGITS.facts), DIGITS.images)


def test_an_epoch_feeds_every_image_once_in_an_order_of_its_own():
    whole = batch_indices(97, seed=3, start=0, count=97 * 3)
    first, second, third = whole.reshape(3, 97)
    assert sorted(first) == sorted(second) == sorted(third) == list(range(97))
    assert not np.array_equal(first, second) and not np.array_equal(first, batch_indices(97, 4, 0, 97))
    lists = [batch_indices(97, 3, at, 20) for at in range(0, 280, 20)]
    assert np.array_equal(np.concatenate(lists), whole[:280])
    for indices, (images, labels) in zip(lists, DIGITS.feed(iter(lists), torch.device("cpu")), strict=True):
        assert np.array_equal(images, DIGITS.images[indices]) and np.array_equal(labels, DIGITS.labels[indices])


def make_ready(*words):
    """Run `python data.py ...`. Returns the set that it made and the lines that it printed."""
    result = call("data.py", *words)
    assert result.returncode == 0, result.stderr
    *lines, sheet = result.stdout.splitlines()
    return load_dataset(sheet.removesuffix("/contact-sheet.png")), lines


def refusal(*words, code=2):
    result = call("data.py", *words)
    line = result.stderr.splitlines()[-1]
    assert result.returncode == code and line.startswith("data.py: "), result.stderr
    return line


def random_images(count, size, channels=1):
    return GENERATOR.integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def saved(save, *arrays, **named):
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    return buffer.getvalue()


def png(image, **options):
    return saved(to_picture(image).save, **{"format": "PNG"} | options)


def idx(array):
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write(path, files):
    """Files, {name: content}, as a folder or an archive, or the bytes of one file. Returns the path."""
    if isinstance(files, bytes):
        path.write_bytes(files)
        return path
    kind = {".zip": "zip", ".gz": "gztar"}.get(path.suffix.lower())
    folder = path.with_name(f"{path.name}, unpacked") if kind else path
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return Path(shutil.make_archive(folder, kind, folder)).rename(path) if kind else path


GREY, COLOUR = random_images(6, 5), random_images(6, 5, 3)
VALUES = np.array([10, 3, 9, 3, 10, 10])
PNGS = {f"{i // 4:05d}/img{i:08d}.png": png(image) for i, image in enumerate(COLOUR)}


def good_sources(folder):
    """Sources of every kind: path, the images in their order, the class of each if there are classes, how many of the
    last images are held out, and what else is said."""
    three = [str(value) for value in VALUES]
    write(folder / "my-labels.npy", saved(np.save, VALUES))
    yield write(folder / "my-images.npy", saved(np.save, GREY[:, 0])), GREY, three, 0
    yield write(folder / "anything.npy", saved(np.save, GREY[:, 0])), GREY, [], 0
    split = {"x_train": GREY[:4, 0], "y_train": VALUES[:4], "x_test": GREY[4:, 0], "y_test": VALUES[4:]}
    yield write(folder / "keras.npz", saved(np.savez, **split)), GREY, three, 2
    last, parts = COLOUR.transpose(0, 2, 3, 1), (("train", slice(4)), ("test", slice(4, 5)), ("val", slice(5, 6)))
    split = {f"{part}_{kind}": array[at] for part, at in parts
             for kind, array in (("images", last), ("labels", VALUES[:, None]))}
    yield write(folder / "medmnist.npz", saved(np.savez, **split)), COLOUR, three, 2
    yield write(folder / "adm.npz", saved(np.savez, last, VALUES)), COLOUR, three, 0
    yield write(folder / "ours.npz", saved(np.savez_compressed, arr_0=last, labels=VALUES * 1.0)), COLOUR, three, 0
    pair = {"images.npy": saved(np.save, COLOUR), "labels.npy": saved(np.save, VALUES), "notes.txt": b""}
    yield write(folder / "pair", pair), COLOUR, three, 0, "left out: 1 .txt"
    yield folder / "pair" / "images.npy", COLOUR, three, 0
    junk = {"__MACOSX/a.png": b"", ".hidden/b.png": b"", "._c.png": b"", "Thumbs.db": b"", "d.heic": b"", "e.txt": b""}
    kinds = [f"kind {value}" for value in VALUES]
    table = json.dumps({"labels": list(zip(PNGS, kinds))}).encode("utf-8-sig")
    for name in ("edm.ZIP", "edm"):
        files = PNGS | {"dataset.json": table} | junk
        yield write(folder / name, files), COLOUR, kinds, 0, "left out: 1 .heic, 1 .txt, 4 hidden"
    hot = [*zip(PNGS, np.eye(3, dtype=int)[[2, 0, 1, 0, 2, 2]].tolist()), ("gone.png", [1, 0, 0])]
    files = {f"top/{name}": content for name, content in PNGS.items()}
    files["top/dataset.json"] = json.dumps({"labels": hot}).encode()
    yield write(folder / "hot.zip", files), COLOUR, [*"201022"], 0, "names images that are not there: 1"
    null = {"dataset.json": b'{"labels": null}'}
    yield write(folder / "null.zip", PNGS | null), COLOUR, [], 0, "dataset.json has no labels"
    yield write(folder / "shards", PNGS), COLOUR, [], 0, "numbered as EDM does it"
    files = {f"set/class {(10, 2)[i % 2]}/deep/{i}.PNG": png(image) for i, image in enumerate(GREY)}
    odd = {name.replace("/", "\\"): content for name, content in files.items()}  # as some Windows programs do it
    for name, content in (("by-class", files), ("by-class.zip", files), ("odd.zip", odd)):
        yield write(folder / name, content), GREY[[0, 2, 4, 1, 3, 5]], ["class 10"] * 3 + ["class 2"] * 3, 0
    split = {f"{part}/{kind}.npy": saved(np.save, array[at]) for part, at in parts
             for kind, array in (("images", COLOUR), ("labels", VALUES))}
    yield write(folder / "array-folders", split), COLOUR, three, 2
    files = {f"{('Train', 'Train', 'valid')[i // 2]}/all/{'ab'[i % 2]}/{i}.jfif": png(x) for i, x in enumerate(GREY)}
    yield write(folder / "splits", files), GREY[[0, 2, 1, 3, 4, 5]], [*"aabbab"], 2, "Train, valid are splits"
    latents = abs(GENERATOR.normal(size=(6, 8, 4, 4))).astype(np.float32)
    files = {f"img-mean-std-{i}.npy": saved(np.save, latent) for i, latent in enumerate(latents)}
    yield write(folder / "latents.zip", files), latents, [], 0, "6 latents, ", "4x4, channels: 4"


def test_every_kind_of_source_comes_back_exact(tmp_path):
    for path, images, classes, held, *said in good_sources(tmp_path):
        dataset, lines = make_ready(path, f"--name={path.name}", "--holdout=0")
        facts, trained = dataset.facts, len(images) - held
        names = sorted(set(classes), key=lambda name: (len(name), name))  # "9" comes before "10"
        counts = [classes[:trained].count(name) for name in names]
        listed = ", ".join(f"{name} {count}" for name, count in zip(names, counts))
        said += [f"held out: {held};", f"{len(names)} classes: {listed}" if classes else "no classes"]
        assert all(words in " | ".join(lines) for words in said), (path, lines)
        parts = [dataset, dataset.holdout] if held else [dataset]
        labels = np.concatenate([part.labels for part in parts])
        assert np.array_equal(np.concatenate([part.images for part in parts]), images), path
        assert (len(dataset), dataset.images.dtype, dataset.labels.dtype) == (trained, images.dtype, np.int64)
        assert facts["classes"] == names and [names[label] for label in labels if names] == classes, path
        assert facts["counts"] == (counts or [trained])
        both = b"".join(str(part.shape).encode() + part.tobytes() for part in (images[:trained], images[trained:]))
        assert facts["hashes"] == {name: hashlib.sha256(content).hexdigest() for name, content in (
            ("images", both), ("labels", labels.tobytes()), ("classes", json.dumps(names).encode()))}
        mean, variance = [dataset.images.mean()], [dataset.images.var()]
        if facts["latent"]:  # of the means, and the posteriors' own
            means, deviations = np.split(images.astype(float), 2, axis=1)
            mean, variance = means.mean((0, 2, 3)), means.var((0, 2, 3)) + np.square(deviations).mean((0, 2, 3))
        np.testing.assert_allclose(facts["mean"], mean, rtol=1e-9)
        np.testing.assert_allclose(np.square(facts["std"]), variance, rtol=1e-9)
    assert facts["latent"] and dataset.shape == (4, 4, 4)


def test_pictures_are_turned_upright_cropped_and_resized(tmp_path):
    wide, exif = random_images(1, 36)[0, 0, :12], Image.Exif()
    exif[0x0112] = 6  # orientation: turn it right by 90 degrees
    folder = write(tmp_path / "wide", {"a.png": png(wide[None]), "b.png": png(np.rot90(wide)[None], exif=exif)})
    array = write(tmp_path / "wide.npz", saved(np.savez, np.stack([wide, wide])))
    square, small = wide[:, 12:24], np.asarray(Image.fromarray(wide[:, 12:24]).resize((5, 5), Image.Resampling.LANCZOS))
    for source, words, picture in ((folder, ["--size=5"], small), (folder, [], square),
                                   (array, ["--size=5", "--name=array"], small)):
        dataset, lines = make_ready(source, "--holdout=0", *words)
        assert "images not square, cropped to their centre: 2" in lines
        assert np.array_equal(dataset.images, [[picture], [picture]])
    assert sorted(path.name for path in data.DATASETS.iterdir()) == ["array", "wide", "wide-5"]  # nothing half-made
    sheet = np.asarray(Image.open(data.DATASETS / "wide-5" / "contact-sheet.png"))
    assert np.array_equal(sheet[2:62, 2:62], small.repeat(12, 0).repeat(12, 1))


def test_what_pixels_mean_is_kept_or_told(tmp_path):
    """Opaque alpha goes, transparency is put on white, 16 bits become 8, grey among colour becomes colour."""
    grey, colour = GREY[0, 0], COLOUR[0].transpose(1, 2, 0)
    three, white = np.dstack([grey] * 3), np.full((5, 5, 3), 255)

    def see_through(array, alpha):
        picture = Image.fromarray(array)
        picture.putalpha(alpha)
        return picture

    greys = [(Image.fromarray(grey), three), (Image.fromarray(grey.astype(np.uint16) * 257), three),
             (see_through(grey, 255), three)]
    pairs = [(see_through(colour, 128), colour * (128 / 255) + 127), (see_through(grey, 0), white),
             (see_through(colour, 255), colour), (Image.fromarray(colour).quantize(256), colour), *greys]
    files = {f"{i}.png": saved(picture.save, format="PNG") for i, (picture, _) in enumerate(pairs)}
    dataset, lines = make_ready(write(tmp_path / "mixed", files), "--holdout=0")
    np.testing.assert_allclose(dataset.images.transpose(0, 2, 3, 1), [expected for _, expected in pairs], atol=1)
    assert "images with transparency, put on white: 2" in lines
    assert "images grey, made colour as others are: 4" in lines
    only = write(tmp_path / "grey", {name: files[name] for name in ("4.png", "5.png", "6.png")})
    assert make_ready(only)[0].shape == (1, 5, 5)


def test_links_are_followed_once_and_name_no_class(tmp_path):
    folder = write(tmp_path / "set", {f"{'dz'[i % 2]}/{i}.png": png(image) for i, image in enumerate(GREY)})
    (folder / "h").symlink_to(folder / "z"), (tmp_path / "link").mkdir()
    (folder / "z" / "again").symlink_to(folder), (tmp_path / "link" / "set").symlink_to(folder)
    dataset, _ = make_ready(tmp_path / "link", "--holdout=0")
    assert np.array_equal(dataset.images, GREY[[0, 2, 4, 1, 3, 5]]) and dataset.facts["classes"] == ["d", "z"]


def test_broken_images_are_left_out_if_asked(tmp_path):
    folder = write(tmp_path / "set", {f"{i}.png": png(image) for i, image in enumerate(GREY)} | {"9.png": b"no"})
    dataset, lines = make_ready(folder, "--skip-broken", "--holdout=0")
    assert np.array_equal(dataset.images, GREY) and "images that cannot be read, left out: 1" in lines


def test_large_images_and_sets_on_another_disk(tmp_path):
    source = write(tmp_path / "big.npz", saved(np.savez, random_images(3, 300)[:, 0]))
    make_ready(source)
    (data.DATASETS / "big").rename(tmp_path / "elsewhere")
    (data.DATASETS / "big").symlink_to(tmp_path / "elsewhere")
    make_ready(source, "--overwrite", "--name=big", "--size=200")
    assert Image.open(data.DATASETS / "big" / "contact-sheet.png").size == (10 * 130 + 2, 10 * 130 + 2)
    assert not (data.DATASETS / "big").is_symlink() and load_dataset("big").shape == (1, 200, 200)


def test_copies_of_an_image_are_held_out_together(tmp_path):
    images = np.concatenate([random_images(400, 5)] * 2)
    dataset, lines = make_ready(write(tmp_path / "a.npz", saved(np.savez, images[:, 0])), "--holdout=0.2")
    share = [int(hashlib.sha256(image).hexdigest(), 16) / 2**256 for image in images]
    assert np.array_equal(dataset.holdout.images, images[np.array(share) < 0.2])
    assert 100 < len(dataset.holdout) < 230 and f"held out: {len(dataset.holdout)};" in lines[1]


def bad_sources():
    """Name, content, and words of the line that refuses it."""
    pixels = random_images(4, 6)
    files = {f"{i}.png": png(image) for i, image in enumerate(pixels)}
    classes = {f"{'ab'[i % 2]}/{i}.png": png(image) for i, image in enumerate(pixels)}
    array = saved(np.save, pixels)
    yield "cut.npy", array[:-20], "cut.npy: "
    yield "words", b"no images here", "it holds no images of a kind"
    yield "pickled.npy", saved(np.save, np.array([{}])), "Object arrays cannot be loaded"
    yield "few.npz", saved(np.savez, pixels[:, 0], np.arange(3)), "has 3 labels for 4 images"
    yield "float.npz", saved(np.savez, pixels[:, 0] / 255), "(images * 255).round().astype('uint8')"
    yield "names.npz", saved(np.savez, pictures=pixels[:, 0], y=np.arange(4)), "has arrays "
    half = {"x_train": pixels[:, 0], "x_test": pixels[:, 0], "y_test": np.arange(4)}
    yield "half.npz", saved(np.savez, **half), "some of its images"
    yield "twice", {"a/images.npy": array, "b/images.npy": array}, "several sets of images, a/images.npy, b/images.npy"
    yield "stray", files | {"images.npy": array}, "both pictures and arrays, images.npy"
    yield "pictures.tar.gz", files, "it holds no images of a kind"
    doubled = json.dumps({"labels": [[name, i] for i, name in enumerate([*files, "0.png"])]}).encode()
    yield "doubled.zip", files | {"dataset.json": doubled}, "dataset.json: has two labels for 0.png"
    yield "same.npz", saved(np.savez, np.ones((2, 4, 4), np.uint8)), "alike"
    yield "tags.npz", saved(np.savez, pixels[:, 0], np.ones((4, 2), int)), "one whole number, one text or one one-hot"
    yield "lost.zip", files | {"dataset.json": b'{"labels": [["a/0.png", 1]]}'}, "has no label for any of the images"
    yield "nested.zip", files | {"dataset.json": b"[" * 10**5}, "dataset.json: RecursionError"
    yield "broken.zip", files | {"9.png": b"no"}, "9.png: cannot identify"
    yield "other", files | {"9.png": png(pixels[0, :, :5, :5])}, "9.png is 1x5x5, the first is 1x6x6: images"
    deep = saved(Image.fromarray(pixels[0, 0] * 1.0).save, format="TIFF")
    yield "deep", files | {"9.tif": deep}, "9.tif: has real numbers of 32 bits"
    yield "untidy", files | {"cats/0.png": files["0.png"]}, "0.png lies beside the folders"
    yield "train", classes | {"train/0.png": files["0.png"]}, "has folders that look like splits, train beside a, b"
    yield "nan.zip", {"a.npy": saved(np.save, np.full((8, 4, 4), np.nan, np.float32))}, "a.npy: must be float32"
    yield "logs.zip", {"a.npy": saved(np.save, np.full((8, 4, 4), -9, np.float32))}, "a.npy: must be float32"
    yield "code.zip", {"a.npy": saved(np.save, np.array([{}]))}, "a.npy: Object arrays cannot be loaded"
    yield "both.zip", files | {"a.npy": b""}, "both pictures and arrays, a.npy"
    yield "nothing", {"a.txt": b""}, "it holds no images of a kind"
    yield "nowhere", {}, "there is no such file"


def test_a_bad_source_is_refused_in_one_line_without_litter(tmp_path):
    for name, content, message in bad_sources():
        line = refusal(write(tmp_path / name, content))
        assert message in line and name in line and not any(data.DATASETS.iterdir()), (name, line)


def datasets_at(folder):
    data.DATASETS = folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_it_leaves_nothing_behind(tmp_path, number):
    source, folder = tmp_path / "many.npz", data.DATASETS
    np.savez(source, np.zeros((10**6, 1, 1), np.uint8))
    job = Job(["data.py", source], setup=partial(datasets_at, folder))
    while not list(folder.glob(".making-*/many/images.npy")):
        time.sleep(0.01)
    os.kill(job.processes[0].pid, number)
    result = job.finish()
    assert result.returncode == [130] and result.stderr.endswith("interrupted\n") and not any(folder.iterdir())


def test_a_set_that_is_there_is_replaced_only_if_asked(tmp_path):
    images = random_images(6, 4)
    a, b = (write(tmp_path / f"{i}.npz", saved(np.savez, x[:, 0])) for i, x in enumerate((images, images // 2)))
    first, _ = make_ready(a, "--name=set", "--holdout=0")
    assert "is ready" in call("data.py", a, "--name=set", "--holdout=0").stdout
    for words in ((b, "--name=set"), (a, "--name=set", "--size=3")):
        assert "set was made with " in refusal(*words)
    assert np.array_equal(make_ready(b, "--name=set", "--overwrite", "--holdout=0")[0].images, images // 2)
    assert np.array_equal(first.images, images)  # who has the old one open keeps it
    assert "--name: " in refusal(a, "--name=../up", "--overwrite")
    assert "mine is there and is no set" in refusal(write(data.DATASETS / "mine", {"a.png": png(images[0])}))


def test_a_damaged_set_is_one_line(tmp_path):
    make_ready(write(tmp_path / "a.npz", saved(np.savez, random_images(60, 4)[:, 0], np.arange(60) % 3)))
    whole = {path.name: path.read_bytes() for path in (data.DATASETS / "a").iterdir()}
    about, images, labels = (whole[name] for name in ("about.json", "images.npy", "labels.npy"))
    for name, content in (("about.json", b"{"), ("about.json", about.replace(b'"format": 2', b'"format": 1')),
                          ("holdout-labels.npy", labels), ("holdout-images.npy", images[:-1]),
                          ("images.npy", images[:-1]), ("images.npy", labels), ("labels.npy", labels[:-8] + bytes(8)),
                          ("holdout-labels.npy", saved(np.save, np.full_like(load_dataset("a").holdout.labels, 99))),
                          ("images.npy", saved(np.save, load_dataset("a").images[..., :3])),
                          ("images.npy", saved(np.save, load_dataset("a").images / 255)),
                          ("about.json", re.sub(rb'"std": \[[^]]*', b'"std": [0.0', about))):
        write(data.DATASETS / "a", whole | {name: content})
        with pytest.raises(UserError, match="^[^\n]*datasets/a[^\n]*$"):
            load_dataset("a")


LABELS = np.arange(15) % 3  # of the public sets here


def public_files():
    """Files of each public set as its owners have them, of 10 images to train on and 5 held out."""
    for name in ("mnist", "fashion-mnist"):
        pixels = random_images(15, 28)
        parts = [idx(part) for at in (slice(10), slice(10, 15)) for part in (pixels[at, 0], LABELS[at])]
        files = dict(zip(prepare.public.DOWNLOADS[name][1], map(gzip.compress, parts)))
        yield name, files, pixels
    batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, folder, parts, names, before in (
            ("cifar10", "cifar-10-batches-bin", batches, "batches.meta.txt", b""),
            ("cifar100", "cifar-100-binary", ["train", "test"], "fine_label_names.txt", b"c")):
        pixels = random_images(15, 32, 3)
        records = [before + bytes([label]) + image.tobytes() for image, label in zip(pixels, LABELS)]
        each = 10 // (len(parts) - 1)
        files = {f"{part}.bin": b"".join(records[each * i:][:each]) for i, part in enumerate(parts[:-1])}
        files |= {f"{parts[-1]}.bin": b"".join(records[10:]), names: b"ant\nbee\ncat\n", "readme.html": b""}
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for file, content in reversed(files.items()):
                member = tarfile.TarInfo(f"{folder}/{file}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        yield name, dict(zip(prepare.public.DOWNLOADS[name][1], [packed.getvalue()])), pixels


def test_a_public_set_is_downloaded_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.setdefaulttimeout", lambda seconds: None)
    monkeypatch.setattr(prepare.public, "TEST_IMAGES", 5)
    classes = {"mnist": ["0", "1", "2"], "fashion-mnist": ["T-shirt", "trouser", "pullover"]}
    for name, contents, pixels in public_files():
        base, folder = f"file://{tmp_path}/{name}/", data.DATASETS / "downloads" / name
        files = {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
        monkeypatch.setitem(prepare.public.DOWNLOADS, name, (base, files))
        monkeypatch.setitem(prepare.public.MNIST, name, classes.get(name))
        file, content = next(iter(contents.items()))
        for wrong in ({}, {file: b"<html>"}, {file: content[:-1]}, {file: content[:-1] + b"!"}):
            write(tmp_path / name, wrong)  # at first there is nothing
            line = refusal(name, code=1)
            assert "cannot download file://" in line and f"put the file at {folder}/{file}" in line
            assert not any(folder.iterdir())
        served = write(tmp_path / name, contents)
        dataset, _ = make_ready(name)
        assert np.array_equal(dataset.images, pixels[:10]) and np.array_equal(dataset.holdout.images, pixels[10:])
        assert np.array_equal(dataset.labels, LABELS[:10]) and np.array_equal(dataset.holdout.labels, LABELS[10:])
        assert dataset.facts["classes"] == classes.get(name, ["ant", "bee", "cat"])
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
        shutil.rmtree(served)
        dataset, _ = make_ready(name, "--overwrite", "--labels=none")  # it is not fetched again
        assert len(dataset) == 10 and dataset.facts["classes"] == []
    assert "goes with pictures" in refusal(name, "--name=other", "--labels=table.csv")
    (folder / next(iter(contents))).write_bytes(b"damaged")
    assert f"{folder}: " in refusal(name, "--overwrite")


def test_errors_while_reading_become_one_line_with_the_file():
    for error in (RecursionError("deep"), MemoryError(), KeyError("a"), OSError(5, "no disk"), ValueError("a\nb")):
        with pytest.raises(UserError, match="^a.zip: [^\n]*$"), reading("a.zip"):
            raise error
    with pytest.raises(UserError, match="^already said$"), reading("a.zip"):
        raise UserError("already said")


@pytest.mark.parametrize("error, code, line", [
    (UserError("--size: no"), 2, ".*: --size: no\n"), (OSError(28, "disk full"), 1, ".*: .*disk full\n"),
    (KeyboardInterrupt(), 130, ".*: .*\n"), (UserError(""), 2, ""), (ZeroDivisionError("a bug"), None, "")])
def test_a_script_ends_in_one_line_but_a_bug_raises(error, code, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit if code else ZeroDivisionError) as end:
        data.run_main(main)
    assert getattr(end.value, "code", None) == code and re.fullmatch(line, capsys.readouterr().err)


def test_the_public_sets_are_those_that_can_be_fetched():
    assert data.PUBLIC_SETS == tuple(prepare.public.DOWNLOADS)
