"""Runs of the scripts in forked children of one warm process, since starting Python and Lightning takes six seconds.

As a program it reads one JSON object a line, forks, runs ``main(argv)`` in the child, and answers with how that
ended. ``Nursery`` talks to such a program. What is asked of a run:

    argv       the words of the command line
    script     analyze or perturb instead of train
    ranks      how many processes, as torchrun would start them; default one
    log        a file that gets a line a training batch: epoch, batch, which vectors it held, its loss to the last bit;
               process 1 writes to the same name with a 1 behind it
    cwd        the folder it runs in
    draw       draw global random numbers in each step
    every      save last.ckpt after so many steps
    signal     its name; the run sends it to itself, once
    at_step    before it takes this step
    at_record  when so many sequences went through the language model
    at_shard   before it reads or records this shard
    where      when this function is called next, such as rsdyn.figures.static:save
    then       so many times more, the next times that one of these comes
    to         which processes are sent the signal, from outside
    after      when each of them has trained on so many batches
"""

import contextlib
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Nursery:
    """A warm process; use as a context manager."""

    def __enter__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RSDYN_RUN_DIR": ""}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()

    def run(self, **asked):
        """Run it to its end: the answer, a dictionary with these entries.

        codes: the exit code of each process, below zero the signal that killed it, None when it had to be killed.
        code: that of the first. said: what they printed. seconds: from the signal that came from outside to the end.
        """
        self.process.stdin.write(json.dumps(asked, default=str) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return {**answer, "code": answer["codes"][0]}


def read_log(path):
    """``{(epoch, batch): (vectors, loss)}`` of a log, and how many batches were trained on more than once.

    A batch that was trained on twice must have been the same, with the same loss.
    """
    seen, again = {}, 0
    for line in Path(path).read_text().splitlines():
        epoch, batch, vectors, loss = line.split()
        key, value = (int(epoch), int(batch)), (vectors, loss)
        again += key in seen
        assert seen.setdefault(key, value) == value, f"batch {key} is not the one it was before: {value}, {seen[key]}"
    return seen, again


# -- the program -------------------------------------------------------------------------------------------------------


@cache
def described():
    from rsdyn.run.provenance import provenance

    return provenance()


def prepare(asked):
    """Hook the log and the signals into a run that is about to start in this process."""
    import numpy as np
    import torch
    import xxhash

    from rsdyn.autoencoder.training import LitAutoencoder
    from rsdyn.figures import static
    from rsdyn.run import script
    from rsdyn.run.checkpoints import LastCheckpoint
    from rsdyn.stream.datamodule import ResidualStreamDataModule
    from rsdyn.stream.trajectories import TrajectoryStream

    # what takes seconds and is looked at elsewhere
    static.save = lambda *args, **kwargs: None
    script.provenance = lambda **extra: {**described(), **extra}
    left = [1 + asked.get("then", 0)]

    def send():
        if left[0] > 0:
            left[0] -= 1
            os.kill(os.getpid(), getattr(signal, asked["signal"]))

    step, recorded = LitAutoencoder.training_step, ResidualStreamDataModule._recorded

    def training_step(self, batch, batch_idx):
        if asked.get("at_step") is not None and self.global_step >= asked["at_step"]:
            send()
        if asked.get("draw"):
            torch.rand(1)
            random.random()
            np.random.rand()  # noqa: NPY002
        loss = step(self, batch, batch_idx)
        if "log" in asked:
            vectors = xxhash.xxh3_64_hexdigest(batch.sequence.numpy().tobytes() + batch.sublayer.numpy().tobytes())
            with open(f"{asked['log']}{self.global_rank or ''}", "a") as file:
                file.write(f"{self.current_epoch} {batch_idx} {vectors} {float(loss.detach()).hex()}\n")
        return loss

    total = [0]

    def _recorded(self, n):
        total[0] += n
        if asked.get("at_record") is not None and total[0] >= asked["at_record"]:
            send()
        recorded(self, n)

    shard = TrajectoryStream.shard

    def shard_and_signal(self, k, *more):
        if k == asked.get("at_shard"):
            send()
        return shard(self, k, *more)

    TrajectoryStream.shard = shard_and_signal
    LitAutoencoder.training_step = training_step
    ResidualStreamDataModule._recorded = _recorded
    if "every" in asked:
        LastCheckpoint._due = lambda self, trainer: trainer.global_step - self._saved_step >= asked["every"]
    if "where" in asked:
        module, _, path = asked["where"].partition(":")
        owner = importlib.import_module(module)
        *parts, name = path.split(".")
        for part in parts:
            owner = getattr(owner, part)
        real = getattr(owner, name)

        def called(*args, **kwargs):
            send()
            return real(*args, **kwargs)

        setattr(owner, name, called)


def be_born(asked, rank, output, port):
    """The child: run, and leave with the exit code."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if port is not None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    code = 99
    try:
        os.chdir(asked.get("cwd", "."))
        script = importlib.import_module(f"rsdyn.commands.{asked.get('script', 'train')}")
        prepare(asked)
        code = script.main(asked["argv"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def lines_of(path):
    try:
        return Path(path).read_text().count("\n")
    except FileNotFoundError:
        return 0


def attend(asked):
    """Fork, send what is to be sent, and wait for all to end."""
    ranks = asked.get("ranks", 1)
    port = None
    if ranks > 1:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
    pending, codes, sent = {}, {}, None
    logs = [f"{asked.get('log')}{rank or ''}" for rank in range(ranks)]
    before = [lines_of(log) for log in logs]
    with tempfile.TemporaryFile("w+") as output:
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                be_born(asked, rank, output, port)
            pending[pid] = rank
        pids = {rank: pid for pid, rank in pending.items()}
        deadline = time.monotonic() + asked.get("timeout", 120)
        while pending:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                codes[pending.pop(pid)] = os.waitstatus_to_exitcode(status)
                continue
            if "to" in asked and sent is None:
                if all(lines_of(logs[rank]) - before[rank] >= asked["after"] for rank in asked["to"]):
                    sent = time.monotonic()
                    for rank in asked["to"]:
                        os.kill(pids[rank], getattr(signal, asked["signal"]))
            elif time.monotonic() > deadline:
                for pid, rank in pending.items():
                    codes[rank] = None
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                pending = {}
            time.sleep(0.01)
        seconds = None if sent is None else time.monotonic() - sent
        output.seek(0)
        said = output.read()
    return {"codes": [codes[rank] for rank in range(ranks)], "said": said, "seconds": seconds}


def warm_up():
    """Run once: what is imported and set up on the way takes a second and a half, which the children inherit."""
    import torch

    from rsdyn.commands import (
        analyze,  # noqa: F401
        perturb,  # noqa: F401
        train,
    )
    from rsdyn.perturbation import points as perturbation  # noqa: F401

    torch.set_num_threads(1)  # so that no thread is there when it forks
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        words = ["data.limit=24", "cache.enabled=false", "cache.shard_sequences=8", "trainer.max_epochs=1"]
        words += ["tracking.mode=disabled", "trainer.accelerator=cpu", f"run.dir={folder}"]
        assert train.main(words) == 0
    del os.environ["RSDYN_RUN_DIR"]
    described()


def main():
    sys.path.insert(0, str(ROOT))
    warm_up()
    for line in sys.stdin:
        print(json.dumps(attend(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
