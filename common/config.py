"""The configuration of a run: one frozen document, refused where it is wrong, that travels to every site.

`RunConfig` is what the coordinator decides; `SiteConfig` (client/site_config.py) is what a hospital decides. A key
nobody knows is an error that names the nearest known one. Keys are written in Python's snake_case; kebab-case is
accepted at the command line and in files.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from common.errors import ConfigError, nearest

SCHEMA_VERSION: Literal[1] = 1
T = TypeVar("T", bound=BaseModel)

LONGEST_TEXT = 80
DEEPEST = 100
YEAR = 365 * 86_400

TaskName = Literal["segmentation", "classification", "tabular"]
Size = Annotated[int, Field(ge=1, le=1_000_000)]
Spacing = Annotated[float, Field(gt=0)]


def brief(text: str, limit: int = LONGEST_TEXT) -> str:
    """Return text of unknown origin as it may stand in a sentence: short, and nothing in it steers a terminal.

    Args:
        text: A key, a name or a value as it was read.
        limit: Characters kept.
    """
    cut = text[:limit]
    if not cut.isprintable():
        cut = ascii(cut)[1:-1][:limit]
    return cut if len(text) <= limit else f"{cut}..."


def _printable(text: str) -> str:
    if not text.isprintable() or not 0 < len(text) <= LONGEST_TEXT:
        raise ValueError(f"a name needs 1 to {LONGEST_TEXT} printable characters")
    return text


Name = Annotated[str, AfterValidator(_printable)]
Alias = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Strict(BaseModel):
    """Frozen pydantic model that refuses unknown keys and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(Strict):
    """What every site's data must look like, and how it is brought to the network."""

    task: TaskName = "segmentation"
    spatial_dims: Literal[0, 2, 3] = Field(default=3, description="3 volumes, 2 pictures, 0 tables")
    channels: tuple[Name, ...] = Field(
        default=("T1",), description="input channels (modalities), or the table's features"
    )
    labels: tuple[Name, ...] = Field(
        default=("background", "foreground"), description="class names; index = label value"
    )
    spacing: tuple[Spacing, ...] | None = Field(
        default=None, description="target voxel spacing in mm; none keeps each site's own"
    )
    orientation: Name | None = Field(
        default=None, description="axis codes that volumes are brought to, e.g. RAS; none keeps"
    )
    patch: tuple[Size, ...] = Field(
        default=(32, 32, 32), description="training patch (also sliding window) in voxels"
    )
    patches_per_case: int = Field(
        default=2, ge=1, le=100_000, description="patches drawn from a case per visit"
    )
    foreground_ratio: float = Field(
        default=0.5, ge=0, le=1, description="share of patches centred on a labelled voxel"
    )
    normalise: Literal["case", "case-nonzero", "range", "none"] = Field(
        default="case",
        description="z-score per case and channel, over all or non-zero voxels; 0-255 to 0-1; or as is",
    )
    augment: bool = Field(default=True, description="random flips and small intensity changes")
    missing: Literal["median", "zero"] = Field(
        default="median", description="tables: missing values, filled with the site's own"
    )
    spacing_tolerance: float = Field(
        default=0.0, ge=0, description="refuse a case whose spacing is off by more than this ratio; 0 off"
    )

    @model_validator(mode="after")
    def _dimensions(self) -> Self:
        if self.task != "tabular" and self.spatial_dims == 0:
            raise ValueError("spatial_dims 0 is for task tabular")
        if self.spatial_dims and len(self.patch) != self.spatial_dims:
            raise ValueError(f"patch has {len(self.patch)} sizes, spatial_dims is {self.spatial_dims}")
        if self.spacing is not None and len(self.spacing) != self.spatial_dims:
            raise ValueError(f"spacing has {len(self.spacing)} values, spatial_dims is {self.spatial_dims}")
        if len(self.labels) < 2:
            raise ValueError("labels needs at least two classes")
        if not self.channels:
            raise ValueError("channels needs at least one name")
        for what, names in (("channels", self.channels), ("labels", self.labels)):
            if len(set(names)) < len(names):
                raise ValueError(f"{what} names one twice")
        return self


class ModelConfig(Strict):
    """The network, by name, with its sizes."""

    name: Name = Field(default="auto", description="auto takes the task's default; see common/models")
    width: int = Field(default=16, ge=1, le=4096, description="channels of the first level")
    levels: int = Field(default=3, ge=2, le=6, description="resolution levels of a U-shaped net")
    norm: Literal["auto", "instance", "batch", "group", "none"] = Field(
        default="auto",
        description="normalisation layers; auto: instance for segmentation, batch for classification",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1)
    hidden: tuple[Size, ...] = Field(default=(32,), max_length=1000, description="hidden layers of the MLP")


class TrainConfig(Strict):
    """Local training."""

    local_epochs: int = Field(default=1, ge=1, le=100_000, description="visits of each local case per round")
    batch_size: int = Field(default=4, ge=1, le=100_000, description="patches or rows per step")
    optimizer: Literal["adam", "sgd", "adamw"] = "adam"
    lr: float = Field(default=1e-3, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1, description="sgd")
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float = Field(default=0.0, ge=0, description="gradient norm bound; 0 off")
    optimizer_state: Literal["fresh", "kept"] = Field(
        default="fresh", description="restart the optimiser every round, or keep it"
    )
    class_weights: tuple[float, ...] | None = None


