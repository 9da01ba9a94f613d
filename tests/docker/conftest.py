import os
import warnings

import pytest

from tests.docker.stack import Engine, NoEngine, Stack


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    try:
        engine = Engine(tmp_path_factory.mktemp("engine"))
    except NoEngine as reason:
        text = f"NOT TESTED: the containers, because no Docker engine can be used: {reason}"
        warnings.warn(text, stacklevel=1)
        pytest.skip(text)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def stack(engine):
    """The project with its images built; containers and volumes are taken away at the end."""
    stack = Stack(engine, f"wardround-test-{os.getpid()}")
    stack.compose("build", "worker-1", "superlink", "site-net-1", timeout=1500)
    yield stack
    stack.down()
