"""The W&B layout: its JSON against a stored one, against the library's own reader, and against what runs log.

Renew the stored one, after looking at the difference, with

    python tests/tracking/test_workspace.py
"""

import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from every_panel import every_panel
from leet import inspect

from rsdyn.analysis.settings import NULLS
from rsdyn.tracking.keys import CURVES, PANELS, SECTIONS, TABLES
from rsdyn.tracking.keys import section as section_of
from rsdyn.tracking.workspace.__main__ import INSTALL, METRIC, main, specs

SNAPSHOT = Path(__file__).parents[1] / "data" / "workspace.json"
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20:wandb_workspaces")


def normalised(tree):
    """With ids, which are drawn anew each time, replaced by the order in which they come."""
    seen = {}

    def walk(node, key=None):
        if isinstance(node, dict):
            return {k: walk(v, k) for k, v in node.items()}
        if isinstance(node, list):
            return [walk(v) for v in node]
        return f"id {seen.setdefault(node, len(seen))}" if key in ("id", "__id__") and node else node

    return walk(tree)


def as_text(tree):
    """JSON with whatever is short, or a panel, on one line, so that a difference is a few lines."""

    def dump(node, indent):
        short = json.dumps(node, ensure_ascii=False)
        if not isinstance(node, dict | list) or len(short) < 100 or (isinstance(node, dict) and "__id__" in node):
            return short
        pad = "\n" + " " * (indent + 1)
        if isinstance(node, list):
            return "[" + ",".join(pad + dump(item, indent + 1) for item in node) + pad[:-1] + "]"
        items = (f"{json.dumps(key)}: {dump(value, indent + 1)}" for key, value in node.items())
        return "{" + ",".join(pad + item for item in items) + pad[:-1] + "}"

    return dump(normalised(tree), 0) + "\n"


@pytest.fixture(scope="module")
def built():
    """What would be sent: the workspace's JSON and the report's."""
    return specs("rsdyn")


def panels_of(spec):
    """Every panel of a workspace or of a report, with the section that it stands in."""
    if "section" in spec:
        for section in spec["section"]["panelBankConfig"]["sections"]:
            yield from ((section["name"], panel) for panel in section["panels"])
        return
    heading = None
    for block in spec["blocks"]:
        if block["type"] == "heading":
            heading = block["children"][0]["text"]
        elif block["type"] == "panel-grid":
            yield from ((heading, panel) for panel in block["metadata"]["panelBankSectionConfig"]["panels"])


def runsets_of(spec):
    for block in spec["blocks"]:
        if block["type"] == "panel-grid":
            yield from block["metadata"]["runSets"]


# -- what is in it -----------------------------------------------------------------------------------------------------


def test_it_is_the_stored_one(built):
    assert as_text(built) == SNAPSHOT.read_text(encoding="utf-8"), "see this file's docstring"
    assert as_text(built) == as_text(specs("rsdyn"))  # ids are all that differs from time to time


@pytest.mark.parametrize("which", ["workspace", "report"])
def test_every_measure_panel_and_table_is_in_the_section_of_its_figure(built, which):
    places = {}
    for section_, shown in panels_of(built[which]):
        for key in keys_of(shown):
            places.setdefault(key, set()).add(section_)
    for curves in CURVES:
        found = {key for key in places if key.startswith((f"depth/{curves.measure}/", f"^depth/{curves.measure}/"))}
        assert found and all(places[key] == {section_of(curves.figure)} for key in found)
    for number, panels in PANELS.items():
        for key in panels:
            assert places[f"charts/{key}"] == places[f"figures/{key}"] == {SECTIONS[number]}
    for table in TABLES:
        assert f"tables/{table}" in places
    assert places["tables/units_by_rotation"] == {SECTIONS["2"]}


def test_the_panels_are_those_that_are_drawn():
    known = {key: title for panels in PANELS.values() for key, title in panels.items()}
    drawn = {key: "  ".join(filter(None, (panel.figure, panel.title))) for key, panel in every_panel().items()}
    assert {key: known.get(key) for key in drawn} == drawn
    # of other kinds of perturbation, under the same titles in other words, and of tokens that are not there
    others = known.keys() - drawn.keys()
    assert others == {"massive_ratio_sinks", "fig4d_noise", "fig4d_swap", "swap_layers_kl", "swap_layers_perplexity"}


def test_each_measure_is_drawn_over_depth(built):
    found = {panel["config"]["chartTitle"]: panel["config"] for _, panel in panels_of(built["workspace"])
             if panel["config"].get("xAxis") == "depth"}  # fmt: skip
    assert [*found] == [f"{curves.figure}  {curves.title}" for curves in CURVES]
    for curves, config in zip(CURVES, found.values(), strict=True):
        assert (config["xAxisMin"], config["xAxisMax"], config["smoothingType"]) == (0, 1, "none")
        assert config["yAxisTitle"] == curves.ylabel and config.get("yLogScale", False) == curves.log
        if curves.script == "perturb":
            assert re.search(config["metricRegex"], f"depth/{curves.measure}/050_teleport")
            assert not re.search(config["metricRegex"], f"depth/{curves.measure}/050_teleport_low")


