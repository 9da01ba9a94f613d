"""The importers of particular data sets: BraTS, LUNA16, vessels, heart; and the real sources where they are there."""

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.data.check import check_site
from client.data.datalist import SPLITS, read_datalist
from client.data.importers.heart import FEATURES
from client.data.importers.layout import counts
from client.data.tabular import read_table
from common.errors import ConfigError
from common.federation import find_sites, read_federation
from tests.datafiles import PATIENT, save
from tests.sourcefiles import (
    LUNA_SPACING,
    as_tar,
    brats_tree,
    checked,
    dataset,
    digests,
    entries,
    import_into,
    luna_folder,
    luna_value,
    no_identifier,
    refused,
    table,
    volume,
)

DATA = Path(os.environ.get("WARDROUND_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:builtin type [sS]wig:DeprecationWarning"),
]

# --- brats -----------------------------------------------------------------------------------------------------------


def test_brats_2017_labels_become_classes(tmp_path):
    root = import_into("brats", brats_tree(tmp_path / "src"), tmp_path / "root", sites=2)
    config = checked(root)
    assert config.data.channels == ("T1", "T1ce", "T2", "FLAIR")
    for alias in ("site-1", "site-2"):
        assert len(entries(root, alias)) == 6
        for entry in entries(root, alias):
            means = [volume(root / alias / name)[1, 1, 1] for name in entry["image"]]
            assert np.diff(means).tolist() == [100, 100, 100]
            label = volume(root / alias / entry["label"])
            assert (label.dtype, label[3, 3, 3], label[2, 2, 2], label[5, 5, 5]) == (np.uint8, 1, 2, 3)
    no_identifier(root)


def test_brats_2023_names_labels_and_timepoints(tmp_path):
    keys = [f"BraTS-GLI-{n // 2:05d}-00{n % 2}" for n in range(12)]
    names = ("-t1n", "-t1c", "-t2w", "-t2f", "-seg")
    source = brats_tree(tmp_path / "src", names=names, top=3, keys=keys)
    root = import_into("brats", source, tmp_path / "root", sites=2)
    checked(root)
    listed = entries(root, "site-1")
    assert volume(root / "site-1" / listed[0]["label"])[5, 5, 5] == 3
    assert Counter(Counter(e["group"] for e in listed).values()) == {2: 3}
    assert not any("GLI" in path.name for path in root.rglob("*"))


def test_brats_binary_is_the_whole_tumour(tmp_path):
    root = import_into(
        "brats", brats_tree(tmp_path / "src", cases=3), tmp_path / "root", sites=1, binary=True
    )
    config = checked(root)
    assert config.data.labels == ("background", "whole tumour")
    label = volume(root / "site-1" / entries(root, "site-1")[0]["label"])
    assert np.unique(label, return_counts=True)[1].tolist() == [20 * 18 * 16 - 216, 216]


def test_brats_sites_that_lack_a_channel(tmp_path):
    root = import_into("brats", brats_tree(tmp_path / "src"), tmp_path / "root", partition="missing-channel")
    config = checked(root)
    assert config.data.channels == ("MR-1", "MR-2", "MR-3")
    lacking = {"lack-t1": 0, "lack-t1ce": 1, "lack-t2": 2, "lack-flair": 3}
    assert sorted(find_sites(root)) == sorted(lacking)
    for alias, lacks in lacking.items():
        for entry in entries(root, alias):
            found = [int(volume(root / alias / name)[1, 1, 1]) // 100 for name in entry["image"]]
            assert found == [c for c in range(4) if c != lacks]
    assert "T2 is missing" in dataset(root, "lack-t2")["note"]


def test_fets_institutions(tmp_path):
    keys = [f"FeTS2022_{n:05d}" for n in range(9)]
    source = brats_tree(tmp_path / "src", cases=9, keys=keys)
    path = table(
        tmp_path / "p.csv", ["Partition_ID", "Subject_ID"], [[1 + n % 3 * 9, k] for n, k in enumerate(keys)]
    )
    root = import_into("brats", source, tmp_path / "root", partition="column:Partition_ID", table=path)
    assert sorted(find_sites(root)) == ["site-01", "site-10", "site-19"]
    values = {int(volume(root / "site-10" / e["image"][0])[1, 1, 1]) for e in entries(root, "site-10")}
    assert values == {1, 4, 7}


def test_brats_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path, "no file ends in _seg.nii.gz", "brats", tmp_path / "empty")
    source = brats_tree(tmp_path / "src", cases=3)
    refused(
        tmp_path,
        "--sites does not go with",
        "brats",
        source,
        ConfigError,
        sites=3,
        partition="missing-channel",
    )
    next(source.rglob("*_2_1_flair.nii.gz")).unlink()
    refused(tmp_path, "Case 3 of SOURCE lacks its channel FLAIR", "brats", source)
    source = brats_tree(tmp_path / "odd", cases=3, top=7)
    refused(tmp_path, "values other than 0, 1, 2 and 4", "brats", source, sites=1)


