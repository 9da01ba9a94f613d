"""Kit, key, site.toml, policy and data; and the whole preflight against a real TLS server."""

import json
import os
from pathlib import Path

import pytest

from common.errors import ConfigError, CredentialError, DataError, MismatchError
from ops.preflight_run import is_kit
from ops.preflight_site import (
    UID,
    check_config,
    check_data,
    check_key,
    check_kit,
    check_policy,
    readable,
    unreadable,
)
from tests.ops.preflighted import ROOT, copied, edit, installation, kit_of, needs_root, own, ready


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return installation(tmp_path_factory.mktemp("once"))[1]


@pytest.fixture
def place(once, tmp_path):
    """In order, but for the key's owner where this is not run by root."""
    return ready(copied(once, tmp_path))


# rights


@pytest.mark.parametrize(
    ("mode", "folder", "expected"),
    [
        (0o644, False, "yes"),
        (0o600, False, "no"),
        (0o755, True, "yes"),
        (0o744, True, "no"),
        (0o711, True, "no"),
    ],
)
def test_others_rights(tmp_path, mode, folder, expected):
    path = tmp_path / "x"
    path.mkdir() if folder else path.write_text("x")
    path.chmod(mode)
    assert readable(path, UID) == expected


def test_owner_and_group_count_before_others(tmp_path):
    path = tmp_path / "x"
    path.write_text("x")
    path.chmod(0o044)
    own_id, group = path.stat().st_uid, path.stat().st_gid
    assert readable(path, own_id) == "no"
    path.chmod(0o404)
    if group != own_id:
        assert readable(path, group) == "no"
    path.chmod(0o400)
    assert readable(path, own_id) == "yes"
    assert unreadable([path, tmp_path], own_id) == ([], [])


def test_access_lists_are_not_judged(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_text("x")
    path.chmod(0o640)
    monkeypatch.setattr(os, "listxattr", lambda _: ["system.posix_acl_access"])
    assert readable(path, UID) == "unknown"
    assert unreadable([path], UID) == ([], [path])


# kit and key


def test_kit(place):
    found, kit = check_kit(place.kit)
    assert found.mark == "ok"
    assert "Site oak of liver-2026, whole and signed" in found.found
    assert kit.about.alias == "oak"
    (place.kit / "compose.yaml").write_text("services: {}\n")
    found, kit = check_kit(place.kit)
    assert kit is None
    assert found.found == "The kit's compose.yaml was altered or damaged: its checksum differs."
    assert found.remedy.startswith("Do not use it")
    assert found.exit_code == CredentialError.exit_code


def test_kit_that_the_containers_cannot_read(place):
    (place.kit / "ca.crt").chmod(0o600)
    found, kit = check_kit(place.kit)
    assert kit is not None
    if (place.kit / "ca.crt").stat().st_uid != UID:
        assert found.mark == "fail"
        assert "chmod -R a+rX" in found.remedy
    assert check_kit(place.kit, shifted=True)[0].mark == "ok"


def test_kit_of_another_version_and_of_another_schema(place, monkeypatch):
    monkeypatch.setattr("common.__version__", "9.9.9")
    found, _ = check_kit(place.kit)
    assert found.mark == "warn"
    assert "this is 9.9.9" in found.found
    document = json.loads((place.kit / "kit.json").read_text()) | {"schema_version": 2}
    (place.kit / "kit.json").write_text(json.dumps(document))
    assert check_kit(place.kit)[0].exit_code == MismatchError.exit_code


@needs_root
def test_key_in_order(place):
    found = check_key(kit_of(place), place.keys_place)
    assert found.mark == "ok"
    assert str(place.keys_place) not in found.found


def test_key_that_is_missing_open_or_not_a_key(place):
    kit = kit_of(place)
    assert "`wardround site request oak`" in check_key(kit, place.kit.parent / "none").remedy
    assert check_key(None, None).mark == "skipped"
    key = place.keys_place / "key"
    key.chmod(0o644)
    opened = check_key(kit, place.keys_place)
    assert (opened.mark, opened.remedy) == ("fail", "Run `chmod 600` on both.")
    key.chmod(0o600)
    key.write_text("nothing")
    assert "is not an OpenSSH private key" in check_key(kit, place.keys_place).found


def test_key_that_belongs_to_somebody_else_than_the_containers(once, tmp_path):
    place = copied(once, tmp_path)
    found = check_key(kit_of(place), place.keys_place)
    if os.geteuid() != UID:
        assert found.mark == "fail"
        assert f"sudo chown -R {UID}" in found.remedy
    assert check_key(kit_of(place), place.keys_place, shifted=True).mark == "ok"


def test_key_that_this_account_may_not_see(place, monkeypatch):
    kit = kit_of(place)
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != place.keys_place)
    found = check_key(kit, place.keys_place)
    assert found.mark == ("warn" if ROOT else "fail")  # whose it is can be seen, what is in it cannot
    assert "as root" in found.remedy


@needs_root
def test_kit_with_its_key(tmp_path):
    _, place = installation(tmp_path, keys="central")
    for path in (place.kit / "private").iterdir():
        path.chmod(0o600)
    (place.kit / "private").chmod(0o700)
    found, kit = check_kit(place.kit)
    assert found.mark == "fail"
    assert f"chown -R {UID}" in found.remedy
    own(place.kit)
    assert check_kit(place.kit)[0].mark == "ok"
    assert check_key(kit, None).mark == "ok"


# site.toml and policy


