import dataclasses
import functools
import json

import nibabel as nib
import numpy as np
import pytest

from client.data.check import check_site
from client.data.datalist import read_datalist
from client.data.importers.layout import MARKER_FILE
from client.data.mni import trial, write_mni_trial
from client.data.mni.anatomy import LABELS, draw_subject, grid_affine, label_of, load_template
from client.data.mni.scanners import NAMED, scan, scanner
from common.errors import ConfigError, DataError
from common.federation import read_federation
from tests.sourcefiles import digests, entries

pytestmark = pytest.mark.slow

TINY = {"subjects": 3, "voxel_mm": 8.0}


@pytest.fixture(scope="module", autouse=True)
def _load_once():
    """Smoothing the template takes most of a tiny trial's time, and gives the same each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "load_template", functools.cache(load_template))
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("mni") / "root"
    calls = []
    write_mni_trial(out, **TINY, progress=lambda *call: calls.append(call))
    return out, calls


@pytest.fixture(scope="module")
def template():
    return load_template(8.0)


def scans(root, alias):
    for entry in entries(root, alias):
        yield tuple(nib.load(root / alias / entry[key]) for key in ("image", "label"))


def test_root_is_what_the_sites_reader_expects(tiny):
    root, calls = tiny
    federation = read_federation(root)
    config = federation.config()
    assert "imulated" in federation.note
    assert config.data.labels == LABELS
    for alias in ("hospital-1", "hospital-2", "hospital-3"):
        datalist = read_datalist(root / alias, alias)
        assert datalist.counts == {"training": 1, "validation": 1, "test": 1}
        check = check_site(root / alias, alias, config.data)
        check.raise_errors()
        assert min(check.summary().cases.values()) == 1
    assert calls == [("subjects", done, 9) for done in range(1, 10)]


def test_same_seed_same_bytes_and_another_seed_other_brains(tiny, tmp_path):
    root, _ = tiny
    write_mni_trial(tmp_path / "again", **TINY)
    assert digests(tmp_path / "again") == digests(root)
    write_mni_trial(tmp_path / "other", **TINY, seed=1, sites=1)
    mine, theirs = digests(root), digests(tmp_path / "other")
    assert not {mine[name] for name in mine if "Tr" in name} & {
        theirs[name] for name in theirs if "Tr" in name
    }


def test_a_hospital_does_not_depend_on_how_many_there_are(tiny, tmp_path):
    root, _ = tiny
    write_mni_trial(tmp_path / "one", **TINY, sites=1)
    files = {
        name: value for name, value in digests(tmp_path / "one").items() if name.startswith("hospital-1")
    }
    assert len(files) == 7
    assert files.items() <= digests(root).items()


def test_scanners_differ_in_range_grid_and_orientation(tiny):
    root, _ = tiny
    found = {alias: next(scans(root, alias))[0] for alias in ("hospital-1", "hospital-2", "hospital-3")}
    kinds = {alias: image.get_data_dtype().name for alias, image in found.items()}
    assert kinds == {"hospital-1": "int16", "hospital-2": "uint8", "hospital-3": "float32"}
    assert [image.header.get_zooms()[2] for image in found.values()] == [8, 8, 16]
    assert nib.aff2axcodes(found["hospital-2"].affine) == ("L", "P", "S")
    assert found["hospital-2"].shape[2] < found["hospital-1"].shape[2] == 2 * found["hospital-3"].shape[2]
    assert found["hospital-1"].get_fdata().max() > 2000
    assert found["hospital-3"].get_fdata().max() < 3


@pytest.mark.parametrize("alias", ["hospital-1", "hospital-2", "hospital-3"])
def test_every_scan_shows_a_brain_in_its_place(tiny, template, alias):
    """Tissues are ordered as on T1, and label and affine agree with the template's place in the body."""
    root, _ = tiny
    reference = whole_brain(template)
    for image, label in scans(root, alias):
        assert np.array_equal(image.affine, label.affine)
        values, classes = image.get_fdata(), np.asarray(label.dataobj)
        assert set(np.unique(classes)) == {0, 1, 2, 3}
        background, fluid, grey, white = (np.median(values[classes == k]) for k in range(4))
        assert background < fluid < grey < white
        assert overlap(reference, (classes, label.affine)) > 0.8
        mirrored = label.affine @ np.diag([1.0, -1.0, 1.0, 1.0])
        mirrored[1, 3] = label.affine[1, 3]
        assert overlap(reference, (classes, mirrored)) < 0.6


