"""Run scripts on the pretend GPU; which, and with what words, comes as JSON on the input: ``{script: words}``."""

import importlib
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import lightning as L  # noqa: E402
import torch  # noqa: E402
from lightning.pytorch.accelerators import CPUAccelerator  # noqa: E402
from lightning.pytorch.strategies import SingleDeviceStrategy  # noqa: E402
from pretend_gpu import COMPUTED, GPU, pretend_gpu  # noqa: E402

from rsdyn.run import trainer as experiment  # noqa: E402

OF_A_FORWARD = {"aten.mm", "aten.addmm", "aten.linear"}


class PretendAccelerator(CPUAccelerator):
    """Lightning's one of the CPU, for another device."""

    def setup_device(self, device: torch.device) -> None:
        assert device == GPU


class Trainer(L.Trainer):
    def __init__(self, **arguments):
        there = {"accelerator": PretendAccelerator(), "strategy": SingleDeviceStrategy(GPU)}
        super().__init__(**(arguments | there))


def main() -> int:
    experiment.L.Trainer = Trainer
    experiment.device_of = lambda config: GPU
    for script, words in json.load(sys.stdin).items():
        COMPUTED.clear()
        with pretend_gpu():
            code = importlib.import_module(f"rsdyn.commands.{script}").main(words)
        if code:
            return code
        assert not OF_A_FORWARD.isdisjoint(COMPUTED), f"{script}.py: nothing was computed on the GPU"
    return 0


if __name__ == "__main__":
    sys.exit(main())
