import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.data.datalist import SPLITS, read_datalist
from client.data.split import split_by_group
from common.errors import ConfigError, DataError
from common.federation import Federation, find_sites, read_federation, write_federation
from tests.datafiles import PATIENT, describe, picture_site, segmentation_site, table_site


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def listed(folder, count, **more):
    touch(folder, *(f"{kind}{index}.nii" for index in range(count) for kind in "il"))
    return [{"image": f"i{index}.nii", "label": f"l{index}.nii", **more} for index in range(count)]


def refused(folder, **keys):
    describe(folder, **keys)
    with pytest.raises(DataError) as caught:
        read_datalist(folder, "alpha")
    assert str(caught.value).startswith("alpha")
    assert PATIENT not in str(caught.value)
    assert str(folder) not in str(caught.value)
    return caught.value


def test_decathlon_folder_is_read_as_it_comes(tmp_path):
    cases = listed(tmp_path, 10)
    describe(
        tmp_path,
        training=cases,
        test=["./imagesTs/a.nii.gz"],
        numTraining=10,
        tensorImageSize="4D",
        relase="1.0",
    )
    found = read_datalist(tmp_path, "alpha")
    assert found.counts == {"training": 6, "validation": 2, "test": 2}
    assert (found.task, found.spatial_dims, found.unlabelled) == ("segmentation", 3, 1)
    assert found.channels == ("T1",)
    assert found.labels == ("background", "tumour", "core")
    by_alias = {case.alias: case for split in SPLITS for case in found.cases[split]}
    assert by_alias["case-0003"].image == (tmp_path / "i2.nii",)
    assert by_alias["case-0003"].label == tmp_path / "l2.nii"


def test_listed_splits_are_kept_and_aliases_run_over_the_whole_file(tmp_path):
    cases = listed(tmp_path, 4)
    describe(tmp_path, training=cases[:2], validation=cases[2:3], test=["x.nii", cases[3]])
    found = read_datalist(tmp_path, "alpha")
    assert {split: [case.alias for case in found.cases[split]] for split in SPLITS} == {
        "training": ["case-0001", "case-0002"],
        "validation": ["case-0003"],
        "test": ["case-0005"],
    }
    assert found.unlabelled == 1


def test_one_listed_split_is_not_cut_without_being_told_to(tmp_path):
    cases = listed(tmp_path, 10)
    describe(tmp_path, training=cases[:8], validation=cases[8:])
    assert read_datalist(tmp_path, "alpha").counts == {"training": 8, "validation": 2, "test": 0}
    describe(tmp_path, training=cases[:8], validation=cases[8:], split={"test": 0.25})
    assert read_datalist(tmp_path, "alpha").counts == {"training": 6, "validation": 2, "test": 2}


def test_seed_decides_the_split_and_the_file_wins(tmp_path):
    describe(tmp_path, training=listed(tmp_path, 20))

    def tests(**options):
        return [case.alias for case in read_datalist(tmp_path, "alpha", **options).cases["test"]]

    assert tests(seed=1) == tests(seed=1) != tests(seed=2)
    describe(tmp_path, training=listed(tmp_path, 20), split={"seed": 5})
    assert tests(seed=1) == tests(seed=2) != []


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    seed=st.integers(0, 2**32 - 1),
    shares=st.sampled_from([(0.2, 0.2), (0.1, 0.3), (0.0, 0.2), (0.4, 0.5)]),
    classes=st.integers(1, 3),
)
def test_split_keeps_groups_whole_and_shares_close(groups, seed, shares, classes):
    keys = [str(group) for group in groups]
    strata = [group % classes for group in groups]
    fractions = dict(zip(("validation", "test"), shares, strict=True))
    split = split_by_group(keys, strata, fractions, seed=seed)
    assert split == split_by_group(keys, strata, fractions, seed=seed)
    homes = {}
    for key, name in zip(keys, split, strict=True):
        assert homes.setdefault(key, name) == name
    counts = Counter(split)
    wanted = [name for name, share in fractions.items() if share]
    assert counts["training"] > 0
    assert set(counts) <= {"training", *wanted}
    if len(homes) > len(wanted):
        assert all(counts[name] for name in wanted)
    largest = max(Counter(keys).values())
    for name in wanted:  # no split is off by more than the groups' size allows
        assert abs(counts[name] - fractions[name] * len(keys)) <= 2 * largest + 1


def test_split_gives_every_class_its_share():
    strata = [0] * 80 + [1] * 20
    split = split_by_group([str(i) for i in range(100)], strata, {"validation": 0.2, "test": 0.2}, seed=3)
    positives = Counter(split[80:])
    assert positives["test"] in (3, 4, 5)
    assert positives["validation"] in (3, 4, 5)


