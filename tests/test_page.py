"""The page about a plan, without a browser: what is on it, what is not, and that it is always the same."""

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import pytest
from helpers import no_compiles

import jaxckpt
from jaxckpt.cli import main
from jaxckpt.compilation.buffers import CompiledMemory
from jaxckpt.model.time import timer
from jaxckpt.result.page import palette, vega
from jaxckpt.result.page.content import Content, Reading
from jaxckpt.result.page.grouping import groupings
from jaxckpt.result.page.lines import line_costs
from jaxckpt.result.page.page import page_html
from jaxckpt.result.page.peak import peak_rows
from jaxckpt.result.page.reading import read_plan
from jaxckpt.result.page.timeline import columns, made_again, timelines
from jaxckpt.result.page.verdict import verdict
from jaxckpt.targets.chip import find_target

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def loss(params, x):
    for i, w in enumerate(params["layers"]):
        with jax.named_scope(f"layer{i}"), jax.named_scope(EVIL if i == 3 else "dense"):
            x = jnp.tanh(x @ w)
    return jnp.sum(x**2)


def step(params, x):
    value, gradients = jax.value_and_grad(loss)(params, x)
    return jax.tree.map(lambda w, g: w - 0.1 * g, params, gradients), value


def specs(num_layers, rows=512, width=32):
    layers = [jax.ShapeDtypeStruct((width, width), jnp.float32)] * num_layers
    return {"layers": layers}, jax.ShapeDtypeStruct((rows, width), jnp.float32)


ARGS = specs(8)


@pytest.fixture(autouse=True)
def _without_the_library(monkeypatch):
    """Making a script of the library takes seconds of the processor; `make test-browser` runs the real one."""
    monkeypatch.setattr(vega, "script", lambda: "/* vega */")


@pytest.fixture(scope="module")
def plan():
    return jaxckpt.plan(loss, *ARGS, budget="60%")


@pytest.fixture(scope="module")
def reading(plan):
    return read_plan(plan, loss, ARGS, {}, source=True)


def content(plan, reading, **more):
    return Content(name="loss", plans=(plan,), reading=reading, **more)


class Tags(HTMLParser):
    """What is an element on a page, and what is text."""

    def __init__(self, page):
        super().__init__()
        self.names, self.attributes, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_a_page_is_the_same_whenever_it_is_made(plan, reading):
    page = page_html(content(plan, reading))
    again = jaxckpt.Plan.from_json(json.loads(plan.to_text()))
    memories = [
        CompiledMemory.from_json(json.loads(json.dumps(m.to_json()))) for m in (reading.unplanned, reading.planned)
    ]
    same = Reading(unplanned=memories[0], planned=memories[1], costs=reading.costs, texts=reading.texts)
    assert page_html(content(again, same)) == page


def test_names_are_text_and_only_the_pages_own_scripts_may_run(plan, reading):
    page = page_html(content(plan, reading, command=f"jaxckpt plan {EVIL}"))
    tags = Tags(page)
    assert tags.names.count("script") == 3 and "img" not in tags.names
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert EVIL in "".join(tags.text)  # it is there, as text
    policy = next(
        value for name, value in tags.attributes if name == "content" and value.startswith("default-src 'none'")
    )
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert len(hashes) == 2 and all(f"'sha256-{h}'" in policy for h in hashes)
    assert "unsafe-eval" not in policy and not re.findall(r"""(?:src|href)=["'](?!#)""", page)


def test_no_path_of_this_machine_and_source_only_where_asked(plan, reading):
    shown = page_html(content(plan, reading))
    hidden = page_html(content(plan, read_plan(plan, loss, ARGS, {})))
    line = "x = jnp.tanh(x @ w)"
    assert "tests/test_page.py" in shown and line in shown and line not in hidden
    root = __file__.removesuffix("tests/test_page.py")
    assert root not in shown + hidden


def test_bands_are_few_the_same_for_both_and_add_up(reading):
    programs = {"unplanned": reading.unplanned, "planned": reading.planned}
    found = timelines(programs)
    for by, named in found["by"].items():
        own = [c for c in named["colors"] if c in palette.BANDS]
        assert len(named["labels"]) == len(named["colors"]) and len(own) == len(set(own)), by
        for name, memory in programs.items():
            rows = found["programs"][name]["bands"][by]
            sums = [sum(column) for column in zip(*rows, strict=True)]
            assert set(sums) == {memory.totals.device_bytes}
    assert "layer*/dense" in found["by"]["scope"]["labels"]
    assert {"forward", "backward", "recomputed"} <= set(found["by"]["phase"]["labels"])


def test_a_column_shows_the_most_of_its_steps(reading):
    memory = reading.planned
    few = columns(memory, 10)
    assert len(few) == 10 and few[0][0] == 0 and memory.peak_step in [shown for _, shown in few]
    assert max(memory.live_bytes[shown] for _, shown in few) == max(memory.live_bytes)


def test_what_is_made_again_is_said_of_what_it_stands_for(reading):
    assert not made_again(reading.unplanned)
    again = made_again(reading.planned)
    assert any(
        scope == "layer0/dense" and count >= 1 and first <= last for (scope, *_), (count, first, last) in again.items()
    )


def test_the_peak_in_rows_is_the_peak(reading):
    for memory in (reading.unplanned, reading.planned):
        rows = peak_rows(memory)
        counted = {id(b) for b in memory.on_device()}
        assert sum(r.size_bytes for r in rows) == sum(b.size_bytes for b in memory.peak if id(b) in counted)
        assert [r.size_bytes for r in rows] == sorted((r.size_bytes for r in rows), reverse=True)
        assert all(r.why and r.advice for r in rows)
    saved = [r for r in peak_rows(reading.unplanned) if r.why == "saved by the forward pass for the backward"]
    assert saved and saved[0].count > 1 and saved[0].scope == "layer*/dense" and "test_page.py" in saved[0].source
    [weights] = [r for r in rows if r.scope == "params['layers'][*]"]
    assert weights.count == 8 and weights.phase == "argument" and "an argument" in weights.why


def test_arguments_have_the_names_that_users_gave(reading):
    names = {b.scope for b in reading.planned.buffers if b.role == "argument"}
    assert names == {*(f"params['layers'][{i}]" for i in range(8)), "x"}


def test_lines_share_out_the_models_time(plan, reading):
    plain, planned = (sum(costs.values()) for costs in reading.costs)
    assert planned - plain == pytest.approx(plan.recompute_cost, rel=0.1)
    assert plain == pytest.approx(plan.unplanned_cost, rel=0.1)
    assert all(line.rpartition(":")[0] == "tests/test_page.py" for line in reading.costs[0] if line)


def test_a_loops_time_goes_to_the_lines_of_its_body():
    def scanned(ws, x):
        def body(x, w):
            x = jnp.tanh(x @ w)
            return x * 2, None

        return jax.lax.scan(body, x, ws)[0].sum()

    closed = jax.make_jaxpr(jax.grad(scanned))(jnp.ones((4, 16, 16)), jnp.ones((8, 16)))
    first = scanned.__code__.co_firstlineno
    found = {int(line.rpartition(":")[2]) - first for line in line_costs(closed, timer("flops", find_target(None)))}
    assert {2, 3} <= found


@pytest.mark.parametrize(
    ("budget", "word", "said"), [("60%", "Fits", "below the budget"), (None, "Planned", "step time")]
)
def test_the_verdict_is_one_line(budget, word, said, plan):
    made = plan if budget else jaxckpt.plan(loss, *ARGS, max_cost=1.2, verify=False)
    found = verdict(content(made, Reading()))
    assert found.word == word and said in found.sentence and found.is_good and "cpu" in found.sentence


def test_of_several_devices_bytes_are_said_to_be_of_each(plan, reading):
    found = verdict(content(dataclasses.replace(plan, split=4), reading))
    assert "per device" in found.sentence
    assert all("per device" in tile.label for tile in found.tiles if re.search("[KMG]iB", tile.number))
    assert "per device" not in verdict(content(plan, reading)).sentence


