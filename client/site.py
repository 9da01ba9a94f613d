"""A hospital's side of the conversation: what the worker does with a message that the relay brought.

The site decides by its own policy, works on its own data, keeps its own state, and answers with payloads its policy
lets out. It holds one session: the run it is in, with decoded volumes, network and trainer kept warm between messages.
"""

from __future__ import annotations

import logging
import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import common
from client import policy
from client.border import Border
from client.data.dataset import SiteDataset
from client.site_config import SiteConfig
from client.site_data import SiteData
from client.slices import save_slices, save_styles
from client.state import SiteStates, join_states, split_state
from client.trainer import Trainer
from common.compress import Compression
from common.config import RunConfig
from common.downlink import keep
from common.errors import CancelledError, DataError, MismatchError, PayloadError, safe_sentence
from common.events import EventLog
from common.frames import Parts
from common.method import PERSONAL, Method, RoundContext, ServerHalf, SiteHalf, make_halves
from common.methods import get_method
from common.models import build_model, parameter_groups, template
from common.payload import State, Tensors
from common.store import write_tensors
from common.tasks import get_task
from common.versions import require_same, versions_of
from common.wire import CLOSING, HELLO, PING, ROUND, Envelope, MetricSet, decode, encode

SLICES = 3
PROGRESS_SECONDS = 0.25
_RUN_ID = re.compile(r"[A-Za-z0-9._-]{1,80}")
log = logging.getLogger("wardround.worker")


@dataclass
class Session:
    """The run a site is in."""

    run: str
    text: str
    config: RunConfig
    method: Method
    server: ServerHalf
    half: SiteHalf
    dataset: SiteDataset
    trainer: Trainer
    template: Tensors
    network: Tensors
    states: SiteStates
    compression: Compression


