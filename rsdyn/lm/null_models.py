"""Language models that a trained one is held against: its architecture with weights that say nothing."""

from __future__ import annotations

import copy

import torch

from rsdyn.errors import UserError
from rsdyn.lm.model import LanguageModel


def permuted_weights(lm: LanguageModel, seed: int) -> LanguageModel:
    """A copy of a model with the entries of each weight matrix of its layers permuted at random; without an LM head.

    It keeps the distribution of every matrix's entries, norms, biases, and the embedding, so that the layers are given
    the same tokens; what the entries' places have learnt is gone. Raises ``UserError`` for a model spread over devices.
    """
    if lm.is_spread:
        raise UserError(f"device_map: {lm.name} is spread over devices, and a copy of its weights cannot be permuted.")
    permuted = LanguageModel(copy.deepcopy(lm.base), name=f"{lm.name} (weights permuted)")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in permuted.sites.layers:
            for parameter in (p for p in layer.parameters() if p.ndim > 1):
                order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return permuted
