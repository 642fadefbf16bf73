"""Ghost batch norm is plain batch norm of each group, and plain batch norm in evaluation."""

import copy

import pytest
import torch
from torch import Tensor, nn

from rayloop.config import ModelConfig
from rayloop.models.classifier import ImageClassifier
from rayloop.models.norm import (
    GhostBatchNorm2d,
    NormStatistics,
    has_batch_norm,
    with_ghost_norms,
)
from rayloop.models.zoo import build_classifier

CHANNELS = 3
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def norms(group_rows: int, momentum: float = 0.3) -> tuple[GhostBatchNorm2d, nn.BatchNorm2d]:
    """A ghost norm and a plain one with the same weights and statistics, none of them trivial."""
    plain = nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=momentum)
    for values in (plain.weight, plain.bias, plain.running_mean, plain.running_var):
        assert values is not None
        nn.init.uniform_(values, 0.5, 1.5)
    ghost = GhostBatchNorm2d(CHANNELS, group_rows, eps=1e-3, momentum=momentum)
    ghost.load_state_dict(plain.state_dict())
    return ghost, plain


def images(count: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Rows of unlike mean and spread, so that it matters which of them share statistics."""
    spread = torch.rand(count, 1, 1, 1) * 3 + 0.2
    x = torch.randn(count, CHANNELS, 4, 5) * spread + spread
    return x.contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("count", "group_rows"), [(12, 4), (4, 4), (3, 8), (10, 4), (5, 1)])
def test_outputs_and_gradients_are_those_of_a_plain_norm_on_each_group(
    count: int, group_rows: int, layout: torch.memory_format
) -> None:
    ghost, plain = norms(group_rows)
    x = images(count, layout).requires_grad_()
    upstream = torch.randn(count, CHANNELS, 4, 5)
    parts = [p.detach().requires_grad_() for p in torch.split(x, group_rows)]
    expected = torch.cat([plain(part) for part in parts])
    out = ghost(x)
    torch.testing.assert_close(out, expected)
    out.backward(upstream)
    expected.backward(upstream)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.cat([part.grad for part in parts]))  # type: ignore[misc]
    torch.testing.assert_close(ghost.weight.grad, plain.weight.grad)
    torch.testing.assert_close(ghost.bias.grad, plain.bias.grad)


def test_another_row_changes_its_own_group_alone() -> None:
    ghost, _ = norms(4)
    x = images(12)
    before = ghost(x)
    x[5] += 10
    changed = (ghost(x) != before).flatten(1).any(dim=1)
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 4


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("micro_batch", [4, 8, 12, 16])
def test_running_statistics_move_once_to_the_mean_over_all_groups(
    micro_batch: int, momentum: float | None
) -> None:
    ghost, plain = norms(4, momentum)  # type: ignore[arg-type]
    before = copy.deepcopy(plain)
    statistics = NormStatistics(ghost)
    x, groups = images(14), 0  # the last group has two rows
    for part in torch.split(x, micro_batch):
        ghost(part)
        groups += statistics.groups_in(len(part))
    assert groups == 4
    torch.testing.assert_close(ghost.state_dict(), before.state_dict())  # not yet
    statistics.update_running(statistics.sums.double(), torch.tensor(groups))
    parts = [part.transpose(0, 1).flatten(1) for part in torch.split(x, 4)]
    mean = torch.stack([part.mean(dim=1) for part in parts]).mean(dim=0)
    variance = torch.stack([part.var(dim=1) for part in parts]).mean(dim=0)
    share = momentum or 0.1
    assert before.running_mean is not None and before.running_var is not None
    torch.testing.assert_close(ghost.running_mean, before.running_mean.lerp(mean, share))
    torch.testing.assert_close(ghost.running_var, before.running_var.lerp(variance, share))
    assert ghost.num_batches_tracked == 1


def test_one_group_moves_the_statistics_as_plain_batch_norm_does() -> None:
    ghost, plain = norms(8)
    statistics = NormStatistics(ghost)
    for _ in range(3):
        x = images(8)
        plain(x)
        statistics.sums.zero_()
        ghost(x)
        statistics.update_running(statistics.sums.double(), torch.tensor(1))
    torch.testing.assert_close(ghost.state_dict(), plain.state_dict())


def test_evaluation_is_that_of_plain_batch_norm_and_counts_nothing() -> None:
    ghost, plain = norms(2)
    x = images(7)
    assert torch.equal(ghost.eval()(x), plain.eval()(x))
    assert torch.equal(ghost.sums, torch.zeros(2, CHANNELS))
    assert not torch.allclose(ghost.train()(x), plain(x))


def test_weights_go_both_ways_between_a_ghost_norm_and_a_plain_one() -> None:
    ghost, plain = norms(4)
    assert list(ghost.state_dict()) == list(plain.state_dict())
    fresh, fresh_plain = GhostBatchNorm2d(CHANNELS, 4), nn.BatchNorm2d(CHANNELS)
    fresh.load_state_dict(plain.state_dict(), strict=True)
    fresh_plain.load_state_dict(ghost.state_dict(), strict=True)
    for one in (fresh, fresh_plain):
        torch.testing.assert_close(one.state_dict(), plain.state_dict(), rtol=0, atol=0)


def build(name: str) -> ImageClassifier:
    """A model whose norms' statistics are not those of the start."""
    model = build_classifier(ModelConfig(name=name, widths=(4, 8)), (32, 32, 3), 5,
                             (0.5,) * 3, (0.25,) * 3, 0)  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize(
    ("name", "mode"), [("fastnet", True), ("tiny_resnet", False), ("resnet18", False)]
)
def test_a_network_keeps_its_names_its_mode_and_its_answers(name: str, mode: bool) -> None:
    plain = build(name).train(mode)
    ghost = copy.deepcopy(plain)
    assert with_ghost_norms(ghost, 2) is ghost
    kinds = {type(module) for module in ghost.modules() if isinstance(module, nn.BatchNorm2d)}
    assert kinds == {GhostBatchNorm2d}
    assert [n for n, _ in ghost.named_modules()] == [n for n, _ in plain.named_modules()]
    assert [n for n, _ in ghost.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert list(ghost.state_dict()) == list(plain.state_dict())
    assert all(module.training == mode for module in ghost.modules())
    x = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(ghost.eval()(x), plain.eval()(x))
        assert not torch.allclose(ghost.train()(x), plain.train()(x), atol=1e-4)
    assert has_batch_norm(ghost) and has_batch_norm(plain)


def test_settings_of_a_norm_are_kept() -> None:
    plain = nn.Sequential(nn.BatchNorm2d(2, eps=0.5, momentum=0.7), nn.BatchNorm2d(2, affine=False))
    plain[0].weight.requires_grad_(False)
    ghost = with_ghost_norms(copy.deepcopy(plain), 6)
    one, other = ghost.get_submodule("0"), ghost.get_submodule("1")
    assert isinstance(one, GhostBatchNorm2d) and isinstance(other, GhostBatchNorm2d)
    assert (one.eps, one.momentum, one.group_rows, one.affine) == (0.5, 0.7, 6, True)
    assert not one.weight.requires_grad  # a frozen norm stays frozen
    assert one.bias.requires_grad
    assert not other.affine
    assert "group_rows=6" in repr(one)


def test_zero_rows_leave_plain_batch_norms() -> None:
    model = build("fastnet")
    kinds = [type(module) for module in model.modules()]
    assert with_ghost_norms(model, 0) is model
    assert [type(module) for module in model.modules()] == kinds


def test_a_bare_norm_is_replaced_and_ghosts_stay_as_they_are() -> None:
    ghost = with_ghost_norms(nn.BatchNorm2d(2), 6)
    assert type(ghost) is GhostBatchNorm2d
    assert with_ghost_norms(ghost, 3) is ghost


def test_a_norm_used_in_two_places_stays_one() -> None:
    shared = nn.BatchNorm2d(2)
    network = with_ghost_norms(nn.ModuleDict({"a": shared, "b": shared}), 4)
    assert network.get_submodule("a") is network.get_submodule("b")
    assert type(network.get_submodule("b")) is GhostBatchNorm2d


def test_statistics_of_several_norms_lie_in_one_tensor() -> None:
    network = nn.Sequential(GhostBatchNorm2d(3, 2), nn.ReLU(), GhostBatchNorm2d(3, 2))
    statistics = NormStatistics(network)
    assert statistics.sums.shape == (12,)
    network(images(4))
    assert (statistics.sums != 0).all()
    first = network.get_submodule("0")
    assert isinstance(first, GhostBatchNorm2d)
    assert torch.equal(statistics.sums[:6].view(2, 3), first.sums)
    assert [statistics.groups_in(count) for count in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 3]


def test_a_network_without_norms_has_empty_statistics() -> None:
    statistics = NormStatistics(nn.Linear(2, 2))
    assert statistics.sums.shape == (0,)
    assert statistics.groups_in(7) == 0
    statistics.update_running(torch.zeros(0, dtype=torch.float64), torch.tensor(0.0))
    assert not has_batch_norm(nn.Linear(2, 2))


def test_half_precision_images_keep_statistics_in_full_precision() -> None:
    ghost, plain = norms(4)
    x = images(8)
    out = ghost(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert ghost.sums.dtype == torch.float32
    expected = torch.cat([plain(part) for part in torch.split(x, 4)])
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)
