import pytest
import torch
from scipy.stats import t as student

from rsdyn.dynamics.resampling import block_of, group_of, jackknife, simulate, simulated


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


# -- what is not smooth


def test_draws_scatter_as_the_jackknife_says():
    """Their middle 95 % end where the jackknife's interval does, of each place of a curve; a sum of places too."""
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).cumsum(1)
    without = leave_out(x, lambda v: v.mean(0), 12)
    expected = jackknife(x.mean(0), without)
    drawn = simulate(lambda c: c, x.mean(0), without, n=20_000)
    torch.testing.assert_close(drawn.mean(0), x.mean(0), atol=0.01, rtol=0)
    found = simulated(x.mean(0), drawn)
    torch.testing.assert_close(found.high - found.low, expected.high - expected.low, rtol=0.04, atol=0)
    total = simulated(x.mean(0).sum(), simulate(lambda c: c.sum(-1), x.mean(0), without, n=20_000))
    summed = jackknife(x.mean(0).sum(), without.sum(1))
    torch.testing.assert_close(total.high - total.low, summed.high - summed.low, rtol=0.04, atol=0)


def test_the_value_is_never_outside_and_nan_does_not_count():
    drawn = torch.tensor([[1.0, torch.nan], [2.0, torch.nan], [torch.nan, torch.nan]])
    found = simulated(torch.tensor([5.0, 7.0]), drawn)
    assert found.high[0] == 5 and found.low[0] == pytest.approx(1.025) and found.low[1].isnan()


def test_a_count_of_jumps_is_covered_where_the_jackknife_is_too_wide():
    """The share of 400 independent means above zero, of which a third lie within their error of it."""
    generator = torch.Generator().manual_seed(3)
    mean = torch.linspace(-0.3, 0.3, 400, dtype=torch.float64)
    truth, n = float((mean > 0).double().mean()), 150
    covered, jumps, width, jack_width, values = 0, 0, 0.0, 0.0, []

    def share(m):
        return (m > 0).to(torch.float64).mean(-1)

    for _ in range(n):
        x = mean + torch.randn(100, 400, generator=generator, dtype=torch.float64)
        without = leave_out(x, lambda v: v.mean(0), 20)
        value = share(x.mean(0))
        found = simulated(value, simulate(share, x.mean(0), without, n=200))
        wide = jackknife(value, torch.stack([share(w) for w in without]))
        covered += bool(found.low <= truth <= found.high)
        jumps += bool(wide.low <= truth <= wide.high)
        width, jack_width = width + float(found.high - found.low) / n, jack_width + float(wide.high - wide.low) / n
        values.append(float(value))
    spread = 2 * 1.96 * torch.tensor(values).std()
    assert 0.9 <= covered / n <= 1 and width < 1.3 * spread
    assert jack_width > 1.7 * spread and jumps == n


# -- clusters


def test_groups_are_whole_clusters_and_evenly_filled():
    cluster = torch.tensor([7] * 5 + [1] * 3 + [9] * 2 + [4] * 2 + [7])
    assert group_of(cluster, 2).tolist() == [0] * 5 + [1] * 3 + [1] * 2 + [1] * 2 + [0]
    assert group_of(cluster, 20).unique().tolist() == [0, 1, 2, 3]
    assert group_of(torch.arange(45)).tolist() == [i % 20 for i in range(45)]


def test_blocks_follow_the_place_and_not_the_order_of_drawing():
    place = torch.tensor([50, 3, 99, 7, 20, 21])
    assert block_of(place, 3).tolist() == [2, 0, 2, 0, 1, 1]
    assert block_of(place).tolist() == [4, 0, 5, 1, 2, 3]  # fewer than twenty are a block each


def test_documents_cover_where_sequences_do_not():
    """Means of rows that share most of their variance within a document: groups of rows cover a third of the time."""
    generator = torch.Generator().manual_seed(4)
    n, covered = 300, {"documents": 0, "sequences": 0}
    for _ in range(n):
        size = torch.randint(5, 31, (24,), generator=generator)
        document = torch.arange(24).repeat_interleave(size)
        x = torch.randn(24, generator=generator, dtype=torch.float64)[document]
        x = x + torch.randn(len(document), generator=generator, dtype=torch.float64)
        for name, cluster in (("documents", document), ("sequences", torch.arange(len(document)))):
            group = group_of(cluster)
            without = torch.stack([x[group != g].mean() for g in range(int(group.max()) + 1)])
            found = jackknife(x.mean(), without)
            covered[name] += bool(found.low <= 0 <= found.high)
    assert 0.90 <= covered["documents"] / n <= 0.98
    assert covered["sequences"] / n < 0.6
