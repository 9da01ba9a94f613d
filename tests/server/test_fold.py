"""The fold: whatever the order of arrival, the order of folding is the sites' own, and nobody is folded twice."""

import tempfile
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server import fold as module
from server.fold import OrderedFold

SITES = list("abcdef")


def parts_of(site, size=50):
    return {"head": site.encode(), f"p.{site}": site.encode() * size, "empty": b""}


@settings(deadline=None, max_examples=60)
@given(st.permutations(SITES), st.sets(st.sampled_from(SITES)), st.sampled_from([0, 1, 60, 1 << 20]))
def test_any_arrival_and_any_failures_give_the_sites_own_order(arrival, failed, in_memory):
    folded = []
    with patch.object(module, "IN_MEMORY", in_memory):
        order = OrderedFold(SITES, lambda site, parts: folded.append((site, parts)))
        for number, site in enumerate(arrival, 1):
            (order.skip if site in failed else lambda site: order.put(site, parts_of(site)))(site)
            done = set(arrival[:number])
            ready = next((index for index, name in enumerate(SITES) if name not in done), len(SITES))
            # everything whose turn has come is folded at once, and nothing before its turn
            assert [site for site, _ in folded] == [name for name in SITES[:ready] if name not in failed]
        order.close()
    assert folded == [(site, parts_of(site)) for site in SITES if site not in failed]


def test_a_site_whose_turn_it_is_is_folded_without_a_copy():
    seen = []
    order = OrderedFold(["a", "b"], lambda site, parts: seen.append(parts))
    parts = parts_of("a")
    with patch.object(OrderedFold, "_spool", side_effect=AssertionError("spooled")):
        order.put("a", parts)
    assert seen[0] is parts


def test_early_replies_wait_on_disk_in_the_folder_given_and_leave_nothing(tmp_path, monkeypatch):
    folders = []
    real = tempfile.TemporaryFile

    def watched(*arguments, **options):
        folders.append(options.get("dir") or arguments[-1])
        return real(*arguments, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", watched)
    monkeypatch.setattr(module, "IN_MEMORY", 1000)
    folded = []
    order = OrderedFold(
        ["a", "small", "large"], lambda site, parts: folded.append((site, len(parts["p"]))), tmp_path
    )
    order.put("large", {"p": bytes(5_000_000)})
    assert folders == [str(tmp_path)]  # the large one, more than one frame, is on the disk
    order.put("small", {"p": bytes(10)})
    assert folders == [str(tmp_path)]  # the small one is not
    order.skip("a")
    assert folded == [("small", 10), ("large", 5_000_000)]
    assert list(tmp_path.iterdir()) == []


def test_what_waits_is_dropped_at_the_end_and_its_files_are_closed(monkeypatch):
    made = []
    real = tempfile.SpooledTemporaryFile

    def watched(*arguments, **options):
        made.append(real(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", watched)
    folded = []
    order = OrderedFold(["a", "b", "c", "d"], lambda site, parts: folded.append(site))
    for site in "dcb":
        order.put(site, parts_of(site))
    order.close()
    order.skip("a")
    assert folded == []
    order = OrderedFold(["a", "b"], lambda site, parts: folded.append(site))
    order.put("b", parts_of("b"))
    order.put("a", parts_of("a"))
    assert len(made) == 4
    assert all(file.closed for file in made)
    assert folded == ["a", "b"]


def test_an_error_of_the_fold_is_not_swallowed():
    def fold(site, parts):
        raise ValueError(site)

    order = OrderedFold(["a", "b"], fold)
    order.put("b", parts_of("b"))
    with pytest.raises(ValueError, match="a"):
        order.put("a", parts_of("a"))
    order.close()


def test_nobody_asked_is_nothing_to_fold():
    folded = []
    order = OrderedFold([], lambda site, parts: folded.append(site))
    order.close()
    assert folded == []
