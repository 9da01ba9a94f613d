"""From what was typed to a plan: which setting wins, which sites take part, and what is refused before anything starts."""

import json
import time
from pathlib import Path

import pytest

import common
from common.config import RunConfig
from common.errors import ConfigError, DataError
from common.federation import Federation, write_federation
from ops import plan as module
from ops.options import Options
from ops.plan import (
    choose_sites,
    data_root,
    default_root,
    has_default,
    make_plan,
    new_run_folder,
    parse_settings,
    versions,
)
from tests.harness import FEATURES, write_table_site

DATA = {
    "task": "tabular",
    "spatial_dims": 0,
    "channels": list(FEATURES),
    "labels": ["well", "ill"],
    "patch": [],
}


@pytest.fixture
def root(tmp_path):
    for index, alias in enumerate(("alpha", "beta", "gamma")):
        write_table_site(tmp_path / "root" / alias, seed=index)
    return tmp_path / "root"


def described(root, **settings):
    write_federation(root, Federation("tiny", "Tiny tables", "simulated", {"data": DATA} | settings))


def plan(root, *, runtime="fast", **options):
    return make_plan(Options(**options), root, root.parent / "out", runtime=runtime)


def test_without_a_federation_file_the_data_describes_itself(root):
    made = plan(root)
    assert list(made.sites.items()) == [(alias, root / alias) for alias in ("alpha", "beta", "gamma")]
    assert made.config.sites == ("alpha", "beta", "gamma")
    assert (made.config.data.task, made.config.data.channels, made.config.data.labels) == (
        "tabular",
        FEATURES,
        ("well", "ill"),
    )
    assert (made.method.name, made.config.method, made.runtime) == ("fedavg", "fedavg", "fast")


def test_later_places_win(root):
    described(
        root, train={"lr": 0.5, "local_epochs": 7, "batch_size": 9}, rounds={"rounds": 20, "quorum": 0.5}
    )
    config = plan(root).config
    assert (config.train.lr, config.train.local_epochs, config.rounds.rounds, config.rounds.quorum) == (
        0.5,
        7,
        20,
        0.5,
    )
    config = plan(root, rounds=5, local_epochs=2).config
    assert (config.train.local_epochs, config.rounds.rounds, config.train.batch_size) == (2, 5, 9)
    config = plan(root, rounds=5, settings=["rounds.rounds=6", "lr=0.25"]).config
    assert (config.rounds.rounds, config.train.lr) == (6, 0.25)


def test_the_methods_parameters_are_written_out_in_full_and_checked(root):
    assert plan(root, method="fedprox").config.params == {"mu": 0.01}
    assert plan(root, method="fedprox", settings=["mu=0.5"]).config.params == {"mu": 0.5}
    assert plan(root, method="ditto", settings=["lam=2", "params.personal-epochs=3"]).config.params == {
        "lam": 2,
        "personal_epochs": 3,
    }
    with pytest.raises(ConfigError, match=r"Bad value for 'fedprox\.mu'"):
        plan(root, method="fedprox", settings=["mu=-1"])
    with pytest.raises(ConfigError, match="Unknown setting 'mu'"):
        plan(root, method="fedavg", settings=["mu=1"])


def test_parameters_that_the_data_recommends_go_to_their_own_method_only(root):
    described(root, method="fedprox", params={"mu": 0.3})
    assert plan(root, method="fedprox").config.params == {"mu": 0.3}
    assert plan(root, method="ditto").config.params == {"lam": 0.1, "personal_epochs": 0}
    assert plan(root, method="fedavg").config.params == {}


def test_the_method_cannot_be_changed_behind_the_plans_back(root):
    with pytest.raises(ConfigError, match="chosen by --method, which says 'fedavg'"):
        plan(root, settings=["method=ditto"])
    assert plan(root, settings=["method=fedavg"]).config.method == "fedavg"


def test_the_seed_is_the_options_or_the_settings(root):
    assert plan(root, seed=5).config.seed == 5
    assert plan(root, seed=5, settings=["seed=6"]).config.seed == 6


def test_an_unknown_method_key_or_task_is_refused(root):
    with pytest.raises(ConfigError, match=r"Unknown method 'fedavgg'. Did you mean 'fedavg'\?"):
        plan(root, method="fedavgg")
    with pytest.raises(ConfigError, match=r"Unknown setting 'lrr'. Did you mean 'lr'\?"):
        plan(root, settings=["lrr=1"])
    with pytest.raises(ConfigError, match="The data is for task 'tabular', '--task segmentation' was asked"):
        plan(root, task="segmentation")
    with pytest.raises(ConfigError, match=r"Bad value for 'rounds\.rounds'"):
        plan(root, rounds=0)
    assert plan(root, task="tabular").config.data.task == "tabular"


