"""The command line: data on stdout, words on stderr, exit 0, 1 or 2."""

import json
import os
import subprocess
import sys

import pytest

import jaxckpt
from jaxckpt.cli import main

MODEL = """
import jax, jax.numpy as jnp

def loss(weights, x):
    for w in weights:
        x = jnp.tanh(x @ w)
    return jnp.sum(x ** 2)

def aux_loss(x, weights):
    return loss(weights, x), x

def other(weights, x):
    return loss(weights, jnp.sin(x))

def example_args(rows=256):
    return [jax.ShapeDtypeStruct((16, 16), jnp.float32)] * 6, jax.ShapeDtypeStruct((rows, 16), jnp.float32)

def small_args():
    return example_args(8)

def swapped_args():
    return example_args()[::-1]

def broken(weights, x):
    raise KeyError("own")

not_a_function = 3
"""


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    (tmp_path / "zoo_model.py").write_text(MODEL)
    (tmp_path / "bare.py").write_text("def loss(x):\n    return x.sum()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("zoo_model", "bare"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("reference", ["zoo_model:loss", "zoo_model.py:loss", "./zoo_model.py:loss"])
def test_plan_prints_a_report(reference, capsys):
    assert main(["plan", reference, "--budget", "70%", "--no-verify"]) == 0
    out, err = capsys.readouterr()
    assert "least feasible peak" in out and "recompute" in out and "zoo_model.py" in out
    assert not err and "\x1b" not in out


def test_plan_prints_json_under_the_attributes_names(capsys):
    assert main(["plan", "zoo_model:loss", "--budget", "70%", "--cost", "flops", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    plan = jaxckpt.Plan.from_json(data)
    assert data["measured_peak_bytes"] <= data["budget_bytes"] and plan.cost == "flops"


def test_a_plan_is_written_shown_and_checked(capsys):
    assert main(["plan", "zoo_model:loss", "--budget", "70%", "--no-verify", "-o", "plan.json"]) == 0
    report, err = capsys.readouterr()
    assert "wrote plan.json" in err
    assert main(["show", "plan.json"]) == 0
    assert capsys.readouterr().out == report
    assert main(["show", "plan.json", "--json"]) == 0
    assert jaxckpt.Plan.from_json(json.loads(capsys.readouterr().out)) == jaxckpt.Plan.load("plan.json")
    assert main(["check", "plan.json", "zoo_model:loss"]) == 0
    assert "is a plan for" in capsys.readouterr().out
    assert main(["check", "plan.json", "zoo_model:loss", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"matches": True}


def test_a_plan_for_something_else_is_a_clear_no(capsys):
    main(["plan", "zoo_model:loss", "--budget", "70%", "--no-verify", "-o", "plan.json"])
    capsys.readouterr()
    for what in (["zoo_model:other"], ["zoo_model:loss", "--args", "zoo_model:small_args"]):
        assert main(["check", "plan.json", *what]) == 1
        out, err = capsys.readouterr()
        assert not out and "another function" in err
        assert main(["check", "plan.json", *what, "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert found["matches"] is False and "another function" in found["why"]


def test_a_budget_that_cannot_be_kept_is_a_clear_no(capsys):
    assert main(["plan", "zoo_model:loss", "--budget", "1KB", "--no-verify"]) == 1
    assert "least feasible peak" in capsys.readouterr().err
    assert main(["plan", "zoo_model:loss", "--budget", "1000", "--no-verify", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["feasible"] is False and data["budget_bytes"] == 1000 < data["expected_least_bytes"]


def test_measure_prints_the_bytes_and_their_parts(capsys):
    assert main(["measure", "zoo_model:loss", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    parts = data["argument_bytes"] + data["output_bytes"] - data["alias_bytes"] + data["temp_bytes"]
    assert data["device_bytes"] == parts
    assert main(["measure", "zoo_model:loss", "--forward"]) == 0
    out = capsys.readouterr().out
    assert "measured for cpu" in out and f"{data['argument_bytes']:,}" in out


def test_options_reach_the_planner(capsys):
    call = ["plan", "zoo_model:aux_loss", "--args", "zoo_model:swapped_args", "--has-aux", "--no-verify", "--json"]
    assert main([*call, "--argnums", "0", "1", "--solver", "chen", "--max-cost", "1.5", "--inline-checkpoints"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["solver"] == "chen" and data["max_cost"] == 1.5 and data["budget_bytes"] is None
    assert data["keeps_checkpoints"] is False
    assert data["parameter_bytes"] == 4 * (6 * 256 + 256 * 16)


USAGE = {
    "no colon": (["plan", "zoo_model", "--budget", "1GB"], "MODULE:FUNCTION"),
    "no module": (["plan", "nothing:loss", "--budget", "1GB"], "no module 'nothing'"),
    "no file": (["plan", "nothing.py:loss", "--budget", "1GB"], "nothing.py does not exist"),
    "no function": (["plan", "zoo_model:lost", "--budget", "1GB"], "no 'lost'"),
    "no arguments": (["plan", "bare:loss", "--budget", "1GB"], "example_args"),
    "bad budget": (["plan", "zoo_model:loss", "--budget", "8 gigs"], "8 gigs"),
    "bad float": (["plan", "zoo_model:loss", "--budget", "0.6"], "0.6"),
    "bad target": (["plan", "zoo_model:loss", "--budget", "1GB", "--target", "h10"], "h100"),
    "no plan file": (["show", "nothing.json"], "nothing.json"),
    "not a plan": (["show", "zoo_model.py"], "not a jaxckpt plan"),
    "bad solver": (["plan", "zoo_model:loss", "--budget", "1GB", "--solver", "fastest"], "revolve"),
    "not a function": (["plan", "zoo_model:not_a_function", "--budget", "1GB"], "not_a_function"),
    "no command": ([], "usage"),
}


@pytest.mark.parametrize("name", USAGE)
def test_a_call_that_makes_no_sense_says_why(name, capsys):
    arguments, wanted = USAGE[name]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and wanted in err and "Traceback" not in err


def test_argparse_refuses_with_two(capsys):
    for arguments in (
        ["plan", "zoo_model:loss"],
        ["plan", "zoo_model:loss", "--budget", "1", "--max-cost", "2"],
        ["x"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


def test_an_error_of_the_function_is_its_own():
    with pytest.raises(KeyError, match="own"):
        main(["plan", "zoo_model:broken", "--budget", "1GB"])


def test_help_does_not_import_jax():
    code = (
        "import sys, jaxckpt.cli\n"
        "try:\n    jaxckpt.cli.main(['plan', '--help'])\n"
        "except SystemExit as done:\n    assert done.code == 0\n"
        "print('jax' in sys.modules, file=sys.stderr)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert "--budget" in done.stdout and done.stderr.strip() == "False"


STEP = (
    MODEL
    + """
def step(weights, x):
    value, gradients = jax.value_and_grad(loss)(weights, x)
    return [w - 0.1 * g for w, g in zip(weights, gradients)], value
"""
)


@pytest.fixture
def _with_a_step(tmp_path):
    (tmp_path / "zoo_step.py").write_text(STEP)
    yield
    sys.modules.pop("zoo_step", None)


@pytest.mark.usefixtures("_with_a_step")
def test_fit_and_largest_batch(capsys):
    assert main(["fit", "zoo_step:step", "--budget", "80%", "--donate", "0", "--max-compiles", "3"]) == 0
    assert capsys.readouterr().out.startswith("Step for cpu: ")
    assert main(["fit", "zoo_step:step", "--budget", "80%", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measurement"]["device_bytes"] <= found["budget_bytes"] < found["unplanned"]["device_bytes"]
    assert main(["fit", "zoo_step:step", "--budget", "1kB", "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["feasible"]
    assert main(["fit", "zoo_step:loss", "--budget", "80%"]) == 2
    arguments = ["largest-batch", "zoo_step:step", "--budget", "100kB"]
    assert main([*arguments, "--global-batch", "1024", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batch"] * found["accumulation_steps"] == 1024 and found["batch"] > 1
    assert main([*arguments, "--global-batch", "0"]) == 2
    assert main([*arguments, "--args", "zoo_step:small_args"]) == 2
    assert "cannot be called with a batch size" in capsys.readouterr().err
    assert main(["largest-batch", "zoo_step:step", "--budget", "50%"]) == 2


def test_check_measures_and_compares(capsys, tmp_path):
    path = str(tmp_path / "plan.json")
    assert main(["plan", "zoo_model:loss", "--budget", "70%", "-o", path]) == 0
    capsys.readouterr()
    assert main(["check", path, "zoo_model:loss", "--measure", "--values", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "fits the budget" in out and "gradients  " in out
    assert main(["check", path, "zoo_model:loss", "--measure", "--values", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    plan = jaxckpt.Plan.load(path)
    assert found["matches"] and found["fits"] and found["measured_peak_bytes"] == plan.measured_peak_bytes
    assert found["values"]["is_close"] and found["values"]["gradients"]["relative"] < 1e-4
    # Under a compiler that takes more, the plan is the same and the answer a no.
    data = plan.to_json() | {"budget_bytes": plan.peak_bytes - 1}
    from jaxckpt.compilation.files import with_digest

    del data["digest"]
    (tmp_path / "tight.json").write_text(json.dumps(with_digest(data)))
    assert main(["check", str(tmp_path / "tight.json"), "zoo_model:loss", "--measure"]) == 1
    assert "no longer fits the budget" in capsys.readouterr().out
    assert main(["check", path, "zoo_model:other", "--measure"]) == 1
    assert main(["check", path, "zoo_model:loss", "--measure", "--target", "h100"]) == 2
    assert "the plan is for cpu" in capsys.readouterr().err


def test_diff_says_what_moved(capsys, tmp_path):
    paths = [str(tmp_path / f"{name}.json") for name in ("a", "b", "c")]
    small = ["--args", "zoo_model:small_args"]
    for path, budget, extra in zip(paths, ("85%", "70%", "100%"), ([], [], small), strict=True):
        assert main(["plan", "zoo_model:loss", "--budget", budget, "-o", path, *extra]) == 0
    capsys.readouterr()
    assert main(["diff", paths[0], paths[0]]) == 0
    assert capsys.readouterr().out == "the plans are alike\n"
    assert main(["diff", *paths[:2]]) == 0
    out = capsys.readouterr().out
    assert (
        "predicted peak bytes: " in out and "blocks:\n  equations " in out and " -> " in out and "zoo_model.py" in out
    )
    assert main(["diff", *paths[:2], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    plans = [jaxckpt.Plan.load(path) for path in paths]
    numbers = {change["name"]: (change["old"], change["new"]) for change in found["numbers"]}
    assert numbers["predicted_peak_bytes"] == (plans[0].predicted_peak_bytes, plans[1].predicted_peak_bytes)
    moved = sum(change["new"] - change["old"] for change in found["saved"])
    assert moved == sum(g.size_bytes for g in plans[1].saved) - sum(g.size_bytes for g in plans[0].saved)
    assert main(["diff", paths[0], paths[2]]) == 0
    assert "of different programs" in capsys.readouterr().out
    assert main(["diff", paths[0], "zoo_model.py"]) == 2
    assert main(["diff", paths[0], "nowhere.json"]) == 2


def test_the_version(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0 and capsys.readouterr().out == f"jaxckpt {jaxckpt.__version__}\n"
