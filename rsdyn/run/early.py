"""What is known before text, cache and W&B are opened, and said then: the machine's devices, the model's shape."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from rsdyn.analysis.checks import check_settings
from rsdyn.analysis.settings import JACOBIAN, READOUT
from rsdyn.autoencoder.model import CompressingAutoencoder
from rsdyn.autoencoder.settings import CaeConfig
from rsdyn.errors import UserError
from rsdyn.lm.continuing.layer_calls import check_memories
from rsdyn.lm.readout import Lens, open_lens
from rsdyn.lm.source import LMSource
from rsdyn.perturbation.layers import changed_layers
from rsdyn.perturbation.plane import open_autoencoder
from rsdyn.perturbation.prompts import layers_of, prompts_of
from rsdyn.perturbation.settings import LAYER_KINDS
from rsdyn.run.run import Run
from rsdyn.run.trainer import on_gpu, processes_here

if TYPE_CHECKING:
    from rsdyn.run.opening import Source

ENOUGH = 1_000_000  # sequences: what the text decides is asked once it is open


def check_machine(run: Run) -> None:
    """Raise ``UserError`` for devices that this machine does not have, and say where processes outnumber its cores."""
    trainer = run.config.trainer
    if trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator={trainer.accelerator}: PyTorch finds no CUDA GPU on this machine. Set "
            "trainer.accelerator=auto or cpu, or run it where there is one."
        )
    wanted = processes_here(run)
    if on_gpu(run.config):
        n, listed = torch.cuda.device_count(), []
        if isinstance(trainer.devices, str) and "," in trainer.devices:
            listed = [int(part) for part in trainer.devices.split(",") if part]
        if wanted > n or any(number >= n for number in listed):
            raise UserError(
                f"trainer.devices={trainer.devices}: this machine has {n} GPU{'s' * (n != 1)}, numbered from 0. Set "
                f"trainer.devices={n} or fewer, or trainer.num_nodes for more machines."
            )
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if wanted > cores:
        run.say(f"Warning: {wanted} processes (trainer.devices) take turns on {cores} core{'s' * (cores != 1)}")


def autoencoder_arguments(cae: CaeConfig, n_units: int, n_sublayers: int) -> dict[str, Any]:
    """The arguments of :class:`CompressingAutoencoder` that the settings ask for, for a stream ``(S, D)``."""
    return {
        "d_in": n_units,
        "bottleneck": cae.bottleneck,
        "layers": cae.layers,
        "count": cae.count,
        "standardise": cae.standardise,
        "n_sublayers": n_sublayers,
    }


def check_model(run: Run, lm: LMSource) -> None:
    """Raise ``UserError`` for what a model of this shape cannot give, whatever the text is."""
    config = run.config
    if run.script == "train":
        with torch.device("meta"):
            CompressingAutoencoder(**autoencoder_arguments(config.cae, lm.n_units, lm.n_sublayers))
    if run.script == "perturb" or (run.script == "analyze" and READOUT in config.analysis.measures):
        lm.check_head()
    if run.script == "perturb":
        _check_perturbation(run, lm)
    if (run.script == "analyze" and config.analysis.measures != [JACOBIAN]) or (
        run.script == "train" and config.analysis.on_train
    ):
        check_settings(
            config.analysis,
            n_sequences=ENOUGH,
            n_trajectories=ENOUGH,
            n_sublayers=lm.n_sublayers,
            n_units=lm.n_units,
            sites_per_layer=len(lm.site_names),
        )
    if run.script == "analyze" and JACOBIAN in config.analysis.measures:
        _check_jacobians(run, lm)
    if run.script == "analyze" and READOUT in config.analysis.measures:
        readout_lens(run, lm)


def readout_lens(run: Run, lm: LMSource) -> Lens:
    """The lens that ``analysis.readout`` asks for; ``UserError`` for a file that is none, or one of another model."""
    path = run.config.analysis.readout.lens
    sizes = {"n_sublayers": lm.n_sublayers, "n_units": lm.n_units, "sites_per_layer": len(lm.site_names)}
    try:
        return open_lens(path, **sizes)
    except UserError as error:
        raise UserError(f"analysis.readout.lens={path}: {str(error).removeprefix(f'{path}: ')}") from error


def _check_perturbation(run: Run, lm: LMSource) -> None:
    settings = run.config.perturb
    layers = None if settings.layers is None else layers_of(settings.layers, lm.n_layers)
    if settings.kind in LAYER_KINDS:
        changed_layers(settings.kind, layers, lm.n_layers)
        return
    for layer in layers or layers_of(None, lm.n_layers):
        lm.sublayer(layer, settings.site)
    open_autoencoder(settings, lm.n_units)
    check_memories(lm.config, lm.name)


def _check_jacobians(run: Run, lm: LMSource) -> None:
    config = run.config
    if wrong := [s for s in config.analysis.jacobian.sublayers or [] if s >= lm.n_sublayers]:
        raise UserError(
            f"analysis.jacobian.sublayers: {wrong[0]} is not one of this model, which has {lm.n_sublayers}, from 0 on."
        )
    if config.analysis.measures == [JACOBIAN] and (processes_here(run) > 1 or config.trainer.num_nodes > 1):
        raise UserError(
            f"trainer.devices={config.trainer.devices}: analysis.measures=[jacobian] alone runs in one process. Set "
            "trainer.devices=1 and trainer.num_nodes=1, or measure something of the stream beside it."
        )
    check_memories(lm.config, lm.name)


def check_prompts(run: Run, source: Source) -> None:
    """Raise ``UserError`` for prompts of perturb.py that are empty, too long, or more than the text has."""
    if run.script == "perturb":
        prompts_of(run.config.perturb, source.sequences, source.lm, seed=run.config.seed)
