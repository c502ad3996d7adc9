"""What a run of train.py shows: its curves and numbers for the runs table (keys: `rsdyn.tracking.keys`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsdyn.files import plain
from rsdyn.tracking.log import Curves


def curves(results: Mapping[str, Any]) -> Curves:
    """Explained variance and distance of latents over depth; ``results`` are those of `LitAutoencoder`.

    Explained variance is about each sublayer's own mean, in the space of the loss, as in Fig. 3D.
    """
    distance, std = results["latent_distance"], results["latent_distance_std"]
    return {
        "explained_variance": {"autoencoder": plain(results["ev_cae"]), "pca": plain(results["ev_pca"])},
        "latent_distance": {
            "autoencoder": plain(distance),
            "autoencoder_low": plain(distance - std),
            "autoencoder_high": plain(distance + std),
        },
    }


def summary_numbers(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a ``summary.json`` that belong in the runs table, by section, and how it collapsed in words."""
    test = {k: v for k, v in summary["test"].items() if not hasattr(v, "__len__")}
    sublayers = {"ev_cae_median": summary["explained_variance"], "ev_pca_median": summary["explained_variance_pca2"]}
    return {
        "test": test | {k: float(v.nanmedian()) for k, v in sublayers.items()}
        | {"n_massive_units": len(summary["test"]["massive_units"])}
        | {"collapse": "; ".join(summary["test"]["collapse"]) or "none"},
        "best": {"epoch": summary["best_epoch"], "val_loss": summary["best_val_loss"]},
        "fit": {k: summary[k] for k in ("epochs", "stopped_early", "n_parameters")}
        | {"seconds": summary["seconds"]["fit"]},
    }  # fmt: skip
