"""Any method is an ordinary Flower strategy: `start` on a grid, and the four hooks of the base class."""

import itertools

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message

from client.worker import failure
from common.errors import ConfigError, WardroundError
from common.flower import from_record, to_record
from common.store import tensor_bytes
from server.strategy import MethodStrategy, tensors_of
from tests.harness import Federation, table_config


class SitesGrid:
    """A Flower grid whose nodes are sites of this process; Flower's own messages go in and come out."""

    def __init__(self, sites):
        self.sites = list(sites.values())
        self.replies = {}
        self.numbers = itertools.count(1)

    def get_node_ids(self):
        return range(1, len(self.sites) + 1)

    def push_messages(self, messages):
        identifiers = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{next(self.numbers)}"
            message.metadata.__dict__["_src_node_id"] = 1
            site = self.sites[message.metadata.dst_node_id - 1]
            try:
                answer = site.handle(from_record(message.content), lambda: None)
            except Exception as error:
                answer = failure(error, site.alias)
            self.replies[message.metadata.message_id] = Message(
                to_record(answer, {"cpu_s": 0.1}), reply_to=message
            )
            identifiers.append(message.metadata.message_id)
        return identifiers

    def pull_messages(self, message_ids):
        return [
            self.replies.pop(identifier) for identifier in list(message_ids) if identifier in self.replies
        ]


@pytest.fixture
def federation(tmp_path):
    return Federation(tmp_path)


def config(federation, method="fedavg", **params):
    return table_config(method, **params).model_copy(update={"sites": federation.aliases})


@pytest.mark.parametrize("method", ["fedavg", pytest.param("ditto", marks=pytest.mark.slow)])
def test_start_on_a_grid_equals_the_loop(federation, method):
    loop = federation.run(config(federation, method), home="loop")
    grid = SitesGrid(federation.open_sites("grid"))
    result = MethodStrategy(
        method, config=config(federation, method), folder=federation.root / "grid-server"
    ).start(grid)
    assert tensor_bytes(tensors_of(result.arrays)) == tensor_bytes(loop.server.model(loop.state))
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3]
    assert sorted(result.evaluate_metrics_clientapp) == [0, 1, 2, 3]
    assert "test/global/balanced_accuracy" in result.evaluate_metrics_clientapp[3]


def test_start_takes_flowers_own_arguments(federation):
    grid = SitesGrid(federation.open_sites())
    strategy = MethodStrategy("fedavg", config=config(federation))
    initial = ArrayRecord({name: tensor + 1 for name, tensor in strategy.initial().items()})
    seen = []
    result = strategy.start(
        grid, initial_arrays=initial, num_rounds=1, evaluate_fn=lambda number, arrays: seen.append(number)
    )
    assert seen == [1]
    assert sorted(result.train_metrics_clientapp) == [1]
    other = MethodStrategy("fedavg", config=config(federation)).start(
        SitesGrid(federation.open_sites("b")), num_rounds=1
    )
    assert tensor_bytes(tensors_of(result.arrays)) != tensor_bytes(tensors_of(other.arrays))


def test_the_hooks_give_the_same_model_as_start(federation):
    whole = MethodStrategy("fedavg", config=config(federation)).start(SitesGrid(federation.open_sites("a")))
    grid = SitesGrid(federation.open_sites("b"))
    strategy = MethodStrategy("fedavg", config=config(federation))
    arrays, empty = ArrayRecord(strategy.initial()), ConfigRecord()
    for number in (1, 2, 3):
        ids = grid.push_messages(list(strategy.configure_train(number, arrays, empty, grid)))
        replies = grid.pull_messages(ids)
        arrays, metrics = strategy.aggregate_train(number, reversed(replies))
        assert metrics["loss"] > 0
        ids = grid.push_messages(list(strategy.configure_evaluate(number, arrays, empty, grid)))
        assert len(ids) == (3 if number == 3 else 0)
        figures = strategy.aggregate_evaluate(number, grid.pull_messages(ids))
        assert (figures is None) == (number < 3)
    assert tensor_bytes(tensors_of(arrays)) == tensor_bytes(tensors_of(whole.arrays))


def test_a_bad_reply_is_left_out_and_an_empty_round_changes_nothing(federation, caplog):
    grid = SitesGrid(federation.open_sites())
    strategy = MethodStrategy("fedavg", config=config(federation))
    ids = grid.push_messages(
        list(strategy.configure_train(1, ArrayRecord(strategy.initial()), ConfigRecord(), grid))
    )
    replies = grid.pull_messages(ids)
    bad = Message(to_record({"head": b"nothing"}), reply_to=replies[0])
    before = tensor_bytes(strategy.loop.state.tensors)
    with pytest.raises(WardroundError, match="no site contributed"):
        strategy.aggregate_train(1, [bad])
    assert tensor_bytes(strategy.loop.state.tensors) == before
    arrays, _ = strategy.aggregate_train(1, [bad, *replies[1:]])
    assert arrays is not None
    assert "left out" in caplog.text


def test_parameters_are_checked_at_once():
    with pytest.raises(ConfigError, match="Did you mean 'mu'"):
        MethodStrategy("fedprox", muu=0.1)
    with pytest.raises(ConfigError, match="greater than or equal to 0"):
        MethodStrategy("fedprox", mu=-1)
    assert MethodStrategy("fedprox", config=table_config(), mu=0.3).config.params == {"mu": 0.3}
