"""examples/tour.ipynb runs, small, from first cell to last, and shows what is right; as stored, it is clean."""

import base64
import getpass
import io
import json
import platform
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
TOUR = ROOT / "examples" / "tour.ipynb"
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?%?")
N = 60
LAYER = 7

KEEP = """
import numpy as np
np.savez(
    os.environ["RSDYN_TOUR_KEEPS"], x=x, r=r, cosine=cosine, speed=speed, turns=turns, latents=latents,
    ratio=pca.explained_variance_ratio, r2_pca=found["r2_pca"], r2_cae=found["r2_cae"], loss=found["test_loss"],
    train=datamodule.splits["train"], test=datamodule.splits["test"],
    standard=module.autoencoder.standardise(x), made=module.autoencoder.reconstruct(x).detach(),
    tokens=sequences[1], prompt=prompt, states=grid.states, moved=moved.stream,
    trend=rows["speed with depth (paper: rises)"], windowed=drawn["steps shuffled in windows"],
)
"""


def printed(cell) -> str:
    return "".join(output.text for output in cell.get("outputs", []) if output.output_type == "stream")


def run(folder: Path, environment: dict[str, str], more: list[str]):
    """The tour, executed with nothing of the user's own: Jupyter's settings and temporary files are in `folder`."""
    from execute import execute

    own = {name: str(folder) for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "TMPDIR")}
    return execute(folder, own | environment, more=more)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The tour of 60 sequences and one epoch: its cells as executed, and the arrays that it ended with."""
    folder = tmp_path_factory.mktemp("tour")
    keeps = folder / "keeps.npz"
    settings = {"RSDYN_TOUR_SEQUENCES": str(N), "RSDYN_TOUR_EPOCHS": "1", "RSDYN_TOUR_KEEPS": str(keeps)}
    tour = run(folder, settings, [KEEP])
    with np.load(keeps) as arrays:
        return tour, dict(arrays), folder


@pytest.fixture(scope="module")
def model():
    """The embedded model as transformers gives it: nothing of rsdyn is between it and the test."""
    from transformers import AutoModel

    from rsdyn.embedded import MODEL

    return AutoModel.from_pretrained(MODEL, dtype=torch.float32).eval()


def hidden_states(model, tokens) -> np.ndarray:
    """``(L, D)``, the input of each layer at the last token, by transformers' own account."""
    with torch.inference_mode():
        out = model(torch.as_tensor(tokens)[None], output_hidden_states=True)
    return torch.stack(out.hidden_states[:-1])[:, 0, -1].numpy()


def test_it_says_nothing_on_the_error_stream_and_leaves_nothing_behind(small):
    tour, _, folder = small
    assert [o for c in tour.cells for o in c.get("outputs", []) if o.output_type in ("error", "stream") and
            o.get("name") != "stdout"] == []  # fmt: skip
    assert not list(folder.glob("**/manifest.json")), "the temporary cache is still there"


def test_the_stream_is_what_transformers_computes(small, model):
    _, found, _ = small
    assert found["x"].shape == (N, 32, 128)
    np.testing.assert_allclose(found["x"][1, 0::2], hidden_states(model, found["tokens"]), atol=2e-4)


def test_the_measures_are_what_numpy_and_scipy_make_of_the_stream(small):
    from scipy.stats import spearmanr

    _, found, _ = small
    x = found["x"].astype(np.float64)
    for s, u in ((1, 0), (10, 5), (30, 127)):
        assert found["r"][s, u] == pytest.approx(np.corrcoef(x[:, s, u], x[:, s + 1, u])[0, 1], abs=1e-6)
    norms = np.linalg.norm(x, axis=2)
    cosine = (x[:, 1:] * x[:, :-1]).sum(2) / norms[:, 1:] / norms[:, :-1]
    np.testing.assert_allclose(found["cosine"], cosine, atol=1e-5)
    np.testing.assert_allclose(found["speed"], np.linalg.norm(np.diff(x, axis=1), axis=2), rtol=1e-4)
    by_layer = found["speed"].mean(0)[:-1].reshape(-1, 2).mean(1)
    assert found["trend"] == pytest.approx(spearmanr(np.arange(15), by_layer).statistic)
    rows = x.reshape(-1, 128)
    singular = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
    np.testing.assert_allclose(found["ratio"], singular[:2] / singular.sum(), rtol=1e-4)
    np.testing.assert_allclose(found["latents"].reshape(-1, 2).var(0), singular[:2] / len(rows), rtol=1e-3)


