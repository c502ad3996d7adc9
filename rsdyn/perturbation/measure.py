"""The parts of perturb.py: prompts, the plane, points and controls, what comes of them, figures and the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rsdyn.autoencoder.model import CompressingAutoencoder
from rsdyn.dynamics.projection import PCA, Projection
from rsdyn.dynamics.recovery import Recovery, bootstrap, kl, nearer, rates, recovery, summary
from rsdyn.errors import UserError
from rsdyn.lm.continuing.continuation import Continued, Reference, continue_all, run_reference
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.source import LMSource
from rsdyn.perturbation.linear import LinearRange, linear_ranges
from rsdyn.perturbation.settings import PerturbConfig
from rsdyn.perturbation.states import (
    grid_ranges,
    grid_states,
    noise_states,
    random_directions,
    swapped_states,
    through_projection,
)
from rsdyn.stream.text.tokens import Sequences, tokenise_one
from rsdyn.stream.trajectories import TrajectoryStream

PAPER_LAYERS, PAPER_DEPTH = (0, 7, 15, 23, 31), 32
FROZEN, RANDOM, SWAPPED = "attention frozen", "random directions", "swapped-in state"
SCALARS = (
    *("plane_mse", "relative_put", "relative", "cosine_put", "cosine", "nearer", "nearer_absolute", "nearer_relative"),
    *("contraction", "absolute_rate", "relative_rate", "undefined"),
)


class Prompt(NamedTuple):
    """A prompt's tokens with BOS, and which sequence of the text it is, if it is one."""

    tokens: np.ndarray
    sequence: int | None = None


def layers_of(layers: Sequence[float] | None, n_layers: int) -> list[int]:
    """The layers of injection at a model's depth; ``UserError`` for one that is out of range."""
    if layers is None:
        return sorted({round(layer / (PAPER_DEPTH - 1) * (n_layers - 1)) for layer in PAPER_LAYERS})
    if any(value != int(value) for value in layers):
        if max(layers) > 1:
            raise UserError(
                f"perturb.layers={[*layers]}: with a decimal part they are fractions of the depth, from 0 to 1. Give "
                f"fractions, or whole layer numbers from 0 to {n_layers - 1}."
            )
        return sorted({round(value * (n_layers - 1)) for value in layers})
    chosen = sorted({int(value) for value in layers})
    if chosen[-1] >= n_layers:
        raise UserError(
            f"perturb.layers: this model has no layer {chosen[-1]}; its {n_layers} layers are 0 to {n_layers - 1}."
        )
    return chosen


def prompts_of(
    settings: PerturbConfig, sequences: Sequences, lm: LMSource, *, seed: int, chat_template: str = "none"
) -> list[Prompt]:
    """The prompts that the settings ask for, as user turns with ``chat_template="user"``.

    ``UserError`` for an empty one, or one longer than the model's context.
    """
    if settings.from_text is not None:
        if settings.from_text > len(sequences):
            raise UserError(
                f"perturb.from_text={settings.from_text}: the text has {len(sequences)} sequences. Ask for fewer."
            )
        rows = np.random.default_rng(seed).permutation(len(sequences))[: settings.from_text]
        return [Prompt(sequences[int(i)], int(i)) for i in sorted(rows)]
    key, texts = "perturb.prompt", [settings.prompt]
    if settings.prompts is not None:
        from rsdyn.stream.text.local_files import DamagedError, lines_of

        key = "perturb.prompts"
        try:
            lines = list(lines_of(Path(settings.prompts).expanduser()))
        except (OSError, DamagedError) as error:
            raise UserError(f"perturb.prompts={settings.prompts}: cannot be read as text ({error}).") from error
        texts = [line for line in lines if line.strip()]
        if not texts:
            raise UserError(f"perturb.prompts={settings.prompts}: the file holds no prompt. Write one a line.")
    tokenizer = lm.tokenizer()
    prompts = []
    for text in texts:
        tokens = tokenise_one(tokenizer, text, sequences.bos_id, chat_template=chat_template)
        if not text.strip() or len(tokens) == int(sequences.bos_id is not None):
            raise UserError(f"{key}: the prompt is empty. Write some words.")
        if len(tokens) > lm.max_tokens:
            raise UserError(
                f"{key}: {text[:40]!r} has {len(tokens)} tokens with BOS, more than the model's context of "
                f"{lm.max_tokens}. Shorten it."
            )
        prompts.append(Prompt(tokens))
    return prompts


