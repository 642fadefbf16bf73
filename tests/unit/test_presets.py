"""Presets and the command line: a wrong word ends with exit code 2 and a sentence."""

import pytest

from rayloop.config import Config
from rayloop.errors import ConfigError
from rayloop.presets import PRESETS, load_preset, parse_config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_named_in_the_usage(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(load_preset(name), Config)
    assert parse_config("a job", [name]) == load_preset(name)
    with pytest.raises(SystemExit):
        parse_config("a job", ["--help"])
    assert f"  {name} " in capsys.readouterr().out


def test_words_change_the_preset() -> None:
    words = ["--train.learning_rate", "0.5", "--train.augment.no-flip", "--run-id", "mine",
             "--model.widths", "3", "4", "--data.name", "pets"]  # fmt: skip
    config = parse_config("a job", ["smoke", *words])
    assert config.train.learning_rate == 0.5
    assert config.train.augment.flip is False
    assert config.run_id == "mine"
    assert config.model.widths == (3, 4)
    assert config.data.dataset_name == "pets"
    assert config.train.epochs == load_preset("smoke").train.epochs


def test_fields_of_the_jobs_own_section_are_flags_without_its_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["smoke", "--max-latency-ms", "5", "--max_bytes=1000", "--no-register",
             "--select.min-accuracy", "0.9", "--runs", "a", "b", "--run-id", "c"]  # fmt: skip
    config = parse_config("a job", words, section="select")
    assert (config.select.max_latency_ms, config.select.max_bytes) == (5.0, 1000)
    assert config.select.runs == ("a", "b") and not config.select.register
    assert config.select.min_accuracy == 0.9 and config.run_id == "c"
    with pytest.raises(SystemExit):
        parse_config("another job", words)
    assert "--max-latency-ms" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["laptpo"], "Did you mean 'laptop'?"),
        (["nothing-like-it"], "use one of smoke, laptop, gpu, cluster."),
        (["--train.epochs", "3"], "There is no preset '--train.epochs'"),
        (["laptop", "--train.epochs", "many"], "--train.epochs"),
        (["laptop", "--train.epochs", "-3"], "train.epochs=-3.0 is out of range"),
        (["laptop", "--train.seed", "-1"], "train.seed=-1 is out of range"),
        (["laptop", "--train.num_workers", "3"], "use 126 or 129"),
        (["laptop", "--train.optimizer", "adam"], "'adam'"),
        (["laptop", "--train.lr", "1"], "--train.lr"),
        (["laptop", "--data.source", "parquet"], "needs data.path"),
        (["laptop", "extra"], "extra"),
    ],
)
def test_wrong_words_end_with_exit_code_2(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config("a job", words)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert told in " ".join(printed.err.replace("│", " ").split())


def test_no_words_is_wrong_and_help_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in (([], 2), (["--help"], 0), (["-h"], 0)):
        with pytest.raises(SystemExit) as caught:
            parse_config("what the job does", words)
        assert caught.value.code == code
        assert "what the job does" in capsys.readouterr().out


def test_an_unknown_preset_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="There is no preset 'smok'.*'smoke'"):
        load_preset("smok")
