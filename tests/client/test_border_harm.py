"""The border on a full volume and with failures, and the site behind it."""

import errno

import pytest

from client.border import Border
from client.ledger import read, verify
from client.site import Site
from client.site_config import SiteConfig
from client.worker import failure
from common.errors import DataError, LedgerError, MismatchError, PayloadError, StorageError
from common.events import EventLog
from common.site_summary import SiteSummary, require_fit
from common.wire import CLOSING, HELLO, ROUND, Envelope, decode, encode
from tests.client.borders import SECRET, Borders, answer, entries, norm64, question, release, sha
from tests.client.ledgers import full_disk
from tests.harness import Federation, MemoryLink, table_config, versions_for, write_table_site

pytestmark = pytest.mark.slow


@pytest.fixture
def make(tmp_path):
    borders = Borders(tmp_path)
    yield borders
    borders.close()


# ---- what cannot be noted --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 100])
def test_what_cannot_be_noted_does_not_leave(make, monkeypatch, after):
    border = make()
    release(border, answer())
    head, data = border.ledger.head, border.ledger.path.read_bytes()
    with monkeypatch.context() as patch:
        full_disk(patch, errno.ENOSPC, after)
        with pytest.raises(
            StorageError, match=r"alpha: the ledger cannot be written \(no space is left"
        ) as caught:
            release(border, answer(round_=2))
    assert SECRET not in str(caught.value)
    assert border.ledger.head == head
    assert border.ledger.path.read_bytes() == data
    assert border.ledger.bytes_in("run-1", 2, "out") == 0
    got = decode(release(border, answer(round_=2)))  # there is space again
    assert verify(border.ledger.path, got.ledger).head == got.ledger


def test_what_cannot_be_noted_is_not_taken_in(make, monkeypatch):
    border = make()
    with monkeypatch.context() as patch:
        full_disk(patch, errno.ENOSPC, 0)
        with pytest.raises(StorageError):
            border.receive(question())
        with pytest.raises(StorageError):
            border.receive({})
    assert entries(border) == []
    border.receive(question())


def test_a_refusal_that_cannot_be_noted_still_keeps_the_answer_in(make, monkeypatch):
    border = make({"kinds": ["control"]})
    with monkeypatch.context() as patch:
        full_disk(patch, errno.ENOSPC, 0)
        with pytest.raises(StorageError):
            release(border, answer())
    assert entries(border) == []


def test_a_ledger_that_another_program_changed_lets_nothing_out(make):
    border = make()
    release(border, answer())
    with border.ledger.path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(LedgerError, match="another program changed it"):
        release(border, answer(round_=2))


def test_one_site_has_one_border(make, tmp_path):
    border = make()
    with pytest.raises(LedgerError, match="another worker writes this ledger"):
        Border(
            SiteConfig.model_validate(
                {"alias": "alpha", "data": "/n", "socket": "/n", "home": tmp_path / SECRET}
            )
        )
    border.close()
    make()


# ---- failures --------------------------------------------------------------------------------------------------------


def test_a_failure_is_noted_with_its_code_and_sentence(make):
    border = make()
    parts = failure(DataError("alpha: case 3 has no label."), "alpha")
    border.failed("run-1", 2, ROUND, parts)
    [entry] = entries(border)
    assert (entry.part, entry.kind, entry.direction, entry.decision) == (
        "failure",
        "failure",
        "out",
        "released",
    )
    assert entry.reason == "data: alpha: case 3 has no label."
    assert (entry.run, entry.round, entry.phase) == ("run-1", 2, "round")
    assert (entry.bytes, entry.sha256) == (len(parts["head"]), sha(parts["head"]))


def test_a_foreign_error_is_noted_without_its_text(make):
    border = make()
    border.failed("run-1", 2, CLOSING, failure(ValueError(f"/data/{SECRET}"), "alpha"))
    [entry] = entries(border)
    assert entry.reason.startswith("internal: unexpected ValueError")
    assert SECRET not in border.ledger.path.read_text()


@pytest.mark.parametrize("phase", [HELLO, ROUND, CLOSING, 0, 99])
def test_a_failure_of_any_phase_is_noted(make, phase):
    border = make()
    border.failed("run-1", 0, phase, failure(DataError("x"), "alpha"))
    assert len(entries(border)) == 1


