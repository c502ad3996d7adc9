"""README and docs are true: their keys, files and commands exist."""

import re
from pathlib import Path
from unittest.mock import create_autospec

from every_panel import every_panel

from rsdyn.config.schema import options

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
DOCS = "\n".join([README, *PAGES.values()])


def test_it_is_one_page():
    assert len(README.encode()) <= 10_000 and len(README.splitlines()) <= 150


def test_every_key_that_it_names_exists():
    known = options()
    sections = {key.split(".")[0] for key in known if "." in key}
    named = set(re.findall(rf"\b(?:{'|'.join(sections)})\.[a-z_]+(?==|`)", DOCS))
    named -= {name for name in named if name.endswith((".py", ".yaml"))} | {"trainer.test"}  # of the library
    assert len(named) > 20
    assert named - set(known) == set()


def test_the_table_names_every_section_and_the_keys_work_relies_on():
    for key in ("seed", "run.dir", "lm.name", "data.path", "data.condition", "cache.dir", "cae.standardise",
                "trainer.devices", "tracking.mode"):  # fmt: skip
        assert f"`{key}" in DOCS


def test_the_architecture_names_every_wing():
    wings = {p.name for p in (ROOT / "rsdyn").iterdir() if p.is_dir() and p.name not in ("__pycache__", "presets")}
    named = set(re.findall(r"`(\w+)/`", PAGES["architecture.md"]))
    assert wings - {"embedded"} <= named
    assert named & wings == wings - {"embedded"}


def test_every_setting_has_its_row():
    import sys

    sys.path.insert(0, str(ROOT / "docs"))
    from make_settings import page

    assert PAGES["settings.md"] == page(), "run python docs/make_settings.py"


def test_its_five_lines_run(tmp_path, monkeypatch):
    import rsdyn
    from rsdyn.notebook.measuring import Found

    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "rsdyn.record" in b)
    monkeypatch.chdir(tmp_path)
    small = [f"Sentence {i} of a text that has {i % 7} and {i % 5} in it, and says nothing else." for i in range(40)]
    block = (
        block.replace('"smollm2"', '"embedded"')
        .replace("texts)", "texts)  #", 1)
        .replace("around=x,", "around=x, grid=2,")
    )
    block = block.replace('controls=["shuffled", "untrained"]', 'controls=["shuffled"], surrogates=10')
    block = block.replace("bottleneck=2)", "bottleneck=2, max_epochs=2)")
    names: dict = {"texts": small}
    exec(block, names)
    assert isinstance(names["found"], Found) and (tmp_path / "page.html").is_file()
    assert names["x"].shape[0] == 40 and names["cae"].widths[-1] == 2 and names["back"].rows
    assert rsdyn.__version__ in DOCS


def test_its_example_of_the_library_runs():
    import torch

    from rsdyn.stream.trajectories import TrajectoryStream

    block = next(b for b in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL) if "rotation_test" in b)
    block = block.replace("n_sublayers=32, n_units=128", "n_sublayers=6, n_units=8").replace("n=1000", "n=50")
    block = block.replace("n_components=100", "n_components=5")
    trajectories = torch.randn(40, 6, 8, generator=torch.Generator().manual_seed(0)).cumsum(1)
    stream = create_autospec(TrajectoryStream, instance=True)
    stream.read.return_value = trajectories, torch.arange(40)
    namespace = {"stream": stream, "x": trajectories[:, 0], "y": trajectories[:, 1]}
    exec(block, namespace)
    stream.read.assert_called_once_with(1000)
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


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_its_links_and_pictures_are_there():
    anchors = {slug(heading) for heading in re.findall(r"^#+ (.*)$", README, re.MULTILINE)}
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    assert len(links) > 6
    for link in links:
        path, _, anchor = link.partition("#")
        if link.startswith("https://"):
            continue
        assert not path or (ROOT / path).exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors, f"{link}: no such heading"


def test_its_pictures_are_small_and_have_words_for_those_who_cannot_see_them():
    from PIL import Image

    pictures = dict(re.findall(r"!\[([^\]]+)\]\((pictures/[^)]+)\)", DOCS.replace("docs/pictures", "pictures")))
    shown = {ROOT / "docs" / path for path in pictures.values()}
    assert shown == set((ROOT / "docs" / "pictures").iterdir())
    assert all(len(words) > 80 for words in pictures)
    for path in shown:
        assert path.stat().st_size < 120_000
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert 800 < picture.width <= 1200
            assert picture.getcolors(256) is not None
            assert "transparency" not in picture.info, "on a dark page its black lines would be lost"


def test_it_says_how_to_read_every_figure_that_the_scripts_write():
    page = PAGES["reading.md"]
    table = page[page.index("# How to read each figure") : page.index("# The report page")]
    named = set(re.findall(r"`(\w+?)(?:_\.\.\.)?`", table)) - {"nearer", "contraction"}
    written = set(every_panel()) - {"fig1g_information_kde", "fig1h_information_kde_mean"}  # beside the paper's sum
    assert written <= named, written - named
    assert {name for name in named if name.startswith(("fig", "recovery", "jacobian"))} <= written | {"fig1"}
    for figure in ("1B", "1C", "1D", "1E", "1F", "1G, H", "2A", "2B", "2C", "3A", "3B", "3C", "3D", "4A", "4B", "4C",
                   "4D"):  # fmt: skip
        assert f"| {figure} |" in table


def test_what_it_says_to_cite():
    from rsdyn import __version__

    cite = README[README.index("## Cite") :]
    (paper,) = re.findall(r"arxiv\.org/abs/([\d.]+)\)", README[: README.index("## ")])
    assert re.search(r"eprint\s*= \{(.*)\}", cite)[1] == paper
    assert f"version = {{{__version__}}}" in cite
    for entry in re.findall(r"```bibtex\n(.*?)```", cite, re.DOTALL):
        assert entry.startswith("@")
        assert entry.count("{") == entry.count("}")