# --- luna ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def luna(tmp_path_factory):
    return luna_folder(tmp_path_factory.mktemp("luna"))


def test_luna_patches_show_the_place_of_the_candidate(luna, tmp_path):
    root = import_into("luna", luna, tmp_path / "root", sites=1, patch_mm=8, negatives_per_positive=4)
    config = checked(root)
    assert (config.data.task, config.data.patch) == ("classification", (8, 8, 8))
    listed = entries(root, "site-1")
    assert Counter(entry["label"] for entry in listed) == {1: 9, 0: 36}
    rows = [line.split(",") for line in (luna / "candidates.csv").read_text().split()[1:-1]]
    steps = np.arange(8) - 3.5
    offsets = np.stack(np.meshgrid(-steps, -steps, steps, indexing="ij"))  # RAS axes, LPS millimetres
    expected = {0: [], 1: []}
    for _, *place, label in rows:
        points = np.array(place, float)[:, None, None, None] + offsets
        expected[int(label)].append(luna_value(points))
    nearest = set()
    for entry in listed:
        patch = volume(root / "site-1" / entry["image"])
        assert (patch.dtype, patch.shape) == (np.int16, (8, 8, 8))
        off = [np.abs(patch - values).max() for values in expected[entry["label"]]]
        assert min(off) < 1.5  # the CT's and the patch's rounding
        nearest.add((entry["label"], int(np.argmin(off))))
    assert len(nearest) == 45
    no_identifier(root)


def test_luna_series_stay_on_one_side_and_outside_is_air(luna, tmp_path):
    root = import_into("luna", luna, tmp_path / "root", sites=1, dims=2, patch_mm=96)
    config = checked(root)
    assert config.data.patch == (96, 96)
    home = {}
    for split in SPLITS:
        for entry in dataset(root, "site-1")[split]:
            assert home.setdefault(entry["group"], split) == split
            patch = volume(root / "site-1" / entry["image"])
            assert patch.shape == (96, 96)
            assert patch.min() == -1000
            inside = (patch > -1000).sum()
            assert inside <= np.prod(LUNA_SPACING[:2] * (60, 64))
    assert len(home) == 9


def test_luna_label_ratio_by_site(luna, tmp_path):
    root = import_into("luna", luna, tmp_path / "root", partition="label-ratio:1,3,0.5", patch_mm=8)
    found = {alias: Counter(entry["label"] for entry in entries(root, alias)) for alias in find_sites(root)}
    assert found == {"site-1": {1: 3, 0: 3}, "site-2": {1: 3, 0: 9}, "site-3": {1: 3, 0: 2}}


def test_luna_gives_up_positives_where_negatives_are_few(luna, tmp_path):
    root = import_into("luna", luna, tmp_path / "root", partition="label-ratio:12", patch_mm=8)
    assert Counter(entry["label"] for entry in entries(root, "site-1")) == {1: 3, 0: 36}


