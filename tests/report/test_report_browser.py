"""The report page in a real browser: it draws everything, its controls change what is drawn, it fits and it prints."""

import json

import numpy as np
import pytest
from browser import Browser, find_chromium
from report_runs import altered, make_runs, with_massive_units

from rsdyn.report import report

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium on the path: install one, or name its program in CHROMIUM"
)


@pytest.fixture(scope="module")
def runs(tiny_llama, tmp_path_factory):
    return make_runs(tmp_path_factory.getbasetemp(), tiny_llama)


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    """A page of all three runs; the analysis has massive units, and a name that would be markup."""
    folder = tmp_path_factory.mktemp("page")
    name = "<img src=x onerror=hacked=1> <a href='https://example.org'>name</a>".replace("/", "\u2215")
    analysis = altered(runs["analyze"], folder / name, arrays=with_massive_units)
    return report([analysis, runs["train"], runs["perturb"]], folder / "page.html")


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"), find_chromium())
    try:
        browser.look(1200)
        browser.open(page)
        yield browser
    finally:
        browser.close()


@pytest.fixture(scope="module")
def arrays(runs):
    return {name: dict(np.load(folder / "results.npz")) for name, folder in runs.items()}


def choose(browser, control, value):
    """Set a control as its user would, and let the page act on it."""
    browser.run(
        f"""(() => {{
            const control = document.querySelector('[data-control="{control}"]');
            const value = {json.dumps(value)};
            control.value = control.type === "range" ? JSON.parse(control.dataset.values).indexOf(value) : value;
            control.dispatchEvent(new Event("input", {{bubbles: true}}));
            control.dispatchEvent(new Event("change", {{bubbles: true}}));
        }})()"""
    )
    browser.settle()


def drawn(browser, plot, what):
    """Something of a drawn figure, as its library holds it: ``host`` is the figure's element."""
    return browser.run(
        """(() => {
            const decoded = (v) => v && v.bdata
                ? Array.from(new Float32Array(Uint8Array.from(atob(v.bdata), (c) => c.charCodeAt(0)).buffer))
                : Array.from(v);
            const host = document.querySelector('[data-plot="PLOT"]');
            return WHAT;
        })()""".replace("PLOT", plot).replace("WHAT", what)
    )


def said(browser, plot):
    return browser.run(f"document.querySelector('#{plot} .said').textContent")


def test_it_opens_without_a_message_or_a_request(browser, page):
    assert browser.run("document.documentElement.dataset.figures") == "drawn"
    assert browser.messages == []
    asked = [url for url in browser.requests if not url.startswith(("data:", "blob:", "about:"))]
    assert asked == [page.resolve().as_uri()]
    hosts, svgs = browser.run(
        "(() => { const all = [...document.querySelectorAll('[data-plot]')];"
        "return [all.length, all.filter((host) => host.querySelector('svg.main-svg')).length]; })()"
    )
    assert hosts == svgs > 20
    # without Plotly's own buttons, of which one sends the figure to a server
    assert browser.run("document.querySelectorAll('.modebar-btn').length") == 0


def test_names_are_not_markup(browser):
    assert browser.run("typeof hacked") == "undefined"
    assert browser.run("document.querySelectorAll('main img, svg a').length") == 0
    assert "<img src=x onerror=hacked=1>" in browser.run("document.querySelector('.run h3').textContent")


@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_at_both_widths_in_both_themes(browser, tmp_path, width, dark):
    try:
        browser.look(width, dark=dark)
        browser.settle()
        assert browser.run("document.documentElement.scrollWidth") == width
        over = browser.run(
            "[...document.querySelectorAll('main *')].filter((one) => !one.closest('svg') &&"
            "one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 80))"
        )
        assert over == []
        heights = "[host.clientHeight, host._fullLayout.height, host.querySelector('svg').clientHeight]"
        assert len(set(drawn(browser, "recovery_relative", heights))) == 1  # nothing lies over the caption
        assert drawn(browser, "fig4a_trajectory", heights)[0] >= 400
        paper = drawn(browser, "fig1f_speed", "host.layout.paper_bgcolor")
        assert paper == browser.run("getComputedStyle(document.documentElement).getPropertyValue('--paper')").strip()
        assert paper == ("#15171a" if dark else "#ffffff")
        picture = browser.screenshot(tmp_path / "page.png", "#figure-1").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 50_000
    finally:
        browser.look(1200)
        browser.settle()