def test_each_set_of_runs_of_the_report_is_of_one_script(built):
    sets = list(runsets_of(built["report"]))
    assert {s["filters"]["filters"][0]["value"] for s in sets} == {"analyze", "train", "perturb"}
    sections = {"analyze": "findings/", "train": "test/", "perturb": ("recovery/", "beyond_still/")}
    for s in sets:
        job, state = s["filters"]["filters"]
        assert (job["key"], state["key"]) == (
            {"section": "run", "name": "jobType"},
            {"section": "run", "name": "state"},
        )
        shown = s["runFeed"]["columnOrder"]
        numbers = [column.removeprefix("summary:") for column in shown if column.startswith("summary:")]
        assert numbers and all(number.startswith(sections[job["value"]]) for number in numbers)
        assert shown[0] == "run:displayName" and s["runFeed"]["columnVisible"] == dict.fromkeys(shown, True)


def test_chosen_runs_are_all_that_the_report_shows(built):
    chosen = specs("rsdyn", ["1mbku38n", "2u1g3j1c"])
    for s in runsets_of(chosen["report"]):
        (which,) = [f for f in s["filters"]["filters"] if f["key"] == {"section": "run", "name": "name"}]
        assert (which["op"], which["value"], which["connector"]) == ("IN", ["1mbku38n", "2u1g3j1c"], "AND")
    assert as_text(chosen["workspace"]) == as_text(built["workspace"])


@pytest.mark.parametrize("script", ["train", "analyze", "perturb"])
def test_one_script_shows_its_own_sections_and_runs(script, built, capsys):
    assert main(["--print", "--script", script]) == 0
    sent = json.loads(capsys.readouterr().out)["workspace"]
    names = [section["name"] for section in sent["section"]["panelBankConfig"]["sections"]]
    whole = [section["name"] for section in built["workspace"]["section"]["panelBankConfig"]["sections"]]
    own = {"train": ("Figure 3", "Training", "Sweeps"), "perturb": ("Figure 4D",)}
    own["analyze"] = tuple(name for name in whole if not name.startswith(own["train"] + own["perturb"]))
    assert names == [name for name in whole if name.startswith(own[script])]
    assert script in json.dumps(sent["section"]["runSets"][0]["filters"])


def test_by_model_groups_the_runs(built):
    grouped = specs("rsdyn", by_model=True)["workspace"]["section"]["runSets"][0]
    assert [key["name"] for key in grouped["grouping"]] == ["group", "jobType"]
    assert built["workspace"]["section"]["runSets"][0]["grouping"] == []


def test_no_panel_lies_on_another(built):
    for block in built["report"]["blocks"]:
        if block["type"] == "panel-grid":
            taken = set()
            for panel in block["metadata"]["panelBankSectionConfig"]["panels"]:
                at = panel["layout"]
                cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
                assert not cells & taken and at["x"] + at["w"] <= 24
                taken |= cells
    for section in built["workspace"]["section"]["panelBankConfig"]["sections"]:
        flow = section["flowConfig"]
        assert flow["columnsPerPage"] * flow["rowsPerPage"] >= len(section["panels"]) > 0  # none behind an arrow


# -- the library's side ------------------------------------------------------------------------------------------------


def set_of(obj):
    """What was set on a panel of the library, away from its defaults."""
    import dataclasses

    for field in dataclasses.fields(obj):
        value = getattr(obj, field.name)
        if field.name.startswith("_") or field.name == "layout" or value in (None, [], (None, None), ""):
            continue
        yield field.name, value


def test_whatever_is_set_on_a_panel_is_in_its_json():
    """The library drops some of what it takes (``active_runset``, ``panel_search_query``): nothing of ours is."""
    from rsdyn.tracking.workspace.layout import sections

    options = set()
    for panels in sections(METRIC).values():
        for panel in panels:
            sent = json.dumps(panel._to_model().model_dump(by_alias=True, exclude_none=True), ensure_ascii=False)
            for name, value in set_of(panel):
                options.add((type(panel).__name__, name))
                for part in value if isinstance(value, list | tuple) else [value]:
                    part = getattr(part, "name", getattr(part, "metric", part))
                    text = json.dumps(getattr(part, "name", part), ensure_ascii=False).strip('"')
                    text = text.replace("cae.", "cae.value.") if text.startswith("cae.") else text
                    assert text in sent, (panel, name)
    assert {("LinePlot", "metric_regex"), ("LinePlot", "range_x"), ("LinePlot", "log_y")} < options


