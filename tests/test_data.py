import gzip
import hashlib
import json
import os
import pickle
import re
import struct
import tarfile
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT
from data import DOWNLOADS, ZipIndex, batch_indices, epoch_order, fetch, load_dataset, to_network, to_uint8


def test_digits_are_the_1797_uci_images():
    digits = load_dataset("digits")
    raw = np.load(ROOT / "datasets" / "digits.npz", allow_pickle=False)
    assert digits.images.shape == (1797, 1, 8, 8) and digits.images.dtype == torch.uint8
    assert digits.labels.dtype == torch.int64 and digits.labels.bincount().tolist() == np.bincount(raw["labels"]).tolist()
    np.testing.assert_array_equal(np.round(digits.images[:, 0].numpy() / 255 * 16), raw["images"])      # nothing is lost
    assert (digits.images.min(), digits.images.max()) == (0, 255)


def test_what_the_network_sees_has_mean_0_and_std_half_and_can_be_undone():
    digits = load_dataset("digits")
    assert digits.stats["mean"] == pytest.approx(digits.images.double().mean().item(), rel=1e-12)
    assert digits.stats["std"] == pytest.approx(digits.images.double().std(correction=0).item(), rel=1e-12)
    (images, labels), = digits.feed([torch.arange(1797)], torch.device("cpu"))
    x = to_network(images, digits.stats)
    assert abs(x.mean()) < 1e-4 and abs(x.std() - 0.5) < 1e-3 and x.dtype == torch.float32
    assert torch.equal(to_uint8(x, digits.stats), digits.images) and torch.equal(labels, digits.labels)


def test_values_outside_the_range_are_clipped():
    stats = {"mean": 100.0, "std": 50.0}
    assert to_uint8(torch.tensor([-9.0, 0.0, 9.0]), stats).flatten().tolist() == [0, 100, 255]
    assert to_network(torch.tensor([100, 150], dtype=torch.uint8), stats).flatten().tolist() == [0.0, 0.5]


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    seen = batch_indices(97, seed=3, start=0, count=97 * 3).view(3, 97)
    for epoch in seen:
        assert epoch.sort().values.tolist() == list(range(97))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], batch_indices(97, 4, 0, 97))


def test_order_does_not_depend_on_how_it_is_asked_for():
    whole = batch_indices(97, seed=0, start=0, count=500)
    pieces = [batch_indices(97, seed=0, start=start, count=20) for start in range(0, 500, 20)]
    assert torch.equal(torch.cat(pieces), whole)


def test_unknown_dataset_names_those_there_are():
    with pytest.raises(ValueError, match="no 'digit': no file, no folder, nor one of digits, mnist"):
        load_dataset("digit")


# ---- round trips: files written by other means come back exact ----

GENERATOR = np.random.default_rng(0)


def random_images(count, size, channels=1):
    return GENERATOR.integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def check(dataset, images, labels, num_classes):
    raw = dataset.images if dataset.read is None else torch.stack([torch.from_numpy(dataset.read(i)) for i in range(len(dataset))])
    np.testing.assert_array_equal(raw.numpy(), images)
    assert dataset.labels.tolist() == list(labels) and dataset.num_classes == num_classes and dataset.shape == images.shape[1:]


@pytest.mark.parametrize("suffix, opener", [("", open), (".gz", gzip.open)])
def test_idx_files_come_back(tmp_path, suffix, opener):
    images, labels = random_images(7, 5), [3, 1, 4, 1, 5, 9, 2]
    with opener(tmp_path / f"train-images-idx3-ubyte{suffix}", "wb") as file:
        file.write(struct.pack(">IIII", 2051, 7, 5, 5) + images.tobytes())
    check(load_dataset(str(tmp_path / f"train-images-idx3-ubyte{suffix}")), images, [0] * 7, 0)
    with opener(tmp_path / f"train-labels-idx1-ubyte{suffix}", "wb") as file:
        file.write(struct.pack(">II", 2049, 7) + bytes(labels))
    check(load_dataset(str(tmp_path / f"train-images-idx3-ubyte{suffix}")), images, labels, 10)


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    return str(path)


