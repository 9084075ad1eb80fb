import subprocess
import sys

import jax
import pytest
from ckptsolvers.revolve import num_forwards

import jaxckpt
from examples import gpt2, llama_fsdp, mlp_revolve


@pytest.mark.slow
def test_gpt2_trains_along_the_same_curve_with_a_plan():
    config = gpt2.SIZES["toy"]
    loss = gpt2.make_loss(config)
    plan = jaxckpt.plan(loss, *gpt2.specs(config, dropout=True), budget="40%")
    assert plan.measured_peak_bytes <= plan.budget_bytes < plan.unplanned_peak_bytes
    assert plan.recompute_flops > 0

    # optax raises floats to integer powers, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        # Quicker to compile, and the same buffers.
        fast = {"xla_backend_optimization_level": 1}
        runs = gpt2.train(config, {"no plan": loss, "plan": plan.apply(loss)}, 50, compiler_options=fast)

    assert gpt2.largest_difference(runs["no plan"], runs["plan"]) <= gpt2.TOLERANCE["float32"]
    assert runs["plan"].losses[-1] < 0.75 * runs["plan"].losses[0]
    # The training step itself is smaller, not only what the planner compiled.
    assert runs["plan"].whole_step_bytes < 0.6 * runs["no plan"].whole_step_bytes


def test_gpt2_small_is_the_published_size_and_needs_no_array():
    params, batch = gpt2.example_args()
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 124_439_808
    assert batch.shape == (8, 1025)
    assert jax.eval_shape(gpt2.loss, params, batch).shape == ()


def test_batches_repeat_with_the_seed():
    config = gpt2.SIZES["toy"]
    first, again, other = (next(gpt2.batches(config, seed)) for seed in (0, 0, 1))
    assert first.shape == (config.batch, config.num_tokens + 1)
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("name", ["examples/gpt2.py", "examples/llama_fsdp.py", "examples/mlp_revolve.py"])
def test_runs_as_a_file(name):
    shown = subprocess.run([sys.executable, name, "--help"], capture_output=True, text=True, check=True)
    assert "usage" in shown.stdout


def test_chain_runs_as_often_as_the_textbooks_say(capsys):
    assert mlp_revolve.main(["--layers", "12", "--budgets", "40%", "70%"]) == 0
    shown = capsys.readouterr().out
    assert "every count is the textbook's" in shown
    assert "states" in shown
    assert "segments" in shown


def test_a_wrong_count_is_seen():
    shapes = mlp_revolve.specs(6, batch=8, width=8)
    assert mlp_revolve.matmuls_of_gradient(mlp_revolve.loss, *shapes) == 6
    # Without its last layer a checkpoint runs five matmuls again; the last one's result is dead.
    assert mlp_revolve.matmuls_of_gradient(jax.checkpoint(mlp_revolve.loss), *shapes) == 6 + 5


@pytest.mark.parametrize("num_states", range(1, 10))
def test_formula_agrees_with_the_solver_package(num_states):
    assert mlp_revolve.num_advances(10, num_states) == num_forwards(10, num_states)


@pytest.mark.slow
def test_a_sharded_llama_is_fitted_in_bytes_of_each_device(capsys):
    # optax raises floats to integer powers, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        assert llama_fsdp.main(["--size", "toy", "--target", "cpu:8", "--budget", "80%"]) == 0
    shown = capsys.readouterr().out
    assert "45,344 parameters on cpu:8" in shown and "measured on each device" in shown


def test_the_llama_is_of_the_size_it_says():
    params, state, tokens = llama_fsdp.specs(llama_fsdp.SIZES["1.3b"])
    assert sum(x.size for x in jax.tree.leaves(params)) == 1_345_423_360
    assert sum(x.size for x in jax.tree.leaves(state)) == 2 * 1_345_423_360 + 1
    assert tokens.shape == (32, 2049)
