import numpy as np
import pytest
import torch
from PIL import Image

from client.data.datalist import Case, read_datalist
from client.data.dataset import SiteDataset
from client.data.formats import read_image
from client.data.transforms import CaseLoader, Item, RandomPart, fit_to_patch, places
from common.config import DataConfig
from common.errors import ConfigError, DataError, MismatchError
from tests.datafiles import AFFINE, PATIENT, cube, describe, picture_site, save, segmentation_site

CLASSES = ("background", "tumour", "core")


def config(**keys):
    return DataConfig(**{"labels": CLASSES, "patch": (8, 8, 8), **keys})


def pictures(**keys):
    chosen = {"channels": ("red", "green", "blue"), "labels": ("background", "vessel"), "spatial_dims": 2}
    return DataConfig(**{**chosen, "patch": (16, 16), "normalise": "range", **keys})


def open_site(folder, settings=None, **options):
    return SiteDataset(read_datalist(folder, "alpha"), settings or config(), **options)


def batches(data, **keys):
    return list(data.training_batches(**{"seed": 1, "epoch": 0, "batch_size": 4, **keys}))


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a[key], b[key]) for a, b in zip(left, right, strict=True) for key in ("image", "label")
    )


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    return segmentation_site(tmp_path_factory.mktemp("volumes"), cases=5)


# ---- formats


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ""])
@pytest.mark.parametrize("pose", ["straight", "turned"])
def test_every_volume_format_gives_the_same_voxels_and_geometry(tmp_path, suffix, pose):
    image, _ = cube(0)
    affine = AFFINE if pose == "straight" else AFFINE[:, [2, 0, 1, 3]]
    path = save(tmp_path / f"{PATIENT}{suffix}", image, affine)
    found = read_image([path], site="alpha", alias="case-0001", dims=3, channels=1)
    assert np.array_equal(found.data[0].numpy(), image)
    np.testing.assert_allclose(found.affine, affine, atol=1e-5)
    assert found.spacing == pytest.approx((1.5, 2, 3) if pose == "straight" else (3, 1.5, 2))


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha", ""])
def test_batches_do_not_depend_on_the_format(tmp_path, volumes, suffix):
    other = segmentation_site(tmp_path, cases=5, suffix=suffix)
    settings = config(orientation="RAS", spacing=(2, 2, 2))
    left, right = batches(open_site(volumes, settings)), batches(open_site(other, settings))
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a["image"], b["image"], atol=1e-4, rtol=0)
        assert torch.equal(a["label"], b["label"])


@pytest.mark.parametrize(
    ("suffix", "array"),
    [
        (".png", np.arange(35, dtype=np.uint8).reshape(5, 7)),
        (".tiff", (np.arange(35) * 900).astype(np.uint16).reshape(5, 7)),
        (".nii", np.arange(35, dtype=np.int16).reshape(5, 7, 1)),
        (".mha", np.arange(35, dtype=np.uint8).reshape(5, 7)),
    ],
)
def test_pictures_come_with_axes_x_y(tmp_path, suffix, array):
    affine = np.eye(4) if array.ndim == 3 else np.eye(3)
    if suffix == ".mha":
        import itk

        path = tmp_path / "a.mha"
        itk.imwrite(itk.image_from_array(np.ascontiguousarray(array.T)), str(path))
    else:
        path = save(tmp_path / f"a{suffix}", array, affine)
    found = read_image([path], site="alpha", alias="case-0001", dims=2, channels=1)
    assert np.array_equal(found.data[0].numpy(), array.reshape(5, 7))
    assert found.spacing == (1.0, 1.0)


def test_one_dicom_file_is_a_picture(tmp_path):
    image, _ = cube(0)
    series = save(tmp_path / "series", image[:, :, :1])
    path = next(series.iterdir()).rename(tmp_path / PATIENT)  # known by its content, not by a suffix
    found = read_image([path], site="alpha", alias="case-0001", dims=2, channels=1)
    assert np.array_equal(found.data[0].numpy(), image[:, :, 0])
    assert found.spacing == (1.5, 2.0)


def test_grey_saved_as_colour_counts_as_one_channel(tmp_path):
    grey = np.arange(35, dtype=np.uint8).reshape(5, 7)
    save(tmp_path / "grey.png", np.stack([grey] * 3, -1))
    assert read_image([tmp_path / "grey.png"], site="a", alias="c", dims=2, channels=1).data.shape == (
        1,
        5,
        7,
    )
    assert read_image([tmp_path / "grey.png"], site="a", alias="c", dims=2, channels=3).data.shape == (
        3,
        5,
        7,
    )


