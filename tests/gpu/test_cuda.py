"""The GPU's runner on a GPU: the tokens that the CPU's runner gives, whatever their requests ask for."""

from __future__ import annotations

from concurrent.futures import wait
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from common.sampling import Grammar, SamplingParams
from executor.gpu.device import CudaDevice, HostDevice
from executor.gpu.models import open_gpu_model
from executor.guide import Guide
from executor.runner import Runner
from tests.executor.guides import save_letters
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny
from tests.gpu.story import Story
from tests.gpu.test_runner import CONTROLLED, PLAIN, Host, check_beams, plain_for, play

pytestmark = pytest.mark.gpu
GUIDED = (
    SamplingParams(temperature=0.0, grammar=Grammar("regex", "[^aeiou]*")),
    SamplingParams(temperature=1.0, seed=6, grammar=Grammar("regex", "([^xyz]{2}[A-Za-z])*"), presence_penalty=1.0),
)


def on_the_gpu(folder: Path, **settings: Any) -> Host:
    """A loaded runner as it serves, with every graph that it may capture."""
    host = Host(
        folder,
        cast("HostDevice", CudaDevice(torch.device("cuda", 0))),  # in whose shape it is, as far as this asks
        attention_backend="triton",
        open_forward=open_gpu_model,
        sample=None,
        **settings,
    )
    while host.runner.idle():
        pass
    return host


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(request.param, tmp_path_factory.mktemp(request.param))
    save_letters(folder)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> Runner:
    return plain_for(folder)


@pytest.fixture(scope="module")
def host(folder: Path) -> Host:
    return on_the_gpu(folder)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_rows_of_every_kind_have_the_tokens_of_the_other_runner(
    plain: Runner, host: Host, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_ready = Guide.is_ready

    def once_compiled(guide: Guide) -> bool:
        wait([guide.compiling])
        return is_ready(guide)

    monkeypatch.setattr(Guide, "is_ready", once_compiled)  # else the two would put off different rows
    story = Story(seed=20 + depth, samplings=[*PLAIN, *CONTROLLED, *GUIDED], lag=depth - 1, vocab_size=VOCAB_SIZE)

    assert play(story, plain, host.runner, num_steps=60, depth=depth) > 60


def test_beams_are_ranked_as_the_other_runner_ranks_them(plain: Runner, host: Host) -> None:
    check_beams(plain, host)
