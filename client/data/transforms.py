"""From a decoded case to what the network sees: the part that is always the same, and the part that is drawn.

MONAI's dictionary transforms do the work. The fixed part (orientation, spacing, normalisation) is what
evaluation sees, too: figures are computed in the network's grid. The drawn part (patches, flips, intensity)
is seeded from outside, call by call, and touches no global generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    NormalizeIntensityd,
    Orientationd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandRotate90d,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSpatialCropSamplesd,
    Resize,
    Spacingd,
    SpatialPad,
    Transform,
)
from torch import Tensor

from client.data.datalist import Case, Datalist
from client.data.formats import read_image
from client.data.inspection import class_indices, image_problems, label_problems, refuse
from common.config import DataConfig
from common.errors import ConfigError, DataError

IMAGE, LABEL = "image", "label"
_KEYS = (IMAGE, LABEL)
_AXES = (("L", "R"), ("P", "A"), ("I", "S"))
# Places that patches are centred on: so many of each kind are kept per case, instead of two full lists of
# voxels, which take eight bytes a voxel.
_PLACES = 1 << 13


@dataclass
class Item:
    """A case after the fixed part.

    Attributes:
        image: (C, *S), float32, or uint8 where the values are 0 to 255 and the division is put off.
        label: (1, *S) uint8 or int16 class numbers (segmentation), or a class.
        spacing: Millimetres by axis of this grid.
        inside: Flat places of labelled voxels that patches may be centred on (segmentation, for training).
        outside: The same for background.
    """

    image: Tensor
    label: Tensor | int
    spacing: tuple[float, ...]
    inside: Tensor | None = None
    outside: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Return the bytes that its tensors take."""
        parts = (self.image, self.label, self.inside, self.outside)
        return sum(part.numel() * part.element_size() for part in parts if isinstance(part, Tensor))


class CaseLoader:
    """Reads cases and applies the fixed part.

    Args:
        datalist: The site's cases.
        config: The run's data settings; must fit the datalist (`common.site_summary.require_fit`).

    Raises:
        ConfigError: Axis codes that are none.
    """

    def __init__(self, datalist: Datalist, config: DataConfig) -> None:
        self._datalist = datalist
        self._config = config
        self._fixed = fixed_part(config)

    def load(self, case: Case, *, training: bool) -> Item:
        """Decode, check and prepare one case.

        Args:
            case: A case of the datalist.
            training: Also pad to the patch and choose the places that patches are centred on.

        Raises:
            DataError: Unreadable, or one of the errors of `inspection`, naming site and case alias.
        """
        config, site = self._config, self._datalist.site
        channels = self._datalist.channels
        image = read_image(
            case.image, site=site, alias=case.alias, dims=config.spatial_dims, channels=len(channels)
        )
        refuse(image_problems(image, case.alias, channels, config), site, str(case.image[0]))
        fields = {IMAGE: MetaTensor(image.data.to(torch.float32), affine=torch.as_tensor(image.affine))}
        if not isinstance(case.label, int):
            path = case.label
            if path is None:
                raise DataError(
                    f"{site}, {case.alias}: the case has no label; give it one or unlist it.", site=site
                )
            mask = read_image(
                [path], site=site, alias=case.alias, dims=config.spatial_dims, channels=1, what=LABEL
            )
            refuse(label_problems(mask, image, case.alias, len(config.labels)), site, str(path))
            # the image's own geometry: headers rounded differently must not shift one against the other
            classes = class_indices(mask, len(config.labels)).to(torch.float32)
            fields[LABEL] = MetaTensor(classes, affine=torch.as_tensor(image.affine))
        done = self._fixed(fields)
        return self._item(done, case, training)

    def _item(self, fields: dict[str, MetaTensor], case: Case, training: bool) -> Item:
        config = self._config
        spacing = tuple(round(float(size), 6) for size in fields[IMAGE].pixdim[: config.spatial_dims])
        picture = fields[IMAGE].as_tensor()
        if LABEL not in fields:
            picture = fit_to_patch(picture, config.patch)
            return Item(_packed(picture, config), case.label if isinstance(case.label, int) else 0, spacing)
        label = fields[LABEL].as_tensor().to(torch.uint8 if len(config.labels) <= 256 else torch.int16)
        item = Item(_packed(picture, config), label, spacing)
        if not training:
            return item
        pad = SpatialPad(config.patch)
        item.image, padded = _plain(pad(item.image)).contiguous(), _plain(pad(label)).contiguous()
        item.label = padded
        item.inside, item.outside = places(padded, seed=case.index)
        return item


def fixed_part(config: DataConfig) -> Compose:
    """Return orientation, spacing and normalisation of a run (no random part).

    Raises:
        ConfigError: `orientation` is not three axis codes such as RAS.
    """
    steps: list[Transform] = []
    if config.orientation is not None and config.spatial_dims == 3:
        if len(config.orientation) != 3 or {*map(_axis, config.orientation)} != {0, 1, 2}:
            raise ConfigError(
                f"Bad value for 'data.orientation': expected three axis codes such as RAS, "
                f"got '{config.orientation}'."
            )
        steps.append(Orientationd(_KEYS, axcodes=config.orientation, labels=_AXES, allow_missing_keys=True))
    if config.spacing is not None:
        steps.append(
            Spacingd(
                _KEYS,
                pixdim=config.spacing,
                mode=("bilinear", "nearest"),
                padding_mode="border",
                dtype=np.float32,
                allow_missing_keys=True,
            )
        )
    if config.normalise in ("case", "case-nonzero"):
        steps.append(
            NormalizeIntensityd(IMAGE, nonzero=config.normalise == "case-nonzero", channel_wise=True)
        )
    return Compose(steps)


