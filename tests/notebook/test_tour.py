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

KEEP = """
import numpy as np
np.savez(
    os.environ["RSDYN_TOUR_KEEPS"], x=x.tensor, r=found.correlation.value, cosine=found.cosine.value,
    speed=found.speed.value, turns=found.rotation.turns, tokens=x.origin.sequences[1],
    trend=found.finding("speed_trend").values["original"].value,
)
"""


def printed(cell) -> str:
    """What a cell printed, and what its last line is as text."""
    outputs = cell.get("outputs", [])
    return "".join(o.text if o.output_type == "stream" else o.data.get("text/plain", "") + "\n" for o in outputs)


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
    r = [np.mean([np.corrcoef(x[:, s, u], x[:, s + 1, u])[0, 1] for u in range(128)]) for s in (1, 9, 30)]
    np.testing.assert_allclose(found["r"][[1, 9, 30]], r, atol=1e-6)
    norms = np.linalg.norm(x, axis=2)
    cosine = (x[:, 1:] * x[:, :-1]).sum(2) / norms[:, 1:] / norms[:, :-1]
    np.testing.assert_allclose(found["cosine"], cosine.mean(0), atol=1e-5)
    np.testing.assert_allclose(found["speed"], np.linalg.norm(np.diff(x, axis=1), axis=2).mean(0), rtol=1e-4)
    by_layer = found["speed"][:-1].reshape(-1, 2).mean(1)
    assert found["trend"] == pytest.approx(spearmanr(np.arange(15), by_layer).statistic)


def test_turns_are_the_winding_of_the_tangent(small):
    _, found, _ = small
    a = found["x"].astype(np.float64).mean(0)
    angle = np.unwrap(np.arctan2(np.diff(np.gradient(a, axis=0), axis=0), np.diff(a, axis=0)), axis=0)
    np.testing.assert_allclose(found["turns"], (angle[0] - angle[-1]) / (2 * np.pi), atol=1e-3)


SHARE = re.compile(r"(\w+_shuffle)\s+(\d+)% of the units beyond it")


def test_the_shares_that_are_printed_are_of_the_tests(small):
    tour, found, _ = small
    said = "".join(map(printed, tour.cells))
    assert {null for null, _ in SHARE.findall(said)} == {"layer_shuffle", "innovation_shuffle"}
    mean = re.search(r"mean clockwise turns of a unit: (\S+)", said)[1]
    assert float(mean) == pytest.approx(np.abs(found["turns"]).mean(), abs=0.006)


# -- as stored ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(TOUR, as_version=4)


def test_as_stored_it_was_run_in_order_and_whole(stored):
    nbformat.validate(stored)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert 8 <= len(code) <= 12
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 7
    assert sum(len(cell.source.splitlines()) for cell in code[1:]) <= 25, "what five names do fits 25 lines"
    assert "Trajectories(1000 × 32 × 128" in "".join(map(printed, code))


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
    text = "".join(map(printed, stored.cells))
    beyond = {null: int(share) for null, share in SHARE.findall(text)}
    assert beyond["layer_shuffle"] > 25 > 15 > beyond["innovation_shuffle"]
    cae, flat = re.search(r"explained variance (\S+), PCA's (\S+), latents fill", text).groups()
    assert float(cae) > float(flat)
    nearer = re.findall(r"^(\d+|) +(teleport|stays put) .* (\d+) %", text, re.MULTILINE)
    teleported, still = ([int(n) for _, name, n in nearer if name == of] for of in ("teleport", "stays put"))
    assert len(teleported) == len(still) == 3
    assert sum(t > s for t, s in zip(teleported, still, strict=True)) <= 1, "points are brought back"


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
    assert compared > 40
