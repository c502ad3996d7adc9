"""The house, kept by a test: who may import whom, and no path of one machine in what we ship."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WINGS = (
    *("ground", "dynamics", "lm", "stream", "metrics", "autoencoder", "analysis", "perturbation", "figures", "report"),
    *("tracking", "config", "run", "notebook", "commands"),
)  # from left to right; the files right in rsdyn/ are the ground, and the embedded data lie on it
FILES = sorted(ROOT.glob("rsdyn/**/*.py"))


def wing_of(name: str) -> int:
    """The place in the line of a dotted name below rsdyn."""
    part = [*name.split("."), ""][1]
    return WINGS.index(part) if part in WINGS else 0


def imported(path: Path) -> set[str]:
    """Every name that a file imports from rsdyn, also inside functions and under ``TYPE_CHECKING``."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    assert not any(isinstance(n, ast.ImportFrom) and n.level for n in nodes), f"{path}: imports are absolute"
    names = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    names |= {f"{n.module}.{alias.name}" for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names}
    return {name for name in names if name.split(".")[0] == "rsdyn"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_from_its_own_wing_or_from_wings_to_its_left(path):
    own = wing_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if path.name in ("__init__.py", "__main__.py") and path.parent.name == "rsdyn":
        own = len(WINGS) - 1  # the front door: public names, and commands
    to_the_right = {name for name in imported(path) if wing_of(name) > own}
    assert not to_the_right, f"{path.relative_to(ROOT)} is in {WINGS[own]}, left of {to_the_right}"


def test_the_line_is_the_whole_house():
    folders = {p.parent.relative_to(ROOT / "rsdyn").parts[0] for p in FILES if p.parent != ROOT / "rsdyn"}
    assert folders - {"embedded"} == set(WINGS) - {"ground"}
    assert len([p for p in FILES if p.parent == ROOT / "rsdyn"]) <= 10, "few files lie flat in the hall"
    stream = ROOT / "rsdyn/stream/trajectories.py"
    assert "rsdyn.lm.source.LMSource" in imported(stream) and wing_of("rsdyn.lm.source") < wing_of("rsdyn.stream")


@pytest.mark.parametrize("path", sorted(ROOT.glob("rsdyn/dynamics/*.py")), ids=lambda p: p.name)
def test_dynamics_is_pure(path):
    packages = {
        (n.module or "").split(".")[0] if isinstance(n, ast.ImportFrom) else n.names[0].name.split(".")[0]
        for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(n, (ast.Import, ast.ImportFrom))
    }
    heavy = {"lightning", "pytorch_lightning", "torchmetrics", "transformers", "datasets", "omegaconf", "wandb"}
    assert not packages & heavy, f"{path.name} imports {packages & heavy}"


# a folder of one machine, at the start of a path and not inside an address or a longer path
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:home|root|Users|work|mnt|scratch)/[\w.-]")
TEXTS = {".py", ".yaml", ".yml", ".toml", ".md", ".sh", ".cfg", ".txt", ""}
FOLDERS = ("rsdyn", "tests", "configs", "benchmarks", ".ci")


def shipped_texts() -> list[Path]:
    """Our own text files; the embedded corpus and model are data, and may speak of anybody's home."""
    found = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix in TEXTS]
    found += [p for p in ROOT.iterdir() if p.is_file() and p.suffix in TEXTS and p.name != ".git"]
    return [p for p in found if "__pycache__" not in p.parts]


def test_no_machine_paths():
    assert MACHINE_PATH.search('x = "' + "/home" + '/ann/data"') and not MACHINE_PATH.search("https://a.org/home/b")
    texts = shipped_texts()
    assert ROOT / "pyproject.toml" in texts and Path(__file__) in texts
    found = {
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in texts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE_PATH.search(line)
    }
    assert not found, "\n".join(sorted(found))


def test_nothing_recommends_installing_this_package_by_a_name_that_no_index_has():
    wrong = re.compile(r"pip install\s+[\"']?rsdyn\b")
    found = [str(p.relative_to(ROOT)) for p in shipped_texts() if wrong.search(p.read_text(encoding="utf-8"))]
    assert wrong.search("pip install 'rs" + "dyn[big]'")
    assert not found
