"""Patients' names are planted all over the sites' data and errors; nothing the coordinator sees may hold one.

Seen by the coordinator: every byte of every answer, its events, checkpoints and models, its log, and the texts of the
exceptions raised there.
"""

import base64
import json
import logging
import shutil
import traceback
from pathlib import Path

import pytest

from client import site as site_module
from client.border import Border
from client.data.transforms import CaseLoader
from client.site_config import Privacy
from client.site_data import SiteData
from client.state import SiteStates
from client.trainer import Trainer
from common.config import RunConfig
from common.errors import WardroundError
from tests.harness import Federation, MemoryLink, table_config
from tests.mutations import edit
from tests.planted import DICOM, ERRORS, FILES, FOLDER, GROUP, NOTE, STRAY, TEXT, TOKENS, leaks, plant
from tests.planted_faults import TABLE_FAULTS, TABLE_HOLES, VOLUME_FAULTS, describe, rewrite, truncate

pytestmark = pytest.mark.slow

ALIASES = ("alpha", "beta")
SERVER_LOGS = ("wardround.server", "server", "flwr")


class Coordinator:
    """Runs a federation and gathers everything that the coordinator saw."""

    def __init__(self, root: Path, caplog):
        self.federation = Federation(root, ALIASES)
        self.caplog = caplog
        self.errors: list[str] = []

    @property
    def data(self) -> Path:
        return self.federation.root / "data"

    def run(self, config, *, link=None):
        with self.caplog.at_level(logging.DEBUG):
            try:
                return self.federation.run(config, link=link)
            except WardroundError as error:
                self.errors += [
                    str(error),
                    repr(error),
                    error.detail,
                    *traceback.format_exception_only(error),
                ]
                return None

    def seen(self) -> list[bytes | str | Path]:
        answers = [b"\n".join([name.encode(), data]) for *_, answer in self.federation.link.seen
                   for name, data in answer.items()]  # fmt: skip
        logged = [record.getMessage() + str(record.exc_text or "") for record in self.caplog.records
                  if record.name.startswith(SERVER_LOGS)]  # fmt: skip
        return [*answers, self.federation.root / "home-server", *logged, *self.errors]

    def leaks(self) -> list[str]:
        # the data's path, and the fixture's own folder above it, which carries a name too
        tokens = [*TOKENS, str(self.data), self.federation.root.name]
        return [leak for piece in self.seen() for leak in leaks(piece, tokens)]

    def failures(self):
        return [
            event
            for event in self.federation.events()
            if event["event"] in {"site.failed", "site.refused", "warning"}
        ]


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted") / "data"
    plant(root, ALIASES)
    return root


@pytest.fixture
def coordinator(tmp_path, volumes, caplog):
    """A federation over the planted volumes, each test with its own copy."""
    root = tmp_path / f"ward_{FOLDER}"
    shutil.copytree(volumes, root / "data")
    return Coordinator(root, caplog)


@pytest.fixture
def tables(tmp_path, caplog):
    """A federation over tables with a column of names and a description full of them."""
    coordinator = Coordinator(tmp_path / f"ward_{FOLDER}", caplog)
    for alias in ALIASES:
        folder = coordinator.data / alias
        rewrite(
            folder,
            lambda rows: [
                [*row, "patient_name" if not number else f"{STRAY} {number}"]
                for number, row in enumerate(rows)
            ],
        )
        describe(folder, name=NOTE, note=NOTE, description=TEXT, reference=FILES, release=GROUP)
        (folder / "table.csv").rename(folder / f"{FILES}.csv")
        describe(folder, table=f"{FILES}.csv")
    return coordinator


def volume_config(method="fedavg", **data):
    return RunConfig.from_mapping(
        {
            "method": method, "seed": 3,
            "data": {"channels": ["T1"], "labels": ["background", "lesion"], "patch": [8, 8, 8], "patches_per_case": 1,
                     "augment": False, **data},
            "model": {"width": 4, "levels": 2}, "train": {"batch_size": 2},
            "rounds": {"rounds": 1, "quorum": 0.5, "poll": 0.001, "retries": 1, "retry_wait": 0.001, "ready_timeout": 60.0,
                       "deadline": 60.0},
        }
    )  # fmt: skip


def short(method="fedavg", **params):
    config = table_config(method, rounds=1, **params)
    return config.model_copy(update={"rounds": config.rounds.model_copy(update={"retries": 1})})


# ---- the search itself -----------------------------------------------------------------------------------------------


def test_what_is_planted_can_be_found_where_it_is(volumes):
    found = leaks(volumes, TOKENS)
    assert {leak.split(" in ")[0] for leak in found} == set(TOKENS)


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize(
    "form",
    [
        str.encode, lambda text: text.upper().encode(), lambda text: text.lower().encode("utf-16"),
        lambda text: text.encode("utf-16-be"), lambda text: json.dumps(text).encode(), lambda text: text.encode().hex().encode(),
        lambda text: base64.b64encode(f"x{text}y".encode()), lambda text: base64.b64encode(f"xy{text}".encode()),
        lambda text: base64.urlsafe_b64encode(text.encode()), lambda text: repr(text).encode(),
        lambda text: "".join(f"%{byte:02X}" for byte in text.encode()).encode(), lambda text: text[::-1].encode(),
    ],
)  # fmt: skip
def test_a_token_is_found_in_every_simple_form(form, token):
    assert leaks(b"\x00\x01before " + form(token) + b" after\xff", TOKENS)
    if form(token).isascii() and token.isascii():
        assert leaks((b"before " + form(token) + b" after").decode("ascii"), [token])
    assert not leaks(b"\x00\x01before JANE DEER 1950 after\xff", TOKENS)


