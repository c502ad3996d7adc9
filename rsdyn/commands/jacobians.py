"""The measure ``jacobian`` of analyze.py: models, texts, and what of them was measured before (METHOD section 12)."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from rsdyn.analysis.jacobians import MODELS, NULL_TEXTS, PLANE_TEXTS, VERSION, Curves, JacobianResult, measure_text
from rsdyn.analysis.settings import JACOBIAN
from rsdyn.analysis.sink import SINK_TEXTS, SINK_VERSION, massive_of, measure_sink
from rsdyn.config.schema import Config
from rsdyn.dynamics.projection import PCA
from rsdyn.errors import UserError
from rsdyn.figures.jacobians import jacobian_panels
from rsdyn.files import output_folder, publish, writing
from rsdyn.lm.jacobians import reference_run
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.null_models import permuted_weights
from rsdyn.metrics.processes import from_all, n_processes
from rsdyn.run.analysis import ending_of
from rsdyn.run.finish import draw, finish
from rsdyn.run.opening import Source, make_stream, start_records
from rsdyn.run.progress import Steps
from rsdyn.run.run import Run, keeping
from rsdyn.run.trainer import device_of
from rsdyn.stream.cache.store import default_cache_dir


def texts_of(run: Run, source: Source) -> list[int]:
    """Which sequences of the text are differentiated: drawn at random, fewer of them being the first of more."""
    config = run.config
    wanted, n = config.analysis.jacobian.texts, len(source.sequences)
    if wanted > n:
        raise UserError(f"analysis.jacobian.texts={wanted}: the text has {n} sequences. Ask for fewer.")
    return _drawn(run, source)[:wanted]


def _drawn(run: Run, source: Source) -> list[int]:
    return [int(i) for i in np.random.default_rng(run.config.seed).permutation(len(source.sequences))]


def analyze_jacobians(run: Run, source: Source) -> None:
    """The measure ``jacobian`` by itself: no stream is recorded, and the text's sequences are enough."""
    config = run.config
    check_continues(run, source)
    steps = Steps(2, run.started)
    start_records(run, source, {"original": make_stream(run, source, "original")})
    with keeping(lambda: "texts that were finished are in the cache" if config.cache.enabled else "nothing is kept"):
        result = measure_jacobians(run, source, steps)
        steps.done(JACOBIAN)
        panels = jacobian_panels(result, config.analysis.jacobian.sublayers)
        draw(run, panels)
        steps.done("figures")
        finish(run, ending_of(run, source, {}, None, result, panels, [], steps))


def measure_jacobians(run: Run, source: Source, steps: Steps) -> JacobianResult:
    """Measure every text in every model; what an earlier run measured of the same is read from the cache."""
    config = run.config
    settings, lm = config.analysis.jacobian, source.lm
    numbers = texts_of(run, source)
    result = JacobianResult(lm.n_layers, lm.n_units, len(lm.site_names), dtype=config.lm.dtype)
    if config.lm.dtype != "float32":
        run.say(f"Jacobians are computed in float32, not in {config.lm.dtype}")
    if source.sequences.documents is not None:
        result.documents = source.sequences.documents[numbers]
    tokens = [np.asarray(source.sequences[i]) for i in numbers]
    of_plane = [np.asarray(source.sequences[i]) for i in _drawn(run, source)[:PLANE_TEXTS]]  # however many texts
    plane: PCA | None = None
    rank = torch.distributed.get_rank() if n_processes() > 1 else 0
    n_sink = min(len(numbers), SINK_TEXTS)
    with steps.bar("Jacobians", len(numbers) * len(MODELS) + n_sink, "texts") as done:
        for model in MODELS:
            store = _Store(run, source, model, of_plane)
            mine: dict[int, dict[str, Curves]] = {}
            opened: tuple[int, LanguageModel] | None = None
            seeds = settings.seeds if model != "trained" else 1
            for seed in range(seeds):  # one model after another, since two may not fit
                for place in [p for p in range(len(numbers)) if p % seeds == seed][rank :: n_processes()]:
                    known = store.read(tokens[place], seed, place)
                    if known is None:
                        run.stop.check()
                        if opened is None or opened[0] != seed:
                            opened = None
                            opened = seed, _open(source, model, config.seed + seed, config)
                        here = opened[1]
                        if model == "trained" and plane is None:
                            plane = PCA.fit(here.record(of_plane).flatten(0, 1).to(torch.float64), 2)
                        known = measure_text(
                            here,
                            tokens[place],
                            model,
                            nulls=config.seed + place if place < NULL_TEXTS else None,
                            plane=plane,
                            keep_eigenvalues=place == 0,
                        )
                        store.write(tokens[place], seed, place, known)
                    mine[place] = known
                    done(1)
            found: dict[int, dict[str, Curves]] = {}
            for part in from_all(mine, "cpu"):
                found |= part
            for place in range(len(numbers)):
                result.add(found[place])
        _measure_sink(run, source, tokens[:n_sink], of_plane, result, done)
    return result


