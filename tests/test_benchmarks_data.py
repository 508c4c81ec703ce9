"""The images of the benchmarks: reading them, damaged files, crops and flips."""

import dataclasses
import io
import random
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import configs, data
from benchmarks.data import SOURCES, Split
from benchmarks.errors import UserError
from benchmarks.images import Preparation


def png(pixels):
    """The bytes of a PNG file with these pixels."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@dataclasses.dataclass
class Cifar:
    """A directory in the schema of the hub, with what should be read from it."""

    path: Path
    images: np.ndarray
    labels: np.ndarray

    def config(self, **changes):
        """An experiment on this directory."""
        base = dataclasses.replace(configs.CIFAR10, data_dir=str(self.path))
        return dataclasses.replace(base, batch_size=2, **changes)

    def write(self, split, contents, labels, names=("img", "label"), part=0):
        """Writes one file."""
        file = self.path / f"{split}-0000{part}-of-00002.parquet"
        write(file, dict(zip(names, (contents, labels), strict=True)))

    def rows(self, label):
        """All rows, as the hub's own library has them."""
        columns = {"img": list(map(Image.fromarray, self.images)), "label": self.labels}
        features = datasets.Features({"img": datasets.Image(), "label": label})
        return datasets.Dataset.from_dict(columns, features=features)


def write(file, columns):
    """Writes a parquet file; the first column holds the bytes of images."""
    (name, contents), *labels = columns.items()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": content, "path": None} for content in contents]
    pq.write_table(pa.table({name: pa.array(rows, kind), **dict(labels)}), file)


@pytest.fixture
def cifar(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 32, 32, 3), np.uint8)
    cifar = Cifar(tmp_path, images, rng.integers(0, 10, 8))
    for split, part, own in (("train", 0, slice(4)), ("train", 1, slice(4, 6))):
        cifar.write(split, [*map(png, images[own])], cifar.labels[own], part=part)
    cifar.write("test", [*map(png, images[6:])], cifar.labels[6:])
    return cifar


def same(part, images, labels):
    np.testing.assert_array_equal(part[0], images)
    np.testing.assert_array_equal(part[1], labels)


def test_digits_are_split_in_one_fixed_order():
    digits = data.load(configs.DIGITS)
    (images, labels), (test_images, test_labels) = digits.parts.values()
    assert (images.shape, test_images.shape) == ((1437, 8, 8, 1), (360, 8, 8, 1))
    assert (images.dtype, images.max()) == (np.uint8, 16)
    assert set(labels) == set(test_labels) == set(range(10))
    assert digits.digest == data.load(configs.DIGITS).digest


def test_cifar_reads_all_files_in_order(cifar):
    before = set(cifar.path.iterdir())
    dataset = data.load(cifar.config())
    same(dataset.parts["train"], cifar.images[:6], cifar.labels[:6])
    same(dataset.parts["test"], cifar.images[6:], cifar.labels[6:])
    assert set(cifar.path.iterdir()) == before
    subset = data.load(cifar.config(subset=5))
    same(subset.parts["train"], cifar.images[:5], cifar.labels[:5])
    same(subset.parts["test"], cifar.images[6:], cifar.labels[6:])


def test_cifar_reads_the_metadata_of_the_hub(cifar):
    for file in cifar.path.glob("train-*"):
        file.unlink()
    rows = cifar.rows(datasets.ClassLabel(num_classes=10))
    rows.to_parquet(cifar.path / "train-00000-of-00001.parquet")
    same(data.load(cifar.config()).parts["train"], cifar.images, cifar.labels)


def test_a_changed_file_is_read_again(cifar):
    data.load(cifar.config())
    cifar.write("train", [png(cifar.images[7])] * 4, [3] * 4)
    dataset = data.load(cifar.config(subset=4))
    same(dataset.parts["train"], cifar.images[[7] * 4], [3] * 4)


# The columns that the hub has next to the images.
LABELS = {
    "cifar10": {"label": [9, 0, 3]},
    "cifar100": {"fine_label": [99, 0, 3], "coarse_label": [19, 0, 3]},
    "svhn": {"label": [9, 0, 3]},
    "tiny_imagenet": {"label": [199, 0, 3]},
}


