import json

import numpy as np
import pytest

from client.data.check import check_site
from client.data.datalist import read_datalist
from client.data.dataset import SiteDataset
from common.config import DataConfig
from common.errors import DataError, MismatchError
from common.site_summary import SiteSummary, mismatches, require_fit
from tests.datafiles import AFFINE, PATIENT, cube, describe, picture_site, save, segmentation_site, table_site

CLASSES = ("background", "tumour", "core")


def config(**keys):
    return DataConfig(**{"labels": CLASSES, "patch": (8, 8, 8), **keys})


def codes(check, level="error"):
    return sorted((problem.code, problem.case) for problem in check.problems if problem.level == level)


def leaks(check):
    """Everything of a check that may leave."""
    return check.to_json() + "".join(problem.sentence for problem in check.problems)


def test_a_clean_site(tmp_path):
    folder = segmentation_site(tmp_path, cases=5)
    seen = []
    check = check_site(
        folder,
        "alpha",
        config(spacing=(1.5, 2, 3), spacing_tolerance=0.1),
        progress=lambda *at: seen.append(at),
    )
    assert check.ok
    assert check.problems == []
    assert seen == [(n, 5) for n in range(1, 6)]
    check.raise_errors()
    summary = check.summary()
    assert summary == SiteSummary.model_validate_json(summary.model_dump_json())
    assert summary.cases == {"training": 3, "validation": 1, "test": 1}
    assert summary.spacing_min == summary.spacing_max == (1.5, 2, 3)
    assert summary.size_min == (10, 11, 12)
    assert summary.orientations == {"LPS": 5}
    voxels = np.sum([np.bincount(cube(index)[1].ravel(), minlength=3) for index in range(5)], axis=0)
    assert list(summary.class_share.values()) == pytest.approx(voxels / voxels.sum(), rel=1e-4)
    medians = [np.median(cube(index)[0]) for index in range(5)]
    assert summary.intensity["T1"]["p50"] == pytest.approx((min(medians), max(medians)), rel=1e-4)


def test_figures_follow_the_runs_orientation(tmp_path):
    folder = segmentation_site(tmp_path, cases=2)
    turned = AFFINE[:, [2, 0, 1, 3]]
    for index in range(2):
        image, label = cube(index)
        save(folder / f"imagesTr/{PATIENT}_{index}.nii.gz", image, turned)
        save(folder / f"labelsTr/{PATIENT}_{index}.nii.gz", label, turned)
    assert check_site(folder, "alpha").summary().spacing_min == (3, 1.5, 2)
    summary = check_site(folder, "alpha", config(orientation="RAS")).summary()
    assert summary.spacing_min == (1.5, 2, 3)
    assert summary.size_min == (11, 12, 10)


def test_every_planted_fault_is_found_and_none_stops_the_others(tmp_path):
    folder = segmentation_site(tmp_path, cases=12, split={"validation": 0, "test": 0})
    image, label = cube(1)
    faults = {
        0: ("imagesTr", None, AFFINE),
        1: ("imagesTr", np.where(image > 900, np.nan, image).astype(np.float32), AFFINE),
        2: ("labelsTr", label[:-1], AFFINE),
        3: ("labelsTr", label, AFFINE + np.array([[0, 0, 0, 9.0]] + [[0] * 4] * 3)),
        4: ("labelsTr", label * 2, AFFINE),
        5: ("labelsTr", label * np.float32(0.5), AFFINE),
        6: ("imagesTr", np.full_like(image, 7), AFFINE),
        7: ("imagesTr", cube(8)[0], AFFINE),
        9: ("imagesTr", image.astype(np.float64), AFFINE),
        10: ("imagesTr", np.stack([image] * 2, -1), AFFINE),
        11: ("labelsTr", np.zeros_like(label), AFFINE),
    }
    for index, (kind, array, affine) in faults.items():
        path = folder / kind / f"{PATIENT}_{index}.nii.gz"
        if array is None:
            path.write_bytes(path.read_bytes()[:200])
        else:
            save(path, array, affine)
    check = check_site(folder, "alpha")
    assert codes(check) == sorted(
        [
            ("unreadable", "case-0001"),
            ("nonfinite", "case-0002"),
            ("shape", "case-0003"),
            ("affine", "case-0004"),
            ("label-values", "case-0005"),
            ("label-fraction", "case-0006"),
            ("channels", "case-0011"),
        ]
    )
    assert codes(check, "warning") == sorted(
        [
            ("constant", "case-0007"),
            ("duplicate", "case-0009"),
            ("dtype", "case-0010"),
            ("empty-mask", ""),
            ("no-test", ""),
            ("no-validation", ""),
        ]
    )
    assert len(check.facts) == 11
    assert check.summary().errors == 7
    assert check.summary().problems["affine"] == 1
    with pytest.raises(
        DataError, match=r"alpha, case-0001: .*7 errors in all \(unreadable 1, nonfinite 1"
    ) as caught:
        check.raise_errors()
    assert PATIENT in caught.value.detail
    for text in (leaks(check), str(caught.value)):
        assert PATIENT not in text
        assert str(tmp_path) not in text