def test_config(place):
    found, config = check_config(place.config_place, "oak")
    assert found.mark == "ok"
    assert check_policy(config).mark == "warn"  # the template as it came: nothing was decided
    assert check_config(place.kit.parent / "none.toml", "oak")[0].exit_code == ConfigError.exit_code
    other = check_config(place.config_place, "elm")[0]
    assert "for 'oak', the kit for 'elm'" in other.found
    place.config_place.chmod(0o600)
    if os.geteuid() != UID and place.config_place.stat().st_uid != UID:
        assert "chmod a+r" in check_config(place.config_place, "oak")[0].remedy


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('data = "/data"', 'data = "/srv/liver"', 'data = "/data"'),
        ('home = "/var/lib/wardround"', 'home = "/home/x"', 'home = "/var/lib/wardround"'),
        ("worker.sock", "w.sock", "socket"),
        ("[compute]", 'models = "/srv/models"\n[compute]', 'models below "/var/lib/wardround"'),
    ],
)
def test_folders_that_the_container_does_not_have(place, old, new, said):
    edit(place.config_place, old, new)
    found, _ = check_config(place.config_place, "oak")
    assert found.mark == "fail"
    assert said in found.remedy
    assert "--data" in found.remedy


def test_config_with_an_unknown_key_is_told_so(place):
    edit(place.config_place, "min_cases = 1 ", "min_case = 1 ")
    found, config = check_config(place.config_place, "oak")
    assert config is None
    assert "min_case" in found.found + found.remedy
    assert check_policy(None).mark == "skipped"


def test_policy_in_one_line(place):
    edit(place.config_place, 'methods = ["*"]', 'methods = ["fedavg", "ditto"]')
    edit(place.config_place, "min_cases = 1 ", "min_cases = 20 ")
    edit(place.config_place, "max_out_mb = 0 ", "max_out_mb = 50 ")
    found = check_policy(check_config(place.config_place, "oak")[1])
    expected = (
        "methods fedavg, ditto; kinds all; sketches labels; from 20 training case(s); at most 50 MB a round"
    )
    assert expected in found.found
    assert found.mark == "ok"
    edit(place.config_place, "min_cases = 20 ", "min_cases = 1 ")
    edit(place.config_place, "max_out_mb = 50 ", "max_out_mb = 0 ")
    assert check_policy(check_config(place.config_place, "oak")[1]).mark == "ok"  # two methods were chosen
    edit(place.config_place, 'methods = ["fedavg", "ditto"]', 'methods = ["*"]')
    everything = check_policy(check_config(place.config_place, "oak")[1])
    assert everything.mark == "warn"
    assert "[policy]" in everything.remedy


def test_what_a_wrong_value_was_is_for_this_terminal_alone(place):
    edit(place.config_place, 'device = "auto"', 'device = "St Mary Hospital"')
    found, config = check_config(place.config_place, "oak")
    assert (found.mark, config) == ("fail", None)
    assert "St Mary" not in found.found + found.remedy
    assert "St Mary" in found.detail


@needs_root
def test_what_this_account_may_not_look_at_is_no_traceback(place):
    closed = place.kit.parent / "closed"
    closed.mkdir(mode=0o700)
    os.seteuid(65534)
    try:
        assert check_data(closed / "data", "oak").mark == "warn"
        assert check_config(closed / "site.toml", "oak")[0].remedy.startswith("Run this command as root")
        with pytest.raises(ConfigError, match="as root"):
            is_kit(closed / "kit")
    finally:
        os.seteuid(0)


@needs_root
def test_data_below_a_closed_folder_or_behind_a_full_path(place):
    dataset = json.loads((place.data_place / "dataset.json").read_text())
    image = place.data_place / dataset["training"][0]["image"]
    deep = image.parent / "sub"
    deep.mkdir()
    image.rename(deep / image.name)
    dataset["training"][0]["image"] = str((deep / image.name).relative_to(place.data_place))
    (place.data_place / "dataset.json").write_text(json.dumps(dataset))
    assert check_data(place.data_place, "oak").mark == "ok"
    image.parent.chmod(0o700)
    assert "may not read the data" in check_data(place.data_place, "oak").found
    image.parent.chmod(0o755)
    real = place.data_place / "real.bin"
    (deep / image.name).rename(real)
    (deep / image.name).symlink_to(real)
    assert "have a full path" in check_data(place.data_place, "oak").found
    (deep / image.name).unlink()
    (deep / image.name).symlink_to(os.path.relpath(real, deep))
    assert check_data(place.data_place, "oak").mark == "ok"


# data


def test_data(place):
    found = check_data(place.data_place, "oak")
    assert found.mark == "ok"
    assert "3 cases listed (3 training)" in found.found
    assert str(place.data_place) not in found.found


def test_data_that_cannot_be_used(place):
    data = place.data_place
    assert "not there" in check_data(data / "none", "oak").found
    image = next((data / "imagesTr").iterdir())
    image.chmod(0o600)
    if image.stat().st_uid != UID:
        closed = check_data(data, "oak")
        assert "may not read the data" in closed.found
        assert closed.detail == str(image)
        assert image.name not in closed.found + closed.remedy
        assert check_data(data, "oak", shifted=True).mark == "ok"
    image.rename(data.parent / "outside.nii.gz")
    gone = check_data(data, "oak")
    assert gone.found == "1 of 6 files that dataset.json lists are not there."
    image.symlink_to(data.parent / "outside.nii.gz")
    assert "lead out of the folder" in check_data(data, "oak").found
    (data / "dataset.json").write_text("{")
    assert check_data(data, "oak").exit_code == DataError.exit_code
