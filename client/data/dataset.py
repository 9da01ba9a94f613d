"""What the trainer draws on: a site's training batches and evaluation cases.

Every batch is a function of (seed, epoch) and the data: the order, the patches and the changes are the same
on a second call and after a restart. Decoded cases are kept in memory up to a limit, first come first kept,
because an epoch visits every case once and a least-recently-used cache would then never hit; the others are
decoded again, one ahead of the training.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from client.data.datalist import Case, Datalist
from client.data.tabular import fit_standardiser, read_table
from client.data.transforms import CaseLoader, Item, RandomPart, as_float
from common.config import DataConfig
from common.dataset_json import SPLITS
from common.errors import DataError, nearest
from common.site_summary import require_fit

Batch = dict[str, Tensor]
_ROWS_PER_BATCH = 1024
_PICTURES_PER_BATCH = 64
_BATCH_VALUES = 1 << 24  # 64 MB of float32


@dataclass
class EvalCase:
    """One piece of an evaluation: a whole volume or picture, or many classified images or rows at a time.

    Attributes:
        alias: The first case's alias.
        image: float32 (N, C, *S), or (N, F) for tables.
        label: int64 (N, 1, *S), or (N,).
        spacing: Millimetres by axis of this grid; () for tables.
        cases: N.
    """

    alias: str
    image: Tensor
    label: Tensor
    spacing: tuple[float, ...]
    cases: int


class SiteDataset:
    """A site's cases as a run wants them.

    Args:
        datalist: The site's cases.
        config: The run's data settings.
        cache_bytes: Memory that decoded cases may take.

    Attributes:
        site: The site's alias.
        counts: Labelled cases by split.
        cached_bytes: Memory that decoded cases take now.

    Raises:
        MismatchError: The site does not fit the run (task, axes, channels, labels, no training case).
        DataError: A table that cannot be read.
    """

    def __init__(self, datalist: Datalist, config: DataConfig, *, cache_bytes: int = 2 << 30) -> None:
        require_fit(datalist.outline(), config)
        self.site = datalist.site
        self.counts = datalist.counts
        self._datalist = datalist
        self._config = config
        self._cache_bytes = cache_bytes
        self._cached: dict[tuple[int, bool], Item] = {}
        self.cached_bytes = 0
        self._lock = threading.Lock()
        self._rows: Tensor | None = None
        self._loader: CaseLoader | None = None
        if datalist.table is not None:
            self._rows = _standard_rows(datalist, config)
        else:
            self._loader = CaseLoader(datalist, config)

    @property
    def cached_cases(self) -> int:
        """Return how many decoded cases are in memory."""
        return len(self._cached)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return how many batches `training_batches` yields."""
        return -(-self.counts["training"] * self._visits // batch_size)

    def training_batches(
        self, *, seed: int, epoch: int, batch_size: int, augment: bool = True
    ) -> Iterator[Batch]:
        """Yield an epoch's batches; the last one may be smaller.

        Args:
            seed: Of the run (or of site and round: whatever the trainer derives).
            epoch: Number of the epoch; another one draws another order and other patches.
            batch_size: Patches, images or rows a batch.
            augment: False leaves flips and intensity changes out.

        Yields:
            "image" float32 (B, C, *patch) or (B, F); "label" int64 (B, 1, *patch) for segmentation, else
            (B,).

        Raises:
            DataError: A case that cannot be used, by alias.
        """
        cases = self._datalist.cases["training"]
        order = _generator(seed, epoch, 0).permutation(len(cases))
        if self._rows is not None:
            yield from self._row_batches([cases[place] for place in order], batch_size)
            return
        random = RandomPart(self._config, augment=augment)
        waiting: list[tuple[Tensor, Tensor]] = []
        for case, item in self._ahead([cases[place] for place in order], training=True):
            waiting += random.draw(item, int(_generator(seed, epoch, 1 + case.index).integers(2**32)))
            while len(waiting) >= batch_size:
                yield _stacked(waiting[:batch_size])
                del waiting[:batch_size]
        if waiting:
            yield _stacked(waiting)

    def evaluation_cases(self, split: str) -> Iterator[EvalCase]:
        """Yield a split's cases in the list's order, without any random part, in the network's grid.

        Raises:
            DataError: Unknown split, or a case that cannot be used, by alias.
        """
        if split not in SPLITS:
            raise DataError(f"{self.site}: unknown split '{split}'. {nearest(split, SPLITS)}", site=self.site)
        cases = self._datalist.cases[split]
        if self._rows is not None:
            for start in range(0, len(cases), _ROWS_PER_BATCH):
                part = cases[start : start + _ROWS_PER_BATCH]
                batch = self._row_batch(part)
                yield EvalCase(part[0].alias, batch["image"], batch["label"], (), len(part))
        elif self._config.task == "classification":
            yield from self._pictures(cases)
        else:
            for case, item in self._ahead(cases, training=False):
                label = item.label if isinstance(item.label, Tensor) else torch.tensor([item.label])
                image = as_float(item.image).unsqueeze(0)
                yield EvalCase(case.alias, image, label.to(torch.int64).unsqueeze(0), item.spacing, 1)

    @property
    def _visits(self) -> int:
        return self._config.patches_per_case if self._config.task == "segmentation" else 1

    def _pictures(self, cases: Sequence[Case]) -> Iterator[EvalCase]:
        values = len(self._config.channels) * int(np.prod(self._config.patch))
        most = max(1, min(_PICTURES_PER_BATCH, _BATCH_VALUES // values))
        held: list[tuple[Case, Item]] = []
        for pair in self._ahead(cases, training=False):
            held.append(pair)
            if len(held) == most or pair[0] is cases[-1]:
                image = torch.stack([as_float(item.image) for _, item in held])
                label = torch.tensor([item.label for _, item in held], dtype=torch.int64)
                yield EvalCase(held[0][0].alias, image, label, held[0][1].spacing, len(held))
                held = []

    def _ahead(self, cases: Sequence[Case], *, training: bool) -> Iterator[tuple[Case, Item]]:
        """Yield each case's item, decoding the next one in a thread while the caller works on this one."""
        with ThreadPoolExecutor(1, thread_name_prefix="decode") as pool:
            following: Future[Item] | None = None
            try:
                for number, case in enumerate(cases):
                    item = following.result() if following is not None else self._item(case, training)
                    following = None
                    if number + 1 < len(cases):
                        following = pool.submit(self._item, cases[number + 1], training)
                    yield case, item
            finally:
                if following is not None:
                    following.cancel()

    def _item(self, case: Case, training: bool) -> Item:
        # Classified images are prepared the same way for both uses and are kept once.
        key = (case.index, training and self._config.task == "segmentation")
        item = self._cached.get(key)
        if item is None:
            if self._loader is None:
                raise DataError(
                    f"{self.site}: a table has no images; this is an error of the program.", site=self.site
                )
            item = self._loader.load(case, training=training)
            with self._lock:  # an evaluation may run while an epoch is halfway through
                if key not in self._cached and self.cached_bytes + item.nbytes <= self._cache_bytes:
                    self._cached[key] = item
                    self.cached_bytes += item.nbytes
        return item

    def _row_batches(self, cases: Sequence[Case], batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(cases), batch_size):
            yield self._row_batch(cases[start : start + batch_size])

    def _row_batch(self, cases: Sequence[Case]) -> Batch:
        if self._rows is None:
            raise DataError(
                f"{self.site}: images have no rows; this is an error of the program.", site=self.site
            )
        image = self._rows[torch.tensor([case.index for case in cases])]
        return {"image": image, "label": torch.tensor([case.label for case in cases], dtype=torch.int64)}


def _standard_rows(datalist: Datalist, config: DataConfig) -> Tensor:
    if datalist.table is None:
        raise DataError(
            f"{datalist.site}: the site has no table; this is an error of the program.", site=datalist.site
        )
    values = read_table(datalist.table, datalist.site).values
    training = values[[case.index for case in datalist.cases["training"]]]
    scale = fit_standardiser(training, missing=config.missing, standardise=config.normalise != "none")
    return torch.from_numpy(scale.apply(values))


def _generator(seed: int, epoch: int, part: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, part])))


def _stacked(pairs: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    return {
        "image": torch.stack([image for image, _ in pairs]),
        "label": torch.stack([label for _, label in pairs]),
    }
