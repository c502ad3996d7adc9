import torch

from rsdyn.dynamics.projection import PCA
from rsdyn.dynamics.walks import smoothed_random_walks


def test_steps_have_the_lengths_asked_for():
    common, own = torch.linspace(1, 3, 20), torch.linspace(2, 1, 20)
    walks = smoothed_random_walks(common, own, n=400, d=500, smooth=0, seed=0)
    steps = walks[:, 1:] - walks[:, :-1]
    torch.testing.assert_close(steps.mean(0).norm(dim=1), common, rtol=0.02, atol=0.1)
    spread = (steps - steps.mean(0)).square().sum(-1).mean(0).sqrt()
    torch.testing.assert_close(spread, own, rtol=0.02, atol=0)


def test_a_walk_in_many_dimensions_has_the_known_share_of_variance_in_its_first_components():
    # Antognini and Sohl-Dickstein 2018: component k of a walk in many dimensions has a share of 6 / (pi k)^2
    walks = smoothed_random_walks(torch.ones(200), torch.full((200,), 1e-3), n=2, d=4000, smooth=0, seed=1)
    ratio = PCA.fit(walks[0], 3).explained_variance_ratio
    expected = 6 / (torch.pi * torch.arange(1, 4)) ** 2
    torch.testing.assert_close(ratio, expected.to(torch.float64), rtol=0.1, atol=0)


def test_it_depends_on_the_seed_alone_and_smoothing_smooths():
    common, own = torch.ones(30), torch.ones(30)
    a, b = (smoothed_random_walks(common, own, n=5, d=64, seed=3) for _ in range(2))
    assert torch.equal(a, b)
    rough = smoothed_random_walks(common, own, n=5, d=64, smooth=0, seed=3)
    assert not torch.equal(a, smoothed_random_walks(common, own, n=5, d=64, seed=4))

    def bend(w):
        return (w[:, 2:] - 2 * w[:, 1:-1] + w[:, :-2]).norm(dim=-1).mean()

    assert bend(a) < 0.3 * bend(rough)
