import functools
import gzip
import hashlib
import io
import json
import re
import shutil
import struct
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import call
from data import UserError, batch_indices, load_dataset, reading, to_network, to_uint8

DIGITS, GENERATOR = load_dataset("digits"), np.random.default_rng(0)


@pytest.fixture(autouse=True)
def datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DATASETS", tmp_path / "datasets")
    data.DATASETS.mkdir()


def test_the_digits_that_ship_are_the_uci_images():
    """Against what the documentations of UCI (counts) and scikit-learn (first row, mean) say of them."""
    sixteenths = DIGITS.images / 255 * 16
    assert DIGITS.shape == (1, 8, 8) and DIGITS.images.dtype == np.uint8 and not DIGITS.latent
    assert np.abs(sixteenths - sixteenths.round()).max() < 0.04 and sixteenths.max() == 16
    assert sixteenths.round()[0, 0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert sixteenths.round().mean() == pytest.approx(4.884164579855314)
    assert np.bincount(DIGITS.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_what_the_network_sees_has_mean_0_and_std_half_and_can_be_undone():
    x = to_network(torch.from_numpy(np.array(DIGITS.images)), DIGITS.facts)
    assert abs(x.mean()) < 1e-4 and abs(x.std() - 0.5) < 1e-3 and x.dtype == torch.float32
    assert np.array_equal(to_uint8(x, DIGITS.facts), DIGITS.images)
    assert to_uint8(torch.tensor([[[-9.0, 0.5, 9.0]]]), {"mean": [100.0], "std": [50.0]}).tolist() == [[[0, 150, 255]]]


def test_an_epoch_feeds_every_image_once_in_an_order_that_does_not_depend_on_how_it_is_asked_for():
    whole = batch_indices(97, seed=3, start=0, count=97 * 3)
    first, second, third = whole.reshape(3, 97)
    assert sorted(first) == sorted(second) == sorted(third) == list(range(97))
    assert not np.array_equal(first, second) and not np.array_equal(first, batch_indices(97, 4, 0, 97))
    lists = [batch_indices(97, 3, at, 20) for at in range(0, 280, 20)]
    assert np.array_equal(np.concatenate(lists), whole[:280])
    for indices, (images, labels) in zip(lists, DIGITS.feed(iter(lists), torch.device("cpu")), strict=True):
        assert np.array_equal(images, DIGITS.images[indices]) and np.array_equal(labels, DIGITS.labels[indices])


def make_ready(*words):
    result = call("data.py", *words)
    assert result.returncode == 0, result.stderr
    return load_dataset(result.stdout.splitlines()[-1].removesuffix("/contact-sheet.png"))


def refusal(*words):
    result = call("data.py", *words)
    assert result.returncode == 2, result.stderr
    return result.stderr.splitlines()[-1]


def random_images(count, size, channels=1):
    return GENERATOR.integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def saved(save, *arrays, **named):
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    return buffer.getvalue()


def png(image, mode=None, **options):
    picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    return saved(picture.convert(mode or picture.mode).save, **{"format": "PNG"} | options)


def idx(array):
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write(path, files):
    """Files, {name: content}, as a folder, .zip or .tar.gz, or the bytes of one file. Returns the path."""
    if isinstance(files, bytes):
        path.write_bytes(files)
        return path
    base = re.sub(r"\.(zip|tar\.gz)$", "", str(path))
    for name, content in files.items():
        Path(base, name).parent.mkdir(parents=True, exist_ok=True)
        Path(base, name).write_bytes(content)
    kind = {".zip": "zip", ".gz": "gztar"}.get(path.suffix)
    return Path(shutil.make_archive(base, kind, base)) if kind else path


def good_sources(folder):
    """Sources of every format, with the images, labels and class names that must come out of them."""
    grey, colour, cifar = random_images(6, 5), random_images(6, 5, 3), random_images(20, 32, 3)
    values, none, labels, classes = np.array([7, 3, 9, 3, 7, 7]), [0] * 6, [1, 0, 2, 0, 1, 1], ["3", "7", "9"]
    yield write(folder / "alone-images-idx3-ubyte", idx(grey[:, 0])), grey, none, []
    for end, pack in (("-idx3-ubyte.gz", gzip.compress), (".idx3-ubyte", bytes)):
        write(folder / f"train-labels{end}".replace("idx3", "idx1"), pack(idx(values)))
        yield write(folder / f"train-images{end}", pack(idx(grey[:, 0]))), grey, labels, classes
    one, two = (b"".join(bytes([i % 10]) + cifar[i].tobytes() for i in range(at, at + 10)) for at in (0, 10))
    ten = [f"thing{i}" for i in range(10)]
    files = {"b/data_batch_1.bin": one, "a/data_batch_2.bin": two, "a/batches.meta.txt": "\n".join(ten).encode()}
    yield write(folder / "cifar-10.tar.gz", files | {"a/test_batch.bin": b"x"}), cifar, [*range(10)] * 2, ten
    hundred = b"".join(bytes([i // 5, 2 * i]) + image.tobytes() for i, image in enumerate(cifar))
    yield write(folder / "cifar-100.tar.gz", {"train.bin": hundred}), cifar, range(20), [str(2 * i) for i in range(20)]
    yield write(folder / "adm.npz", saved(np.savez, colour.transpose(0, 2, 3, 1), values)), colour, labels, classes
    yield write(folder / "ours.npz", saved(np.savez, arr_0=grey[:, 0], labels=values)), grey, labels, classes
    files = {f"{i // 4:05d}/img{i:08d}.png": png(image) for i, image in enumerate(colour)}
    table = json.dumps({"labels": [*zip(files, values.tolist())]}).encode()
    yield write(folder / "edm2.zip", files | {"dataset.json": table}), colour, labels, classes
    yield write(folder / "plain", files | {"dataset.json": b'{"labels": null}'}), colour, none, []
    files = {f"set/{'dog cat'.split()[i % 2]}/deep/{i}.png": png(image) for i, image in enumerate(colour)}
    yield write(folder / "classes.zip", files), colour[[1, 3, 5, 0, 2, 4]], [0, 0, 0, 1, 1, 1], ["cat", "dog"]
    latents = GENERATOR.normal(size=(6, 8, 4, 4)).astype(np.float32)
    files = {f"img-mean-std-{i}.npy": saved(np.save, latent) for i, latent in enumerate(latents)}
    yield write(folder / "latents.zip", files), latents, none, []


def test_every_format_comes_back_exact_with_statistics_and_hashes_that_others_can_check(tmp_path):
    for path, images, labels, classes in good_sources(tmp_path):
        dataset, labels, pixels = make_ready(path), np.array(labels, np.int64), images.astype(float)
        assert dataset.images.dtype == images.dtype and np.array_equal(dataset.images, images), path
        assert dataset.labels.dtype == np.int64 and np.array_equal(dataset.labels, labels), path
        about, names = dataset.about, json.dumps(classes or None).encode()
        assert about["classes"] == classes and about["counts"] == [list(labels).count(i) for i in range(len(classes))]
        assert about["hashes"] == {name: hashlib.sha256(content).hexdigest() for name, content in (
            ("images", images.tobytes()), ("labels", labels.tobytes()), ("classes", names))}
        mean, variance = [pixels.mean()], [pixels.var()]
        if dataset.latent:                                                  # of the means, and the posteriors' own
            means, deviations = np.split(pixels, 2, axis=1)
            mean, variance = means.mean((0, 2, 3)), means.var((0, 2, 3)) + np.square(deviations).mean((0, 2, 3))
        np.testing.assert_allclose(about["mean"], mean, rtol=1e-9)
        np.testing.assert_allclose(np.square(about["std"]), variance, rtol=1e-9)
    assert dataset.latent and dataset.shape == (4, 4, 4)


def test_pictures_are_turned_upright_cropped_to_the_centre_resized_and_shown_as_they_are(tmp_path):
    wide, exif = random_images(1, 36)[0, 0, :12], Image.Exif()
    exif[0x0112] = 6                                                        # orientation: turn it right by 90 degrees
    folder = write(tmp_path / "wide", {"a.png": png(wide[None]), "b.png": png(np.rot90(wide)[None], exif=exif)})
    assert "--size" in refusal(folder)
    expected = np.asarray(Image.fromarray(wide[:, 12:24]).resize((5, 5), Image.Resampling.LANCZOS))
    assert np.array_equal(make_ready(folder, "--size=5").images, np.stack([expected, expected])[:, None])
    assert [path.name for path in data.DATASETS.iterdir()] == ["wide-5"]    # no half-made set beside it
    sheet = np.asarray(Image.open(data.DATASETS / "wide-5" / "contact-sheet.png"))
    assert np.array_equal(sheet[2:62, 2:62], expected.repeat(12, 0).repeat(12, 1))


def bad_sources():
    """Name, content, and words of the line that refuses it."""
    pixels = random_images(4, 6)
    files = {f"{i}.png": png(image) for i, image in enumerate(pixels)}
    moving = png(pixels[0], format="GIF", save_all=True, append_images=[Image.fromarray(pixels[1, 0])])
    yield "cut-idx3.gz", gzip.compress(idx(pixels[:, 0]))[:-20], "ended"
    yield "huge-idx3", struct.pack(">IIII", 0x803, 2**31, 2**15, 2**15), "huge-idx3"
    yield "readme.tar.gz", {"readme": b""}, "data_batch_1.bin"
    yield "few.npz", saved(np.savez, pixels[:, 0], np.arange(3)), "3 labels for 4 images"
    yield "same.npz", saved(np.savez, np.ones((2, 4, 4), np.uint8)), "alike"
    yield "lost.zip", files | {"dataset.json": b'{"labels": [["0.png", 1]]}'}, "1.png"
    yield "nested.zip", files | {"dataset.json": b"[" * 10**5}, "dataset.json: RecursionError"
    yield "broken.zip", files | {"9.png": b"no"}, "9.png: cannot identify"
    yield "other", files | {"9.png": png(pixels[0, :, :5])}, "is 6x5"
    yield "deep", files | {"9.png": png(pixels[0].astype(np.uint16) * 99)}, "9.png: has more than 8 bits a channel"
    yield "clear", files | {"9.png": png(pixels[0], "RGBA")}, "9.png: has an alpha channel"
    yield "moving", files | {"9.png": moving}, "9.png: is animated, 2 frames"
    yield "untidy", files | {"cats/0.png": files["0.png"]}, "0.png lies beside the folders"
    yield "nan.zip", {"a.npy": saved(np.save, np.full((8, 4, 4), np.nan, np.float32))}, "a.npy: must be float32"
    yield "code.zip", {"a.npy": saved(np.save, np.array([{}]))}, "a.npy: Object arrays cannot be loaded"
    yield "nothing", {"a.txt": b""}, "there are no images in it"
    yield "nowhere", {}, "there is no such file"


def test_a_bad_source_is_refused_in_one_line_that_names_it_and_nothing_is_left_behind(tmp_path):
    for name, content, message in bad_sources():
        line = refusal(write(tmp_path / name, content))
        assert message in line and name in line and not any(data.DATASETS.iterdir()), (name, line)


def test_a_set_that_is_there_is_replaced_only_if_asked(tmp_path):
    images = random_images(6, 4)
    a, b = (write(tmp_path / f"{i}.npz", saved(np.savez, x[:, 0])) for i, x in enumerate((images, images // 2)))
    first = make_ready(a, "--name=set")
    assert "is ready" in call("data.py", a, "--name=set").stdout
    for words in ((b, "--name=set"), (a, "--name=set", "--size=3")):
        assert "was made from" in refusal(*words)
    assert np.array_equal(make_ready(b, "--name=set", "--overwrite").images, images // 2)
    assert np.array_equal(first.images, images)                             # who has the old one open keeps it
    assert "--name: " in refusal(a, "--name=../up", "--overwrite")


def test_a_damaged_set_is_one_line(tmp_path):
    make_ready(write(tmp_path / "a.npz", saved(np.savez, random_images(6, 4)[:, 0], np.arange(6) % 3)))
    whole = {path.name: path.read_bytes() for path in (data.DATASETS / "a").iterdir()}
    about, images, labels = (whole[name] for name in ("about.json", "images.npy", "labels.npy"))
    for name, content in (("about.json", b"{"), ("about.json", about.replace(b'"format": 1', b'"format": 2')),
                          ("images.npy", images[:-1]), ("images.npy", labels), ("labels.npy", labels[:-8] + bytes(8))):
        write(data.DATASETS / "a", whole | {name: content})
        with pytest.raises(UserError, match="^[^\n]*datasets/a[^\n]*$"):
            load_dataset("a")


def test_a_download_is_whole_and_has_its_hash_or_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.setdefaulttimeout", lambda seconds: None)
    images, folder = gzip.compress(idx(random_images(20, 4)[:, 0])), data.DATASETS / "downloads" / "fashion-mnist"
    contents = {"images-idx3.gz": images, "labels-idx1.gz": gzip.compress(idx(np.arange(20) % 10))}
    server = HTTPServer(("127.0.0.1", 0), functools.partial(SimpleHTTPRequestHandler, directory=tmp_path / "served"))
    Thread(target=server.serve_forever, daemon=True).start()
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setitem(data.DOWNLOADS, "fashion-mnist", (f"http://127.0.0.1:{server.server_port}/", files))
    for wrong in (None, b"<html>", images[:-1], images[:-1] + b"!"):
        write(tmp_path / "served", {"images-idx3.gz": wrong} if wrong else {})          # at first there is nothing: 404
        line = refusal("fashion-mnist")
        assert "cannot download http://127.0.0.1" in line and f"put the file at {folder}/images-idx3.gz" in line
        assert not any(folder.iterdir())
    write(tmp_path / "served", contents)
    assert make_ready("fashion-mnist").about["classes"][0] == "T-shirt"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    server.shutdown(), server.server_close()
    assert len(make_ready("fashion-mnist", "--overwrite")) == 20            # what is there is not fetched again


def test_whatever_goes_wrong_while_reading_becomes_one_line_that_names_it():
    for error in (RecursionError("deep"), MemoryError(), KeyError("a"), OSError(5, "no disk"), ValueError("a\nb")):
        with pytest.raises(UserError, match="^a.zip: [^\n]*$"), reading("a.zip"):
            raise error
    with pytest.raises(UserError, match="^already said$"), reading("a.zip"):
        raise UserError("already said")


@pytest.mark.parametrize("error, code, line", [
    (UserError("--size: no"), 2, ".*: --size: no\n"), (OSError(28, "disk full"), 1, ".*: .*disk full\n"),
    (KeyboardInterrupt(), 130, ".*: .*\n"), (UserError(""), 2, ""), (ZeroDivisionError("a bug"), None, "")])
def test_a_script_ends_in_one_line_and_the_code_of_its_kind_of_error_but_a_bug_raises(error, code, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit if code else ZeroDivisionError) as end:
        data.run_main(main)
    assert getattr(end.value, "code", None) == code and re.fullmatch(line, capsys.readouterr().err)
