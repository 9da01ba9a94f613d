"""Bad input is refused at the border: one sentence with what to do, an exit code, nothing started, nothing left."""

import json
import shutil

import nibabel
import numpy as np
import pytest

from ops.cli import main
from tests.bench.environment import tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def broken(data, tmp_path):
    """A copy of the data whose first hospital can be spoiled."""
    root = tmp_path / "broken"
    shutil.copytree(data, root)
    return root


def first_image(root, key="image"):
    description = json.loads((root / "hospital-1" / "dataset.json").read_text())
    return root / "hospital-1" / description["training"][0][key]


def spoil_nan(root):
    path = first_image(root)
    image = nibabel.load(path)
    voxels = image.get_fdata(dtype=np.float32)
    voxels[3, 3, 3] = np.nan
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), path)


def spoil_label(root):
    path = first_image(root, "label")
    image = nibabel.load(path)
    voxels = np.asarray(image.dataobj).astype(np.uint8)
    voxels[3, 3, 3] = 9
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), path)


def spoil_shape(root):
    path = first_image(root, "label")
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj)[:-2].astype(np.uint8), image.affine), path)


def no_training(root):
    path = root / "hospital-1" / "dataset.json"
    description = json.loads(path.read_text())
    description["training"] = []
    path.write_text(json.dumps(description))


BAD = [
    (lambda root: first_image(root).unlink(), (), 3, "hospital-1"),
    (lambda root: first_image(root).write_bytes(b"no volume"), (), 3, "case-0001"),
    (spoil_nan, (), 3, "case-0001"),
    (spoil_label, (), 3, "case-0001"),
    (spoil_shape, (), 3, "case-0001"),
    (no_training, (), 3, "hospital-1"),
    (lambda root: None, ("--method", "fedprocks"), 2, "Did you mean 'fedprox'?"),
    (lambda root: None, ("--set", "learning_rat=1"), 2, "Unknown setting"),
    (lambda root: None, ("--task", "tabular"), 2, "segmentation"),
    (lambda root: None, ("--sites", "hospital-9"), 2, "hospital-1"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "more", "code", "said"), BAD)
def test_bad_input_gives_one_sentence_an_exit_code_and_starts_nothing(
    broken, tmp_path, capsys, spoil, more, code, said
):
    spoil(broken)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(["trial", "--data", str(broken), "--out", str(out), "--rounds", "1", *more])
    text = "".join(capsys.readouterr())
    assert ended.value.code == code, text
    assert said in " ".join(text.split())
    assert "Traceback" not in text
    assert not out.exists()  # nothing ran, nothing is left