def test_turns_are_the_winding_of_the_tangent(small):
    _, found, _ = small
    a = found["x"].astype(np.float64).mean(0)
    angle = np.unwrap(np.arctan2(np.diff(np.gradient(a, axis=0), axis=0), np.diff(a, axis=0)), axis=0)
    np.testing.assert_allclose(found["turns"], (angle[-1] - angle[0]) / (2 * np.pi), atol=1e-3)


NULLS = re.compile(r"(.*?)\s{2,}(.*?)\s+mean \|R\| (\S+), surrogates' mean R\s+(\S+), units beyond it (\d+)%")


def null_models(tour) -> dict[tuple[str, str], tuple[float, float, int]]:
    """What is printed of a null model and of whose turns: mean |R|, the surrogates' mean R, the share beyond them."""
    cell = next(c for c in tour.cells if c.cell_type == "code" and "rotation_test(" in c.source)
    return {(null, who): (float(r), float(mean), int(n)) for null, who, r, mean, n in NULLS.findall(printed(cell))}


def test_the_null_models_do_what_the_text_says(small):
    """A random walk of 32 steps makes 5.3 turns; the layer shuffle rejects most of them, the windowed one a few."""
    tour, found, _ = small
    table = null_models(tour)
    assert len(table) == 4
    paper, windowed = table["layer shuffle (paper)", "random walk"], table["steps shuffled in windows", "random walk"]
    assert paper[0] == windowed[0] == pytest.approx(5.335, abs=0.4)  # of 128 walks; the README has a thousand
    assert paper[1] == pytest.approx(0, abs=0.2)
    assert windowed[1] == pytest.approx(-windowed[0], abs=0.4)
    assert paper[2] > 50 > 15 > windowed[2]
    # what is drawn of the surrogates is what was tested
    assert found["windowed"].mean() == pytest.approx(table["steps shuffled in windows", "stream"][1], abs=0.5)


def test_the_autoencoder_is_judged_beside_pca_on_sequences_that_neither_saw(small):
    from sklearn.decomposition import PCA

    _, found, _ = small
    train, test, x = found["train"], found["test"], found["x"].astype(np.float64)
    assert not set(train) & set(test)
    rows = x[train].reshape(-1, 128)
    scaled = (x - rows.mean(0)) / rows.std(0)
    np.testing.assert_allclose(found["standard"], scaled, atol=1e-3)
    judged = scaled[test].reshape(-1, 128)
    total = ((judged - judged.mean(0)) ** 2).sum()
    flat = PCA(2, svd_solver="full").fit(scaled[train].reshape(-1, 128))
    missed = ((judged - flat.inverse_transform(flat.transform(judged))) ** 2).sum()
    assert found["r2_pca"] == pytest.approx(1 - missed / total, abs=1e-3)
    errors = (((found["made"] - x) / rows.std(0))[test]) ** 2
    assert found["r2_cae"] == pytest.approx(1 - errors.sum() / total, abs=1e-3)
    assert found["loss"] == pytest.approx(errors.mean(), rel=1e-3)