class Recorded(NamedTuple):
    """Trajectories of a stream.

    Attributes:
        x: ``(N, S, D)``, in the cache's dtype.
        sequence: ``(N,)`` int64, the number of each one's sequence in the text.
    """

    x: Tensor
    sequence: Tensor


def read_trajectories(stream: TrajectoryStream, samples: int, done: Callable[[int], object]) -> Recorded:
    """The trajectories of the first ``samples`` sequences of a stream, recorded where they are missing."""
    parts, numbers = [], []
    for k in range(stream.shards_of(samples)):
        shard = stream.shard(k)
        parts.append(shard.activations)
        numbers.append(shard.index)
        done(1)
    stream.release_lm()
    n = stream.n_trajectories(0, samples)
    return Recorded(torch.cat(parts)[:n], torch.cat(numbers)[:n])


class Plane(NamedTuple):
    """The projection that points are chosen in, the range of the grid, and what its axes are called."""

    projection: Projection
    ranges: Tensor
    ratio: Tensor | None
    name: str


def find_plane(settings: Any, trajectories: Tensor) -> Plane:
    """PCA of the stream's vectors with two components, or the autoencoder of a checkpoint."""
    n_units = trajectories.shape[-1]
    projection: Projection
    ratio, name = None, "PC"
    if settings.space == "pca":
        projection = pca = PCA.fit(trajectories.reshape(-1, n_units), 2)
        ratio = pca.explained_variance_ratio
    else:
        projection = cae = CompressingAutoencoder.from_checkpoint(settings.checkpoint).eval()
        name = "latent"
        if cae.widths[0] != n_units:
            raise UserError(
                f"perturb.checkpoint={settings.checkpoint}: the autoencoder takes {cae.widths[0]} units and this "
                f"model's stream has {n_units}. Take one that was trained on this model."
            )
        if cae.widths[-1] != 2 and settings.kind == "teleport":
            raise UserError(
                f"perturb.checkpoint={settings.checkpoint}: the autoencoder has {cae.widths[-1]} latents, and a grid "
                "needs 2. Take one with cae.bottleneck=2."
            )
    if settings.grid.range is not None:
        ranges = torch.tensor(settings.grid.range).reshape(2, 2)
    elif settings.kind == "teleport":
        ranges = grid_ranges(torch.cat([encode(projection, part) for part in trajectories.split(100)]))
    else:
        ranges = torch.zeros(2, 2)  # no grid is made
    return Plane(projection, ranges, ratio, name)


@torch.no_grad()
def encode(projection: Projection, x: Tensor, first_sublayer: int = 0) -> Tensor:
    """Latents ``(..., S', K)`` of trajectories ``(..., S', D)`` that begin at ``first_sublayer``."""
    sublayer = torch.arange(first_sublayer, first_sublayer + x.shape[-2], device=x.device).expand(x.shape[:-1])
    return projection.encode(x.to(torch.float32), sublayer)