class Site:
    """One hospital.

    Args:
        config: The hospital's own configuration.
        events: Where it tells what it does.
    """

    def __init__(self, config: SiteConfig, events: EventLog) -> None:
        self.config = config
        self.alias = config.alias
        self.events = events
        self.device = choose_device(config.compute.device)
        self.border = Border(config)
        self.busy: tuple[str, int] = ("", 0)
        self._asked: tuple[str, int, int] = ("", 0, HELLO)
        self._seconds: dict[str, float] = {}
        self._session: Session | None = None
        self.data = SiteData(config.alias, config.data, config.compute.cache_mb << 20)
        self._check_cancelled: Callable[[], None] = lambda: None
        self._last_progress = ("", 0.0)

    def handle(self, parts: Parts, check_cancelled: Callable[[], None], *, consume: bool = False) -> Parts:
        """Answer one message.

        Args:
            parts: The message.
            check_cancelled: Raises CancelledError when nobody waits for the answer any more.
            consume: Empty `parts` once they are decoded: a large model is then here once.

        Raises:
            WardroundError: Whatever keeps the site from its part; the caller turns it into a failure answer.
        """
        started = time.perf_counter()
        self._check_cancelled = check_cancelled
        self._asked = ("", 0, HELLO)  # until it is known: a message that cannot be read belongs to no run
        envelope = self.border.receive(parts, self._kept)
        if consume:
            parts.clear()
        self._asked = (envelope.run, envelope.round, envelope.phase)
        if envelope.software != common.__version__:
            raise MismatchError(
                f"{self.alias}: the coordinator runs wardround {envelope.software[:40]}, this site {common.__version__}; "
                "install the same version.", site=self.alias,
            )  # fmt: skip
        if envelope.phase != HELLO and envelope.site != self.alias:
            raise MismatchError(
                f"{self.alias}: the message is for site '{ascii(envelope.site[:64])[1:-1]}'; give the SuperNode the site's "
                "own alias.", site=self.alias,
            )  # fmt: skip
        answers = {HELLO: self._hello, ROUND: self._round, CLOSING: self._closing}
        if envelope.phase not in answers:
            raise PayloadError(
                f"{self.alias}: the message has the unknown phase {envelope.phase}.", site=self.alias
            )
        self._seconds = {"decode": time.perf_counter() - started}
        self.busy = (envelope.run, envelope.round)
        try:
            reply = answers[envelope.phase](envelope)
            reply.seconds.update(self._seconds)
            encode_started = time.perf_counter()
            answer = self._release(reply, envelope)
        finally:
            self.busy = ("", 0)
        self._tell_done(envelope, time.perf_counter() - encode_started)
        return answer

    def ping(self, parts: Parts) -> Parts:
        """Say which round the site works on now (0: none). Answered beside work in progress; carries nothing else."""
        envelope = decode(parts)
        run, round_ = self.busy
        return encode(Envelope(envelope.run, round_ if run == envelope.run else 0, PING, self.alias))

    def failed(self, parts: Parts) -> None:
        """Note an answer that only says why there is none."""
        self.border.failed(*self._asked, parts)

    def close(self) -> None:
        """Let another worker have this site."""
        self.border.close()

    def _hello(self, envelope: Envelope) -> Envelope:
        config = RunConfig.from_json(envelope.config)
        method = get_method(config.method)
        policy.take_part(self.config.policy, self.alias, method, make_halves(method, config)[0].uplink)
        self._require_same_versions(envelope, config, method)
        self._phase(0, "check")
        check = self.data.check(config.data)
        check.raise_errors()
        self._phase(0, "load")
        session = self._open(envelope.run, envelope.config)
        cases = session.dataset.counts["training"]
        policy.enough_cases(self.config.policy, self.alias, cases)
        summary = check.summary()
        if self.config.privacy.summary == "counts":
            summary = summary.counts_only()
        versions = versions_of(session.config, session.method, session.network)
        return self._reply(envelope, summary=summary.model_dump_json(), cases=cases, versions=versions)

    def _require_same_versions(self, envelope: Envelope, config: RunConfig, method: Method) -> None:
        network = template(build_model(config.model, config.data, seed=config.seed))
        require_same(versions_of(config, method, network), envelope.versions, site=self.alias)

    def _round(self, envelope: Envelope) -> Envelope:
        session = self._open(envelope.run, envelope.config)
        trainer, half = session.trainer, session.half
        state, kept = self._begin(envelope, session)
        clock = Clock()
        self._phase(envelope.round, "evaluate")
        hd95 = session.config.rounds.hd95 == "always"
        metrics = [
            self._evaluate(trainer, name, weights, "validation", envelope.round - 1, hd95=hd95)
            for name, weights in half.models(envelope.payloads, state).items()
            if session.dataset.counts["validation"]
        ]
        clock.lap("evaluate")
        self._phase(envelope.round, "train")
        result = half.train(trainer, envelope.payloads, state)
        clock.lap("train")
        for phase, seconds in result.seconds.items():
            clock.move("train", phase, seconds)
        payloads, kept = self.border.compress(
            {payload.name: payload for payload in result.payloads},
            envelope.payloads, session.server.uplink, session.compression, kept, self._context(envelope, session),
        )  # fmt: skip
        kept = keep(session.compression, kept, envelope.payloads, session.server.downlink, envelope.round)
        if session.compression.lossy_up:
            clock.lap("compress")
        session.states.write(
            envelope.round,
            join_states(method=result.state, optimizer=trainer.optimizer_state(), codec=kept),
        )
        clock.lap("save")
        if self._draw(session, envelope, result.state):
            clock.lap("draw")
        loss = result.stats.loss if result.stats else float("nan")
        return self._reply(
            envelope, payloads=payloads, metrics=metrics, cases=result.cases, loss=loss, seconds=clock.seconds
        )

    def _begin(self, envelope: Envelope, session: Session) -> tuple[State, State]:
        """Check what came, bring the trainer to the round's start, and return the method's and the codec's state there."""
        self._accept(envelope, session)
        session.trainer.begin(self._context(envelope, session))
        saved = session.states.before(envelope.round)
        session.trainer.restore_optimizer(split_state(saved, "optimizer") if saved else State())
        if saved:
            return split_state(saved, "method"), split_state(saved, "codec")
        # A first round that is asked again finds the network trained: the method starts from the seeded one.
        config = session.config
        session.trainer.load(build_model(config.model, config.data, seed=config.seed).state_dict())
        return session.half.init(session.trainer), State()

    def _closing(self, envelope: Envelope) -> Envelope:
        session = self._open(envelope.run, envelope.config)
        trainer, half = session.trainer, session.half
        state, _ = self._begin(envelope, session)
        clock = Clock()
        self._phase(envelope.round, "evaluate")
        models = half.models(envelope.payloads, state)
        hd95 = session.config.rounds.hd95 != "never"
        metrics = [
            self._evaluate(trainer, name, weights, split, envelope.round - 1, hd95=hd95)
            for split in ("validation", "test")
            if session.dataset.counts[split]
            for name, weights in models.items()
        ]
        clock.lap("evaluate")
        self._keep(session, models, envelope)
        clock.lap("save")
        return self._reply(
            envelope, metrics=metrics, cases=session.dataset.counts["training"], seconds=clock.seconds
        )

    def _keep(self, session: Session, models: dict[str, Tensors], envelope: Envelope) -> None:
        """Save the hospital's own model and example slices; neither leaves."""
        best = models.get(PERSONAL) or next(iter(models.values()))
        if PERSONAL in models:
            folder = self.config.models or self.config.home / "models"
            name = f"personal-{self.alias}.safetensors"
            notes = {
                "method": session.config.method,
                "seed": str(session.config.seed),
                "site": self.alias,
                "round": str(envelope.round - 1),
            }
            size = write_tensors(folder / name, models[PERSONAL], notes)
            self.events.emit("model.saved", name=name, bytes=size, round=envelope.round - 1)
        split = "test" if session.dataset.counts["test"] else "validation"
        if session.dataset.counts[split]:
            count = save_slices(
                self.config.home / "slices", session.dataset, session.trainer, best, split=split, count=SLICES
            )
            self.events.emit("slices.saved", round=envelope.round - 1, count=count)

    def _draw(self, session: Session, envelope: Envelope, state: State) -> int:
        """Save what the method shows the hospital of its round, and return how many pictures that are.

        None of it leaves, and no failure costs the round.
        """
        try:
            pictures = session.half.pictures(session.trainer, envelope.payloads, state)
            count = save_styles(self.config.home / "styles", pictures, spacing=session.config.data.spacing)
        except CancelledError:
            raise
        except Exception as error:  # the round is whole, and a picture less is no reason to lose it
            log.warning("pictures were not drawn", exc_info=error)
            code, sentence = safe_sentence(error)
            message = f"Pictures of other sites' styles were not drawn: {sentence}"
            self.events.emit("warning", code=code, message=message, round=envelope.round)
            return 0
        if count:
            self.events.emit("styles.saved", round=envelope.round, count=count)
        return count

    def _open(self, run: str, text: str) -> Session:
        """Return the session of a run; a restarted worker builds it again from the message alone."""
        if self._session and self._session.run == run and self._session.text == text:
            return self._session
        states = self._states(run)
        config = RunConfig.from_json(text)
        method = get_method(config.method)
        server, half = make_halves(method, config)
        policy.take_part(self.config.policy, self.alias, method, server.uplink)
        dataset = self.data.open(config.data)
        network = build_model(config.model, config.data, seed=config.seed)
        groups = parameter_groups(network)
        trainer = Trainer(
            config, dataset, network, groups, get_task(config.data, config.train),
            device=self.device, amp=self._amp(), check_cancelled=lambda: self._check_cancelled(), on_progress=self._progress,
        )  # fmt: skip
        whole = template(network)
        travelling = dict(server.travelling(whole, groups))
        compression = Compression(config.wire, travelling, groups)
        self._session = Session(
            run, text, config, method, server, half, dataset, trainer, travelling, whole, states, compression
        )
        return self._session

    def _states(self, run: str) -> SiteStates:
        if not _RUN_ID.fullmatch(run) or run.startswith("."):
            raise PayloadError(
                f"{self.alias}: the run's identifier has characters that are not allowed.", site=self.alias
            )
        return SiteStates(self.config.home / "state" / run)

    def _kept(self, envelope: Envelope) -> State:
        """Return what compression left of the rounds before a message's; asked for before it is noted what came."""
        self._asked = (envelope.run, envelope.round, envelope.phase)
        saved = self._states(envelope.run).before(envelope.round)
        return split_state(saved, "codec") if saved else State()

    def _accept(self, envelope: Envelope, session: Session) -> None:
        """Check what came down before anything is done with it."""
        if not 1 <= envelope.round <= session.config.rounds.rounds + 1:
            raise PayloadError(f"{self.alias}: round {envelope.round} is no round.", site=self.alias)
        specs = session.server.downlink
        self.border.accept(envelope.payloads, specs, session.template, session.config.guard)

    def _release(self, reply: Envelope, envelope: Envelope) -> Parts:
        """Hand an answer to the border: what leaves is decided and noted there."""
        session = self._open(envelope.run, envelope.config)
        specs = session.server.uplink
        return self.border.release(reply, envelope.payloads, specs, session.template, session.config.guard)

    def _amp(self) -> bool:
        choice = self.config.compute.amp
        return choice == "on" or (choice == "auto" and self.device.type == "cuda")

    def _evaluate(
        self, trainer: Trainer, name: str, weights: Tensors, split: str, round_: int, *, hd95: bool
    ) -> MetricSet:
        sums, cases = trainer.evaluate(weights, split, hd95=hd95)
        return MetricSet(round_, split, name, cases, sums, trainer.task.primary)

    def _context(self, envelope: Envelope, session: Session) -> RoundContext:
        return RoundContext(
            envelope.run, envelope.round, session.config.rounds.rounds, session.config.seed, self.alias
        )

    def _reply(self, envelope: Envelope, **fields: object) -> Envelope:
        return Envelope(
            envelope.run,
            envelope.round,
            envelope.phase,
            self.alias,
            rounds=envelope.rounds,
            device=self.device.type,
            **fields,  # type: ignore[arg-type]
        )

    def _phase(self, round_: int, phase: str) -> None:
        self.events.emit("phase", round=round_, phase=phase)
        self._last_progress = (phase, time.monotonic())

    def _progress(self, phase: str, step: int, steps: int) -> None:
        last_phase, when = self._last_progress
        now = time.monotonic()
        if phase != last_phase or now - when >= PROGRESS_SECONDS:
            self.events.emit("phase", phase=phase, step=step, steps=steps)
            self._last_progress = (phase, now)

    def _tell_done(self, envelope: Envelope, encode_seconds: float) -> None:
        self._phase(envelope.round, "idle")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        gpu = torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else None
        self.events.emit("memory", name="worker", rss=resident_mb(), peak=peak, gpu=gpu, round=envelope.round)


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Book the time since the last lap on a phase."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def move(self, phase: str, other: str, seconds: float) -> None:
        """Book seconds of a phase on another one."""
        self.seconds[phase] -= seconds
        self.seconds[other] = self.seconds.get(other, 0.0) + seconds


def choose_device(name: str) -> torch.device:
    """Return the torch device a site's configuration means.

    Raises:
        DataError: CUDA was asked for and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise DataError(
            f"The site's configuration asks for device '{name}', which this machine does not have. Use 'auto' or 'cpu'."
        )
    return device


def resident_mb() -> float:
    """Return this process's resident memory in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20