def test_cifar_archives_come_back(tmp_path):
    images, labels = random_images(40, 32, 3), list(range(10)) * 4
    binary = {f"cifar-10-batches-bin/data_batch_{b + 1}.bin": b"".join(                     # the second one first
        bytes([labels[i]]) + images[i].tobytes() for i in range(20 * b, 20 * b + 20)) for b in (1, 0)}
    check(load_dataset(write_tar(tmp_path / "binary.tar.gz", binary | {"cifar-10-batches-bin/test_batch.bin": b"x"})), images, labels, 10)
    for protocol in (0, 2, 4):                                              # the archive has 2
        python = {f"cifar-10-batches-py/data_batch_{b + 1}": pickle.dumps(
            {"batch_label": "training", "labels": labels[20 * b:20 * b + 20], "data": images[20 * b:20 * b + 20].reshape(20, -1),
             "filenames": [f"{i}.png" for i in range(20)]}, protocol) for b in range(2)}
        check(load_dataset(write_tar(tmp_path / "python.tar.gz", python)), images, labels, 10)
    fine = [i * 2 for i in range(40)]
    hundred = b"".join(bytes([fine[i] // 5, fine[i]]) + images[i].tobytes() for i in range(40))
    check(load_dataset(write_tar(tmp_path / "hundred.tar.gz", {"cifar-100-binary/train.bin": hundred})), images, fine, 100)
    python = pickle.dumps({"filenames": ["a"] * 40, "batch_label": "x", "fine_labels": fine, "coarse_labels": [f // 5 for f in fine],
                           "data": images.reshape(40, -1)}, 2)
    check(load_dataset(write_tar(tmp_path / "hundred.tar.gz", {"cifar-100-python/train": python})), images, fine, 100)


def test_a_pickle_that_carries_code_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    with pytest.raises(ValueError, match="not a CIFAR batch"):
        load_dataset(write_tar(tmp_path / "trap.tar.gz", {"data_batch_1": pickle.dumps({"labels": [1], "data": Trap()}, 2)}))
    assert not (tmp_path / "sprung").exists()


def png(image, mode=None, **options):
    buffer = BytesIO()
    picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    (picture.convert(mode) if mode else picture).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def write_zip(path, entries, labels=None, method=zipfile.ZIP_STORED):
    """As EDM2's dataset tool does: stored entries in numbered folders, labels in dataset.json."""
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in entries.items():
            file.writestr(name, data)
        if labels is not None:
            file.writestr("dataset.json", json.dumps({"labels": labels}))
    return str(path)


@pytest.mark.parametrize("streamed", [False, True])
def test_edm2_zips_come_back(tmp_path, monkeypatch, streamed):
    monkeypatch.setattr("data.IN_MEMORY", 0 if streamed else 2**30)
    images, labels = random_images(12, 6, 3), [i % 3 for i in range(12)]
    names = [f"{i // 5:05d}/img{i:08d}.png" for i in range(12)]
    path = write_zip(tmp_path / "a.zip", {name: png(image) for name, image in zip(names, images)}, list(zip(names, labels)))
    dataset = load_dataset(path)
    assert (dataset.read is not None) == streamed
    check(dataset, images, labels, 3)
    check(load_dataset(write_zip(tmp_path / "b.zip", {name: png(image) for name, image in zip(names, images)})), images, [0] * 12, 0)
    latents = GENERATOR.normal(size=(12, 8, 4, 4)).astype(np.float32)
    entries = {}
    for i, latent in enumerate(latents):
        buffer = BytesIO()
        np.save(buffer, latent)
        entries[f"00000/img-mean-std-{i:08d}.npy"] = buffer.getvalue()
    dataset = load_dataset(write_zip(tmp_path / "c.zip", entries, [[name, label] for name, label in zip(entries, labels)]))
    assert dataset.latent and dataset.shape == (4, 4, 4) and dataset.labels.tolist() == labels
    np.testing.assert_array_equal(torch.cat(list(dataset.raw()))[epoch_order(12, 0, 0).argsort()] if streamed else dataset.images, latents)
    mean, std = latents[:, :4].astype(float), latents[:, 4:].astype(float)
    np.testing.assert_allclose(dataset.stats["mean"], mean.mean((0, 2, 3)), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(dataset.stats["std"], np.sqrt(mean.var((0, 2, 3)) + (std**2).mean((0, 2, 3))), rtol=1e-6)


def test_the_zip_index_reads_the_64_bit_directory(tmp_path):
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as file:
        for i in range(70000):                                              # beyond 65,535 entries
            file.writestr(f"{i:08d}.txt", str(i))
    index = ZipIndex(tmp_path / "many.zip")
    assert len(index.names) == 70000 and index.read(69999) == b"69999" and index.read(12345) == b"12345"


def test_the_zip_index_reads_offsets_beyond_4_gb(tmp_path):
    with open(tmp_path / "far.zip", "wb") as file:                          # sparse: takes no room
        file.seek(5 * 2**30)
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.txt", "far away")
    assert ZipIndex(tmp_path / "far.zip").read(0) == b"far away"


def test_folders_come_back_cropped_and_resized_if_asked(tmp_path):
    images = random_images(6, 8, 3)
    for i, image in enumerate(images):
        (tmp_path / "set" / "ab"[i % 2] / "deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / "ab"[i % 2] / "deep" / f"{i}.png").write_bytes(png(image))
    check(load_dataset(str(tmp_path / "set")), images[[0, 2, 4, 1, 3, 5]], [0, 0, 0, 1, 1, 1], 2)
    check(load_dataset(str(tmp_path / "set" / "a" / "deep")), images[[0, 2, 4]], [0, 0, 0], 0)
    wide = np.zeros((3, 10, 30), np.uint8)
    wide[:, :, 10:20] = images[0][:, :1, :1]                                # the central square is of one colour
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "a.png").write_bytes(png(wide))
    with pytest.raises(ValueError, match="not all of one square size; choose one with --model.image_size"):
        load_dataset(str(tmp_path / "wide"))
    cropped = load_dataset(str(tmp_path / "wide"), size=5)
    np.testing.assert_array_equal(cropped.images[0].numpy(), np.broadcast_to(images[0][:, :1, :1], (3, 5, 5)))
    assert load_dataset(str(tmp_path / "wide"), size=5, channels=1).shape == (1, 5, 5)


def test_adm_npz_comes_back(tmp_path):
    images = random_images(5, 4, 3)
    np.savez(tmp_path / "a.npz", images.transpose(0, 2, 3, 1), np.array([0, 1, 2, 1, 0]))
    check(load_dataset(str(tmp_path / "a.npz")), images, [0, 1, 2, 1, 0], 3)
    np.savez(tmp_path / "b.npz", images[:, 0])
    check(load_dataset(str(tmp_path / "b.npz")), images[:, :1], [0] * 5, 0)


def test_labels_lie_beside_by_either_spelling(tmp_path):
    images, labels = random_images(3, 4), [2, 0, 1]
    with gzip.open(tmp_path / "t-images.idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">IIII", 2051, 3, 4, 4) + images.tobytes())
    (tmp_path / "t-labels.idx1-ubyte").write_bytes(struct.pack(">II", 2049, 3) + bytes(labels))
    check(load_dataset(str(tmp_path / "t-images.idx3-ubyte.gz")), images, labels, 3)


def test_an_image_that_fails_while_streaming_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("data.IN_MEMORY", 0)
    entries = {f"{i:04d}.png": png(image) for i, image in enumerate(random_images(30, 4))}
    dataset = load_dataset(write_zip(tmp_path / "a.zip", entries | {"0015.png": b"no"}))
    for workers in (0, 2):
        with pytest.raises(ValueError, match=r"a.zip: entry '0015.png': does not decode") as caught:
            list(dataset.feed([torch.arange(5), torch.arange(10, 20)], torch.device("cpu"), workers))
        assert "\n" not in str(caught.value)


def test_streamed_and_resident_sets_feed_the_same(tmp_path, monkeypatch):
    images, labels = random_images(30, 4), [i % 5 for i in range(30)]
    entries = {f"{i:04d}.png": png(image) for i, image in enumerate(images)}
    path, lists = write_zip(tmp_path / "a.zip", entries, list(zip(entries, labels))), [batch_indices(30, 0, start, 8) for start in range(0, 80, 8)]
    resident = list(load_dataset(path).feed(lists, torch.device("cpu")))
    monkeypatch.setattr("data.IN_MEMORY", 0)
    for workers in (0, 2):
        for ours, theirs in zip(load_dataset(path).feed(lists, torch.device("cpu"), workers), resident, strict=True):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


# ---- bad data ----

def bad_files(folder):
    """Pairs of a bad dataset and what its one line says."""
    good, labels = random_images(4, 6), {f"{i}.png": i % 2 for i in range(4)}
    entries = {f"{i}.png": png(image) for i, image in enumerate(good)}

    def idx(name, data, label_data=None):
        (folder / name).mkdir()
        (folder / name / "images-idx3-ubyte").write_bytes(data)
        if label_data is not None:
            (folder / name / "labels-idx1-ubyte").write_bytes(label_data)
        return folder / name / "images-idx3-ubyte"

    def pictures(name, *files):
        (folder / name).mkdir()
        for i, data in enumerate(files):
            (folder / name / f"{i}.png").write_bytes(data)
        return folder / name

    def npy(array, **options):
        buffer = BytesIO()
        np.save(buffer, array, **options)
        return buffer.getvalue()

    pixels, head = good.tobytes(), struct.pack(">IIII", 2051, 4, 6, 6)
    (folder / "cut-idx3.gz").write_bytes(gzip.compress(head + pixels)[:-20])
    yield folder / "cut-idx3.gz", "cut-idx3.gz: cannot be read, is it whole?"
    yield idx("magic", b"\0\0\x0d\3" + head[4:] + pixels), "images-idx3-ubyte: not an idx file of bytes"
    yield idx("short", head + pixels[:-1]), "holds 143 bytes, but its header says"
    yield idx("labels", head + pixels, struct.pack(">II", 2049, 3) + b"\1\2\3"), "labels-idx1-ubyte: has 3 labels for 4 images"
    yield idx("one", head + pixels, struct.pack(">II", 2049, 4) + b"\0\0\0\0"), "there is only one class"
    yield write_tar(folder / "range.tar.gz", {"data_batch_1.bin": b"\x0b" + bytes(3072)}), "label 11 of image 0 is out of range"
    yield write_tar(folder / "empty.tar.gz", {"readme": b""}), "no CIFAR archive"
    (folder / "cut.tar.gz").write_bytes((folder / "range.tar.gz").read_bytes()[:60])
    yield folder / "cut.tar.gz", "cut.tar.gz: cannot be read"
    outside = {**entries, "../up.png": entries["0.png"]}
    yield write_zip(folder / "outside.zip", outside), "outside.zip: entry '../up.png' leads outside"
    yield write_zip(folder / "packed.zip", entries, method=zipfile.ZIP_DEFLATED), "is compressed or encrypted"
    yield write_zip(folder / "broken.zip", {**entries, "3.png": b"no"}), "broken.zip: entry '3.png': does not decode"
    yield write_zip(folder / "mixed.zip", {**entries, "3.png": png(random_images(1, 7)[0])}), "mixed.zip: entry '3.png': is (1, 7, 7), not (1, 6, 6)"
    yield write_zip(folder / "alpha.zip", {**entries, "3.png": png(random_images(1, 6, 3)[0], "RGBA")}), "entry '3.png': has an alpha channel"
    yield write_zip(folder / "missing.zip", entries, list(labels.items())[:3]), "dataset.json has no label for '3.png'"
    yield write_zip(folder / "negative.zip", entries, [*list(labels.items())[:3], ("3.png", -1)]), "label -1 of image 3 is out of range"
    yield write_zip(folder / "none.zip", {"a.txt": b""}), "there are no PNG or npy entries"
    (folder / "cut.zip").write_bytes((folder / "mixed.zip").read_bytes()[:-30])
    yield folder / "cut.zip", "cut.zip: no zip, or cut off"
    for name, data, message in (("shape", npy(np.zeros((7, 4, 4), np.float32)), "must be float32 (2C, S, S)"),
                                ("dtype", npy(np.zeros((8, 4, 4))), "must be float32 (2C, S, S)"),
                                ("pickled", npy(np.array([{}], dtype=object), allow_pickle=True), "is no plain npy")):
        yield write_zip(folder / f"{name}.zip", {"a.npy": data}), message
    deep = Image.fromarray(GENERATOR.integers(0, 2**16, (6, 6), dtype=np.uint16))
    buffer = BytesIO()
    deep.save(buffer, format="PNG")
    yield pictures("deep", entries["0.png"], buffer.getvalue()), "1.png: has more than 8 bits a channel"
    frames, buffer = [Image.fromarray(image[0]) for image in good], BytesIO()
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:])
    yield pictures("animated", buffer.getvalue()), "0.png: is animated, 4 frames"
    yield pictures("corrupt", entries["0.png"][:60]), "0.png: does not decode"
    yield pictures("nothing"), "nothing: there are no images in it"
    (folder / "single").mkdir()
    pictures("single/cats", entries["0.png"])
    yield folder / "single", "single: there is only one class"
    pictures("untidy", entries["0.png"])
    pictures("untidy/cats", entries["0.png"])
    yield folder / "untidy", "0.png: lies beside the folders of the classes"
    np.savez(folder / "float.npz", np.zeros((2, 4, 4, 3)))
    yield folder / "float.npz", "float.npz: needs square images arr_0"
    np.savez(folder / "object.npz", np.array([{}], dtype=object))
    yield folder / "object.npz", "object.npz: cannot be read"
    (folder / "a.csv").write_text("1,2")
    yield folder / "a.csv", "a.csv: not a format of ours"


def test_bad_data_is_one_line_that_names_the_file_and_the_entry(tmp_path):
    for count, (path, message) in enumerate(bad_files(tmp_path), 1):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            load_dataset(str(path))
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value), message
    assert count == 29


def test_interrupted_downloads_go_on_and_wrong_ones_are_thrown_away(tmp_path, monkeypatch):
    """Against a server of our own that breaks off, then takes up at the byte asked for."""
    content, asked = bytes(GENERATOR.integers(0, 256, 300000, dtype=np.uint8)), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            asked.append(start)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", len(content) - start)
            self.end_headers()
            self.wfile.write(content[start:start + 100000] if len(asked) == 1 else content[start:])

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("data.HERE", tmp_path)
    digests = {"a.bin": hashlib.md5(content).hexdigest()}
    monkeypatch.setitem(DOWNLOADS, "mnist", (f"http://127.0.0.1:{server.server_port}/", digests))
    with pytest.raises(ValueError, match=r"cannot download .*a.bin .*; try again, or put the file at .*a.bin"):
        fetch("mnist")
    assert not (tmp_path / "mnist" / "a.bin").exists()
    fetch("mnist")
    assert (tmp_path / "mnist" / "a.bin").read_bytes() == content and asked == [0, 100000]
    assert [path.name for path in (tmp_path / "mnist").iterdir()] == ["a.bin"]
    digests["a.bin"] = "0" * 32
    (tmp_path / "mnist" / "a.bin").unlink()
    with pytest.raises(ValueError, match="came with MD5 .* not 000"):
        fetch("mnist")
    assert not any((tmp_path / "mnist").iterdir())
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match="cannot download"):                # no network
        fetch("mnist")
