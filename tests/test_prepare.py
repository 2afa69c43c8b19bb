"""Files and folders as people have them: one example of each kind of oddity, beside those of test_data.py."""

import io
import struct
import unicodedata
import zipfile

import numpy as np
import pytest
from PIL import Image, ImageCms

import data
from data import load_dataset
from helpers import call
from prepare.labels import split_of

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DATASETS", tmp_path / "datasets")
    data.DATASETS.mkdir()


def picture(path, values=256, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RANDOM.integers(0, values, (size, size), dtype=np.uint8)).save(path)


def prepared(path, *words):
    """The set made of a source, and what was printed."""
    result = call("data.py", path, "--name=made", "--overwrite", *words)
    assert result.returncode == 0, result.stderr
    return load_dataset(data.DATASETS / "made"), result.stdout


def refused(path, *words):
    result = call("data.py", path, "--name=made", "--overwrite", *words)
    assert result.returncode == 2, result.stdout
    return result.stderr.splitlines()[-1]


def test_folders_that_together_look_like_splits_are_splits(tmp_path):
    for name, split in (("train2017", (False, "2017")), ("TrainImages", (False, "images")), ("my-eval", (True, "my")),
                        ("cats", None), ("trainers", None), ("train_test", None)):
        assert split_of(name) == split, name
    for split in ("Training Images", "Validation Images"):
        for name in ("ant", "bee"):
            for i in range(4):
                picture(tmp_path / "set" / split / name / f"{i}.png")
    dataset, said = prepared(tmp_path / "set")
    assert dataset.facts["classes"] == ["ant", "bee"] and len(dataset) == len(dataset.holdout) == 8
    assert "Training Images, Validation Images are splits" in said
    picture(tmp_path / "set" / "Validation Images" / "cow" / "0.png")
    picture(tmp_path / "set" / "Validation Images" / "Ant" / "0.png")
    picture(tmp_path / "set" / "Training Images" / "bee" / "thumbs" / "0.png")
    dataset, said = prepared(tmp_path / "set")
    assert "folders within the folders of the classes make no classes of their own: thumbs" in said
    assert len(dataset.holdout) == 8 and "2 images held out of classes with none to train on: 'Ant', 'cow'" in said
    assert "classes that differ in case only: Ant, ant" in said
    for name in ("test tubes", "flasks"):  # a word of splits alone makes none
        picture(tmp_path / "lab" / name / "0.png"), picture(tmp_path / "lab" / name / "1.png")
    assert prepared(tmp_path / "lab")[0].facts["classes"] == ["flasks", "test tubes"]
    picture(tmp_path / "set" / "more" / "0.png")
    said = refused(tmp_path / "set")
    assert "look like splits, Training Images, Validation Images beside more" in said, said


def test_splits_may_lie_within_classes_or_name_them(tmp_path):
    for name, folders, classes, held in (
            ("inner", ["ant/train", "ant/test", "bee/train", "bee/test"], ["ant", "bee"], 2),
            ("outer", ["train/ant", "train/train", "val/train"], ["ant", "train"], 1)):  # a class called train
        for folder in folders:
            picture(tmp_path / name / folder / "0.png")
        dataset, _ = prepared(tmp_path / name)
        assert dataset.facts["classes"] == classes and (len(dataset), len(dataset.holdout)) == (2, held)
    for folder in ("DIV2K_train_HR", "DIV2K_valid_HR", "DIV2K_train_LR", "DIV2K_valid_LR", "DIV2K_test_blur"):
        picture(tmp_path / "named" / folder / "0.png")
    dataset, said = prepared(tmp_path / "named")
    assert len(dataset) == len(dataset.holdout) == 2 and len(dataset.facts["classes"]) == 2
    assert "left out: 1 images held out of classes with none to train on: 'div 2 k blur'" in said


def test_what_systems_leave_is_counted_and_masks_are_told(tmp_path):
    for i in range(4):
        picture(tmp_path / "set" / "ant" / f"{i}.png"), picture(tmp_path / "set" / "bee" / f"{i}.png")
        picture(tmp_path / "set" / "ant" / "#snapshot" / f"{i}.png")
        picture(tmp_path / "set" / "bee" / f"{i}.png.previews" / "large.jpg")
        picture(tmp_path / "set" / "bee" / f"{i}.JPG" / "small.png")
        picture(tmp_path / "set" / "labelled" / f"{i}.png", values=5)
    dataset, said = prepared(tmp_path / "set", "--holdout=0")
    assert dataset.facts["counts"] == [4, 4, 4] and "left out: 12 hidden or of a system" in said
    assert "4 of 12 images, all of labelled among them, have at most 32 colours, as masks do" in said


