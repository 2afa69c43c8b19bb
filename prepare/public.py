"""Public sets, fetched by name: each becomes a Source. Their files are known by their hashes, so nothing here checks
what they hold."""

import gzip
import tarfile

import numpy as np

import data
from plumbing.command import reading
from plumbing.files import download
from prepare.sources import Source

DOWNLOADS = {  # name: where from, {file: its SHA-256}
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", {
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"}),
    "fashion-mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", {
        "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"}),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/", {
        "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"}),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/", {
        "cifar-100-binary.tar.gz": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"})}
MNIST = {"mnist": [*"0123456789"],  # names of the classes
         "fashion-mnist": ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
                           "ankle boot"]}
CIFAR = {"cifar10": ("batches.meta.txt", 3073, [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]),
         "cifar100": ("fine_label_names.txt", 3074, ["train.bin", "test.bin"])}
TEST_IMAGES = 10_000  # in each of these sets, and the last ones


def read_mnist(paths):
    """Images (N, 1, 28, 28) and labels, of the files of MNIST: images are 16 bytes and pixels, labels 8 and labels."""
    train, train_labels, test, test_labels = (gzip.decompress(path.read_bytes()) for path in paths)
    pixels = np.frombuffer(train[16:] + test[16:], np.uint8)
    return pixels.reshape(-1, 1, 28, 28), np.frombuffer(train_labels[8:] + test_labels[8:], np.uint8)


def read_cifar(path, class_names, size, parts):
    """Images (N, 3, 32, 32), labels and names of classes, of CIFAR's binary archive. Its records of `size` bytes are
    pixels after a label, which in CIFAR-100 stands after a coarser one."""
    with tarfile.open(path) as archive:
        members = [member for member in archive if member.isfile()]
        files = {member.name.split("/")[-1]: archive.extractfile(member).read() for member in members}
    records = np.frombuffer(b"".join(files[part] for part in parts), np.uint8).reshape(-1, size)
    return records[:, -3072:].reshape(-1, 3, 32, 32), records[:, -3073], files[class_names].decode().split()


def open_public(name, labels=""):
    """The Source of a public set, which is downloaded unless it is there. labels: "" for its own, else it has none."""
    base, files = DOWNLOADS[name]
    folder = data.DATASETS / "downloads" / name
    for file, sha256 in files.items():
        download(base + file, folder / file, sha256)
    paths = [folder / file for file in files]
    with reading(folder):
        if name in CIFAR:
            images, numbers, classes = read_cifar(*paths, *CIFAR[name])
        else:
            images, numbers = read_mnist(paths)
            classes = MNIST[name]
    held_out = np.arange(len(images)) >= len(images) - TEST_IMAGES
    if labels:
        numbers, classes = np.zeros(len(images)), []
    return Source(images, numbers.astype(np.int64), classes, held_out, [])
