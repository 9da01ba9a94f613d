"""The importer of two CIFAR-10 classes: ratios by site and split, no image twice, sources that are none."""

import io
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.data.importers.cifar import NAMES, parse_classes, quotas
from client.data.importers.layout import counts
from client.data.importers.partition import parse_partition
from common.errors import ConfigError, DataError
from common.federation import find_sites, read_federation
from common.models import build_model
from tests.sourcefiles import checked, dataset, digests, import_into, refused

DATA = Path(os.environ.get("WARDROUND_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def jpeg(value, size=(32, 32)):
    """A picture of one colour, which tells part, class and number of an image."""
    stream = io.BytesIO()
    Image.new("RGB", size, value).save(stream, format="JPEG", quality=95, subsampling=0)
    return stream.getvalue()


def arrays(**change):
    """Three classes: red is the part, green the class, blue the number; 60 training and 40 test images each."""
    found = {}
    for part, red, each in (("train", 40, 60), ("test", 200, 40)):
        files, label = [], []
        for number in range(3 * each):
            label.append(number % 3)
            files.append(jpeg((red, 100 * (number % 3), 4 * (number // 3))))
        found[f"{part}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        found[f"{part}_offset"] = np.cumsum([0, *map(len, files)])
        found[f"{part}_label"] = np.array(label, np.uint8)
    return {**found, **change}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("cifar") / "pictures.npz"
    np.savez(path, **arrays())
    return path


def colours(root, alias, split):
    """(red, green, blue) of a site's images with their labels, each rounded to what was written."""
    found = []
    for entry in dataset(root, alias)[split]:
        pixel = np.asarray(Image.open(root / alias / entry["image"]))[16, 16].astype(int)
        found.append((*(int(v) for v in pixel), entry["label"]))
    return found


@pytest.mark.slow
def test_every_split_of_every_site_has_its_ratio_and_no_image_comes_twice(source, tmp_path):
    root = import_into("cifar", source, tmp_path / "root", partition="delta:4", images=20, classes="2,1")
    config = checked(root)
    assert config.data.labels == (NAMES[2], NAMES[1])
    assert (config.data.patch, config.data.channels) == ((32, 32), ("red", "green", "blue"))
    expected = {"training": (13, 3), "validation": (3, 1), "test": (8, 2)}
    seen = Counter()
    for alias, side in zip(sorted(find_sites(root)), (1, 1, 0, -1, -1), strict=True):
        for split, (many, few) in expected.items():
            found = colours(root, alias, split)
            wanted = {1: (many, few), 0: ((many + few) // 2,) * 2, -1: (few, many)}[side]
            labels = Counter(label for *_, label in found)
            assert (labels[0], labels[1]) == wanted
            for red, green, blue, label in found:
                assert (red > 120) == (split == "test")
                assert abs(green - 100 * (2, 1)[label]) < 12  # the class that was asked for
                seen[red > 120, label, round(blue / 4)] += 1
    assert max(seen.values()) == 1
    assert len(seen) == 5 * 30
    assert build_model(config.model, config.data, seed=0) is not None
    note = read_federation(root).note
    assert "simulated" in note
    assert "lossy" in note


@pytest.mark.slow
def test_a_seed_gives_the_same_files_and_another_one_others(source, tmp_path):
    first, again, other = (
        digests(import_into("cifar", source, tmp_path / name, partition="label-ratio:1,2", images=10, classes="0,1", seed=seed))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )  # fmt: skip
    assert first == again
    assert first != other
    assert sum(name.endswith(".png") for name in first) == 2 * 15


def test_copies_of_one_image_count_once(tmp_path):
    plain = arrays()
    size = len(plain["train_label"])
    same = np.frombuffer(jpeg((40, 100, 8)) * size, np.uint8)
    step = len(same) // size
    copies = {"train_jpeg": same, "train_offset": np.arange(size + 1) * step}
    np.savez(tmp_path / "copies.npz", **{**plain, **copies})
    refused(tmp_path, "need 5 training images of class 'automobile', SOURCE has 1", "cifar", tmp_path / "copies.npz",
            ConfigError, partition="label-ratio:1", images=10, classes="1,2")  # fmt: skip


@pytest.mark.parametrize("ratio", [7.0, 4.0, 2.0, 1.0, 0.5, 0.25, 1 / 7])
def test_quotas_are_of_one_size_and_mirror_each_other(ratio):
    found, mirrored = quotas(400, ratio), quotas(400, 1 / ratio)
    for split, size in {"training": 320, "validation": 80, "test": 200}.items():
        negatives, positives = found[split]
        assert negatives + positives == size
        assert abs(negatives - ratio / (1 + ratio) * size) <= 0.5 + 1e-9
        assert mirrored[split] == (positives, negatives)


def test_delta_is_two_sites_each_way_and_an_even_one():
    assert parse_partition("delta:7", ("delta",)).ratios == (7, 7, 1, 1 / 7, 1 / 7)
    assert set(parse_partition("delta:1", ("delta",)).ratios) == {1}
    for text in ("delta", "delta:0.5", "delta:x", "delta:nan", "delta:1000"):
        with pytest.raises(ConfigError, match="delta needs a number from 1"):
            parse_partition(text, ("delta",))


@pytest.mark.parametrize(
    "text", ["1", "1,1", "1,10", "1,2,3", "a,b", "", "1,", "-1,2", "²,1", "1,12", "01,2"]
)
def test_classes_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="two different class numbers"):
        parse_classes(text)


def test_numbers_that_cannot_be_dealt_are_refused(source, tmp_path):
    for said, options in {
        "must be 10 to 100000, got 9": {"images": 9},
        "validation images are all of one class": {"images": 20, "partition": "delta:20"},
        "need 250 training images of class 'airplane', SOURCE has 60": {
            "images": 100,
            "partition": "delta:1",
        },
        "does not go with 'cifar'": {"sites": 3},
    }.items():
        refused(tmp_path, said, "cifar", source, ConfigError, **{"classes": "0,1", **options})


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"train_label": np.zeros(3, np.uint8)},
        {"train_label": np.full(180, 10, np.uint8)},
        {"train_offset": np.arange(181) - 1},
        {"test_offset": np.zeros(121, np.int64)},
        {"test_jpeg": np.zeros((4, 4), np.uint8)},
        {"test_jpeg": np.array([{}], dtype=object)},
        {"test_label": np.zeros(120)},
    ],
)
def test_arrays_that_do_not_fit_each_other_are_refused(change, tmp_path):
    np.savez(tmp_path / "odd.npz", **arrays(**change))
    refused(tmp_path, "SOURCE is no .npz file with train_jpeg", "cifar", tmp_path / "odd.npz")


@pytest.mark.slow
def test_sources_that_are_none(source, tmp_path):
    options = {"partition": "label-ratio:1", "images": 10, "classes": "0,1"}
    refused(tmp_path, "SOURCE is not there", "cifar", tmp_path / "none.npz", **options)
    (tmp_path / "empty").mkdir()
    refused(tmp_path, "SOURCE holds 0 .npz files", "cifar", tmp_path / "empty", **options)
    (tmp_path / "text.npz").write_text("no archive")
    refused(tmp_path, "SOURCE is no .npz file", "cifar", tmp_path / "text.npz", **options)
    np.savez(tmp_path / "part.npz", **{k: v for k, v in arrays().items() if k != "test_label"})
    refused(tmp_path, "SOURCE is no .npz file", "cifar", tmp_path / "part.npz", **options)
    whole = np.frombuffer(jpeg((1, 2, 3), size=(31, 32)) + jpeg((9, 2, 3)), np.uint8)
    plain = arrays()
    files = [whole[:0]]
    for number in range(180):
        files.append(np.frombuffer(jpeg((40, number, 7), size=(31, 32)), np.uint8))
    plain |= {"train_jpeg": np.concatenate(files), "train_offset": np.cumsum([len(part) for part in files])}
    np.savez(tmp_path / "small.npz", **plain)
    refused(
        tmp_path,
        "site-1: image 1 of the site is no JPEG image of 32 x 32",
        "cifar",
        tmp_path / "small.npz",
        **options,
    )
    plain["train_jpeg"] = np.random.default_rng(0).integers(0, 256, len(plain["train_jpeg"])).astype(np.uint8)
    np.savez(tmp_path / "noise.npz", **plain)
    refused(tmp_path, "is no JPEG image", "cifar", tmp_path / "noise.npz", DataError, **options)


@pytest.mark.slow
@pytest.mark.data
def test_the_real_copies(tmp_path):
    if not (DATA / "cifar10").exists():
        pytest.skip("no cifar10 in the public data folder (WARDROUND_DATA)")
    root = import_into("cifar", DATA / "cifar10", tmp_path / "root", partition="delta:7")
    assert {alias: cases for alias, (cases, _) in counts(root).items()} == {
        f"site-{number}": {"training": 320, "validation": 80, "test": 200} for number in range(1, 6)
    }
    checked(root)
