"""`wardround provision` and its neighbours: what is made, kept, renewed and refused; the commands themselves."""

import datetime
import json
import os
import shutil
import socket
import ssl
import stat
import threading
from types import SimpleNamespace

import pytest
from cryptography import x509
from typer.testing import CliRunner

from common.errors import ConfigError, CredentialError, MismatchError, StorageError
from ops import approve as approvals
from ops.kit import verify_kit
from ops.pki import make_trial_pki
from ops.pki_issue import new_authority
from ops.provision import expiry_warnings, provision
from ops.provision_files import check_host, join_address, split_address, write
from ops.provision_project import ProjectConfig, coordinator_credentials, read_config, read_project
from ops.site_cli import site_app
from tests.ops.provisioned import config, files, kit_at_site, project

DAY = datetime.timedelta(days=1)
TOML = """
name = "liver-2026"
[coordinator]
names = ["fl.example.org", "192.0.2.7"]
[[sites]]
alias = "oak"
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return project(tmp_path_factory.mktemp("template") / "liver").folder


@pytest.fixture
def made(template, tmp_path):
    return shutil.copytree(template, tmp_path / "liver")


def refused(said, function, *arguments, kind=ConfigError, **named):
    with pytest.raises(kind, match=said) as caught:
        function(*arguments, **named)
    assert "/tmp" not in str(caught.value)
    return caught.value


def names_of(folder):
    certificate = x509.load_pem_x509_certificate((folder / "coordinator" / "server.crt").read_bytes())
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def test_server_certificate_has_all_names_and_kits_trust_it(made):
    pki = coordinator_credentials(made)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pki.server_cert, pki.server_key)
    client = ssl.create_default_context(cafile=str(made / "kits" / "oak" / "ca.crt"))
    for name in ("fl.example.org", "192.0.2.7", "localhost", "127.0.0.1"):
        left, right = socket.socketpair()
        with left, right:
            thread = threading.Thread(
                target=lambda end=left: server.wrap_socket(end, server_side=True).close()
            )
            thread.start()
            with client.wrap_socket(right, server_hostname=name) as secured:
                assert secured.version() == "TLSv1.3"
            thread.join(5)


def test_again_changes_nothing(made):
    before = files(made)
    done = provision(config(), made)
    assert (done.made, done.server) == ((), "kept")
    assert files(made) == before


def test_new_site_is_added_and_the_rest_stays(made):
    before = files(made)
    done = provision(config(("oak", "elm", "ash")), made)
    assert done.made == ("ash",)
    verify_kit(made / "kits" / "ash", alias="ash")
    after = files(made)
    assert {name for name in before if after[name] != before[name]} == {"project.json"}
    assert all(name.startswith("kits/ash") for name in after.keys() - before.keys())


def test_site_without_the_authority_key_can_not_be_added_but_the_rest_works(made):
    (made / "authority" / "ca.key").unlink()
    provision(config(), made)
    coordinator_credentials(made)
    refused(
        "authority's key .bring it back", provision, config(("oak", "elm", "ash")), made, kind=CredentialError
    )
    assert "ash" not in read_project(made).sites
    (made / "authority" / "ca.key").write_bytes(new_authority("other", 9).key_pem)
    refused("does not match its certificate", provision, config(), made, kind=CredentialError, renew=True)


def test_renewal_keeps_authority_kits_and_secret(made, tmp_path):
    site = kit_at_site(made, "oak", tmp_path / "hospital")
    before = files(made)
    done = provision(
        config(coordinator={"names": ("fl.example.org", "192.0.2.7", "new.example.org")}), made, renew=True
    )
    after = files(made)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"project.json", "coordinator/server.crt", "coordinator/server.key"}
    assert done.server == "renewed"
    assert "new.example.org" in names_of(made).get_values_for_type(x509.DNSName)
    pki = coordinator_credentials(made)
    verify_kit(site)
    authority = x509.load_pem_x509_certificate((site / "ca.crt").read_bytes())
    x509.load_pem_x509_certificate(pki.server_cert.read_bytes()).verify_directly_issued_by(authority)
    assert read_project(made).log[-1].event == "renew"


def test_renewal_comes_to_the_rescue_of_an_expired_certificate(made, monkeypatch):
    from ops import pki_issue

    start = datetime.datetime.now(datetime.UTC) - 400 * DAY
    with monkeypatch.context() as patch:
        patch.setattr(pki_issue, "_validity", lambda days: (start, start + days * DAY))
        old = made.parent / "old"
        provision(config(), old)
    refused("certificate expired on", coordinator_credentials, old, kind=CredentialError)
    done = provision(config(), old)
    assert any("ended on" in warning and "--renew" in warning for warning in done.warnings)
    assert provision(config(), old, renew=True).warnings == ()
    coordinator_credentials(old)


def test_changed_names_and_port(made):
    more = {"names": ("fl.example.org", "192.0.2.7", "new.example.org")}
    refused("add --renew", provision, config(coordinator=more), made)
    other = {"names": ("new.example.org",)}
    refused(
        "kits of oak, elm call fl.example.org:9092", provision, config(coordinator=other), made, renew=True
    )
    port = {"names": ("fl.example.org", "192.0.2.7"), "port": 443}
    refused("kits of oak, elm call", provision, config(coordinator=port), made)
    done = provision(config(coordinator=other), made, renew=True, reissue=["oak", "elm"])
    assert done.made == ("oak", "elm")
    verify_kit(made / "kits" / "oak", server="new.example.org:9092")


def test_folders_that_are_something_else(made, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    refused("holds something else", provision, config(), tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").exists()
    refused("is that of project 'liver-2026'", provision, config(name="heart"), made)
    refused("no site 'ash'", provision, config(), made, reissue=["ash"])


def test_kit_of_a_command_that_was_killed_is_taken_on(made):
    state = json.loads((made / "project.json").read_text())
    del state["sites"]["elm"]
    (made / "project.json").write_text(json.dumps(state))
    before = files(made / "kits")
    assert provision(config(), made).made == ("elm",)
    assert files(made / "kits") == before


def test_foreign_kit_in_the_way(made, tmp_path):
    other = project(tmp_path / "other", ["ash"]).folder
    shutil.copytree(other / "kits" / "ash", made / "kits" / "ash")
    refused("not of this project", provision, config(("oak", "elm", "ash")), made)


def test_central_kit_is_not_replaced_under_an_admitted_site(tmp_path):
    trial = project(tmp_path / "trial", ["oak"], keys="central")
    assert any("private keys" in warning for warning in trial.warnings)
    described = config(["oak"], keys="central")
    refused("First `wardround site revoke oak`", provision, described, trial.folder, reissue=["oak"])
    approvals.revoke("oak", trial.folder, "lost")
    before = (trial.folder / "kits/oak/private/key").read_bytes()
    provision(described, trial.folder, reissue=["oak"])
    assert (trial.folder / "kits/oak/private/key").read_bytes() != before
    assert set(coordinator_credentials(trial.folder).site_public) == {"oak"}


def test_volume_that_cannot_be_written(made, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", str(made))

    monkeypatch.setattr("ops.provision_files.write_private", full)
    refused("cannot be written .No space left", provision, config(("oak", "ash")), made, kind=StorageError)
    assert not [path for path in (made / "kits").iterdir() if "ash" in path.name]


def test_state_that_is_damaged_or_of_another_version(made):
    state = (made / "project.json").read_text()
    (made / "project.json").write_text(state[:-40])
    refused("damaged", provision, config(), made)
    (made / "project.json").write_text(state.replace('"schema_version": 1', '"schema_version": 2'))
    refused("another schema version", provision, config(), made, kind=MismatchError)


def test_warnings_before_the_end():
    now = datetime.datetime.now(datetime.UTC)
    assert expiry_warnings(now + 31 * DAY, now + 91 * DAY) == []
    server, authority = (
        expiry_warnings(now + 29 * DAY, now + 500 * DAY),
        expiry_warnings(now + 60 * DAY, now + 89 * DAY),
    )
    assert ["--renew" in text for text in server] == [True]
    assert ["new kits" in text for text in authority] == [True]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("", ""),
        ('keys = "both"', "keys"),
        ("validty_days = 3", "did you mean 'validity_days'"),
        ("validity_days = 0", "validity_days"),
        ("authority_days = 10", "at least as long"),
        ("name = 1", "TOML"),
    ],
)
def test_project_toml(tmp_path, change, said):
    path = tmp_path / "project.toml"
    path.write_text(change + "\n" + TOML)
    if not change:
        assert isinstance(read_config(path), ProjectConfig)
        return
    refused(f"(?i){said}", read_config, path)


def test_projects_that_cannot_be(tmp_path):
    refused("cannot be read", read_config, tmp_path / "absent.toml")
    for sites, said in ((("oak", "oak"), "two sites have the alias 'oak'"), (("St. Mary",), "alias")):
        with pytest.raises(ValueError, match=said):
            config(sites)
    for name in ("https://fl.example.org", "fl.example.org:9092", "a b", "-x", "1.2.3", "", "*.example.org"):
        refused("neither a host name nor an address", check_host, name)


def test_addresses():
    for text, parts in {
        "FL.example.org": ("fl.example.org", None),
        "192.0.2.7:443": ("192.0.2.7", 443),
        "[2001:DB8::1]:9092": ("2001:db8::1", 9092),
        "2001:db8:0::1": ("2001:db8::1", None),
    }.items():
        assert split_address(text) == parts
    assert split_address(join_address("2001:db8::1", 9092)) == ("2001:db8::1", 9092)
    refused("Port 99999", split_address, "fl.example.org:99999")
    refused("neither", split_address, "[::1")


class Link:
    """A SuperLink's Control API, in memory."""

    def __init__(self, *foreign):
        self.keys = list(foreign)

    def register(self, path, *, site):
        from ops.pki import load_public_pem

        pem = load_public_pem(path, site=site)
        self.keys += [pem] if pem not in self.keys else []
        return self.keys.index(pem)

    def nodes(self):
        return [SimpleNamespace(node_id=i, online=i == 0, public_key=pem) for i, pem in enumerate(self.keys)]


