"""One-shot container before a trial: data, keys, each hospital's `site.toml`, and the run's plan, each into its own volume.

It is the only one that sees more than one party's volumes, it has no network, and it is gone before anything else
starts. Run again it changes nothing that fits: data, keys and site.toml stay, a run that is under way stays as planned.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from client.site_config import Compute, SiteConfig, write_site_config
from common.dataset_json import DATASET_FILE
from common.errors import ConfigError, CredentialError, StorageError, WardroundError
from common.events import EventLog
from common.federation import FEDERATION_FILE, find_sites
from common.store import write_bytes
from ops.containers import places
from ops.containers.superlink import tell
from ops.containers.wanted import options_of
from ops.pki import TrialPki, check_credentials, make_trial_pki
from ops.plan import Plan, make_plan
from ops.prepare import check_sites

DEFAULT_FILE = ".default.json"
"""Which hospitals' folders the default data's settings belong to."""
NAMES = (places.FLEET_NAME, places.CONTROL_NAME)


@dataclass(frozen=True)
class Volumes:
    """Where the parties' volumes are mounted in this container.

    Attributes:
        data: Data root; each hospital's volume is mounted on its folder.
        keys: A folder for each of superlink, serverapp, trial, and each hospital.
        sites: A folder per hospital, for its site.toml.
        runs: Run folders of the coordinator.
    """

    data: Path = places.PREPARE / "data"
    keys: Path = places.PREPARE / "keys"
    sites: Path = places.PREPARE / "site"
    runs: Path = places.RUNS


def write_data(root: Path, variables: places.Variables) -> None:
    """Write the default data, unless there is data already: the subjects of three simulated hospitals.

    Args:
        root: Data root with a folder per hospital.
        variables: WARDROUND_SUBJECTS per hospital and WARDROUND_VOXEL_MM, the edge of a voxel.

    Raises:
        ConfigError: A value out of its range.
        DataError: The data cannot be made.
    """
    if (root / FEDERATION_FILE).is_file():
        if not (root / DEFAULT_FILE).is_file() or read_default(root) == fingerprints(root):
            return
        # A hospital's own folder is mounted now where the default data was: its settings are not this folder's.
        (root / FEDERATION_FILE).unlink()
        (root / DEFAULT_FILE).unlink()
    if any(root.glob(f"*/{DATASET_FILE}")):  # a hospital's own data; the settings are derived from it
        return
    from client.data.mni import write_mni_trial  # slow to import, and needed once

    aliases = sorted(path.name for path in root.iterdir() if path.is_dir())
    with tempfile.TemporaryDirectory(dir=places.SCRATCH) as scratch:
        made = Path(scratch) / "data"
        write_mni_trial(
            made,
            sites=len(aliases),
            subjects=variables.number("SUBJECTS") or 10,
            seed=variables.number("SEED") or 0,
            voxel_mm=float(variables.number("VOXEL_MM") or 4),
        )
        written = find_sites(made)
        if list(written) != aliases:
            raise ConfigError(
                f"The default data has the hospitals {', '.join(written)}, not {', '.join(aliases)}."
            )
        for alias, folder in written.items():
            shutil.copytree(folder, root / alias, dirs_exist_ok=True)
        write_bytes(root / DEFAULT_FILE, json.dumps(fingerprints(root)).encode())
        shutil.copyfile(made / FEDERATION_FILE, root / FEDERATION_FILE)  # last: now the data is whole


def fingerprints(root: Path) -> dict[str, str]:
    """Return the SHA-256 of each hospital's dataset.json by alias."""
    return {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.glob(f"*/{DATASET_FILE}"))
    }


def read_default(root: Path) -> object:
    """Return the fingerprints of the default data as it was written; nothing if they cannot be read."""
    try:
        return json.loads((root / DEFAULT_FILE).read_text(encoding="utf-8"))
    except ValueError:
        return None


def share_keys(folder: Path, aliases: list[str]) -> bool:
    """Give each party its keys, unless all have theirs and they are in order; return whether new ones were made.

    The authority's private key is never written.

    Args:
        folder: Has a folder per party.
        aliases: The hospitals.
    """
    if not _wrong_keys(folder, aliases):
        return False
    with tempfile.TemporaryDirectory(dir=places.SCRATCH) as scratch:
        pki = make_trial_pki(Path(scratch) / "pki", aliases, names=NAMES)
        for party, files in _shares(pki, aliases).items():
            for name, source in files.items():
                target = folder / party / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                shutil.copyfile(source, target)
                target.chmod(0o600)
    wrong = _wrong_keys(folder, aliases)
    if wrong:
        raise CredentialError(f"The new keys are not in order: {wrong}")
    return True