class RandomPart:
    """The drawn part: patches of a case, flips and intensity changes, as batches want them.

    One instance serves one thread at a time.

    Args:
        config: The run's data settings.
        augment: False leaves flips and intensity changes out, whatever the settings say.
    """

    def __init__(self, config: DataConfig, *, augment: bool = True) -> None:
        self._config = config
        count, patch = config.patches_per_case, config.patch
        ratio = config.foreground_ratio
        self._by_label = RandCropByPosNegLabeld(
            _KEYS,
            label_key=LABEL,
            spatial_size=patch,
            pos=ratio,
            neg=1.0 - ratio,
            num_samples=count,
            fg_indices_key="inside",
            bg_indices_key="outside",
        )
        self._anywhere = RandSpatialCropSamplesd(_KEYS, roi_size=patch, num_samples=count, random_size=False)
        self._change = Compose(_changes(config)) if config.augment and augment else None

    def draw(self, item: Item, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Return each patch: image float32 (C, *patch), label int64 (1, *patch) or (); fixed by the seed."""
        if isinstance(item.label, int):
            fields = [{IMAGE: item.image, LABEL: torch.tensor(item.label)}]
        else:
            fields = self._crop(item, seed)
        result = []
        for number, field in enumerate(fields):
            field[IMAGE] = as_float(field[IMAGE])
            if self._change is not None:
                self._change.set_random_state(seed=(seed + 1 + number) % 2**32)
                field = self._change(field)
            image, label = _plain(field[IMAGE]), _plain(field[LABEL])
            result.append((image.to(torch.float32).contiguous(), label.to(torch.int64).contiguous()))
        return result

    def _crop(self, item: Item, seed: int) -> list[dict[str, Tensor]]:
        fields: dict[Any, Any] = {IMAGE: item.image, LABEL: item.label}
        inside, outside = item.inside, item.outside
        if inside is not None and outside is not None and len(inside) and len(outside):
            self._by_label.set_random_state(seed=seed)
            fields |= {"inside": inside.numpy(), "outside": outside.numpy()}
            drawn = self._by_label(fields)
        else:  # an empty mask, or one that fills the volume: there is nothing to choose between
            self._anywhere.set_random_state(seed=seed)
            drawn = self._anywhere(fields)
        return [{key: _plain(patch[key]) for key in _KEYS} for patch in drawn]


def places(label: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return up to `_PLACES` flat places of labelled and of background voxels, drawn with a seed."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, label.numel()])))
    flat = label.reshape(-1)
    inside = torch.nonzero(flat).reshape(-1)
    # background is most of a volume: guess places and keep the hits, rather than list them all
    guesses = torch.from_numpy(np.unique(rng.integers(0, flat.numel(), 2 * _PLACES)))
    outside = guesses[flat[guesses] == 0]
    if not len(outside):
        outside = torch.nonzero(flat == 0).reshape(-1)
    return _some(inside, rng), _some(outside, rng)


def _some(found: Tensor, rng: np.random.Generator) -> Tensor:
    if len(found) > _PLACES:
        found = found[torch.from_numpy(np.sort(rng.choice(len(found), _PLACES, replace=False)))]
    return found.to(torch.int32) if len(found) and int(found[-1]) < 2**31 else found


def fit_to_patch(picture: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Bring a classified image to the patch: shrunk to fit with its proportions kept, then padded with 0."""
    size = picture.shape[1:]
    ratio = min(want / have for want, have in zip(patch, size, strict=True))
    if ratio < 1:
        target = [max(1, min(want, round(have * ratio))) for want, have in zip(patch, size, strict=True)]
        picture = _plain(Resize(target, mode="area")(picture))  # means over areas: no aliasing, no dark edge
    return _plain(SpatialPad(patch)(picture)).contiguous()


def as_float(image: Tensor) -> Tensor:
    """Return an item's image as float32; a packed one is divided by 255."""
    return image.to(torch.float32) / 255.0 if image.dtype == torch.uint8 else image


def _packed(image: Tensor, config: DataConfig) -> Tensor:
    """Keep 0-255 pictures as bytes (a quarter of the memory); divide others now."""
    if config.normalise != "range":
        return image.contiguous()
    return image.to(torch.uint8) if bool((image == image.round()).all()) else image / 255.0


def _changes(config: DataConfig) -> list[Transform]:
    classified = config.task == "classification"
    keys = (IMAGE,) if classified else _KEYS
    # what a picture shows may depend on what is up: a classified image is mirrored left to right alone
    axes = (0,) if classified else range(config.spatial_dims)
    steps: list[Transform] = [RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in axes]
    if not classified and config.spatial_dims == 2 and len(set(config.patch)) == 1:
        steps.append(RandRotate90d(keys, prob=0.5, spatial_axes=(0, 1)))
    steps.append(RandScaleIntensityd(IMAGE, factors=0.1, prob=0.5))
    steps.append(RandShiftIntensityd(IMAGE, offsets=0.1, prob=0.5))
    return steps


def _axis(code: str) -> int:
    return next((axis for axis, pair in enumerate(_AXES) if code in pair), -1)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor
