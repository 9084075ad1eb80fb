"""The page in a real headless Chromium: drawn, quiet, asking nothing of anybody, usable by mouse and keyboard.

Screenshots are left in tests/artifacts, to be looked at.
"""

import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jaxckpt

pytestmark = pytest.mark.browser

ARTIFACTS = Path(__file__).parent / "artifacts"
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
HOW = (
    "there is no headless Chromium here. `make browser` installs Debian's and Ubuntu's; "
    "`python -m playwright install --only-shell chromium` downloads Playwright's; or name one in JAXCKPT_CHROMIUM"
)
EVIL = "</script><script>window.evil = 1</script><img src=x onerror='window.evil = 2'>"
NUM_LAYERS = 24


def loss(params, x):
    for i, layer in enumerate(params["layers"]):
        with jax.named_scope(f"layer{i}"):
            with jax.named_scope("attention"):
                scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", x @ layer["q"], x @ layer["k"]))
                x = x + jnp.einsum("bts,bsd->btd", scores, x)
            with jax.named_scope(EVIL if i == 3 else "mlp"):
                x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
    return jnp.mean(x**2)


def step(params, x):
    value, gradients = jax.value_and_grad(loss)(params, x)
    return jax.tree.map(lambda w, g: w - 0.1 * g, params, gradients), value


