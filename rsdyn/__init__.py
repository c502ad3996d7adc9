"""rsdyn: the residual stream of a transformer, recorded and studied as a dynamical system over depth.

One glossary holds everywhere, in code, docstrings, logs and plots:

=========  =====================================================================
``B``      sequences in a batch (``N`` when all of them are meant)
``T``      tokens
``S``      sublayers, ``2 L`` for ``L`` layers: the system's time axis
``D``      units, the width of the stream
``K``      latent dimensions
=========  =====================================================================

Sublayer ``2 l`` is ``resid_pre[l]`` (the input of layer ``l``, the paper's pre-attention) and ``2 l + 1`` is
``resid_mid[l]`` (after attention was added, the paper's pre-MLP). A *trajectory* is one token of one sequence,
``(S, D)``, its *velocity* ``(S - 1, D)``, its *speed* the norm of that. Models with parallel attention have no
``resid_mid``: there ``S = L``.

The names below are what a notebook begins with; each is read when it is first asked for, so that ``import rsdyn`` takes
no time and ``rsdyn.dynamics`` needs torch, numpy and scipy alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from rsdyn.lm.source import find_lm
    from rsdyn.notebook.fitting import fit_autoencoder
    from rsdyn.notebook.measuring import measure
    from rsdyn.notebook.perturbing import perturb
    from rsdyn.notebook.recording import record
    from rsdyn.stream.exchange import load
    from rsdyn.stream.recorded import Trajectories

__all__ = ["Trajectories", "__version__", "find_lm", "fit_autoencoder", "load", "measure", "perturb", "record"]

_WHERE = {
    "fit_autoencoder": "rsdyn.notebook.fitting",
    "measure": "rsdyn.notebook.measuring",
    "perturb": "rsdyn.notebook.perturbing",
    "record": "rsdyn.notebook.recording",
    "find_lm": "rsdyn.lm.source",
    "load": "rsdyn.stream.exchange",
    "Trajectories": "rsdyn.stream.recorded",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'rsdyn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
