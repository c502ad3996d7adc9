"""The report page, read as a file: its structure, its numbers, its escaping, and what it says to bad input."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from report_runs import SURROGATES, N, altered, make_runs, resized, with_massive_units

from rsdyn.errors import UserError
from rsdyn.figures import rotations, stream
from rsdyn.figures.interactive import ONLY_ON_THE_PAGE
from rsdyn.report import report, write_report
from rsdyn.report.__main__ import main
from rsdyn.report.page import histograms, make_page
from rsdyn.report.reading import read_run, read_runs

VOID = {"meta", "input", "br", "img", "link", "hr"}


class Parsed(HTMLParser):
    """Every element with its attributes and its text, and the data of the page's figures."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.open = [], []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        data = next(text for tag, found, text in self.flat() if found.get("id") == "data")
        self.data = json.loads(data)
        self.plots = self.data["plots"]

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} is there twice"
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append((tag, len(self.elements) - 1))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        for _, at in self.open:
            self.elements[at][2].append(data)

    def flat(self):
        return [(tag, attrs, "".join(parts)) for tag, attrs, parts in self.elements]

    def all(self, tag):
        return [(attrs, text) for t, attrs, text in self.flat() if t == tag]

    def trace(self, plot, name):
        return next(t for t in self.plots[plot]["traces"] if t.get("name") == name and "fill" not in t)


def numbers(packed):
    """What a browser reads from a packed array."""
    found = np.frombuffer(base64.b64decode(packed["bdata"]), "<" + packed["dtype"])
    return found.reshape([int(n) for n in packed["shape"].split(",")]) if "shape" in packed else found


@pytest.fixture(scope="module")
def runs(tiny_llama, tmp_path_factory):
    return make_runs(tmp_path_factory.getbasetemp(), tiny_llama)


@pytest.fixture(scope="module")
def html(runs):
    return make_page(read_runs(list(runs.values())))


@pytest.fixture(scope="module")
def page(html):
    return Parsed(html)


@pytest.fixture(scope="module")
def arrays(runs):
    return {name: dict(np.load(folder / "results.npz")) for name, folder in runs.items()}


# --- what the page holds ----------------------------------------------------------------------------------------------


def test_sections_are_in_the_order_of_the_paper_and_in_the_contents(page):
    ids = [attrs["id"] for attrs, _ in page.all("section")]
    assert [i for i in ids if i != "answer"] == [
        "findings", "figure-1", "figure-2", "figure-3", "figure-4", "figure-4d", "what"
    ]  # fmt: skip
    links = [attrs["href"] for attrs, _ in page.all("a")]
    assert links == [f"#{i}" for i in ids]
    every = [attrs["id"] for _, attrs, _ in page.flat() if "id" in attrs]
    assert len(every) == len(set(every))


def test_what_was_found_stands_first(runs, tmp_path):
    answered = altered(runs["analyze"], tmp_path / "a", summary=lambda s: s | {"answer": ["It rises by .3.", "<b>"]})
    page = Parsed(make_page(read_runs([answered])))
    first = page.all("section")[0]
    assert first[0]["id"] == "answer" and "It rises by .3.<b>" in first[1]


def test_every_figure_has_alternative_text_a_caption_in_three_parts_and_data(page):
    figures = [attrs["id"] for attrs, _ in page.all("figure")]
    hosts = {attrs["data-plot"]: attrs for attrs, _ in page.all("div") if "data-plot" in attrs}
    assert set(figures) == set(hosts) == set(page.plots) and len(figures) > 30
    for letter in ("1b", "1c", "1d", "1e", "1f", "1g", "1h", "2a", "2b", "2c", "3a", "3b", "3c", "3d", "4a", "4b",
                   "4c", "4d"):  # fmt: skip
        assert any(name.startswith(f"fig{letter}") for name in figures), letter
    for name, attrs in hosts.items():
        assert attrs["role"] == "img" and len(attrs["aria-label"]) > 30, name
        assert "nan" not in attrs["aria-label"].lower(), name
    captions = [text for _, text in page.all("figcaption")]
    assert len(captions) == len(figures)
    assert all("Read it for" in text and "Not for" in text for text in captions)
    assert sum(f"{N:,} sequences" in text for text in captions) > 10