def test_the_template_lies_where_mni_space_has_it(template):
    mask, affine = whole_brain(template)
    centre = affine[:3, :3] @ np.argwhere(mask).mean(axis=0) + affine[:3, 3]
    assert np.abs(centre - [0, -22, 7]).max() < 3


@pytest.mark.parametrize("change", [{"thick": 2}, {"thick": 3}, {"cut_mm": (8.0, 0.0)}, {"flipped": True}])
def test_a_scanner_moves_nothing_in_the_body(template, change):
    person = draw_subject(template, 8.0, np.random.default_rng(0))
    plain = dataclasses.replace(NAMED[0], noise=0.0, shading=0.0)
    centres = []
    for machine in (plain, dataclasses.replace(plain, **change)):
        image, label, affine = scan(person, machine, grid_affine(8.0), np.random.default_rng(1))
        weight = image.astype(float) ** 2
        index = np.stack(np.meshgrid(*map(np.arange, image.shape), indexing="ij")).reshape(3, -1)
        place = (index * weight.reshape(-1)).sum(axis=1) / weight.sum()
        centres.append(affine[:3, :3] @ place + affine[:3, 3])
        assert label.shape == image.shape
    assert np.abs(centres[0] - centres[1]).max() < 1.0


def whole_brain(template):
    return template.maps[3] > 0.5, template.affine


def overlap(reference, other):
    """Dice of the brain at the reference's places inside the other's field of view."""
    mask, affine = reference
    classes, place = other
    points = np.argwhere(np.ones(mask.shape, bool)) @ affine[:3, :3].T + affine[:3, 3]
    inverse = np.linalg.inv(place)
    voxels = np.round(points @ inverse[:3, :3].T + inverse[:3, 3]).astype(int)
    inside = ((voxels >= 0) & (voxels < classes.shape)).all(axis=1)
    mine, theirs = mask.reshape(-1)[inside], classes[tuple(voxels[inside].T)] > 0
    return 2 * (mine & theirs).sum() / max(1, mine.sum() + theirs.sum())


def test_subjects_differ_and_none_is_the_template(template):
    affine = grid_affine(8.0)
    drawn = [draw_subject(template, 8.0, np.random.default_rng(seed)) for seed in range(4)]
    labels = [label_of(person.tissue) for person in drawn]
    for person, label in zip(drawn, labels, strict=True):
        total = person.tissue.sum(axis=0)
        assert person.tissue.min() >= 0
        assert total.max() < 1.0001
        assert 0.7 < overlap(whole_brain(template), (label, affine)) < 0.999
    assert all((labels[0] != other).mean() > 0.02 for other in labels[1:])


def test_atrophy_widens_the_fluid_spaces(template):
    shares = []
    for atrophy in (0.0, 1.0):
        person = draw_subject(template, 8.0, np.random.default_rng(0), atrophy=atrophy)
        shares.append(person.tissue[0].sum() / person.tissue.sum())
    assert shares[1] > 1.3 * shares[0]


def test_further_scanners_come_from_the_seed():
    assert [scanner(index, 5) for index in range(3)] == list(NAMED)
    assert scanner(3, 5) == scanner(3, 5)
    assert len({scanner(index, seed) for index in (3, 4) for seed in (5, 6)}) == 4


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sites": 0}, "sites must be 1 to 99, got 0"),
        ({"subjects": 2}, "subjects must be at least 3"),
        ({"seed": -1}, "seed must be 0"),
        ({"voxel_mm": 0.1}, "voxel_mm must be 1 to 12, got 0.1"),
        ({"voxel_mm": float("nan")}, "voxel_mm"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(tmp_path, wrong, said):
    with pytest.raises(ConfigError, match=said):
        write_mni_trial(tmp_path / "out", **wrong)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_writing_that_broke_off(tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_mni_trial(tmp_path / "out", **TINY, progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_content_is_kept(tmp_path):
    keep = tmp_path / "out" / "keep.txt"
    keep.parent.mkdir()
    keep.write_text("mine")
    with pytest.raises(DataError, match="not empty") as caught:
        write_mni_trial(keep.parent, **TINY)
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(DataError, match="not written by an importer"):
        write_mni_trial(keep.parent, **TINY, force=True)
    assert keep.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_what_wardround_wrote(tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write_mni_trial(out, sites=2, subjects=3, voxel_mm=12.0)
    write_mni_trial(out, sites=1, subjects=3, voxel_mm=12.0, force=True)
    assert not (out / "hospital-2").exists()
    assert json.loads((out / MARKER_FILE).read_text()) == {"written_by": "wardround", "kind": "default"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
