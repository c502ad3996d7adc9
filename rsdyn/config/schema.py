"""All settings of a script, composed of the sections that the wings own.

Only ``run/`` and ``commands/`` read a :class:`Config`; everything left of them takes plain keyword arguments.
``command_line.py`` fills one from YAML files and ``key=value`` words. A new section is a dataclass in its wing's
``settings.py`` and one field in :class:`Config`.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_type_hints

from omegaconf import OmegaConf

from rsdyn.analysis.settings import JACOBIAN, MASSIVE, PHASES, READOUT, SHAPE, AnalysisConfig
from rsdyn.autoencoder.settings import CaeConfig
from rsdyn.errors import UserError
from rsdyn.lm.settings import LmConfig
from rsdyn.options import (
    DEVICES,
    Option,
    is_devices,
    setting,
    show,
    walk,
)
from rsdyn.perturbation.settings import LAYER_KINDS, PerturbConfig
from rsdyn.stream.settings import CacheConfig, DataConfig
from rsdyn.tracking.settings import TrackingConfig


@dataclass
class RunConfig:
    """Where the results of this run go."""

    dir: str | None = setting(
        None, "Folder of this run; null makes runs/<time>-<script>-<name>.", also=("out", "output_dir", "run_dir")
    )
    name: str | None = setting(None, "Name of this run in its folder and in W&B; null takes the LM's name.")


@dataclass
class TrainerConfig:
    """Lightning's Trainer: how long to train and on what."""

    max_epochs: int = setting(100, "Most passes over the training split.", low=1)
    patience: int = setting(10, "Epochs without a better validation loss before training stops.", low=1)
    devices: int | str = setting(
        1, "How many devices a node uses, or which.", allowed=DEVICES, test=is_devices, also=("gpus",)
    )
    num_nodes: int = setting(1, "How many machines train together.", low=1)
    accelerator: Literal["auto", "cpu", "gpu", "cuda"] = setting("auto", "Kind of device.", also=("device",))
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true"] = setting(
        "32-true",
        "Number format the autoencoder trains in.",
    )
    timeout: int = setting(1800, "Seconds that a process waits for the others of its run before it gives up.", low=1)
    options: dict[str, Any] = setting(
        {}, "Further arguments of lightning's Trainer, as trainer.options.gradient_clip_val=1."
    )


