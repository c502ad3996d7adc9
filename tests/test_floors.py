"""The architecture, kept by a test: who may import whom, and no path of one machine in what we ship."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train", "analyze", "perturb")
FLOORS = (
    (
        "rsdyn",
        "rsdyn.allocator",
        "rsdyn.errors",
        "rsdyn.options",
        "rsdyn.config",
        "rsdyn.dynamics.*",
        "rsdyn.embedded.*",
    ),
    ("rsdyn.cli", "rsdyn.stream.*", "rsdyn.autoencoder"),
)  # everything else in rsdyn is floor 2, the scripts are floor 3


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(p): p for p in [*ROOT.glob("rsdyn/**/*.py"), *(ROOT / f"{s}.py" for s in SCRIPTS)] if p.is_file()}


def floor(module: str) -> int:
    if module in SCRIPTS:
        return 3
    for level, patterns in enumerate(FLOORS):
        if any(f"{module}.".startswith(p[:-1]) if p.endswith(".*") else module == p for p in patterns):
            return level
    return 2


def imported(path: Path, package: str) -> set[str]:
    """Every module that a file imports, also inside functions and under ``TYPE_CHECKING``, by full name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from rsdyn.stream import lm` imports a module, `from rsdyn.errors import UserError` a name in one
            full = {f"{base}.{alias.name}" for alias in node.names}
            names |= {n if n in MODULES else base for n in full}
    return names


def package_of(module: str) -> str:
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


IMPORTS = {module: imported(path, package_of(module)) for module, path in MODULES.items()}


def test_the_walk_sees_what_is_there():
    assert {"train", "rsdyn", "rsdyn.metrics", "rsdyn.dynamics.moments", "rsdyn.stream.lm"} <= MODULES.keys()
    assert "rsdyn.dynamics.moments" in IMPORTS["rsdyn.autoencoder"]
    assert "rsdyn.embedded" in IMPORTS["rsdyn.stream.source"]  # from rsdyn import embedded
    assert "rsdyn.datamodule" in IMPORTS["train"]  # inside a function
    assert [floor(m) for m in ("rsdyn", "rsdyn.dynamics.moments", "rsdyn.stream", "rsdyn.metrics", "train")] == [
        0,
        0,
        1,
        2,
        3,
    ]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_or_stay(module):
    ours = {n for n in IMPORTS[module] if n.split(".")[0] in ("rsdyn", *SCRIPTS)}
    assert ours <= MODULES.keys(), f"{module} imports {ours - MODULES.keys()}, which is not there"
    up = {n for n in ours if floor(n) > floor(module)}
    assert not up, f"{module} (floor {floor(module)}) imports {up} from a floor above"
    assert not ours & set(SCRIPTS), "nobody imports a script"


def test_no_cycles():
    graph = {m: {n for n in names if n in MODULES and n != m} for m, names in IMPORTS.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError with the cycle


def test_dynamics_is_pure():
    heavy = {"lightning", "pytorch_lightning", "torchmetrics", "transformers", "datasets", "omegaconf", "wandb"}
    files = [m for m in MODULES if m.startswith("rsdyn.dynamics")]
    assert len(files) >= 3
    for module in files:
        packages = {n.split(".")[0] for n in IMPORTS[module]}
        assert not packages & heavy, f"{module} imports {packages & heavy}"
        ours = {n for n in IMPORTS[module] if n.startswith("rsdyn")}
        assert all(n.startswith(("rsdyn.dynamics", "rsdyn.errors")) for n in ours), f"{module} imports {ours}"


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
