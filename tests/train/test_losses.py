"""Losses against closed forms, finite differences and each other."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tokenmill.train import losses

Two = Callable[[Tensor, Tensor], Tensor]

DENSE: dict[str, Two] = {
    "forward_kl": losses.forward_kl,
    "forward_kl, T=2": lambda q, p: losses.forward_kl(q, p, 2.0),
    "reverse_kl": losses.reverse_kl,
    "reverse_kl, T=2": lambda q, p: losses.reverse_kl(q, p, 2.0),
    "jsd": losses.jsd,
    "jsd 0.1, T=3": lambda q, p: losses.jsd(q, p, 0.1, 3.0),
    "skew_kl": losses.skew_kl,
    "skew_reverse_kl": losses.skew_reverse_kl,
}


def random_logits(seed: int, rows: int = 6, size: int = 11) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def worst(left: Tensor, right: Tensor) -> float:
    return float((left - right).detach().abs().max())


def test_two_outcomes_have_the_closed_forms() -> None:
    """Teacher 1/2, 1/2 against student 3/4, 1/4."""
    teacher, student = torch.zeros(1, 2).double(), torch.tensor([[3.0, 1.0]]).double().log()
    forward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    reverse = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    middle = (0.25 * 0.5 + 0.75 * 0.75, 0.25 * 0.5 + 0.75 * 0.25)  # beta = 1/4
    jsd = 0.25 * sum(0.5 * math.log(0.5 / m) for m in middle)
    jsd += 0.75 * sum(q * math.log(q / m) for q, m in zip((0.75, 0.25), middle, strict=True))
    skew = sum(0.5 * math.log(0.5 / (0.1 * 0.5 + 0.9 * q)) for q in (0.75, 0.25))
    assert float(losses.forward_kl(student, teacher)) == pytest.approx(forward, abs=1e-12)
    assert float(losses.reverse_kl(student, teacher)) == pytest.approx(reverse, abs=1e-12)
    assert float(losses.jsd(student, teacher, 0.25)) == pytest.approx(jsd, abs=1e-7)
    assert float(losses.skew_kl(student, teacher, 0.1)) == pytest.approx(skew, abs=1e-7)
    targets = torch.tensor([1])
    assert float(losses.cross_entropy(student, targets)) == pytest.approx(math.log(4), abs=1e-12)


@pytest.mark.parametrize("name", DENSE)
def test_a_loss_is_zero_for_equal_distributions_and_positive_otherwise(name: str) -> None:
    teacher = random_logits(1)
    assert worst(DENSE[name](teacher + 3, teacher), torch.zeros(6)) < 1e-6
    assert float(DENSE[name](random_logits(2), teacher).min()) > 1e-3
    assert DENSE[name](random_logits(2), teacher).shape == (6,)


@pytest.mark.parametrize("name", DENSE)
def test_gradients_equal_finite_differences(name: str) -> None:
    student, teacher = random_logits(3, 3, 5).requires_grad_(), random_logits(4, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(DENSE[name], (student, teacher), atol=1e-6)


def test_cross_entropy_s_gradient_equals_finite_differences() -> None:
    student, targets = random_logits(5, 4, 6).requires_grad_(), torch.tensor([0, 5, 2, 2])
    assert torch.autograd.gradcheck(lambda x: losses.cross_entropy(x, targets), (student,))


def test_a_small_beta_gives_the_forward_kl() -> None:
    student, teacher = random_logits(6), random_logits(7)
    scaled = losses.jsd(student, teacher, 1e-5) / 1e-5
    assert worst(scaled, losses.forward_kl(student, teacher)) < 1e-2
    assert worst(losses.jsd(student, teacher, 0.5), losses.jsd(teacher, student, 0.5)) < 1e-12


def test_the_square_of_the_temperature_keeps_the_size_of_the_gradient() -> None:
    """For a high temperature the gradient nears (student - teacher) / V, centred (Hinton et al. 2015)."""
    student, teacher = random_logits(8).requires_grad_(), random_logits(9)
    (gradient,) = torch.autograd.grad(losses.forward_kl(student, teacher, 1e4).sum(), student)
    centred = [x - x.mean(1, keepdim=True) for x in (student.detach(), teacher)]
    assert worst(gradient, (centred[0] - centred[1]) / 11) < 1e-3


SPARSE: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "forward": (losses.sparse_forward_kl, losses.forward_kl),
    "reverse": (losses.sparse_reverse_kl, losses.reverse_kl),
    "jsd": (losses.sparse_jsd, losses.jsd),
}


def kept(teacher: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    top = torch.log_softmax(teacher / temperature, -1).topk(k, dim=-1)
    return top.indices, top.values


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_kept_is_the_dense_loss(name: str, temperature: float) -> None:
    sparse, dense = SPARSE[name]
    student, teacher = random_logits(10, 7, 40).float().requires_grad_(), random_logits(11, 7, 40).float()
    got = sparse(student, *kept(teacher, 40, temperature), temperature=temperature)
    wanted = dense(student, teacher, temperature=temperature)
    assert worst(got, wanted) < 1e-6 * max(1.0, float(wanted.detach().max()))
    gradients = [torch.autograd.grad(each.sum(), student)[0] for each in (got, wanted)]
    assert worst(*gradients) < 1e-6


@pytest.mark.parametrize("name", SPARSE)
def test_the_rest_is_one_outcome_with_the_tail_s_mass(name: str) -> None:
    """The same as the dense loss of distributions whose tail was added up by hand."""
    sparse, dense = SPARSE[name]
    student, teacher = random_logits(12, 5, 30).float(), random_logits(13, 5, 30).float()
    tokens, logprobs = kept(teacher, 4, 1.0)

    def merged(logits: Tensor) -> Tensor:
        share = logits.double().softmax(-1)
        few = share.gather(1, tokens)
        return torch.cat((few, 1 - few.sum(1, keepdim=True)), 1).log()

    assert worst(sparse(student, tokens, logprobs), dense(merged(student), merged(teacher))) < 1e-5
    # A control: renormalised over the kept tokens it is another loss.
    renormalised = logprobs - logprobs.logsumexp(1, keepdim=True)
    assert worst(sparse(student, tokens, logprobs), sparse(student, tokens, renormalised)) > 1e-2


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_gradients_are_finite_where_one_token_has_all(name: str) -> None:
    teacher = torch.zeros(1, 50).index_fill_(1, torch.tensor([3]), 60.0)
    student = (teacher * 2).requires_grad_()
    loss = SPARSE[name][0](student, *kept(teacher, 8, 1.0))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