def test_a_root_that_is_none_is_refused_without_its_path(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(DataError) as caught:
            plan(folder)
        assert str(tmp_path) not in str(caught.value)


# ---- sites -----------------------------------------------------------------------------------------------------------

FOUND = {alias: Path(alias) for alias in ("alpha", "beta", "gamma")}


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (None, ["alpha", "beta", "gamma"]),
        ("1", ["alpha"]),
        ("3", ["alpha", "beta", "gamma"]),
        ("gamma,alpha", ["gamma", "alpha"]),
        (" beta , beta", ["beta"]),
    ],
)
def test_sites_are_all_the_first_or_those_named(wanted, chosen):
    assert list(choose_sites(FOUND, wanted)) == chosen


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ("0", "--sites 0: the data has 3 sites. Give 1 to 3"),
        ("4", "--sites 4: the data has 3 sites. Give 1 to 3"),
        ("gama", r"no site 'gama'. Did you mean 'gamma'\?"),
        ("alpha,", "no site ''"),
        ("", "no site ''"),
        ("-1", "no site '-1'"),
        ("²", "no site '²'"),
    ],
)
def test_sites_that_are_not_there_are_refused(wanted, sentence):
    with pytest.raises(ConfigError, match=sentence):
        choose_sites(FOUND, wanted)


def test_the_plan_runs_over_the_chosen_sites_alone(root):
    made = plan(root, sites="2")
    assert (list(made.sites), made.config.sites) == (["alpha", "beta"], ("alpha", "beta"))


# ---- settings --------------------------------------------------------------------------------------------------------


def test_settings_are_cut_at_the_first_equals_sign():
    assert parse_settings([" lr = 0.1 ", "name=a=b", "empty="]) == {"lr": "0.1", "name": "a=b", "empty": ""}
    assert parse_settings(["lr=1", "lr=2"]) == {"lr": "2"}


@pytest.mark.parametrize("text", ["lr", "=1", " = 1", ""])
def test_a_setting_without_a_key_or_a_value_is_refused(text):
    with pytest.raises(ConfigError, match="is not key=value"):
        parse_settings([text])


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_the_default_data_has_a_folder_of_its_own_for_every_size_and_seed():
    assert default_root(Options()) == Path("data/mni152-3x10-seed0")
    assert default_root(Options(sites="5", seed=2)) == Path("data/mni152-5x10-seed2")
    assert default_root(Options(sites="hospital-1,hospital-2")) == Path("data/mni152-3x10-seed0")


def test_data_is_the_default_or_a_folder_that_is_there(root, tmp_path):
    assert data_root(Options()) == default_root(Options())
    assert data_root(Options(data=str(root))) == root
    (tmp_path / "file").write_text("")
    for name in ("none", "file"):
        with pytest.raises(DataError, match="--data names no folder") as caught:
            data_root(Options(data=str(tmp_path / name)))
        assert str(tmp_path) not in str(caught.value)
        assert str(tmp_path / name) in caught.value.detail


def test_default_data_counts_as_written_when_its_last_file_is(root):
    assert not has_default(root)
    described(root)
    assert has_default(root)


def test_a_run_never_overwrites_another(tmp_path):
    assert new_run_folder(Options(out=tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert new_run_folder(Options(out=tmp_path / "a" / "b")).is_dir()  # empty: still free
    (tmp_path / "a" / "b" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="not empty") as caught:
        new_run_folder(Options(out=tmp_path / "a" / "b"))
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(ConfigError, match="names a file"):
        new_run_folder(Options(out=tmp_path / "a" / "b" / "config.json"))


def test_a_run_folder_is_named_after_time_and_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        module.time,
        "strftime",
        lambda form, *when: time.strptime("2026-03-04", "%Y-%m-%d") and "20260304-050607",
    )
    assert new_run_folder(Options(method="ditto")) == tmp_path / "runs" / "20260304-050607-ditto"


def test_config_json_tells_what_ran_and_gives_the_same_config_again(root):
    described(root)
    made = plan(root, method="fedprox", rounds=4, runtime="stock")
    made.command, made.notes = "wardround trial --method fedprox", {"extra": 1}
    made.write()
    document = json.loads((root.parent / "out" / "config.json").read_text())
    assert RunConfig.from_mapping(document["config"]) == made.config
    assert (document["title"], document["note"], document["data_name"]) == (
        "Tiny tables",
        "simulated",
        "tiny",
    )
    assert (document["runtime"], document["command"], document["extra"]) == (
        "stock",
        "wardround trial --method fedprox",
        1,
    )
    assert document["software"] == versions()
    assert document["software"]["wardround"] == common.__version__
    assert {"flwr", "torch", "monai", "python"} <= document["software"].keys()
    time.strptime(document["started"], "%Y-%m-%dT%H:%M:%SZ")
