"""A provisioned project in a temporary folder, for tests."""

import shutil
from pathlib import Path

from ops.provision import provision
from ops.provision_project import ProjectConfig

NAMES = ("fl.example.org", "192.0.2.7")


def config(sites=("oak", "elm"), **changes):
    described = {
        "name": "liver-2026",
        "coordinator": {"names": NAMES, "port": 9092},
        "sites": [{"alias": alias, "contact": f"desk of {alias}"} for alias in sites],
    }
    return ProjectConfig.model_validate(described | changes)


def project(folder, sites=("oak", "elm"), **changes):
    return provision(config(sites, **changes), folder)


def kit_at_site(made: Path, alias: str, site: Path) -> Path:
    """Carry a kit to the site."""
    return Path(shutil.copytree(made / "kits" / alias, site / alias))


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
