"""Importers: how sites are cut, what a data root looks like, and the Decathlon."""

import os
import tarfile
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.data.datalist import SPLITS, read_datalist
from client.data.importers.kinds import KINDS, ImportOptions, check_options, get_kind
from client.data.importers.layout import MARKER_FILE, About, SiteFolder, counts, new_root, place, write_nifti
from client.data.importers.partition import (
    alias_of,
    by_column,
    cut_regimes,
    deal_random,
    neutral_groups,
    numbered_aliases,
    parse_partition,
    read_case_table,
)
from client.data.importers.volumes import Geometry, grid_settings
from common.errors import ConfigError, DataError
from common.federation import find_sites, read_federation
from tests.datafiles import PATIENT
from tests.sourcefiles import (
    as_tar,
    checked,
    dataset,
    digests,
    entries,
    import_into,
    msd_task,
    no_identifier,
    refused,
    table,
    volume,
)

REGIMES = [100.0] * 6 + [5000.0] * 5 + [2e5] * 7


# --- cutting ---------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(1, 1e6), min_size=4, max_size=11), st.integers(1, 3), st.integers(1, 3))
def test_regimes_are_the_best_of_all_cuts(values, sites, smallest):
    if len(values) < sites * smallest:
        with pytest.raises(DataError, match="too few"):
            cut_regimes(values, sites, smallest)
        return
    runs, cuts = cut_regimes(values, sites, smallest)
    logs = np.log10(np.sort(values))
    best = max(
        sum(logs[at] - logs[at - 1] for at in places)
        for places in combinations(range(1, len(values)), sites - 1)
        if min(np.diff([0, *places, len(values)])) >= smallest
    )
    sizes = Counter(runs)
    assert sorted(sizes) == list(range(sites))
    assert min(sizes.values()) >= smallest
    ends = np.cumsum([sizes[run] for run in range(sites)])[:-1]
    assert sum(logs[at] - logs[at - 1] for at in ends) == pytest.approx(best)
    assert len(cuts) == sites - 1
    for low, high in combinations(range(len(values)), 2):
        if values[low] < values[high]:
            assert runs[low] <= runs[high]


def test_regimes_need_positive_values():
    with pytest.raises(DataError, match="1 images have no positive values"):
        cut_regimes([-1000.0, 5.0, 6.0], 2, 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_random_sites_keep_groups_whole_and_sizes_even(keys, sites, seed):
    groups = [str(key) for key in keys]
    homes = deal_random(groups, sites, seed)
    assert homes == deal_random(groups, sites, seed)
    assert all(len({h for g, h in zip(groups, homes, strict=True) if g == group}) == 1 for group in groups)
    sizes = [homes.count(site) for site in range(sites)]
    assert max(sizes) - min(sizes) <= max(Counter(groups).values())


def test_random_sites_change_with_the_seed():
    groups = [str(number) for number in range(30)]
    assert len({tuple(deal_random(groups, 3, seed)) for seed in range(5)}) == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rnadom", "Did you mean 'random'"),
        ("missing-channel", "cannot be used here"),
        ("column", "column:NAME"),
        ("random:3", "takes no argument"),
        ("label-ratio:1,x", "one positive number per site"),
    ],
)
def test_partition_texts_that_are_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_partition(text, ("random", "intensity", "column", "label-ratio"))


def test_table_is_keyed_by_its_id_column_and_read_strictly(tmp_path):
    path = table(tmp_path / "t.csv", ["Partition_ID", "Subject_ID"], [["2", "a"], ["11", "b"]])
    found = read_case_table(path)
    assert by_column(["b", "a"], found, "Partition_ID") == ["site-11", "site-02"]
    with pytest.raises(DataError, match="1 of 2 cases are not in the table"):
        by_column(["a", "c"], found, "Partition_ID")
    with pytest.raises(DataError, match=r"no column 'Partition_Id'.*Did you mean 'Partition_ID'"):
        by_column(["a"], found, "Partition_Id")
    with pytest.raises(DataError, match="lists 1 cases twice"):
        read_case_table(table(tmp_path / "u.csv", ["id"], [["a"], ["a"]]))
    with pytest.raises(DataError, match="distinct site names"):
        by_column(["a", "b"], {"a": {"s": "A B"}, "b": {"s": "a-b"}}, "s")
    assert alias_of("CHASE_DB1") == "chase-db1"