def test_colours_and_depths_are_converted_or_counted(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    other = bytearray(srgb)  # red and green change places
    tags = {srgb[at:at + 4]: at + 4 for at in range(132, 132 + 12 * int.from_bytes(srgb[128:132], "big"), 12)}
    red, green = (slice(tags[name], tags[name] + 8) for name in (b"rXYZ", b"gXYZ"))
    other[red], other[green] = srgb[green], srgb[red]
    (tmp_path / "set").mkdir()
    colours = Image.fromarray(np.full((4, 4, 3), (200, 50, 10), np.uint8))
    clear = colours.convert("RGBA")
    clear.putalpha(128)
    clear.save(tmp_path / "set" / "a.png", icc_profile=bytes(other))
    colours.save(tmp_path / "set" / "b.png", icc_profile=srgb)
    colours.save(tmp_path / "set" / "c.png", icc_profile=b"no profile")
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "set" / "d.tif")
    dataset, said = prepared(tmp_path / "set", "--holdout=0")
    pixels = dataset.images[:, :, 0, 0].tolist()
    assert np.allclose(pixels[0], (50 / 2 + 127, 200 / 2 + 127, 10 / 2 + 127), atol=3)
    assert pixels[1:] == [[200, 50, 10], [200, 50, 10], [156, 156, 156]]
    for line in ("with a colour profile, converted to sRGB: 1", "that does not fit them, left aside: 1",
                 "with transparency, put on white: 1", "of 16 bits a channel, reduced to 8: 1"):
        assert line in said, said


def grey_profile():
    """A colour profile for grey of which half the value is half the light, written by hand as ICC.1:2010 has it."""
    text = b"mluc" + struct.pack(">4xII2s2sII", 1, 12, b"en", b"US", 8, 28) + "grey".encode("utf-16-be")
    white = b"XYZ " + struct.pack(">4x3i", 63190, 65536, 54061)
    tags = {b"desc": text, b"cprt": text, b"wtpt": white, b"kTRC": b"curv" + bytes(8)}
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content
    size = 128 + len(table + body)
    head = struct.pack(">I4sI4s4s4s12x4s", size, b"none", 4 << 24, b"mntr", b"GRAY", b"XYZ ", b"acsp")
    return head.ljust(68, b"\0") + white[8:] + bytes(48) + table + body


def test_grey_keeps_what_its_numbers_mean(tmp_path):
    light = np.arange(8, 72).reshape(8, 8) / 71  # without the darkest, where LittleCMS is rough
    deep, grey = (np.round(light * top).astype(kind) for top, kind in ((65535, np.uint16), (255, np.uint8)))
    see_through = Image.fromarray(grey)
    see_through.putalpha(255)
    (tmp_path / "set").mkdir()
    for name, image in (("a", Image.fromarray(deep)), ("b", Image.fromarray(grey)), ("c", see_through)):
        image.save(tmp_path / "set" / f"{name}.png", icc_profile=grey_profile())
    dataset, said = prepared(tmp_path / "set", "--holdout=0")
    srgb = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    assert np.abs(dataset.images[:, 0] - srgb * 255).max() < 1.5 and "converted to sRGB: 3" in said
    moving = tmp_path / "set" / "d.gif"
    Image.fromarray(grey).save(moving, save_all=True, append_images=[Image.fromarray(255 - grey)])
    dataset, said = prepared(tmp_path / "set", "--holdout=0")
    assert np.array_equal(dataset.images[3], [grey] * 3) and "of several pages or frames, of which the first is" in said
    Image.fromarray(deep.astype(np.int32) - 1000).save(tmp_path / "set" / "e.tif")  # of 32 bits
    assert "e.tif: has whole numbers of 32 bits" in refused(tmp_path / "set")
    content = bytearray((tmp_path / "set" / "e.tif").read_bytes())
    place = content.index(struct.pack("<HHIHH", 258, 3, 1, 32, 0))
    content[place + 8] = 16  # says that there are 16, and with a sign
    (tmp_path / "set" / "e.tif").write_bytes(content)
    assert "e.tif: has values below 0" in refused(tmp_path / "set")


def test_names_are_compared_as_people_see_them(tmp_path):
    for form in ("NFC", "NFD"):
        for i in range(3):
            picture(tmp_path / "set" / unicodedata.normalize(form, "å") / f"{form}{i}.png")
            picture(tmp_path / "set" / "b" / f"{form}{i}.png")
    dataset, _ = prepared(tmp_path / "set", "--holdout=0")
    assert dataset.facts["classes"] == ["b", unicodedata.normalize("NFC", "å")] and dataset.facts["counts"] == [6, 6]
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:  # UTF-8 without the flag, as some programs write it
        for i, name in enumerate(["ж/0.png", "ж/1.png", "я/0.png", "я/1.png"]):
            buffer = io.BytesIO()
            Image.fromarray(RANDOM.integers(0, 256, (4, 4), dtype=np.uint8)).save(buffer, "PNG")
            archive.writestr(name, buffer.getvalue())
    raw = bytearray(content.getvalue())
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := raw.find(signature, at + 1)) >= 0:
            raw[at + place + 1] &= ~0x08
    (tmp_path / "russian.zip").write_bytes(raw)
    assert prepared(tmp_path / "russian.zip", "--holdout=0")[0].facts["classes"] == ["ж", "я"]


