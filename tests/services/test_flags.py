"""Configuration on its way through the command line."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest

from common.config import ExecutorConfig, SchedulerConfig
from services.flags import add_flags, from_flags, to_flags


@pytest.mark.parametrize(
    "config",
    [
        SchedulerConfig(),
        replace(SchedulerConfig(), token_budget=16, prefix_caching=False, insecure=True, watermark=0.5, model="a b"),
        ExecutorConfig(),
    ],
)
def test_a_child_runs_with_what_its_parent_was_told_whatever_the_environment_says(
    config: SchedulerConfig | ExecutorConfig,
) -> None:
    environment = {"PAGEWIRE_TOKEN_BUDGET": "7", "PAGEWIRE_PREFIX_CACHING": "yes", "PAGEWIRE_DEVICE": "cuda:9"}
    parser = argparse.ArgumentParser()
    add_flags(parser, type(config), environment)
    assert from_flags(type(config), parser.parse_args(to_flags(config))) == config


@pytest.mark.parametrize(
    ("typed", "environment", "told"),
    [
        (["--token-budget=0"], {}, "--token-budget: must be at least 1, got 0"),
        (["--watermark=2"], {}, "--watermark: must be at most 1, got 2"),
        (["--drain-s=nan"], {}, "--drain-s: must be at least 0, got nan"),
        (["--max-running=many"], {}, "--max-running: invalid int value: 'many'"),
        ([], {"PAGEWIRE_MAX_RUNNING": "-3"}, "--max-running: must be at least 1, got -3"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_name(
    typed: list[str], environment: dict[str, str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, SchedulerConfig, environment)
    with pytest.raises(SystemExit):
        parser.parse_args(typed)
    assert told in capsys.readouterr().err