def test_what_the_check_calls_an_error_is_what_training_refuses(tmp_path):
    """One rule for both: a clean check means that every batch can be made."""
    for number, (kind, array) in enumerate(
        [
            ("labelsTr", cube(0)[1] * 2),
            ("labelsTr", cube(0)[1][:-1]),
            ("imagesTr", np.full((10, 11, 12), np.inf)),
        ]
    ):
        folder = segmentation_site(tmp_path / str(number), cases=1)
        save(folder / kind / f"{PATIENT}_0.nii.gz", array)
        found = check_site(folder, "alpha", config()).problems
        sentence = next(problem.sentence for problem in found if problem.level == "error")
        with pytest.raises(DataError) as caught:
            list(
                SiteDataset(read_datalist(folder, "alpha"), config()).training_batches(
                    seed=0, epoch=0, batch_size=1
                )
            )
        assert str(caught.value) == f"alpha, case-0001: {sentence}."


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha", ""])
def test_same_image_on_both_sides_of_the_split_is_a_leak(tmp_path, suffix):
    folder = segmentation_site(tmp_path, cases=2)
    image, label = cube(0)
    save(folder / f"copy{suffix}", image, AFFINE)  # the same voxels in another format under another name
    save(folder / "copy_label.nii", label)
    document = json.loads((folder / "dataset.json").read_text())
    document["test"] = [{"image": f"copy{suffix}", "label": "copy_label.nii"}]
    (folder / "dataset.json").write_text(json.dumps(document))
    check = check_site(folder, "alpha")
    assert codes(check) == [("leak", "case-0003")]
    assert "case-0001" in check.problems[0].sentence


def test_dicom_headers_do_not_show(tmp_path):
    folder = segmentation_site(tmp_path, cases=3, suffix="")
    next((folder / f"imagesTr/{PATIENT}_1").glob("*_5.dcm")).unlink()
    check = check_site(folder, "alpha")
    assert codes(check) == [("unreadable", "case-0002")]
    assert "slices are missing" in check.problems[0].sentence
    assert PATIENT not in leaks(check)
    assert PATIENT in check.problems[0].detail
    assert {fact.format for fact in check.facts} == {"DICOM"}


def test_geometry_that_differs_between_cases(tmp_path):
    folder = segmentation_site(tmp_path, cases=4)
    image, label = cube(3)
    for kind, array in (("imagesTr", image), ("labelsTr", label)):
        save(folder / kind / f"{PATIENT}_3.nii.gz", array, np.diag([1.5, 2, 30, 1]))
    check = check_site(folder, "alpha")
    assert codes(check, "warning") == [("orientation", ""), ("spacing-outlier", "case-0004")]
    assert codes(check_site(folder, "alpha", config(orientation="RAS")), "warning") == [
        ("spacing-outlier", "case-0004")
    ]
    strict = check_site(
        folder, "alpha", config(orientation="RAS", spacing=(1.5, 2, 3), spacing_tolerance=0.2)
    )
    assert codes(strict) == [("mismatch", ""), ("spacing-tolerance", "case-0004")]


def test_classification_counts_cases(tmp_path):
    cases = []
    for index in range(6):
        save(tmp_path / f"{index}.png", cube(index)[0][:, :, 0].astype(np.uint8))
        cases.append({"image": f"{index}.png", "label": index % 2})
    describe(tmp_path, training=cases)
    summary = check_site(tmp_path, "alpha").summary()
    assert summary.class_share == {"background": 0.5, "tumour": 0.5, "core": 0}
    assert summary.empty_classes == ("core",)
    assert summary.problems["empty-class"] == 1


