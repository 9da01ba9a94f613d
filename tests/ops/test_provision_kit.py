"""A startup kit: in order as made, and every fault named before anything starts."""

import datetime
import json
import os
import shutil
import stat
import subprocess
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.site_config import read_site_config
from common.errors import ConfigError, CredentialError, MismatchError
from ops import kit as kits
from ops.kit import SUMS, verify_kit
from ops.pki_issue import new_authority, new_site_key
from ops.provision_files import sha256, spoken
from tests.ops.provisioned import files, kit_at_site, project

DAY = datetime.timedelta(days=1)
OWN = {
    *(
        "README.md",
        "SHA256SUMS",
        "ca.crt",
        "compose.gpu.yaml",
        "compose.yaml",
        "kit.json",
        "kit.sig",
        "site.toml",
    )
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return project(tmp_path_factory.mktemp("made") / "liver").folder


@pytest.fixture(scope="module")
def central(tmp_path_factory):
    return project(tmp_path_factory.mktemp("central") / "trial", keys="central").folder


@pytest.fixture
def kit(made, tmp_path):
    return kit_at_site(made, "oak", tmp_path)


@pytest.fixture
def kit_with_key(central, tmp_path):
    return kit_at_site(central, "oak", tmp_path)


def refused(folder, said, kind=CredentialError, **arguments):
    """The kit is refused with this reason and a safe sentence."""
    with pytest.raises(kind, match=said) as caught:
        verify_kit(folder, **arguments)
    assert str(folder) not in str(caught.value)


def resigned(folder, signer, about, **changes):
    """Make a kit anew, as somebody with an authority's key could."""
    keep = {name: (folder / name).read_bytes() for name in kits.PUBLIC_FILES} | {"ca.crt": signer.pem}
    shutil.rmtree(folder)
    values = {"authority": kits.authority_fingerprint(signer.certificate)} | changes
    kits.write_kit(about.model_copy(update=values), keep, signer, folder)


def test_kit_is_in_order_as_made(kit):
    found = verify_kit(kit, alias="oak", server="fl.example.org:9092")
    assert found.fingerprint == sha256((kit / "kit.json").read_bytes())
    assert found.about.server == "fl.example.org:9092"
    assert found.about.names == ("fl.example.org", "192.0.2.7")
    for server in ("FL.example.org", "192.0.2.7:9092"):
        verify_kit(kit, server=server, fingerprint=spoken(found.fingerprint).upper().replace(" ", "-"))


def test_kit_without_keys_holds_no_secret_of_anybody(made):
    secret = [
        path.read_bytes()
        for path in [made / "authority/ca.key", *made.glob("coordinator/*")]
        if path.is_file()
    ]
    secret = [content for content in secret if b"CERTIFICATE" not in content]
    assert len(secret) == 3  # the authority's key, the server's key and secret
    for alias in ("oak", "elm"):
        held = files(made / "kits" / alias)
        assert set(held) == OWN
        for content in held.values():
            assert b"PRIVATE" not in content
            assert not any(part in content for part in secret)


def test_kits_with_keys_hold_each_its_own(central):
    held = {alias: files(central / "kits" / alias) for alias in ("oak", "elm")}
    for alias, other in (("oak", "elm"), ("elm", "oak")):
        assert set(held[alias]) == OWN | {"private/key", "private/key.pub", "private/secret"}
        for name in ("private/key", "private/key.pub", "private/secret"):
            assert held[alias][name] not in b"\n".join(held[other].values())
    assert not any(
        b"PRIVATE" in content
        for name, content in files(central / "coordinator").items()
        if name != "server.key"
    )


def test_archive_holds_the_same_with_private_modes(central, tmp_path):
    with tarfile.open(central / "kits" / "oak.tar.gz") as tar:
        tar.extractall(tmp_path, filter="tar")
        assert {entry.uname for entry in tar} == {""}
    assert files(tmp_path / "oak") == files(central / "kits" / "oak")
    verify_kit(tmp_path / "oak")
    for path in [*central.rglob("*"), *(tmp_path / "oak").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_checksums_are_those_of_the_usual_program(kit):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum on this machine")
    done = subprocess.run(
        ["sha256sum", "--strict", "-c", SUMS], cwd=kit, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(": OK") == len(OWN) - 1


def test_template_is_a_site_configuration(kit):
    read = read_site_config(kit / "site.toml")
    assert read.alias == "oak"
    assert read.privacy.summary == "counts"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_noticed(central, tmp_path, data):
    folder = tmp_path / "oak"
    if not folder.exists():
        kit_at_site(central, "oak", tmp_path)
    name = data.draw(st.sampled_from(sorted(files(folder))))
    path = folder / name
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda value: value != content[place]))
    path.write_bytes(content[:place] + bytes([other]) + content[place + 1 :])
    try:
        with pytest.raises((CredentialError, MismatchError)):
            verify_kit(folder)
    finally:
        path.write_bytes(content)
    verify_kit(folder)


@pytest.mark.parametrize("name", sorted(OWN))
def test_missing_cut_and_longer_files_are_named(kit, name):
    content = (kit / name).read_bytes()
    for wrong in (content[:-1], content + b"\n"):
        (kit / name).write_bytes(wrong)
        refused(kit, "altered")
    (kit / name).unlink()
    refused(kit, "cannot be read" if name == "kit.json" else f"not whole: {name} is missing")


def test_changed_file_with_mended_checksums(kit):
    """Somebody who mends all checksums still has not the authority's key."""
    (kit / "site.toml").write_text((kit / "site.toml").read_text() + 'data = "/elsewhere"\n')
    listed = json.loads((kit / "kit.json").read_text())
    listed["files"]["site.toml"] = sha256((kit / "site.toml").read_bytes())
    (kit / "kit.json").write_text(json.dumps(listed, indent=2) + "\n")
    (kit / SUMS).write_bytes(kits._sums({name: (kit / name).read_bytes() for name in OWN - {SUMS}}))
    refused(kit, "not signed by the kit's authority")


def test_forged_kit_is_told_by_its_fingerprint(kit):
    true = verify_kit(kit)
    resigned(kit, new_authority("wardround liver-2026", 100), true.about)
    verify_kit(kit)  # in itself it is in order: only the telephone tells
    refused(kit, "not the one that was read out", fingerprint=spoken(true.fingerprint))


def test_kit_of_an_earlier_version_is_told_which_file_it_lacks(kit):
    """Schema 1, rightly signed, made before kits had compose files."""
    about = verify_kit(kit).about
    own = new_authority("wardround liver-2026", 100)
    keep = {name: (kit / name).read_bytes() for name in ("README.md", "site.toml")} | {"ca.crt": own.pem}
    shutil.rmtree(kit)
    values = {"authority": kits.authority_fingerprint(own.certificate)}
    kits.write_kit(about.model_copy(update=values), keep, own, kit)
    refused(kit, r"does not name compose\.gpu\.yaml, compose\.yaml.* earlier version.*--reissue")


def test_list_alone_is_enough_to_stop_what_runs(kit):
    (kit / "compose.yaml").unlink()
    refused(kit, "compose.yaml is missing")
    assert kits.read_list(kit).alias == "oak"


def test_readme_teaches_the_way_to_a_running_site(made, central):
    for folder, private in ((made, "oak-keys"), (central, "oak")):
        text = (folder / "kits/oak/README.md").read_text()
        steps = ["site verify oak", "cp oak/site.toml", f"sudo chown -R 10001 {private}\n", "site check oak",
                 "site up oak", "site status oak", "site down oak"]  # fmt: skip
        places = [text.index(step) for step in steps]
        assert places == sorted(places)
        assert "{" not in text


def test_list_and_authority_of_two_projects(kit):
    about = verify_kit(kit).about
    resigned(kit, new_authority("wardround liver-2026", 100), about, authority=about.authority)
    refused(kit, "authority .ca.crt. is another")


@pytest.mark.parametrize("name", ["note.txt", "sub/note.txt", ".hidden", "private/note"])
def test_extra_files_are_refused(kit, name):
    (kit / name).parent.mkdir(exist_ok=True)
    (kit / name).write_text("hello")
    refused(kit, "holds a file or folder that its list does not name")


@pytest.mark.parametrize("name", ["key", "private/key"])
def test_extra_private_keys_are_called_so(kit, name):
    (kit / name).parent.mkdir(exist_ok=True)
    (kit / name).write_bytes(new_site_key("oak")[0])
    refused(kit, "holds a private key that its list does not name")


def test_links_are_refused(kit, tmp_path):
    outside = tmp_path / "outside"
    (kit / "ca.crt").rename(outside)
    (kit / "ca.crt").symlink_to(outside)
    refused(kit, "ca.crt is a link")


def test_no_kit_at_all(tmp_path):
    refused(tmp_path / "absent", "folder is not there. Unpack")
    refused(tmp_path, "list .kit.json. cannot be read")


def test_other_alias_and_other_servers(kit):
    refused(kit, "is for site 'oak', not for 'elm'", alias="elm")
    refused(kit, r"at fl\.example\.org, 192\.0\.2\.7, not for 198\.51\.100\.1", server="198.51.100.1:9092")
    refused(kit, "not for fl.example.com", server="fl.example.com")
    refused(kit, "is for port 9092, not for 443", server="fl.example.org:443")
    refused(kit, "neither a host name nor an address", ConfigError, server="https://fl.example.org")


def test_dates(kit):
    about = verify_kit(kit).about
    refused(kit, f"expired on {about.expires:%Y-%m-%d}.* new one", now=about.expires + DAY)
    refused(kit, "not valid before .* clock", now=about.created - 2 * DAY)
    verify_kit(kit, now=about.expires - DAY)


@pytest.mark.parametrize(
    ("version", "said"), [(2, "schema version 2"), (True, "schema version"), ("1", "none"), (None, "none")]
)
def test_other_schema_versions(kit, version, said):
    listed = json.loads((kit / "kit.json").read_text()) | {"schema_version": version}
    (kit / "kit.json").write_text(json.dumps(listed))
    refused(kit, said, MismatchError)


@pytest.mark.parametrize(
    "change", [{"files": {}}, {"files": {"../../etc/passwd": "0" * 64}}, {"alias": "../x"}, {"more": 1}]
)
def test_lists_that_no_kit_has(kit, change):
    listed = json.loads((kit / "kit.json").read_text()) | change
    (kit / "kit.json").write_text(json.dumps(listed))
    refused(kit, "altered")


def test_large_file_is_not_read(kit):
    with (kit / "kit.json").open("r+b") as file:
        file.truncate(1 << 31)
    refused(kit, "larger than 1 MiB")


def test_key_in_a_kit_that_others_can_read(kit_with_key):
    verify_kit(kit_with_key)
    os.chmod(kit_with_key / "private" / "key", 0o640)
    refused(kit_with_key, "Others on this machine can read")


def test_fingerprints_that_cannot_be_compared(kit):
    for said in ("3f2a", "not a fingerprint at all, but long enough"):
        refused(kit, "at least 32 hexadecimal digits", ConfigError, fingerprint=said)