def test_a_leaking_site_is_found(coordinator, tmp_path):
    """A figure and a failure with a name in them: both look harmless to every check, and both are found."""

    def leaky(alias, round_, parts):
        if alias == "beta" and round_ == 1:
            return edit(parts, lambda header: header.seconds.__setitem__(f"scan {FILES}", 1.0))
        if alias == "beta" and round_ == 2:
            return edit(
                parts,
                lambda header: header.failure.MergeFrom(type(header.failure)(code="data", message=TEXT)),
            )
        return parts

    link = MemoryLink(coordinator.federation.open_sites(), tamper=leaky)
    coordinator.run(volume_config(), link=link)
    found = leaks(coordinator.federation.root / "home-server", TOKENS)
    assert any(leak.startswith(f"{FILES} in events.jsonl") for leak in found)
    assert any(leak.startswith(f"{DICOM} in events.jsonl") for leak in found)


# ---- good rounds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedavg", "ditto"])
def test_nothing_of_a_good_run_over_volumes_names_a_patient(coordinator, method):
    loop = coordinator.run(volume_config(method))
    assert loop is not None
    assert loop.done == 1
    assert len(loop.history[-1].cases) == 2
    assert len(coordinator.seen()) > 6
    assert (coordinator.federation.root / "home-server" / "models" / "global.safetensors").is_file()
    assert coordinator.leaks() == []


def test_nothing_of_a_good_run_over_tables_names_a_patient(tables):
    loop = tables.run(short())
    assert len(loop.history[-1].cases) == 2
    assert not tables.failures()
    assert tables.leaks() == []


def test_a_site_that_tells_counts_alone_tells_no_name(tables, monkeypatch):
    sites = tables.federation.open_sites()
    for site in sites.values():
        site.config = site.config.model_copy(update={"privacy": Privacy(summary="counts")})
    assert tables.run(short(), link=MemoryLink(sites)) is not None
    assert tables.leaks() == []


# ---- errors with names in their texts --------------------------------------------------------------------------------


PLACES = {
    "train": (Trainer, "fit"), "evaluate": (Trainer, "evaluate"), "check": (SiteData, "check"), "open": (SiteData, "open"),
    "save": (SiteStates, "write"), "read state": (SiteStates, "before"), "receive": (Border, "receive"),
    "release": (Border, "release"), "build": (site_module, "build_model"), "slices": (site_module, "save_slices"),
}  # fmt: skip


# every place with three kinds of exceptions, every kind in at least three places
PAIRS = [
    (place, list(ERRORS)[(3 * row + turn) % len(ERRORS)])
    for row, place in enumerate(PLACES)
    for turn in range(3)
]


@pytest.mark.parametrize(("place", "error"), PAIRS)
def test_no_text_of_an_exception_crosses_the_border(tables, monkeypatch, place, error):
    owner, name = PLACES[place]
    real, raised = getattr(owner, name), []

    def explode(*arguments, **options):
        mine = beta(arguments, sites) if owner is not site_module else True
        if not mine:
            return real(*arguments, **options)
        raised.append(1)
        raise ERRORS[error]()

    sites = tables.federation.open_sites()
    monkeypatch.setattr(owner, name, explode)
    tables.run(short(), link=MemoryLink(sites))
    assert raised
    assert tables.failures() or tables.errors
    assert tables.leaks() == []


def beta(arguments, sites):
    """Tell whether a call is one of beta's: the first argument is something that beta holds."""
    site = sites["beta"]
    session = site._session
    held = [site.border, site.data, *([session.trainer, session.states] if session else [])]
    return any(arguments[0] is item for item in held)


def test_no_text_of_an_exception_in_reading_a_volume_crosses_the_border(coordinator, monkeypatch):
    def explode(self, case, *, training):
        raise OSError(5, TEXT, str(case.image[0]))

    monkeypatch.setattr(CaseLoader, "load", explode)
    assert coordinator.run(volume_config()) is None
    assert coordinator.errors
    assert coordinator.leaks() == []


# ---- files that cannot be used ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", VOLUME_FAULTS)
def test_a_file_that_cannot_be_used_is_told_by_alias_alone(coordinator, spoil):
    spoil(coordinator.data / "beta")
    coordinator.run(volume_config())
    assert {event["site"] for event in coordinator.failures()} == {"beta"}
    assert coordinator.leaks() == []


def test_a_file_that_breaks_during_the_run_is_told_by_alias_alone(coordinator):
    def break_later(alias, round_, parts):
        if alias == "beta" and round_ == 0:
            truncate(coordinator.data / "beta")
        return parts

    link = MemoryLink(coordinator.federation.open_sites(), tamper=break_later)
    coordinator.run(volume_config(), link=link)
    assert {(event["site"], event["code"]) for event in coordinator.failures()} == {("beta", "data")}
    assert coordinator.leaks() == []


@pytest.mark.parametrize("spoil", TABLE_FAULTS.values(), ids=TABLE_FAULTS)
def test_a_table_that_cannot_be_used_is_told_by_alias_alone(tables, spoil):
    spoil(tables.data / "beta")
    tables.run(short())
    assert {event["site"] for event in tables.failures()} == {"beta"}
    assert tables.leaks() == []


@pytest.mark.parametrize("spoil", TABLE_HOLES.values(), ids=TABLE_HOLES)
def test_names_of_columns_and_keys_stay_at_the_site(tables, spoil):
    spoil(tables.data / "beta")
    tables.run(short())
    assert {event["site"] for event in tables.failures()} == {"beta"}
    assert tables.leaks() == []