@pytest.mark.parametrize("name", SOURCES)
def test_each_data_set_is_read_in_its_own_schema(name, tmp_path):
    side = 64 if name == "tiny_imagenet" else 32
    column = "img" if name.startswith("cifar") else "image"
    test = "valid" if name == "tiny_imagenet" else "test"
    images = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8)
    images[2] = images[2, :, :, :1]
    contents = [*map(png, images[:2]), png(images[2, :, :, 0])]
    for split in ("train", test):
        columns = {column: contents, **LABELS[name]}
        write(tmp_path / f"{split}-00000-of-00001.parquet", columns)
    recipe = configs.RECIPES[name]
    config = dataclasses.replace(recipe, data_dir=str(tmp_path), batch_size=2)
    dataset = data.load(config)
    labels = next(iter(LABELS[name].values()))
    same(dataset.parts["train"], images, labels)
    same(dataset.parts["test"], images, labels)
    assert dataset.num_classes == labels[0] + 1
    assert (dataset.preparation.pad, dataset.preparation.flip) == (4, True)
    columns[next(iter(LABELS[name]))] = [labels[0] + 1, 0, 3]
    write(tmp_path / f"{test}-00000-of-00001.parquet", columns)
    with pytest.raises(UserError, match=f"allowed: 0 to {labels[0]}"):
        data.load(config)


def test_every_data_set_has_a_source():
    assert set(configs.RECIPES) == {"digits", *SOURCES}


def of_rows(count):
    """CIFAR-10 as if it had been published with so many training rows."""
    return dataclasses.replace(SOURCES["cifar10"], train=Split("train", count))


def test_a_directory_may_hold_a_part_but_no_more(cifar):
    for count in (6, 7):
        source = of_rows(count)
        assert len(data.read(source, source.train, cifar.path)[1]) == 6
    source = of_rows(5)
    with pytest.raises(UserError, match="row 5 is one too many; published: 5 rows"):
        data.read(source, source.train, cifar.path)


def test_the_hub_must_have_the_published_rows(cifar, monkeypatch):
    rows, asked = cifar.rows(datasets.Value("int64")), []

    def load_dataset(repository, config, *, split, verification_mode):
        asked.append((repository, config, split, verification_mode))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = of_rows(8)
    found = data.read(source, source.train, None, rows=3)
    same(found, cifar.images[:3], cifar.labels[:3])
    assert asked == [("uoft-cs/cifar10", None, "train", "basic_checks")]
    for count in (7, 9):
        source = of_rows(count)
        with pytest.raises(UserError, match=f"has 8 rows in train; published: {count}"):
            data.read(source, source.train, None, rows=3)


def flip_bits(cifar):
    file = cifar.path / "test-00000-of-00002.parquet"
    content = bytearray(file.read_bytes())
    content[40:200] = bytes(160)
    file.write_bytes(content)


def rewrite(**changes):
    """A change that writes the second training file with other contents."""

    def change(cifar):
        row = {"contents": [png(cifar.images[0])], "labels": [0], **changes}
        cifar.write("train", part=1, **row)

    return change