@dataclass
class Found:
    """What came of the points, by layer and condition.

    ``values`` are means over points and ``ends`` are of every point, an entry for each prompt that has the condition:
    ``prompts`` are their numbers, since a prompt may find no other state to swap in. ``of_points`` are the curves of
    every point of the first prompt, which the figures draw.
    """

    n_prompts: int
    n_points: int
    sublayers: dict[int, int]
    prompts: dict[tuple[int, str], list[int]] = field(default_factory=dict)
    values: dict[tuple[int, str], dict[str, list[Tensor]]] = field(default_factory=dict)
    ends: dict[tuple[int, str], dict[str, list[Tensor]]] = field(default_factory=dict)
    of_points: dict[tuple[int, str], dict[str, Tensor]] = field(default_factory=dict)
    reference: Tensor | None = None
    alike: dict[int, int] = field(default_factory=dict)
    """How many trajectories have the first prompt's own state at a layer, and are not swapped in."""
    several: bool = False
    """Whether a sequence has several trajectories, one a token."""
    linear: dict[int, LinearRange] = field(default_factory=dict)
    """Of the first prompt, by layer: how far outside the linear range the points lie; none with position=all."""

    def conditions(self, layer: int) -> list[str]:
        """What was done at a layer, the points first."""
        return [condition for at, condition in self.values if at == layer]

    def mean(self, layer: int, condition: str, name: str) -> Tensor:
        """The mean, over the prompts that have the condition, of what is already a mean over points."""
        return torch.stack(self.values[layer, condition][name]).mean(0)

    def interval(self, layer: int, condition: str, name: str) -> tuple[Tensor, Tensor] | None:
        """Its 95 % interval by bootstrap over prompts, when there are several."""
        values = self.values[layer, condition][name]  # a prompt without another state to swap in has no entry
        if len(values) < 2:
            return None
        found = bootstrap(torch.stack(values))
        return found.low, found.high

    def rows(self) -> list[dict[str, Any]]:
        """The closing table: a row a layer and condition, with intervals where it is of several prompts."""
        table = []
        for layer in self.sublayers:
            for condition in self.conditions(layer):
                n = len(self.prompts[layer, condition])
                row: dict[str, Any] = {"layer": layer, "condition": condition, "n_prompts": n}
                for name in (*SCALARS, "kl"):
                    row[name] = float(self.mean(layer, condition, name))
                    ends = self.interval(layer, condition, name)
                    if ends is not None:
                        row[f"{name}_interval"] = [float(end) for end in ends]
                table.append(row)
        return table

    def arrays(self) -> dict[str, Any]:
        """Everything as arrays: means ``(prompts, ...)``, ends of every point ``(prompts, points)``, and the curves of
        the first prompt's points. A prompt with fewer states to swap in has NaN for the points it lacks, and NaN all
        along where it has none.
        """
        out: dict[str, Any] = {}
        for at, values in self.values.items():
            for name, v in values.items():
                rows = self._of_every_prompt(at, v, torch.full_like(v[0], torch.nan))
                out[f"{_folder(at)}/{name}"] = torch.stack(rows).numpy()
        for at, ends in self.ends.items():
            for name, v in ends.items():
                rows = self._of_every_prompt(at, v, v[0][:0])
                padded = pad_sequence(rows, batch_first=True, padding_value=torch.nan)
                out[f"{_folder(at)}/ends_{name}"] = padded.numpy()
        for at, points in self.of_points.items():
            out |= {f"{_folder(at)}/points_{name}": v.numpy() for name, v in points.items()}
        if self.reference is not None:
            out["reference"] = self.reference.numpy()
        return out

    def _of_every_prompt(self, at: tuple[int, str], values: list[Tensor], none: Tensor) -> list[Tensor]:
        of = dict(zip(self.prompts[at], values, strict=True))
        return [of.get(number, none) for number in range(self.n_prompts)]


def _folder(at: tuple[int, str]) -> str:
    layer, condition = at
    return f"layer{layer}/{condition.replace(' ', '_')}"


def measure(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    sublayers: dict[int, int],
    plane: Plane,
    trajectories: Recorded,
    settings: Any,
    *,
    seed: int,
    done: Callable[[int], object] = lambda n: None,
) -> Found:
    """Perturb each prompt at each layer, with the points and with the controls, and measure recovery."""
    projection = plane.projection.to(lm.device)
    n_points = settings.grid.n**2 if settings.kind == "teleport" else settings.points
    found = Found(len(prompts), n_points, sublayers)
    found.several = bool((trajectories.sequence.diff() == 0).any())
    generator = torch.Generator().manual_seed(seed)
    for number, prompt in enumerate(prompts):
        reference = run_reference(lm, prompt.tokens)
        points = {
            layer: _states(settings, plane, reference, s, trajectories, prompt, generator)
            for layer, s in sublayers.items()
        }
        found.n_points = min(found.n_points, *(len(states) for states in points.values()), n_points)
        conditions = {settings.kind: points}
        conditions[RANDOM] = {
            layer: random_directions(reference.stream[s], points[layer], generator=generator)
            for layer, s in sublayers.items()
        }
        rows = {layer: _usable(trajectories, s, reference.stream[s], prompt) for layer, s in sublayers.items()}
        if number == 0:
            found.alike = {layer: len(trajectories.sequence) - len(usable) for layer, usable in rows.items()}
        if settings.kind != "swap":
            conditions[SWAPPED] = {
                layer: _swapped(trajectories, rows[layer], s, reference.stream[s], n_points, generator)
                for layer, s in sublayers.items()
                if len(rows[layer])
            }
        conditions[FROZEN] = points
        for condition, states in conditions.items():
            if not states:
                continue
            continued = continue_all(
                lm,
                reference,
                [(s, states[layer]) for layer, s in sublayers.items() if layer in states],
                position=settings.position,
                freeze_attention=condition == FROZEN,
                log_probs=True,
            )
            for layer, result in zip(states, continued, strict=True):
                _add(found, (layer, condition), reference, result, projection, sublayers[layer], number)
        if number == 0:
            found.reference = encode(projection, reference.stream).cpu()
            if settings.position == "last":
                ranges = linear_ranges(lm, prompt.tokens, {s: points[layer] for layer, s in sublayers.items()})
                found.linear = {layer: ranges[s] for layer, s in sublayers.items()}
        done(1)
    return found


