"""Tiny data folders in every format, with a patient's name planted wherever a real one could be."""

import json

import nibabel as nib
import nrrd
import numpy as np
from PIL import Image

PATIENT = "DOE_JANE_19610203"
AFFINE = np.array([[-1.5, 0, 0, 10], [0, -2, 0, 20], [0, 0, 3, 30], [0, 0, 0, 1.0]])
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def cube(seed, size=(10, 11, 12)):
    """An int16 volume and a mask with classes 0, 1, 2 in a corner that the seed moves."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 1000, size).astype(np.int16)
    label = np.zeros(size, np.uint8)
    start = int(rng.integers(1, 4))
    label[start : start + 4, 2:6, 2:5] = 1
    label[start : start + 2, 2:4, 2:4] = 2
    return image, label


def save(path, array, affine=AFFINE, **header):
    """Write a volume or picture in the format that the path's suffix names; a path without one is a DICOM series."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name
    if name.endswith((".nii", ".nii.gz")):
        nib.save(nib.Nifti1Image(array, affine), path)
    elif name.endswith(".nrrd"):
        lps = _LPS @ affine
        fields = {
            "space": "left-posterior-superior",
            "space directions": lps[:3, :3].T,
            "space origin": lps[:3, 3],
        }
        nrrd.write(str(path), array, {**fields, **header})
    elif name.endswith((".mha", ".mhd")):
        _save_meta(path, array, affine)
    elif name.endswith((".png", ".tiff", ".jpg", ".tif")):
        Image.fromarray(np.ascontiguousarray(array.swapaxes(0, 1))).save(path)
    else:
        save_series(path, array, affine, **header)
    return path


def _save_meta(path, array, affine):
    import itk

    image = itk.image_from_array(np.ascontiguousarray(array.T))
    lps = _LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing([float(v) for v in spacing])
    image.SetOrigin([float(v) for v in lps[:3, 3]])
    image.SetDirection(itk.matrix_from_array(lps[:3, :3] / spacing))
    itk.imwrite(image, str(path))


def save_series(folder, array, affine, *, leave_out=(), uid="1.2.3.4", name=PATIENT):
    """Write a DICOM series whose file order is not its spatial order, with a patient in name and headers."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    folder.mkdir(parents=True, exist_ok=True)
    lps = _LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    axes = lps[:3, :3] / spacing
    count = array.shape[2]
    for k in range(count):
        if k in leave_out:
            continue
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = f"{uid}.{k + 1}"
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        head = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        head.SOPClassUID, head.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        head.SeriesInstanceUID = head.StudyInstanceUID = uid
        head.PatientName, head.PatientID, head.Modality = name, name, "CT"
        head.Rows, head.Columns, head.InstanceNumber = array.shape[1], array.shape[0], count - k
        head.ImagePositionPatient = [float(v) for v in lps[:3, 3] + k * lps[:3, 2]]
        head.ImageOrientationPatient = [*map(float, axes[:, 0]), *map(float, axes[:, 1])]
        head.PixelSpacing = [float(spacing[1]), float(spacing[0])]
        head.SliceThickness = float(spacing[2])
        head.SamplesPerPixel, head.PhotometricInterpretation = 1, "MONOCHROME2"
        head.BitsAllocated, head.BitsStored, head.HighBit, head.PixelRepresentation = 16, 16, 15, 1
        head.RescaleSlope, head.RescaleIntercept = 1, -5
        head.PixelData = np.ascontiguousarray((array[:, :, k] + 5).T.astype("<i2")).tobytes()
        head.save_as(folder / f"{name}_{(k * 7) % 13:02d}_{k}.dcm", enforce_file_format=True)
    return folder


def describe(folder, **keys):
    """Write dataset.json: three classes and one channel, unless the keys say otherwise."""
    document = {
        "name": "tiny",
        "modality": {"0": "T1"},
        "labels": {"0": "background", "1": "tumour", "2": "core"},
        **keys,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(document))
    return folder


def segmentation_site(folder, cases=6, suffix=".nii.gz", size=(10, 11, 12), **keys):
    """Write a site of volumes named after a patient; returns the folder."""
    listed = []
    for index in range(cases):
        image, label = cube(index, size)
        names = f"imagesTr/{PATIENT}_{index}{suffix}", f"labelsTr/{PATIENT}_{index}.nii.gz"
        save(folder / names[0], image)
        save(folder / names[1], label)
        listed.append({"image": names[0], "label": names[1]})
    return describe(folder, **{"training": listed, **keys})


def picture_site(folder, cases=5, size=(40, 32), suffix=".png"):
    """Write a site of colour pictures with one-bit masks."""
    listed = []
    for index in range(cases):
        rng = np.random.default_rng(index)
        names = f"{PATIENT}_{index}{suffix}", f"{PATIENT}_{index}_mask.png"
        save(folder / names[0], rng.integers(0, 256, (*size, 3)).astype(np.uint8))
        mask = np.zeros(size, bool)
        mask[4:12, 6:9] = True
        (folder / names[1]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(mask.T)).save(folder / names[1])
        listed.append({"image": names[0], "label": names[1], "group": f"{PATIENT}_{index // 2}"})
    return describe(
        folder,
        modality={"0": "red", "1": "green", "2": "blue"},
        labels={"0": "background", "1": "vessel"},
        training=listed,
    )


def table_site(folder, rows, header="age,chol,target,split", **keys):
    """Write a table (rows of text) and its description."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.csv").write_text("\n".join([header, *rows]) + "\n")
    names = {
        "features": ["age", "chol"],
        "labels": {"0": "well", "1": "ill"},
        "split_column": "split",
        **keys,
    }
    return describe(folder, table="table.csv", modality={}, **names)
