"""``perturb``: move the stream of a prompt, and measure whether it comes back, beside controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from rsdyn.autoencoder.model import CompressingAutoencoder
from rsdyn.errors import UserError
from rsdyn.figures import static
from rsdyn.figures.perturbation import perturbation_panels
from rsdyn.lm.certificate import certify
from rsdyn.lm.continuing.layer_calls import check_memories
from rsdyn.lm.given import GivenModel
from rsdyn.lm.prefix import find_bos
from rsdyn.notebook.recording import open_model
from rsdyn.perturbation.plane import Plane, Recorded, find_plane
from rsdyn.perturbation.points import measure
from rsdyn.perturbation.prompts import Prompt, layers_of
from rsdyn.perturbation.result import Found, Row
from rsdyn.perturbation.settings import GridConfig, NoiseConfig, PerturbConfig
from rsdyn.perturbation.words import closing_table, words
from rsdyn.stream.recorded import Trajectories
from rsdyn.stream.text.tokens import tokenise_one

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rsdyn.notebook.fitting import FittedAutoencoder

POINT_KINDS = ("teleport", "noise", "swap")


@dataclass(frozen=True, repr=False)
class Perturbed:
    """What came of perturbing some prompts.

    Attributes:
        found: every number, by layer and condition.
        rows: the table's rows, one per layer and condition; each control stands under the perturbation.
        notes: what the controls say, in sentences.
        plane: the projection that points were chosen in.
    """

    found: Found
    plane: Plane
    settings: PerturbConfig

    @property
    def rows(self) -> list[Row]:
        return list(self.found.rows)

    @property
    def notes(self) -> list[str]:
        return words(self.found, self.plane)

    def plot(self, panel: str = "4D") -> Figure:
        """``4D``, ``recovery_relative`` or ``recovery_cosine``, as a matplotlib figure."""
        settings = self.settings
        drawn = perturbation_panels(
            self.found,
            steps=settings.steps,
            name=self.plane.name,
            ratio=None if self.plane.ratio is None else self.plane.ratio.tolist(),
            **{name: getattr(settings, name) for name in ("site", "position", "off_plane")},
        )
        known = {one.key: one for one in drawn}
        name = f"fig4d_{settings.kind}" if panel.upper() == "4D" else panel
        if name not in known:
            raise UserError(f"panel={panel!r}: there is {', '.join(known)}.")
        return static.draw(known[name])

    def __repr__(self) -> str:
        return "\n".join([*closing_table(self.found), "", *self.notes])


def perturb(
    model: Any,
    prompts: str | Sequence[str],
    *,
    around: Trajectories,
    tokenizer: Any = None,
    at: Sequence[float] = (0, 0.25, 0.5, 0.75, 1.0),
    kind: Literal["teleport", "noise", "swap"] = "teleport",
    site: Literal["resid_pre", "resid_mid"] = "resid_pre",
    position: Literal["last", "all"] = "last",
    off_plane: Literal["drop", "keep"] = "drop",
    autoencoder: FittedAutoencoder | CompressingAutoencoder | None = None,
    grid: int = 10,
    points: int = 100,
    sigma: float = 0.5,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: Callable[[int], object] = lambda n: None,
) -> Perturbed:
    """Perturb the stream of prompts and measure recovery beside controls (paper 2.8, Fig. 4D).

    Args:
        model: as :func:`rsdyn.record` takes it, with its LM head; an object comes back as it was.
        prompts: one text, or several.
        around: trajectories of the same model: the plane, its range, and states to swap in come from them.
        tokenizer: of a model object; a named model brings its own.
        at: layers, as fractions of the depth, or whole numbers.
        kind: ``teleport`` (a grid in a plane), ``noise``, or ``swap`` (another sequence's state).
        site, position, off_plane: as ``perturb.site``, ``perturb.position`` and ``perturb.off_plane``.
        autoencoder: whose two latents are the plane; default PCA.
        grid: points along each side of the grid.
        points: points of noise or swap.
        sigma: size of the noise, as a share of the state's norm.
        device: where a named model runs.
        seed: of everything drawn.
        progress: called after each prompt.

    Raises:
        UserError: a model that cannot be continued, a prompt that is empty or too long, a layer that is not there,
            trajectories of another model.
        TypeError: arguments of a kind that is not taken.
    """
    if not isinstance(around, Trajectories):
        raise TypeError(f"around: {type(around).__name__} is not taken; give Trajectories, as rsdyn.record does.")
    if kind not in POINT_KINDS:
        raise UserError(f"kind={kind!r}: give one of {', '.join(POINT_KINDS)}.")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise TypeError("prompts: give one text, or a list of texts.")
    source = open_model(model)
    if (around.shape[1], around.shape[2]) != (source.n_sublayers, source.n_units):
        raise UserError(
            f"around: its trajectories have {around.shape[1]} sublayers of {around.shape[2]} units and the model "
            f"{source.n_sublayers} of {source.n_units}: record them from this model."
        )
    settings = replace(
        PerturbConfig(),
        kind=kind,
        layers=list(at),
        site=site,
        position=position,
        off_plane=off_plane,
        points=points,
        grid=GridConfig(n=grid),
        noise=NoiseConfig(sigma=sigma),
    )
    network: Any = getattr(autoencoder, "model", autoencoder)
    given = _prompts_of(texts, source, tokenizer)
    sublayers = {layer: source.sublayer(layer, site) for layer in layers_of(settings.layers, source.n_layers)}
    check_memories(source.config, source.name)
    if isinstance(source, GivenModel):
        lm = source.load(head=True)
    else:
        lm = source.load(head=True, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    certify(lm, [prompt.tokens for prompt in given])
    recorded = Recorded(around.tensor, around.sequence)
    plane = find_plane(settings, recorded.x, network)
    found = measure(lm, given, sublayers, plane, recorded, settings, seed=seed, done=progress)
    return Perturbed(found, plane, settings)


def _prompts_of(texts: Sequence[str], source: Any, tokenizer: Any) -> list[Prompt]:
    tokenizer = source.tokenizer() if tokenizer is None else tokenizer
    if not callable(tokenizer) or not hasattr(tokenizer, "bos_token_id"):
        raise TypeError(f"tokenizer: {type(tokenizer).__name__} is not taken; give a tokenizer of transformers.")
    bos_id = find_bos(tokenizer).bos_id
    prompts = []
    for number, text in enumerate(texts):
        tokens = tokenise_one(tokenizer, text, bos_id)
        if len(tokens) == 1:
            raise UserError(f"prompts[{number}] is empty. Write some words.")
        if source.max_tokens is not None and len(tokens) > source.max_tokens:
            raise UserError(
                f"prompts[{number}] has {len(tokens)} tokens with BOS, more than the model's context of "
                f"{source.max_tokens}. Shorten it."
            )
        prompts.append(Prompt(np.asarray(tokens)))
    return prompts
