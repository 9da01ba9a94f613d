"""The table of contents of the methods: one import and one row each; nothing is found by scanning."""

from __future__ import annotations

from common.errors import ConfigError, nearest
from common.method import Method
from common.methods.ditto import DITTO
from common.methods.fedavg import FEDAVG
from common.methods.fedbn import FEDBN
from common.methods.fedper import FEDPER
from common.methods.fedprox import FEDPROX
from common.methods.fedrep import FEDREP
from common.methods.fipa import FIPA
from common.methods.local_only import LOCAL_ONLY
from common.methods.pfednet import PFEDNET
from common.methods.pfl_resfim import PFL_RESFIM

METHODS: dict[str, Method] = {
    method.name: method
    for method in (DITTO, FEDAVG, FEDBN, FEDPER, FEDPROX, FEDREP, FIPA, LOCAL_ONLY, PFEDNET, PFL_RESFIM)
}


def get_method(name: str) -> Method:
    """Return a registered method.

    Raises:
        ConfigError: Unknown name, with the nearest known one.
    """
    if name not in METHODS:
        raise ConfigError(f"Unknown method '{name}'. {nearest(name, METHODS)}")
    return METHODS[name]