def test_the_librarys_own_reader_reads_the_same_back(built):
    from wandb_workspaces.reports.v2 import Report
    from wandb_workspaces.reports.v2.internal import ReportViewspec
    from wandb_workspaces.workspaces import Workspace
    from wandb_workspaces.workspaces.internal import View, WorkspaceViewspec

    spec = WorkspaceViewspec.model_validate(built["workspace"])
    view = View(entity="", project="rsdyn", display_name="x", name="", id="", spec=spec)
    again = Workspace._from_model(view)._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
    assert list(panels_of(json.loads(again))) == list(panels_of(built["workspace"]))
    assert json.loads(again)["section"]["settings"] == built["workspace"]["section"]["settings"]
    model = ReportViewspec.model_validate({"displayName": "x", "project": {"name": "rsdyn"}, "spec": built["report"]})
    report = Report._from_model(model)
    again = report._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
    ours = [panel["config"] for _, panel in panels_of(built["report"]) if panel["viewType"] != "Weave"]
    theirs = [panel["config"] for _, panel in panels_of(json.loads(again)) if panel["viewType"] != "Weave"]
    assert ours == theirs


# -- what runs log -----------------------------------------------------------------------------------------------------


def keys_of(panel):
    """The keys that a panel shows, as it names them: exact ones, or ``^`` and a regular expression."""
    config = panel["config"]
    keys = [*config.get("metrics", []), *config.get("mediaKeys", [])]
    keys += [config[name] for name in ("metricRegex", "targetKey") if name in config]
    keys += re.findall(r'"val": "(tables/[^"]+)"', json.dumps(config))
    columns = [column["accessor"] for column in config.get("columns", [])]
    columns += [config[name] for name in ("xAxis", "yAxis") if config.get(name, "").startswith(("config:", "summary:"))]
    return keys + columns


# What only other settings than the defaults log.
ELSEWHERE = ("paper_literal", "fig4d_noise", "fig4d_swap", "_kde", "skip_", "swap_layers_", "jacobian", "massive_act",
             "massive_ratio", "norm_by_position", "layer_effects")  # fmt: skip


def test_findings_in_the_runs_table_are_those_of_an_analysis():
    from analysis_results import analysis

    from rsdyn.analysis.findings import rows
    from rsdyn.analysis.settings import MEASURES
    from rsdyn.tracking.workspace.comparison import FINDINGS

    of_nulls = {"turns_of_random_walk", *(f"turns_{null}_p" for null in NULLS)}
    assert set(FINDINGS) <= {row.key for _, row in rows(analysis({}, MEASURES))} | of_nulls


@pytest.mark.slow
def test_real_runs_log_every_key_of_the_layout(built, tmp_path):
    logged = set()
    for script, words in {
        "train": ["trainer.max_epochs=2", "data.batch_size=16"],  # steps enough for W&B to get a batch's loss
        "analyze": ["analysis.rotation.surrogates=20"],
        "perturb": ["perturb.grid.n=2", "perturb.samples=60", "perturb.from_text=0"],
    }.items():
        words += [
            "data.limit=60",
            "tracking.mode=offline",
            f"cache.dir={tmp_path}/cache",
            f"run.dir={tmp_path}/{script}",
        ]
        subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *words], check=True, timeout=500, cwd=tmp_path)
        logged |= logged_by(inspect(tmp_path / script))
    assert_logged(built, logged)


def logged_by(found):
    """The keys of history, summary and config of an offline run, as W&B's own reader tells them (`leet.inspect`)."""
    said = json.dumps([found.records, found.summed])
    keys = set(re.findall(r'"key": "([^"]+)"', said)) | set(re.findall(r'"([a-z]+/[^"]*)":', said))
    keys |= {f"summary:{key}" for key in found.summary}
    for section, values in found.config.items():
        keys |= {f"config:{section}.value.{key}" for key in values} if isinstance(values, dict) else set()
    return keys


def assert_logged(built, logged, elsewhere=ELSEWHERE):
    wanted = {key for spec in built.values() for _, panel in panels_of(spec) for key in keys_of(panel)}
    wanted |= {c for s in runsets_of(built["report"]) for c in s["runFeed"]["columnOrder"] if not c.startswith("run:")}
    assert len(wanted) > 150
    missing = {key for key in wanted - logged if not any(re.search(key, other) for other in logged)}
    assert {key for key in missing if not any(word in key for word in elsewhere)} == set()
    shown = {key for key in logged if re.fullmatch(r"(figures|charts|tables)/[a-z0-9_]+", key)}
    assert len(shown) > 40 and shown <= wanted  # nothing that is logged is left out