def args(num_layers):
    shapes = {"q": (32, 32), "k": (32, 32), "up": (32, 128), "down": (128, 32)}
    layer = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return {"layers": [layer] * num_layers}, jax.ShapeDtypeStruct((4, 64, 32), jnp.float32)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages by name: of a function of many layers, the same again, of a whole step, of a plan alone."""
    folder = tmp_path_factory.mktemp("pages")
    made = jaxckpt.plan(loss, *args(NUM_LAYERS), budget="40%")
    curve = jaxckpt.frontier(loss, *args(NUM_LAYERS), num_points=6)
    for name in ("function", "again"):
        made.to_html(loss, *args(NUM_LAYERS), frontier=curve, source=True, path=folder / f"{name}.html")
    fitted = jaxckpt.fit(step, *args(4), budget="80%", donate_argnums=0)
    fitted.to_html(path=folder / "step.html")
    made.to_html(path=folder / "alone.html")
    return {path.stem: path for path in folder.glob("*.html")}


@pytest.fixture(scope="module")
def browser():
    """A Chromium. Where there is none these tests fail: nobody has looked at the page."""
    # A failure where it is missing, not a skip: `make test-browser` installs it.
    import playwright.sync_api as playwright

    with playwright.sync_playwright() as started:
        own = Path(started.chromium.executable_path)
        named = [os.environ.get("JAXCKPT_CHROMIUM"), *map(shutil.which, NAMES), str(own) if own.exists() else None]
        found = next(filter(None, named), None)
        if found is None:
            pytest.fail(HOW)
        # As root, as in a container, Chromium has no sandbox to offer.
        launched = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def opened(browser, pages):
    """Opens a page by name, and fails on whatever its console says and on whatever it asks for."""
    said, contexts = [], []

    def open_page(name, width=1280, theme="light", **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, **options)
        contexts.append(context)
        page, own = context.new_page(), pages[name].as_uri()
        page.on("console", lambda message: said.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("request", lambda request: said.append(f"request: {request.url}") if request.url != own else None)
        page.goto(own)
        page.wait_for_selector("html[data-drawn=true]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not said


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("name", ["function", "step"])
def test_it_is_drawn_at_every_width_in_every_theme(opened, name, width, theme):
    page = opened(name, width, theme)
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for key in ("unplanned", "planned"):
        assert page.locator(f"#plot-{key} svg .mark-area path").count() >= 4
        drawn = page.locator(f"#plot-{key} svg").bounding_box()
        assert 0.7 * width < drawn["width"] + 120 <= width + 120 and drawn["height"] > 200
        assert re.search(r"peak [\d.]+ [KMG]iB", page.locator(f"#plot-{key} svg").text_content())
    assert _is_painted(page, "#plot-heap canvas")
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"{name}-{width}-{theme}.png", full_page=True)


def _is_painted(page, canvas):
    """Whether a canvas has more than one colour."""
    return page.locator(canvas).evaluate(
        "c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size > 3"
    )


def test_names_run_nothing(opened):
    page = opened("function")
    assert page.evaluate("window.evil") is None
    shown = "[...document.querySelectorAll('td, li, span')].some((e) => e.textContent.includes('<script>window.evil'))"
    assert page.evaluate(shown)


def test_pointing_at_a_band_says_what_is_there(opened):
    page = opened("function")
    plot = page.locator("#plot-unplanned svg")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.45 * box["height"])
    said = page.locator("#tip").inner_text()
    assert re.search(r"Step [\d,]+, (forward|backward): [\d.]+ [KM]iB live", said)
    assert re.search(r"f32\[[\d,]+\]", said) and "made at step" in said and "last read at" in said
    assert "test_browser.py:" in said and page.locator("#plot-unplanned .cursor").is_visible()
    page.screenshot(path=ARTIFACTS / "hover.png")
    page.mouse.move(5, 5)
    assert not page.locator("#tip").is_visible()


def test_pointing_at_the_heap_names_one_buffer(opened):
    page = opened("function")
    canvas = page.locator("#plot-heap canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for share in (0.3, 0.4, 0.5, 0.6, 0.7):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 0.75 * box["height"], steps=4)
        if page.locator("#tip").is_visible():
            break
    assert "made at step" in page.locator("#tip").inner_text()


def test_the_keyboard_reaches_the_peak_and_says_it(opened):
    page = opened("function")
    page.locator("#plot-planned").focus()
    page.keyboard.press("p")
    slider = page.locator("#plot-planned")
    before = slider.get_attribute("aria-valuetext")
    peak = re.search(r"At step ([\d,]+) of", page.locator("main").inner_text())[1]
    assert before.startswith(f"Step {peak},") and "live" in before
    page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") != before
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()


def test_tables_sort_both_ways_and_open(opened):
    page = opened("function")
    first = page.locator("#peak tbody tr td:first-child")

    def sizes():
        return [int(value) for value in first.evaluate_all("all => all.map(c => c.dataset.v)")]

    head = page.locator("#peak th").first
    assert sizes() == sorted(sizes(), reverse=True) and head.get_attribute("aria-sort") == "descending"
    shown = page.locator("#peak tbody tr:visible").count()
    head.locator("button").press("Enter")
    assert sizes() == sorted(sizes()) and head.get_attribute("aria-sort") == "ascending"
    assert page.locator("#peak tbody tr:visible").count() == shown
    page.locator("#peak th", has_text="where").locator("button").click()
    assert head.get_attribute("aria-sort") is None
    if page.locator("button.more[data-table=peak]").count():
        page.locator("button.more[data-table=peak]").click()
    assert page.locator("#peak tbody tr:visible").count() == len(sizes())


def test_the_theme_changes_the_charts_too(opened):
    page = opened("function")
    color = lambda: page.locator("#plot-planned svg .role-axis-label text").first.get_attribute("fill")  # noqa: E731
    light = color()
    page.locator("#theme").click()
    axis = "#plot-planned svg .role-axis-label text"
    changed = f"document.querySelector('{axis}')?.getAttribute('fill') !== '{light}'"
    page.wait_for_function(changed)
    assert page.evaluate("document.documentElement.dataset.theme") == "dark" and color() != light


def test_bands_by_line_and_phase_and_one_alone(opened):
    page = opened("function")
    assert "layer*/attention" in page.locator("#legend").inner_text()
    page.locator("#by label", has_text="phase").click()
    assert {"forward", "backward", "recomputed"} <= set(re.findall(r"[a-z]+", page.locator("#legend").inner_text()))
    page.locator("#by label", has_text="source line").click()
    assert "test_browser.py:" in page.locator("#legend").inner_text()
    press = page.locator("#legend button").nth(2)
    press.click()
    assert page.locator("#legend button[aria-pressed=true]").count() == 1
    faint = "document.querySelectorAll('#plot-planned svg .mark-area path[opacity=\"0.18\"]').length > 2"
    page.wait_for_function(faint)
    page.locator("#scale label", has_text="each its own").click()


def test_charts_have_words_and_controls_have_names(opened):
    page = opened("function")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('.plot')].filter((p) => !p.getAttribute('aria-label')).length
        + [...document.querySelectorAll('button')].filter((b) => !b.textContent.trim()).length
        + [...document.querySelectorAll('input')].filter((i) => !i.closest('label')).length
        + [...document.querySelectorAll('section')].filter((s) => !s.querySelector('h2')).length"""
    )
    assert nameless == 0 and page.locator("h1").count() == 1
    assert page.locator("#bands tbody tr").count() == page.locator("#legend li").count()
    assert page.locator("#plot-frontier svg .mark-symbol path").count() >= 6
    assert page.locator(".regions svg .mark-rect path").count() >= 2
    assert "jnp.tanh" in page.locator("#lines").inner_text()


def test_a_plan_alone_has_a_page(opened):
    page = opened("alone")
    assert "Nothing was compiled for this page" in page.locator("main").inner_text()
    assert page.locator(".regions svg").count() == 1


def test_a_page_of_many_layers_is_small_and_the_same_each_time(pages):
    text = pages["function"].read_bytes()
    assert len(text) < 3_000_000
    assert pages["again"].read_bytes() == text
