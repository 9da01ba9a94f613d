"""Run one trial in a process of its own, with what a fault needs: cables that can be cut, variables per process.

    python -m tests.faults.drive '{"options": {"data": D, "out": RUN, ...}, "control": FOLDER, "proxies": [SITE], ...}'

`options` are those of `ops.options.Options`; `env` (variables by process name) and `transport` are run_trial's own.
A file `cut-SITE` in the control folder, holding {"seconds": S, "hold": false}, cuts that site's cable; it becomes
`cut-SITE.begun`, and `cut-SITE.over` with {"dropped": BYTES} when the cable is whole again.
"""

import json
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

from ops.options import Options
from ops.trial import run_trial
from tests.e2e.proxy import CountingProxy
from tests.faults.tools import write_whole

LOOK_SECONDS = 0.02


class Cables:
    """One proxy per named site, made when the site's SuperNode is first given its address."""

    def __init__(self, sites, stack):
        self.sites = set(sites)
        self.stack = stack
        self.proxies = {}

    def through(self, site, address):
        """Return the address a site is told; one that is started again keeps its cable."""
        if site not in self.sites:
            return address
        host, _, port = address.rpartition(":")
        if site not in self.proxies:
            self.proxies[site] = self.stack.enter_context(CountingProxy((host, int(port))))
        self.proxies[site].target = (host, int(port))
        return f"127.0.0.1:{self.proxies[site].port}"

    def obey(self, control, ended):
        """Cut what the control folder says, until the trial ends."""
        while not ended.wait(LOOK_SECONDS):
            for site, proxy in list(self.proxies.items()):
                order = control / f"cut-{site}"
                if order.is_file():
                    before = proxy.dropped
                    proxy.cut(**json.loads(order.read_text()))
                    order.rename(control / f"cut-{site}.begun")
                    proxy.whole.wait()
                    write_whole(control / f"cut-{site}.over", {"dropped": proxy.dropped - before})


def main(argv):
    spec = json.loads(argv[0])
    options = {**spec["options"], "out": Path(spec["options"]["out"])}
    more = {key: spec[key] for key in ("env", "transport") if spec.get(key)}
    control, ended = Path(spec["control"]), threading.Event()
    control.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        cables = Cables(spec.get("proxies", ()), stack)
        threading.Thread(target=cables.obey, args=(control, ended), daemon=True).start()
        try:
            return run_trial(Options(**options), fleet=cables.through, **more)
        finally:
            ended.set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
