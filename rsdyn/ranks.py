"""Which process of a run this one is, asked before any Trainer exists."""

from __future__ import annotations

import os
from collections.abc import Mapping

RANK_VARIABLES = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")


def is_rank_zero(env: Mapping[str, str] | None = None) -> bool:
    """Tell whether this process is the first of its run, before any Trainer exists to ask.

    True when every rank variable that is set is 0: a child of Lightning's ddp launcher may inherit ``SLURM_PROCID=0``
    from its parent while its own ``LOCAL_RANK`` is 1, so no single variable decides.
    """
    env = os.environ if env is None else env
    return all(env.get(name, "") in ("", "0") for name in RANK_VARIABLES)
