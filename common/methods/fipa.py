"""FIPA: Fisher-informed parameterwise aggregation.

Reference: Chang, He, Hao: Fisher-Informed Parameterwise Aggregation for Federated Learning with Heterogeneous Data, 2026.

    Ĥ_m = U_m Λ_m U_mᵀ, the leading r eigenpairs of the site's Fisher information at the broadcast θ^k        (eq. 1, 5)
    H_m = (1/N_m) Σ_i J_iᵀ S_i J_i,   S = diag(p) − p pᵀ for softmax cross-entropy                            (eq. 4)
    θ^{k+1} = θ^k + Σ_m (N_m/N) Ĥ^† Ĥ_m Δθ_m,   Ĥ = Σ_m (N_m/N) Ĥ_m                                          (eq. 6)
    Δθ = γ (Ĥ + βI)^† b,   b = Σ_m (N_m/N) U_m Λ_m (U_mᵀ Δθ_m)                                               (eq. 13 ff.)
    subspace iteration V ← orth(H V), then Rayleigh-Ritz: common/numerics/subspace.py                         (eq. 10-12)

Any method may do the local work and the warm-up (`base`); in a FIPA round each site also sends its sketch, and the
server replaces the mean of the sketched parameters by the step above, from the Gram matrix of all sketches, which stream
from a file in blocks (common/numerics/gram.py).

Deviations from the paper:
* One convention: the paper's; `convention = "code"` is the published code's γβ (Ĥ + βI)^{-1} b. Its "orthogonal-complement
  correction" is identically zero, because b lies in the span of the sketches.
* N_m counts cases. H_m is over a fixed seeded set of un-augmented samples, normalisation layers in evaluation mode; for
  segmentation it is that of the voxelwise cross-entropy. Exact for a linear head and for few parameters.
* Warm start (`warm`): a site goes on from its last subspace; `warm = 0` is the paper.
* Adaptive rules as in the code (gradients as means, the total of the round before), clamped: common/numerics/adaptive.py.
* Beyond the paper, on: `damping`, a β that fits the scale of Ĥ, and `fallback`, the mean update where no sketch speaks
  (docs/methods/fipa.md says why; 0 and 0 is the paper). Off: `delay`, `clip`, `noise`, bf16 and int8 sketches.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from common.errors import ConfigError, PayloadError, TrainingError
from common.fisher import (
    EXACT,
    Stack,
    affordable,
    check_sketch,
    fisher_of,
    fisher_weighted,
    flatten,
    leading,
    sketch_tensors,
)  # fmt: skip
from common.method import (
    Accumulator,
    Groups,
    Method,
    MethodParams,
    Reply,
    RoundContext,
    ServerHalf,
    SiteHalf,
    SiteResult,
    SiteWork,
)
from common.numerics.adaptive import adaptive_rank, adaptive_steps
from common.numerics.quantise import Codec, clip_and_noise
from common.numerics.rng import derive_seed
from common.numerics.subspace import Eigenpairs, dense_eigenpairs
from common.payload import Kind, Payload, Payloads, PayloadSpec, Reduce, Scalar, State, Template, Tensors
from common.work import tuned

SKETCH = "sketch"
OWN = "fipa"  # namespace of what FIPA itself keeps in a half's state
SUBSET = "fipa.subset"
FROZEN = "fipa.frozen"
SECRET = "fipa.secret"
GRADIENT = "fipa.gradient"


class FIPAParams(MethodParams):
    """Parameters of FIPA."""

    rank: int = Field(default=10, ge=0, le=10_000, description="r, eigenpairs a site sends; 0 sends none")
    oversampling: int = Field(default=5, ge=0, le=10_000, description="s, columns iterated beside them")
    iterations: int = Field(default=3, ge=1, le=100, description="q, subspace iterations from a random start")
    warm: int = Field(default=1, ge=0, le=100, description="products from the last subspace; 0 starts anew")
    budget: float = Field(default=2.0, gt=0, description="epochs a warm sketch may cost; sets the samples")
    samples: int = Field(default=0, ge=0, description="training samples in the sketch; 0 follows from budget")
    subset: tuple[str, ...] = Field(
        default=("all",), min_length=1, description="parameters in the sketch: all, groups or name patterns"
    )
    rest: Literal["base", "frozen"] = Field(
        default="base",
        description="parameters outside the subset: as the base method does, or left as they are",
    )
    beta: float = Field(default=0.0, ge=0, description="β, regularisation; 0 is the pseudo-inverse")
    damping: float = Field(
        default=0.1, ge=0, description="added to β, as a share of the largest eigenvalue of Ĥ; 0 is the paper"
    )
    gamma: float = Field(default=1.0, gt=0, description="γ, step size of the server")
    convention: Literal["paper", "code"] = Field(
        default="paper", description="meaning of γ; the published code's is γβ in the paper's"
    )
    rcond: float = Field(
        default=1e-6, gt=0, lt=1, description="eigenvalues below this share of the largest count as zero"
    )
    base: str = Field(
        default="fedavg", description="method of the warm-up and of the local work", max_length=64
    )
    base_params: dict[str, Any] = Field(default_factory=dict, description="its parameters")
    warmup_rounds: int | None = Field(
        default=None, ge=0, description="rounds of the base method alone; none takes half of the run's"
    )
    lr_scale: float = Field(
        default=1.0,
        gt=0,
        description="factor on the local learning rate in FIPA rounds (published code: 0.1)",
    )
    codec: Codec = Field(default="float32", description="how U travels")
    clip: float = Field(default=0.0, ge=0, description="bound on ‖Λ^½ Uᵀ‖ of a sketch; 0 off")
    noise: float = Field(
        default=0.0, ge=0, description="standard deviation of noise on Λ^½ Uᵀ, times clip where set; 0 off"
    )
    fallback: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="φ, share of the mean update where no sketch speaks; 0 is the paper",
    )
    delay: float = Field(
        default=0.0, ge=0, le=1, description="weight per missed round of a missing site's last sketch; 0 is the paper"
    )  # fmt: skip
    adaptive: bool = Field(default=False, description="rank and local steps by the paper's adaptive rules")
    c_e: float = Field(default=1.0, gt=0, description="C_e of the adaptive rank")
    c_t: float = Field(default=0.1, gt=0, description="C_t of the adaptive local steps")
    tau_cap: int = Field(default=200, ge=1, description="most local steps of the adaptive rule")

    @model_validator(mode="after")
    def _consistent(self) -> FIPAParams:
        if self.convention == "code" and self.beta + self.damping == 0:
            raise ValueError("convention 'code' needs beta above 0: its step is γβ(H+βI)^-1 b")
        if self.adaptive and (self.clip or self.noise):
            raise ValueError("adaptive sends the gradient as it is, so clip and noise would hide nothing")
        if self.base == "fipa":
            raise ValueError("base must be another method")
        base_method(self)
        return self

    def step(self) -> dict[str, Any]:
        """Return the options of the server's step."""
        names = {"beta", "damping", "gamma", "rcond", "fallback"}
        return {**self.model_dump(include=names), "scaled": self.convention == "code"}

    def first(self, rounds: int) -> int:
        """Return the first FIPA round of a run."""
        return 1 + (rounds // 2 if self.warmup_rounds is None else self.warmup_rounds)

    def due(self, ctx: RoundContext) -> bool:
        """Tell whether a round is one of FIPA's."""
        return ctx.round >= self.first(ctx.rounds)


def base_method(params: FIPAParams) -> tuple[Method, MethodParams]:
    """Return the base method and its checked parameters.

    Raises:
        ConfigError: Unknown method or parameter, or a method that sends no mean of models.
    """
    from common.methods import get_method  # here, because the table lists this file, too

    method = get_method(params.base)
    parsed = method.parse(params.base_params)
    averaged = method.server(parsed).uplink if method.server.fold is ServerHalf.fold else ()
    if not any(spec.name == "model" and spec.reduce is Reduce.WEIGHTED_MEAN for spec in averaged):
        raise ConfigError(
            f"fipa.base '{params.base}' has no model that is averaged and nothing else, so there is nothing to aggregate. "
            "Use fedavg, fedprox, fedbn, fedper, fedrep or ditto."
        )  # fmt: skip
    return method, parsed


def sketched(params: FIPAParams, travelling: Iterable[str], groups: Groups) -> list[str]:
    """Return the names of the parameters in the sketch, in the order in which they are flattened.

    Raises:
        ConfigError: `subset` does not fit the network, or nothing of it travels.
    """
    there = set(travelling)
    return groups.select(params.subset, [name for name in groups["all"] if name in there], what="fipa.subset")


class FIPAServer(ServerHalf):
    """Server half: the base method's, and in FIPA rounds the step of eq. 6 in place of the mean."""

    uplink = (
        *ServerHalf.uplink,
        PayloadSpec(SKETCH, Kind.FISHER_SKETCH, Reduce.NONE, like_model=False, optional=True),
    )

    def __init__(self, params: FIPAParams) -> None:
        super().__init__(params)
        method, parsed = base_method(params)
        self._base = method.server(parsed)
        self.downlink = self._base.downlink
        self.uplink = (*self._base.uplink, type(self).uplink[-1]) if params.rank else self._base.uplink

    @property
    def base(self) -> ServerHalf:
        """Return the base method's half, under the run's guard."""
        self._base.robust = self.robust
        return self._base

    def travelling(self, model: Template, groups: Groups) -> Template:
        """Return what the base method lets travel."""
        return self.base.travelling(model, groups)

    def init(self, model: Tensors, groups: Groups, ctx: RoundContext) -> State:
        """Return the base method's state, with the names of the sketched parameters.

        Raises:
            ConfigError: A subset that does not fit the network, or a guard that FIPA's step would go around.
        """
        if self.params.rank and self.robust.reduce != "declared":
            raise ConfigError(
                f"guard.reduce '{self.robust.reduce}' replaces means, and fipa takes no mean of what it aggregates: the "
                "guard would protect nothing. Use another method, or guard.outlier and guard.update_norm."
            )
        state = self.base.init(model, groups, ctx)
        names = sketched(self.params, self.travelling(model, groups), groups)
        touched = {name.rpartition(".")[0] for name in names}
        frozen = [
            name
            for name in state.part("model")
            if name not in names and (name in groups["all"] or name.rpartition(".")[0] not in touched)
        ]
        return State(state.tensors, {**state.values, SUBSET: json.dumps(names), FROZEN: json.dumps(frozen)})

    def send(self, state: State, site: str, ctx: RoundContext) -> list[Payload]:
        """Return what the base method sends, with the norm of the last total gradient for the adaptive rules."""
        payloads = self.base.send(state, site, ctx)
        if self.params.adaptive and GRADIENT in state.values:
            payloads[0].meta[GRADIENT] = state.values[GRADIENT]
        return payloads

    def begin(self, state: State, ctx: RoundContext) -> Accumulator:
        """Open the round; in FIPA rounds a file for the sketches."""
        acc = self.base.begin(state, ctx)
        if self.params.due(ctx) and self.params.rank:
            names = json.loads(str(state.values[SUBSET]))
            acc.extra[OWN] = Stack(names, flatten(state.part("model"), names).to(torch.float64))
        return acc

    def check(self, reply: Reply, state: State, ctx: RoundContext) -> None:
        """Refuse a sketch that is missing, out of its round, or not of the promised form."""
        self.base.check(reply, state, ctx)
        sketch, due = reply.payloads.get(SKETCH), self.params.due(ctx) and bool(self.params.rank)
        if (sketch is not None) != due:
            raise PayloadError(
                f"{reply.site}: round {ctx.round} {'needs a' if due else 'takes no'} Fisher sketch, the answer has "
                f"{'none' if due else 'one'}. Let both ends run the same version.", site=reply.site,
            )  # fmt: skip
        if sketch is not None:
            model = state.part("model")
            size = sum(model[name].numel() for name in json.loads(str(state.values[SUBSET])))
            check_sketch(
                sketch.tensors, size, self.params.rank, self.params.codec, gradient=self.params.adaptive, who=reply.site
            )  # fmt: skip

    def fold(self, acc: Accumulator, reply: Reply) -> Accumulator:
        """Take in one reply: the base method's part, and the sketch with U_mᵀ Δθ_m."""
        payloads = dict(reply.payloads)
        sketch = payloads.pop(SKETCH, None)
        stack: Stack | None = acc.extra.get(OWN)
        if sketch is not None and stack is not None:
            tensors = dict(sketch.tensors)
            gradient = tensors.pop("g", None)
            step = flatten(payloads["model"].tensors, stack.names).to(torch.float64).sub_(stack.theta)
            stack.put(reply.site, reply.cases, tensors, step)
            if gradient is not None:
                stack.add_gradient(reply.cases, gradient)
            if self.params.delay:
                stack.sent[reply.site] = (reply.cases, tensors)
        return self.base.fold(acc, Reply(reply.site, reply.cases, payloads))

    def finish(self, state: State, acc: Accumulator, ctx: RoundContext) -> State:
        """Close the round: the base method's result, with FIPA's step for the sketched parameters."""
        stack: Stack | None = acc.extra.pop(OWN, None)
        cases = acc.cases
        after = self.base.finish(state, acc, ctx)
        if not self.params.due(ctx):
            return after
        names = json.loads(str(state.values[SUBSET]))
        old, new = state.part("model"), after.part("model")
        theta = flatten(old, names).to(torch.float64)
        mean = flatten(new, names).to(torch.float64).sub_(theta)
        if stack is not None:
            self._recall(stack, state, ctx)
            try:
                with stack.sketches as sketches:
                    step = fisher_weighted(sketches.blocks(), *stack.weigh(), mean, **self.params.step())
            except (ValueError, torch.linalg.LinAlgError) as error:
                raise PayloadError(
                    f"Round {ctx.round}: the sites' Fisher sketches cannot be combined; their values are beyond all "
                    "measure. Lower train.lr, or raise fipa's damping.", detail=str(error),
                ) from error  # fmt: skip
        elif self.params.fallback == 1:
            step = None  # the base method's result, to the bit
        else:
            step = mean * self.params.fallback
        model = dict(new)
        if self.params.rest == "frozen":
            model.update({name: old[name] for name in json.loads(str(state.values[FROZEN]))})
        if step is not None:
            moved = torch.split(theta + step, [old[name].numel() for name in names])
            for name, values in zip(names, moved, strict=True):
                model[name] = values.reshape(old[name].shape).to(old[name].dtype)
        after = after.having("model", model)
        return after if stack is None else self._remember(after, stack, cases, ctx)

    def _recall(self, stack: Stack, state: State, ctx: RoundContext) -> None:
        """Let the last sketches of missing sites keep their say, discounted by age: they ask to stay where θ is."""
        if not self.params.delay:
            return
        present = {site for site, _ in stack.sketches.ranks}
        for key in sorted(key for key in state.values if key.startswith(f"{OWN}.round/")):
            site = key.partition("/")[2]
            if site in present:
                continue
            discount = self.params.delay ** (ctx.round - int(state.values[key]))
            if discount > self.params.rcond:
                cases = int(state.values[f"{OWN}.cases/{site}"])
                stack.put(site, cases, state.part(f"{OWN}.sketch/{site}"), None, discount)

    def _remember(self, state: State, stack: Stack, cases: int, ctx: RoundContext) -> State:
        values = dict(state.values)
        if stack.gradient is not None:
            values[GRADIENT] = float(torch.linalg.vector_norm(stack.gradient / cases))
        for site, (own, tensors) in stack.sent.items():
            state = state.having(f"{OWN}.sketch/{site}", tensors)
            values |= {f"{OWN}.round/{site}": ctx.round, f"{OWN}.cases/{site}": own}
        return State(state.tensors, values)


class FIPASite(SiteHalf):
    """Site half: the base method's, and in FIPA rounds the sketch at the received model."""

    def __init__(self, params: FIPAParams) -> None:
        super().__init__(params)
        method, parsed = base_method(params)
        self.base = method.site(parsed)
        self._server = method.server(parsed)

    def init(self, work: SiteWork) -> State:
        """Return the base method's state."""
        return self.base.init(work)

    def models(self, received: Payloads, state: State) -> dict[str, Tensors]:
        """Return the base method's models."""
        return self.base.models(received, state)

    def train(self, work: SiteWork, received: Payloads, state: State) -> SiteResult:
        """Do the base method's round; in a FIPA round measure the Fisher information at θ^k first."""
        params: FIPAParams = self.params
        if not params.due(work.ctx):
            return self.base.train(work, received, state)
        whole = dict(work.model.state_dict())
        names = sketched(params, self._server.travelling(whole, work.groups), work.groups)
        if not params.rank:
            return self.base.train(self._tuned(work, names, None), received, state)
        started = time.perf_counter()
        work.load(self.base.start(received, state))
        work.progress(SKETCH)
        if params.noise and SECRET not in state.values:
            # the run's seed is known to who receives the sketch: noise drawn from it could be taken off again
            state = State(state.tensors, {**state.values, SECRET: secrets.token_hex(16)})
        try:
            sketch, basis, steps = self._sketch(work, received, names, state)
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise TrainingError(
                f"{work.ctx.site}: the Fisher information of the received model cannot be measured; its outputs or "
                "derivatives are probably not finite. Lower train.lr, or raise fipa's damping.",
                site=work.ctx.site, detail=str(error),
            ) from error  # fmt: skip
        state = state.having(OWN, {} if basis is None else {"basis": basis.to("cpu", copy=True)})
        seconds = time.perf_counter() - started
        work.progress("train")
        result = self.base.train(self._tuned(work, names, steps), received, state)
        result.payloads = [*result.payloads, sketch]
        result.seconds = {**result.seconds, SKETCH: seconds}
        return result

    def _tuned(self, work: SiteWork, names: list[str], steps: int | None) -> SiteWork:
        trainable = names if self.params.rest == "frozen" else None
        return tuned(work, lr_scale=self.params.lr_scale, steps=steps, trainable=trainable)

    def _sketch(
        self, work: SiteWork, received: Payloads, names: list[str], state: State
    ) -> tuple[Payload, Tensor | None, int | None]:
        """Return the sketch, the basis to go on from, and the local steps where the adaptive rule sets them."""
        params: FIPAParams = self.params
        size = sum(dict(work.model.named_parameters())[name].numel() for name in names)
        columns = min(params.rank + params.oversampling, size)
        wanted = params.samples or affordable(params.budget, work.samples, work.visits, columns, params.warm)
        basis, steps, extra = None, None, {}
        with work.inspecting() as network:
            operator, count = fisher_of(
                network, names, work.likelihood, work.samples, wanted=wanted, visits=work.visits
            )
            if operator.size <= EXACT:
                pairs = dense_eigenpairs(operator.dense().to(torch.float64), params.rank)
            else:
                pairs, basis = leading(
                    operator, params.rank, state.part(OWN).get("basis"), oversampling=params.oversampling, iterations=params.iterations,
                    warm=params.warm, seed=derive_seed(SKETCH, work.ctx.seed, work.ctx.site),
                )  # fmt: skip
            if params.adaptive:
                gradient = operator.gradient()
                pairs, steps = self._adapt(work, received, pairs, gradient)
                extra["g"] = gradient.to("cpu", torch.float32)
        U, lam = clip_and_noise(
            pairs.U, pairs.lam, clip=params.clip, noise=params.noise,
            seed=derive_seed("noise", str(state.values.get(SECRET, "")), work.ctx.round),
        )  # fmt: skip
        tensors = {**sketch_tensors(U, lam, params.codec), **extra}
        meta: dict[str, Scalar] = {"samples": count, "products": pairs.products}
        return Payload(SKETCH, Kind.FISHER_SKETCH, tensors, meta), basis, steps

    def _adapt(
        self, work: SiteWork, received: Payloads, pairs: Eigenpairs, gradient: Tensor
    ) -> tuple[Eigenpairs, int]:
        """Return the eigenpairs that the adaptive rule keeps, and its local steps."""
        params: FIPAParams = self.params
        number = work.ctx.round - params.first(work.ctx.rounds) + 1
        own = float(torch.linalg.vector_norm(gradient.to(torch.float64)))
        total = float(received["model"].meta.get(GRADIENT, own))
        keep = adaptive_rank(pairs.lam, number, own, total, C_e=params.c_e)
        kept = Eigenpairs(pairs.U[:keep], pairs.lam[:keep], None, pairs.products)
        rate = work.lr * params.lr_scale
        return kept, adaptive_steps(
            number, own, float(kept.lam[-1]), rate, C_t=params.c_t, cap=params.tau_cap
        )


FIPA = Method(
    name="fipa",
    title="parameters aggregated by the sites' Fisher information, after a warm-up",
    params=FIPAParams,
    server=FIPAServer,
    site=FIPASite,
    neutral={"rank": 0, "warmup_rounds": 0},
    equals="fedavg",
)
