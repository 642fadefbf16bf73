"""Every setting of every stage: frozen dataclasses, checked when made, digested for lineage.

The text under a field is its documentation: unit, range, special values. The command line is
derived from these classes (`--train.learning_rate 0.01`), so a setting exists here or nowhere.
Nothing here reads a file, the environment or the clock.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from rayloop.errors import ConfigError

Source = Literal["fashion-mnist", "digits", "cifar10", "image-folder", "parquet"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
Feed = Literal["auto", "resident", "stream"]
RateRule = Literal["constant", "linear", "sqrt"]


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _in_range(section: str, config: object, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _check(
            low <= value <= high,
            f"{section}.{name}={value} is out of range; use a value from {low:g} to {high:g}.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where raw rows come from and how they become a dataset version."""

    source: Source = "fashion-mnist"
    """Which reader to use."""

    path: str = ""
    """Folder or file for `image-folder` and `parquet`; unused by the named datasets."""

    name: str = ""
    """Name of the dataset under RAYLOOP_HOME/datasets; empty means the source's name."""

    version: str = ""
    """Dataset version to train on; empty means the newest."""

    image_size: int = 0
    """Side in pixels to which folder and Parquet images are resized and centre-cropped; 0 keeps
    their size, and then every row must have the shape of the first good one."""

    channels: Literal[0, 1, 3] = 0
    """Colour channels that folder and Parquet images are converted to; 0 keeps the first good
    row's."""

    class_names: tuple[str, ...] = ()
    """Labels that are allowed, in index order, for `parquet`; empty means those that occur."""

    val_share: float = 0.1
    """Share (0..1) of rows that go to the validation split, decided by a hash of the content."""

    test_share: float = 0.15
    """Share (0..1) of rows for the test split where the source brings no test split of its own."""

    max_bad_share: float = 0.01
    """Share (0..1) of rows that may break the row contract before the job stops."""

    rows_per_shard: int = 50_000
    """Rows in one stored file; few and large, since small blocks cost throughput."""

    feed: Feed = "auto"
    """How batches reach a worker: `stream` through Ray Data, `resident` from arrays in the object
    store, `auto` is resident while the training split is below `resident_limit_bytes`."""

    resident_limit_bytes: int = 2_000_000_000
    """Largest training split, in bytes of pixels, that `auto` keeps resident."""

    steps_per_block: int = 32
    """Training steps in one block of the streamed feed; fewer than about 30 costs throughput."""

    prefetch_blocks: int = 4
    """Blocks the streamed feed may prepare ahead of the worker."""

    def __post_init__(self) -> None:
        _in_range("data", self, 0.0, 0.9, "val_share", "test_share")
        _in_range("data", self, 0.0, 1.0, "max_bad_share")
        _in_range("data", self, 0, 4096, "image_size")
        _in_range("data", self, 1, 1e9, "rows_per_shard")
        _in_range("data", self, 1, 4096, "steps_per_block", "prefetch_blocks")
        _check(
            self.val_share + self.test_share < 0.95,
            f"data.val_share={self.val_share} and data.test_share={self.test_share} leave less "
            "than 5% for training; lower one of them.",
        )
        _check(
            self.source not in ("image-folder", "parquet") or bool(self.path),
            f"data.source={self.source} needs data.path: the folder or file to read.",
        )
        _check(
            all(part not in self.dataset_name for part in ("/", "..", "\\")),
            f"data.name={self.name!r} must be a plain folder name without slashes.",
        )

    @property
    def dataset_name(self) -> str:
        """The dataset's name on disk."""
        return self.name or self.source


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which network to build."""

    name: str = "fastnet"
    """`linear`, `tiny_resnet`, `fastnet`, or any torchvision classification model by its name."""

    widths: tuple[int, ...] = (16, 48, 64)
    """Channels of each stage of `fastnet` and `tiny_resnet`."""

    pretrained: bool = False
    """Start a torchvision model from its published weights, where they are at hand."""

    def __post_init__(self) -> None:
        _check(bool(self.name), "model.name is empty; try model.name=fastnet.")
        _check(
            len(self.widths) > 0 and all(1 <= width <= 4096 for width in self.widths),
            f"model.widths={self.widths} must be one or more numbers from 1 to 4096.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Random changes to training images, made in batches of uint8 on the training device."""

    flip: bool = True
    """Mirror left to right: each image is flipped in every other epoch, which half decided by
    chance."""

    translate_px: int = 2
    """Largest shift in pixels each way, with reflected borders (the crop of a padded image)."""

    erase_share: float = 0.0
    """Share (0..1) of images with one random rectangle painted in one random colour."""

    color_jitter: float = 0.0
    """Largest relative change (0..1) of brightness, contrast and saturation; colour images only."""

    def __post_init__(self) -> None:
        _in_range("train.augment", self, 0, 64, "translate_px")
        _in_range("train.augment", self, 0.0, 1.0, "erase_share", "color_jitter")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How a model is trained."""

    epochs: float = 10.0
    """Passes over the training split; a fraction is allowed."""

    data_share: float = 1.0
    """Share (0..1) of the training split that is trained on, the same rows for every seed; how much
    accuracy more data buys is measured so."""

    global_batch_size: int = 256
    """Samples in one optimizer step over all workers."""

    micro_batch_size: int = 0
    """Samples a worker puts through the network at once; gradients accumulate until its part of
    the global batch is done. 0 means the whole part, halved for as long as memory is too small."""

    norm_group_rows: int = 64
    """Rows that share the statistics of a batch norm in training (ghost batch norm). A worker's
    part must be a multiple of it, so that training does not depend on the number of workers. 0 is
    plain batch norm, whose groups are whatever a worker puts through the network at once."""

    worker_invariant: bool = True
    """Change no bit of the training when the number of workers changes: each group of
    `norm_group_rows` goes through the network by itself, and gradients are added up in float64.
    Costs nothing measurable on CPUs; large batches on GPUs are faster without it."""

    num_workers: int = 2
    """Data-parallel workers."""

    min_workers: int = 0
    """Fewest workers with which the run goes on when nodes are lost; it grows back to `num_workers`
    when they return. The global batch stays the same. 0 means never fewer than `num_workers`."""

    cpus_per_worker: int = 0
    """CPU cores, and threads, of one worker; 0 divides the cores there are among the workers."""

    use_gpu: bool = False
    """Give each worker one GPU and talk over NCCL; else CPU and gloo."""

    optimizer: Literal["adamw", "sgd", "muon"] = "adamw"
    """`adamw`, `sgd` with Nesterov momentum 0.9, or `muon` for the filters of convolutions with
    AdamW for the rest at a thirtieth of the rate."""

    learning_rate: float = 0.01
    """Peak learning rate, for batches of `reference_batch_size` where a rule scales it."""

    learning_rate_rule: RateRule = "constant"
    """How the rate follows the global batch size: not at all, `linear` (Goyal et al. 2017, for SGD)
    or with the square root (Malladi et al. 2022, for AdamW)."""

    reference_batch_size: int = 256
    """Global batch size for which `learning_rate` was chosen."""

    weight_decay: float = 0.02
    """Decoupled decay of weight matrices and filters; biases and norms are exempt."""

    warmup_share: float = 0.15
    """Share (0..1) of all steps in which the rate climbs to its peak; then it falls."""

    schedule: Literal["cosine", "linear"] = "cosine"
    """The curve along which the rate falls after the warm-up."""

    final_rate_share: float = 0.0
    """Share (0..1) of the peak rate that is left at the last step."""

    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""

    label_smoothing: float = 0.1
    """Share (0..1) of the target spread evenly over the classes."""

    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, which then is the model that is
    validated and kept; 0 turns it off."""

    precision: Precision = "auto"
    """Arithmetic of the forward pass; `auto` is bf16 where the device computes it natively, else
    fp32 (bf16 without hardware support was measured 13 times slower)."""

    channels_last: bool = True
    """Keep image tensors in NHWC memory order, the faster one for convolutions."""

    compile: bool = False
    """Run the network through torch.compile; pays on GPUs."""

    seed: int = 0
    """Decides initial weights, sample order and augmentation; from 0 to 2^32 - 1."""

    checkpoint_every_epochs: float = 0.0
    """Epochs, or fractions of one, between two checkpoints; 0 writes one as often as
    `checkpoint_cost_share` allows."""

    checkpoint_cost_share: float = 0.005
    """Share (0..1) of the training time that checkpoints may cost where their interval is free."""

    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""

    eval_batch_size: int = 500
    """Samples a worker evaluates at once."""

    max_failures: int = 3
    """Worker failures the run survives by restarting from the last good checkpoint; nodes that are
    taken away with notice do not count."""

    step_timeout_s: float = 600.0
    """Longest time a worker may spend in one part of a step before it counts as hung: its stack is
    kept, and the workers that hold up the others are restarted. 0 turns the watchdog off."""

    test_flip: bool = False
    """Also test with each image and its mirror image averaged; reported apart."""

    floor_epochs: float = 2.0
    """Epochs, but at least 1000 steps, for the linear model that every gate compares with; 0 leaves
    it out."""

    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes to training images."""

    def __post_init__(self) -> None:
        _in_range("train", self, 0.001, 100_000, "epochs")
        _in_range("train", self, 1e-6, 1.0, "data_share")
        _in_range("train", self, 0.0, 100_000, "checkpoint_every_epochs", "step_timeout_s")
        _in_range("train", self, 0.0, 1000, "floor_epochs")
        _in_range("train", self, 0, 2**32 - 1, "seed")
        _in_range("train", self, 1, 1_000_000, "global_batch_size", "eval_batch_size")
        _in_range("train", self, 1, 1_000_000, "reference_batch_size")
        _in_range("train", self, 0, 1_000_000, "micro_batch_size", "norm_group_rows")
        _in_range("train", self, 1, 10_000, "num_workers", "keep_checkpoints")
        _in_range("train", self, 0, 10_000, "min_workers", "cpus_per_worker")
        _in_range("train", self, 1e-6, 0.5, "checkpoint_cost_share")
        _in_range("train", self, 0.0, 0.999999, "ema_decay")
        _in_range("train", self, 0.0, 1.0, "warmup_share", "final_rate_share")
        _in_range("train", self, 0.0, 0.99, "label_smoothing")
        _in_range("train", self, 0.0, 1e6, "weight_decay", "clip_norm", "max_failures")
        _check(
            0 < self.learning_rate <= 1000,
            f"train.learning_rate={self.learning_rate} is out of range; use a value above 0.",
        )
        _check(
            self.global_batch_size % self.num_workers == 0,
            f"train.global_batch_size={self.global_batch_size} is not a multiple of "
            f"train.num_workers={self.num_workers}; use "
            f"{_nearest_multiple(self.global_batch_size, self.num_workers)}.",
        )
        _check(
            self.micro_batch_size == 0 or self.batch_size_per_worker % self.micro_batch_size == 0,
            f"train.micro_batch_size={self.micro_batch_size} does not divide the "
            f"{self.batch_size_per_worker} samples a worker has in a step.",
        )
        _check(
            not self.worker_invariant or self.norm_group_rows > 0,
            "train.worker_invariant=True needs train.norm_group_rows above 0; plain batch norm "
            "depends on the number of workers. Add --train.no-worker-invariant.",
        )
        _check(
            not self.worker_invariant or self.micro_batch_size == 0,
            f"train.micro_batch_size={self.micro_batch_size} has no effect with "
            "train.worker_invariant=True, which takes norm_group_rows at once. Add "
            "--train.no-worker-invariant, or set --train.norm_group_rows.",
        )
        _check(
            self.min_workers <= self.num_workers,
            f"train.min_workers={self.min_workers} is above train.num_workers={self.num_workers}.",
        )

    @property
    def batch_size_per_worker(self) -> int:
        """Samples of one worker in one optimizer step."""
        return self.global_batch_size // self.num_workers


def _nearest_multiple(value: int, of: int) -> str:
    below, above = value // of * of, -(-value // of) * of
    return f"{above}" if below == 0 else f"{below} or {above}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig:
    """What a sweep searches, and how it spends its epochs."""

    space: tuple[str, ...] = (
        "train.learning_rate=log(0.002, 0.2)",
        "train.optimizer=choice(adamw, muon, sgd)",
        "train.weight_decay=log(0.001, 0.3) if train.optimizer in (adamw, sgd)",
        "train.label_smoothing=linear(0, 0.2)",
        "train.augment.translate_px=choice(0, 1, 2)",
    )
    """One dimension each: `FIELD=DOMAIN` with the domain `linear(LOW, HIGH)`, `log(LOW, HIGH)` or
    `choice(A, B, ...)`, and `if FIELD == VALUE` or `if FIELD in (A, B)` behind it where it only
    matters then. Any field that decides what is trained: model.* and train.*. A third number of a
    range is how many points a grid takes of it."""

    search: Literal["random", "grid", "tpe", "pbt"] = "tpe"
    """Where the next trial looks: `random`; `grid`, every combination; `tpe`, where earlier trials
    say it pays (tree-structured Parzen estimator, Bergstra et al. 2011); `pbt`, a population
    trained in turns, in which the worst copy the best and change them (Jaderberg et al. 2017)."""

    trials: int = 16
    """Configurations that are tried; with `pbt` the size of the population, with `grid` unused."""

    stopping: Literal["auto", "none", "asha", "median"] = "auto"
    """When a trial is stopped early: `asha`, unless it is among the best at each rung (Li et al.
    2020); `median`, when it is below the others' median (Golovin et al. 2017). `auto` is asha with
    one objective, and none with several and with pbt."""

    objectives: tuple[str, ...] = ("val_accuracy",)
    """What is to be good; the first one decides. `val_accuracy`, `val_loss`, `train_accuracy`,
    `train_loss`, and of the network itself `num_parameters`, and of the INT8 model made of it
    `latency_ms_b1` and `size_bytes`. Whether less or more is better is known."""

    grace_epochs: float = 1.0
    """Epochs every trial is given before it may be stopped."""

    reduction_factor: int = 3
    """Asha lets one of so many trials pass each rung; the last rung lies so many times before the
    end of a run, and the others so many times before one another."""

    startup_trials: int = 8
    """Trials that are drawn by chance before tpe begins to learn from them."""

    perturb_epochs: float = 2.0
    """Epochs between two turns of pbt."""

    max_failures: int = 1
    """How often a trial that fails is tried again before it is recorded as failed."""

    max_concurrent: int = 0
    """Trials that run at once; 0 is as many as there is room for."""

    trainable: Literal["auto", "function", "ddp"] = "auto"
    """How a trial is trained: `function`, in one process; `ddp`, by `train.num_workers` workers as
    the train job does it. `auto` is ddp where the cluster has room for two such trials at once
    and at least eight CPUs or several GPUs."""

    seed: int = 0
    """Decides what is drawn; the trials' own seed is `train.seed`."""

    def __post_init__(self) -> None:
        _in_range("tune", self, 1, 1_000_000, "trials")
        _in_range("tune", self, 0.001, 100_000, "grace_epochs", "perturb_epochs")
        _in_range("tune", self, 2, 100, "reduction_factor")
        _in_range("tune", self, 0, 100_000, "startup_trials", "max_failures", "max_concurrent")
        _in_range("tune", self, 0, 2**32 - 1, "seed")
        _check(
            self.search != "pbt" or self.stopping in ("auto", "none"),
            f"tune.stopping={self.stopping} and tune.search=pbt do not go together: a population "
            "drops its worst by itself. Use --tune.stopping none.",
        )
        _check(
            len(self.objectives) == 1 or self.stopping in ("auto", "none"),
            f"tune.stopping={self.stopping} looks at one objective, and there are "
            f"{len(self.objectives)}; a small and fast network would be stopped. Use "
            "--tune.stopping none.",
        )
        _check(
            len(self.objectives) == 1 or self.search != "pbt",
            f"tune.search=pbt follows one objective, and there are {len(self.objectives)}; use "
            "--tune.search tpe.",
        )
        _check(
            len(set(self.objectives)) == len(self.objectives) > 0,
            f"tune.objectives={self.objectives} must name one or more different figures.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingConfig:
    """What is varied, one thing at a time, to see what more data, parameters or rows a step buy."""

    data_shares: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    """Values of `train.data_share` to train with; none leaves this axis out."""

    data_keeps: Literal["epochs", "steps"] = "epochs"
    """What a smaller share has in common with the whole: `epochs`, the recipe as it stands, so half
    the rows have half the steps; `steps`, so that the rows alone make the difference."""

    width_factors: tuple[float, ...] = (0.5, 0.71, 1.0, 1.41)
    """Factors on `model.widths`, rounded to multiples of 8; parameters grow about with their
    square. None leaves this axis out."""

    batch_factors: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Factors on `train.global_batch_size`; none leaves this axis out."""

    seeds: int = 3
    """Runs of each point, with the seeds from `train.seed` on; their spread is what the
    uncertainty is made from, so at least 2."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("data_shares", 1e-6, 1.0),
            ("width_factors", 0.01, 100.0),
            ("batch_factors", 0.001, 1000.0),
        ):
            values = getattr(self, name)
            _check(
                all(low <= value <= high for value in values),
                f"scaling.{name}={values} must be numbers from {low:g} to {high:g}.",
            )
        _in_range("scaling", self, 2, 100, "seeds")


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeConfig:
    """How a checkpoint becomes a smaller model, and what it may lose."""

    max_accuracy_drop: float = 0.005
    """Largest loss of accuracy (0..1) against fp32 on the whole test split."""

    min_agreement: float = 0.99
    """Smallest share (0..1) of test rows on which INT8 and fp32 choose the same class."""

    calibration_rows: int = 1024
    """Training rows that set the ranges of the activations."""

    max_excluded_layers: int = 4
    """Most sensitive layers that may stay in fp32 before the gate gives up."""

    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Batch sizes at which latency and throughput are measured."""

    num_threads: int = 1
    """Threads of the engine while it is measured."""

    seconds_per_point: float = 0.3
    """Measuring time for one method at one batch size."""

    def __post_init__(self) -> None:
        _in_range("quantize", self, 0.0, 1.0, "max_accuracy_drop", "min_agreement")
        _in_range("quantize", self, 1, 1e7, "calibration_rows")
        _in_range("quantize", self, 0, 1000, "max_excluded_layers")
        _in_range("quantize", self, 1, 1024, "num_threads")
        _in_range("quantize", self, 0.01, 600, "seconds_per_point")
        _check(
            {1, 32} <= set(self.batch_sizes) and min(self.batch_sizes) > 0,
            f"quantize.batch_sizes={self.batch_sizes} must hold 1 and 32, whose figures the job "
            "prints, and only positive numbers.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RegistryConfig:
    """What a model must show before it is registered, and under which names."""

    model: str = "classifier"
    """Name of the model in the registry and in the serving protocol."""

    alias: Literal["champion", "challenger", "shadow"] = "champion"
    """Alias the new version gets; a champion that is replaced becomes `previous`."""

    min_margin_over_linear: float = 0.03
    """Accuracy (0..1) by which the model must beat the linear floor on the same test split."""

    tracking_uri: str = ""
    """MLflow server or database; empty: MLFLOW_TRACKING_URI, and else RAYLOOP_HOME/mlflow.db."""

    def __post_init__(self) -> None:
        _in_range("registry", self, -1.0, 1.0, "min_margin_over_linear")
        _check(
            self.model.replace("-", "").replace("_", "").isalnum(),
            f"registry.model={self.model!r} must be letters, digits, '-' and '_'.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectConfig:
    """Which finished run is chosen for the registry, by what its models cost and are worth."""

    max_latency_ms: float = 0.0
    """Longest median time in milliseconds for one row, on the machine that measures; 0 is no
    limit."""

    min_accuracy: float = 0.0
    """Smallest accuracy (0..1) of the quantized model on the validation split; 0 is no limit."""

    max_bytes: int = 0
    """Largest size of the model's file in bytes; 0 is no limit."""

    prefer: Literal["accuracy", "latency", "throughput", "bytes"] = "accuracy"
    """What decides among the models within the limits; what is equal within its error is a tie,
    which the cheaper model wins."""

    runs: tuple[str, ...] = ()
    """Runs to compare; empty means all finished runs on the dataset version in question."""

    sweep: str = ""
    """Compare the trials of this sweep alone."""

    register: bool = True
    """Test the chosen run, quantize it against the test split and register it, if every gate lets
    it through; else only the comparison is written."""

    remeasure: bool = False
    """Quantize and compare every run again, also those for which that was done on this machine."""

    output: str = ""
    """Name of the result under RAYLOOP_HOME/select; empty means the sweep's name, else dataset and
    version."""

    def __post_init__(self) -> None:
        _in_range("select", self, 0.0, 1e7, "max_latency_ms")
        _in_range("select", self, 0.0, 1.0, "min_accuracy")
        _in_range("select", self, 0, 1e12, "max_bytes")
        _check(
            not (self.runs and self.sweep),
            f"select.runs={' '.join(self.runs)} and select.sweep={self.sweep} exclude each other; "
            "name runs, or a sweep.",
        )
        _check(
            all(letter.isalnum() or letter in "-_." for letter in self.output)
            and not self.output.startswith("."),
            f"select.output={self.output!r} must be letters, digits, '-', '_' and '.', and begin "
            "with no '.'.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """How the registered model answers requests."""

    host: str = "127.0.0.1"
    """Address the HTTP server binds to."""

    http_port: int = 8000
    """HTTP port; 0 picks a free one."""

    grpc_port: int = 9000
    """gRPC port; 0 picks a free one, as does a port in use where `http_port` is 0."""

    haproxy: bool = True
    """Put HAProxy in front of the replicas and use Serve's throughput mode; where HAProxy cannot
    run, Serve's own proxy takes over with one warning."""

    min_replicas: int = 1
    """Fewest replicas."""

    max_replicas: int = 1
    """Most replicas."""

    cpus_per_replica: int = 1
    """CPU cores, and engine threads, of one replica."""

    engine: Literal["onnx", "torch"] = "onnx"
    """What runs the model: the released file on ONNX Runtime, or the run's weights on torch."""

    precision: Precision = "auto"
    """Number format of the torch engine; `auto` is fp32 on the CPU and bf16 on a GPU."""

    compile: bool = False
    """Let torch.compile fuse the torch engine's model; each replica starts more slowly."""

    use_gpu: bool = False
    """Give each replica a GPU; for the torch engine only."""

    max_batch_rows: int = 32
    """Most rows the engine takes at once."""

    max_batch_wait_ms: float = 2.0
    """Longest time a row waits for company while the engine is busy; a lone request on an idle
    engine does not wait."""

    max_queued_rows: int = 1024
    """Rows that may wait in one replica; beyond it a request is refused with 429."""

    max_queued_requests: int = 256
    """Requests that may wait in HAProxy for each replica, behind those it works on; beyond it a
    request is refused with 429 before a replica hears of it."""

    max_body_bytes: int = 33_554_432
    """Largest request body; beyond it 413."""

    max_rows_per_request: int = 1024
    """Most images in one request; beyond it 413."""

    default_timeout_ms: float = 10_000.0
    """Deadline of a request that names none; past it 504."""

    placement: Literal["colocated", "dedicated"] = "colocated"
    """Where versions run: all in each replica, or each in a deployment of its own, for models too
    large to share a process; that costs a hop a batch."""

    plan_poll_s: float = 0.25
    """How often a replica looks for a new traffic plan."""

    model_control: bool = True
    """Let clients load and unload versions over the repository extension; without it 403."""

    def __post_init__(self) -> None:
        _in_range("serve", self, 0, 65535, "http_port", "grpc_port")
        _in_range("serve", self, 0, 10_000, "min_replicas")
        _in_range("serve", self, 1, 1_000_000, "max_queued_requests")
        _in_range("serve", self, 1, 10_000, "max_replicas", "cpus_per_replica")
        _in_range("serve", self, 1, 65536, "max_batch_rows")
        _in_range("serve", self, 0.0, 60_000.0, "max_batch_wait_ms")
        _in_range("serve", self, 1, 1e9, "max_body_bytes", "max_rows_per_request")
        _in_range("serve", self, 1.0, 3_600_000.0, "default_timeout_ms")
        _in_range("serve", self, 0.01, 60.0, "plan_poll_s")
        _check(
            self.engine == "torch" or not (self.use_gpu or self.compile),
            "serve.use_gpu and serve.compile need serve.engine=torch.",
        )
        _check(
            self.min_replicas <= self.max_replicas,
            f"serve.min_replicas={self.min_replicas} is above "
            f"serve.max_replicas={self.max_replicas}.",
        )
        _check(
            self.max_queued_rows >= self.max_batch_rows,
            f"serve.max_queued_rows={self.max_queued_rows} is below "
            f"serve.max_batch_rows={self.max_batch_rows}: a batch could never fill.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EventsConfig:
    """What is remembered of each prediction, for monitoring, rollout and the next training set."""

    enabled: bool = True
    """Write an event for each answered image under RAYLOOP_HOME/events."""

    flush_s: float = 5.0
    """Longest time an event waits before it is in a file."""

    max_pending_rows: int = 50_000
    """Events a replica may hold that are not in a file yet; beyond it they are dropped and
    counted."""

    max_pending_bytes: int = 67_108_864
    """Bytes of images held for statistics and samples; beyond it events are dropped and counted."""

    payload_share: float = 0.0
    """Share (0..1) of the images whose pixels are kept with their event."""

    embedding_share: float = 0.0
    """Share (0..1) of the images whose embedding, the input of the last layer, is kept; it is
    computed once more beside the requests."""

    retention_days: int = 30
    """Days after which a day's events are removed; 0 keeps them for ever."""

    def __post_init__(self) -> None:
        _in_range("events", self, 0.05, 3600.0, "flush_s")
        _in_range("events", self, 1, 1e8, "max_pending_rows")
        _in_range("events", self, 1, 1e12, "max_pending_bytes")
        _in_range("events", self, 0.0, 1.0, "payload_share", "embedding_share")
        _in_range("events", self, 0, 100_000, "retention_days")


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """What batch prediction reads, and how."""

    input: str = ""
    """Folder of images, a Parquet file or folder, or `SPLIT` of a dataset as
    `dataset:NAME[/VERSION][/SPLIT]`; empty means the test split of the newest dataset version."""

    output: str = ""
    """Name of the result under RAYLOOP_HOME/predictions; empty means a name made from the model,
    its version and the input, so that the same command continues."""

    version: str = "@champion"
    """Which version predicts: `@alias` or `:number`."""

    batch_rows: int = 256
    """Images in one call of the engine."""

    rows_per_file: int = 16_384
    """Rows in one file of the result, which is also the step in which a stopped job continues."""

    num_workers: int = 0
    """Engines that run beside one another; 0 means as many as CPU cores allow."""

    def __post_init__(self) -> None:
        _in_range("batch", self, 1, 1_000_000, "batch_rows", "rows_per_file")
        _in_range("batch", self, 0, 100_000, "num_workers")


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig:
    """What the pipeline does after the model is registered."""

    serve: bool = True
    """Serve the new model and send it the test split's images."""

    traffic_requests: int = 10_000
    """Requests that are sent, one image each; the test split is gone over again when it is
    smaller."""

    traffic_connections: int = 16
    """Connections the requests are spread over."""

    report: str = "report.html"
    """Where the report is written, relative to the current folder."""

    def __post_init__(self) -> None:
        _in_range("pipeline", self, 1, 1e9, "traffic_requests")
        _in_range("pipeline", self, 1, 10_000, "traffic_connections")


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulateConfig:
    """Which machines a run is planned for, and what they cost and break."""

    workers: tuple[int, ...] = (1, 2, 4, 8, 16, 64, 256, 1000, 4000, 10_000)
    """Numbers of workers to predict, each a plan of its own."""

    calibration: str = ""
    """JSON file of what was measured, such as `benchmarks/simulator.py` writes; empty takes it from
    a run's record."""

    run: str = ""
    """Finished run whose record is the calibration; empty means the newest, and where there is none
    the measurement that comes with rayloop."""

    keeps: Literal["rows", "global_batch"] = "rows"
    """What stays as workers are added: the rows of a replica, so that the global batch grows with
    them, or the global batch."""

    rows_per_replica: int = 0
    """Rows of a replica in one step where those are kept; 0 means the calibration's."""

    global_batch_size: int = 65_536
    """Rows of a step over all workers where that is kept."""

    run_rows: float = 0.0
    """Rows to train on, all epochs together; 0 means as many as the calibrated run had."""

    workers_per_node: int = 1
    """Workers that share a node, its cores and its link to the others."""

    link_gbit_per_s: float = 25.0
    """Bandwidth of a node's link each way, in 10^9 bits a second."""

    link_latency_us: float = 50.0
    """Microseconds until an empty message has arrived at another node; tens over TCP in one data
    centre, 1 to 5 over InfiniBand."""

    failures_per_worker_day: float = 0.000474
    """Failures of one worker in a day. The default is what Llama 3's 16,384 GPUs had: 419 in 54
    days (Llama Team 2024, section 3.3.4)."""

    price_per_worker_hour: float = 1.0
    """Price of a worker for an hour, in any currency; 1 counts worker-hours."""

    spot: bool = False
    """Use workers that can be taken away, at `spot_price_share` of the price."""

    spot_price_share: float = 0.35
    """Share (0..1) of the price that a spot worker costs; clouds announce 0.1 to 0.6."""

    spot_failures_per_worker_day: float = 0.007
    """How often a spot worker is taken away in a day, beyond its failures. The default is 20% of
    them in a month, where the AWS Spot Instance Advisor's highest band begins."""

    stages: int = 1
    """Stages of a pipeline; each replica then has so many workers."""

    micro_batches: int = 8
    """Micro-batches of a replica in one step; they decide a pipeline's bubble."""

    chunks: int = 1
    """Groups of layers on each stage; above 1 the schedule is interleaved 1F1B."""

    def __post_init__(self) -> None:
        _check(
            len(self.workers) > 0 and all(1 <= count <= 1_000_000 for count in self.workers),
            f"simulate.workers={self.workers} must be one or more numbers from 1 to 1000000.",
        )
        _in_range("simulate", self, 0, 1e9, "rows_per_replica")
        _in_range("simulate", self, 1, 1e9, "global_batch_size")
        _in_range("simulate", self, 0.0, 1e15, "run_rows")
        _in_range("simulate", self, 1, 10_000, "workers_per_node", "stages")
        _in_range("simulate", self, 1, 1_000_000, "micro_batches", "chunks")
        _in_range("simulate", self, 0.001, 100_000.0, "link_gbit_per_s")
        _in_range("simulate", self, 0.0, 1e6, "link_latency_us")
        _in_range("simulate", self, 0.0, 86_400.0, "failures_per_worker_day")
        _in_range("simulate", self, 0.0, 86_400.0, "spot_failures_per_worker_day")
        _in_range("simulate", self, 0.0, 1e6, "price_per_worker_hour")
        _in_range("simulate", self, 0.0, 1.0, "spot_price_share")
        _check(
            not (self.calibration and self.run),
            f"simulate.calibration={self.calibration} and simulate.run={self.run} exclude each "
            "other; name a file, or a run.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Which Ray cluster does the work."""

    address: str = ""
    """Address of a running cluster; empty joins the cluster a submitted job runs in, else starts
    a local Ray for the length of the job."""

    num_cpus: int = 0
    """CPU cores a local Ray offers; 0 means those of the machine."""

    object_store_bytes: int = 0
    """Object store of a local Ray, at least 75 MiB; 0 leaves the choice to Ray."""

    def __post_init__(self) -> None:
        _in_range("cluster", self, 0, 100_000, "num_cpus")
        if self.object_store_bytes:
            _in_range("cluster", self, 75 * 2**20, 1e15, "object_store_bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One run: a section per stage."""

    run_id: str = ""
    """Name of the run; the same name continues it. Empty means a new name."""

    data: DataConfig = field(default_factory=DataConfig)
    """Raw rows to a dataset version and to batches."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """Batches to a checkpoint."""

    tune: TuneConfig = field(default_factory=TuneConfig)
    """Many configurations to the best one."""

    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    """What more data, parameters or larger batches would give."""

    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    """Checkpoint to a smaller model."""

    registry: RegistryConfig = field(default_factory=RegistryConfig)
    """Model and evidence to a version."""

    select: SelectConfig = field(default_factory=SelectConfig)
    """Finished runs to the one that is registered."""

    serve: ServeConfig = field(default_factory=ServeConfig)
    """Version to predictions."""

    events: EventsConfig = field(default_factory=EventsConfig)
    """Predictions to what is remembered of them."""

    batch: BatchConfig = field(default_factory=BatchConfig)
    """Version and a dataset to a table of predictions."""

    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    """The stages one after the other."""

    simulate: SimulateConfig = field(default_factory=SimulateConfig)
    """A plan to what it would do."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the work runs."""

    def __post_init__(self) -> None:
        _check(
            all(letter.isalnum() or letter in "-_." for letter in self.run_id),
            f"run_id={self.run_id!r} must be letters, digits, '-', '_' and '.'.",
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dictionaries, lists and scalars, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[no-any-return]


def digest(config: Any) -> str:
    """SHA-256 over a config's values in key order: equal settings give equal digests."""
    return digest_of(to_dict(config))


def digest_of(value: Any) -> str:
    """SHA-256 over plain values as JSON with sorted keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