def test_numbered_aliases_sort_in_order():
    assert numbered_aliases(3, "hospital") == ["hospital-1", "hospital-2", "hospital-3"]
    names = numbered_aliases(101)
    assert (names, len(names), names[9]) == (sorted(names), 101, "site-010")


def test_neutral_groups_name_only_who_has_several_cases():
    assert neutral_groups(["x", "", "y", "x", "z", "z"]) == [
        "subject-0001", "", "", "subject-0001", "subject-0002", "subject-0002",
    ]  # fmt: skip


def test_grid_settings_resample_only_where_volumes_differ():
    same = [Geometry((40, 90, 20), (1.0, 1.0, 1.0), "RAS")] * 3
    assert grid_settings(same) == {"patch": [32, 64, 16]}
    mixed = [*same, Geometry((20, 40, 90), (2.0, 1.0, 1.0), "SRA")]
    found = grid_settings(mixed)
    assert found["orientation"] == "RAS"
    assert found["spacing"] == [1.0, 1.0, 1.0]
    assert found["patch"] == [32, 64, 16]


# --- msd -------------------------------------------------------------------------------------------------------------


def test_msd_archive_is_cut_by_intensity(tmp_path):
    task = msd_task(tmp_path / "Task99_Tiny", REGIMES)
    archive = as_tar(task, tmp_path / "Task99_Tiny.tar", extra=[("Task99_Tiny/._dataset.json", b"0", "")])
    root = import_into("msd", archive, tmp_path / "root", partition="intensity", sites=3)
    assert {a: sum(c.values()) for a, (c, _) in counts(root).items()} == {
        "site-1": 6,
        "site-2": 5,
        "site-3": 7,
    }
    for alias, top in zip(("site-1", "site-2", "site-3"), (100, 5000, 2e5), strict=True):
        for entry in entries(root, alias):
            assert top / 2 < volume(root / alias / entry["image"]).max() <= top
    config = checked(root)
    assert config.data.patch == (16, 16, 32)
    assert "simulated" in read_federation(root).note
    assert "no subject key" in read_federation(root).note
    no_identifier(root)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Task99_Tiny", "Task99_Tiny.tar", "root"]


def test_msd_image_and_mask_stay_together_and_names_follow_the_list(tmp_path):
    task = msd_task(tmp_path / "task", [10.0 * (n + 1) for n in range(9)])
    root = import_into("msd", task, tmp_path / "root", sites=1)
    original = {
        volume(path).tobytes(): volume(task / "labelsTr" / path.name)
        for path in (task / "imagesTr").iterdir()
    }
    listed = entries(root, "site-1")
    assert [entry["image"] for entry in listed] == [f"./imagesTr/case-{n:04d}.nii.gz" for n in range(1, 10)]
    for entry in listed:
        image, label = (volume(root / "site-1" / entry[key]) for key in ("image", "label"))
        assert np.array_equal(original[image.tobytes()], label)
    aliases = [
        case.alias for cases in read_datalist(root / "site-1", "site-1").cases.values() for case in cases
    ]
    assert aliases == [f"case-{n:04d}" for n in range(1, 10)]


def test_msd_folder_and_archive_give_the_same_bytes_and_the_source_stays(tmp_path):
    task = msd_task(tmp_path / "task", [50.0] * 9)
    before = digests(task)
    archive = as_tar(task, tmp_path / "task.tar")
    first = digests(import_into("msd", task, tmp_path / "a", sites=3, seed=4))
    assert first == digests(import_into("msd", archive, tmp_path / "b", sites=3, seed=4))
    assert first != digests(import_into("msd", archive, tmp_path / "c", sites=3, seed=5))
    assert digests(task) == before


