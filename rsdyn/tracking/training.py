"""What a run of train.py shows: its curves and numbers for the runs table (keys: `rsdyn.tracking.keys`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsdyn.autoencoder.result import Trained
from rsdyn.files import plain
from rsdyn.tracking.log import Series


def curves(found: Trained) -> Series:
    """Explained variance and distance of latents over depth.

    Explained variance is about each sublayer's own mean, in the space of the loss, as in Fig. 3D.
    """
    ours, theirs = found.explained["own"]
    return {
        "explained_variance": {"autoencoder": plain(ours), "pca": plain(theirs)},
        "latent_distance": {
            "autoencoder": plain(found.distance),
            "autoencoder_low": plain(found.distance - found.distance_std),
            "autoencoder_high": plain(found.distance + found.distance_std),
        },
    }


def summary_numbers(summary: Mapping[str, Any], found: Trained) -> dict[str, Any]:
    """The numbers of a ``summary.json`` that belong in the runs table, by section, and how it collapsed in words."""
    test = {k: v for k, v in summary["test"].items() if not hasattr(v, "__len__")}
    medians = dict(zip(("ev_cae_median", "ev_pca_median"), found.explained["own"], strict=True))
    return {
        "test": test | {k: float(v.nanmedian()) for k, v in medians.items()}
        | {"n_massive_units": len(summary["test"]["massive_units"])}
        | {"collapse": "; ".join(summary["test"]["collapse"]) or "none"},
        "best": {"epoch": summary["best_epoch"], "val_loss": summary["best_val_loss"]},
        "fit": {k: summary[k] for k in ("epochs", "stopped_early", "n_parameters")}
        | {"seconds": summary["seconds"]["fit"]},
    }  # fmt: skip