BLACK = png(np.zeros((32, 32, 3), np.uint8))
SMALL = png(np.zeros((8, 9, 3), np.uint8))
DECODED = "row 4: the image cannot be decoded"
DAMAGES = {
    "flipped": (flip_bits, "test"),
    "columns": (
        rewrite(names=("image", "label")),
        "no column img; it has image, label",
    ),
    "no picture": (rewrite(contents=[b"nothing"]), DECODED),
    "half a picture": (rewrite(contents=[BLACK[:60]]), DECODED),
    "no bytes": (rewrite(contents=[None]), "row 4: img holds no image bytes"),
    "size": (rewrite(contents=[SMALL]), "row 4: the image is 9x8; allowed: 32x32"),
    "label": (rewrite(labels=[10]), "row 4: label is 10; allowed: 0 to 9"),
    "no label": (rewrite(labels=pa.array([None], pa.int64())), "row 4: label is None"),
    "text label": (rewrite(labels=["cat"]), "row 4: label is 'cat'"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_data_is_one_line(cifar, kind, capfd):
    damage, message = DAMAGES[kind]
    damage(cifar)
    with pytest.raises(UserError, match=message) as raised:
        data.load(cifar.config())
    assert "\n" not in str(raised.value)
    assert str(cifar.path) in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_truncated_and_noisy_files_are_one_line(cifar):
    file = cifar.path / "train-00001-of-00002.parquet"
    content, rng = file.read_bytes(), random.Random(1)
    step = len(content) // 8
    cases = [content[: place * step] for place in range(8)]
    cases += [kept + rng.randbytes(len(content) - len(kept)) for kept in cases]
    cases += [b"PAR1", b"PAR1" * 3, content[4:]]
    for damaged in cases:
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=str(cifar.path)) as raised:
            data.load(cifar.config())
        assert "\n" not in str(raised.value)


def test_empty_split_and_absent_files(cifar):
    for part in (0, 1):
        cifar.write("train", [], pa.array([], pa.int64()), part=part)
    with pytest.raises(UserError, match="the train split has no rows"):
        data.load(cifar.config())
    for file in cifar.path.iterdir():
        file.unlink()
    with pytest.raises(UserError, match=rf"{cifar.path}: no file train-\*.parquet"):
        data.load(cifar.config())


# --- rows held out, and the way into the network --------------------------------------


@pytest.mark.parametrize("subset", [None, 1000])
def test_validation_rows_are_held_out(subset):
    digits = data.load(configs.DIGITS)  # All of them differ.
    row_of = {
        image.tobytes(): row for row, image in enumerate(digits.parts["train"][0])
    }

    def split(validation, seed=43):
        given = {"subset": subset, "validation": validation, "seed": seed}
        dataset = data.load(dataclasses.replace(configs.DIGITS, **given))
        assert len(dataset.parts["validation"][1]) == validation
        parts = []
        for name in ("train", "validation"):
            images, labels = dataset.parts[name]
            parts.append([row_of[image.tobytes()] for image in images])
            np.testing.assert_array_equal(labels, digits.parts["train"][1][parts[-1]])
        return *parts, dataset.digest

    train, held_out, digest = split(200)
    assert split(200, seed=7) == (train, held_out, digest)
    assert train == sorted(train)
    assert not set(train) & set(held_out)
    if subset is None:
        assert sorted(train + held_out) == list(range(1437))
    else:
        assert train == list(range(subset))
        assert min(held_out) >= subset
    assert set(held_out) < set(split(201)[1])
    assert digest != split(201)[2]


def test_normalization_is_that_of_numpy():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    images[..., 1] = 7
    preparation = Preparation.of(images, pad=2, flip=True)
    np.testing.assert_allclose(preparation.mean, images.mean((0, 1, 2)))
    std = images.std((0, 1, 2))
    np.testing.assert_allclose(preparation.std, [std[0], 1, std[2]])
    normal = np.asarray(preparation.normalize(jnp.asarray(images)))
    assert np.abs(normal.mean((0, 1, 2))).max() < 1e-6
    assert np.abs(normal.std((0, 1, 2)) - [1, 0, 1]).max() < 1e-6


def test_augmentation_crops_and_flips():
    # Every pixel has a value of its own, so that its corner identifies a crop.
    image = np.arange(1, 17, dtype=np.uint8).reshape(1, 4, 4, 1)
    preparation = Preparation((0.0,), (1.0,), pad=1, flip=True)
    images = jnp.asarray(np.repeat(image, 200, axis=0))
    seen = np.unique(preparation.augment(jax.random.key(0), images), axis=0)
    padded = np.pad(image[0], ((1, 1), (1, 1), (0, 0)))
    crops = [padded[i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    expected = np.unique(crops + [crop[:, ::-1] for crop in crops], axis=0)
    np.testing.assert_array_equal(seen, expected)