# -- saving ------------------------------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """As much of W&B's server as saving asks for; ``project`` None is a project that is not there, ``refuses`` a status
    and what it says to a view.
    """

    sent: list
    project: dict | None
    refuses: tuple | None = None

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        query, variables = asked["query"], asked.get("variables") or {}
        if "upsertView" in query and self.refuses is not None:
            return self.answer(*self.refuses)
        if "upsertView" in query:
            type(self).sent.append(variables)
            project = {"id": "p", "name": variables["projectName"], "entityName": variables["entityName"]}
            view = {"id": "VmlldzoxMjM=", "name": variables["name"], "displayName": variables["displayName"]}
            view |= {"description": "", "spec": variables["spec"], "project": project, "type": variables["type"]}
            data = {"upsertView": {"view": view, "inserted": True}}
        elif "internalId" in query:
            data = {"project": self.project}
        elif "models(" in query:
            node = {"__typename": "Project", "id": "p", "name": "streams", "entityName": "lab", "isBenchmark": False}
            node |= {"createdAt": "2026-01-01T00:00:00Z", "user": None}
            page = {"endCursor": None, "hasNextPage": False}
            data = {"models": {"edges": [{"node": node, "cursor": "c"}], "pageInfo": page}}
        else:
            viewer = {"id": "u", "entity": "lab", "username": "ann", "email": "", "flags": "{}", "teams": {"edges": []}}
            data = {"viewer": viewer}
        return self.answer(200, {"data": data})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server on this machine, and a key for it."""
    handler = type("OneServer", (Server,), {"sent": [], "project": {"id": "p", "internalId": "77"}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{made.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("WANDB_ENTITY", raising=False)
        yield handler
        made.shutdown()


def run(*words):
    """In a process of its own: W&B reads its settings once a process."""
    command = [sys.executable, "-W", "ignore", "-m", "rsdyn.tracking.workspace", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_both_are_saved_whole_and_their_addresses_are_said(server, built):
    done = run("--project", "streams")
    assert done.returncode == 0, done.stderr
    sent = {variables["type"]: variables for variables in server.sent}
    assert sorted(sent) == ["project-view", "runs"]
    assert {(v["entityName"], v["projectName"]) for v in sent.values()} == {("lab", "streams")}
    workspace, report = (json.loads(sent[kind]["spec"]) for kind in ("project-view", "runs"))
    assert as_text(workspace) == as_text(built["workspace"])
    for s in runsets_of(report):
        assert s.pop("project") == {"name": "streams", "entityName": "lab", "id": "77"}
    assert as_text(report) == as_text(built["report"])
    assert [line.partition("127.0.0.1:")[2].partition("/")[2][:11] for line in done.stdout.splitlines()] == [
        "lab/streams"
    ] * 2


def test_a_project_that_is_not_there_is_one_line_and_nothing_is_saved(server, monkeypatch):
    server.project = None
    monkeypatch.setenv("WANDB_ENTITY", "team")  # who then owns the runs, too
    done = run("--project", "streams")
    assert (done.returncode, done.stdout, server.sent) == (2, "", [])
    assert "--project=streams of --entity=team" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "refuses",
    [
        (403, {"errors": [{"message": "permission denied"}]}),
        (200, {"data": {"upsertView": None}, "errors": [{"message": "permission denied"}]}),
    ],
    ids=["status", "errors"],
)
def test_what_the_server_refuses_is_one_line(server, refuses):
    server.refuses = refuses
    done = run("--project", "streams")
    assert (done.returncode, done.stdout, server.sent) == (2, "", [])
    assert "--project=streams of --entity=lab: " in done.stderr and "permission denied" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_without_a_key_it_says_how_and_prompts_for_nothing(monkeypatch, tmp_path, capsys):
    for variable in [name for name in os.environ if name.startswith("WANDB")] + ["NETRC"]:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "WANDB_API_KEY" in err and "wandb login" in err and "--print" in err


def test_without_the_package_it_says_how_to_get_it(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "workspaces" in name else real(name, *a))
    assert main(["--print"]) == 2
    assert INSTALL in capsys.readouterr().err
    extras = (ROOT / "pyproject.toml").read_text()
    assert 'workspaces = ["wandb-workspaces>=' in extras


@pytest.mark.parametrize("words", [["--project", "a/b"], ["--project", ""], ["--runs", "lab/rsdyn/1mbku38n"]])
def test_names_that_wandb_cannot_have(words, capsys):
    assert main([*words, "--print"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words[0] in err and err.count("\n") == 1


def test_print_prints_what_would_be_sent(built, capsys):
    assert main(["--print"]) == 0
    assert as_text(json.loads(capsys.readouterr().out)) == as_text(built)


if __name__ == "__main__":
    SNAPSHOT.write_text(as_text(specs("rsdyn")), encoding="utf-8")
    print(f"{SNAPSHOT}: {SNAPSHOT.stat().st_size} bytes")