@pytest.mark.targets
@pytest.mark.parametrize("target", ["h100", "v5e"])
def test_a_page_for_a_chip_that_is_not_here(target):
    args = specs(8, 16384, 128)
    made = jaxckpt.plan(loss, *args, budget="70%", target=target, verify=False)
    page = made.to_html(loss, *args)
    data = data_of(page)
    assert set(data["programs"]) == {"unplanned", "planned"} and f" on {target}, " in page
    assert "forward" in data["by"]["phase"]["labels"] and "chip&#39;s memory is" in page
    for program in data["programs"].values():
        assert {sum(column) for column in zip(*program["bands"]["scope"], strict=True)} == {program["total"]}
    fitted = jaxckpt.fit(step, *args, budget="100%", target=target, donate_argnums=0)
    assert "measured, whole step" in fitted.to_html()


def test_what_does_not_fit_is_said():
    with pytest.warns(jaxckpt.JaxckptWarning):
        made = jaxckpt.plan(loss, *ARGS, budget=40_000, on_infeasible="least", verify=False)
    found = verdict(content(made, Reading()))
    assert found.word == "Does not fit" and not found.is_good and "above the budget" in found.sentence


def test_a_program_that_is_refused_is_said_and_the_rest_is_there(plan, monkeypatch, reading):
    def refused(*args, **kwargs):
        raise jaxckpt.CompilerError("too large <b>")

    monkeypatch.setattr("jaxckpt.result.page.reading.program_memory", refused)
    page = plan.to_html(loss, *ARGS)
    assert "Without a plan: too large &lt;b&gt;" in page and "The tree of regions in words" in page
    alone = page_html(content(plan, Reading(unplanned=reading.unplanned, why_not="the planned one is not")))
    assert list(data_of(alone)["programs"]) == ["unplanned"]


def test_without_the_extra_the_answer_comes_before_the_work(plan, monkeypatch, tmp_path):
    real = vega.importlib.util.find_spec
    monkeypatch.setattr(vega.importlib.util, "find_spec", lambda name: None if name == "vl_convert" else real(name))
    with no_compiles():
        with pytest.raises(jaxckpt.OptionError, match=r"jaxckpt\[html\]"):
            plan.to_html(loss, *ARGS)
        assert main(["plan", "tests.test_page:loss", "--budget", "60%", "--html", str(tmp_path / "a.html")]) == 2
    assert not list(tmp_path.iterdir())


def test_notebooks_show_the_report_as_text(plan):
    shown = plan._repr_html_()
    assert "Plan for cpu" in shown and "&lt;/script&gt;" in shown and "<script" not in shown


def test_the_command_line_writes_pages_and_traces(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_model.py").write_text(
        "from tests.test_page import loss, step, specs\n\ndef example_args():\n    return specs(5)\n"
    )
    monkeypatch.chdir(tmp_path)
    place = str(tmp_path / "page.html")
    words = ["plan", "own_model.py:loss", "--budget", "80%", "--html", place, "--trace", "trace.json"]
    assert main(words) == 0
    page = (tmp_path / "page.html").read_text()
    assert "jaxckpt plan own_model.py:loss --budget 80% --html page.html --trace trace.json" in page
    assert str(tmp_path) not in page and "What other budgets cost" in page
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert "wrote" in capsys.readouterr().err
    assert main(["fit", "own_model.py:step", "--budget", "80%", "--donate", "0", "--html", "step.html"]) == 0
    whole = (tmp_path / "step.html").read_text()
    assert "measured, whole step" in whole and "donated: a result takes its place" in whole
    assert "optimizer" in whole and set(data_of(whole)["programs"]) == {"planned", "unplanned"}
    assert main(["plan", "own_model.py:loss", "--budget", "80%", "--source"]) == 2
    assert main(["plan", "own_model.py:loss", "--budget", "80%", "--html", "none/page.html"]) == 2


def test_more_names_than_colours_leave_the_rest_to_others(reading):
    many = [b for b in reading.unplanned.buffers if b.role == "temporary"]
    renamed = tuple(
        jaxckpt.Buffer(
            **{n: getattr(b, n) for n in b.__dataclass_fields__} | {"scope": f"part{'abcdefghijklmnop'[i % 16]}"}
        )
        for i, b in enumerate(many)
    )
    memory = jaxckpt.CompiledMemory(
        **{n: getattr(reading.unplanned, n) for n in reading.unplanned.__dataclass_fields__} | {"buffers": renamed}
    )
    labels = {groupings([memory])["scope"](b) for b in renamed}
    assert len(labels) == len(palette.BANDS) + 1 and palette.OTHER in labels
