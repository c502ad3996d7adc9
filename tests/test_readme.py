"""The README is true: its keys, files and commands exist."""

import re
from pathlib import Path

from rsdyn.config import options

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_key_that_it_names_exists():
    known = options()
    sections = {key.split(".")[0] for key in known if "." in key}
    named = set(re.findall(rf"\b(?:{'|'.join(sections)})\.[a-z_]+(?==|`)", README))
    named -= {name for name in named if name.endswith((".py", ".yaml"))}
    assert len(named) > 20
    assert named - set(known) == set()


def test_the_table_names_every_section_and_the_keys_work_relies_on():
    for key in ("seed", "run.dir", "lm.name", "data.path", "data.condition", "cache.dir", "cae.standardise",
                "trainer.devices", "tracking.mode"):  # fmt: skip
        assert f"`{key}" in README


def test_the_file_tree_names_every_file():
    tree = README[README.index("## The files") :]
    for path in sorted((ROOT / "rsdyn").rglob("*.py")):
        relative = path.relative_to(ROOT / "rsdyn")
        if path.name != "__init__.py" and relative.parts[0] != "embedded":
            assert relative.as_posix() in tree, f"{relative} is missing from the README's tree"
    for name in re.findall(r"^  (\S+\.py) ", tree, re.MULTILINE):
        assert (ROOT / "rsdyn" / name).exists(), f"{name} is in the README's tree and nowhere else"


def test_its_example_of_the_library_runs():
    import torch

    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "surrogates" in b)
    block = block.replace("n_sublayers=32, n_units=128", "n_sublayers=6, n_units=8").replace("n=1000", "n=50")
    block = block.replace("n_components=100", "n_components=5")
    trajectories = torch.randn(40, 6, 8, generator=torch.Generator().manual_seed(0)).cumsum(1)
    given = {"trajectories": trajectories, "x": trajectories[:, 0], "y": trajectories[:, 1]}
    namespace = dict(given)
    exec(block.replace("trajectories = ...", ""), namespace)
    shapes = {
        "moments.correlation(trajectories)": (5, 8),
        "geometry.cosine(trajectories)": (40, 5),
        "geometry.speed(trajectories)": (40, 5),
        "information.consecutive_information(trajectories)": (5, 8),
        'information.mutual_information(x, y, estimator="ksg")': (8,),
        "rotation.rotations(a)": (8,),
        "correlation.compute()": (5, 8),
    }
    for expression, shape in shapes.items():
        assert expression in block
        assert eval(expression, namespace).shape == shape


def test_its_commands_use_the_pins_and_name_scripts_that_exist():
    for heading in ("### Run it", "### Run the tests"):
        block = re.search(rf"{heading}\n.*?```bash\n(.*?)```", README, re.DOTALL)
        assert block
        assert "-c constraints.txt" in block[1]
    for script in set(re.findall(r"python (?:-m )?(\w+\.py)", README)):
        assert (ROOT / script).exists()
    for preset in set(re.findall(r"--config (\w+)(?=\s)", README)):
        assert (ROOT / "configs" / f"{preset}.yaml").exists()