def test_a_teleport_is_a_whole_forward_with_the_state_replaced(small, model):
    """A hook of the test's own on the model's own layer puts three of the grid's states in."""
    _, found, _ = small
    for point in (0, 45, 99):
        state = torch.from_numpy(found["states"][point]).to(torch.float32)

        def put(module, args, kwargs, state=state):
            (args[0] if args else kwargs["hidden_states"])[:, -1] = state

        handle = model.layers[LAYER].register_forward_pre_hook(put, with_kwargs=True)
        try:
            with torch.inference_mode():
                out = model(torch.as_tensor(found["prompt"])[None], output_hidden_states=True)
        finally:
            handle.remove()
        expected = torch.stack(out.hidden_states[LAYER + 1 : -1])[:, 0, -1].numpy()
        np.testing.assert_allclose(found["moved"][point, 2::2], expected, atol=1e-3)
    tour, _, _ = small
    said = next(printed(c) for c in tour.cells if "teleport(lm" in c.source)
    assert float(re.search(r"whole forward: (\S+)", said)[1]) < 1e-3


# -- as stored ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(TOUR, as_version=4)


def test_as_stored_it_was_run_in_order_and_whole(stored):
    nbformat.validate(stored)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert 12 <= len(code) <= 18
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 10
    assert "1000 trajectories of 32 sublayers x 128 units" in "".join(map(printed, code))


def test_as_stored_it_is_small_and_says_nothing_of_a_machine(stored):
    from PIL import Image

    assert TOUR.stat().st_size < 1_500_000
    assert set(stored.metadata) == {"kernelspec", "language_info"}
    assert all(not cell.metadata for cell in stored.cells)
    written = json.dumps(stored.cells, default=dict)
    pictures = re.findall(r'"image/png": "([^"]+)"', written)
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture.replace("\\n", "")))) as found:
            assert not found.info.get("Software"), "the picture names what drew it"
    written = re.sub(r'"image/png": "[^"]+"', "", written)
    for word in ("/home/", "/tmp", "/root", "/usr/", "site-packages", "Traceback", str(ROOT), str(Path.home()),
                 tempfile.gettempdir(), platform.node() or "-"):  # fmt: skip
        assert word not in written
    if len(getpass.getuser()) > 4:  # a short name may be a word
        assert getpass.getuser() not in written


def test_what_its_text_says_is_in_its_numbers(stored):
    """The sentences between the cells were written about these outputs: each claim that a number can bear out."""
    text = "".join(printed(cell) for cell in stored.cells)
    table = null_models(stored)
    assert table["layer shuffle (paper)", "random walk"][2] > 50 > 15 > table["steps shuffled in windows", "stream"][2]
    first, last = re.search(r"(\d+)% at the first sublayer, (\d+)% at the last", text).groups()
    assert int(first) < int(last)
    truth, floor = re.search(r"sublayers: (\S+) nats; floor (\S+)", text).groups()
    assert float(floor) < float(truth) / 10
    cae, flat = re.search(r"autoencoder (\S+), PCA with 2 components (\S+)", text).groups()
    assert float(cae) > float(flat)
    ends = re.findall(r"(\d\.\d+) as put, (\d\.\d+) at the end; nearer in distance .* (\d+)%, in both (\d+)%", text)
    assert len(ends) == 3
    for put, end, relative, both in ends:  # ratios improve, and nothing is pulled back
        assert float(end) < float(put) and int(relative) > 50 > 10 > int(both)


@pytest.mark.slow
def test_run_again_at_its_full_size_it_gives_the_numbers_that_are_stored(stored, tmp_path):
    again = run(tmp_path, {"RSDYN_TOUR_SEQUENCES": "1000", "RSDYN_TOUR_EPOCHS": "15"}, [])
    compared = 0
    for before, after in zip(stored.cells, again.cells, strict=True):
        old, new = NUMBER.findall(printed(before)), NUMBER.findall(printed(after))
        assert len(old) == len(new)
        for a, b in zip(old, new, strict=True):
            percent = a.endswith("%")
            a, b = float(a.rstrip("%")), float(b.rstrip("%"))
            assert b == pytest.approx(a, rel=0.05, abs=3 if percent else 0.02)
            compared += 1
    assert compared > 60