def test_palette_picture_is_classes_as_label_and_colours_as_image(tmp_path):
    picture = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "L").convert("P")
    picture.putdata([0, 1, 2, 1])
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "p.png")
    label = read_image([tmp_path / "p.png"], site="a", alias="c", dims=2, channels=1, what="label")
    image = read_image([tmp_path / "p.png"], site="a", alias="c", dims=2, channels=3)
    assert label.data[0].tolist() == [[0, 2], [1, 1]]
    assert image.data[:, 1, 0].tolist() == [255, 0, 0]


def test_one_file_per_channel(tmp_path):
    for index in range(3):
        image, label = cube(index)
        save(tmp_path / f"{index}_t1.nii", image)
        save(tmp_path / f"{index}_t2.nrrd", (2 * image).astype(np.int16))
        save(tmp_path / f"{index}_l.nii", label)
    cases = [{"image": [f"{i}_t1.nii", f"{i}_t2.nrrd"], "label": f"{i}_l.nii"} for i in range(3)]
    describe(tmp_path, modality={"0": "T1", "1": "T2"}, training=cases, split={"validation": 0, "test": 0})
    data = open_site(tmp_path, config(channels=("T1", "T2"), normalise="none", augment=False))
    batch = batches(data)[0]
    assert batch["image"].shape[1] == 2
    torch.testing.assert_close(batch["image"][:, 1], 2 * batch["image"][:, 0])
    save(tmp_path / "1_t2.nrrd", cube(0, (9, 9, 9))[0])
    with pytest.raises(
        DataError, match=r"alpha, case-0002: the image has file 2 on another grid than file 1"
    ):
        batches(data := open_site(tmp_path, config(channels=("T1", "T2"))))


# ---- batches


def test_shapes_types_and_counts(volumes):
    data = open_site(volumes)
    assert data.counts == {"training": 3, "validation": 1, "test": 1}
    found = batches(data, batch_size=4)  # three cases of two patches
    assert len(found) == data.steps_per_epoch(4) == 2
    assert [batch["image"].shape for batch in found] == [(4, 1, 8, 8, 8), (2, 1, 8, 8, 8)]
    assert [batch["label"].shape for batch in found] == [(4, 1, 8, 8, 8), (2, 1, 8, 8, 8)]
    for batch in found:
        assert type(batch["image"]) is torch.Tensor
        assert type(batch["label"]) is torch.Tensor
        assert (batch["image"].dtype, batch["label"].dtype) == (torch.float32, torch.int64)
        assert batch["image"].is_contiguous()


def test_batches_are_a_function_of_seed_and_epoch(volumes):
    first = open_site(volumes)
    expected = batches(first, seed=3, epoch=2)
    assert same(expected, batches(first, seed=3, epoch=2))  # from the cache
    assert same(expected, batches(open_site(volumes), seed=3, epoch=2))  # in a new process's place
    assert same(expected, batches(open_site(volumes, cache_bytes=0), seed=3, epoch=2))
    assert not same(expected, batches(first, seed=3, epoch=1))
    assert not same(expected, batches(first, seed=4, epoch=2))


def test_global_generators_are_neither_read_nor_moved(volumes):
    data = open_site(volumes)
    expected = batches(data)
    np.random.seed(99)
    torch.manual_seed(99)
    before = np.random.get_state()[1].tobytes(), torch.get_rng_state()
    assert same(expected, batches(data))
    assert np.random.get_state()[1].tobytes() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_cache_is_bounded_and_reported(volumes):
    full = open_site(volumes)
    batches(full)
    assert full.cached_cases == 3
    one = full.cached_bytes // 3
    part = open_site(volumes, cache_bytes=int(2.5 * one))
    batches(part)
    batches(part, epoch=1)
    assert part.cached_cases == 2
    assert 0 < part.cached_bytes <= 2.5 * one
    none = open_site(volumes, cache_bytes=0)
    batches(none)
    assert (none.cached_cases, none.cached_bytes) == (0, 0)


