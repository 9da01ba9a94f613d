"""Patient names planted in every corner of the hospitals' data: none may be found in what the coordinator has, after a real trial."""

import pytest

from ops.options import Options
from ops.trial import run_trial
from tests.planted import leaks, plant

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(280)]
SITES = ("oak", "beech")
OF_A_SITE = ("logs/worker-", "logs/relay-", "logs/supernode-", "events-oak", "events-beech", "sites/", "pki/")


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted")
    tokens = plant(root / "data", SITES)
    out = root / "run"
    options = Options("ditto", str(root / "data"), rounds=1, out=out, settings=("width=4", "levels=2"))
    return run_trial(options), out, tokens


def test_nothing_that_was_planted_reaches_the_coordinator(trial):
    code, out, tokens = trial
    assert code == 0
    seen = [path for path in sorted(out.rglob("*")) if path.is_file()]
    coordinator = [path for path in seen if not str(path.relative_to(out)).startswith(OF_A_SITE)]
    names = {str(path.relative_to(out)) for path in coordinator}
    assert {"events.jsonl", "report.html", "config.json", "logs/superlink.log", "logs/serverapp.log"} <= names
    assert any(name.startswith("checkpoints/round-") for name in names)
    found = {str(path.relative_to(out)): leaks(path.read_bytes(), tokens) for path in coordinator}
    assert not {name: words for name, words in found.items() if words}


def test_the_ledger_of_each_site_is_whole_and_its_head_is_what_the_coordinator_noted(trial):
    from client.ledger import verify
    from common.events import read_events

    _, out, _ = trial
    heads = {}
    for event in read_events(out / "events.jsonl"):
        if event["event"] == "site.reply":
            heads[event["site"]] = event["ledger"]
    assert heads.keys() == set(SITES)
    for site, head in heads.items():
        assert verify(out / "sites" / site / "ledger.jsonl", head).head == head