def test_a_unit_can_be_chosen_and_its_portrait_is_right(browser, arrays):
    mean = arrays["analyze"]["original/rotation/trajectory"]
    turns = -arrays["analyze"]["original/rotation/turns"]
    for unit in (7, 30):
        choose(browser, "unit", str(unit))
        x, y = (drawn(browser, "fig2a_portraits", f"decoded(host.data[0].{axis})") for axis in "xy")
        a, g = mean[:, unit], np.gradient(mean[:, unit])
        np.testing.assert_allclose(x, a - a[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(y, g - g[0], rtol=1e-4, atol=1e-5)
        told = said(browser, "fig2a_portraits").split()[0].replace("\N{MINUS SIGN}", "-")
        assert float(told) == pytest.approx(turns[unit], rel=5e-3)
        assert drawn(browser, "fig2a_place_in_null", "decoded(host.data.at(-1).x)")[0] == pytest.approx(
            turns[unit], rel=1e-5
        )

    def chosen():
        return browser.run("document.querySelector('[data-control=unit]').value")

    browser.run(
        "document.querySelector('[data-plot=fig2c_rotations_by_unit]').emit('plotly_click', "
        "{points: [{customdata: '12', data: {picks: 'unit'}}]})"
    )
    browser.settle()
    assert chosen() == "12"
    choose(browser, "unit", "999")  # there is none: the nearest
    assert chosen() == "31"
    order = np.argsort(turns, kind="stable")
    browser.run("document.querySelector('[data-step=\"-1\"]').click()")
    browser.settle()
    assert chosen() == str(order[list(order).index(31) - 1])


def test_the_null_can_be_chosen(browser, arrays):
    choose(browser, "unit", "7")
    for null, drawn_again in (("layer_shuffle", True), ("token_shuffled", False)):
        choose(browser, "null", null)
        bars = drawn(
            browser,
            "fig2a_place_in_null",
            "host.data.filter((trace) => trace.type === 'bar').map((trace) => decoded(trace.y))",
        )
        assert [sum(counts) for counts in bars] == ([40] if drawn_again else [])
        p = arrays["analyze"][f"original/rotation/nulls/{null}/p"][7]
        assert f"p = {float(f'{p:.3g}'):g}," in said(browser, "fig2a_place_in_null")
        middle = drawn(browser, "fig2a_place_in_null", "decoded(host.data.at(-2).x)[1]")
        expected = -arrays["analyze"][f"original/rotation/nulls/{null}/mean"][7]
        assert middle == pytest.approx(expected, rel=1e-5, abs=1e-6)
    both = browser.run("[...document.querySelectorAll('[data-control=null]')].map((one) => one.value)")
    assert both == ["token_shuffled", "token_shuffled"]


def test_the_stream_can_be_chosen(browser, arrays):
    plot = "fig1b_mean_activations"
    before = drawn(browser, plot, "decoded(host.data[0].z)")
    choose(browser, "stream", "0-1")
    after = drawn(browser, plot, "decoded(host.data[0].z)")
    assert len(drawn(browser, plot, "host.data.map((trace) => trace.type)")) == 1
    mean = arrays["analyze"]["token_shuffled/activations/mean"]
    np.testing.assert_allclose(np.reshape(after, (32, 6)), mean[:, np.argsort(mean[-1])].T, rtol=1e-5)
    assert before != after
    share = arrays["analyze"]["token_shuffled/pca/latents/ratio"][0]
    assert f"{100 * share:.1f} %" in drawn(browser, "fig4a_trajectory", "host.layout.xaxis.title.text")
    choose(browser, "stream", "0-0")
    np.testing.assert_array_equal(drawn(browser, plot, "decoded(host.data[0].z)"), before)


def test_one_steps_through_the_layers_of_injection(browser, runs, arrays):
    layers = json.loads((runs["perturb"] / "summary.json").read_text())["layers"]
    seen = []
    for layer in layers:
        choose(browser, "layer", str(layer))
        choose(browser, "steps", "2")
        latents = arrays["perturb"][f"layer{layer}/teleport/points_latents"]
        k = min(2, latents.shape[1] - 1)
        here = drawn(browser, "fig4d_teleport", "decoded(host.data.find((t) => t.marker?.colorscale).x)")
        np.testing.assert_allclose(here, latents[:, k, 0], rtol=1e-4)
        ways = drawn(browser, "fig4d_teleport", "host.data.find((t) => t.mode === 'lines' && t.showlegend === false).x")
        np.testing.assert_allclose(ways[0::3], latents[:, 0, 0], rtol=1e-4)
        seen.append(
            drawn(browser, "recovery_relative", "decoded(host.data.find((t) => t.name === 'random directions').y)")
        )
        expected = arrays["perturb"][f"layer{layer}/random_directions/relative_curve"][0]
        np.testing.assert_allclose(seen[-1], expected, rtol=1e-5)
    assert len({tuple(s) for s in seen}) == len(layers)
    choose(browser, "condition", "random directions")
    names = drawn(browser, "fig4d_teleport", "host.data.map((trace) => trace.name)")
    assert "random directions" in names and "teleport" not in names


def test_a_sequence_under_the_pointer_is_followed(browser):
    browser.run("document.querySelector('#fig4a_trajectory').scrollIntoView({behavior: 'instant', block: 'center'})")
    browser.settle()
    point = drawn(
        browser,
        "fig4a_trajectory",
        """(() => {  // the point of a sequence that is furthest from the mean, which would be in its way
            const box = host.querySelector(".nsewdrag").getBoundingClientRect(), {xaxis, yaxis} = host._fullLayout;
            const at = (trace) => decoded(trace.x).map((x, i) => [xaxis.d2p(x), yaxis.d2p(decoded(trace.y)[i])]);
            const mean = at(host.data.find((trace) => trace.name === "mean"));
            const away = ([x, y]) => Math.min(...mean.map(([mx, my]) => Math.hypot(x - mx, y - my)));
            const far = at(host.data[0]).map((p) => p.every(Number.isFinite) ? away(p) : -1);
            const best = far.indexOf(Math.max(...far)), [x, y] = at(host.data[0])[best];
            return {x: box.x + x, y: box.y + y, path: host.data[0].customdata[best]};
        })()""",
    )
    assert drawn(browser, "fig4a_trajectory", "host.data.filter((trace) => trace.followed).length") == 0
    for offset in (3, 0):
        browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=point["x"] + offset, y=point["y"])
        browser.settle()
    followed = drawn(
        browser, "fig4a_trajectory", "host.data.filter((trace) => trace.followed).map((trace) => decoded(trace.x))"
    )
    n = len(followed[0])
    all_x = drawn(browser, "fig4a_trajectory", "decoded(host.data[0].x)")
    at = point["path"] * (n + 1)
    assert len(followed) == 1 and n == 6
    np.testing.assert_array_equal(followed[0], all_x[at : at + n])


def test_it_prints_in_light_colours_at_one_column(browser, tmp_path):
    browser.look(1600, dark=True)
    browser.settle()
    try:
        browser.run("addEventListener('beforeprint', () => setTimeout(() => 0)); window.seen = null;")
        browser.run(
            "addEventListener('beforeprint', () => { const host = document.querySelector('[data-plot=fig1f_speed]');"
            "seen = [host.layout.paper_bgcolor, host.layout.width, host.querySelector('svg').getAttribute('width')]; })"
        )
        pdf = browser.pdf(tmp_path / "page.pdf").read_bytes()
        assert pdf.startswith(b"%PDF") and pdf.count(b"/Type /Page\n") > 8
        assert browser.run("seen") == ["#ffffff", 660, "660"]
        browser.settle()
        assert drawn(browser, "fig1f_speed", "[host.layout.paper_bgcolor, host.layout.width || 0]") == ["#15171a", 0]
    finally:
        browser.look(1200)
        browser.settle()


def test_a_figure_can_be_saved(browser):
    browser.run(
        "window.saved = []; Plotly.downloadImage = (host, wanted) => saved.push([host.dataset.plot, wanted.format]);"
    )
    browser.run("document.querySelector('#fig1f_speed [data-save]').click()")
    assert browser.run("saved") == [["fig1f_speed", "svg"]]


def test_nothing_was_said_meanwhile(browser):
    assert browser.messages == []


def test_a_browser_that_cannot_draw_says_so(browser, page):
    made = browser.send("Page.addScriptToEvaluateOnNewDocument", source="delete window.DecompressionStream")
    try:
        browser.open(page)
        assert browser.run("document.documentElement.dataset.figures") == "failed"
        trouble = browser.run(
            "(() => { const p = document.getElementById('trouble'); return [p.hidden, p.textContent]; })()"
        )
        assert trouble[0] is False and "could not be drawn" in trouble[1] and "2023" in trouble[1]
    finally:
        browser.send("Page.removeScriptToEvaluateOnNewDocument", identifier=made["identifier"])