def test_running_superlink_is_told_and_strangers_are_named(tmp_path):
    from ops.pki import load_public_pem

    trial = project(tmp_path / "trial", keys="central").folder
    stranger = load_public_pem(make_trial_pki(tmp_path / "pki", ["x"]).site_public["x"])
    link = Link(stranger)
    done = approvals.register_all(trial, link)
    assert (done.nodes, done.online, done.foreign) == ({"elm": 1, "oak": 2}, (), {0: ""})
    approvals.revoke("oak", trial, "left")
    assert approvals.register_all(trial, link).foreign == {0: "", 2: "oak"}
    approvals.write_connection(trial, "127.0.0.1:9093")
    assert '"127.0.0.1:9093"' in (trial / "coordinator/flwr/config.toml").read_text()
    refused("has a port", approvals.write_connection, trial, "127.0.0.1")


def run(*arguments, **named):
    return CliRunner().invoke(
        site_app, [str(argument) for argument in arguments], env={"COLUMNS": "200"}, **named
    )


def test_the_whole_way_by_commands(made, tmp_path):
    kit = kit_at_site(made, "oak", tmp_path / "hospital")
    shown = run("verify", kit, "--alias", "oak", "--server", "fl.example.org:9092")
    assert shown.exit_code == 0
    assert "in order" in shown.output
    asked = json.loads(run("request", kit, "--json").output)
    assert asked["fingerprint"][:4] + " " in run("request", kit).output
    no = run("approve", asked["request"], "--project", made, input="n\n")
    assert (no.exit_code, read_project(made).sites["oak"].public_key) == (10, "")
    assert "desk of oak" in no.output
    yes = run("approve", asked["request"], "--project", made, input="y\n")
    assert (yes.exit_code, "is admitted" in yes.output) == (0, True)
    known = run("approve", asked["request"], "-p", made, "--fingerprint", asked["fingerprint"], "--json")
    assert json.loads(known.output)["news"] == "known"
    assert run("approve", asked["request"], "-p", made, "--json").exit_code == 2
    listed = run("list", "--project", made)
    assert "desk of oak" in listed.output
    assert json.loads(run("list", "--project", made, "--json").output)["sites"]["elm"]["public_key"] == ""
    gone = run("revoke", "oak", "--project", made, "--reason", "laptop stolen")
    assert "register --project" in gone.output
    assert run("revoke", "oak", "--project", made).exit_code == 2  # a reason is needed


