# make trial   set everything up and run a three-hospital trial        make test   set everything up and run all tests
# make help    the rest
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A CPU-only machine on the open internet saves gigabytes with: make TORCH_INDEX=https://download.pytorch.org/whl/cpu ...
TORCH_INDEX ?=
PYTEST := $(BIN)/python -m pytest
ARGS ?=

.PHONY: help venv trial simulate test test-fast slow e2e docker-test images docker-trial faults soak bench check format proto clean
.DEFAULT_GOAL := help

help:  ## show this
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):[^#]*## /\1\t/' | expand -t 14

venv: $(READY)  ## make .venv from constraints.txt

$(READY): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else f"wardround needs Python 3.11 or 3.12, this is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[trial,simulation,dev]'
	$(BIN)/python -m compileall -q common server client ops
	touch $(READY)

trial: $(READY)  ## run a trial: three hospitals, TLS, keys, default data (ARGS="--method ditto --rounds 5")
	$(BIN)/wardround trial $(ARGS)

simulate: $(READY)  ## the same run in Flower's simulation runtime
	$(BIN)/wardround simulate $(ARGS)

test: test-fast slow e2e  ## all tests: fast, whole federations in one process, then those that start real processes

test-fast: $(READY)  ## the fast suite (under a minute)
	$(PYTEST) -q -n 2 -m "not slow and not e2e and not faults and not gpu and not docker and not bench" $(ARGS)

slow: $(READY)  ## whole federations in one process: what every method must do, faults, planted names
	$(PYTEST) -q -n 2 -m "slow and not gpu" $(ARGS)

e2e: $(READY)  ## real SuperLink, SuperNodes, relays and workers
	$(PYTEST) -q -m "e2e and not faults and not gpu and not docker" $(ARGS)

images:  ## build the container images (server, site-net, worker)
	docker compose build superlink site-net-1 worker-1

docker-trial:  ## the trial in containers (WARDROUND_METHOD=ditto WARDROUND_RUN=name make docker-trial); results in runs/
	code=0; docker compose run --rm trial || code=$$?; \
	if [ $$code -ne 0 ]; then docker compose logs --tail 5 prepare register; fi; \
	mkdir -p runs; docker compose cp serverapp:/runs/. runs || true; docker compose stop; exit $$code

# Without an engine of its own, the test starts one by the script that WARDROUND_ENGINE_SCRIPT names, or says that it was skipped.
docker-test: $(READY)  ## build the images, run trials in containers, break them (20 minutes)
	$(PYTEST) -q -m docker tests/docker $(ARGS)

faults: $(READY)  ## break a running federation in every way (half an hour); writes build/faults/, updates docs/reliability.md
	rm -f build/faults/results.jsonl
	$(PYTEST) -q tests/faults $(ARGS)
	$(PYTEST) -q -m faults tests/e2e/test_kits.py $(ARGS)
	$(BIN)/python -m tests.faults.table docs/reliability.md

soak: $(READY)  ## 300 rounds with three sites: growth of memory, files, processes (build/bench/soak.json)
	$(BIN)/python -m tests.faults.soak $(ARGS)

bench: $(READY)  ## measure; writes build/bench/*.json with the environment beside it
	$(BIN)/python -m tests.bench.run $(ARGS)

check: $(READY)  ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(READY)  ## let ruff tidy up; bring docs/events.md up to date
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format . ; $(BIN)/python -m ops.events_doc

proto: $(READY)  ## regenerate common/proto from wardround.proto
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. common/proto/wardround.proto

clean:  ## remove .venv, caches and build output; keeps data/ and runs/
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
