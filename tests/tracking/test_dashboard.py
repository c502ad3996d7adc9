"""What is refused before it reaches W&B, what is thinned, and that nothing happens without a logger."""

import pytest

from rsdyn.tracking import log as dashboard
from rsdyn.tracking import session as tracking
from rsdyn.tracking.keys import CURVES, SECTIONS, SUFFIXES, curves_of, depth_slots, section
from rsdyn.tracking.log import Table


class Recorder:
    """A logger whose run keeps what it is given."""

    def __init__(self):
        self.rows, self.lost = [], {}
        self.experiment = self
        self.summary = {}

    def log(self, row):
        self.rows.append(row)


def test_a_curve_of_the_wrong_length_is_named():
    with pytest.raises(ValueError, match=r"curves\['speed'\]\['original'\] has 3 values.*\(8\).*\(7\)"):
        dashboard.log_curves(Recorder(), {"speed": {"original": [1, 2, 3]}}, 8)


def test_a_measure_that_no_panel_has_is_named():
    with pytest.raises(KeyError, match=r"'sped'.*speed"):
        dashboard.log_curves(Recorder(), {"sped": {"original": [1, 2, 3]}}, 3)


def test_curves_are_a_row_a_sublayer_against_depth():
    logger = Recorder()
    dashboard.log_curves(logger, {"speed": {"original": [1.0, float("inf")], "untrained": [3.0, 4.0]}}, 3)
    assert logger.rows == [
        {"depth": 0.0, "depth/speed/original": 1.0, "depth/speed/untrained": 3.0},
        {"depth": 0.5, "depth/speed/untrained": 4.0},
        {"depth": 1.0},
    ]


@pytest.mark.parametrize(
    ("layers", "n", "slots"),
    [
        ([0, 3, 7, 11, 15], 16, ["0.00", "0.25", "0.50", "0.75", "1.00"]),
        ([0, 7, 15, 23, 31], 32, ["0.00", "0.25", "0.50", "0.75", "1.00"]),
        ([0, 7, 14, 22, 29], 30, ["0.00", "0.25", "0.50", "0.75", "1.00"]),
        ([7, 8], 16, ["0.47", "0.50"]),  # the nearer one has the slot
        ([2], 16, ["0.13"]),
        ([0], 1, ["0.00"]),
        ([500, 501, 502], 1001, ["0.50", "0.5010", "0.5020"]),
    ],
)
def test_layers_of_models_of_different_depth_share_slots(layers, n, slots):
    found = depth_slots(layers, n)
    assert len(set(found.values())) == len(layers)
    if (layers, n) == ([7, 8], 16):  # both are as near
        assert sorted(found.values()) == ["depth_0.50", "depth_0.53"]
    else:
        assert list(found.values()) == [f"depth_{slot}" for slot in slots]


def test_a_stream_of_one_sublayer_has_a_depth():
    logger = Recorder()
    dashboard.log_curves(logger, {"dimensions": {"original": [1.0]}}, 1)
    assert logger.rows[0]["depth"] == 0.0


def test_a_long_table_is_thinned_and_says_so(monkeypatch):
    monkeypatch.setattr(dashboard, "MAX_ROWS", 3)
    logger = Recorder()
    dashboard.log_tables(logger, {"long": Table(["n"], [[i] for i in range(5)]), "short": Table(["n"], [[1]])})
    assert logger.rows[0]["tables/long"].data == [[0], [1], [2]] and logger.rows[0]["tables/short"].data == [[1]]
    assert logger.summary == {"thinned/long": "the first 3 of 5 rows; all are in results.npz"}


def test_the_summary_is_flat_and_has_no_lists():
    logger = Recorder()
    dashboard.log_summary(logger, {"test": {"a": 1, "b": [1, 2], "c": {"d": float("nan"), "e": "text"}}})
    assert logger.summary == {"test/a": 1, "test/c/e": "text"}


def test_what_wandb_refuses_is_kept_for_the_end(monkeypatch):
    logger = Recorder()

    def refuse(row):
        raise RuntimeError("disk full")

    logger.log = refuse
    dashboard.log_curves(logger, {"speed": {"original": [1.0, 2.0]}}, 3)
    dashboard.log_tables(logger, {"t": Table(["n"], [[1]])})
    assert logger.lost == {"the curves over depth": "disk full", "the tables": "disk full"}


@pytest.mark.parametrize(
    "log",
    [
        lambda logger: dashboard.log_tables(logger, {"t": Table(["n"], [[1]])}),
        lambda logger: dashboard.log_summary(logger, {"a": 1}),
        lambda logger: tracking.update_config(logger, a=1),
    ],
    ids=["tables", "summary", "config"],
)
def test_a_mistake_of_ours_is_not_taken_for_wandbs(monkeypatch, log):
    def broken(values):
        raise TypeError("a mistake of ours")

    for module in (dashboard, tracking):
        monkeypatch.setattr(module, "plain", broken)
    logger = Recorder()
    with pytest.raises(TypeError, match="a mistake of ours"):
        log(logger)
    assert logger.lost == {} and logger.rows == []


def test_without_a_logger_nothing_happens(tmp_path):
    dashboard.log_curves(None, {"sped": {"a": [1]}}, 1)
    dashboard.log_panels(None, [], tmp_path)
    dashboard.log_page(None, tmp_path / "report.html")
    dashboard.log_tables(None, {"a": None})
    dashboard.log_summary(None, {"a": 1})
    assert not any(tmp_path.iterdir())


def test_names_are_unique_and_cannot_be_taken_for_a_part_of_a_curve():
    names = [c.measure for c in CURVES]
    assert len(names) == len(set(names)) and not any(name.endswith(SUFFIXES) or "/" in name for name in names)
    assert {c.script for c in CURVES} == {"train", "analyze", "perturb"}
    assert all(section(c.figure) in SECTIONS.values() for c in CURVES)
    assert section("4D") == SECTIONS["4D"] != section("4C") == SECTIONS["4"]
    assert curves_of("speed").ylabel == "speed (activation units)"
    with pytest.raises(KeyError, match="must be one of active_share"):
        curves_of("velocity")