@dataclass
class Config:
    """All settings of a script."""

    # torch takes 64-bit seeds, but NumPy's global generator and Lightning's seed_everything stop at 32 bits.
    seed: int = setting(0, "Seed of everything random: splits, shuffles, weights.", low=0, high=2**32 - 1)
    resume: str = setting(
        "auto",
        "Go on where a killed train.py was: auto with the same command, never, or a checkpoint whose run goes on in a "
        "new folder.",
        allowed="auto, never, or the path of a checkpoint such as runs/.../checkpoints/last.ckpt",
        also=("ckpt_path", "resume_from", "resume_from_checkpoint"),
    )
    run: RunConfig = field(default_factory=RunConfig)
    lm: LmConfig = field(default_factory=LmConfig)
    data: DataConfig = field(default_factory=DataConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    cae: CaeConfig = field(default_factory=CaeConfig)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)
    perturb: PerturbConfig = field(default_factory=PerturbConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def options() -> dict[str, Option]:
    """List every full key of the schema, such as ``cae.lr``, in the order of the dataclasses."""
    return {option.key: option for option in walk(Config, "")}


def sections() -> dict[str, str]:
    """List the sections, and the sections in them (``analysis.mi``), with their one line of meaning."""
    return dict(_sections(Config, ""))


def _sections(cls: type, prefix: str) -> Iterator[tuple[str, str]]:
    hints = get_type_hints(cls)
    for item in fields(cls):
        if is_dataclass(hints[item.name]):
            yield prefix + item.name, str(hints[item.name].__doc__)
            yield from _sections(hints[item.name], f"{prefix}{item.name}.")


def check(config: Config) -> None:
    """Raise ``UserError`` on a value out of range, or on two values that do not go together."""
    for option in options().values():
        value: Any = config
        for part in option.key.split("."):
            value = getattr(value, part)
        if not option.accepts(value):
            raise option.error(value)
    data, cae = config.data, config.cae
    if data.path is not None and data.name is not None:
        raise UserError(
            f"data.path={data.path} and data.name={data.name} are both given, but the text comes from one place: "
            "set data.name=null for the file, or data.path=null for the Hub."
        )
    if data.stream is not None and (data.path is not None or data.name is not None):
        text = f"data.path={data.path}" if data.path is not None else f"data.name={data.name}"
        raise UserError(
            f"data.stream={data.stream} and {text} are both given, but a recorded stream has its text behind it: "
            "leave one of them out."
        )
    if data.path is None and data.name is None:
        for name, value in (("config", data.config), ("revision", data.revision)):
            if value is not None:
                raise UserError(
                    f"data.{name}={value} has no dataset to apply to: data.name and data.path are both null, which "
                    f"means the embedded text. Set data.name, or leave data.{name} out."
                )
    if data.order == "corpus" and data.order_seed is not None:
        raise UserError(
            f"data.order_seed={data.order_seed} changes nothing with data.order=corpus, which draws nothing: leave it "
            "out, or set data.order=random."
        )
    if data.l_max - data.l_min < 2:
        raise UserError(
            f"data.l_min={data.l_min} and data.l_max={data.l_max} leave no length: both are strict, so data.l_max must "
            f"be at least data.l_min + 2. Set for example data.l_max={data.l_min + 400}."
        )
    sizes = f"data.val_size={data.val_size:g} and data.test_size={data.test_size:g}"
    if sum(size for size in (data.val_size, data.test_size) if size < 1) >= 1:
        raise UserError(f"{sizes} leave nothing to train on: as fractions they must sum to less than 1. Lower one.")
    if data.limit is not None and sum(size for size in (data.val_size, data.test_size) if size >= 1) >= data.limit:
        raise UserError(
            f"{sizes} leave nothing to train on: data.limit={data.limit} keeps too few sequences. Raise data.limit, or "
            "lower one of the sizes."
        )
    if isinstance(cae.layers, int) and cae.count == "widths" and cae.layers < 2:
        raise UserError(
            f"cae.layers={cae.layers} is not allowed with cae.count=widths: it must be a whole number >= 2, since the "
            "input and the bottleneck are two widths. Set cae.layers=2 or more, or cae.count=maps."
        )
    if config.lm.device_map is not None and (not _is_one(config.trainer.devices) or config.trainer.num_nodes > 1):
        raise UserError(
            f"lm.device_map={config.lm.device_map} spreads one LM over all devices, and trainer.devices="
            f"{show(config.trainer.devices)}, trainer.num_nodes={config.trainer.num_nodes} would load one in each "
            "process. Set trainer.devices=1 and trainer.num_nodes=1, or lm.device_map=null if the LM fits on a device."
        )
    if config.lm.device_map is not None and config.lm.layout == "packed":
        raise UserError(
            f"lm.layout=packed is not allowed with lm.device_map={config.lm.device_map}: a model spread over devices "
            "is recorded in padded batches. Set lm.layout=auto or sorted, or lm.device_map=null."
        )
    analysis = config.analysis
    for null in ("token_shuffled", "untrained"):
        if null in (analysis.rotation.nulls or []) and null not in analysis.conditions:
            raise UserError(
                f"analysis.rotation.nulls={show(analysis.rotation.nulls)} needs a stream that is not measured: add "
                f"{null} to analysis.conditions={show(analysis.conditions)}, or leave that null model out."
            )
    if analysis.untrained_seeds is not None and "untrained" not in analysis.conditions:
        raise UserError(
            f"analysis.untrained_seeds={analysis.untrained_seeds} would change nothing: add untrained to "
            f"analysis.conditions={show(analysis.conditions)}, or leave it out."
        )
    if analysis.rotation.nulls and "original" not in analysis.conditions:
        for null in ("token_shuffled", "untrained"):
            if null in analysis.rotation.nulls:
                raise UserError(
                    f"analysis.rotation.nulls={show(analysis.rotation.nulls)}: {null} is compared with the original "
                    "text, which is not measured. Add original to analysis.conditions."
                )
    for measure in (MASSIVE, *SHAPE, READOUT, PHASES, JACOBIAN):
        if analysis.on_train and measure in analysis.measures:
            raise UserError(
                f"analysis.measures={show(analysis.measures)}: {measure} is measured by analyze.py alone, since it "
                "takes more than one look at a stream on its way. Leave it out with analysis.on_train=true."
            )
    perturb = config.perturb
    if (perturb.space == "cae") != (perturb.checkpoint is not None):
        raise UserError(
            f"perturb.space={perturb.space} and perturb.checkpoint={show(perturb.checkpoint)} do not go together: an "
            "autoencoder needs perturb.space=cae and perturb.checkpoint=runs/.../checkpoints/best.ckpt, PCA neither."
        )
    if perturb.prompts is not None and perturb.from_text:
        raise UserError(
            f"perturb.prompts={perturb.prompts} and perturb.from_text={perturb.from_text} are both given, but the "
            "prompts come from one place: leave one of them out."
        )
    for name in ("prompt_group", "swap_group"):
        group = getattr(perturb, name)
        if group is not None and data.group_column is None:
            raise UserError(
                f"perturb.{name}={group} needs data.group_column, the column that says which group a row of the text "
                "is of."
            )
    if perturb.prompt_group is not None and (perturb.prompts is not None or perturb.from_text == 0):
        other = f"perturb.prompts={perturb.prompts}" if perturb.prompts is not None else "perturb.from_text=0"
        raise UserError(
            f"perturb.prompt_group={perturb.prompt_group} changes nothing with {other}, which draws no prompt from the "
            "text: leave one of them out."
        )


def _is_one(devices: int | str) -> bool:
    """Whether ``trainer.devices`` asks for one process: 1, or one device by its number."""
    return devices == 1 or (isinstance(devices, str) and devices.endswith(",") and devices.count(",") == 1)


def to_dict(config: Config) -> dict[str, Any]:
    """Turn the settings into plain nested dictionaries."""
    return asdict(config)


def to_yaml(config: Config | dict[str, Any]) -> str:
    """Write every setting, defaults included, as YAML that ``--config FILE`` reads back to the same settings."""
    settings = veiled(_spelled(config if isinstance(config, dict) else to_dict(config)))
    return str(unveiled(OmegaConf.to_yaml(OmegaConf.create(settings))))


def _spelled(value: Any) -> Any:
    """The settings with odd bytes of paths, which are halves of surrogates in Python, as escapes."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else _each(value, _spelled)


_VEIL = "\ue000"  # of the private use area, which text has no use for


def veiled(value: Any) -> Any:
    """The same settings with ``${`` and ``???`` hidden from OmegaConf, to which they mean other settings."""
    if isinstance(value, str):
        return value.replace("${", _VEIL + "{") if value != "???" else _VEIL + value
    return _each(value, veiled)


def unveiled(value: Any) -> Any:
    """What :func:`veiled` hid, put back; of dataclasses in place."""
    if isinstance(value, str):
        return value.replace(_VEIL + "{", "${").replace(_VEIL, "")
    if is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            setattr(value, item.name, unveiled(getattr(value, item.name)))
        return value
    return _each(value, unveiled)


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: change(part) for key, part in value.items()}
    return [change(part) for part in value] if isinstance(value, list) else value


# What a script leaves alone: given on its command line, such a key would change nothing, so it is refused. In a file it
# may stand, since presets are shared.
UNUSED: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "by analyze.py alone": (
            *("analysis.conditions", "analysis.untrained_seeds", "analysis.components", "analysis.rotation."),
            *("analysis.readout.", "analysis.jacobian.", "data.stream"),
        ),
        "by perturb.py alone": ("perturb.",),
        "by analyze.py and perturb.py": ("data.group_column",),
    },
    "perturb": {
        "by train.py alone": (
            "cae.",
            "data.val_size",
            "data.test_size",
            "data.batch_by",
            "data.batch_size",
            "data.shuffle_shards",
        ),
        "by train.py and analyze.py; perturb.py runs in one process": (
            *("trainer.devices", "trainer.num_nodes", "trainer.timeout", "trainer.precision"),
            *("trainer.max_epochs", "trainer.patience", "trainer.options", "trainer.options."),
        ),
        "by analyze.py": ("analysis.", "data.stream"),
        "by train.py": ("data.condition", "resume"),
        "by train.py and analyze.py, for their intervals": ("data.document_column",),
    },
    "analyze": {
        "by train.py alone": (
            "cae.",
            "data.val_size",
            "data.test_size",
            "data.batch_by",
            "data.batch_size",
            "data.shuffle_shards",
            "trainer.max_epochs",
            "trainer.patience",
            "trainer.precision",
            "analysis.on_train",
            "resume",
        ),
        "by train.py; analyze.py has analysis.conditions": ("data.condition",),
        "by perturb.py alone": ("perturb.",),
    },
}


def unused_by(key: str, script: str) -> str | None:
    """Who uses a key that a script leaves alone, in words; None where the script uses it."""
    for by, keys in UNUSED.get(script, {}).items():
        if any(key == k or (k.endswith(".") and key.startswith(k)) for k in keys):
            return by
    return None


# Keys of one kind of perturbation alone, refused with the others in the same way.
KINDS = {
    "perturb.grid.n": ("teleport",),
    "perturb.grid.range": ("teleport",),
    "perturb.noise.sigma": ("noise",),
    "perturb.points": ("noise", "swap"),
    "perturb.through": ("noise", "swap"),
    **dict.fromkeys(
        ("perturb.site", "perturb.position", "perturb.space", "perturb.checkpoint", "perturb.off_plane"),
        ("teleport", "noise", "swap"),
    ),
    **dict.fromkeys(("perturb.samples", "perturb.steps", "perturb.swap_group"), ("teleport", "noise", "swap")),
}
STREAM_KEYS = ("cache.", "data.positions", "lm.layout", "lm.batch_tokens")


OF_A_STREAM = ("data.stream", "data.limit", "lm.name", "lm.revision", "lm.trust_remote_code", "lm.label")
NEED_A_MODEL = ("data.", "lm.", "cache.", "analysis.readout.", "analysis.jacobian.")


def idle_in_analysis(key: str, config: Config) -> str | None:
    """Why a key of analyze.py would change nothing beside the other settings, or None when it would."""
    if config.data.stream is not None and key.startswith(NEED_A_MODEL) and key not in OF_A_STREAM:
        return "with data.stream, which was recorded already"
    if key.startswith("analysis.readout.") and READOUT not in config.analysis.measures:
        return f"without readout in analysis.measures={show(config.analysis.measures)}"
    return None


def idle(key: str, config: Config) -> str | None:
    """Why a key of perturb.py would change nothing beside the other settings, or None when it would."""
    kind = config.perturb.kind
    if key == "data.group_column" and config.perturb.prompt_group is None and config.perturb.swap_group is None:
        return "without perturb.prompt_group or perturb.swap_group"
    if key in KINDS and kind not in KINDS[key]:
        return f"with perturb.kind={kind}: it is for perturb.kind={' or '.join(KINDS[key])}"
    if kind in LAYER_KINDS and key.startswith(STREAM_KEYS):
        return f"with perturb.kind={kind}, which records no stream"
    if key == "perturb.off_plane" and kind != "teleport" and config.perturb.through == "full":
        return f"with perturb.kind={kind}, which acts on the whole state, unless perturb.through=projection"
    return None