class RoundConfig(Strict):
    """The federation's rhythm."""

    rounds: int = Field(default=3, ge=1, le=1_000_000)
    quorum: float = Field(default=1.0, gt=0, le=1, description="share of the sites a round needs")
    deadline: float = Field(default=3600.0, gt=0, le=YEAR, description="seconds a round waits for its sites")
    ready_timeout: float = Field(
        default=300.0, gt=0, le=YEAR, description="seconds the run waits for every site's first answer"
    )
    retries: int = Field(
        default=3, ge=0, le=1_000_000,
        description="how often a site that cannot be reached is asked again in a round that can do without it; "
        "without it a round that cannot asks until the deadline",
    )  # fmt: skip
    retry_wait: float = Field(
        default=2.0, gt=0, le=60, description="seconds before the first repetition; doubles up to 60"
    )
    probe: float = Field(
        default=20.0,
        gt=0,
        le=YEAR,
        description="seconds of silence after which a site is asked whether it still works on the round",
    )
    sample: float = Field(
        default=1.0, gt=0, le=1, description="share of the sites asked in a round, drawn with the run's seed"
    )
    poll: float = Field(default=0.05, gt=0, le=3600, description="seconds between looks for replies")
    hd95: Literal["never", "end", "always"] = Field(
        default="end", description="when the slow surface distance is computed"
    )


class GuardConfig(Strict):
    """What the coordinator refuses to let into the global model, whatever the method."""

    reduce: Literal["declared", "median", "trimmed-mean"] = Field(
        default="declared",
        description="replaces the case-weighted mean: coordinate-wise median or trimmed mean over the sites",
    )
    trim: float = Field(default=0.2, ge=0, lt=0.5, description="share of the sites cut off at each end")
    update_ratio: float = Field(
        default=100.0, ge=0,
        description="refuse an update whose norm is above this multiple of the model's (at least 1); 0 off",
    )  # fmt: skip
    update_norm: float = Field(default=0.0, ge=0, description="refuse an update above this L2 norm; 0 off")
    outlier: float = Field(
        default=0.0, ge=0,
        description="refuse an update whose norm is above this multiple of the sites' median norm of the round "
        "(three sites or more); 0 off",
    )  # fmt: skip
    rms: float = Field(
        default=1e6,
        ge=0,
        description="refuse a tensor whose root mean square is above this, both ways; 0 off",
    )


class WireConfig(Strict):
    """How models travel: as they are, or compressed (docs/wire.md, common/compress.py). Works with any method."""

    uplink_codec: Literal["raw", "stc", "stc-golomb", "cer", "cer-bf16", "cer-stc", "float16", "bf16"] = (
        Field(
            default="raw",
            description="sites' changes of the model: as they are; stc: sparse ternary with error feedback; cer: piecewise "
            "constant (pFedNet), values in float32 or bf16, or made sparse ternary too; float16, bf16: half precision",
        )
    )
    uplink_p: float = Field(
        default=0.01, gt=0, le=1, description="stc, cer-stc: share of each tensor's values that is sent"
    )
    gamma: float = Field(
        default=0.001, ge=0, description="cer: weight of the differences of neighbours; 0 changes nothing"
    )
    gamma_scale: Literal["absolute", "relative"] = Field(
        default="relative",
        description="cer: gamma as it is, or as share of each tensor's largest cumulative sum (1 and more give zeros)",
    )
    gamma_schedule: Literal["constant", "linear", "sqrt"] = Field(
        default="constant",
        description="cer: gamma in every round; falling to 0 in the last one; or divided by the root of the round",
    )
    feedback: Literal["stc", "all"] = Field(
        default="stc",
        description="what a site adds to its next change: what stc left out; or also what cer and rounding took away",
    )
    downlink_codec: Literal["raw", "stc", "stc-golomb", "float16", "bf16"] = Field(
        default="raw",
        description="the model on its way to the sites: as it is; stc: sparse ternary change of the model they hold, "
        "with error feedback; float16, bf16: half precision",
    )
    downlink_p: float = Field(
        default=0.01, gt=0, le=1, description="stc down: share of each tensor's values that is sent"
    )