def test_msd_channels_in_a_fourth_axis(tmp_path):
    keys = {"tensorImageSize": "4D", "modality": {"0": "T2", "1": "ADC"}}
    task = msd_task(tmp_path / "task", [50.0] * 3 + [9e3] * 3, more=(2,), **keys)
    root = import_into("msd", task, tmp_path / "root", partition="intensity", sites=2)
    config = checked(root)
    assert config.data.channels == ("T2", "ADC")
    assert [len(entries(root, alias)) for alias in ("site-1", "site-2")] == [3, 3]


def test_msd_table_gives_sites_and_keeps_subjects_together(tmp_path):
    task = msd_task(tmp_path / "task", [50.0] * 12)
    rows = [
        [f"{PATIENT}_{n:03d}", "St. Mary" if n < 6 else "Old Town", f"{PATIENT}-{n // 2}"] for n in range(12)
    ]
    path = table(tmp_path / "cases.csv", ["id", "hospital", "group"], rows)
    root = import_into("msd", task, tmp_path / "root", partition="column:hospital", table=path)
    assert sorted(find_sites(root)) == ["old-town", "st-mary"]
    for alias in find_sites(root):
        split_of = {}
        for split in SPLITS:
            for entry in dataset(root, alias)[split]:
                assert split_of.setdefault(entry["group"], split) == split
        assert len(split_of) == 3
    no_identifier(root)
    assert "no subject key" not in read_federation(root).note


