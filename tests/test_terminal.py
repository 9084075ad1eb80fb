"""What the terminal shows: within 80 columns, folded, and said to be of each device where there are several."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from helpers import no_compiles

import jaxckpt
from jaxckpt.cli import main
from jaxckpt.result.plan import SavedGroup
from jaxckpt.result.report import show_frontier, show_plan, show_step
from jaxckpt.result.saved_table import short_place, short_shape
from jaxckpt.result.text_chart import text_chart

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def loss(weights, x):
    for i, w in enumerate(weights):
        with jax.named_scope(f"a_rather_long_name_of_a_model/a_rather_long_name_of_its_layer_{i}/attention"):
            x = jnp.tanh(x @ w)
    return jnp.sum(x**2)


def example_args():
    return [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 16, jax.ShapeDtypeStruct((4096, 64), jnp.float32)


@pytest.fixture(scope="module")
def frontier():
    return jaxckpt.frontier(loss, *example_args(), num_points=6)


@pytest.fixture(scope="module")
def plan(frontier):
    """A plan with the largest numbers, the longest names and more kinds of saved values than are shown."""
    groups = tuple(
        SavedGroup(
            source=f"a_package/of_folders/a_long_name_of_a_module.py:{1000 + i}:{i} (A.Very.long_name_of_a_function)",
            primitive="conv_general_dilated",
            scope=f"model/of/many/parts/layer_{i}/attention/query",
            shape_dtype="float32[128,2048,32,128]",
            count=100 + i,
            size_bytes=10**12 - i,
        )
        for i in range(25)
    )
    size = 1_234_567_890_123
    sizes = dict.fromkeys(("unplanned_peak_bytes", "predicted_peak_bytes", "measured_peak_bytes"), size)
    return dataclasses.replace(
        frontier.plans[2], budget_bytes=size, next_peak_bytes=size, least_peak_bytes=size, saved=groups, **sizes
    )


def is_narrow(text):
    return max(map(len, ESCAPES.sub("", text).splitlines())) <= 80


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize("split", [1, 8])
def test_reports_fit_80_columns(plan, frontier, color, split):
    shown = show_plan(dataclasses.replace(plan, split=split), color=color)
    assert is_narrow(shown) and is_narrow(show_frontier(frontier, color=color)) and ("\x1b[" in shown) == color
    # No row is folded into several: each size is on the line of its name.
    assert re.search(
        r"\nplanned peak +1\.123 TiB \(1,234,567,890,123 bytes( per device)?\) +measured", ESCAPES.sub("", shown)
    )


def test_what_is_saved_folds_to_ten_rows_with_short_places(plan):
    few, every = show_plan(plan).splitlines(), show_plan(plan, all_rows=True).splitlines()
    rows = [line for line in few if "module.py:" in line]
    assert len(rows) == 10 and sum("module.py:" in line for line in every) == 25
    folded = next(line for line in few if "others" in line)
    assert f"{sum(range(110, 125)):,}" in folded and "--all" in folded and not any("others" in line for line in every)
    assert "f32[128" in rows[0] and "function" not in rows[0] and "1000" in rows[0] and rows[0].endswith("query")


@pytest.mark.parametrize(
    ("source", "short"),
    [
        ("a/b/linear.py:1205:11 (Embed.attend)", "linear.py:1205"),
        ("model.py:3", "model.py:3"),
        ("what", "what"),
        ("", ""),
    ],
)
def test_short_places(source, short):
    assert short_place(source) == short


def test_short_shapes():
    assert [short_shape(s) for s in ("uint8[2]", "bool[]", "key<fry>[3]", "what JAX keeps", "complex64[1]")] == [
        "u8[2]", "bool[]", "key<fry>[3]", "what JAX keeps", "c64[1]",
    ]  # fmt: skip


def test_of_several_devices_every_number_says_whose_it_is(plan, frontier):
    shown = show_plan(dataclasses.replace(plan, split=8, host_budget_bytes=10**9, predicted_host_bytes=5 * 10**8))
    head, _, rest = shown.partition("\nbudget")
    assert "per device" in head and "saved from forward to backward, per device" in rest
    rows = [
        line for line in f"budget{rest}".partition("regions:")[0].splitlines() if re.search(r"\d [KMGT]iB|FLOP\b", line)
    ]
    assert len(rows) >= 8 and all("per device" in row or "on all devices" in row for row in rows), rows
    assert "per device" not in show_plan(plan)
    each = [dataclasses.replace(p, plan=p.plan and dataclasses.replace(p.plan, split=8)) for p in frontier.points]
    curve = show_frontier(dataclasses.replace(frontier, points=tuple(each)))
    assert "per device" in curve and "per device" not in show_frontier(frontier)


def test_a_step_of_several_devices_says_so_at_every_number(plan):
    sizes = {f"{name}_bytes": 10**9 for name in ("device", "argument", "output", "alias", "temp", "code")}
    names = {f.name for f in dataclasses.fields(jaxckpt.Measurement)}
    measured = jaxckpt.Measurement(**sizes, target="cpu:8", **({"compile_s": 1.0} if "compile_s" in names else {}))
    fitted = jaxckpt.Fitted(
        step=loss,
        plans=(dataclasses.replace(plan, split=8),),
        measurement=measured,
        unplanned=measured,
        budget_bytes=2 * 10**9,
        num_compiles=1,
    )
    own = show_step(fitted).partition("\nPlan for")[0]
    rows = [line for line in own.splitlines()[1:] if "MiB" in line or "GiB" in line]
    assert len(rows) >= 4 and all("per device" in row for row in rows) and "per device" in own.splitlines()[0]
    assert is_narrow(show_step(fitted))
    assert "found" not in fitted.to_json() and "Step for cpu" in fitted._repr_html_()
    with pytest.raises(jaxckpt.OptionError, match="fit or largest_batch"):
        fitted.read()


def test_a_frontier_is_drawn_in_text(frontier):
    chart = text_chart(frontier.points)
    rows = [line.partition("|")[2] for line in chart.splitlines() if "|" in line][:11]
    assert len(rows) == 11 and rows[0].startswith("*")  # the least bytes cost most
    assert rows[-1].rstrip()[-1] in "*o" and "a full remat" in chart and is_narrow(chart)
    assert chart in show_frontier(frontier)
    assert not text_chart(frontier.points[:1])


def test_the_table_of_chips_fits(capsys):
    assert main(["targets"]) == 0
    shown = capsys.readouterr().out
    assert is_narrow(shown.partition("\n\n")[0]) and re.search(r"^h100 .*jaxckpt$", shown, re.M)


def test_a_missing_or_unfit_plotting_library_is_found_before_the_work(monkeypatch, capsys, tmp_path):
    words = ["frontier", "tests.test_terminal:loss", "--plot"]
    with no_compiles():
        monkeypatch.setattr(jaxckpt.api.frontier, "find_analysis", lambda *args, **kwargs: pytest.fail("worked"))
        assert main([*words, str(tmp_path / "a.notapicture")]) == 2
        assert "matplotlib writes" in capsys.readouterr().err
        assert main([*words, str(tmp_path / "none" / "a.png")]) == 2
        monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
        assert main([*words, str(tmp_path / "a.png")]) == 2
        assert "jaxckpt[plot]" in capsys.readouterr().err


def test_the_command_line_folds_and_unfolds(plan, tmp_path, capsys):
    plan.save(tmp_path / "plan.json")
    assert main(["show", str(tmp_path / "plan.json")]) == 0
    assert "others" in capsys.readouterr().out
    assert main(["show", str(tmp_path / "plan.json"), "--all"]) == 0
    assert "others" not in capsys.readouterr().out