def _measure_sink(
    run: Run,
    source: Source,
    tokens: list[np.ndarray],
    of_plane: list[np.ndarray],
    result: JacobianResult,
    done: Callable[[int], object],
) -> None:
    """The first texts once more, with the sink held or taken away; shared out over processes as the others are."""
    store = _Store(run, source, "sink", of_plane)
    rank = torch.distributed.get_rank() if n_processes() > 1 else 0
    mine: dict[int, dict[str, Curves]] = {}
    lm: LanguageModel | None = None
    massive: Tensor | None = None
    for place in range(rank, len(tokens), n_processes()):
        known = store.read(tokens[place], 0, place)
        if known is None:
            run.stop.check()
            lm = _open(source, "trained", run.config.seed, run.config) if lm is None else lm
            massive = massive_of(lm, of_plane) if massive is None else massive
            known = measure_sink(lm, tokens[place], massive)
            known["units"] = {"massive": massive.nonzero()[:, 0].numpy()}
            store.write(tokens[place], 0, place, known)
        mine[place] = known
        done(1)
    found: dict[int, dict[str, Curves]] = {}
    for part in from_all(mine, "cpu"):
        found |= part
    for place in range(len(tokens)):
        result.massive = found[place].pop("units")["massive"].tolist()
        result.add_sink(found[place])


def check_continues(run: Run, source: Source) -> None:
    """Raise ``UserError`` for a model whose layers cannot be run on from a state, before anything is recorded."""
    lm = source.lm.load(dtype="float32", device=device_of(run.config))
    reference_run(lm, np.asarray(source.sequences[texts_of(run, source)[0]]))


def _open(source: Source, model: str, seed: int, config: Config) -> LanguageModel:
    device = device_of(config)
    if model == "untrained":
        return source.lm.without_training(seed).load(dtype="float32", device=device)
    lm = source.lm.load(dtype="float32", device=device)
    return permuted_weights(lm, seed) if model == "permuted" else lm


class _Store:
    """What was measured of texts before, a file each in a folder of the cache; none with ``cache.enabled=false``."""

    def __init__(self, run: Run, source: Source, model: str, of_plane: list[np.ndarray]) -> None:
        config = run.config
        self.run = run
        self.folder: Path | None = None
        if config.cache.enabled:
            cache = Path(config.cache.dir or default_cache_dir())
            self.where = f"cache.dir={cache}"
            self.folder = output_folder(cache / "jacobians", self.where)  # better refused now than after the first text
        version = SINK_VERSION if model == "sink" else VERSION
        self.made_from = [version, source.lm.identity(), model, config.seed]
        if model in ("trained", "sink"):
            plane = b"".join(tokens.astype(np.int64).tobytes() for tokens in of_plane)
            self.made_from.append(xxhash.xxh3_128_hexdigest(plane))

    def _path(self, tokens: np.ndarray, seed: int, place: int) -> Path:
        assert self.folder is not None
        of = [*self.made_from, seed, min(place, NULL_TEXTS), tokens.astype(np.int64).tobytes().hex()]
        return self.folder / f"{xxhash.xxh3_128_hexdigest(repr(of).encode())}.npz"

    def read(self, tokens: np.ndarray, seed: int, place: int) -> dict[str, Curves] | None:
        if self.folder is None or not (path := self._path(tokens, seed, place)).is_file():
            return None
        found: dict[str, Curves] = {}
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                for name in file.files:
                    series, _, curve = name.partition("/")
                    found.setdefault(series, {})[curve] = file[name]
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            self.run.say(f"{path.name} in {self.folder} is damaged ({error}); that text is measured again")
            return None
        return found

    def write(self, tokens: np.ndarray, seed: int, place: int, found: dict[str, Curves]) -> None:
        if self.folder is None:
            return
        file = io.BytesIO()
        arrays: dict[str, Any] = {f"{s}/{name}": v for s, curves in found.items() for name, v in curves.items()}
        np.savez_compressed(file, **arrays)
        with writing(self.where):
            publish(self._path(tokens, seed, place), [file.getvalue()])