def test_nothing_is_asked_of_the_network(page, html):
    for tag, attrs, _ in page.flat():
        for key in ("src", "href", "srcset", "action", "data", "poster"):
            assert attrs.get(key, "#").startswith("#"), (tag, attrs)
    assert not re.search(r"https?:|url\(|@import|//cdn", html)
    policy = next(a["content"] for a, _ in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy
    code = [text for attrs, text in page.all("script") if "type" not in attrs]
    assert len(code) == 1
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    assert base64.b64encode(hashlib.sha256(code[0].encode()).digest()).decode() == allowed[0] and len(allowed) == 2
    script = policy.split("script-src")[1].split(";")[0]
    assert "unsafe" not in script


def test_the_page_is_small(html):
    assert len(html.encode()) < 4e6


def test_what_ran_is_named(page, runs):
    text = dict(zip([a.get("id") for a, _ in page.all("section")], [t for _, t in page.all("section")], strict=True))
    provenance = json.loads((runs["analyze"] / "provenance.json").read_text())
    for word in (
        "6 sublayers of 32 units",
        provenance["lm"]["identity"],
        "seed",
        "I'm sorry, Dave.",
        provenance["started"][:10],
    ):
        assert word in text["what"], word
    assert text["what"].count("limit: 40") == 3  # in the settings of each


def test_findings_are_those_of_the_run(page, runs):
    summary = json.loads((runs["analyze"] / "summary.json").read_text())
    text = next(text for attrs, text in page.all("table") if attrs["class"] == "findings")
    minus = "\N{MINUS SIGN}"
    assert summary["findings"]
    for row in summary["findings"]:
        assert row["statistic"].strip() in text and (row["paper"] == "not given" or f"paper: {row['paper']}" in text)
        for value in row["values"].values():
            assert value["text"].replace("-", minus) in text.replace("-", minus)
    notes = " ".join(text for _, text in page.all("p"))
    assert all(line in notes for line in summary["in_words"])


# --- its numbers ------------------------------------------------------------------------------------------------------


def test_numbers_are_the_results(page, arrays):
    """One curve, map and unit of each script; that panels show their results is in tests/figures."""
    found = arrays["analyze"]
    within = page.trace("fig1e_cosine", "within layer")
    np.testing.assert_allclose(numbers(within["y"]), np.arctanh(found["original/cosine/mean"][0::2]), rtol=1e-6)
    mean = found["original/activations/mean"]
    heat = page.plots["fig1b_mean_activations"]["traces"][0]
    np.testing.assert_allclose(numbers(heat["z"]), mean[:, np.argsort(mean[-1])].T, rtol=1e-6)
    path = page.plots["fig2a_portraits"]["traces"][0]
    at = path["rows"]["keys"].index("7")
    a = found["original/rotation/trajectory"][:, 7]
    np.testing.assert_allclose(numbers(path["x"])[at], a - a[0], rtol=1e-4, atol=1e-5)
    autoencoder = page.trace("fig3d_explained_variance", "autoencoder")
    np.testing.assert_allclose(numbers(autoencoder["y"]), arrays["train"]["ev_cae"], rtol=1e-6)
    swapped = page.trace("recovery_relative", "swapped-in state")
    layer = swapped["when"]["layer"]
    curve = arrays["perturb"][f"layer{layer}/swapped-in_state/relative_curve"][0]
    np.testing.assert_allclose(numbers(swapped["y"]), curve, rtol=1e-6)


def test_the_surrogates_drawn_again_are_those_of_the_test_of_the_run(runs, arrays):
    run = read_run(runs["analyze"])
    found = arrays["analyze"]
    for null, mine in histograms(run).items():
        assert null in ("increment_shuffle_scaled", "layer_shuffle") and mine.units == tuple(range(32))
        assert (mine.counts.sum(1) == SURROGATES).all()
        # their mean is its mean, and their SD its SD, but for the bins' width
        width = (mine.high - mine.low) / mine.counts.shape[1]
        centres = mine.low[:, None] + (np.arange(mine.counts.shape[1]) + 0.5) * width[:, None]
        away = (mine.counts * centres).sum(1) / SURROGATES + found[f"original/rotation/nulls/{null}/mean"]
        assert (np.abs(away) <= width / 2 + 1e-6).all()
        second = (mine.counts * centres**2).sum(1) / SURROGATES
        second -= ((mine.counts * centres).sum(1) / SURROGATES) ** 2
        std = found[f"original/rotation/nulls/{null}/std"] * np.sqrt((SURROGATES - 1) / SURROGATES)
        assert (np.abs(np.sqrt(second) - std) <= width / 2 + 1e-6).all()


def test_surrogates_of_some_units_are_those_of_all(runs, monkeypatch):
    run = read_run(runs["analyze"])
    whole = histograms(run)
    monkeypatch.setattr(rotations, "MOST_HISTOGRAMS", 5)
    some = histograms(run)
    for null, mine in some.items():
        at = list(mine.units)
        assert len(at) == 5
        for key in ("counts", "low", "high"):
            np.testing.assert_array_equal(getattr(mine, key), getattr(whole[null], key)[at])


def test_plotly_knows_everything_that_it_is_given(page):
    import plotly.graph_objects as go

    def with_colours(thing):
        if isinstance(thing, dict):
            return {k: v if k in ("text", "name") else with_colours(v) for k, v in thing.items()}
        if isinstance(thing, list):
            return [with_colours(v) for v in thing]
        return "#123456" if isinstance(thing, str) and re.match("@[a-z]", thing) else thing

    checked = 0
    for name, plot in page.plots.items():
        traces = [{k: v for k, v in with_colours(t).items() if k not in ONLY_ON_THE_PAGE} for t in plot["traces"]
                  if "said" not in t and not t.get("rows")]  # fmt: skip
        layout = {k: v for k, v in with_colours(plot["layout"]).items() if k != "versions"}
        figure = go.Figure(data=traces, layout=layout)  # ValueError for a property or a value that there is not
        checked += len(figure.data)
        assert plot["traces"], name
    assert checked > 80
    known = set(re.findall(r"--([a-z]\w*):", str(page.all("style"))))
    used = set(re.findall(r'"@([a-z]\w*)', json.dumps(page.plots)))
    assert used and used <= known


# --- several runs -----------------------------------------------------------------------------------------------------


def test_two_models_are_compared_over_depth_from_0_to_1(runs, arrays, tmp_path):
    def deeper(found):
        return resized(found, {6: 10, 5: 9, 15: 45}) | {"n_sublayers": np.array(10)}

    def other(summary):
        summary |= {"lm": "another", "n_sublayers": 10}

    second = altered(runs["analyze"], tmp_path / "deep", summary=other, arrays=deeper)
    page = Parsed(make_page(read_runs([runs["analyze"], second])))
    plot = page.plots["fig1b_participation"]
    names = {t["name"]: t for t in plot["traces"] if t.get("showlegend") is not False}
    assert len(names) == 4
    of = {name: t for name, t in names.items() if name.endswith("original text")}
    first, last = of.values()
    np.testing.assert_allclose(numbers(first["x"]), np.arange(6) / 5, rtol=1e-6)
    np.testing.assert_allclose(numbers(last["x"]), np.arange(10) / 9, rtol=1e-6)
    assert {t.get("visible") for name, t in names.items() if name not in of} == {"legendonly"}
    assert first["line"]["color"] != last["line"]["color"] and first["line"]["dash"] == last["line"]["dash"]
    assert "another" in list(of)[1] and plot["layout"]["xaxis"]["range"] == [-0.02, 1.02]
    assert len({t["when"]["stream"] for t in page.plots["fig2a_portraits"]["traces"]}) == 4


def test_an_analysis_stands_beside_a_training_of_its_model(runs):
    alone, beside = (Parsed(make_page(read_runs(some))) for some in ([runs["train"]], [runs["train"], runs["analyze"]]))
    key = "fig3d_explained_variance"
    assert any("(analysis)" in t["name"] for t in beside.plots[key]["traces"])
    assert not any("(analysis)" in t["name"] for t in alone.plots[key]["traces"])


def test_two_runs_of_a_script_have_panels_and_controls_of_their_own(runs, tmp_path):
    other = altered(runs["perturb"], tmp_path / "other")
    page = Parsed(make_page(read_runs([runs["perturb"], other])))
    assert {"recovery_cosine-0", "recovery_cosine-1"} <= page.plots.keys()
    assert page.plots["recovery_cosine-1"]["controls"] == ["layer-1"]
    assert "layer-1" in page.plots["recovery_cosine-1"]["traces"][0]["when"]


def test_massive_units_have_lines_of_their_own_where_there_are_some(runs, tmp_path, page):
    run = altered(runs["analyze"], tmp_path / "massive", arrays=with_massive_units)
    found = Parsed(make_page(read_runs([run])))
    name = "without massive units"
    assert not any(t.get("name") == name for p in page.plots.values() for t in p["traces"])
    plots = {key for key, p in found.plots.items() if any(t.get("name") == name for t in p["traces"])}
    assert {"fig1b_active_share", "fig1c_correlation_mean", "fig1e_cosine", "fig1f_speed", "fig1h_information_mean",
            "fig4b_cumulative_variance", "fig4c_variance_by_sublayer"} <= plots  # fmt: skip
    with_, without = found.trace("fig1f_speed", "within layer"), found.trace("fig1f_speed", name)
    np.testing.assert_allclose(numbers(without["y"]), numbers(with_["y"]) / 2, rtol=1e-6)


def test_what_cannot_fit_is_thinned_and_said(runs, monkeypatch):
    monkeypatch.setattr(stream, "MOST_ROWS", 10)
    monkeypatch.setattr(rotations, "MOST_UNITS", 16)
    thin = Parsed(make_page(read_runs([runs["analyze"]])))
    text = " ".join(text for _, text in thin.all("figcaption"))
    r = np.load(runs["analyze"] / "results.npz")["original/rotation/turns"]
    kept = {int(u) for u in thin.plots["fig2a_portraits"]["traces"][0]["rows"]["keys"]}
    assert "Thinned: 10 of the 32 units" in text and f"Thinned: {len(kept)} of 32 units" in text
    assert numbers(thin.plots["fig1b_mean_activations"]["traces"][0]["z"]).shape == (10, 6)
    assert 16 <= len(kept) <= 22 and {int(r.argmin()), int(r.argmax())} <= kept


@pytest.mark.slow
def test_the_shape_of_llama_fits_into_ten_megabytes(runs, tmp_path):
    def larger(found):
        depth = {"n_sublayers": np.array(64), "n_units": np.array(4096)}
        return resized(found, {6: 64, 5: 63, 15: 2016, 32: 4096}) | depth

    def summary(found):
        found |= {"n_sublayers": 64, "n_units": 4096}

    run = altered(runs["analyze"], tmp_path / "large", summary=summary, arrays=larger)
    assert write_report(run).stat().st_size < 10e6


# --- text from files is text ------------------------------------------------------------------------------------------


def test_markup_in_names_and_numbers_stays_text(runs, tmp_path):
    bad = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u2028"

    def summary(found):
        found |= {"lm": bad, "text": bad, "in_words": [bad]}
        found["findings"][0] |= {"claim": bad, "paper": bad, "statistic": bad}
        next(iter(found["findings"][0]["values"].values()))["text"] = bad

    def provenance(found):
        found |= {"argv": [bad], "started": bad, "certificates": {bad: {"attention": 1e-7, bad: bad}}}

    name = "<script>alert(3)<&>"
    run = altered(runs["analyze"], tmp_path / name, summary=summary, provenance=provenance)
    config = run / "config.yaml"
    config.write_text(config.read_text() + "# " + bad.replace("\u2028", "") + "\n")
    other = altered(runs["perturb"], tmp_path / "perturb", summary=lambda s: s | {"lm": bad})
    html = make_page(read_runs([run, other]), title=bad)
    page = Parsed(html)
    assert [attrs.get("type") for attrs, _ in page.all("script")] == ["application/json", "text/plain", None]
    assert not page.all("img") and html.count("<script") == 3 and html.count("</script") == 3
    assert page.all("title")[0][1] == bad and page.all("h1")[0][1] == bad
    text = " ".join(text for _, text in page.all("section"))
    assert text.count(bad) >= 6 and name in text and "attention 1e-07" in text
    two = altered(runs["analyze"], tmp_path / "two", summary=lambda s: s | {"lm": "plain"})
    mixed = Parsed(make_page(read_runs([run, two])))
    names = [t.get("name", "") for p in mixed.plots.values() for t in p["traces"]]
    assert any("&lt;script&gt;" in n for n in names) and not any("<" in n for n in names)
    assert not any("onerror" in key or key.startswith("on") for _, attrs, _ in page.flat() for key in attrs)


# --- bad input --------------------------------------------------------------------------------------------------------


def _broken(runs, tmp_path, how):
    """A run folder with one thing wrong."""
    run = altered(runs["analyze"], tmp_path / "run")
    provenance = json.loads((run / "provenance.json").read_text())
    if how == "not there":
        return tmp_path / "nothing"
    if how == "a long name":
        return tmp_path / ("x" * 300)
    if how == "not ours":
        (tmp_path / "holiday").mkdir()
        return tmp_path / "holiday"
    if how == "no config":
        (run / "config.yaml").unlink()
    elif how == "no settings":
        (run / "config.yaml").write_text("just words\n")
    elif how == "other script":
        (run / "provenance.json").write_text(json.dumps(provenance | {"script": "serve"}))
    elif how == "newer":
        (run / "provenance.json").write_text(json.dumps(provenance | {"rsdyn": "99.1"}))
    elif how == "no version":
        (run / "provenance.json").write_text(json.dumps(provenance | {"rsdyn": None}))
    elif how == "unfinished":
        (run / "summary.json").unlink()
        (run / "results.npz").unlink()
    elif how in ("no summary.json", "no results.npz"):
        (run / how.removeprefix("no ")).unlink()
    elif how == "half a summary":
        (run / "summary.json").write_text((run / "summary.json").read_text()[:200])
    elif how in ("layout 1", "layout 9"):
        summary = json.loads((run / "summary.json").read_text())
        assert summary.pop("layout") == 2
        (run / "summary.json").write_text(json.dumps(summary | ({"layout": 9} if how == "layout 9" else {})))
    elif how == "a poor summary":
        (run / "summary.json").write_text('{"lm": "x"}')
    elif how == "not an archive":
        (run / "results.npz").write_bytes(b"PK\x03\x04 nothing")
    elif how == "pickled":
        with np.load(run / "results.npz") as file:
            np.savez(run / "results.npz", **(dict(file) | {"original/cosine/mean": np.array([{}], dtype=object)}))
    elif how == "an array less":
        with np.load(run / "results.npz") as file:
            np.savez(run / "results.npz", **{k: file[k] for k in file.files if k != "original/velocity/speed"})
    return run


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("not there", "is not a folder"),
        ("a long name", "is not a folder"),
        ("not ours", "is not a run folder of rsdyn: it has no provenance.json"),
        ("no config", "is not a run folder of rsdyn: it has no config.yaml"),
        ("no settings", "holds no settings"),
        ("other script", "script='serve', but must say one of train, analyze, perturb"),
        ("newer", "made by rsdyn 99.1, and this is"),
        ("no version", "rsdyn=None, which is no version"),
        ("unfinished", "is not finished: it has no summary.json"),
        ("no summary.json", "is incomplete: it has no summary.json"),
        ("no results.npz", "is incomplete: it has no results.npz"),
        ("half a summary", "is not JSON"),
        ("a poor summary", "summary.json has no text, conditions"),
        ("layout 1", "its results have layout 1, and this rsdyn reads layout 2. Run the script again"),
        ("layout 9", "its results have layout 9, and this rsdyn reads layout 2. Run the script again"),
        ("not an archive", "is not a results file that can be read"),
        ("pickled", "'original/cosine/mean' cannot be read"),
        ("an array less", "the array 'original/velocity/speed' is missing"),
    ],
)
def test_a_bad_run_is_one_line_with_its_cure(runs, tmp_path, capsys, how, words):
    run = _broken(runs, tmp_path, how)
    out = tmp_path / "out.html"
    assert main([str(run), "-o", str(out)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and words in said.err, said.err
    assert re.search(r"\b(give|run|wait|update|make|leave)\b", said.err, re.IGNORECASE)
    assert not out.exists()


@pytest.mark.parametrize(
    ("script", "key", "value", "words"),
    [
        ("perturb", "rows", None, "rows=None, and perturb.py writes a list of dict"),
        ("perturb", "rows", [{}], "a row without layer and condition"),
        ("perturb", "layers", ["x"], "a list of int"),
        ("perturb", "n_prompts", "many", "n_prompts=many"),
        ("perturb", "in_words", [1], "a list of str"),
        ("analyze", "findings", [3], "a list of dict"),
        ("train", "widths", 7, "a list of int"),
    ],
)
def test_a_summary_of_other_kinds_is_one_line(runs, tmp_path, script, key, value, words):
    run = altered(runs[script], tmp_path / "run", summary=lambda s: s | {key: value})
    with pytest.raises(UserError, match=re.escape(words)):
        read_runs([run])


def test_runs_of_one_model_must_have_one_shape(runs, tmp_path):
    wider = altered(runs["train"], tmp_path / "wider", summary=lambda s: s | {"n_units": 64})
    with pytest.raises(UserError, match=r"their streams have 64 and 32 units.*Make a page of each"):
        read_runs([runs["analyze"], wider])
    deeper = altered(runs["train"], tmp_path / "deeper", summary=lambda s: s | {"n_sublayers": 8})
    with pytest.raises(UserError, match="8 and 6 sublayers"):
        read_runs([runs["perturb"], deeper])
    silent = altered(runs["perturb"], tmp_path / "silent", summary=lambda s: {k: s[k] for k in s if k != "n_units"})
    with pytest.raises(UserError, match="32 and 64 units"):  # found although the first run does not say its width
        read_runs([silent, wider, runs["analyze"]])
    with pytest.raises(UserError, match="is given twice"):
        read_runs([runs["train"], runs["train"].parent / "." / "train"])
    with pytest.raises(UserError, match="No run was given"):
        read_runs([])


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("", "is a folder: name a file in it"),
        ("no/where/out.html", "there is no folder"),
        ("x" * 300, "cannot be written"),
    ],
)
def test_an_output_that_cannot_be_written_is_named(runs, tmp_path, capsys, out, words):
    assert main([str(runs["train"]), "-o", str(tmp_path / out)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not list(tmp_path.glob(".*"))


def test_a_run_reports_itself(runs, tmp_path, capsys):
    run = altered(runs["perturb"], tmp_path / "run")
    path = write_report(run)
    assert path == run / "report.html" and Parsed(path.read_text()).plots
    assert main([str(run), "-o", str(tmp_path / "page.html"), "--title", "Hello"]) == 0
    assert "MB" in capsys.readouterr().out and "<title>Hello</title>" in (tmp_path / "page.html").read_text()
    before = path.read_bytes()
    assert report([run], path).read_bytes() == before  # the same run, the same page


def test_of_several_runs_those_that_are_not_finished_are_named_and_skipped(runs, tmp_path, capsys):
    going = _broken(runs, tmp_path, "unfinished")
    out = tmp_path / "page.html"
    assert main([str(going), str(runs["analyze"]), "-o", str(out)]) == 0
    said = capsys.readouterr()
    assert f"{going} is not finished: skipped" in said.err and str(out) in said.out
    page = Parsed(out.read_text())
    assert str(going) not in out.read_text() and page.plots
    (tmp_path / "half").mkdir()
    assert main([str(going), str(_broken(runs, tmp_path / "half", "no results.npz")), "-o", str(out)]) == 2
    assert "None of these 2 runs is finished." in capsys.readouterr().err


def test_older_runs_without_texts_in_their_findings_still_have_values(runs, tmp_path):
    def without(summary):
        for row in summary["findings"]:
            for value in row["values"].values():
                del value["text"]

    run = altered(runs["analyze"], tmp_path / "old", summary=without)
    found = read_run(run).summary["findings"][1]["values"]["original"]
    text = Parsed(make_page(read_runs([run])))
    table = next(text for attrs, text in text.all("table") if attrs["class"] == "findings")
    assert f"{found['value']:.3f}".lstrip("-") in table
