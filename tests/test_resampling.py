import pytest
import torch
from scipy.stats import t as student

from rsdyn.dynamics.resampling import jackknife


def leave_out(x, statistic, groups=10):
    number = torch.arange(len(x)) % groups
    return torch.stack([statistic(x[number != g]) for g in range(groups)])


def test_for_a_mean_of_single_samples_it_is_students_interval():
    x = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = jackknife(x.mean(), leave_out(x, torch.mean, 30))
    low, high = student.interval(0.95, 29, loc=x.mean(), scale=x.std() / 30**0.5)
    torch.testing.assert_close(torch.stack([found.low, found.high]), torch.tensor([low, high]))


def test_it_covers_a_correlation_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    covered, n, rho = 0, 300, 0.7
    for _ in range(n):
        x = torch.randn(200, generator=generator, dtype=torch.float64)
        y = rho * x + (1 - rho**2) ** 0.5 * torch.randn(200, generator=generator, dtype=torch.float64)
        both = torch.stack([x, y], dim=1)

        def r(v):
            return torch.corrcoef(v.T)[0, 1]

        found = jackknife(r(both), leave_out(both, r))
        covered += bool(found.low <= rho <= found.high)
    assert 0.91 <= covered / n <= 0.98  # 95 % within three binomial standard errors


def test_shapes_follow_the_statistic_and_one_group_is_too_few():
    found = jackknife(torch.zeros(3, 4), torch.randn(5, 3, 4))
    assert found.low.shape == (3, 4) and (found.low < found.high).all()
    with pytest.raises(ValueError, match="at least 2"):
        jackknife(torch.zeros(3), torch.randn(1, 3))