def _shares(pki: TrialPki, aliases: list[str]) -> dict[str, Mapping[str, Path]]:
    """Return who gets which file under which name."""
    public = {f"sites/{alias}.pub": pki.site_public[alias] for alias in aliases}
    shares: dict[str, Mapping[str, Path]] = {
        alias: {"key": pki.site_keys[alias], "secret": pki.site_secrets[alias], "ca.crt": pki.ca}
        for alias in aliases
    }
    own = {"server.crt": pki.server_cert, "server.key": pki.server_key, "secret": pki.server_secret}
    shares["superlink"] = {**own, "ca.crt": pki.ca}
    shares["serverapp"] = {"secret": pki.server_secret, "ca.crt": pki.ca}
    shares["trial"] = {**public, "ca.crt": pki.ca}
    return shares


def _wrong_keys(folder: Path, aliases: list[str]) -> str:
    """Return what is wrong with the keys, empty if each party has what it needs and all belong together."""
    link = folder / "superlink"
    try:
        authority = (link / "ca.crt").read_bytes()
        parties = ["serverapp", "trial", *aliases]
        if any((folder / party / "ca.crt").read_bytes() != authority for party in parties):
            return "the parties have different authorities"
        if (link / "secret").read_bytes() != (folder / "serverapp" / "secret").read_bytes():
            return "SuperLink and ServerApp have different secrets"
        check_credentials(
            ca=link / "ca.crt", cert=link / "server.crt", key=link / "server.key", names=list(NAMES)
        )
        for alias in aliases:
            public = folder / "trial" / "sites" / f"{alias}.pub"
            check_credentials(
                ca=link / "ca.crt", site_key=folder / alias / "key", site_public=public, site=alias
            )
            if not (folder / alias / "secret").read_bytes():
                return f"{alias} has no secret"
    except OSError as error:
        return f"a file is missing ({error.strerror})"
    except CredentialError as error:
        return str(error)
    return ""


def write_site_files(folder: Path, aliases: list[str], variables: places.Variables) -> None:
    """Write each hospital's site.toml where it has none: what the hospital decided stands.

    Args:
        folder: Has a folder per hospital.
        aliases: The hospitals.
        variables: WARDROUND_DEVICE and WARDROUND_THREADS.
    """
    compute = Compute(device=variables.text("DEVICE", "auto"), threads=variables.number("THREADS") or 0)
    for alias in aliases:
        path = folder / alias / places.SITE_FILE.name
        if not path.is_file():
            config = SiteConfig(
                alias=alias, data=places.DATA, socket=places.SOCKET, home=places.HOME, compute=compute
            )
            write_site_config(config, path)


def plan_run(volumes: Volumes, variables: places.Variables, console: Console) -> Plan:
    """Plan the run, or find it planned already.

    Raises:
        ConfigError: Something cannot be run, or the run's folder holds a run of another configuration.
        DataError, MismatchError: A hospital's data do not fit.
    """
    out = volumes.runs / variables.run()
    plan = replace(
        make_plan(options_of(variables), volumes.data, out, runtime="fast"),
        transport=variables.text("TRANSPORT", "file"),  # type: ignore[arg-type]
        command=f"WARDROUND_RUN={out.name} docker compose run --rm trial",
    )
    known = out / "config.json"
    if known.is_file():
        if json.loads(known.read_text(encoding="utf-8"))["config"] != plan.config.model_dump(mode="json"):
            raise ConfigError(
                f"Run '{out.name}' exists with another configuration. Choose another name: WARDROUND_RUN=NAME."
            )
        return plan
    check_sites(plan, EventLog(None, "trial"), console)
    out.mkdir(parents=True, exist_ok=True)
    plan.write()
    return plan


def prepare(volumes: Volumes, variables: places.Variables, console: Console) -> Plan:
    """Prepare everything and return the plan.

    Raises:
        WardroundError: What is wrong, in one sentence.
    """
    try:
        write_data(volumes.data, variables)
        plan = plan_run(volumes, variables, console)
        aliases = list(plan.sites)
        write_site_files(volumes.sites, aliases, variables)
        made = share_keys(volumes.keys, aliases)
    except OSError as error:
        raise StorageError(
            f"A volume cannot be written ({error.strerror or 'unknown reason'}): check its space and its owner.",
            detail=str(error),
        ) from error
    keys = "new keys" if made else "known keys"
    config = plan.config
    console.print(f"prepared: {config.method}, {config.rounds.rounds} rounds, {', '.join(aliases)}; {keys}")
    return plan


def main() -> int:
    """Prepare the trial that the environment describes."""
    try:
        prepare(Volumes(), places.Variables(), Console())
    except WardroundError as error:
        return tell(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
