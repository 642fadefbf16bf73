"""Whole configurations by name, and the command line that picks one and changes it."""

import dataclasses
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

from rayloop.config import (
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    PipelineConfig,
    QuantizeConfig,
    RegistryConfig,
    ServeConfig,
    TrainConfig,
)
from rayloop.errors import ConfigError


def smoke() -> Config:
    """Scikit-learn's 8x8 digits through every stage in seconds: is everything connected?"""
    return Config(
        data=DataConfig(source="digits", val_share=0.15),
        model=ModelConfig(name="fastnet", widths=(16, 32)),
        train=TrainConfig(
            epochs=12,
            global_batch_size=64,
            norm_group_rows=32,
            learning_rate=0.01,
            augment=AugmentConfig(flip=False, translate_px=1),
        ),
        quantize=QuantizeConfig(max_accuracy_drop=0.01, min_agreement=0.98, seconds_per_point=0.05),
        # A net trained for seconds on 1,200 digits need not beat a linear model.
        registry=RegistryConfig(min_margin_over_linear=-0.02),
        pipeline=PipelineConfig(traffic_requests=300, traffic_connections=8),
    )


def laptop() -> Config:
    """Fashion-MNIST on two CPU cores in minutes."""
    return Config(
        train=TrainConfig(
            epochs=6,
            global_batch_size=128,
            optimizer="muon",
            learning_rate=0.06,
            weight_decay=0.0,
            warmup_share=0.05,
            schedule="linear",
            clip_norm=0.0,
            augment=AugmentConfig(translate_px=1),
        )
    )


def gpu() -> Config:
    """Fashion-MNIST on one GPU: a wider network, longer, with erasing."""
    return Config(
        model=ModelConfig(name="fastnet", widths=(64, 256, 256)),
        train=TrainConfig(
            epochs=30,
            global_batch_size=1024,
            num_workers=1,
            cpus_per_worker=4,
            use_gpu=True,
            precision="bf16",
            compile=True,
            worker_invariant=False,
            augment=AugmentConfig(erase_share=0.25),
        ),
    )


def cluster() -> Config:
    """Fashion-MNIST on many nodes: streamed data, eight workers, several replicas."""
    return Config(
        data=DataConfig(feed="stream"),
        model=ModelConfig(name="fastnet", widths=(32, 96, 128)),
        train=TrainConfig(global_batch_size=1024, num_workers=8, learning_rate=0.02),
        serve=ServeConfig(min_replicas=2, max_replicas=8),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "smoke": smoke,
    "laptop": laptop,
    "gpu": gpu,
    "cluster": cluster,
}


def load_preset(name: str) -> Config:
    """The configuration called `name`.

    Raises:
        ConfigError: There is no such preset.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"There is no preset {name!r}; use one of {', '.join(PRESETS)}.{hint}")
    return PRESETS[name]()


def parse_config(
    description: str | None, args: Sequence[str] | None = None, section: str = ""
) -> Config:
    """Read `PRESET [--section.field VALUE ...]` from the command line.

    Wrong input ends the process with exit code 2 and one message, as argparse does.

    Args:
        description: Text shown above the options, usually the job's docstring.
        args: The words to read; None means the process's own.
        section: The job's own section, whose fields are flags without its name too.
    """
    words = list(sys.argv[1:] if args is None else args)
    program = f"{Path(sys.argv[0]).name} PRESET"
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: {program} [--section.field VALUE ...]\n\n{(description or '').strip()}\n")
        for name, make in PRESETS.items():
            print(f"  {name:9s}{(make.__doc__ or '').splitlines()[0]}")
        print(f"\nEvery setting, with its default: {Path(sys.argv[0]).name} laptop --help")
        raise SystemExit(0 if words else 2)
    try:
        preset = load_preset(words[0])
        return tyro.cli(
            Config,
            prog=f"{Path(sys.argv[0]).name} {words[0]}",
            description=description,
            default=preset,
            args=[_in_full(word, preset, section) for word in words[1:]],
            config=(tyro.conf.OmitSubcommandPrefixes,),
        )
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def _in_full(word: str, preset: Config, section: str) -> str:
    """`--max-bytes` as `--select.max-bytes`, where the section has such a field."""
    if not section or not word.startswith("--"):
        return word
    flag = word.removeprefix("--")
    name = flag.partition("=")[0].replace("-", "_")
    kinds = {field.name: field.type for field in dataclasses.fields(getattr(preset, section))}
    is_negated = kinds.get(name.removeprefix("no_")) is bool and name.startswith("no_")
    return f"--{section}.{flag}" if name in kinds or is_negated else word
