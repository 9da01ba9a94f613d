"""Any method as an ordinary Flower strategy.

    from server.strategy import MethodStrategy
    result = MethodStrategy("ditto", lam=0.5, config=RunConfig(...)).start(grid, num_rounds=10)

`start` runs wardround's own round loop (one message cycle a round, deadline, quorum, streaming replies) on the grid of
any ServerApp whose sites run wardround's relay. The four hooks of Flower's base class work too, for an app that drives
its rounds by itself.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from common.config import RunConfig
from common.errors import ConfigError, WardroundError
from common.events import EventLog
from common.flower import EVALUATE, TRAIN, from_record, make_message
from common.method import Method, Reply, RoundContext, make_halves
from common.methods import get_method
from common.models import build_model, parameter_groups, template
from common.numerics.robust import cut_count
from common.payload import Tensors
from common.proto.wardround_pb2 import Phase
from common.tasks import divide
from common.versions import versions_of
from common.wire import CLOSING, ROUND, Envelope, decode, encode
from server.admitted import Admitted
from server.checkpoint import Checkpoints
from server.link import FlowerLink, Link
from server.loop import RoundLoop
from server.roster import Roster, RosterCall

log = logging.getLogger("wardround.server")


class MethodStrategy(Strategy):
    """Flower strategy that drives one registered method.

    Args:
        method: Registered method or its name.
        config: The run's configuration; its `method` and `params` are replaced by the two other arguments where given.
        run: Run identifier; random where empty.
        folder: Run folder for checkpoints, models and events; nothing is written where None.
        events: Event log; one in the run folder where None.
        **params: Parameters of the method, by the names of its paper.

    Raises:
        ConfigError: Unknown method or parameter, or a value out of its range.
    """

    def __init__(
        self,
        method: Method | str | None = None,
        *,
        config: RunConfig | None = None,
        run: str = "",
        folder: Path | None = None,
        events: EventLog | None = None,
        **params: Any,
    ) -> None:
        config = config or RunConfig()
        chosen = method if isinstance(method, Method) else get_method(method or config.method)
        if params or chosen.name != config.method:
            config = config.model_copy(update={"method": chosen.name, "params": params})
        chosen.parse(config.params)
        self.method = chosen
        self.config = config
        self.run = run or uuid.uuid4().hex[:12]
        self.events = events or EventLog(folder / "events.jsonl" if folder else None, "server", run=self.run)
        self.checkpoints = Checkpoints(folder) if folder else None
        self._admitted = Admitted(folder) if folder else lambda: None
        network = build_model(config.model, config.data, seed=config.seed)
        self.groups = parameter_groups(network)
        self.network = template(network)  # names, shapes and dtypes; the values are made when they are needed
        self.parameters = sum(value.numel() for value in network.parameters())
        # what does not fit the network is refused before any site is asked
        context = RoundContext(self.run, 0, config.rounds.rounds, config.seed)
        make_halves(chosen, config)[0].init(dict(network.state_dict()), self.groups, context)
        self.loop: RoundLoop | None = None

    def initial(self) -> Tensors:
        """Return the run's seeded network, made anew."""
        return dict(build_model(self.config.model, self.config.data, seed=self.config.seed).state_dict())

    def summary(self) -> None:
        """Log the strategy's configuration."""
        log.info("%s (%s): %s", self.method.name, self.method.title, self.config.to_json())

    def prepare(
        self, link: Link, initial: Tensors | None = None, *, patience: float | None = None
    ) -> RoundLoop:
        """Call the roster and return the loop, ready to execute.

        Args:
            link: How sites are reached.
            initial: Initial model; the seeded network where None.
            patience: Seconds to wait for every site's first answer; the configuration's where None.

        Raises:
            QuorumError, MismatchError: The sites do not suffice or do not fit.
        """
        versions = versions_of(self.config, self.method, self.network)
        call = RosterCall(link, self.run, self.config, self.events, versions, self._admitted)
        roster = call.collect(patience)
        self._check_trim(len(self.config.sites or roster.nodes))
        self.loop = self._make_loop(link, roster, initial, call)
        return self.loop

    def _check_trim(self, sites: int) -> None:
        guard = self.config.guard
        if guard.reduce == "trimmed-mean" and guard.trim and not cut_count(sites, guard.trim):
            raise ConfigError(
                f"guard.trim {guard.trim:g} of {sites} sites cuts off nobody, so the trimmed mean would protect from "
                f"nothing. Set guard.trim to at least {1 / sites:.2f}, or guard.reduce to median."
            )

    def _make_loop(
        self, link: Link, roster: Roster, initial: Tensors | None = None, call: RosterCall | None = None
    ) -> RoundLoop:
        model = initial or self.initial()
        return RoundLoop(
            link,
            roster,
            self.run,
            self.config,
            self.method,
            model,
            self.groups,
            self.events,
            self.checkpoints,
            call,
        )

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the whole federation.

        Args:
            grid: Flower's grid.
            initial_arrays: Initial model; the run's seeded network where None.
            num_rounds: Rounds; the configuration's where None.
            timeout: Seconds a round waits; the configuration's deadline where None.
            train_config: Not used: the configuration travels as one typed document.
            evaluate_config: Not used, likewise.
            evaluate_fn: Called with the final round and the final global model, if there is one.

        Returns:
            Flower's result with the final model and the sites' mean figures by round.
        """
        if train_config or evaluate_config:
            log.warning("train_config and evaluate_config are not used by wardround; set RunConfig instead")
        rounds = self.config.rounds.model_copy(
            update={
                key: value
                for key, value in (("rounds", num_rounds), ("deadline", timeout))
                if value is not None
            }
        )
        self.config = self.config.model_copy(update={"rounds": rounds})
        self.summary()
        loop = self.prepare(FlowerLink(grid), tensors_of(initial_arrays) if initial_arrays else None)
        state = loop.execute()
        result = Result()
        model = loop.server.model(state)
        if model is not None:
            result.arrays = arrays_of(model)
            if evaluate_fn and (figures := evaluate_fn(loop.done, result.arrays)) is not None:
                result.evaluate_metrics_serverapp[loop.done] = figures
        for entry in loop.history:
            number = entry.number
            if entry.losses and number <= loop.done:
                total = sum(entry.cases.values())
                mean = sum(entry.losses[site] * entry.cases[site] for site in entry.cases) / total
                result.train_metrics_clientapp[number] = MetricRecord({"loss": mean})
            if means := mean_figures(entry.metrics):
                result.evaluate_metrics_clientapp[number - 1] = MetricRecord(means)
        return result

    # The hooks of Flower's base class, for an app that drives its rounds by itself. ---------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message per site of the roster, with what the method sends it this round."""
        return self._messages(server_round, ROUND, TRAIN, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies in the fixed order of the sites and close the round.

        Raises:
            PayloadError: No reply could be used; the state is untouched.
        """
        loop = self._loop()
        context = RoundContext(self.run, server_round, self.config.rounds.rounds, self.config.seed)
        acc = loop.server.begin(loop.state, context)
        envelopes = sorted(
            self._good(replies, server_round),
            key=lambda envelope: list(loop.roster.nodes).index(envelope.site),
        )
        for envelope in envelopes:
            acc = loop.server.fold(acc, Reply(envelope.site, envelope.cases, envelope.payloads))
        loop.state = loop.server.finish(loop.state, acc, context)
        loop.tell_figures(loop.state, acc, context)
        loop.done = server_round
        total = sum(envelope.cases for envelope in envelopes)
        model = loop.server.model(loop.state)
        loss = (
            sum(envelope.loss * envelope.cases for envelope in envelopes) / total if total else float("nan")
        )
        return (arrays_of(model) if model else None), MetricRecord({"loss": loss})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return nothing before the last round: sites evaluate what they receive as part of the next round."""
        if server_round < self.config.rounds.rounds:
            return []
        return self._messages(server_round + 1, CLOSING, EVALUATE, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the sites' mean figures."""
        figures = mean_figures({envelope.site: envelope.metrics for envelope in self._good(replies)})
        return MetricRecord(figures) if figures else None

    def _messages(self, number: int, phase: Phase, kind: str, grid: Grid) -> Iterable[Message]:
        loop = self.loop or self.prepare(FlowerLink(grid))
        for site, node in loop.roster.nodes.items():
            payloads = loop.sending(number, site)
            envelope = Envelope(
                self.run,
                number,
                phase,
                site,
                rounds=self.config.rounds.rounds,
                payloads=payloads,
                config=self.config.to_json(),
            )
            yield make_message(
                encode(envelope), node=node, kind=kind, group=str(number), ttl=self.config.rounds.deadline
            )

    def _good(self, replies: Iterable[Message], number: int = 0) -> Iterable[Envelope]:
        """Yield the replies that can be used; those to a round with its payloads checked."""
        for reply in replies:
            try:
                if reply.has_error():
                    raise WardroundError(f"Flower reported error {reply.error.code}.")
                envelope = decode(from_record(reply.content))
                if envelope.failure:
                    raise WardroundError(envelope.failure[1])
                if self._loop().roster.nodes.keys().isdisjoint({envelope.site}) or envelope.run != self.run:
                    raise WardroundError("It is from no site of this run.")
                if number:
                    self._loop().check(envelope, number, ROUND, envelope.site)
            except WardroundError as error:
                log.error("a reply is left out: %s", error)
                continue
            yield envelope

    def _loop(self) -> RoundLoop:
        if self.loop is None:
            raise WardroundError("aggregate_train was called before configure_train.")
        return self.loop


def arrays_of(model: Tensors) -> ArrayRecord:
    """Return a model as Flower's record."""
    return ArrayRecord(dict(model))


def tensors_of(arrays: ArrayRecord) -> Tensors:
    """Return Flower's record as a model."""
    return dict(arrays.to_torch_state_dict())


def mean_figures(metrics: dict[str, list[Any]]) -> dict[str, int | float | list[int] | list[float]]:
    """Return each figure's unweighted mean over the sites that have it, as `split/model/figure`."""
    found: dict[str, list[float]] = {}
    for sets in metrics.values():
        for item in sets:
            for name, value in divide(item.sums).items():
                found.setdefault(f"{item.split}/{item.model}/{name}", []).append(value)
    return {name: sum(values) / len(values) for name, values in sorted(found.items())}