def test_luna_sources_that_are_none(luna, tmp_path):
    refused(tmp_path, "--dims must be 2 or 3, got 4", "luna", luna, ConfigError, dims=4)
    refused(tmp_path, "does not go with --partition label-ratio", "luna", luna, ConfigError,
            partition="label-ratio:1", negatives_per_positive=2.0)  # fmt: skip
    (tmp_path / "empty").mkdir()
    refused(tmp_path, "no .mhd file", "luna", tmp_path / "empty")
    other = table(tmp_path / "c.csv", ["seriesuid", "coordX", "coordY", "coordZ", "klass"], [[1, 2, 3, 4, 0]])
    refused(tmp_path, "no column 'class'", "luna", luna, table=other)
    broken = luna_folder(tmp_path / "broken", series=3)
    next(broken.rglob("*.raw")).write_bytes(b"short")
    refused(tmp_path, "the CT cannot be read", "luna", broken, sites=1)


# --- vessels ---------------------------------------------------------------------------------------------------------


def vessel_folder(folder, *, archives=("ONE_A",), children=5):
    """Two sites; of the first, every child has two eyes. Sites in `archives` come as tar, the other as a folder."""
    rows = []
    for site, ids in {
        "ONE_A": [f"{child:02d}{side}" for child in range(children) for side in "LR"],
        "TWO": [f"{PATIENT}{n}" for n in range(4)],
    }.items():
        for number, name in enumerate(ids):
            rng = np.random.default_rng(number)
            save(folder / site / f"{name}_image.png", rng.integers(0, 256, (24, 20, 3)).astype(np.uint8))
            mask = np.zeros((24, 20), bool)
            mask[number, 3:9] = True
            Image.fromarray(np.ascontiguousarray(mask.T)).save(folder / site / f"{name}_vessel1.png")
            rows.append([site, name, name[:2] if site == "ONE_A" else name])
        if site in archives:
            as_tar(folder / site, folder / f"{site}.tar")
            shutil.rmtree(folder / site)
    table(folder / "cases.csv", ["site", "id", "group"], rows)
    return folder


def test_vessel_sites_are_the_tables_and_eyes_stay_together(tmp_path):
    root = import_into("vessels", vessel_folder(tmp_path / "src"), tmp_path / "root")
    config = checked(root)
    assert (config.data.spatial_dims, config.data.normalise) == (2, "range")
    found = {alias: read_datalist(folder, alias) for alias, folder in find_sites(root).items()}
    assert {alias: sum(item.counts.values()) for alias, item in found.items()} == {"one-a": 10, "two": 4}
    home = {}
    for split in SPLITS:
        for entry in dataset(root, "one-a")[split]:
            assert home.setdefault(entry["group"], split) == split
    assert len(home) == 5
    assert not any("group" in entry for entry in entries(root, "two"))
    for alias in found:
        for entry in entries(root, alias):
            image = np.asarray(Image.open(root / alias / entry["image"]))
            mask = np.asarray(Image.open(root / alias / entry["label"]))
            number = np.flatnonzero(mask.any(axis=0))[0]
            expected = np.random.default_rng(number).integers(0, 256, (24, 20, 3)).astype(np.uint8)
            assert np.array_equal(image, expected.swapaxes(0, 1))
    no_identifier(root)


def test_vessel_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path, "SOURCE has no cases.csv", "vessels", tmp_path / "empty")
    refused(tmp_path, "--partition does not go with 'vessels'", "vessels", tmp_path / "empty", ConfigError,
            partition="random")  # fmt: skip
    source = vessel_folder(tmp_path / "src")
    (source / "TWO" / f"{PATIENT}3_vessel1.png").unlink()
    refused(tmp_path, "two: a photograph or mask that cases.csv lists is not there", "vessels", source)
    (source / "ONE_A.tar").unlink()
    refused(tmp_path, "one-a: cases.csv lists it, but SOURCE has neither", "vessels", source)
    table(source / "cases.csv", ["site", "id", "group"], [["../../etc", name, name] for name in "abc"])
    refused(tmp_path, "SOURCE has neither", "vessels", source)


# --- heart -----------------------------------------------------------------------------------------------------------


