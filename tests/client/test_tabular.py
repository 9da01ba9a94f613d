import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from client.data.datalist import read_datalist
from client.data.dataset import SiteDataset
from client.data.tabular import TableSpec, fit_standardiser, read_table
from common.config import DataConfig
from common.errors import DataError
from tests.datafiles import PATIENT, table_site

ROWS = ["50,200,0,training", "60,,1,training", "70,300,1,training", "80,1000,1,test", "?,NaN,0,validation"]


def config(**keys):
    return DataConfig(
        task="tabular", spatial_dims=0, channels=("age", "chol"), labels=("well", "ill"), patch=(), **keys
    )


def open_site(folder, **keys):
    return SiteDataset(read_datalist(folder, "alpha"), config(**keys))


def rows_of(data, split):
    (batch,) = data.evaluation_cases(split)
    return batch


def test_values_are_filled_and_standardised_by_the_sites_training_rows(tmp_path):
    table_site(tmp_path, ROWS)
    data = open_site(tmp_path)
    training = rows_of(data, "training").image
    spread = np.std([50, 60, 70])
    np.testing.assert_allclose(training[:, 0], (np.array([50, 60, 70]) - 60) / spread, rtol=1e-6)
    np.testing.assert_allclose(training[:, 1], [-1, 0, 1], atol=1e-6)  # 200, median 250, 300 around 250 by 50
    np.testing.assert_allclose(rows_of(data, "test").image, [[20 / spread, 15]], rtol=1e-6)
    np.testing.assert_allclose(rows_of(data, "validation").image, [[0, 0]], atol=1e-6)
    assert rows_of(data, "test").label.tolist() == [1]
    assert rows_of(data, "training").alias == "case-0001"
    assert rows_of(data, "training").cases == 3


def test_declared_values_and_words_are_missing(tmp_path):
    table_site(
        tmp_path, ["50,0,0,training", "60,10,1,training", "70,30,0,training"], missing_values={"chol": [0]}
    )
    values = read_table(read_datalist(tmp_path, "alpha").table, "alpha").values
    assert np.isnan(values[:, 1]).tolist() == [True, False, False]
    np.testing.assert_allclose(rows_of(open_site(tmp_path), "training").image[:, 1], [0, -1, 1])


def test_missing_zero_is_the_mean_and_differs_from_the_median(tmp_path):
    rows = ["1,1,0,training", "2,2,1,training", "3,9,0,training", "4,,0,training"]
    table_site(tmp_path, rows)
    assert rows_of(open_site(tmp_path, missing="zero"), "training").image[3, 1] == 0
    assert rows_of(open_site(tmp_path), "training").image[3, 1] < -0.5


def test_feature_never_measured_in_training_is_zero_everywhere(tmp_path):
    table_site(tmp_path, ["1,,0,training", "2,,1,training", "3,900,1,test"])
    assert rows_of(open_site(tmp_path), "training").image[:, 1].tolist() == [0, 0]
    assert rows_of(open_site(tmp_path), "test").image[:, 1].tolist() == [0]


def test_raw_values_where_nothing_is_to_be_normalised(tmp_path):
    table_site(tmp_path, ROWS)
    data = open_site(tmp_path, normalise="none")
    assert rows_of(data, "training").image.tolist() == [[50, 200], [60, 250], [70, 300]]


def test_batches(tmp_path):
    table_site(tmp_path, [f"{40 + i},{i},{i % 2},training" for i in range(10)])
    data = open_site(tmp_path)
    found = list(data.training_batches(seed=0, epoch=0, batch_size=4))
    assert [tuple(batch["image"].shape) for batch in found] == [(4, 2), (4, 2), (2, 2)]
    assert data.steps_per_epoch(4) == 3
    assert found[0]["image"].dtype == torch.float32
    assert found[0]["label"].dtype == torch.int64
    again = list(open_site(tmp_path).training_batches(seed=0, epoch=0, batch_size=4))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(found, again, strict=True))
    other = torch.cat([batch["image"] for batch in data.training_batches(seed=0, epoch=1, batch_size=4)])
    assert not torch.equal(torch.cat([batch["image"] for batch in found]), other)
    assert sorted(other[:, 0].tolist()) == sorted(torch.cat([b["image"] for b in found])[:, 0].tolist())


