"""From kit to admission and out again: requests, approvals, revocations, with real keys."""

import json
import shutil
import stat

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import ConfigError, CredentialError, MismatchError
from ops.approve import approve, check_request, revoke
from ops.kit import verify_kit
from ops.kit_request import make_request, read_request, site_credentials
from ops.pki import load_public_key
from ops.pki_issue import SSH, new_site_key
from ops.provision import provision
from ops.provision_files import locked, spoken
from ops.provision_project import coordinator_credentials, read_project
from tests.ops.provisioned import config, kit_at_site, project


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return project(tmp_path_factory.mktemp("template") / "liver").folder


@pytest.fixture
def made(template, tmp_path):
    return shutil.copytree(template, tmp_path / "liver")


@pytest.fixture
def sent(made, tmp_path):
    return make_request(kit_at_site(made, "oak", tmp_path / "hospital"))


def refused(said, function, *arguments, kind=CredentialError, **named):
    with pytest.raises(kind, match=said) as caught:
        function(*arguments, **named)
    assert "/" not in str(caught.value).replace("KIT/", "")


def edited(path, **changes):
    """Change a request, without its key."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def signed(path, key, **changes):
    """Change a request and sign it with a key."""
    request = read_request(path).model_copy(update=changes)
    signature = key.sign(request.signed(), ec.ECDSA(hashes.SHA384())).hex()
    path.write_text(request.model_copy(update={"signature": signature}).model_dump_json())
    return path


def key_of(made):
    return serialization.load_ssh_private_key((made.keys / "key").read_bytes(), None)


def test_key_is_made_at_the_site_and_stays_there(sent, made):
    assert sent.new_key
    for path in (sent.keys, *sent.keys.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    assert {path.name for path in sent.keys.iterdir()} == {"key", "key.pub", "secret"}
    secret = (sent.keys / "secret").read_bytes().hex()
    assert "PRIVATE" not in sent.path.read_text()
    assert secret not in sent.path.read_text()
    assert set(json.loads(sent.path.read_text())) == {
        "schema_version", "project", "alias", "kit", "public_key", "signature",
    }  # fmt: skip
    verify_kit(made / "kits" / "oak")  # the kit stays as it came


def test_second_request_is_the_same_key_and_fingerprint(sent):
    again = make_request(sent.path.parent / "oak")
    assert not again.new_key
    assert again.request.fingerprint == sent.request.fingerprint
    other = make_request(sent.path.parent / "oak", keys=sent.path.parent / "second")
    assert other.request.public_key != sent.request.public_key


def test_approved_key_is_the_one_that_flower_is_told(sent, made):
    from flwr.cli.supernode.register import try_load_public_key

    done = approve(sent.path, made, fingerprint=spoken(sent.request.fingerprint))
    assert done.news == "admitted"
    pki = coordinator_credentials(made)
    assert set(pki.site_public) == {"oak"}
    mine = site_credentials(verify_kit(sent.path.parent / "oak"))
    registered = load_public_key(pki.site_public["oak"])
    assert registered.public_bytes(*SSH) == load_public_key(mine.site_public["oak"]).public_bytes(*SSH)
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert try_load_public_key(pki.site_public["oak"]) == registered.public_bytes(*form)
    log = read_project(made).log[-1]
    assert (log.event, log.alias, log.fingerprint) == ("approve", "oak", sent.request.key_fingerprint)


def test_approving_twice_changes_nothing(sent, made):
    approve(sent.path, made)
    before = (made / "project.json").read_bytes()
    assert approve(sent.path, made).news == "known"
    assert (made / "project.json").read_bytes() == before


def test_fingerprint_that_differs(sent, made):
    refused("not the one that site 'oak' read out", approve, sent.path, made, fingerprint="0" * 32)
    assert not read_project(made).sites["oak"].public_key


def test_replaced_request_passes_every_check_but_the_telephone(sent, made, tmp_path):
    """Somebody on the way makes a request with a key of his own and the true kit."""
    theirs = make_request(kit_at_site(made, "oak", tmp_path / "thief"))
    said = spoken(sent.request.fingerprint)
    check_request(theirs.path, made)
    refused("not the one that site 'oak' read out", approve, theirs.path, made, fingerprint=said)


def test_proof_of_possession(sent, made):
    thief = ec.generate_private_key(ec.SECP384R1())
    refused("not by its own key|whoever sent it", approve, signed(sent.path, thief), made)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_value_is_noticed(sent, made, data):
    content = sent.path.read_text()
    request = json.loads(content)
    name = data.draw(st.sampled_from(["project", "alias", "kit", "public_key", "signature"]))
    place = data.draw(st.integers(0, len(request[name]) - 1))
    other = data.draw(
        st.sampled_from("0123456789abcdefGHI+/= ").filter(lambda letter: letter != request[name][place])
    )
    try:
        edited(sent.path, **{name: request[name][:place] + other + request[name][place + 1 :]})
        with pytest.raises(CredentialError):
            read_request(sent.path)
    finally:
        sent.path.write_text(content)
    read_request(sent.path)


def test_requests_that_are_none(sent, made, tmp_path):
    refused("cannot be read", approve, tmp_path / "absent", made)
    for content in (b"", b"\xff", b"[" * 100_000, b"[]", b'{"schema_version": 2}'):
        sent.path.write_bytes(content)
        refused("request", approve, sent.path, made, kind=(CredentialError, MismatchError))


def test_weak_and_other_keys(sent, made):
    weak = ec.generate_private_key(ec.SECP256R1())
    line = weak.public_key().public_bytes(*SSH).decode()
    approve(signed(sent.path, weak, public_key=line), made)  # 256 bits are enough
    commented = line + " comment"
    refused("not written as", approve, signed(sent.path, weak, public_key=commented), made, replace=True)
    edited(sent.path, public_key="ssh-ed25519 AAAA")
    refused("not an OpenSSH public key", approve, sent.path, made)


def test_other_project_unknown_alias_and_other_kit(sent, made):
    key, true = key_of(sent), sent.path.read_text()
    refused("another project than 'liver-2026'", approve, signed(sent.path, key, project="heart"), made)
    sent.path.write_text(true)
    refused("no site 'ash'", approve, signed(sent.path, key, alias="ash"), made, kind=ConfigError)
    sent.path.write_text(true)
    refused("with another kit", approve, signed(sent.path, key, kit="0" * 64), made)
    sent.path.write_text(true)
    refused("with another kit", approve, signed(sent.path, key, alias="elm"), made)


def test_older_kit_after_reissue(sent, made):
    provision(config(), made, reissue=["oak"])
    refused("with another kit", approve, sent.path, made)


def test_second_key_needs_replace(sent, made):
    approve(sent.path, made)
    second = make_request(
        sent.path.parent / "oak", keys=sent.path.parent / "new", out=sent.path.with_name("2")
    )
    refused("admitted with another key.*--replace", approve, second.path, made)
    assert approve(second.path, made, replace=True).news == "replaced"
    refused("was revoked on", approve, sent.path, made, replace=True)
    assert read_project(made).sites["oak"].public_key == second.request.public_key


def test_revoked_key_never_returns_and_a_new_one_may(sent, made):
    approve(sent.path, made)
    revoke("oak", made, "laptop stolen")
    assert coordinator_credentials(made).site_public == {}
    assert not list((made / "coordinator" / "sites").iterdir())
    entry = read_project(made).log[-1]
    assert (entry.event, entry.alias, entry.reason) == ("revoke", "oak", "laptop stolen")
    assert entry.fingerprint == sent.request.key_fingerprint
    refused("was revoked on .* stays so", approve, sent.path, made, replace=True)
    refused("not admitted", revoke, "oak", made, "again", kind=ConfigError)
    second = make_request(
        sent.path.parent / "oak", keys=sent.path.parent / "new", out=sent.path.with_name("2")
    )
    assert approve(second.path, made).news == "admitted"


def test_revoking_what_is_not_there_or_without_reason(made):
    refused("no site 'okk'. Did you mean 'oak'", revoke, "okk", made, "why", kind=ConfigError)
    for reason in ("", "  ", "x" * 501, "two\nlines"):
        refused("A reason is one line", revoke, "oak", made, reason, kind=ConfigError)


def test_key_of_another_site(sent, made, tmp_path):
    approve(sent.path, made)
    elm = kit_at_site(made, "elm", tmp_path / "other")
    shutil.copytree(sent.keys, elm.with_name("elm-keys"))
    refused("is already that of site 'oak'", approve, make_request(elm).path, made)


def test_stale_copy_of_a_key_is_taken_away(sent, made):
    """project.json alone says who is admitted, whatever a crash left in the folder of copies."""
    (made / "coordinator" / "sites" / "elm.pub").write_bytes(new_site_key("elm")[1])
    assert coordinator_credentials(made).site_public == {}
    assert not (made / "coordinator" / "sites" / "elm.pub").exists()


def test_request_needs_a_kit_in_order_and_places_outside_it(made, tmp_path):
    kit = kit_at_site(made, "oak", tmp_path / "hospital")
    refused("lie outside the kit", make_request, kit, keys=kit / "keys", kind=ConfigError)
    refused("lie outside the kit", make_request, kit, out=kit / "request.json", kind=ConfigError)
    keys = tmp_path / "keys"
    refused("never are", make_request, kit, keys=keys, out=keys / "request.json", kind=ConfigError)
    assert not keys.exists()
    (kit / "note").write_text("x")
    refused("does not name", make_request, kit)
    assert not kit.with_name("oak-keys").exists()


def test_keys_that_others_can_read(sent):
    kit = sent.path.parent / "oak"
    (sent.keys / "key").chmod(0o644)
    refused("Others on this machine", make_request, kit)
    refused("others on this machine", site_credentials, verify_kit(kit))
    sent.keys.chmod(0o755)
    refused("open to others", make_request, kit)


def test_missing_key_is_named_before_anything_starts(sent):
    (sent.keys / "key").unlink()
    refused("private key cannot be read", site_credentials, verify_kit(sent.path.parent / "oak"))


def test_kit_with_a_key_makes_no_request(tmp_path):
    central = project(tmp_path / "trial", ["oak"], keys="central").folder
    refused("holds its key already", make_request, central / "kits" / "oak", kind=ConfigError)
    pki = site_credentials(verify_kit(central / "kits" / "oak"))
    admitted = coordinator_credentials(central).site_public["oak"]
    assert load_public_key(admitted) == load_public_key(pki.site_public["oak"])


def test_two_commands_at_once(sent, made):
    with locked(made):
        refused("Another command works", approve, sent.path, made, kind=ConfigError)
    approve(sent.path, made)


def test_folder_without_a_project(sent, tmp_path):
    refused("no project in this folder", approve, sent.path, tmp_path, kind=ConfigError)
    assert not (tmp_path / ".lock").exists()