def test_an_epoch_that_is_left_early_leaves_nothing_running(volumes):
    import threading

    data = open_site(volumes, cache_bytes=0)
    running = data.training_batches(seed=0, epoch=0, batch_size=1)
    next(running)
    running.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_patches_are_centred_as_asked(volumes):
    share = {}
    for ratio in (0.0, 1.0):
        data = open_site(
            volumes, config(foreground_ratio=ratio, patch=(3, 3, 3), patches_per_case=20, augment=False)
        )
        centres = torch.cat([batch["label"][:, 0, 1, 1, 1] for batch in batches(data, batch_size=10)])
        share[ratio] = float((centres > 0).float().mean())
    assert share[1.0] == 1.0
    assert share[0.0] == 0.0


def test_patch_larger_than_the_volume_is_padded(volumes):
    batch = batches(open_site(volumes, config(patch=(16, 8, 16))))[0]
    assert batch["image"].shape[2:] == (16, 8, 16)
    assert float(batch["image"].abs().sum()) > 0


def test_empty_and_full_masks_are_drawn_from(tmp_path):
    folder = segmentation_site(tmp_path, cases=2, split={"validation": 0, "test": 0})
    save(folder / f"labelsTr/{PATIENT}_0.nii.gz", np.zeros((10, 11, 12), np.uint8))
    save(folder / f"labelsTr/{PATIENT}_1.nii.gz", np.ones((10, 11, 12), np.uint8))
    found = batches(open_site(folder))
    assert sorted(float(label.float().mean()) for label in found[0]["label"]) == [0, 0, 1, 1]


def test_places_are_bounded_and_true():
    label = torch.zeros((1, 64, 64, 64), dtype=torch.uint8)
    label[:, :40, :40, :40] = 1
    inside, outside = places(label, seed=1)
    flat = label.reshape(-1)
    assert len(inside) == len(outside) == 1 << 13
    assert bool((flat[inside.long()] == 1).all())
    assert bool((flat[outside.long()] == 0).all())
    assert int(outside.max()) > 0.99 * flat.numel()  # spread over the whole volume, not its first part


def test_changes_move_image_and_mask_together():
    settings = pictures(channels=("x",), patch=(12, 12), patches_per_case=1)
    mask = torch.zeros((1, 12, 12), dtype=torch.uint8)
    mask[:, 2:5, 3:8] = 1
    item = Item(255 * mask, mask, (1.0, 1.0), *places(mask, seed=0))
    seen = set()
    for seed in range(40):
        ((image, label),) = RandomPart(settings).draw(item, seed)
        assert torch.equal(image > 0.5, label > 0)
        seen.add(label.numpy().tobytes())
    assert len(seen) > 4  # flips and quarter turns


def test_without_augmentation_patches_are_cut_from_the_image(volumes):
    data = open_site(volumes, config(augment=False, normalise="none", patch=(4, 4, 4)))
    raw = {case.alias: cube(case.index)[0] for case in read_datalist(volumes, "alpha").cases["training"]}
    windows = {
        window.tobytes()
        for volume in raw.values()
        for window in np.lib.stride_tricks.sliding_window_view(volume.astype(np.float32), (4, 4, 4)).reshape(
            -1, 4, 4, 4
        )
    }
    assert all(image[0].numpy().tobytes() in windows for image in batches(data)[0]["image"])


# ---- the fixed part and evaluation


def test_evaluation_gives_whole_cases_in_the_networks_grid(volumes):
    plain = next(open_site(volumes).evaluation_cases("test"))
    assert (plain.cases, plain.spacing) == (1, (1.5, 2.0, 3.0))
    assert plain.image.shape == plain.label.shape == (1, 1, 10, 11, 12)
    assert plain.label.dtype == torch.int64
    turned = next(open_site(volumes, config(orientation="RAS", spacing=(3, 2, 3))).evaluation_cases("test"))
    assert turned.spacing == (3.0, 2.0, 3.0)
    assert turned.image.shape[2:] == (6, 11, 12)  # 13.5 mm from first to last voxel, at 3 mm
    assert set(turned.label.unique().tolist()) <= {0, 1, 2}


def test_orientation_turns_the_voxels(volumes):
    plain = next(open_site(volumes, config(normalise="none")).evaluation_cases("test"))
    turned = next(open_site(volumes, config(normalise="none", orientation="RAS")).evaluation_cases("test"))
    assert torch.equal(turned.image, plain.image.flip(2, 3))
    assert torch.equal(turned.label, plain.label.flip(2, 3))
    with pytest.raises(ConfigError, match="axis codes"):
        open_site(volumes, config(orientation="RAR"))