def heart_file(path, rows=20, **change):
    header = ["site", *FEATURES, "num", "target"]
    lines = []
    for site, sick in {"va": 0.8, "cleveland": 0.5}.items():
        for number in range(rows):
            row = {name: str(number) for name in FEATURES} | {"site": site, "num": "3", "chol": "0", "ca": ""}
            row |= {"target": str(int(number < sick * rows))} | change
            lines.append([row[name] for name in header])
    return table(path, header, lines)


def test_heart_sites_keep_their_shares_and_zeros_are_missing(tmp_path):
    root = import_into("heart", heart_file(tmp_path / "heart.csv"), tmp_path / "root")
    config = checked(root)
    assert (config.data.task, config.data.channels) == ("tabular", FEATURES)
    for alias, share in {"va": 0.8, "cleveland": 0.5}.items():
        datalist = read_datalist(root / alias, alias)
        assert datalist.counts == {"training": 12, "validation": 4, "test": 4}
        for split, cases in datalist.cases.items():
            assert sum(case.label for case in cases) == pytest.approx(share * len(cases), abs=1), split
        values = read_table(datalist.table, alias).values
        assert np.isnan(values[:, FEATURES.index("chol")]).all()
        assert np.isnan(values[:, FEATURES.index("ca")]).all()
        assert sorted(values[:, 0]) == list(range(20))
    assert "num" not in (root / "va" / "table.csv").read_text().split("\n")[0]


def test_heart_sources_that_are_none(tmp_path):
    refused(tmp_path, "SOURCE is not there", "heart", tmp_path / "none.csv")
    other = table(tmp_path / "other.csv", ["site", "age"], [["va", "50"]])
    refused(tmp_path, "has no column 'sex'", "heart", other)
    refused(tmp_path, "must be 0 or 1", "heart", heart_file(tmp_path / "h.csv", target="2"))
    refused(tmp_path, "SOURCE holds 2 CSV files", "heart", tmp_path)
    refused(tmp_path, "Column 'site' is empty in 40 rows", "heart", heart_file(tmp_path / "i.csv", site=""))


# --- the real sources ------------------------------------------------------------------------------------------------


def real(name):
    if not (DATA / name).exists():
        pytest.skip(f"no {name} in the public data folder (WARDROUND_DATA)")
    return DATA / name


@pytest.mark.data
def test_real_hippocampus_has_three_intensity_regimes(tmp_path):
    archive = real("msd_hippocampus/Task04_Hippocampus.tar")
    root = import_into("msd", archive, tmp_path / "root", partition="intensity", sites=3)
    sizes = {alias: sum(cases.values()) for alias, (cases, _) in counts(root).items()}
    assert sizes == {"site-1": 36, "site-2": 136, "site-3": 28}
    assert all(volume(root / "site-1" / e["image"]).dtype == np.uint8 for e in entries(root, "site-1"))
    assert read_federation(root).config().data.patch == (32, 48, 32)
    before = digests(root)
    again = import_into("msd", archive, root, partition="intensity", sites=3, force=True)
    assert digests(again) == before
    folder = root / "site-3"
    check = check_site(folder, "site-3", read_federation(root).config().data)
    check.raise_errors()


@pytest.mark.data
def test_real_vessels_are_four_sites(tmp_path):
    root = import_into("vessels", real("retinal_vessels"), tmp_path / "root")
    sizes = {alias: sum(cases.values()) for alias, (cases, _) in counts(root).items()}
    assert sizes == {"av-wide": 22, "chase-db1": 20, "stare": 15, "vevio": 12}
    split_of = {}
    for split in SPLITS:
        for entry in dataset(root, "chase-db1")[split]:
            assert split_of.setdefault(entry["group"], split) == split
    assert len(split_of) == 10
    checked(root)


@pytest.mark.data
def test_real_heart_is_four_hospitals(tmp_path):
    root = import_into("heart", real("uci_heart"), tmp_path / "root")
    sizes = {alias: sum(cases.values()) for alias, (cases, _) in counts(root).items()}
    assert sizes == {"cleveland": 227, "hungarian": 220, "switzerland": 92, "va": 150}
    checked(root)
    table_of = read_table(read_datalist(root / "switzerland", "switzerland").table, "switzerland")
    assert np.isnan(table_of.values[:, FEATURES.index("chol")]).all()
