"""The settings of every script: dataclasses that are the schema, the defaults, the help and the checks at once.

Only scripts read a :class:`Config`; everything below them takes plain keyword arguments. ``rsdyn/cli.py`` fills one
from YAML files and ``key=value`` words. A new section is a dataclass here and one field in :class:`Config`.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

from omegaconf import OmegaConf

from rsdyn.errors import UserError
from rsdyn.options import (
    DEVICES,
    POSITIONS,
    SIZE,
    Option,
    is_devices,
    is_positions,
    is_range,
    is_size,
    setting,
    show,
    walk,
)


@dataclass
class RunConfig:
    """Where the results of this run go."""

    dir: str | None = setting(
        None, "Folder of this run; null makes runs/<time>-<script>-<name>.", also=("out", "output_dir", "run_dir")
    )
    name: str | None = setting(None, "Name of this run in its folder and in W&B; null takes the LM's name.")


@dataclass
class LmConfig:
    """The language model whose residual stream is recorded."""

    name: str = setting(
        "embedded", "Hub name or folder of the LM; embedded is the one inside the package.", also=("model", "llm")
    )
    revision: str | None = setting(None, "Branch, tag or commit of the LM on the Hub; null is its main branch.")
    dtype: str = setting(
        "float32",
        "Number format the LM computes in.",
        choices=("float32", "bfloat16", "float16"),
        also=("torch_dtype",),
    )
    trust_remote_code: bool = setting(False, "Run Python code that comes with the LM; only for authors you trust.")
    device_map: str | None = setting(
        None,
        "null keeps the LM on one device; auto spreads its layers over all GPUs, then memory, then disk, for a model "
        "larger than one device (needs accelerate, and one process).",
        choices=("auto",),
    )
    batch_tokens: int = setting(1024, "Most tokens that go through the LM together.", low=1)
    layout: str = setting(
        "auto",
        "How sequences go together: packed end to end without padding, sorted by length and padded, or packed where a "
        "self-test on the model allows it.",
        choices=("auto", "packed", "sorted"),
    )
    matmul_precision: str = setting(
        "highest",
        "Precision of float32 products while the LM runs (torch.set_float32_matmul_precision).",
        choices=("highest", "high", "medium"),
    )


@dataclass
class DataConfig:
    """The text, which sequences of it are kept, and how they are split and batched."""

    path: str | None = setting(
        None,
        "Text, jsonl or parquet file, or a folder in the Hub's layout; with neither data.path nor data.name, the "
        "embedded text.",
        also=("file",),
    )
    name: str | None = setting(None, "Dataset on the Hub, such as Salesforce/wikitext.", also=("dataset",))
    config: str | None = setting(None, "Configuration of that dataset, such as wikitext-103-raw-v1.", also=("subset",))
    split: str = setting("train", "Split of that dataset from which all sequences come.")
    revision: str | None = setting(None, "Branch, tag or commit of the dataset on the Hub; null is its main branch.")
    text_column: str = setting("text", "Column that holds the text.")
    limit: int | None = setting(
        None,
        "Keep only the first so many sequences after the filter; null keeps all.",
        low=1,
        also=("max_sequences", "max_samples"),
    )
    l_min: int = setting(100, "Keep sequences of more than so many characters (strict).", low=0, also=("min_length",))
    l_max: int = setting(500, "Keep sequences of fewer than so many characters (strict).", low=2, also=("max_length",))
    truncate: bool = setting(False, "Cut sequences longer than the LM's context instead of refusing them.")
    condition: str = setting(
        "original",
        "The text as it is, or the control with the tokens of each sequence shuffled.",
        choices=("original", "shuffled"),
        also=("shuffle", "shuffled"),
    )
    positions: Any = setting(
        "last",
        "Tokens whose stream is recorded, each a trajectory of its own: the last of each sequence, all (BOS too), or k "
        "drawn of each.",
        allowed=POSITIONS,
        test=is_positions,
        also=("tokens",),
    )
    val_size: float = setting(0.1, "Sequences for validation: a fraction, or their number.", allowed=SIZE, test=is_size)
    test_size: float = setting(0.15, "Sequences for the test: a fraction, or their number.", allowed=SIZE, test=is_size)
    batch_by: str = setting(
        "vector",
        "A batch is whole sequences (the paper's; each recorded token counts as one), or vectors shuffled across them.",
        choices=("sequence", "vector"),
    )
    batch_size: int = setting(512, "Vectors in a batch, or whole sequences with data.batch_by=sequence.", low=1)
    shuffle_shards: int = setting(4, "How many shards of the cache are shuffled together.", low=1)


@dataclass
class CacheConfig:
    """Recorded trajectories on disk, so that a sequence goes through the LM once, ever."""

    dir: str | None = setting(
        None, "Folder of the cache; null is $RSDYN_CACHE, else $XDG_CACHE_HOME/rsdyn, else ~/.cache/rsdyn."
    )
    dtype: str = setting("bfloat16", "Number format of the trajectories on disk.", choices=("bfloat16", "float32"))
    enabled: bool = setting(True, "Keep the cache for later runs.")
    shard_sequences: int = setting(256, "Sequences in a shard.", low=1)


@dataclass
class CaeConfig:
    """The compressing autoencoder."""

    bottleneck: int = setting(2, "Units in the bottleneck, the latent dimensions.", low=1, also=("latent_dim",))
    layers: int | None = setting(
        None,
        "k, the widths per half, input and bottleneck included, at least 2 (cae.count=maps counts maps instead); "
        "null keeps the paper's ratio: 10 for 4096 to 2, 6 for 128 to 2.",
        low=1,
        also=("k", "depth"),
    )
    count: str = setting("widths", "What cae.layers counts.", choices=("widths", "maps"))
    lr: float = setting(1e-3, "Learning rate of Adam.", above=0, also=("learning_rate",))
    standardise: str = setting(
        "unit",
        "Scaling of the input: none (the paper), per unit, or per unit and sublayer, by the training split.",
        choices=("none", "unit", "unit_sublayer"),
        also=("standardize", "normalise", "normalize"),
    )
    bias_init: str = setting(
        "default", "Start of the decoder's last bias: PyTorch's, or the data mean.", choices=("default", "mean")
    )
    warmup_steps: int = setting(0, "Steps over which the learning rate rises from 0.", low=0)


MEASURES = ("activations", "correlation", "cosine", "velocity", "mutual_information", "rotation", "pca")
CONDITIONS = ("original", "token_shuffled", "untrained")
ESTIMATORS = ("kde", "kde_resub", "copula", "ksg", "paper_literal")
NULLS = (
    "layer_shuffle",
    "layer_shuffle_regradient",
    "increment_shuffle_windowed",
    "increment_shuffle",
    "sign_flip",
    "iaaft",
    "token_shuffled",
    "untrained",
)


@dataclass
class MiConfig:
    """Mutual information between consecutive sublayers, unit by unit."""

    estimator: str = setting(
        "kde",
        "Gaussian KDE on a grid or at the samples, Gaussian copula, nearest neighbours, or the paper's sum as printed.",
        choices=ESTIMATORS,
    )


@dataclass
class RotationConfig:
    """Turns of single units in the plane of activation and gradient, against null models."""

    nulls: list[str] | None = setting(
        None,
        "Null models; null takes all that the conditions allow, but for layer_shuffle_regradient.",
        choices=NULLS,
    )
    surrogates: int = setting(1000, "Surrogates of each null model.", low=1)
    shared: bool = setting(
        False, "The same permutations for all units, for a claim about the population, instead of each unit's own."
    )
    window: int = setting(8, "Increments in a window of increment_shuffle_windowed.", low=2)
    units: list[int] | None = setting(
        None,
        "Units whose portraits are drawn (12 at most); null takes the three that turn most and three at random.",
        low=0,
    )


@dataclass
class AnalysisConfig:
    """What analyze.py measures, and what train.py measures on the way with analysis.on_train=true."""

    measures: list[str] = setting(list(MEASURES), "What to measure.", choices=MEASURES)
    conditions: list[str] = setting(
        list(CONDITIONS),
        "Streams to measure: the text, its tokens shuffled, and the text in an untrained LM of the same shape.",
        choices=CONDITIONS,
    )
    samples: int | None = setting(
        1000, "Measure the first so many sequences; null takes all.", low=1, also=("n_samples",)
    )
    density_threshold: float | None = setting(
        None,
        "A unit is active where its |mean activation| passes this; null takes half the RMS of the last sublayer's.",
        above=0,
    )
    keep: int | None = setting(
        1000,
        "At most so many trajectories, of as many sequences as can be, for what needs every sample in memory: mutual "
        "information, rotations of single sequences, the null model token_shuffled, and dimensions; null keeps all.",
        low=3,
    )
    components: int | None = setting(
        None, "Principal components kept; null is 100, or as many as there are.", low=2, also=("n_components",)
    )
    on_train: bool = setting(False, "Measure while train.py records, so that one pass over the LM feeds both.")
    mi: MiConfig = field(default_factory=MiConfig)
    rotation: RotationConfig = field(default_factory=RotationConfig)


@dataclass
class GridConfig:
    """The grid of points that the stream is teleported to."""

    n: int = setting(10, "Points along each side of the grid.", low=2)
    range: list[float] | None = setting(
        None,
        "Its ends, [min1,max1,min2,max2], in latents; null is the range of the text's trajectories and a tenth more.",
        allowed="four numbers [min1,max1,min2,max2], each min below its max",
        test=is_range,
    )


@dataclass
class NoiseConfig:
    """Gaussian noise on the stream."""

    sigma: float = setting(0.5, "Size of the noise, as a share of the state's own norm.", above=0)


@dataclass
class PerturbConfig:
    """What perturb.py does to the stream of a prompt."""

    kind: str = setting(
        "teleport",
        "Put the state on a grid in a plane, add noise to it, or put another sequence's state in its place.",
        choices=("teleport", "noise", "swap"),
    )
    layers: list[float] | None = setting(
        None,
        "Layers of injection: numbers such as [0,7,15], or fractions of the depth such as [0.25,1.0] if any is not "
        "whole; null is the paper's 0, 7, 15, 23 and 31 of 32, at this model's depth.",
        low=0,
    )
    site: str = setting("resid_pre", "Where in the layer.", choices=("resid_pre", "resid_mid"))
    position: str = setting("last", "The last token's state alone, or the same state at all.", choices=("last", "all"))
    space: str = setting(
        "pca", "Plane of the teleports: PCA of the text's stream, or an autoencoder.", choices=("pca", "cae")
    )
    through: str = setting(
        "full",
        "Noise and swaps act on the whole state, or only on what the projection of perturb.space holds of it.",
        choices=("full", "projection"),
    )
    checkpoint: str | None = setting(None, "Autoencoder of perturb.space=cae: a best.ckpt of train.py.")
    off_plane: str = setting(
        "drop",
        "Teleports, and what goes through the projection, lose what lies outside the plane (the paper), or keep it.",
        choices=("drop", "keep"),
    )
    prompt: str = setting("I'm sorry, Dave. I'm afraid I can't do that.", "The prompt (the paper's).")
    prompts: str | None = setting(None, "A text file of prompts, one a line, instead of perturb.prompt.")
    from_text: int | None = setting(None, "So many sequences of the text as prompts, instead of perturb.prompt.", low=1)
    points: int = setting(100, "Points of noise or swap; a grid has its own number.", low=1)
    samples: int = setting(1000, "Sequences of the text that the plane, its range and swaps come from.", low=3)
    steps: int = setting(12, "Sublayers after the injection that the arrows average over.", low=1)
    grid: GridConfig = field(default_factory=GridConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)


@dataclass
class TrainerConfig:
    """Lightning's Trainer: how long to train and on what."""

    max_epochs: int = setting(100, "Most passes over the training split.", low=1)
    patience: int = setting(10, "Epochs without a better validation loss before training stops.", low=1)
    devices: int | str = setting(
        1, "How many devices a node uses, or which.", allowed=DEVICES, test=is_devices, also=("gpus",)
    )
    num_nodes: int = setting(1, "How many machines train together.", low=1)
    accelerator: str = setting("auto", "Kind of device.", choices=("auto", "cpu", "gpu", "cuda"), also=("device",))
    precision: str = setting(
        "32-true",
        "Number format the autoencoder trains in.",
        choices=("32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true"),
    )
    timeout: int = setting(1800, "Seconds that a process waits for the others of its run before it gives up.", low=1)
    options: dict[str, Any] = setting(
        {}, "Further arguments of lightning's Trainer, as trainer.options.gradient_clip_val=1."
    )


