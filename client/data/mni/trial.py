"""Writing the default data: hospitals, each with its own scanner and its own simulated patients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from client.data.importers.layout import (
    About,
    Progress,
    SiteFolder,
    new_root,
    no_progress,
    split_cases,
    write_nifti,
)
from client.data.importers.partition import numbered_aliases
from client.data.mni.anatomy import LABELS, draw_subject, grid_affine, grid_shape, load_template
from client.data.mni.scanners import scan, scanner
from common.dataset_json import SPLITS
from common.errors import ConfigError
from common.federation import Federation, write_federation

NOTE = (
    "Simulated hospitals on real anatomy: every subject is the MNI152 average brain (skull-stripped), deformed at "
    "random, and the scanners are simulated. No patient is in it. Figures show how software and methods behave under "
    "differing scanners, not how they do on patients."
)
MAX_SITES = 99
VOXEL_RANGE = (1.0, 12.0)


def write_mni_trial(
    out: Path,
    *,
    sites: int = 3,
    subjects: int = 10,
    seed: int = 0,
    voxel_mm: float = 4.0,
    progress: Progress | None = None,
    force: bool = False,
) -> None:
    """Write simulated hospitals on the MNI152 brain: T1 volumes and labels for CSF, grey and white matter.

    The first three hospitals have scanners fixed by name, the others drawn from the seed. A subject depends on seed,
    hospital and its number alone, so more sites or subjects leave the others as they are. Same arguments, same bytes.

    Args:
        out: Data root to write: absent or empty.
        sites: Hospitals, 1 to 99.
        subjects: Subjects per hospital, at least 3; split 60/20/20.
        seed: Every random choice derives from it.
        voxel_mm: Edge of a voxel, 1 to 12; 4 gives 48x56x48 voxels a volume.
        progress: Called once per subject.
        force: Replace `out` if wardround wrote it.

    Raises:
        ConfigError: An argument out of its range.
        DataError: `out` is not empty or cannot be written.
    """
    _check(sites, subjects, seed, voxel_mm)
    report = progress or no_progress
    with new_root(out, "default", force=force) as root:
        template = load_template(voxel_mm)
        affine = grid_affine(voxel_mm)
        for index, alias in enumerate(numbered_aliases(sites, "hospital")):
            machine = scanner(index, seed)
            folder = SiteFolder(root, alias, _about(machine.title))
            splits = split_cases([str(n) for n in range(subjects)], [0] * subjects, seed=seed, alias=alias)
            for done, number in enumerate(sorted(range(subjects), key=lambda n: SPLITS.index(splits[n])), 1):
                rng = np.random.default_rng(np.random.SeedSequence([seed, index, number]))
                person = draw_subject(template, voxel_mm, rng, atrophy=machine.atrophy)
                image, label, place = scan(person, machine, affine, rng)
                (image_path,), label_path = folder.add(splits[number], [".nii.gz"], ".nii.gz")
                write_nifti(image_path, image, place)
                if label_path is not None:
                    write_nifti(label_path, label, place)
                report("subjects", index * subjects + done, sites * subjects)
            folder.finish()
        write_federation(root, _federation(voxel_mm, sites))


def _check(sites: int, subjects: int, seed: int, voxel_mm: float) -> None:
    wrong = None
    if not 1 <= sites <= MAX_SITES:
        wrong = f"sites must be 1 to {MAX_SITES}, got {sites}"
    elif subjects < len(SPLITS):
        wrong = f"subjects must be at least {len(SPLITS)} (training, validation and test), got {subjects}"
    elif not 0 <= seed < 2**32:
        wrong = f"seed must be 0 to {2**32 - 1}, got {seed}"
    elif not VOXEL_RANGE[0] <= voxel_mm <= VOXEL_RANGE[1]:
        wrong = f"voxel_mm must be {VOXEL_RANGE[0]:g} to {VOXEL_RANGE[1]:g}, got {voxel_mm:g}"
    if wrong:
        raise ConfigError(f"The default data cannot be made: {wrong}.")


def _about(title: str) -> About:
    return About(
        name="mni152",
        description="Simulated T1 of deformed MNI152 brains, with CSF, grey and white matter.",
        channels=("T1",),
        labels=LABELS,
        size="3D",
        task="segmentation",
        reference="MNI ICBM152 2009a nonlinear symmetric template (Fonov et al. 2011), as shipped with nilearn",
        licence="template: copyright McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill University",
        note=f"simulated: {title}",
    )


def _federation(voxel_mm: float, sites: int) -> Federation:
    edge = 32 if min(grid_shape(voxel_mm)) >= 32 else 16
    settings: dict[str, Any] = {
        "data": {
            "task": "segmentation",
            "spatial_dims": 3,
            "channels": ["T1"],
            "labels": list(LABELS),
            # thick slices and flipped axes are brought to one grid, in which the figures are computed
            "spacing": [voxel_mm] * 3,
            "orientation": "RAS",
            "patch": [edge] * 3,
            "patches_per_case": 4,
            "foreground_ratio": 0.8,
            "normalise": "case",
            "augment": False,  # the subjects vary by construction; flips cost 3 Dice points in ten rounds
        },
        "model": {"width": 16, "levels": 3},
        "train": {"local_epochs": 4, "batch_size": 2, "optimizer": "adam", "lr": 0.005},
        "rounds": {"rounds": 8},
    }
    title = f"{sites} simulated hospitals: brain tissues on the MNI152 template, {voxel_mm:g} mm"
    return Federation("mni152", title, NOTE, settings)
