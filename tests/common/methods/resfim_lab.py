"""Both halves of a method on small tables in memory, every message through wire bytes; no site, no disk, no round loop.

The round loop, the border and the state on disk have their own tests, and a few of this method's go through them. What a
method computes does not depend on them, and here a round takes milliseconds.
"""

import math

import torch

from client.trainer import Trainer
from common.config import ModelConfig
from common.errors import WardroundError
from common.method import PERSONAL, Reply, RoundContext, make_halves
from common.methods import get_method
from common.models import build_model, parameter_groups, template
from common.numerics.rng import generator
from common.payload import check_payloads
from common.tasks import get_task
from common.wire import CLOSING, ROUND, Envelope, decode, encode
from tests.harness import table_config


def table(seed, *, rows=24, shift=0.0, gain=1.0, offset=0.0):
    """Return (x, y) of three features and a noisy linear target; the first feature measured with a gain and offset."""
    drawn = generator("table", seed)
    x = torch.randn(rows, 3, generator=drawn) + shift
    noise = 0.5 * torch.randn(rows, generator=drawn)
    y = (x @ torch.tensor([1.0, -2.0, 0.5]) - shift + noise > 0).long()
    x[:, 0] = gain * x[:, 0] + offset
    return x, y


class Rows:
    """A site's training rows as the trainer draws on them."""

    def __init__(self, site, x, y):
        self.site, self.x, self.y = site, x, y
        self.counts = {"training": len(y), "validation": 0, "test": 0}

    def steps_per_epoch(self, batch_size):
        return math.ceil(len(self.y) / batch_size)

    def training_batches(self, *, seed, epoch, batch_size, augment=True):
        order = torch.randperm(len(self.y), generator=generator("order", seed, epoch))
        for part in order.split(batch_size):
            yield {"image": self.x[part], "label": self.y[part]}


class Lab:
    """Sites of a run; each keeps its state by round.

    Args:
        tables: (x, y) by alias.
    """

    def __init__(self, tables):
        self.tables = tables
        self.aliases = tuple(tables)

    def start(self, config, *, tamper=lambda alias, number, payloads: payloads):
        self.loop = Run(self, config, tamper)
        return self.loop

    def run(self, config, **options):
        loop = self.start(config, **options)
        for number in range(1, config.rounds.rounds + 1):
            loop.state = loop.round(number)
        loop.close()
        return loop


class Run:
    """One run: rounds one by one.

    Attributes:
        state: The server half's.
        seen: (alias, round, question, answer) as envelopes.
        states: The site halves', by alias and round.
        tamper: May change an answer's payloads, or lose them (None).
    """

    def __init__(self, lab, config, tamper):
        self.lab, self.config, self.tamper = lab, config, tamper
        self.server, self.half = make_halves(get_method(config.method), config)
        network = build_model(config.model, config.data, seed=config.seed)
        self.groups = parameter_groups(network)
        self.initial = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        self.like = self.server.travelling(template(network), self.groups)
        self.state = self.server.init(self.initial, self.groups, self.context(0))
        self.seen, self.states, self.personal = [], {alias: {} for alias in lab.aliases}, {}
        task = get_task(config.data, config.train)
        self.trainers = {
            alias: Trainer(
                config, Rows(alias, x, y), build_model(config.model, config.data, seed=config.seed), self.groups, task,
                device=torch.device("cpu"), amp=False, check_cancelled=lambda: None, on_progress=lambda *_: None,
            )
            for alias, (x, y) in lab.tables.items()
        }  # fmt: skip

    def context(self, number, site=""):
        return RoundContext("run", number, self.config.rounds.rounds, self.config.seed, site)

    def before(self, alias, number):
        """Return a site's newest state older than a round, or None."""
        older = [round_ for round_ in self.states[alias] if round_ < number]
        return self.states[alias][max(older)] if older else None

    def ask(self, alias, number, phase):
        context = self.context(number, alias)
        payloads = {payload.name: payload for payload in self.server.send(self.state, alias, context)}
        question = decode(encode(Envelope("run", number, phase, alias, payloads=payloads)))
        check_payloads(question.payloads, self.server.downlink, self.like, who="coordinator")
        trainer = self.trainers[alias]
        trainer.begin(context)
        state = self.before(alias, number)
        if state is None:
            trainer.load(self.initial)
            state = self.half.init(trainer)
        return question, trainer, state

    def round(self, number):
        acc = self.server.begin(self.state, self.context(number))
        for alias in self.lab.aliases:
            question, trainer, state = self.ask(alias, number, ROUND)
            result = self.half.train(trainer, question.payloads, state)
            self.states[alias][number] = result.state
            payloads = {payload.name: payload for payload in result.payloads}
            answer = decode(
                encode(Envelope("run", number, ROUND, alias, payloads=payloads, cases=result.cases))
            )
            self.seen.append((alias, number, question, answer))
            changed = self.tamper(alias, number, dict(answer.payloads))
            if changed is None:
                continue
            check_payloads(changed, self.server.uplink, self.like, who=alias)
            reply = Reply(alias, answer.cases, changed)
            self.server.check(reply, self.state, self.context(number, alias))
            acc = self.server.fold(acc, reply)
        return self.server.finish(self.state, acc, self.context(number))

    def close(self):
        """Let every site assemble its own model at the end."""
        for alias in self.lab.aliases:
            question, _, state = self.ask(alias, self.config.rounds.rounds + 1, CLOSING)
            self.seen.append((alias, self.config.rounds.rounds + 1, question, None))
            models = self.half.models(question.payloads, state)
            self.personal[alias] = models.get(PERSONAL) or next(iter(models.values()))

    def refusal(self, number):
        """Return the sentence with which a round is refused."""
        try:
            self.round(number)
        except WardroundError as error:
            return str(error)
        raise AssertionError("nothing was refused")


def config(rounds=3, *, method="pfl-resfim", hidden=(), **params):
    """Tables as they are: standardised columns look alike at all sites, and nothing would be sensitive."""
    base = table_config(method, rounds=rounds, **params)
    changes = {"data": base.data.model_copy(update={"normalise": "none"})}
    if hidden:
        changes["model"] = ModelConfig(name="mlp", hidden=hidden)
    return base.model_copy(update=changes)


def guarded(settings, **guard):
    return settings.model_copy(update={"guard": settings.guard.model_copy(update=guard)})


def advance(loop, rounds):
    for number in range(1, rounds + 1):
        loop.state = loop.round(number)
    return loop.state


def three_sites():
    """Return sites whose tables are shifted against each other."""
    return Lab(
        {name: table(place, rows=16 + 5 * place, shift=0.3 * place) for place, name in enumerate("abc")}
    )