def test_normalisation(volumes):
    image = next(open_site(volumes).evaluation_cases("test")).image
    assert float(image.mean()) == pytest.approx(0, abs=1e-4)
    assert float(image.std()) == pytest.approx(1, abs=1e-2)


def test_pictures_are_packed_as_bytes_and_come_as_zero_to_one(tmp_path):
    folder = picture_site(tmp_path)
    data = open_site(folder, pictures())
    whole = next(data.evaluation_cases("test"))
    assert whole.image.shape == (1, 3, 40, 32)
    assert float(whole.image.max()) == 1.0
    assert float(whole.image.min()) == 0.0
    assert set(whole.label.unique().tolist()) == {0, 1}  # a one-bit mask, 0 and 255 on disk
    assert data.cached_bytes == data.cached_cases * 40 * 32 * 4  # three channels and a mask, a byte each


def test_classified_pictures_are_fitted_to_the_patch_and_batched(tmp_path):
    for index in range(10):
        rng = np.random.default_rng(index)
        save(tmp_path / f"{index}.png", rng.integers(0, 256, (30 + index, 20, 3)).astype(np.uint8))
    cases = [{"image": f"{i}.png", "label": i % 2} for i in range(10)]
    describe(
        tmp_path,
        modality={"0": "red", "1": "green", "2": "blue"},
        labels={"0": "no", "1": "yes"},
        training=cases,
    )
    data = open_site(tmp_path, pictures(task="classification", labels=("no", "yes"), patch=(24, 24)))
    batch = batches(data)[0]
    assert batch["image"].shape == (4, 3, 24, 24)
    assert batch["label"].shape == (4,)
    assert batch["label"].dtype == torch.int64
    assert data.steps_per_epoch(4) == len(batches(data))
    (held,) = data.evaluation_cases("test")
    assert held.cases == len(held.image) == len(held.label) == data.counts["test"]


def test_fit_to_patch_keeps_proportions():
    picture = torch.ones((1, 40, 20))
    fitted = fit_to_patch(picture, (20, 20))
    assert fitted.shape == (1, 20, 20)
    assert torch.allclose(fitted[:, :, 5:15], torch.ones(1, 20, 10), atol=1e-4)
    assert float(fitted[:, :, :5].abs().sum()) == 0
    assert torch.equal(fit_to_patch(torch.ones((1, 4, 4)), (4, 4)), torch.ones((1, 4, 4)))


# ---- what is refused


def broken(folder, what, edit, **settings):
    """Break case-0002, then read everything; the sentence names it by alias alone."""
    path = folder / {"image": "imagesTr", "label": "labelsTr"}[what] / f"{PATIENT}_1.nii.gz"
    edit(path)
    with pytest.raises(DataError) as caught:
        batches(open_site(folder, config(**settings)))
    assert str(caught.value).startswith("alpha, case-0002: ")
    assert PATIENT not in str(caught.value)
    assert PATIENT in caught.value.detail
    return str(caught.value)


IMAGE, LABEL = cube(1)
FAR = AFFINE + np.array([[0, 0, 0, 4.0], [0] * 4, [0] * 4, [0] * 4])


