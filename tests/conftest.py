"""Pico models for every test: each path of the pipeline on networks of a few thousand weights.

Fixtures named `…_inputs` are made once and read only; `own_…` are copies that a test may damage. What a test does not
ask for is not imported: a test of tensors alone begins at once.
"""

import os
import shutil
from pathlib import Path

import pytest

from common.config import Config

# Pico products are so small that threads wait longer than they work; commands that tests start inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch) -> None:
    """A warning is said once in a process; to a test, whatever others have heard."""
    monkeypatch.setattr("common.core.notices._said", set())


@pytest.fixture(scope="session")
def pico_inputs(tmp_path_factory) -> Path:
    """CLIP checkpoints under clip/, images under data/."""
    from pico_vision import write_pico_clip, write_pico_images

    root = tmp_path_factory.mktemp("pico")
    write_pico_clip(root / "clip")
    write_pico_images(root / "data")
    return root


@pytest.fixture
def pico_config(pico_inputs, tmp_path) -> Config:
    """A complete vision experiment that ends in seconds, writing under tmp_path."""
    from pico_vision import pico_config

    return pico_config(pico_inputs, tmp_path)


@pytest.fixture
def seeds(pico_config) -> Config:
    """A grid of two starts and two seeds."""
    from helpers import change

    return change(pico_config, "compare", starts=["ta", "dare_ta"], inits=["weight"], seeds=[0, 1])


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Figures take most of a small run's time; tests of their own look at them."""
    for name in ("plot_accuracy", "plot_matching"):
        monkeypatch.setattr(f"common.evaluation.figures.{name}", lambda *_, **__: None)


@pytest.fixture(scope="session")
def nlu_inputs(tmp_path_factory) -> Path:
    """Encoders of each family under its name, texts under data/."""
    from pico_nlu import CONFIGS, PICO_TASKS, write_pico_encoders, write_pico_texts

    root = tmp_path_factory.mktemp("pico_nlu")
    for family in CONFIGS:
        write_pico_encoders(root / family, family, PICO_TASKS)
    write_pico_texts(root / "data", PICO_TASKS)
    return root


@pytest.fixture
def nlu_config(nlu_inputs, tmp_path) -> Config:
    """A complete NLU experiment on RoBERTa, writing under tmp_path."""
    from pico_nlu import pico_config

    return pico_config(nlu_inputs, tmp_path)


@pytest.fixture
def own_nlu(nlu_inputs, tmp_path) -> Config:
    """A config whose encoders and texts a test may damage."""
    from pico_nlu import pico_config

    shutil.copytree(nlu_inputs / "roberta", tmp_path / "own" / "roberta")
    shutil.copytree(nlu_inputs / "data", tmp_path / "own" / "data")
    return pico_config(tmp_path / "own", tmp_path)


@pytest.fixture(scope="session")
def nlg_inputs(tmp_path_factory) -> Path:
    """Language models of every family with experts of one token more, test sets under data/."""
    from pico_nlg import FAMILIES, write_pico_models, write_pico_tests

    root = tmp_path_factory.mktemp("pico_nlg")
    for family in FAMILIES:
        write_pico_models(root / family, family)
    write_pico_tests(root / "data")
    return root


@pytest.fixture
def nlg_config(nlg_inputs, tmp_path) -> Config:
    """An NLG experiment on Llama without scores, writing under tmp_path."""
    from helpers import change
    from pico_nlg import pico_config

    return change(pico_config(nlg_inputs, tmp_path), "run", score=False)


@pytest.fixture
def own_nlg(nlg_inputs, nlg_config, tmp_path) -> tuple[Path, Config]:
    """A copy of the pico Llamas that a test may damage, and the config that reads it."""
    from helpers import change

    shutil.copytree(nlg_inputs / "llama", tmp_path / "llama")
    return tmp_path / "llama", change(nlg_config, "model", root=str(tmp_path / "llama"))
