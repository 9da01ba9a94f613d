"""Tiny sources in the form in which public data sets come, and what tests ask of an imported root."""

import csv
import hashlib
import io
import json
import tarfile

import nibabel as nib
import numpy as np
import pytest

from client.data.check import check_site
from client.data.datalist import read_datalist
from client.data.importers.kinds import ImportOptions, check_options, get_kind
from client.data.importers.layout import no_progress
from common.errors import DataError
from common.federation import find_sites, read_federation
from tests.datafiles import PATIENT, save

AFFINE = np.diag([1.0, 1.0, 1.0, 1.0])


def import_into(kind, source, out, **options):
    """Run an importer as the command does."""
    chosen = get_kind(kind)
    given = ImportOptions(**options)
    check_options(chosen, given)
    chosen.load()(source, out, given, no_progress)
    return out


def refused(tmp_path, said, kind, source, error=DataError, **options):
    """The import is refused with a safe sentence, and nothing is left of it."""
    out = tmp_path / "refused" / "out"
    with pytest.raises(error, match=said) as caught:
        import_into(kind, source, out, **options)
    sentence = str(caught.value)
    assert str(tmp_path) not in sentence
    assert PATIENT not in sentence
    assert not list(out.parent.glob("*"))
    assert not list(out.parent.glob(".*"))


def no_identifier(root):
    """No file name and no written text names what the source called its cases."""
    for path in root.rglob("*"):
        assert PATIENT not in path.name
        if path.suffix in (".json", ".csv"):
            assert PATIENT not in path.read_text()


def checked(root):
    """Every site passes the hospital's own check under the settings that were written."""
    config = read_federation(root).config()
    for alias, folder in find_sites(root).items():
        found = check_site(folder, alias, config.data)
        found.raise_errors()
        cases = sum(found.summary().cases.values())
        assert cases == sum(read_datalist(folder, alias).counts.values()) > 0
    return config


def digests(root):
    """Return path and hash of every file under a root."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def dataset(root, alias):
    return json.loads((root / alias / "dataset.json").read_text())


def entries(root, alias):
    document = dataset(root, alias)
    return [entry for split in ("training", "validation", "test") for entry in document[split]]


def volume(path):
    return np.asanyarray(nib.load(path).dataobj)


def msd_task(folder, scales, more=(), **keys):
    """Write a Decathlon task: case k has intensities up to about scales[k] and its number in the mask's first voxel."""
    training = []
    for index, scale in enumerate(scales):
        rng = np.random.default_rng(index)
        name = f"{PATIENT}_{index:03d}.nii.gz"
        image = (scale * rng.uniform(0.1, 1.0, (17, 18, 33, *more))).astype(np.float32)
        label = np.zeros(image.shape[:3], np.uint8)
        label[4:9, 4:9, 4:9], label[0, 0, 0] = 1, index % 2
        save(folder / "imagesTr" / name, image, AFFINE)
        save(folder / "labelsTr" / name, label, AFFINE)
        training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    document = {
        "name": "Tiny",
        "description": "tiny",
        "licence": "CC0",
        "relase": "1.0",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "thing"},
        "numTraining": len(training),
        "numTest": 1,
        "training": training,
        "test": ["./imagesTs/unlabelled.nii.gz"],
        **keys,
    }
    (folder / "dataset.json").write_text(json.dumps(document))
    return folder


def as_tar(folder, path, extra=()):
    """Pack a folder; `extra` are (name, type, link name) of further members."""
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname=folder.name)
        for name, kind, link in extra:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            body = b"" if link else b"{}"
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


def table(path, header, rows):
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def brats_tree(folder, cases=12, names=("_t1", "_t1ce", "_t2", "_flair", "_seg"), top=4, keys=None):
    """Write a BraTS tree; channel c of a case holds 100 * c + case number."""
    for index in range(cases):
        key = keys[index] if keys else f"Brats17_{PATIENT}_{index}_1"
        home = folder / ("HGG" if index % 2 else "LGG") / key
        for channel, name in enumerate(names[:4]):
            image = np.full((20, 18, 16), 100 * channel + index, np.int16)
            image[0, 0, 0] = 0
            save(home / f"{key}{name}.nii.gz", image, AFFINE)
        mask = np.zeros((20, 18, 16), np.int16)
        mask[2:8, 2:8, 2:8], mask[4:6, 4:6, 4:6], mask[3, 3, 3] = 2, top, 1
        save(home / f"{key}{names[4]}.nii.gz", mask, AFFINE)
    return folder


LUNA_SPACING = np.array([0.8, 0.7, 2.0])
LUNA_ORIGIN = np.array([-30.0, -20.0, 100.0])


def luna_folder(folder, series=9, positives=1, negatives=4):
    """Write CTs whose value is `luna_value` of the place, and their candidates."""
    import itk

    rows = []
    shape = (60, 64, 24)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"))
    place = LUNA_ORIGIN[:, None, None, None] + grid * LUNA_SPACING[:, None, None, None]
    for index in range(series):
        uid = f"1.3.6.1.4.1.{PATIENT}.{index}"
        image = itk.image_from_array(np.ascontiguousarray(luna_value(place).astype(np.int16).T))
        image.SetSpacing([float(v) for v in LUNA_SPACING])
        image.SetOrigin([float(v) for v in LUNA_ORIGIN])
        home = folder / f"subset{index % 3}"
        home.mkdir(parents=True, exist_ok=True)
        itk.imwrite(image, str(home / f"{uid}.mhd"))
        rng = np.random.default_rng(index)
        for number in range(positives + negatives):
            x, y, z = rng.uniform([-25, -15, 110], [10, 15, 140])
            rows.append([uid, f"{x:.3f}", f"{y:.3f}", f"{z:.3f}", int(number < positives)])
    rows.append(["1.2.not.here", "0", "0", "0", "1"])
    table(folder / "candidates.csv", ["seriesuid", "coordX", "coordY", "coordZ", "class"], rows)
    return folder


def luna_value(place):
    """The CT's Hounsfield units at places (3, ...) in mm, LPS. Multilinear, so interpolation meets it exactly."""
    x, y, z = place[0] + 10, place[1], place[2] - 120
    return -300 + 8.371 * x + 3.113 * y - 2.739 * z + 0.21 * x * y - 0.17 * y * z + 0.13 * x * z
