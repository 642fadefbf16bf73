"""Published runs -> what the simulator says of them, beside what their papers say.

Of each paper the smallest configuration sets what nobody publishes, the share of the peak that
matrix products reach there; the others are predicted. Nothing else is fitted. What a paper leaves
open is assumed here and said so: `Run.assumed`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rayloop.simulate.calibration import Calibration
from rayloop.simulate.failures import SECONDS_A_DAY, mtbf_s
from rayloop.simulate.network import Link
from rayloop.simulate.prediction import Plan, predict
from rayloop.simulate.schedule import Division
from rayloop.simulate.transformer import A100, H100, Accelerator, Transformer, calibrated, step_s

NARAYANAN = "Narayanan et al. 2021, Efficient Large-Scale Language Model Training on GPU Clusters"
SMITH = "Smith et al. 2022, Using DeepSpeed and Megatron to Train Megatron-Turing NLG 530B"
JIANG = "Jiang et al. 2024, MegaScale: Scaling LLM Training to More Than 10,000 GPUs"
LLAMA = "Llama Team 2024, The Llama 3 Herd of Models"
SCAO = "Le Scao et al. 2022, BLOOM: A 176B-Parameter Open-Access Multilingual Language Model"
GOYAL = "Goyal et al. 2017, Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour"
KOKOLIS = "Kokolis et al. 2025, Revisiting Reliability in Large-Scale ML Research Clusters"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One published figure and its prediction.

    Attributes:
        paper: Authors, year, title.
        where: Table or section.
        run: Which run.
        unit: Of both figures.
        predicted: By the simulator.
        published: By the paper.
        calibrated_on: What set the unknown share.
        assumed: What the paper leaves open.
    """

    paper: str
    where: str
    run: str
    unit: str
    predicted: float
    published: float
    calibrated_on: str
    assumed: str = ""

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was published."""
        return self.predicted / self.published - 1


def published_runs() -> list[Run]:
    """Every prediction of a published figure, paper by paper."""
    return [
        *_megatron(), *_strong_megatron(), *_turing(), *_megascale(), *_llama(), *_bloom(),
        *_resnet(), *_failures(),
    ]  # fmt: skip


def _teraflops(
    model: Transformer, division: Division, batch: int, accelerator: Accelerator
) -> float:
    """Operations a second of one worker, in 10^12, counted as the papers on Megatron do."""
    flops = batch * model.sequence * model.flops()
    return flops / division.workers / step_s(model, division, batch, accelerator) / 1e12


def _step_of(model: Transformer, division: Division, batch: int, teraflops: float) -> float:
    return batch * model.sequence * model.flops() / division.workers / teraflops / 1e12


def _chunks(layers: int, stages: int) -> int:
    """The fewest chunks above 1 that divide a stage's layers; 1 without a pipeline."""
    each = layers // stages
    if stages == 1:
        return 1
    return next((count for count in range(2, each + 1) if each % count == 0), 1)


WEAK = (
    # billions of parameters, heads, hidden, layers, t, p, GPUs, batch, teraFLOP/s of a GPU
    (1.7, 24, 2304, 24, 1, 1, 32, 512, 137),
    (3.6, 32, 3072, 30, 2, 1, 64, 512, 138),
    (7.5, 32, 4096, 36, 4, 1, 128, 512, 142),
    (18.4, 48, 6144, 40, 8, 1, 256, 1024, 135),
    (39.1, 64, 8192, 48, 8, 2, 512, 1536, 138),
    (76.1, 80, 10_240, 60, 8, 4, 1024, 1792, 140),
    (145.6, 96, 12_288, 80, 8, 8, 1536, 2304, 148),
    (310.1, 128, 16_384, 96, 8, 16, 1920, 2160, 155),
    (529.6, 128, 20_480, 105, 8, 35, 2520, 2520, 163),
    (1008.0, 160, 25_600, 128, 8, 64, 3072, 3072, 163),
)
"""Narayanan et al. 2021, Table 1."""


def _weak(row: tuple[float, ...]) -> tuple[Transformer, Division, int, float]:
    heads, hidden, layers, tensor, pipeline, gpus, batch, teraflops = (int(x) for x in row[1:])
    model = Transformer(layers=layers, hidden=hidden, heads=heads)
    data = gpus // (tensor * pipeline)
    division = Division(
        data=data, pipeline=pipeline, tensor=tensor, micro_batches=batch // data,
        chunks=_chunks(layers, pipeline),
    )  # fmt: skip
    return model, division, batch, float(teraflops)


