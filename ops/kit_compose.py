"""The compose files in a startup kit: one hospital's two containers, as the repository's compose.yaml has them.

They are covered by the kit's checksums and signature, because whoever may change a compose file may do everything on
the machine that runs it. tests/docker/test_kit_compose.py compares them with the profile `site` of compose.yaml; what
differs on purpose stands there and here:

    images          named by version, never built and never fetched by themselves
    folders         lie beside the kit by default, as the kit's README lays them out
    project's name  that of the site, so that two sites can share a machine
    labels          change with kit and site.toml, so that `up` after an edit starts the container anew
    proxy           the one variable of the hospital's network that its SuperNode needs
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ops.kit import COMPOSE, COMPOSE_GPU, KitList

IMAGES = ("site-net", "worker")
LOCAL_IMAGES = "wardround"
"""Where images come from if nothing is said: this machine. A registry's prefix replaces it, e.g. reg.example.org/fl."""

_COMPOSE = """\
# Hospital "@ALIAS@" in project "@PROJECT@": connections go out to @SERVER@ only, none come in.
#
#   wardround site up @ALIAS@          checks the installation first, then starts this file
#   docker compose -f @ALIAS@/compose.yaml up --detach --wait
#
# This file belongs to the kit and stays as it is. Variables of the environment, with what they are if unset:
#
#   WARDROUND_KEYS, WARDROUND_SITE_TOML, WARDROUND_DATA      @KEYS@, ../site.toml, ../data (seen from the kit)
#   WARDROUND_IMAGES, WARDROUND_VERSION                      wardround, @VERSION@; a registry's prefix, another version
#   WARDROUND_WORKER_CPUS, _WORKER_MEMORY, _NET_MEMORY       2, 4g, 2g
#   WARDROUND_THREADS                                        1; threads of the numerics in the worker
#   WARDROUND_PROXY                                          none; http://HOST:PORT that leads to the coordinator

name: wardround-@ALIAS@

x-safe: &safe
  user: "10001:10001"
  read_only: true
  cap_drop: [ALL]
  security_opt: ["no-new-privileges:true"]
  init: true
  restart: unless-stopped
  stop_grace_period: 15s
  tmpfs: ["/tmp:size=256m,mode=1777,noexec,nosuid,nodev"]
  logging: {driver: json-file, options: {max-size: 10m, max-file: "5"}}
  # An image is brought here on purpose (docker load, docker pull). A name that is missing is an error: it must not be
  # looked up in a public registry, where it may belong to anybody.
  pull_policy: never

services:
  site-net:
    <<: *safe
    image: ${WARDROUND_IMAGES:-wardround}/site-net:${WARDROUND_VERSION:-@VERSION@}
    networks: [outside]
    labels: {wardround.kit: "${WARDROUND_KIT_SHA256:-}"}
    environment:
      # Always set, so that the SuperNode takes the proxy that is named here and no other; empty is none.
      grpc_proxy: ${WARDROUND_PROXY:-}
      no_grpc_proxy: 127.0.0.1,localhost
    volumes:
      - {type: bind, source: "${WARDROUND_KIT:-.}", target: /kit, read_only: true,
         bind: {create_host_path: false}}
      - {type: bind, source: "${WARDROUND_KEYS:-@KEYS@}", target: /keys, read_only: true,
         bind: {create_host_path: false}}
      - net:/net
      - socket:/run/wardround
    deploy: {resources: {limits: {cpus: "1", memory: "${WARDROUND_NET_MEMORY:-2g}", pids: 256}}}

  worker:
    <<: *safe
    image: ${WARDROUND_IMAGES:-wardround}/worker:${WARDROUND_VERSION:-@VERSION@}
    network_mode: none
    # `wardround site up` sets both labels: compose starts a container anew when its label changes, but not when a file does.
    labels: {wardround.site-toml: "${WARDROUND_SITE_TOML_SHA256:-}"}
    environment: {OMP_NUM_THREADS: "${WARDROUND_THREADS:-1}"}
    volumes:
      - {type: bind, source: "${WARDROUND_SITE_TOML:-../site.toml}", target: /etc/wardround/site.toml, read_only: true,
         bind: {create_host_path: false}}
      - {type: bind, source: "${WARDROUND_DATA:-../data}", target: /data, read_only: true,
         bind: {create_host_path: false}}
      - home:/var/lib/wardround
      - socket:/run/wardround
    deploy: {resources: {limits: {cpus: "${WARDROUND_WORKER_CPUS:-2}", memory: "${WARDROUND_WORKER_MEMORY:-4g}", pids: 512}}}

networks:
  outside: {}

volumes:
  home:
  net:
  socket:
    driver: local
    driver_opts: {type: tmpfs, device: tmpfs, o: "size=1m,uid=10001,gid=10001,mode=0700"}
"""

_GPU = """\
# Overlay: an NVIDIA GPU for the worker (needs the NVIDIA container toolkit and a worker image with the CUDA build).
#
#   wardround site up @ALIAS@ --gpu
#   docker compose -f @ALIAS@/compose.yaml -f @ALIAS@/compose.gpu.yaml up --detach --wait
#
# WARDROUND_GPU is the device's number or UUID, as `nvidia-smi -L` lists it; 0 if unset.

services:
  worker:
    deploy: {resources: {reservations: {devices: [{driver: nvidia, device_ids: ["${WARDROUND_GPU:-0}"], capabilities: [gpu]}]}}}
"""


def compose_files(about: KitList) -> dict[str, bytes]:
    """Return a kit's compose files by name.

    Args:
        about: What the kit is; alias, project, server and version stand in the files.
    """
    words = {
        "@ALIAS@": about.alias,
        "@PROJECT@": about.project,
        "@SERVER@": about.server,
        "@VERSION@": about.software,
        "@KEYS@": f"../{about.alias}-keys" if about.keys == "site" else "./private",
    }
    files = {}
    for name, text in ((COMPOSE, _COMPOSE), (COMPOSE_GPU, _GPU)):
        for word, value in words.items():
            text = text.replace(word, value)
        files[name] = text.encode()
    return files


def project_name(alias: str) -> str:
    """Return the compose project of a site if none is chosen."""
    return f"wardround-{alias}"


def image_names(about: KitList, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the image of each service, as compose will resolve it.

    Args:
        about: The kit's list; its version is that of the images if nothing else is said.
        environ: WARDROUND_IMAGES and WARDROUND_VERSION count; empty is unset.
    """
    prefix = environ.get("WARDROUND_IMAGES") or LOCAL_IMAGES
    return {name: f"{prefix}/{name}:{image_version(about, environ)}" for name in IMAGES}


def image_version(about: KitList, environ: Mapping[str, str]) -> str:
    """Return the version that the images must have."""
    return environ.get("WARDROUND_VERSION") or about.software


def compose_arguments(kit: Path, project: str, *, gpu: bool = False) -> list[str]:
    """Return the arguments of `docker` that choose the kit's compose files.

    Args:
        kit: The unpacked kit.
        project: Compose project.
        gpu: Add the overlay that gives the worker a GPU.
    """
    files = [COMPOSE, *([COMPOSE_GPU] if gpu else [])]
    return [
        "compose",
        "--project-name",
        project,
        *(part for name in files for part in ("-f", str(kit / name))),
    ]