def test_groups_of_the_list_stay_together(tmp_path):
    picture_site(tmp_path, cases=8)
    found = read_datalist(tmp_path, "alpha")
    home = {}
    for split in SPLITS:
        for case in found.cases[split]:
            assert home.setdefault(case.group, split) == split
    assert found.spatial_dims == 2
    assert len(home) == 4


def test_classes_make_it_a_classification(tmp_path):
    touch(tmp_path, *(f"{i}.png" for i in range(6)))
    describe(tmp_path, training=[{"image": f"{i}.png", "label": i % 3} for i in range(6)])
    found = read_datalist(tmp_path, "alpha")
    assert (found.task, found.spatial_dims) == ("classification", 2)
    assert {case.label for split in SPLITS for case in found.cases[split]} == {0, 1, 2}


def test_missing_description(tmp_path):
    with pytest.raises(DataError, match=r"alpha: no dataset\.json") as caught:
        read_datalist(tmp_path, "alpha")
    assert str(tmp_path) not in str(caught.value)
    assert str(tmp_path) in caught.value.detail


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "\ufeff{,}"])
def test_description_that_is_no_object(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError, match="alpha: "):
        read_datalist(tmp_path, "alpha")


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"trainings": []}, "unknown key. .*'training'"),
        ({"training": [{"imagee": PATIENT}]}, r"unknown key in 'training\[0\]'.*Did you mean 'image'"),
        (
            {"training": [{"image": "i0.nii", "label": "l0.nii", "fold": 1}]},
            r"unknown key in 'training\[0\]'",
        ),
        ({"training": [[PATIENT]]}, r"training\[0\]"),
        ({"labels": {"0": "background"}}, "'labels' .* at least 2; got 1"),
        ({"labels": {"1": "a", "2": "b"}}, "'labels' .* from 0"),
        ({"labels": {"0": "a", "1": "a"}}, "the same name"),
        ({"modality": {}}, "'modality' .* at least 1"),
        ({"split": {"test": 0.6, "validation": 0.4}}, "nothing for training"),
        ({"split": {"tests": 0.6}}, "unknown key in 'split'"),
        ({"training": [], "test": [{"image": "i0.nii", "label": "l0.nii"}]}, "no labelled training case"),
        ({"training": [{"image": "i0.nii"}]}, "case-0001: the label must be the path of a mask, got none"),
        ({"training": [{"image": [], "label": "l0.nii"}]}, "names no image"),
        ({"training": [{"image": f"{PATIENT}.nii", "label": "l0.nii"}]}, "case-0001: the image .* not there"),
        ({"training": [{"image": "i0.nii", "label": f"{PATIENT}.nii"}]}, "case-0001: the label .* not there"),
        ({"training": [{"image": f"../{PATIENT}.nii", "label": "l0.nii"}]}, "leads out of the data folder"),
        (
            {"training": [{"image": f"/data/{PATIENT}.nii", "label": "l0.nii"}]},
            "leads out of the data folder",
        ),
        ({"training": [{"image": f"a\\{PATIENT}.nii", "label": "l0.nii"}]}, "leads out of the data folder"),
        ({"training": [{"image": f"C:{PATIENT}.nii", "label": "l0.nii"}]}, "leads out of the data folder"),
        ({"task": "tabular", "training": []}, "needs the key 'table'"),
        (
            {"task": "classification", "training": [{"image": "i0.nii", "label": 3}]},
            "class from 0 to 2, got the number 3",
        ),
        ({"task": "classification", "training": [{"image": "i0.nii", "label": "l0.nii"}]}, "got a text"),
        ({"task": "regression"}, "bad value for 'task'"),
    ],
)
def test_bad_descriptions_are_refused(tmp_path, keys, sentence):
    listed(tmp_path, 1)
    error = refused(tmp_path, **keys)
    assert error.exit_code == 3
    assert re.search(sentence, str(error)), str(error)


def test_link_out_of_the_folder_is_refused(tmp_path):
    touch(tmp_path, "outside.nii", "site/l0.nii")
    (tmp_path / "site/i0.nii").symlink_to(tmp_path / "outside.nii")
    error = refused(tmp_path / "site", training=[{"image": "i0.nii", "label": "l0.nii"}])
    assert "link that leads out" in str(error)


def test_all_missing_files_are_counted_and_named_only_in_detail(tmp_path):
    cases = [{"image": f"{PATIENT}_{i}.nii", "label": f"{PATIENT}_{i}_l.nii"} for i in range(3)]
    error = refused(tmp_path, training=cases)
    assert "6 missing in all" in str(error)
    assert error.detail.count(PATIENT) == 6