@pytest.mark.parametrize(
    ("what", "edit", "settings", "sentence"),
    [
        ("image", lambda p: p.write_bytes(p.read_bytes()[:300]), {}, "cannot be read as NIfTI"),
        ("image", lambda p: p.write_bytes(b""), {}, "cannot be read as NIfTI"),
        ("label", lambda p: p.write_bytes(b"\0" * 400), {}, "the label cannot be read"),
        ("image", lambda p: save(p, np.full((4, 4), 3, np.int16)), {}, "has 2 axes"),
        ("image", lambda p: save(p, np.stack([IMAGE] * 2, -1)), {}, "2 channels, expected 1"),
        ("image", lambda p: save(p, np.where(IMAGE > 900, np.nan, IMAGE)), {}, "values that are not finite"),
        ("image", lambda p: save(p, np.where(IMAGE > 900, np.inf, IMAGE)), {}, "values that are not finite"),
        ("image", lambda p: save(p, (IMAGE + 1j).astype(np.complex64)), {}, "complex"),
        ("image", lambda p: None, {"normalise": "range"}, "expects 0 to 255"),
        ("image", lambda p: save(p, IMAGE, AFFINE * [2, 2, 2, 1]), {"spacing": (1.5, 2, 3), "spacing_tolerance": 0.5},
         "the spacing is 3 x 4 x 6 mm; expected 1.5 x 2 x 3"),
        ("label", lambda p: save(p, LABEL[:-1]), {}, "9x11x12 voxels, the image 10x11x12"),
        ("label", lambda p: save(p, LABEL, FAR), {}, "2.7 voxels apart"),
        ("label", lambda p: save(p, LABEL * 3), {}, "2 label values lie outside 0 to 2"),
        ("label", lambda p: save(p, LABEL * np.float32(0.5)), {}, "between whole numbers"),
        ("label", lambda p: save(p, np.where(LABEL > 1, np.nan, LABEL)), {}, "the label has values that are not finite"),
        ("label", lambda p: save(p, np.stack([LABEL] * 2, -1)), {}, "2 channels, expected one"),
    ],
)  # fmt: skip
def test_bad_cases_are_refused_by_alias(tmp_path, what, edit, settings, sentence):
    folder = segmentation_site(tmp_path, cases=2, split={"validation": 0, "test": 0})
    if "normalise" in settings:
        save(folder / f"imagesTr/{PATIENT}_0.nii.gz", np.clip(cube(0)[0], 0, 255))
    assert sentence in broken(folder, what, edit, **settings)


@pytest.mark.parametrize(
    ("suffix", "edit", "sentence"),
    [
        (".nrrd", lambda p: save(p, IMAGE, space="left-anterior-superior"), "NRRD space"),
        (".nrrd", lambda p: p.write_text("nothing"), "cannot be read as NRRD"),
        (".mha", lambda p: p.write_text("nothing"), "cannot be read as MetaImage"),
        ("", lambda p: [f.unlink() for f in p.iterdir()], "without a DICOM image"),
        ("", lambda p: save(p, IMAGE[:, :, :4], uid="9.9", name="OTHER"), "more than one DICOM series"),
        ("", lambda p: [f.unlink() for f in p.glob("*_5.dcm")], "1 gaps: slices are missing"),
        ("", lambda p: save(p, IMAGE, name="AGAIN"), "several slices at one position"),
        (".foo", lambda p: p.write_text("x"), "unknown format"),
    ],
)
def test_bad_files_of_other_formats(tmp_path, suffix, edit, sentence):
    path = tmp_path / f"{PATIENT}{suffix}"
    if suffix != ".foo":
        save(path, IMAGE)
    edit(path)
    with pytest.raises(DataError) as caught:
        read_image([path], site="alpha", alias="case-0001", dims=3, channels=1)
    assert sentence in str(caught.value)
    assert PATIENT not in str(caught.value)
    assert PATIENT in caught.value.detail


def test_pages_are_refused(tmp_path):
    page = Image.fromarray(np.zeros((4, 4), np.uint8))
    page.save(tmp_path / "a.tif", save_all=True, append_images=[page])
    with pytest.raises(DataError, match="holds 2 pages"):
        read_image([tmp_path / "a.tif"], site="alpha", alias="case-0001", dims=2, channels=1)


def test_mask_header_that_is_rounded_is_no_fault(tmp_path):
    folder = segmentation_site(tmp_path, cases=1)
    save(folder / f"labelsTr/{PATIENT}_0.nii.gz", cube(0)[1], AFFINE + 1e-3)
    settings = config(orientation="RAS", spacing=(1, 1, 1), patch=(20, 20, 20))
    assert batches(open_site(folder, settings))[0]["label"].max() == 2


def test_a_case_without_a_label_is_refused(volumes):
    datalist = read_datalist(volumes, "alpha")
    case = datalist.cases["training"][0]
    with pytest.raises(DataError, match="has no label"):
        CaseLoader(datalist, config()).load(Case(case.alias, case.image, None, ""), training=True)


def test_a_site_that_does_not_fit_is_refused_before_anything_is_read(volumes):
    with pytest.raises(MismatchError, match=r"labels: expected \(background, foreground\), got") as caught:
        open_site(volumes, config(labels=("background", "foreground"), channels=("T1", "T2")))
    assert "channels: expected (T1, T2), got (T1)" in str(caught.value)
    with pytest.raises(DataError, match=r"unknown split 'tests'.*'test'"):
        next(open_site(volumes).evaluation_cases("tests"))
