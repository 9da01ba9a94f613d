"""What a startup kit says to people: its README and the template of site.toml."""

from __future__ import annotations

from ops.kit import KitList

_SITE = """\
# The configuration of hospital "{alias}" in project "{project}". Read by the worker, which has the data and no network.
# This file belongs to the kit and stays as it is: copy it, edit the copy. Every key: docs/security.md and docs/data.md.
# The coordinator is not named here, because the worker never calls it; the SuperNode does: {server}

alias = "{alias}"                        # the only name the coordinator ever sees
data = "/data"                           # folder with dataset.json; `wardround site check /data` looks at it
socket = "/run/wardround/worker.sock"    # where worker and relay meet
home = "/var/lib/wardround"              # state, personal models, ledger, log: stays in the hospital

[compute]
device = "auto"                          # auto, cpu, cuda, cuda:1

[policy]                                 # decided by the hospital; the coordinator cannot change it
methods = ["*"]                          # methods this hospital takes part in, e.g. ["fedavg", "ditto"]
kinds = ["*"]                            # payload kinds that may leave
sketches = ["labels"]                    # forms of data sketches that may leave: labels, features, image, gradient
min_cases = 1                            # training cases below which nothing leaves
max_out_mb = 0                           # most that may leave in a round; 0 no limit

[privacy]
metrics = true                           # evaluation figures may leave
metrics_min_cases = 1                    # figures over fewer cases stay in
summary = "counts"                       # first answer: counts, or full (ranges of spacing, size, intensity too)
"""

_HEAD = """\
# Startup kit of site "{alias}", project "{project}"

The coordinator is called at `{server}`. Only connections out of the hospital are needed, to this one port.
{secret}
The kit ends on {expires:%Y-%m-%d}. Its files are listed with their checksums in `kit.json` and `SHA256SUMS` (for
`sha256sum -c SHA256SUMS`). Keep the folder as it is: what you make yourself lies beside it.

1. Look at the kit:

       wardround site verify {alias} --alias {alias} --server {server}

   It shows the kit's fingerprint.
"""

_OWN_KEY = """
2. Make the hospital's own key, here, and the request for its admission:

       wardround site request {alias}

   The private key lies in `{alias}-keys/` and never leaves this machine. Send the coordinator only
   `{alias}-request.json`; it holds nothing secret.

3. Call the coordinator by a number that you know (not one from the mail that brought the kit). Read out the request's
   fingerprint, eight groups of four. It covers your key and this kit; if both sides see the same one, nobody replaced
   either on the way. The coordinator approves the request.
"""

_CENTRAL_KEY = """
2. This kit holds a private key in `private/`, made by the coordinator. It is meant for trials: whoever saw the kit on its
   way can take part as this site. The coordinator should delete its own copy of the kit.

3. Call the coordinator by a number that you know and compare the kit's fingerprint, eight groups of four.
"""

_TAIL = """
4. Copy `site.toml` and decide the policy in the copy: what may leave the hospital. Its folders stay as they are: they are
   those inside the container.

       cp {alias}/site.toml site.toml

5. Bring the two images (`docker load -i FILE`, or `docker pull`), let the containers' user (uid 10001) read what it needs, and
   have everything checked. Nothing is started by this; every fault is named with its remedy:

       {rights} && chmod a+r site.toml
       sudo chown -R 10001 {private}
       wardround site check {alias} --data /srv/data

   `/srv/data` is the folder with `dataset.json` on this machine. Where an account cannot look at the key any more, it is told
   so; the same command as root looks at it, too.

6. Start the two containers, and look at them. They come back by themselves when the machine does:

       wardround site up {alias} --data /srv/data
       wardround site status {alias}
       wardround site down {alias}

   `up` and `check` take `--gpu` for an NVIDIA GPU. Behind a proxy, set `https_proxy=http://HOST:PORT` for both. Without
   `wardround` on this machine: `docker compose -f {alias}/compose.yaml up --detach --wait`; its variables are listed in the file.
   Without containers, the command lines for a service manager: `wardround site commands {alias}{keys} --config site.toml`.

If a key is lost or may have been read by others: call the coordinator at once; the key is revoked there. Then make a new
one{again}.
"""


def site_toml(about: KitList) -> bytes:
    """Return the template of a site's configuration."""
    return _SITE.format(alias=about.alias, project=about.project, server=about.server).encode()


def readme(about: KitList) -> bytes:
    """Return a kit's README.md."""
    own = about.keys == "site"
    words = {
        "alias": about.alias,
        "project": about.project,
        "server": about.server,
        "expires": about.expires,
        "secret": "The kit holds no secret."
        if own
        else "THE KIT HOLDS A PRIVATE KEY: keep it where only you can read it.",
        "rights": f"chmod -R a+rX {about.alias}" if own else f"chmod -R go= {about.alias}",
        "private": f"{about.alias}-keys" if own else about.alias,
        "keys": f" --keys {about.alias}-keys" if own else "",
        "again": f" with `wardround site request {about.alias} --keys NEW-FOLDER`"
        if own
        else ": the coordinator sends a new kit",
    }
    text = _HEAD + (_OWN_KEY if own else _CENTRAL_KEY) + _TAIL
    return text.format(**words).encode()