@dataclass
class TrackingConfig:
    """Weights & Biases."""

    mode: str = setting(
        "auto",
        "auto is online when a W&B key is there, else offline.",
        choices=("auto", "online", "offline", "disabled"),
        also=("wandb", "logger"),
    )
    project: str = setting("rsdyn", "Project that the run belongs to.")
    entity: str | None = setting(None, "User or team that owns the project; null is the key's own.")
    artifacts: bool = setting(
        True, "Whether results, the best checkpoint and the cache's manifest become artifacts; shards never do."
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


# What rsdyn hands to the Trainer itself, and the key to use instead of trainer.options.
RESERVED_OPTIONS = {
    "max_epochs": "trainer.max_epochs",
    "devices": "trainer.devices",
    "num_nodes": "trainer.num_nodes",
    "accelerator": "trainer.accelerator",
    "precision": "trainer.precision",
    "logger": "tracking.mode",
    "callbacks": "trainer.patience",
    "default_root_dir": "run.dir",
    "plugins": "trainer.precision",
}


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
            yield from _sections(hints[item.name], f"{prefix}{item.name}.")  # type: ignore[arg-type]


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
    if data.path is None and data.name is None:
        for name, value in (("config", data.config), ("revision", data.revision)):
            if value is not None:
                raise UserError(
                    f"data.{name}={value} has no dataset to apply to: data.name and data.path are both null, which "
                    f"means the embedded text. Set data.name, or leave data.{name} out."
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
    if cae.layers is not None and cae.count == "widths" and cae.layers < 2:
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
    if analysis.rotation.nulls and "original" not in analysis.conditions:
        for null in ("token_shuffled", "untrained"):
            if null in analysis.rotation.nulls:
                raise UserError(
                    f"analysis.rotation.nulls={show(analysis.rotation.nulls)}: {null} is compared with the original "
                    "text, which is not measured. Add original to analysis.conditions."
                )
    perturb = config.perturb
    if (perturb.space == "cae") != (perturb.checkpoint is not None):
        raise UserError(
            f"perturb.space={perturb.space} and perturb.checkpoint={show(perturb.checkpoint)} do not go together: an "
            "autoencoder needs perturb.space=cae and perturb.checkpoint=runs/.../checkpoints/best.ckpt, PCA neither."
        )
    if perturb.prompts is not None and perturb.from_text is not None:
        raise UserError(
            f"perturb.prompts={perturb.prompts} and perturb.from_text={perturb.from_text} are both given, but the "
            "prompts come from one place: leave one of them out."
        )
    for name, instead in RESERVED_OPTIONS.items():
        if name in config.trainer.options:
            raise UserError(
                f"trainer.options.{name}={show(config.trainer.options[name])} is not allowed: rsdyn sets {name} of "
                f"lightning's Trainer itself. Use {instead} instead."
            )


def _is_one(devices: int | str) -> bool:
    """Whether ``trainer.devices`` asks for one process: 1, or one device by its number."""
    return devices == 1 or (isinstance(devices, str) and devices.endswith(",") and devices.count(",") == 1)


def to_dict(config: Config) -> dict[str, Any]:
    """Turn the settings into plain nested dictionaries."""
    return asdict(config)


def to_yaml(config: Config | dict[str, Any]) -> str:
    """Write every setting, defaults included, as YAML that ``--config FILE`` reads back to the same settings."""
    return OmegaConf.to_yaml(OmegaConf.create(config if isinstance(config, dict) else to_dict(config)))


# What a script leaves alone: given on its command line, such a key would change nothing, so it is refused. In a file it
# may stand, since presets are shared.
UNUSED: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "by analyze.py alone": ("analysis.conditions", "analysis.components", "analysis.rotation."),
        "by perturb.py alone": ("perturb.",),
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
        "by analyze.py": ("analysis.",),
        "by train.py": ("data.condition", "resume"),
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

# Keys of one kind of perturbation alone, refused with the others in the same way.
KINDS = {
    "perturb.grid.n": ("teleport",),
    "perturb.grid.range": ("teleport",),
    "perturb.noise.sigma": ("noise",),
    "perturb.points": ("noise", "swap"),
    "perturb.through": ("noise", "swap"),
}


def idle(key: str, config: Config) -> str | None:
    """Why a key of perturb.py would change nothing beside the other settings, or None when it would."""
    kind = config.perturb.kind
    if key in KINDS and kind not in KINDS[key]:
        return f"with perturb.kind={kind}: it is for perturb.kind={' or '.join(KINDS[key])}"
    if key == "perturb.off_plane" and kind != "teleport" and config.perturb.through == "full":
        return f"with perturb.kind={kind}, which acts on the whole state, unless perturb.through=projection"
    return None