@settings(max_examples=50, deadline=None)
@given(
    values=arrays(
        np.float64,
        st.tuples(st.integers(1, 12), st.integers(1, 4)),
        elements=st.one_of(st.just(np.nan), st.floats(-1e6, 1e6, allow_subnormal=False)),
    ),
    missing=st.sampled_from(["median", "zero"]),
    standardise=st.booleans(),
)
def test_every_table_becomes_finite(values, missing, standardise):
    scale = fit_standardiser(values, missing=missing, standardise=standardise)
    result = scale.apply(values)
    assert result.shape == values.shape
    assert result.dtype == np.float32
    assert np.isfinite(result).all()
    if standardise:
        measured = ~np.isnan(values)
        for column in range(values.shape[1]):
            raw = values[measured[:, column], column]
            if raw.size and raw.std() > 1e-6 * max(1.0, abs(raw.mean())):  # else the feature is constant
                kept = result[measured[:, column], column].astype(np.float64)
                assert abs(kept.mean()) < 1e-2
                assert kept.std() == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize(
    ("text", "keys", "sentence"),
    [
        ("age,chol,target,split\n", {}, "a header line and no rows"),
        ("", {}, "the table is empty"),
        ("age;chol;target;split\n1;2;0;training\n", {}, "separated by semicolons"),
        ("age,chol,chol,target,split\n1,2,2,0,training\n", {}, "two columns of the table have the same name"),
        ("age,cholesterol,target,split\n1,2,0,training\n", {}, "lacks the declared column 'chol'"),
        ("age,chol,target\n1,2,0\n", {}, "lacks a declared column"),
        ("age,chol,target,split\n1,2,0\n", {}, "case-0001: the row has 3 cells, expected 4"),
        (f"age,chol,target,split\n1,2,0,training\n1,{PATIENT},0,training\n", {}, "case-0002: column 'chol' holds a text"),
        ("age,chol,target,split\n1,inf,0,training\n", {}, "case-0001: column 'chol'"),
        ("age,chol,target,split\n1,2,0.5,training\n", {}, "case-0001: column 'target'"),
        ("age,chol,target,split\n1,2,2,training\n", {}, "case-0001: the target must be a class from 0 to 1, got 2"),
        (f"age,chol,target,split\n1,2,0,{PATIENT}\n", {}, "case-0001: column 'split' must say training"),
        ("age,chol,target,split\n1,2,0,test\n", {}, "no labelled training case"),
        ('age,chol,target,split\n1,"2,0,training\n', {}, "the table cannot be read"),
        ("age,chol,target,split\n1,2,0,training\n", {"missing_values": {"cholesterol": [0]}}, "names a column that is no feature"),
        ("age,chol,target,split\n1,2,0,training\n", {"features": ["age", "age"]}, "each once"),
        ("age,chol,target,split\n1,2,0,training\n", {"training": ["a.nii"]}, "a table and also cases"),
        ("age,chol,target,split\n1,2,0,training\n", {"table": "../table.csv"}, "leads out of the data folder"),
    ],
)  # fmt: skip
def test_bad_tables_are_refused(tmp_path, text, keys, sentence):
    import json

    table_site(tmp_path, [])
    (tmp_path / "table.csv").write_text(text)
    document = json.loads((tmp_path / "dataset.json").read_text()) | keys
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=sentence) as caught:
        read_datalist(tmp_path, "alpha")
    assert PATIENT not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_cell_texts_are_not_kept(tmp_path):
    table_site(tmp_path, [f"{PATIENT},1,0,training"])
    found = read_table(TableSpec(tmp_path / "table.csv", ("age", "chol"), "target"), "alpha")
    assert PATIENT not in repr(found)
    assert (found.bad[0].row, found.bad[0].column) == (0, "age")


def test_the_header_is_told_at_the_site_alone(tmp_path):
    """Of a table without headings the "columns" are the first patient's row."""
    table_site(tmp_path, [])
    (tmp_path / "table.csv").write_text(f"{PATIENT},\x1b[2J,0,training\n1,2,0,training\n")
    with pytest.raises(DataError, match="lacks the declared column 'age'; it has 4 columns") as caught:
        read_datalist(tmp_path, "alpha")
    assert PATIENT not in str(caught.value)
    assert PATIENT in caught.value.detail
    assert "\x1b" not in caught.value.detail