def test_pictures(tmp_path):
    check = check_site(picture_site(tmp_path), "alpha")
    assert check.ok
    assert check.summary().orientations == {}
    assert list(check.summary().intensity) == ["red", "green", "blue"]
    assert PATIENT not in leaks(check)


def test_description_that_cannot_be_used_is_a_finding(tmp_path):
    check = check_site(describe(tmp_path, trainings=[]), "alpha")
    assert codes(check) == [("description", "")]
    assert check.to_mapping()["summary"] is None
    with pytest.raises(DataError, match="unknown key"):
        check.summary()
    with pytest.raises(DataError, match=r"alpha: dataset\.json has an unknown key"):
        check.raise_errors()


def test_table_figures(tmp_path):
    rows = ["50,200,0,training", "60,,1,training", "60,,1,training", "70,300,1,test"]
    check = check_site(table_site(tmp_path, rows), "alpha")
    assert check.ok
    summary = check.summary()
    assert summary.missing_share == {"age": 0, "chol": 0.5}
    assert summary.class_share == {"well": 0.25, "ill": 0.75}
    assert summary.intensity["age"]["p50"] == (60, 60)
    assert codes(check, "warning") == [("duplicate", "case-0003"), ("no-validation", "")]


def test_every_bad_cell_is_found(tmp_path):
    rows = [f"{PATIENT},200,0,training", f"60,{PATIENT},5,training", f"{PATIENT},1,x,training"]
    check = check_site(table_site(tmp_path, rows), "alpha")
    assert codes(check) == [
        ("cell", "case-0001"),
        ("cell", "case-0002"),
        ("cell", "case-0003"),
        ("label-values", "case-0002"),
    ]
    assert "'age' has 2 cells" in check.problems[0].sentence
    assert PATIENT not in leaks(check)


def test_table_features_that_tell_nothing(tmp_path):
    check = check_site(table_site(tmp_path, ["50,,0,training", "50,,1,training"]), "alpha")
    assert ("feature-missing", "") in codes(check, "warning")
    assert ("constant", "") in codes(check, "warning")


# ---- a site against a run


def summary(**keys):
    known = {
        "site": "alpha",
        "task": "segmentation",
        "spatial_dims": 3,
        "channels": ("T1",),
        "labels": CLASSES,
    }
    return SiteSummary(**{**known, "cases": {"training": 3}, **keys})


@pytest.mark.parametrize(
    ("site", "run", "fields"),
    [
        ({}, {}, []),
        ({"channels": ("T2",)}, {}, ["channels"]),
        ({"labels": CLASSES[::-1]}, {}, ["labels"]),
        ({"task": "classification"}, {}, ["task"]),
        ({"spatial_dims": 2}, {}, ["spatial_dims"]),
        ({"cases": {"training": 0, "test": 4}}, {}, ["training cases"]),
        ({"spacing_min": (1, 1, 1), "spacing_max": (1, 1, 2)}, {"spacing": (1, 1, 1)}, []),
        (
            {"spacing_min": (1, 1, 1), "spacing_max": (1, 1, 2)},
            {"spacing": (1, 1, 1), "spacing_tolerance": 0.5},
            ["spacing"],
        ),
        (
            {"spacing_min": (1, 1, 0.5), "spacing_max": (1, 1, 1)},
            {"spacing": (1, 1, 1), "spacing_tolerance": 0.5},
            ["spacing"],
        ),
        (
            {"spacing_min": (1, 1, 0.8), "spacing_max": (1, 1, 1.5)},
            {"spacing": (1, 1, 1), "spacing_tolerance": 0.5},
            [],
        ),
        ({}, {"spacing": (1, 1, 1), "spacing_tolerance": 0.5}, []),
    ],
)
def test_mismatches(site, run, fields):
    found = mismatches(summary(**site), config(**run))
    assert [item.field for item in found] == fields
    if fields:
        with pytest.raises(MismatchError, match=f"alpha does not fit the run: {fields[0]}: expected"):
            require_fit(summary(**site), config(**run))
    else:
        require_fit(summary(**site), config(**run))


def test_sound_data_that_does_not_fit_is_a_mismatch(tmp_path):
    check = check_site(segmentation_site(tmp_path, cases=3), "alpha", config(channels=("T2",)))
    assert codes(check) == [("mismatch", "")]
    with pytest.raises(MismatchError, match=r"channels: expected \(T2\), got \(T1\)"):
        check.raise_errors()
