"""What a training comes to, in words and as a table for a terminal. Settings are named as arguments of the wing."""

from __future__ import annotations

from collections.abc import Sequence

from rsdyn.autoencoder.settings import CaeConfig
from rsdyn.autoencoder.summary import TrainingSummary, is_thin
from rsdyn.autoencoder.widths import MARGIN, default_layers, is_starved

SPACES = {"none": "raw", "unit": "unit-standardised", "unit_sublayer": "unit- and sublayer-standardised"}


def widths_in_words(widths: Sequence[int], n_parameters: int, settings: CaeConfig) -> list[str]:
    """How wide the network is, and a warning where a layer is too narrow for the latents behind it."""
    lines = [f"CAE:  widths {' '.join(map(str, widths))} and back, {n_parameters:,} parameters"]
    if is_starved([*widths]):
        enough = default_layers(widths[0], widths[-1], settings.count)
        lines.append(
            f"Warning: the narrowest inner layer has {min(widths[1:-1])} units, and latents behind fewer than "
            f"{widths[-1] + MARGIN} (`bottleneck` + {MARGIN}) tend to lie on a line. Lower `layers` to {enough}, or "
            "leave it out."
        )
    return lines


def answer(found: TrainingSummary) -> list[str]:
    """What was found, in at most six sentences with their numbers."""
    test, n = found.test, found.n_latents
    said = [
        f"Of the variance of raw activations of {test['n_test_sequences']} test sequences the autoencoder's {n} "
        f"latent{'s' * (n > 1)} explain {100 * test['r2_cae_raw']:.1f} %, as many principal components "
        f"{100 * test['r2_pca_raw']:.1f} %."
    ]
    if found.standardise != "none":
        said.append(
            f"In the space of the loss ({SPACES[found.standardise]}) it is {100 * test['r2_cae']:.1f} % and "
            f"{100 * test['r2_pca']:.1f} %."
        )
    if n > 1:
        filled, theirs = test["latent_participation"], test["latent_participation_pca"]
        said.append(f"The latents fill {filled:.3f} of {n} dimensions, the components {theirs:.3f}.")
        if is_thin(found.results):
            said[-1] += (
                f" They are no line: on their longest axis alone they would explain {100 * test['r2_line']:.1f} %."
            )
    if test["collapsed"]:
        said.append(f"The autoencoder collapsed: {', and '.join(test['collapse'])}.")
    return said


def closing_table(found: TrainingSummary, columns: int) -> list[str]:
    """The test beside PCA, in a table of at most this many ``columns`` (60 at least)."""
    test = found.test
    n_massive = len(test["massive_units"])
    # the median, since the first sublayers have next to no variance of their own and values in the minus hundreds
    typical = [float(curve.nanmedian()) for curve in (found.explained, found.explained_pca)]
    rows = [
        ("", "autoencoder", f"PCA, {found.n_latents} component{'s' * (found.n_latents > 1)}"),
        ("test MSE, raw activations", f"{test['test_mse']:.5g}", f"{test['test_mse_pca']:.5g}"),
        ("explained variance, raw", f"{test['r2_cae_raw']:.4f}", f"{test['r2_pca_raw']:.4f}"),
        (f"explained variance, {SPACES[found.standardise]}", f"{test['r2_cae']:.4f}", f"{test['r2_pca']:.4f}"),
        ("  of each sublayer by itself, median", f"{typical[0]:.4f}", f"{typical[1]:.4f}"),
    ]
    if n_massive:
        ours, theirs = (f"{test[f'r2_without_massive_{of}']:.4f}" for of in ("cae", "pca"))
        rows.insert(4, (f"  without the {n_massive} massive unit{'s' * (n_massive > 1)}", ours, theirs))
    if found.n_latents > 1:
        ours, theirs = (f"{test[k]:.2f}" for k in ("latent_participation", "latent_participation_pca"))
        rows.append((f"dimensions that the latents fill, of {found.n_latents}", ours, theirs))
    if found.standardise == "none":
        del rows[3]  # it says the same as the row before it
    widths = (min(50, max(columns, 60) - 32), 13, 19)
    return [
        f"{label:<{widths[0]}}" + "".join(f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=True))
        for label, *values in rows
    ]


def foot(found: TrainingSummary, settings: CaeConfig) -> dict[str, str]:
    """How the training went, by label; without one what belongs to the line above."""
    stop = "stopped early" if found.stopped_early else "all of them"
    lines = {"Epochs": f"{found.epochs}, {stop}; the best was epoch {found.best_epoch}, {found.seconds:.0f} s to fit"}
    if found.dropped:
        lines["Dropped"] = f"{found.dropped} training vectors an epoch, so that all processes take as many steps"
    if found.test["collapsed"]:
        lines["Warning"] = f"the autoencoder collapsed: {', and '.join(found.test['collapse'])}."
        lines[""] = advice(settings, found.widths)
    return lines


def advice(settings: CaeConfig, widths: Sequence[int]) -> str:
    """Which settings may keep an autoencoder from collapsing."""
    changes = ["standardise=unit"] * (settings.standardise == "none")
    if is_starved([*widths]):
        changes.append(f"layers={default_layers(widths[0], widths[-1], settings.count)}")
    if settings.warmup_steps < 500:
        changes.append("warmup_steps=500")
    return f"Try {', '.join([*changes, f'lr={settings.lr / 3:.1g}'])}, or another seed."
