"""What the documentation promises: its code runs, and the files that it sends people to are there."""

import re
from pathlib import Path

import jax
import pytest

from jaxckpt.kinds import base
from jaxckpt.targets import chip, registry

ROOT = Path(__file__).parents[1]
_EXTENDING = re.findall(r"^## (.*?)\n|^```python\n(.*?)^```", (ROOT / "docs/extending.md").read_text(), re.M | re.S)


def _blocks():
    found, heading = [], ""
    for title, code in _EXTENDING:
        heading = title or heading
        if code:
            found.append(pytest.param(code, id=re.sub(r"\W+", " ", heading).strip()))
    return found


@pytest.mark.parametrize("code", _blocks())
def test_code_that_extends_jaxckpt_runs_as_it_is(code, monkeypatch, capsys):
    monkeypatch.setattr(base, "_REGISTERED", [])
    monkeypatch.setattr(chip, "_DEFINED", {})
    monkeypatch.setattr(registry, "_REGISTERED", {})
    # As users have it, not as tests do.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, "docs/extending.md", "exec"), {"__name__": "extending"})
    shown = capsys.readouterr().out
    assert "Plan for" in shown, "a plan that recomputes, and not one that changes nothing"
    if said := re.search(r"^print\(.*# (\d+): ", code, re.M):
        assert shown.splitlines()[-1] == said[1]


_ADDING = (ROOT / "CONTRIBUTING.md").read_text().partition("## How do I add ...\n")[2].partition("\n## ")[0]
_ANSWERS = {re.match(r"[^*,.]*", text)[0]: text for text in _ADDING.split("\n**")[1:]}


def _paths(text):
    """The files that a text names in backticks, new ones among them; a user's own is none of the repository."""
    return set(re.findall(r"`([\w.]+/[\w./]+|[\w/]+\.(?:py|md|toml))`", text)) - {chip.FILE}


@pytest.mark.parametrize("answer", _ANSWERS)
def test_an_answer_to_how_do_i_add_names_files_that_exist_and_three_to_write_in(answer):
    text = _ANSWERS[answer]
    steps = re.findall(r"^\d\. .*?(?=^\d\. |^\S|\Z)", text, re.M | re.S)
    assert 1 <= len(steps) <= 3 and all(len(_paths(step)) == 1 for step in steps)
    assert _paths(text) == set().union(*map(_paths, steps)), "a file beside the three"
    for path in _paths(text):
        found = ROOT / path
        assert found.parent.is_dir() if found.stem == "NAME" else found.is_file(), path


def test_the_pages_are_read():
    assert len(_blocks()) >= 4
    assert {"A chip", "A platform", "A solver", "A kind of block", "A place of memory"} <= set(_ANSWERS)
