"""An environment that claims ranks without a launcher is named before anything is done."""

import pytest

from rsdyn.errors import UserError
from rsdyn.ranks import check_ranks, in_batch_script

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}
SRUN = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_JOB_NAME": "train"}
SBATCH = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NAME": "train"}
LIGHTNING = {"LOCAL_RANK": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("env", "n", "words"),
    [
        ({"RANK": "1"}, 1, ["RANK=1", "unset RANK", "devices"]),
        ({"RANK": "1", "WORLD_SIZE": "4"}, 1, ["unset RANK WORLD_SIZE"]),
        ({"LOCAL_RANK": "3"}, 1, ["LOCAL_RANK=3"]),
        ({"SLURM_PROCID": "2", "RANK": "0"}, 1, ["SLURM_PROCID=2 in"]),
        ({"NODE_RANK": "1"}, 1, ["NODE_RANK=1"]),
        (TORCHRUN, 1, ["RANK=1 and LOCAL_RANK=1", "the run has one"]),
        ({"RANK": "1"}, 2, ["RANK=1", "no launcher started it"]),
        ({"LOCAL_RANK": "0"}, 2, ["LOCAL_RANK=0", "no launcher started it"]),
        ({"RANK": "1"}, None, ["no launcher started it"]),
        ({"TORCHELASTIC_RUN_ID": "none", "RANK": "0"}, 2, ["TORCHELASTIC_RUN_ID=none", "LOCAL_RANK, WORLD_SIZE is"]),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, 2, ["SLURM_NTASKS=2", "SLURM_PROCID, SLURM_LOCALID is"]),
        ({"RANK": "first"}, 1, ["RANK=first", "not the number of a process"]),
    ],
)
def test_left_over_ranks_are_named(env, n, words):
    with pytest.raises(UserError) as caught:
        check_ranks(n_processes=n, env=env)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("env", [{}, {"RANK": "0"}, {"RANK": "", "WORLD_SIZE": "8"}, {"SLURM_NTASKS": "4"}])
def test_a_run_of_one_process_asks_for_nothing_else(env):
    check_ranks(n_processes=1, env=env)


@pytest.mark.parametrize(
    "env", [TORCHRUN, SRUN, SBATCH, LIGHTNING, {}, {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "bash"}]
)
@pytest.mark.parametrize("n", [2, None])
def test_launchers_and_whoever_starts_processes_itself_pass(env, n):
    check_ranks(n_processes=n, env=env)


@pytest.mark.parametrize(
    ("env", "batch"),
    [(SBATCH, True), (SRUN, False), (SRUN | {"SLURM_PROCID": "0"}, False), (SBATCH | {"SLURM_STEP_ID": "0"}, False),
     ({}, False), (TORCHRUN, False), (SBATCH | TORCHRUN, False)],
)  # fmt: skip
def test_a_batch_script_is_told_from_what_srun_starts(env, batch):
    assert in_batch_script(env) == batch


def test_several_machines_need_srun():
    with pytest.raises(UserError, match=r"SLURM_NTASKS=2 .*srun did not start this .*2 machines.*Put srun before"):
        check_ranks(n_processes=2, n_nodes=2, env=SBATCH)
    check_ranks(n_processes=2, n_nodes=2, env=SBATCH | {"SLURM_STEP_ID": "0"})
    check_ranks(n_processes=4, n_nodes=2, env=SBATCH | TORCHRUN)
