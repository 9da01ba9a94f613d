"""A site's data, opened once and kept: decoded volumes stay in memory as long as the files are the same."""

from __future__ import annotations

from pathlib import Path

from client.data.check import SiteCheck, check_site
from client.data.datalist import Datalist, read_datalist
from client.data.dataset import SiteDataset
from common.config import DataConfig
from common.dataset_json import DATASET_FILE

Fingerprint = tuple[tuple[str, int, int], ...]


class SiteData:
    """The data folder of one site.

    Args:
        site: Its alias.
        folder: Folder with dataset.json.
        cache_bytes: Decoded volumes kept in memory at most.
    """

    def __init__(self, site: str, folder: Path, cache_bytes: int) -> None:
        self.site = site
        self.folder = folder
        self._cache_bytes = cache_bytes
        self._opened: tuple[Fingerprint, DataConfig, SiteDataset] | None = None
        self._checked: tuple[Fingerprint, DataConfig, SiteCheck] | None = None

    def check(self, config: DataConfig) -> SiteCheck:
        """Return the data check; made again when a file or the configuration changed.

        Raises:
            DataError: The folder cannot be read at all.
        """
        mark = self._fingerprint(read_datalist(self.folder, self.site))
        if self._checked is None or self._checked[:2] != (mark, config):
            self._checked = (mark, config, check_site(self.folder, self.site, config))
        return self._checked[2]

    def open(self, config: DataConfig) -> SiteDataset:
        """Return the data set; opened again when a file or the configuration changed.

        Raises:
            DataError: The folder cannot be used.
        """
        datalist = read_datalist(self.folder, self.site)
        mark = self._fingerprint(datalist)
        if self._opened is None or self._opened[:2] != (mark, config):
            self._opened = None  # the old volumes go before the new ones come
            self._opened = (mark, config, SiteDataset(datalist, config, cache_bytes=self._cache_bytes))
        return self._opened[2]

    def _fingerprint(self, datalist: Datalist) -> Fingerprint:
        files = {self.folder / DATASET_FILE}
        if datalist.table is not None:
            files.add(datalist.table.path)
        for cases in datalist.cases.values():
            for case in cases:
                files.update(case.image)
                if isinstance(case.label, Path):
                    files.add(case.label)
        return tuple((str(file), (found := file.stat()).st_size, found.st_mtime_ns) for file in sorted(files))
