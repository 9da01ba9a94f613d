"""`wardround data import cifar` hands its options on and shows the sites."""

import numpy as np

from tests.client.test_importer_cifar import arrays
from tests.ops.test_data_cli import output
from tests.sourcefiles import dataset


def test_import_cifar_takes_classes_images_and_delta(tmp_path):
    np.savez(tmp_path / "pictures.npz", **arrays())
    said = output("import", "cifar", tmp_path / "pictures.npz", tmp_path / "out", "--classes", "2,0", "--images", 20,
                  "--partition", "delta:3", "--seed", 4)  # fmt: skip
    assert "│ site-5 │ 16 │ 4 │ 10 │" in said
    assert "simulated" in said
    written = dataset(tmp_path / "out", "site-1")
    assert written["labels"] == {"0": "bird", "1": "airplane"}
    assert [entry["label"] for entry in written["training"]].count(1) == 4
    assert "--classes --images" in " ".join(output("kinds").split())
