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
"""

__version__ = "0.1.0"
