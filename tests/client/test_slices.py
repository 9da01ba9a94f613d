"""Example pictures: the right slice, the right colours, the right way up, the same bytes, only case aliases."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from client.slices import (
    COLOURS,
    GAP,
    LONGEST,
    OPACITY,
    SHORTEST,
    draw_case,
    draw_restyled,
    fullest_slice,
    limits_of,
    overlaid,
    panel_size,
    save_slices,
    save_styles,
    windowed,
)
from tests.client.test_trainer import make


def item(truth, *, image=None, spacing=(), alias="case-0001", channels=1):
    image = np.zeros((channels, *truth.shape), np.float32) if image is None else image
    return SimpleNamespace(
        alias=alias,
        image=torch.from_numpy(image)[None],
        label=torch.from_numpy(truth)[None, None],
        spacing=spacing,
        cases=1,
    )


def panels(picture):
    width = (picture.shape[1] - 2 * GAP) // 3
    return [picture[:, start : start + width] for start in (0, width + GAP, 2 * (width + GAP))]


def test_pictures_are_written_by_alias_and_again_with_the_same_bytes(tmp_path):
    made = make()
    folders = [tmp_path / "one" / "slices", tmp_path / "two" / "slices"]
    counts = [
        save_slices(folder, made.dataset, made, made.weights(), split="validation", count=2)
        for folder in folders
    ]
    assert counts == [2, 2]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names == [["case-0.png", "case-1.png"]] * 2
    for name in names[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
        with Image.open(folders[0] / name) as picture:
            assert picture.size == (3 * SHORTEST + 2 * GAP, SHORTEST)
    assert save_slices(folders[0], made.dataset, made, made.weights(), split="validation") == 3


def test_only_a_segmentation_has_pictures(tmp_path):
    made = make("mlp")
    assert save_slices(tmp_path / "slices", made.dataset, made, made.weights(), split="validation") == 0
    assert not (tmp_path / "slices").exists()


def test_an_alias_cannot_leave_the_folder(tmp_path):
    made = make()
    made.dataset.evaluation_cases = lambda split: iter(
        [item(np.zeros((16, 16), np.int64), alias="../a b", channels=2)]
    )
    assert save_slices(tmp_path / "slices", made.dataset, made, made.weights(), split="validation") == 1
    assert [path.name for path in (tmp_path / "slices").iterdir()] == ["_a_b.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["slices"]


def test_truth_and_prediction_are_tinted_where_they_are():
    truth, found = (np.zeros((32, 32), np.int64) for _ in range(2))
    truth[:16], found[:, 16:] = 1, 2
    image, second, third = panels(draw_case(item(truth), found))
    assert not image.any()
    # pictures are stored column first, from the top: the first half of axis 0 is the left half
    assert (second[:, :128] == np.round(OPACITY * COLOURS[0])).all()
    assert not second[:, 128:].any()
    assert (third[128:] == np.round(OPACITY * COLOURS[1])).all()
    assert not third[:128].any()


def test_a_volume_is_cut_across_its_coarsest_axis_where_most_is_seen():
    truth = np.zeros((8, 16, 16), np.int64)
    truth[5, :4, 12:] = 1
    truth[2, 0, 0] = 1
    image = np.arange(8, dtype=np.float32)[:, None, None].repeat(16, 1).repeat(16, 2)[None]
    image[:, 5, :, :8] = 100.0
    first, second, _ = panels(
        draw_case(item(truth, image=image, spacing=(5.0, 1.0, 1.0)), np.zeros_like(truth))
    )
    assert first.shape == (SHORTEST, SHORTEST, 3)
    # volumes are stored from the bottom: low indices of the last axis are drawn below
    assert first[-1, 0, 0] == 255
    assert first[0, 0, 0] == 0
    tinted = (second != first).any(axis=-1)
    assert tinted[:64, :64].all()
    assert tinted.sum() == 64 * 64


def test_the_fullest_slice_is_found_and_the_middle_is_taken_where_there_is_none():
    truth = np.zeros((4, 5, 9), np.int64)
    assert fullest_slice(truth, 2) == 4
    truth[:, :, 7] = 3
    truth[0, 0, :] = 1
    assert fullest_slice(truth, 2) == 7
    assert fullest_slice(truth, 0) == 0


@pytest.mark.parametrize(
    ("shape", "spacing", "size"),
    [
        ((64, 64), (1.0, 1.0), (SHORTEST, SHORTEST)),
        ((64, 32), (1.0, 4.0), (SHORTEST // 2, SHORTEST)),
        ((3000, 1500), (0.1, 0.1), (LONGEST, LONGEST // 2)),
        ((400, 300), (2.0, 2.0), (400, 300)),
        ((1, 5000), (1.0, 1.0), (1, LONGEST)),
    ],
)
def test_panels_keep_proportions_and_bounds(shape, spacing, size):
    assert panel_size(shape, spacing) == size


def test_windows_keep_colours_and_survive_a_flat_image():
    colours = np.stack([np.full((4, 4), value, np.float64) for value in (0.0, 0.5, 1.0)])
    assert windowed(colours)[0, 0].tolist() == [0, 128, 255]
    assert not windowed(np.full((1, 4, 4), 7.0)).any()
    two = np.stack([np.linspace(0, 1, 16).reshape(4, 4), np.ones((4, 4))])
    shown = windowed(two)
    assert (shown[..., 0] == shown[..., 1]).all()
    assert (shown[..., 0] == shown[..., 2]).all()


def test_classes_beyond_the_palette_start_over():
    grey = np.full((1, 2, 3), 10, np.uint8)
    drawn = overlaid(grey, np.array([[1, 1 + len(COLOURS)]], np.int32))
    assert (drawn[0, 0] == drawn[0, 1]).all()
    assert (drawn[0, 0] != 10).any()


def test_a_restyled_picture_shares_one_scale_and_shows_the_change():
    plain = np.linspace(0, 100, 256).reshape(1, 16, 16)
    first, second, change = panels(draw_restyled(np.stack([plain, plain])))
    assert np.array_equal(first, second)
    assert not change.any()
    first, second, change = panels(draw_restyled(np.stack([plain, plain + 50])))
    low, high = limits_of(plain)
    assert second.mean() > first.mean() + 60
    assert (change == round(255 * 50 / (high - low))).all()
    assert first.shape == (SHORTEST, SHORTEST, 3)


def test_a_restyled_picture_keeps_colours_and_which_of_them_changed():
    pair = np.random.default_rng(0).random((2, 3, 8, 8))
    pair[1] = pair[0]
    pair[1, 2] += 0.5
    *_, change = panels(draw_restyled(pair))
    assert not change[..., :2].any()
    assert (change[..., 2] > 100).all()


def test_a_restyled_volume_is_cut_through_its_middle_across_the_coarsest_axis():
    volume = np.zeros((2, 1, 16, 6, 8))
    volume[:, 0, :, 3] = np.arange(16)[:, None]
    volume[1, 0, 0, 3] += 15.0
    first, _, change = panels(draw_restyled(volume, (1.0, 5.0, 1.0)))
    assert first.shape == (SHORTEST // 2, SHORTEST, 3)
    assert first[:, -1].mean() > 250
    assert change[:, 0].mean() > 200
    assert not change[:, SHORTEST // 2 :].any()
    with pytest.raises(ValueError, match="two or three axes"):
        draw_restyled(np.zeros((2, 5)))


def test_style_pictures_are_replaced_and_a_false_alias_writes_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "home" / "styles"
    pair = torch.rand(2, 1, 8, 8)
    samples = [("b", pair), ("../outside", pair), (".hidden", pair), ("", pair), ("c-1", pair)]
    assert save_styles(folder, iter(samples)) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["b.png", "c-1.png"]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert save_styles(folder, [("b", pair.flip(0)), ("c-1", pair)]) == 2
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after["c-1.png"] == before["c-1.png"]
    assert after["b.png"] != before["b.png"]
    assert save_styles(tmp_path / "none", iter(())) == 0
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr("client.slices.MOST_STYLES", 2)
    assert save_styles(tmp_path / "many", ((f"s{place}", pair) for place in range(9))) == 2
