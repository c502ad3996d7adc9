"""Which process of a run this one is, asked before any Trainer exists."""

from __future__ import annotations

import os
from collections.abc import Mapping

from rsdyn.errors import UserError

_BY_HAND = ("bash", "interactive")  # names of SLURM jobs in which somebody types
RANK_VARIABLES = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")


def is_rank_zero(env: Mapping[str, str] | None = None) -> bool:
    """Tell whether this process is the first of its run, before any Trainer exists to ask.

    True when every rank variable that is set is 0: a child of Lightning's ddp launcher may inherit ``SLURM_PROCID=0``
    from its parent while its own ``LOCAL_RANK`` is 1, so no single variable decides.
    """
    env = os.environ if env is None else env
    return all(env.get(name, "") in ("", "0") for name in RANK_VARIABLES)


def check_ranks(*, n_processes: int | None, n_nodes: int = 1, env: Mapping[str, str] | None = None) -> None:
    """Raise ``UserError`` where the environment says that others started this process, and nobody did.

    Variables of a launcher outlive it in a shell that sources a job's environment, in a container, in a notebook. A
    process that believes ``RANK=1`` prints nothing and writes nothing, one that believes ``LOCAL_RANK=0`` waits for
    others.

    Args:
        n_processes: how many the run has by its settings; None where the machine decides.
        n_nodes: on how many machines.
        env: the environment; default the process' own.
    """
    env = os.environ if env is None else env
    if n_nodes > 1 and in_batch_script(env):
        raise UserError(
            f"SLURM_NTASKS={env['SLURM_NTASKS']} in the environment is of a SLURM job, but srun did not start this "
            f"process (SLURM_STEP_ID is not set), and a run on {n_nodes} machines needs one process for each device. "
            "Put srun before the command."
        )
    claimed = {name: env[name] for name in RANK_VARIABLES if env.get(name)}
    shown = " and ".join(f"{name}={value}" for name, value in claimed.items() if value != "0") or "its rank"
    unset = "unset " + " ".join(name for name in (*RANK_VARIABLES, "WORLD_SIZE") if env.get(name))
    for name, value in claimed.items():
        if not value.isdecimal():
            raise UserError(f"{name}={value} in the environment is not the number of a process. Leave it out: {unset}.")
    if n_processes == 1:
        if not is_rank_zero(env):
            raise UserError(
                f"{shown} in the environment says that this is not the first process of its run, but the run has one "
                f"alone, and nothing of it would be shown. If it is left over from another session: {unset}. For "
                "several processes set `devices`, and start as many with torchrun or srun."
            )
        return
    if (launched := _launcher(env)) is not None:
        needed = {"torchrun": ("RANK", "LOCAL_RANK", "WORLD_SIZE"), "srun": ("SLURM_PROCID", "SLURM_LOCALID")}
        missing = [name for name in needed.get(launched[0], ()) if not env.get(name)]
        if missing:
            raise UserError(
                f"{launched[1]}={env[launched[1]]} in the environment is of {launched[0]}, which did not start this "
                f"process: {', '.join(missing)} is not set. Start it with {launched[0]}, or unset {launched[1]}."
            )
        return
    if not is_rank_zero(env) or env.get("LOCAL_RANK"):
        raise UserError(
            f"{' and '.join(f'{name}={value}' for name, value in claimed.items())} in the environment says that this "
            "is one process of several, but no launcher started it (there is neither TORCHELASTIC_RUN_ID nor "
            f"MASTER_ADDR). If it is left over from another session: {unset}. Else start all with torchrun or srun."
        )


def in_batch_script(env: Mapping[str, str] | None = None) -> bool:
    """Whether this process stands in a SLURM job, but no ``srun`` started it: the line of a batch script itself.

    A job of several tasks says ``SLURM_NTASKS=4`` to its script too, and ``SLURM_PROCID=0``; who takes that for a
    launcher waits for three processes that nobody starts. ``SLURM_STEP_ID`` is set by ``srun`` alone. Not so where
    ``torchrun`` started the process, whatever it stands in.
    """
    env = os.environ if env is None else env
    first = all(env.get(name, "") in ("", "0") for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    launched = env.get("SLURM_STEP_ID") or env.get("TORCHELASTIC_RUN_ID")
    return bool(env.get("SLURM_NTASKS")) and first and not launched


def _launcher(env: Mapping[str, str]) -> tuple[str, str] | None:
    """What started this process, and the variable that says so."""
    if env.get("TORCHELASTIC_RUN_ID"):
        return "torchrun", "TORCHELASTIC_RUN_ID"
    if env.get("SLURM_NTASKS") and not in_batch_script(env) and env.get("SLURM_JOB_NAME") not in _BY_HAND:
        return "srun", "SLURM_NTASKS"
    return ("somebody", "MASTER_ADDR") if env.get("MASTER_ADDR") else None  # Lightning itself, or by hand