def test_command_lines_of_a_site_and_of_the_superlink(made, tmp_path):
    kit = kit_at_site(made, "oak", tmp_path / "hospital")
    assert run("request", kit).exit_code == 0
    own = tmp_path / "site.toml"
    own.write_text((kit / "site.toml").read_text())
    lines = run("commands", kit, "--config", own).output.splitlines()
    assert lines[::2] == ["# worker-oak", "# relay-oak", "# supernode-oak"]
    assert f"--superlink fl.example.org:9092 --root-certificates {kit}/ca.crt" in lines[5]
    assert f"--auth-supernode-private-key {kit}-keys/key" in lines[5]
    link = run("commands", "--project", made).output
    assert "--fleet-api-address 0.0.0.0:9092 --control-api-address 127.0.0.1:9093" in link
    assert "--enable-supernode-auth" in link
    own.write_text(own.read_text().replace('alias = "oak"', 'alias = "elm"'))
    assert isinstance(run("commands", kit, "--config", own).exception, CredentialError)
    assert run("commands").exit_code == 2


def test_provision_command(tmp_path):
    from ops.cli import _mount, app

    _mount()
    (tmp_path / "project.toml").write_text(TOML)
    arguments = ["provision", str(tmp_path / "project.toml"), "--out", str(tmp_path / "made")]
    first = CliRunner().invoke(app, [*arguments, "--json"])
    assert list(json.loads(first.output)["kits"]) == ["oak"]
    again = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert "none is new" in again.output
    shown = CliRunner().invoke(app, ["provision", "--help"], env={"COLUMNS": "200"}).output
    assert "[coordinator]" in shown  # not taken for markup
    assert "[[sites]]" in shown
    for command in ("verify", "request", "approve", "revoke", "register", "list", "commands"):
        assert "wardround site" in run(command, "--help").output


def test_a_project_that_this_user_may_not_read_is_named(tmp_path):
    (tmp_path / "project.json").write_bytes(b"{}")
    tmp_path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # nothing is closed to root
    try:
        refused("cannot be read by this user", read_project, tmp_path)
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: only root writes for other users")
def test_what_root_writes_belongs_to_the_folders_owner(tmp_path):
    os.chown(tmp_path, 10001, 10001)
    found = write(tmp_path / "project.json", b"{}").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (10001, 10001, 0o600)
