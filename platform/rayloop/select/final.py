"""The chosen candidate -> tested, quantized against the test split, and registered.

The test split is asked about this one model. Where it refuses the model nothing else is chosen in
its place: the second choice would be one that the test split made.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rayloop.clock import Clock
from rayloop.config import Config, SelectConfig
from rayloop.errors import GateRefused
from rayloop.logs import stage_logger
from rayloop.quantize.methods import INT8_STATIC
from rayloop.quantize.result import QUANTIZE_FOLDER, QuantizeResult, load_quantize_result
from rayloop.registry.register import register
from rayloop.select.candidate import Candidate
from rayloop.select.choice import amount, limits_of
from rayloop.select.work import CANDIDATE_FOLDER, find_made
from rayloop.storage import Storage
from rayloop.train.final_test import final_test

log = stage_logger("select")

NOT_REGISTERED = {
    "test_accuracy": None, "test_accuracy_fp32": None, "floor_accuracy": None, "model": None,
    "version": None, "alias": None, "gate": None,
}  # fmt: skip
"""What the last line says where nothing was to be registered."""


def register_chosen(
    storage: Storage,
    config: Config,
    chosen: Candidate,
    features: tuple[str, ...],
    quantize: Callable[[str], QuantizeResult],
    clock: Clock,
) -> dict[str, Any]:
    """Test the chosen run, quantize it against the test split, and register it.

    Args:
        storage: The root everything lives under.
        config: All settings.
        chosen: What the comparison chose.
        features: The machine's, as `cpu_features` returns them.
        quantize: Quantizes the run of that name against the test split.
        clock: Stamps the release.

    Returns:
        The part of the job's last line that says what was registered.

    Raises:
        GateRefused: The test split's figures do not pass a gate, or the model that passes it is
            another one than was compared and breaks a limit.
    """
    log.info("testing %s on the test split", chosen.run_id)
    trained = final_test(storage, chosen.run_id, config.train)
    quantized = None
    if not config.select.remeasure:
        quantized = find_made(storage, trained, config.quantize, features, "test", QUANTIZE_FOLDER)
    quantized = quantized or quantize(chosen.run_id)
    if quantized.passed:
        refuse_broken_limits(config.select, chosen, as_registered(storage, chosen, quantized))
    try:
        registered = register(storage, replace(config, run_id=chosen.run_id), clock)
    except GateRefused as error:
        raise GateRefused(
            f"{chosen.name} was chosen on the validation split, and the test split refuses it. "
            f"{error} No other one is registered in its place, since the test split would have "
            "chosen it; name other --runs, or train longer."
        ) from None
    return {
        "test_accuracy": quantized.method(quantized.chosen).accuracy,
        "test_accuracy_fp32": trained.test_accuracy,
        "floor_accuracy": trained.floor_accuracy,
        "model": registered.release.model,
        "version": registered.release.version,
        "alias": registered.alias,
        "gate": "pass",
    }


def as_registered(storage: Storage, chosen: Candidate, quantized: QuantizeResult) -> Candidate:
    """The chosen candidate with the figures of the file that is registered.

    Nearly always that is the same file. It is another one where the gate leaves other layers in
    fp32 on the test split than on the validation split; then its own figures count.
    """
    row = quantized.method(quantized.chosen)
    compared = load_quantize_result(storage, chosen.run_id, CANDIDATE_FOLDER).method(INT8_STATIC)
    if row.sha256 == compared.sha256:
        return chosen
    log.warning(
        "on the test split the gate leaves %d layers of %s in fp32, on the validation split %d: "
        "the registered file is not the compared one",
        len(row.excluded_layers), chosen.run_id, len(compared.excluded_layers),
    )  # fmt: skip
    return replace(
        chosen,
        latency_ms_b1=row.at_batch(1).median_ms,
        images_per_second=row.at_batch(32).images_per_second,
        size_bytes=row.size_bytes,
    )


def refuse_broken_limits(config: SelectConfig, compared: Candidate, registered: Candidate) -> None:
    """Refuse a file to register that breaks a limit which the compared one met.

    Raises:
        GateRefused: Names the limit and both figures.
    """
    for limit in limits_of(config):
        if limit.aim != "accuracy" and not limit.is_met(registered):
            was, is_now = (
                amount(limit.aim, one.figure(limit.aim)) for one in (compared, registered)
            )
            raise GateRefused(
                f"{compared.name} met {limit} with {was}; the file that passes the gate on the "
                f"test split has {is_now}, since more of its layers stay in fp32. Nothing was "
                f"registered. Loosen {limit.flag} or --quantize.min_agreement, or name other "
                "--runs."
            )