def test_msd_intensity_keeps_a_subject_at_one_site(tmp_path):
    task = msd_task(tmp_path / "task", [100.0] * 7 + [9e4] * 7)
    rows = [[f"{PATIENT}_{n:03d}", str(n // 2)] for n in range(14)]  # subject 3 has a dark and a bright image
    path = table(tmp_path / "cases.csv", ["id", "group"], rows)
    root = import_into("msd", task, tmp_path / "root", partition="intensity", sites=2, table=path)
    peaks = {
        alias: Counter(
            bool(volume(root / alias / entry["image"]).max() > 1000) for entry in entries(root, alias)
        )
        for alias in find_sites(root)
    }
    assert peaks == {"site-1": {False: 6}, "site-2": {False: 1, True: 7}}
    refused(
        tmp_path,
        "7 subjects are too few for 3 sites",
        "msd",
        task,
        partition="intensity",
        sites=3,
        table=path,
    )


@pytest.mark.parametrize(
    ("name", "kind", "link", "said"),
    [
        ("../evil.json", tarfile.REGTYPE, "", "leads out of the folder"),
        ("/etc/evil.json", tarfile.REGTYPE, "", "leads out of the folder"),
        ("Task/../../evil.json", tarfile.REGTYPE, "", "leads out of the folder"),
        ("Task/link", tarfile.SYMTYPE, "/etc/passwd", "is a link or device"),
        ("Task/hard", tarfile.LNKTYPE, "../../evil", "is a link or device"),
        ("Task/fifo", tarfile.FIFOTYPE, "", "is a link or device"),
    ],
)
def test_archives_that_reach_outside_are_refused_whole(tmp_path, name, kind, link, said):
    task = msd_task(tmp_path / "Task", [50.0] * 3)
    archive = as_tar(task, tmp_path / "Task.tar", extra=[(name, kind, link)])
    refused(tmp_path, said, "msd", archive)
    assert not list(tmp_path.rglob("evil*"))


def test_msd_sources_that_are_none(tmp_path):
    refused(tmp_path, "SOURCE is not there", "msd", tmp_path / "nothing")
    (tmp_path / "a.zip").write_bytes(b"PK\3\4" + bytes(600))
    refused(tmp_path, "neither a folder nor a tar archive", "msd", tmp_path / "a.zip")
    (tmp_path / "empty").mkdir()
    refused(tmp_path, "expected one dataset.json in it, got 0", "msd", tmp_path / "empty")
    task = msd_task(tmp_path / "task", [50.0] * 4)
    refused(tmp_path, "needs --table", "msd", task, ConfigError, partition="column:x")
    refused(tmp_path, "site-1: 2 subjects are too few", "msd", task, sites=2)
    archive = as_tar(task, tmp_path / "cut.tar")
    archive.write_bytes(archive.read_bytes()[:3000])
    refused(tmp_path, "damaged or incomplete", "msd", archive)
    (task / "imagesTr" / f"{PATIENT}_001.nii.gz").write_bytes(b"no volume")
    refused(tmp_path, "the volume cannot be read", "msd", task, sites=1)
    (task / "imagesTr" / f"{PATIENT}_001.nii.gz").unlink()
    refused(tmp_path, "names a file that is not there", "msd", task)
    msd_task(task, [50.0] * 3, training=[{"image": "../x.nii.gz", "label": "y.nii.gz"}])
    refused(tmp_path, "names a file outside its folder", "msd", task)


# --- a data root, whole or not at all --------------------------------------------------------------------------------


def test_what_the_reader_refuses_is_never_left_behind(tmp_path):
    about = About("x", "", ("T1",), ("background", "thing"), "3D", "segmentation")

    def write():
        with new_root(tmp_path / "out", "test") as root:
            site = SiteFolder(root, "site", about)
            site.add("training", [".nii.gz"], ".nii.gz")
            site.finish()
            (root / "federation.json").write_text("{}")

    with pytest.raises(DataError, match=r"site, case-0001: the image that dataset\.json lists is not there"):
        write()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_and_the_old_root_as_it_was(tmp_path):
    task = msd_task(tmp_path / "task", [50.0] * 3)
    root = import_into("msd", task, tmp_path / "root", sites=1)
    before = digests(root)

    def write():
        with new_root(root, "msd", force=True) as temporary:
            (temporary / "half").write_text("x")
            raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"Writing the data stopped \(No space left"):
        write()
    assert digests(root) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root", "task"]
    assert (root / MARKER_FILE).is_file()
    assert root.stat().st_mode & 0o777 == 0o755


def test_files_that_cannot_be_linked_are_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_text("x")
    place(tmp_path / "a", tmp_path / "b", move=False)
    assert (tmp_path / "b").read_text() == "x"
    assert (tmp_path / "a").stat().st_ino != (tmp_path / "b").stat().st_ino


def test_nifti_bytes_depend_on_neither_name_nor_time(tmp_path, monkeypatch):
    array = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    write_nifti(tmp_path / "one.nii.gz", array, np.diag([1.0, 2.0, 3.0, 1.0]))
    monkeypatch.setattr("time.time", lambda: 4e9)
    write_nifti(tmp_path / "another.nii.gz", array, np.diag([1.0, 2.0, 3.0, 1.0]))
    assert (tmp_path / "one.nii.gz").read_bytes() == (tmp_path / "another.nii.gz").read_bytes()


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("vessels", {"table": "x"}, "--table does not go with 'vessels': it is for msd, brats, luna"),
        ("heart", {"sites": 2}, "its sites are its own"),
        ("msd", {"binary": True}, "--binary does not go with 'msd': it is for brats"),
        ("brats", {"negatives_per_positive": 2.0}, "--negatives-per-positive .* it is for luna"),
        ("luna", {"seed": -1}, "--seed must be 0"),
    ],
)
def test_options_that_a_kind_does_not_know_are_refused(kind, options, said):
    with pytest.raises(ConfigError, match=said):
        check_options(get_kind(kind), ImportOptions(**options))


def test_every_kind_can_be_loaded_and_an_unknown_one_names_the_nearest():
    for kind in KINDS.values():
        assert callable(kind.load())
    with pytest.raises(ConfigError, match="Did you mean 'vessels'"):
        get_kind("vesels")
