"""Ways in which a hospital's own files go wrong; each takes the site's planted data folder and spoils it."""

import json
import shutil
from pathlib import Path

from tests.planted import FILES, FOLDER, STRAY, TEXT


def describe(folder, **keys):
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}), encoding="utf-8")


def rewrite(folder, change, name="table.csv"):
    rows = [line.split(",") for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    text = "\n".join(",".join(row) for row in change(rows)) + "\n"
    (folder / name).write_text(text, encoding="utf-8")


def first(folder, pattern="*_1.nii"):
    return next((folder / FOLDER).glob(pattern))


def truncate(folder):
    path = first(folder)
    path.write_bytes(path.read_bytes()[:900])


def tiny(folder):
    first(folder).write_bytes(b"x")


def vanish(folder):
    first(folder).unlink()


def other_grid(folder):
    shutil.copy(first(folder), first(folder, "*_2_seg.nii"))


def no_permission(folder):
    path = first(folder)
    path.unlink()
    path.symlink_to(Path("/") / "etc" / FILES)


def spoilt_series(folder):
    for path in list((folder / FOLDER / f"{FILES}_0").iterdir())[:3]:
        path.write_bytes(b"DICM" * 40)


def outside(folder):
    document = json.loads((folder / "dataset.json").read_text())
    document["training"][0]["image"] = f"../{FILES}.nii"
    (folder / "dataset.json").write_text(json.dumps(document))


def twice(folder):
    document = json.loads((folder / "dataset.json").read_text())
    document["training"].append(document["training"][0])
    (folder / "dataset.json").write_text(json.dumps(document))


def group_across(folder):
    document = json.loads((folder / "dataset.json").read_text())
    document["test"][0]["group"] = document["training"][0]["group"]
    (folder / "dataset.json").write_text(json.dumps(document))


def a_name_for_a_case(folder):
    describe(folder, training=[FILES, {"image": FILES, "label": 3, "group": TEXT}])


def no_json(folder):
    (folder / "dataset.json").write_text(f'{{"name": "{TEXT}",,}}')


VOLUME_FAULTS = (
    truncate, tiny, vanish, other_grid, no_permission, spoilt_series, outside, twice, group_across, a_name_for_a_case, no_json,
)  # fmt: skip


def column(number, text):
    def change(rows):
        return [
            [*row[:number], text, *row[number + 1 :]] if index == 3 else row for index, row in enumerate(rows)
        ]

    return lambda folder: rewrite(folder, change, f"{FILES}.csv")


def without_header(folder):
    """The most likely mistake of all: the first patient's row is taken for the names of the columns."""
    rewrite(folder, lambda rows: [[*row[:5], STRAY] for row in rows[1:]], f"{FILES}.csv")


def column_named_after_a_patient(folder):
    rewrite(folder, lambda rows: [["x", *rows[0][1:5], STRAY], *rows[1:]], f"{FILES}.csv")


def latin(folder):
    path = folder / f"{FILES}.csv"
    path.write_bytes(path.read_text(encoding="utf-8").encode("latin-1"))


def long_row(folder):
    rewrite(folder, lambda rows: [*rows, [*rows[-1], TEXT]], f"{FILES}.csv")


TABLE_FAULTS = {
    "name among the numbers": column(0, STRAY),
    "name for a class": column(3, STRAY),
    "name for a split": column(4, FILES),
    "class out of range": column(3, "19500101"),
    "latin-1": latin,
    "row too long": long_row,
    "no such table": lambda folder: describe(folder, table=f"{FILES}_2.csv"),
    "table outside": lambda folder: describe(folder, table=f"/mnt/{FILES}.csv"),
    "no such split column": lambda folder: describe(folder, split_column="where"),
    "a text where numbers belong": lambda folder: describe(folder, missing_values={"a": [STRAY]}),
    "a number where a text belongs": lambda folder: describe(folder, note=[TEXT]),
    "empty": lambda folder: (folder / f"{FILES}.csv").write_text(""),
    "binary": lambda folder: (folder / f"{FILES}.csv").write_bytes(b"\0" + TEXT.encode() + b"\xff"),
    "table is a folder": lambda folder: describe(folder, table="."),
}
TABLE_HOLES = {
    "no header": without_header,
    "column named after a patient": column_named_after_a_patient,
    "key named after a patient": lambda folder: describe(folder, **{STRAY: 1}),
    "missing values of a patient": lambda folder: describe(folder, missing_values={STRAY: [9]}),
    "bad missing values of a patient": lambda folder: describe(folder, missing_values={STRAY: "many"}),
}
