"""The optimizer against PyTorch's Adam, and where Adam is slow."""

import torch
from torch import nn

from pnp_core.soap import SOAP


def descend(optimizer: torch.optim.Optimizer, module: nn.Module, num_steps: int) -> float:
    """Fit a fixed random target from fixed random data; the last loss."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, 8, 8, generator=generator)
    y = torch.randn(16, 4, 8, 8, generator=generator)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = (module(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 4, 1))


def test_what_is_not_turned_moves_as_by_adam() -> None:
    ours, theirs = network(), network()
    descend(SOAP(ours.parameters(), lr=1e-2, max_side=0), ours, 20)
    descend(torch.optim.Adam(theirs.parameters(), lr=1e-2, betas=(0.9, 0.99)), theirs, 20)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_what_has_a_gradient_in_some_steps_only_moves_as_by_adam() -> None:
    ours, theirs = ([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))] for _ in range(2))
    soap = SOAP(ours, lr=1e-2)
    adam = torch.optim.Adam(theirs, lr=1e-2, betas=(0.9, 0.99))
    for step in range(12):
        for parameters, optimizer in ((ours, soap), (theirs, adam)):
            optimizer.zero_grad(set_to_none=True)
            often, seldom = parameters
            loss = (often - 2).square().sum()
            if step % 3 == 2:
                loss = loss + (seldom - torch.arange(3)).square().sum()
            loss.backward()
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_long_sides_are_not_turned() -> None:
    module = network()
    optimizer = SOAP(module.parameters(), lr=1e-2, max_side=6)
    descend(optimizer, module, 1)
    states = [optimizer.state[p] for p in module.parameters()]
    sizes = [[len(basis) for basis in state.get("bases", [])] for state in states]
    assert sizes == [[6, 0], [], [4, 6], []]  # 6 x 27, bias, 4 x 6, bias


def test_matrices_of_one_row_or_column_are_not_turned() -> None:
    for module in (nn.Linear(1, 4), nn.Linear(4, 1)):
        optimizer = SOAP(module.parameters(), lr=1e-2)
        module(torch.ones(2, module.in_features)).sum().backward()
        optimizer.step()
        assert not any("bases" in state for state in optimizer.state.values())


def test_what_has_no_elements_is_passed_over() -> None:
    empty, other = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.ones(3, 4))
    optimizer = SOAP([empty, other], lr=1e-2)
    (other.square().sum() + empty.sum()).backward()
    optimizer.step()
    assert (other < 1).all()


def test_directions_are_found_that_are_not_the_axes() -> None:
    """A regression on features that are mixed and of very different sizes."""

    def distance(kind: type[SOAP | torch.optim.Adam]) -> float:
        generator = torch.Generator().manual_seed(0)
        mix = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
        true = torch.randn(8, 12, generator=generator)
        found = nn.Parameter(torch.zeros(8, 12))
        optimizer = kind([found], lr=3e-2)
        for step in range(400):
            optimizer.param_groups[0]["lr"] = 3e-2 * (1 - step / 400)
            drawn = torch.randn(32, 12, generator=generator) * torch.logspace(0, -1, 12)
            optimizer.zero_grad()
            ((found - true) @ mix @ drawn.T).square().mean().backward()
            optimizer.step()
        return (found - true).norm().item()

    assert distance(SOAP) < 0.5 * distance(torch.optim.Adam)


def test_it_resumes_where_it_stopped() -> None:
    through, halfway = network(), network()
    descend(SOAP(through.parameters(), lr=1e-2), through, 20)
    optimizer = SOAP(halfway.parameters(), lr=1e-2)
    descend(optimizer, halfway, 9)
    resumed = SOAP(halfway.parameters(), lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    descend(resumed, halfway, 11)
    for a, b in zip(through.parameters(), halfway.parameters(), strict=True):
        assert torch.equal(a, b)


def test_rounding_chooses_nothing() -> None:
    """Gradients of rank one leave most of both bases open."""
    once, again = network(), network()
    for module, noise in ((once, 0.0), (again, 1e-7)):
        optimizer = SOAP(module.parameters(), lr=1e-2)
        for step in range(12):
            generator = torch.Generator().manual_seed(step)
            for p in module.parameters():
                rank_one = torch.randn(len(p), 1, generator=generator) * torch.randn(
                    1, p[0].numel(), generator=generator
                )
                p.grad = rank_one.reshape(p.shape) + noise * torch.randn(p.shape)
            optimizer.step()
    for a, b in zip(once.parameters(), again.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
