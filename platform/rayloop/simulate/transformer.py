"""A language model, its division and an accelerator -> seconds of a step, without measuring it.

What is known of a large run before it is made: its operations, the bytes its layers move and the
messages it sends. One number is not, the share of the peak that matrix products reach; `calibrated`
takes it from a small run. A layer's time, for each token, is the sum of

    products   96 h^2 (1 + s / 6h) operations, without recomputing 72 h^2 (Narayanan et al. 2021,
               section 5.1)
    memory     h (10 + 24/t + 5 a s / h t) bytes of activations, written and read once in each pass:
               forward, recomputed forward, backward (Korthikanti et al. 2022, section 4)
    tensor     two all-reduces of 2 h bytes in each pass (Shoeybi et al. 2019, section 3)

and a step is micro-batches of such layers, the pipeline's bubble and messages, the sum of the
gradients. Optimizer steps, data loading and stragglers are left out; so is what a too small matrix
product loses.
"""

from dataclasses import dataclass, replace

from rayloop.simulate.network import Link, all_reduce_s, exposed_s
from rayloop.simulate.schedule import Division

HALF_BYTES = 2
"""Of a number in bf16 or fp16: activations, and gradients where nothing else is said."""
BACKWARD_SHARE = 2 / 3
"""Of a step's computation, beside which the gradients can be summed where that is done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transformer:
    """A decoder of equal layers, as GPT-3's.

    Attributes:
        layers: How many.
        hidden: Width.
        heads: Of the attention.
        sequence: Tokens of a sequence.
        vocabulary: Tokens there are.
        recomputes: Whether each layer's forward pass is done again in the backward pass.
        fused_attention: Whether the attention's scores never reach the memory.
    """

    layers: int
    hidden: int
    heads: int
    sequence: int = 2048
    vocabulary: int = 51_200
    recomputes: bool = True
    fused_attention: bool = False

    @property
    def parameters(self) -> float:
        """About 12 l h^2 + V h."""
        return 12.0 * self.layers * self.hidden**2 + self.vocabulary * self.hidden

    @property
    def passes(self) -> int:
        """Through each layer in a step."""
        return 3 if self.recomputes else 2

    def layer_flops(self) -> float:
        """Operations of one layer for one token, all passes."""
        square = 24.0 * self.hidden**2 * (1 + self.sequence / (6 * self.hidden))
        return square * (self.passes + 1)  # the backward pass counts twice

    def flops(self) -> float:
        """Operations of the whole model for one token, the logits' included."""
        return self.layers * self.layer_flops() + 6.0 * self.hidden * self.vocabulary

    def layer_bytes(self, tensor: int) -> float:
        """Bytes of activations that one layer moves for one token on each of `tensor` workers."""
        scores = 0.0 if self.fused_attention else 5 * self.heads * self.sequence / self.hidden
        return 2 * self.passes * self.hidden * (10 + 24 / tensor + scores / tensor)


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """A GPU in its node.

    Attributes:
        peak_flops: Dense operations a second of its datasheet.
        memory_bytes_per_s: Bandwidth of its memory.
        inside: To another one of its node.
        between: To another node, its own part of the node's network.
        per_node: How many a node has.
        product_share: Share (0..1) of the peak that matrix products reach.
    """

    peak_flops: float
    memory_bytes_per_s: float
    inside: Link
    between: Link
    per_node: int = 8
    product_share: float = 1.0


A100 = Accelerator(
    peak_flops=312e12,
    memory_bytes_per_s=2.0e12,
    inside=Link(latency_s=5e-6, bytes_per_s=300e9),
    between=Link(latency_s=5e-6, bytes_per_s=25e9),
)
"""A100 SXM 80 GB in a DGX or HGX node: NVLink 3, one 200 Gbit/s port each (NVIDIA's datasheet)."""
H100 = Accelerator(
    peak_flops=989e12,
    memory_bytes_per_s=3.35e12,
    inside=Link(latency_s=5e-6, bytes_per_s=450e9),
    between=Link(latency_s=5e-6, bytes_per_s=50e9),
)
"""H100 SXM: NVLink 4, one 400 Gbit/s port each (NVIDIA's datasheet)."""


def step_s(
    model: Transformer,
    division: Division,
    batch: int,
    accelerator: Accelerator,
    hides_gradients: bool = False,
) -> float:
    """Seconds of one step.

    Args:
        model: The model.
        division: How the workers are divided; its micro-batches are those of a replica.
        batch: Sequences of a step over all workers.
        accelerator: Each worker.
        hides_gradients: Whether the gradients are summed beside the backward pass.
    """
    products_s, others_s = _parts(model, division, batch, accelerator, hides_gradients)
    return products_s / accelerator.product_share + others_s


def calibrated(
    model: Transformer,
    division: Division,
    batch: int,
    accelerator: Accelerator,
    measured_s: float,
    hides_gradients: bool = False,
) -> Accelerator:
    """The accelerator with the `product_share` that gives a measured step its seconds."""
    products_s, others_s = _parts(model, division, batch, accelerator, hides_gradients)
    return replace(accelerator, product_share=products_s / (measured_s - others_s))


def _parts(
    model: Transformer,
    division: Division,
    batch: int,
    accelerator: Accelerator,
    hides_gradients: bool,
) -> tuple[float, float]:
    """Seconds of a step: of matrix products at the peak, and of all else."""
    tensor, pipeline, chunks = division.tensor, division.pipeline, division.chunks
    tokens = batch * model.sequence / division.data
    micro_tokens = tokens / division.micro_batches
    layers = model.layers / pipeline
    filled = 1 + division.bubble
    products_s = tokens * model.flops() / (tensor * pipeline * accelerator.peak_flops) * filled
    memory_s = tokens * layers * model.layer_bytes(tensor) / accelerator.memory_bytes_per_s
    message = HALF_BYTES * model.hidden * micro_tokens
    tensor_s = (
        2 * model.passes * layers * division.micro_batches
        * all_reduce_s(message, tensor, accelerator.inside)
    )  # fmt: skip
    sends = 2 * chunks * division.micro_batches if pipeline > 1 else 0
    sent_s = message / tensor / accelerator.between.bytes_per_s + accelerator.between.latency_s
    exchange_s = _exchange_s(model, division, accelerator)
    if hides_gradients:
        beside_s = BACKWARD_SHARE * (products_s + memory_s + tensor_s)
        gradients = HALF_BYTES * model.parameters / (tensor * pipeline)
        exchange_s = exposed_s(exchange_s, beside_s / division.micro_batches, gradients)
    return products_s, (memory_s + tensor_s) * filled + sends * sent_s + exchange_s


def _exchange_s(model: Transformer, division: Division, accelerator: Accelerator) -> float:
    """Seconds in which each worker's gradients are summed over the replicas."""
    num_bytes = HALF_BYTES * model.parameters / (division.tensor * division.pipeline)
    together = min(division.data, max(1, accelerator.per_node // division.tensor))
    nodes = -(-division.data // together)
    inside_s = all_reduce_s(num_bytes, together, accelerator.inside)
    return inside_s + all_reduce_s(num_bytes / together, nodes, accelerator.between)