def test_one_image_twice_is_refused(tmp_path):
    cases = listed(tmp_path, 3)
    error = refused(tmp_path, training=cases, test=[{"image": "./i1.nii", "label": "l1.nii"}])
    assert "case-0004: its image is already listed by case-0002" in str(error)


def test_group_on_both_sides_is_refused(tmp_path):
    cases = listed(tmp_path, 3, group=PATIENT)
    error = refused(tmp_path, training=cases[:2], validation=cases[2:])
    assert "case-0003: it is in validation, but case-0001 of the same group is in training" in str(error)


def test_table_rows_become_cases(tmp_path):
    table_site(tmp_path, ["50,200,0,training", "60,,1,training", "70,300,1,test", "80,1,,test"])
    found = read_datalist(tmp_path, "alpha")
    assert found.counts == {"training": 2, "validation": 0, "test": 1}
    assert found.unlabelled == 1
    assert (found.task, found.channels, found.spatial_dims) == ("tabular", ("age", "chol"), 0)
    assert found.cases["test"][0].alias == "case-0003"


def test_table_groups_stay_together(tmp_path):
    rows = [f"{40 + i},{i},{i % 2},{PATIENT}{i // 3}" for i in range(30)]
    table_site(tmp_path, rows, header="age,chol,target,who", split_column=None, group_column="who")
    found = read_datalist(tmp_path, "alpha")
    assert all(found.counts.values())
    for split in SPLITS:
        assert all(count == 3 for count in Counter(case.group for case in found.cases[split]).values())


# ---- data roots


def test_federation_is_written_and_read_back(tmp_path):
    segmentation_site(tmp_path / "beta", cases=3)
    segmentation_site(tmp_path / "alpha", cases=3)
    wanted = Federation(
        "liver", "Livers", "Simulated sites.", {"data": {"channels": ["CT"]}, "rounds": {"rounds": 7}}
    )
    write_federation(tmp_path, wanted)
    assert read_federation(tmp_path) == wanted
    assert read_federation(tmp_path).config().rounds.rounds == 7
    assert list(find_sites(tmp_path)) == ["alpha", "beta"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".federation")]


def test_settings_are_derived_from_the_first_site(tmp_path):
    picture_site(tmp_path / "eyes")
    data = read_federation(tmp_path).config().data
    assert (data.task, data.spatial_dims, data.normalise) == ("segmentation", 2, "range")
    assert data.channels == ("red", "green", "blue")
    assert len(data.patch) == 2


@pytest.mark.parametrize(
    ("document", "error", "sentence"),
    [
        ({"titel": "x"}, DataError, "Unknown key 'titel'.*'title'"),
        ({"name": 3}, DataError, "must be a text"),
        ({"data": {"chanels": []}}, ConfigError, "data.chanels"),
        ([], DataError, "must be a JSON object"),
    ],
)
def test_bad_federation_is_refused(tmp_path, document, error, sentence):
    (tmp_path / "federation.json").write_text(json.dumps(document))
    with pytest.raises(error, match=sentence):
        read_federation(tmp_path)


def test_root_without_sites_and_names_that_are_no_alias(tmp_path):
    with pytest.raises(DataError, match="holds no site"):
        find_sites(tmp_path)
    segmentation_site(tmp_path / f"{PATIENT} (1)", cases=1)
    with pytest.raises(DataError, match="number 1 cannot be an alias") as caught:
        find_sites(tmp_path)
    assert PATIENT not in str(caught.value)
    with pytest.raises(DataError, match="not a folder"):
        find_sites(tmp_path / "none")


def test_datalist_costs_no_torch():
    import subprocess
    import sys

    code = "import sys, client.data.datalist, common.federation, common.site_summary; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    "keys",
    [
        {PATIENT: 1},
        {"split": {PATIENT: 1}},
        {"training": [{"image": "i", PATIENT: 1}]},
        {"missing_values": {PATIENT: "many"}},
    ],
)
def test_a_key_is_told_at_the_site_alone(tmp_path, keys):
    listed(tmp_path, 1)
    error = refused(tmp_path, **keys)
    assert PATIENT not in str(error)
    assert PATIENT in error.detail


@pytest.mark.parametrize("text", ["[" * 100_000, '{"numTest": ' + "9" * 5000 + "}"])
def test_a_description_that_json_cannot_follow_is_refused(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=r"alpha: dataset\.json cannot be read"):
        read_datalist(tmp_path, "alpha")
