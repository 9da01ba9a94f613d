"""What each end runs, by name, so that the first exchange can refuse two ends that would misunderstand each other.

Versions of the wire, the run configuration, the data description, the method and the task are numbers that are raised
by hand when a change breaks the other end. The network's is a fingerprint of what it is made of: two installations
whose libraries build other layers under the same name differ here, before a tensor travels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import common
from common.config import RunConfig
from common.errors import MismatchError
from common.method import Method
from common.payload import Template
from common.wire import WIRE_SCHEMA

DATA_SCHEMA = 1  # dataset.json and the site's summary
TASK_SCHEMA = 1  # losses, figures and their names


def versions_of(config: RunConfig, method: Method, template: Template) -> dict[str, str]:
    """Return everything that both ends must agree on, by name.

    Args:
        config: The run's configuration.
        method: Its method.
        template: Names, shapes and dtypes of the whole network.
    """
    return {
        "wire": str(WIRE_SCHEMA),
        "configuration": str(config.version),
        "data": str(DATA_SCHEMA),
        f"task {config.data.task}": str(TASK_SCHEMA),
        f"method {method.name}": str(method.version),
        f"model {config.model.name}": fingerprint(template),
    }


def fingerprint(template: Template) -> str:
    """Return a short digest of a network's names, shapes and dtypes."""
    lines = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in sorted(template.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def require_same(ours: Mapping[str, str], theirs: Mapping[str, str], *, site: str) -> None:
    """Check that the two ends agree.

    Args:
        ours: Of this end.
        theirs: What the other end says of itself.
        site: Alias for the sentence; the other end is the coordinator at a site, and the site at the coordinator.

    Raises:
        MismatchError: The first that differs, with both values.
    """
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            shown = ascii(theirs.get(name, "nothing"))[1:-1][:40]
            raise MismatchError(
                f"{site}: {ascii(name[:60])[1:-1]} is {ours.get(name, 'nothing')} at one end and {shown} at the other "
                f"(wardround {common.__version__} here): install the same versions at both ends.",
                site=site,
            )