def _selene() -> Accelerator:
    """Selene's A100 with the share that the smallest model of Table 1 reaches."""
    model, division, batch, teraflops = _weak(WEAK[0])
    return calibrated(model, division, batch, A100, _step_of(model, division, batch, teraflops))


def _megatron() -> Iterator[Run]:
    accelerator = _selene()
    for row in WEAK[1:]:
        model, division, batch, teraflops = _weak(row)
        yield Run(
            paper=NARAYANAN, where="Table 1", run=f"{row[0]:g}B on {division.workers} A100",
            unit="teraFLOP/s a GPU", published=teraflops,
            predicted=_teraflops(model, division, batch, accelerator),
            calibrated_on="1.7B on 32 A100",
            assumed="micro-batches of 1, fewest chunks above 1",
        )  # fmt: skip


def _strong_megatron() -> Iterator[Run]:
    """The same model on more GPUs, with the same batch."""
    model = Transformer(layers=96, hidden=12_288, heads=96)
    divisions = [
        Division(data=d, pipeline=12, tensor=8, micro_batches=1536 // d) for d in (4, 8, 16)
    ]
    measured = _step_of(model, divisions[0], 1536, 153)
    accelerator = calibrated(model, divisions[0], 1536, A100, measured)
    for division, teraflops in zip(divisions[1:], (149, 141), strict=True):
        yield Run(
            paper=NARAYANAN, where="Table 2", run=f"174.6B on {division.workers} A100, batch 1536",
            unit="teraFLOP/s a GPU", published=teraflops,
            predicted=_teraflops(model, division, 1536, accelerator),
            calibrated_on="174.6B on 384 A100", assumed="96 = 8 x 12, one chunk",
        )  # fmt: skip


def _turing() -> Iterator[Run]:
    model = Transformer(layers=105, hidden=20_480, heads=128)
    accelerator, published = A100, {8: 60.1, 10: 50.2, 12: 44.4}
    for data, seconds in published.items():
        division = Division(data=data, pipeline=35, tensor=8, micro_batches=1920 // data)
        if data == 8:
            accelerator = calibrated(model, division, 1920, accelerator, seconds)
            continue
        yield Run(
            paper=SMITH, where="section 2.4", run=f"530B on {division.workers} A100, batch 1920",
            unit="s a step", published=seconds,
            predicted=step_s(model, division, 1920, accelerator),
            calibrated_on="530B on 2240 A100", assumed="one chunk",
        )  # fmt: skip


MEGASCALE = {
    ("Megatron-LM", 768): {256: 40.0, 512: 21.2, 768: 15.2, 1024: 11.9},
    ("MegaScale", 768): {256: 32.0, 512: 16.5, 768: 11.5, 1024: 8.9},
    ("Megatron-LM", 6144): {3072: 29.02, 6144: 14.78, 8192: 12.24, 12_288: 8.57},
    ("MegaScale", 6144): {3072: 23.66, 6144: 12.21, 8192: 9.56, 12_288: 6.34},
}
"""Jiang et al. 2024, Table 2: seconds of an iteration by system and batch, then GPUs."""


def _megascale() -> Iterator[Run]:
    model = Transformer(layers=96, hidden=12_288, heads=128, vocabulary=64_000, recomputes=False)
    for (system, batch), published in MEGASCALE.items():
        hides, accelerator = system == "MegaScale", A100
        first = min(published)
        for gpus, seconds in published.items():
            data = gpus // 64
            division = Division(
                data=data, pipeline=8, tensor=8, micro_batches=batch // data, chunks=6
            )
            if gpus == first:
                accelerator = calibrated(model, division, batch, A100, seconds, hides)
                continue
            yield Run(
                paper=JIANG, where="Table 2", run=f"{system} 175B on {gpus} A100, batch {batch}",
                unit="s a step", published=seconds,
                predicted=step_s(model, division, batch, accelerator, hides),
                calibrated_on=f"{system} 175B on {first} A100, batch {batch}",
                assumed="micro-batches of 1, no recomputing, a port of 200 Gbit/s each",
            )  # fmt: skip


def _llama() -> Iterator[Run]:
    model = Transformer(
        layers=126, hidden=16_384, heads=128, sequence=8192, vocabulary=128_256,
        recomputes=False, fused_attention=True,
    )  # fmt: skip
    small, large = (
        Division(data=data, pipeline=16, tensor=8, micro_batches=2048 // data, chunks=8)
        for data in (64, 128)
    )
    measured = _step_of(model, small, 2048, 430)
    accelerator = calibrated(model, small, 2048, H100, measured, hides_gradients=True)
    seconds = step_s(model, large, 2048, accelerator, hides_gradients=True)
    flops = 2048 * model.sequence * model.flops()
    yield Run(
        paper=LLAMA, where="Table 4", run="405B on 16,384 H100, batch 16M tokens",
        unit="teraFLOP/s a GPU", predicted=flops / large.workers / seconds / 1e12, published=400,
        calibrated_on="405B on 8,192 H100",
        assumed="micro-batches of 1, no recomputing, a chunk a layer, GPT-3's layers",
    )  # fmt: skip


def _bloom() -> Iterator[Run]:
    """Another group's machine, predicted with the share of Selene's."""
    model = Transformer(layers=70, hidden=14_336, heads=112, vocabulary=250_880)
    division = Division(data=8, pipeline=12, tensor=4, micro_batches=256)
    jean_zay = replace(_selene(), between=Link(latency_s=5e-6, bytes_per_s=6.25e9))
    yield Run(
        paper=SCAO, where="model card", run="176B on 384 A100, batch 2048",
        unit="teraFLOP/s a GPU", predicted=_teraflops(model, division, 2048, jean_zay),
        published=150, calibrated_on="1.7B on 32 A100 of Narayanan et al. 2021",
        assumed="micro-batches of 1, four Omni-Path ports of 100 Gbit/s a node",
    )  # fmt: skip


def _resnet() -> Iterator[Run]:
    """From one server to 32, 90 epochs: 29 hours to one; the exchange beside the backward pass."""
    images, eight_s = 90 * 1_281_167, 29 * 3600.0
    calibration = Calibration(
        name="Big Basin, 8 P100", source=GOYAL, fixed_s=0.0,
        row_s=8 * eight_s / images, rows_per_worker=32, least_rows=32, largest_rows=32,
        noise=0.0, cores=8, contention=((1, 1.0), (8, 1.0)), platform_cores=0.0,
        exchange_bytes=4 * 25.5e6,
        node_latency_s=0.0, crowded_latency_s=0.0, node_bytes_per_s=float("inf"),
        hidden_share=2 / 3, checkpoint_s=0.0, checkpoint_bytes=0.0, start_s=0.0, restart_s=0.0,
        workers=8, run_rows=images,
    )  # fmt: skip
    between = Link(latency_s=50e-6, bytes_per_s=50e9 / 8)
    plan = Plan(workers=256, rows=32, between=between, workers_per_node=8, run_rows=images)
    yield Run(
        paper=GOYAL, where="abstract; 29 hours on 8 GPUs by NVIDIA's account of it",
        run="ResNet-50 on 256 P100", unit="hours", published=1.0,
        predicted=predict(plan, calibration).run_s / 3600, calibrated_on="ResNet-50 on 8 P100",
        assumed="latency 50 us, no stragglers",
    )  # fmt: skip


def _failures() -> Iterator[Run]:
    """Failures in proportion to the workers: 8 GPUs last 47.7 days."""
    yield Run(
        paper=KOKOLIS, where="section on mean time to failure", run="jobs of 1024 A100",
        unit="hours to a failure", predicted=mtbf_s(1024, 1 / (8 * 47.7)) / 3600, published=7.9,
        calibrated_on="jobs of 8 A100, 47.7 days",
    )  # fmt: skip
    yield Run(
        paper=LLAMA, where="section 3.3.4", run="405B on 16,384 H100, 54 days",
        unit="unexpected interruptions", published=419,
        predicted=54 * SECONDS_A_DAY / mtbf_s(16_384, 1 / (1024 * 7.9 / 24)),
        calibrated_on="jobs of 1024 A100 of Kokolis et al. 2025, 7.9 hours",
        assumed="H100 fail as often as A100",
    )  # fmt: skip