def _states(
    settings: Any,
    plane: Plane,
    reference: Reference,
    s: int,
    trajectories: Recorded,
    prompt: Prompt,
    generator: torch.Generator,
) -> Tensor:
    state = reference.stream[s]
    if settings.kind == "teleport":
        grid = grid_states(
            plane.projection, state.to(torch.float32), plane.ranges, settings.grid.n, settings.off_plane, s
        )
        return grid.states.to(state.dtype)
    if settings.kind == "noise":
        noisy = noise_states(state, settings.noise.sigma, settings.points, generator=generator)
        return _through(settings, plane, state, s, noisy)
    rows = _usable(trajectories, s, state, prompt)
    if len(rows) == 0:
        raise UserError(
            "perturb.kind=swap: there are no other sequences whose state differs from the prompt's, to swap in. Give "
            "more text (data.limit, perturb.samples), deeper perturb.layers, or another prompt."
        )
    return _through(settings, plane, state, s, _swapped(trajectories, rows, s, state, settings.points, generator))


def _through(settings: Any, plane: Plane, state: Tensor, s: int, states: Tensor) -> Tensor:
    """States as they are, or what the projection holds of them, as ``perturb.through`` says."""
    if settings.through == "full":
        return states
    x, reference = states.to(torch.float32), state.to(torch.float32)
    return through_projection(plane.projection, reference, x, settings.off_plane, s).to(state.dtype)


def _usable(trajectories: Recorded, s: int, state: Tensor, prompt: Prompt) -> Tensor:
    """The trajectories whose state is not the prompt's own: at the first sublayer the same token is the same state, but
    for the cache's rounding, and putting it in would perturb nothing. No token of the prompt's own sequence is one.
    """
    own = state.to("cpu", torch.float32)
    away = torch.cat([(part[:, s].to(torch.float32) - own).norm(dim=-1) for part in trajectories.x.split(256)])
    usable = away > 0.02 * own.norm()
    if prompt.sequence is not None:
        usable &= trajectories.sequence != prompt.sequence
    return usable.nonzero().flatten()


def _swapped(trajectories: Recorded, rows: Tensor, s: int, state: Tensor, n: int, generator: torch.Generator) -> Tensor:
    states = swapped_states(trajectories.x[rows, s][:, None], 0, n=min(n, len(rows)), generator=generator)
    return states.to(state.device, state.dtype)


def _add(
    found: Found,
    key: tuple[int, str],
    reference: Reference,
    result: Continued,
    projection: Projection,
    s: int,
    number: int,
) -> None:
    """Measure one batch of points of a prompt, and keep its means; of the first prompt, the points themselves."""
    found.prompts.setdefault(key, []).append(number)
    measured: Recovery = recovery(reference.stream[s:], result.stream, projection, s)
    numbers = summary(measured)
    assert reference.log_probs is not None and result.log_probs is not None
    divergence = kl(reference.log_probs, result.log_probs)
    values = found.values.setdefault(key, {})
    scalars = {name: getattr(numbers, name) for name in SCALARS}
    defined = measured.relative.isfinite().all(1) & (measured.distance[:, 0] > 0)  # the points that summary() counts
    curves = {"relative_curve": measured.relative[defined].mean(0), "cosine_curve": measured.cosine[defined].mean(0)}
    for name, value in (scalars | curves | {"kl": divergence[defined].mean()}).items():
        values.setdefault(name, []).append(torch.as_tensor(value).cpu())
    ends = found.ends.setdefault(key, {})
    for name, value in {
        "relative_put": measured.relative[:, 0],
        "relative": measured.relative[:, -1],
        "cosine_put": measured.cosine[:, 0],
        "cosine": measured.cosine[:, -1],
        "kl": divergence,
        "nearer": torch.minimum(nearer(measured.distance), nearer(measured.relative)),
        "contraction": rates(measured.distance, measured.norm).contraction,
    }.items():
        ends.setdefault(name, []).append(value.cpu())
    if number == 0:
        found.of_points[key] = {
            "relative": measured.relative.cpu(),
            "cosine": measured.cosine.cpu(),
            "kl": divergence.cpu(),
            "latents": encode(projection, result.stream, s).cpu(),
        }
