"""Runs for the tests of the report page: made once per session by the scripts themselves, on a tiny model."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
N, SURROGATES = 40, 40


def make_runs(base: Path, lm: Path) -> dict[str, Path]:
    """The folders of one finished run of each script, made when they are first asked for."""
    folder = base / "runs-of-the-report"
    if not folder.exists():
        sys.path.insert(0, str(ROOT))
        from rsdyn.commands import analyze, perturb, train

        common = [f"lm.name={lm}", f"data.limit={N}", "data.l_max=220", "cache.shard_sequences=16",
                  f"cache.dir={base / 'cache-of-the-report'}", "tracking.mode=disabled"]  # fmt: skip
        scripts = {
            "analyze": (analyze, [
                f"analysis.rotation.surrogates={SURROGATES}", "trainer.accelerator=cpu",
                "analysis.rotation.nulls=[layer_shuffle,increment_shuffle_scaled,token_shuffled]",
                "analysis.conditions=[original,token_shuffled]",
            ]),
            "train": (train, ["trainer.max_epochs=2", "trainer.accelerator=cpu"]),
            "perturb": (perturb, ["perturb.grid.n=3", "perturb.samples=30", "perturb.from_text=0"]),
        }  # fmt: skip
        for name, (script, own) in scripts.items():
            os.environ["RSDYN_RUN_DIR"] = ""
            code = script.main([*common, *own, f"run.dir={folder / name}"])
            assert code == 0, f"{name}.py ended with {code}"
    return {name: folder / name for name in ("analyze", "train", "perturb")}


def altered(run: Path, to: Path, *, summary=None, provenance=None, arrays=None) -> Path:
    """A copy of a run, with what these functions of its summary, its provenance and its arrays make of them."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("figures", "checkpoints"))
    for name, change in (("summary.json", summary), ("provenance.json", provenance)):
        if change:
            found = json.loads((to / name).read_text())
            (to / name).write_text(json.dumps(change(found) or found))
    if arrays:
        with np.load(to / "results.npz") as file:
            found = {key: file[key] for key in file.files}
        np.savez_compressed(to / "results.npz", **(arrays(found) or found))
    return to


def with_massive_units(arrays: dict) -> None:
    """Give an analysis two massive units, without which every curve is half as high."""
    arrays["original/flags/massive_units"] = np.array([3, 5])
    for name in ("activations/density", "activations/participation", "correlation/mean", "cosine/mean",
                 "velocity/speed", "mutual_information/mean", "pca/over_depth/explained", "pca/over_depth/dimensions",
                 "pca/ratio"):  # fmt: skip
        arrays[f"original/{name}/without_massive"] = arrays[f"original/{name}"] / 2


def resized(arrays: dict, sizes: dict[int, int]) -> dict:
    """The arrays with every axis of one length made another, by repetition: a larger model's results in shape."""

    def one(array: np.ndarray) -> np.ndarray:
        for axis, n in enumerate(array.shape):
            if n in sizes:
                array = np.take(array, np.arange(sizes[n]) % n, axis=axis)
        return array

    return {key: one(value) for key, value in arrays.items()}