class RunConfig(Strict):
    """Everything the coordinator decides about a run. Frozen; travels down with every message.

    Attributes:
        version: Schema version; both ends refuse another one.
        method: Name of a registered method (common/methods).
        params: The method's own parameters; checked by the method.
        seed: Every random choice of the run derives from it.
        sites: Aliases of the sites that must take part; empty means all that are connected at the start.
    """

    version: Literal[1] = SCHEMA_VERSION
    method: Name = "fedavg"
    params: dict[str, Any] = Field(default_factory=dict)
    seed: int = Field(default=0, ge=0, lt=2**32)
    sites: tuple[Alias, ...] = ()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    rounds: RoundConfig = RoundConfig()
    guard: GuardConfig = GuardConfig()
    wire: WireConfig = WireConfig()

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        """Check a plain mapping.

        Raises:
            ConfigError: An unknown key (with the nearest known one) or a value out of its range.
        """
        return checked(cls, mapping)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the JSON form; an empty text gives the defaults."""
        try:
            mapping = json.loads(text, object_pairs_hook=_once) if text.strip() else {}
        except (ValueError, RecursionError) as error:  # ValueError alone: a number of thousands of digits
            line = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
            raise ConfigError(
                f"The run configuration is not JSON{line}. Write it with `wardround trial`."
            ) from error
        if not isinstance(mapping, dict):
            raise ConfigError(f"The run configuration must be a JSON object, got {type(mapping).__name__}.")
        return cls.from_mapping(mapping)

    def to_json(self) -> str:
        """Canonical JSON: same config, same bytes."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def with_settings(self, settings: Mapping[str, Any], params: type[BaseModel]) -> Self:
        """Return a copy with `--set key=value` settings applied.

        Args:
            settings: Keys are dotted (`train.lr`) or, where only one section has them, bare (`lr`). A parameter of the
                method goes into `params`. Values are JSON or plain text.
            params: Parameter model of the method.

        Raises:
            ConfigError: A key that no section has, or one that several sections have.
        """
        document = self.model_dump(mode="json")
        homes = setting_keys(params)
        for key, value in settings.items():
            name = key.replace("-", "_")
            found = homes.get(name)
            if found is None:
                raise ConfigError(f"Unknown setting '{brief(key)}'. {nearest(key[:LONGEST_TEXT], homes)}")
            if len(found) > 1:
                raise ConfigError(
                    f"Setting '{key}' exists in several sections: write one of {', '.join(sorted(found))}."
                )
            *sections, leaf = found[0].split(".")
            target = document
            for section in sections:
                target = target[section]
            target[leaf] = parse_value(value)
        return type(self).from_mapping(document)


def setting_keys(params: type[BaseModel]) -> dict[str, list[str]]:
    """Return every name that `--set` knows, with the dotted places it can mean. Method parameters win a bare name."""
    homes: dict[str, list[str]] = {}
    own = {f"params.{name}" for name in params.model_fields}
    for place in own:
        homes[place] = [place]
        homes[place.removeprefix("params.")] = [place]
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            for leaf in section.model_fields:
                homes[f"{name}.{leaf}"] = [f"{name}.{leaf}"]
                if f"params.{leaf}" not in own:
                    homes.setdefault(leaf, []).append(f"{name}.{leaf}")
        elif name in {"seed", "method"}:
            homes[name] = [name]
    return homes


def parse_value(value: Any) -> Any:
    """Read a command-line value: JSON where it is JSON, a comma list, else the text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        pass
    if "," in value:
        return [parse_value(part.strip()) for part in value.split(",")]
    return value


def checked(model: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Validate a mapping against a pydantic model, turning its complaints into one clear sentence.

    Raises:
        ConfigError: Naming the key, what was expected and what was got.
    """
    _refuse_deep(mapping)
    normal = _snake(mapping)
    try:
        return model.model_validate(normal)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        place = brief(f"{where}{path}" if where or path else model.__name__)
        if first["type"] == "extra_forbidden":
            owner = _owner(model, first["loc"][:-1])
            raise ConfigError(
                f"Unknown key '{place}'. {nearest(str(first['loc'][-1])[:LONGEST_TEXT], owner.model_fields)}"
            ) from error
        raise ConfigError(
            f"Bad value for '{place}': {first['msg']}{_got(first.get('input'))}. Correct it and start again."
        ) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of a JSON text; JSON itself would keep the last of two equal keys without a word."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(f"Key '{brief(key)}' is given twice in one JSON object. Keep one.")
        found[key] = value
    return found


def _got(value: Any) -> str:
    if not isinstance(value, str | int | float | bool | list | tuple):
        return ""
    try:
        return f", got {brief(repr(value))}"
    except ValueError:  # Python writes no number of more than 4300 digits
        return ", got a number of thousands of digits"


def _refuse_deep(value: Any) -> None:
    """Refuse nesting that no configuration has, before anything walks it recursively and runs out of stack."""
    level = [value]
    for _ in range(DEEPEST):
        inner = (each.values() if isinstance(each, Mapping) else each for each in level)
        level = [item for items in inner for item in items if isinstance(item, Mapping | list | tuple)]
        if not level:
            return
    raise ConfigError(f"The configuration is nested more than {DEEPEST} levels deep. Write it flat.")


def _snake(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    normal = {}
    for key, item in value.items():
        name = str(key).replace("-", "_")
        if name in normal:
            raise ConfigError(
                f"Key '{brief(name)}' is given twice, with dashes and with underscores. Keep one."
            )
        normal[name] = _snake(item)
    return normal


def _owner(model: type[BaseModel], path: tuple[Any, ...]) -> type[BaseModel]:
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None:
            break
        kind = field.annotation
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
            kind = next(
                (k for k in typing.get_args(kind) if isinstance(k, type) and issubclass(k, BaseModel)), None
            )
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            model = kind
    return model