def test_each_cause_has_a_line_and_nothing_is_refused_in_vain(tmp_path):
    for name, count in (("one", 1), ("two", 2), ("many", 40)):
        for i in range(count):
            picture(tmp_path / "set" / name / f"{i}.png")
    dataset, _ = prepared(tmp_path / "set", "--holdout=0.9")
    assert min(dataset.facts["counts"]) == 1 and len(dataset) < 15
    (tmp_path / "set" / "one" / "0.png").write_bytes(b"no")
    said = refused(tmp_path / "set", "--skip-broken")
    assert "no image of 'one' is left to train on: all of them are held out by the source, or cannot be read" in said
    latents = np.ones((6, 4, 4, 4), np.float32)
    latents[:, [0, 2]] = RANDOM.normal(size=(6, 2, 4, 4))
    (tmp_path / "latents").mkdir()
    for i, latent in enumerate(abs(latents)):
        latent[2:] *= i > 9
        np.save(tmp_path / "latents" / f"{i}.npy", latent)
    assert "channel 1 is the same in all latents" in refused(tmp_path / "latents")


@pytest.mark.parametrize("table, words", [
    ("id,breed\n0,ant\n1,bee\n2,ant\n3,bee\n", ""),  # Kaggle's, without suffixes
    ("label;file\nant;0.png\nbee;1.png\nant;2.png\nbee;3.png\n", ""),
    ("0.png ant\n1.png bee\n2.png ant\n3.png bee\n", ""),  # no header
    ("class,id\n1,0\n1,0\n2,1\n1,2\n2,3\n", ""),  # the column of files is that which names most; a row said twice
    ("4\nant Male\n0.png  1 -1\n1.png -1 -1\n2.png  1  1\n3.png -1  1\n", ":ant"),  # CelebA's
    ('path,label,note\ngone.png,bee,\n"in/0.png",ant,"x, y"\nin/1.png,bee,\nin/2.png,ant,\nin/3.png,bee,\n', ":label")])
def test_labels_come_from_a_table(tmp_path, table, words):
    for i in range(4):
        picture(tmp_path / "set" / "in" / f"{i}.png")
    picture(tmp_path / "set" / ".hidden" / "9.png")
    (tmp_path / "t.csv").write_text(table)
    dataset, _ = prepared(tmp_path / "set", f"--labels={tmp_path / 't.csv'}{words}", "--holdout=0")
    expected = ["1", "-1"] if "Male" in table else ["1", "2"] if "class" in table else ["ant", "bee"]
    assert [dataset.facts["classes"][label] for label in dataset.labels] == expected * 2


def test_images_that_a_table_leaves_out_are_left_out_and_counted(tmp_path):
    for name in ("train/a", "train/b", "train/c", "test/d", "test/e"):  # as Kaggle's competitions have them
        picture(tmp_path / "set" / f"{name}.jpg")
    (tmp_path / "set" / "labels.csv").write_text("id,breed\na,pug\nb,corgi\nc,\ne,husky\n")
    dataset, said = prepared(tmp_path / "set", f"--labels={tmp_path}/set/labels.csv", "--holdout=0")
    assert dataset.facts["classes"] == ["corgi", "pug"] and len(dataset) == 2 and dataset.holdout is None
    assert "left out: 2 images for which the table has no label, test/d.jpg first" in said
    assert "left out: 1 images held out of classes with none to train on: 'husky'" in said and ".csv" not in said


def test_tables_that_do_not_fit_are_refused(tmp_path):
    for i in range(4):
        picture(tmp_path / "set" / f"{i}.png")
    (tmp_path / "set" / "labels.csv").write_text("file,a,b\n0.png,1,2\n")
    assert "no labels were found; if labels.csv holds some" in prepared(tmp_path / "set")[1]
    for text, said in (("file,a,b\n0.png,1,2\n", "2 columns beside the files': choose one with --labels=FILE:COLUMN"),
                       ("x,y\n", "names none of the images, such as 0.png"), ("", "names none of the images"),
                       ("file,a\n0.png,1\n0.png,2\n", "has two labels for 0.png"),
                       ("file,a\n0.png,1\n1.png\n", "row 3 has 1 columns, others have 2")):
        (tmp_path / "t.csv").write_text(text)
        assert said in refused(tmp_path / "set", f"--labels={tmp_path / 't.csv'}"), text
    assert "there is no such file" in refused(tmp_path / "set", "--labels=nowhere.csv")
    many = tmp_path / "many.npz"
    np.savez(many, images=RANDOM.integers(0, 256, (6, 4, 4), dtype=np.uint8), labels=RANDOM.integers(0, 2, (6, 3)))
    assert "--labels=none takes the images without labels" in refused(many)
    assert "--labels=FILE goes with pictures" in refused(many, f"--labels={tmp_path / 't.csv'}")
    assert prepared(many, "--labels=none", "--holdout=0")[0].facts["classes"] == []