def test_a_failure_that_cannot_be_noted_is_no_further_error(make, monkeypatch):
    border = make()
    parts = failure(StorageError("alpha: no space"), "alpha")
    with monkeypatch.context() as patch:
        full_disk(patch, errno.ENOSPC, 0)
        border.failed("run-1", 1, ROUND, parts)
    assert entries(border) == []
    with border.ledger.path.open("ab") as file:
        file.write(b"x")
    border.failed("run-1", 1, ROUND, parts)
    border.close()
    border.failed("run-1", 1, ROUND, parts)


# ---- the site behind it ----------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path):
    opened = []

    def open_site(**sections):
        data = tmp_path / "data"
        if not data.exists():
            write_table_site(data, seed=1)
        values = {"alias": "alpha", "data": data, "socket": "/none", "home": tmp_path / "home"}
        config = SiteConfig.model_validate(values | {"compute": {"device": "cpu"}} | sections)
        opened.append(Site(config, EventLog(tmp_path / "events.jsonl", "worker", site="alpha")))
        return opened[-1]

    yield open_site
    for each in opened:
        each.close()


def hello(config, run="run-1"):
    return encode(Envelope(run, 0, HELLO, "alpha", config=config.to_json(), versions=versions_for(config)))


def test_a_site_that_tells_counts_only_still_fits_the_run(site):
    config = table_config()
    got = decode(site(privacy={"summary": "counts"}).handle(hello(config), lambda: None))
    summary = SiteSummary.model_validate_json(got.summary)
    require_fit(summary, config.data)
    assert summary.cases["training"] == got.cases > 0
    defaults = SiteSummary(site="alpha", task="tabular", spatial_dims=0, channels=(), labels=(), cases={})
    hidden = [
        "spacing_min",
        "spacing_max",
        "size_min",
        "size_max",
        "orientations",
        "intensity",
        "class_share",
    ]
    for name in [*hidden, "empty_classes", "missing_share"]:
        assert getattr(summary, name) == getattr(defaults, name)


def test_a_site_that_tells_all_tells_more_than_counts(site):
    config = table_config()
    summary = SiteSummary.model_validate_json(decode(site().handle(hello(config), lambda: None)).summary)
    assert summary != summary.counts_only()
    require_fit(summary, config.data)


def test_counts_alone_never_make_a_site_that_does_not_fit_pass():
    config = table_config().data
    summary = SiteSummary(
        site="alpha",
        task="tabular",
        spatial_dims=0,
        channels=("x",),
        labels=config.labels,
        cases={"training": 3},
    )
    with pytest.raises(MismatchError, match="channels"):
        require_fit(summary.counts_only(), config)


def test_a_federation_of_reserved_hospitals_runs_to_its_end(tmp_path):
    federation = Federation(tmp_path)
    sites = federation.open_sites()
    private = {"metrics": False, "summary": "counts", "clip_norm": 0.05}
    for each in sites.values():
        each.config = SiteConfig.model_validate(each.config.model_dump() | {"privacy": private})
        each.border.privacy = each.config.privacy
    link = MemoryLink(sites)
    federation.run(table_config(rounds=2), link=link)
    ends = [event for event in federation.events() if event["event"] == "round.end"]
    assert [(end["round"], end.get("closing", False)) for end in ends] == [(1, False), (2, False), (3, True)]
    assert all(sorted(end["sites"]) == ["alpha", "beta", "gamma"] and not end["missing"] for end in ends)
    assert not [event for event in federation.events() if event["event"] == "metric"]
    updates = 0
    for alias, _, asked, replied in link.seen:
        got = decode(replied)
        assert got.failure is None
        assert got.metrics == []
        if "p.model" in replied:
            sent = decode(asked).payloads["model"].tensors
            assert norm64(got.payloads["model"].tensors, sent) <= 0.05 * (1 + 1e-5)
            updates += 1
        verify(sites[alias].border.ledger.path, got.ledger)
    assert updates == 6


def test_the_failure_after_a_message_that_cannot_be_read_is_not_booked_on_the_round_before(site):
    one = site()
    one.handle(hello(table_config(), run="before"), lambda: None)
    with pytest.raises(PayloadError) as caught:
        one.handle({"head": b"\xff"}, lambda: None)
    one.failed(failure(caught.value, "alpha"))
    last = list(read(one.border.ledger.path))[-1]
    assert last.part == "failure"
    assert last.run != "before"
