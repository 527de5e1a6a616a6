"""The laboratory's mixture: densities, the tilted target, the figures, and what they then show."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch.distributions import MultivariateNormal

from guidancekit import GuidanceError
from guidancekit.lab import mixture as lab
from guidancekit.lab.mixture import Labelled, Mixture, Tilted, archipelago, measure, pipeline
from guidancekit.registry import methods

LEVELS = [(1.0, 0.0), (0.8, 0.6), (0.3, 0.7), (0.0, 1.0)]
COUNT, STEPS = 1000, 200


@pytest.fixture(scope="module")
def world():
    return archipelago()


@pytest.fixture(scope="module")
def given(world):
    return world.given(0)


@pytest.fixture(scope="module")
def targets(world, given):
    return {w: Tilted(given, world.given(), w) for w in (1.0, 3.0)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def inside(estimate, truth):
    return estimate[1] <= truth <= estimate[2]


def near(shares, weight):
    """Of several shares at once, each within 3 deviations; an interval has 1.96."""
    return all(abs(value - weight) < 3 / 1.96 * (high - value) for value, _, high in shares)


def gaussian(mean, covariance) -> Mixture:
    return Mixture.of([1.0], torch.as_tensor(mean)[None], torch.as_tensor(covariance)[None])


def components(mixture) -> list[MultivariateNormal]:
    """PyTorch's own distributions of a mixture's components."""
    covariances = mixture.axes * mixture.variances[:, None] @ mixture.axes.mT
    return [MultivariateNormal(m, c) for m, c in zip(mixture.means, covariances, strict=True)]


# --- densities ------------------------------------------------------------------------------------


def test_a_mixture_keeps_what_it_was_made_of():
    covariances = [[[0.5, 0.2], [0.2, 0.3]], [[1.0, 0.0], [0.0, 0.2]]]
    made = Mixture.of([1.0, 3.0], [[0.0, 1.0], [2.0, 0.0]], covariances)
    assert made.weights.tolist() == [0.25, 0.75]
    for each, covariance in zip(components(made), covariances, strict=True):
        torch.testing.assert_close(each.covariance_matrix, torch.tensor(covariance).double())


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_log_density_at_every_level(given, alpha, sigma):
    """Against PyTorch's Gaussians, of covariance alpha^2 C + sigma^2 I."""
    x = torch.randn(20, 2, dtype=torch.float64, generator=seeded())
    parts = [
        MultivariateNormal(
            alpha * each.mean, alpha**2 * each.covariance_matrix + sigma**2 * torch.eye(2)
        ).log_prob(x)
        for each in components(given)
    ]
    expected = (torch.stack(parts, -1) + given.weights.log()).logsumexp(-1)
    torch.testing.assert_close(given.noised(alpha, sigma).log_density(x), expected)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_the_score_is_the_gradient_of_the_log_density(world, alpha, sigma):
    noised = world.given().noised(alpha, sigma)
    x = torch.randn(20, 2, dtype=torch.float64, generator=seeded(), requires_grad=True)
    (expected,) = torch.autograd.grad(noised.log_density(x).sum(), x)
    torch.testing.assert_close(noised.score(x.detach()), expected)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS[1:])
def test_the_clean_estimate_is_the_posterior_mean(given, targets, alpha, sigma):
    """Against the integral of x0 p(x0) N(x; alpha x0, sigma^2) over a grid."""
    grid = targets[1.0].grid.flatten(0, 1)
    x = torch.randn(6, 2, dtype=torch.float64, generator=seeded())
    squares = (x[:, None] - alpha * grid).square().sum(-1)
    posterior = (given.log_density(grid) - squares / (2 * sigma**2)).softmax(-1)
    torch.testing.assert_close(given.clean(x, alpha, sigma), posterior @ grid)


def test_rows_have_weights_and_levels_of_their_own(given):
    x = torch.randn(2, 2, dtype=torch.float64, generator=seeded())
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    rows = Mixture(weights, given.means, given.variances, given.axes)
    alpha, sigma = torch.tensor([0.8, 0.3]), torch.tensor([0.6, 0.9])
    for i in range(2):
        one = Mixture(weights[i], given.means, given.variances, given.axes)
        level = float(alpha[i]), float(sigma[i])
        torch.testing.assert_close(
            rows.noised(alpha, sigma).score(x)[i], one.noised(*level).score(x[i])
        )
        torch.testing.assert_close(rows.clean(x, alpha, sigma)[i], one.clean(x[i], *level))


def test_samples_have_the_moments_of_the_mixture(given):
    count = 40_000
    x = given.sample(count, seeded())
    mean = given.weights @ given.means
    second = sum(
        w * (each.covariance_matrix + torch.outer(each.mean, each.mean))
        for w, each in zip(given.weights, components(given), strict=True)
    )
    covariance = second - torch.outer(mean, mean)
    error = 4 * (covariance.diagonal() / count).sqrt()
    assert ((x.mean(0) - mean).abs() < error).all()
    # the deviation of a product of two coordinates is at most a few times their variances
    assert ((x.T.cov() - covariance).abs() < 4 * 2 * covariance.max() / count**0.5).all()
    shares = given.shares(x).mean(0)
    assert ((shares - given.weights).abs() < 4 * 0.5 / count**0.5).all()


def test_conditions_make_up_the_whole(world):
    x = torch.randn(20, 2, dtype=torch.float64, generator=seeded())
    parts = [p * world.given(c).log_density(x).exp() for c, p in enumerate(world.prior)]
    torch.testing.assert_close(sum(parts), world.given().log_density(x).exp())
    assert len(world.given(0).means) == 4  # only its own components


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture.of([1.0], [[0.0, 0.0]], [[[1.0]]]), "found shapes"),
        (lambda: Mixture.of([], [], []), "found shapes"),
        (lambda: gaussian([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]]), "positive definite"),
        (lambda: Mixture.of([-1.0], [[0.0]], [[[1.0]]]), "must not be negative"),
        (lambda: Labelled.of([[0.0]], [[0.0]], [[[1.0]]]), "empty rows"),
        (lambda: archipelago().given(3), "expected one of 0 to 2"),
        (lambda: pipeline(archipelago(), "edm"), "expected one of vp, flow"),
        (lambda: pipeline(archipelago(), shape=(3, 1, 1)), "for 2 dimensions"),
    ],
)
def test_what_is_no_mixture(make, message):
    with pytest.raises(GuidanceError, match=message):
        make()


# --- the tilted target ----------------------------------------------------------------------------


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_the_tilted_density_integrates_to_one(targets, w):
    """On another grid than its own."""
    line = torch.arange(-7, 7, 0.0311, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    assert float(targets[w].log_density(grid).exp().sum() * 0.0311**2) == pytest.approx(1, abs=1e-6)
    assert float(targets[w].mass.sum()) == pytest.approx(1)


def test_without_tilt_it_is_the_condition(given, targets):
    x = torch.randn(20, 2, dtype=torch.float64, generator=seeded())
    torch.testing.assert_close(targets[1.0].log_density(x), given.log_density(x))


@pytest.mark.parametrize("w", [1.0, 2.5, 6.0])
def test_the_tilt_of_two_gaussians_is_a_gaussian(w):
    """Its precision is w P_c + (1 - w) P_u; its mean may lie far beyond both."""
    c = MultivariateNormal(
        torch.tensor([0.5, 0.0]).double(), torch.tensor([[0.3, 0.1], [0.1, 0.4]]).double()
    )
    u = MultivariateNormal(torch.tensor([-0.3, 0.2]).double(), torch.eye(2).double())
    precision = w * c.precision_matrix + (1 - w) * u.precision_matrix
    mean = precision.inverse() @ (
        w * c.precision_matrix @ c.mean + (1 - w) * u.precision_matrix @ u.mean
    )
    expected = MultivariateNormal(mean, precision_matrix=precision)
    tilted = Tilted(*(gaussian(p.mean, p.covariance_matrix) for p in (c, u)), w)
    x = expected.sample((50,))
    torch.testing.assert_close(tilted.log_density(x), expected.log_prob(x))


def test_a_tilt_without_finite_mass_is_refused():
    """Where p(x|c) is wider than p(x), the quotient grows without bound."""
    wide, narrow = (gaussian([0.0, 0.0], s * torch.eye(2)) for s in (1.0, 0.5))
    with pytest.raises(GuidanceError, match="no finite mass"):
        Tilted(wide, narrow, 2.5)
    with pytest.raises(GuidanceError, match="at least 1"):
        Tilted(wide, narrow, 0.5)


def test_samples_of_the_tilted_target(world, given, targets):
    """Rejection is another exact sampler: of p(x|c), keep p(c|x)^(w - 1)."""
    proposed = given.sample(40_000, seeded(1))
    log_posterior = (
        world.prior[0].log() + given.log_density(proposed) - world.given().log_density(proposed)
    )
    kept = torch.rand(len(proposed), generator=seeded(2)) < (2 * log_posterior).exp()
    expected, found = proposed[kept][:8000], targets[3.0].sample(8000, seeded(3))
    assert len(expected) == 8000
    error = 4 * expected.std(0) * (2 / 8000) ** 0.5
    assert ((expected.mean(0) - found.mean(0)).abs() < error).all()
    assert ((expected.T.cov() - found.T.cov()).abs() < 8 * expected.var(0).max() / 8000**0.5).all()
    for points in (expected[:COUNT], found[:COUNT]):
        assert inside(measure(points, given, targets_of(targets))["energy tilted"], 0)


def targets_of(targets):
    return {"truth": targets[1.0], "tilted": targets[3.0]}


def test_a_level_encloses_its_share(targets):
    points = targets[3.0].sample(8000, seeded())
    for share in (0.5, 0.9):
        density = targets[3.0].log_density(points).exp()
        found = float((density > targets[3.0].level(share)).double().mean())
        assert found == pytest.approx(share, abs=4 * 0.5 / 8000**0.5)


# --- the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", lab.MODELS)
@pytest.mark.parametrize("condition", [0, 1, None])
def test_the_network_predicts_what_training_would_converge_to(world, model, condition):
    """By autograd: eps = -sigma grad log p_t(x|c), and eps - x0 by Tweedie's formula."""
    network = pipeline(world, model).unet
    x = torch.randn(6, 2, dtype=torch.float64, generator=seeded())
    for t in (torch.tensor(10), torch.tensor(400), torch.tensor(900.0)):
        if model == "flow":
            alpha, sigma = 1 - float(t) / 1000, float(t) / 1000
        else:
            bar = float(lab.scheduler().alphas_cumprod[int(t)])
            alpha, sigma = math.sqrt(bar), math.sqrt(1 - bar)
        y = x.clone().requires_grad_()
        log_density = world.given(condition).noised(alpha, sigma).log_density(y)
        (score,) = torch.autograd.grad(log_density.sum(), y)
        expected = -sigma * score
        if model == "flow":
            expected = expected - (x + sigma**2 * score) / alpha
        out = network(x[..., None, None], t, network.embed(condition, 6))[0]
        assert out.shape == (6, 2, 1, 1)
        torch.testing.assert_close(out.flatten(1), expected, atol=1e-6, rtol=1e-5)


def test_an_embedding_in_between_is_a_noisy_label(world):
    """p(c | y) is proportional to p(c) N(y; e_c, noise^2), so the prediction mixes conditions."""
    network = pipeline(world).unet
    y = torch.tensor([0.501, 0.5, 0.499])
    at_labels = MultivariateNormal(torch.eye(3), lab.LABEL_NOISE**2 * torch.eye(3))
    posterior = (at_labels.log_prob(y) + world.prior.log()).softmax(-1)
    blend = Labelled.of(
        posterior[None] @ world.shares,
        world.components.means,
        world.components.axes * world.components.variances[:, None] @ world.components.axes.mT,
    )
    x, t = torch.randn(5, 2, 1, 1, generator=seeded()), torch.tensor(300)
    found = network(x, t, y.expand(5, 1, 3))[0]
    other = pipeline(blend).unet
    torch.testing.assert_close(found, other(x, t, other.embed(0, 5))[0], atol=1e-5, rtol=1e-4)


def test_between_timesteps_the_noise_level_is_the_schedulers(world):
    euler = EulerDiscreteScheduler.from_config(lab.scheduler().config, timestep_spacing="linspace")
    euler.set_timesteps(7)
    alpha, sigma = pipeline(world).unet.level(euler.timesteps)
    torch.testing.assert_close((sigma / alpha).float(), euler.sigmas[:-1], atol=1e-4, rtol=1e-4)


# --- the figures ----------------------------------------------------------------------------------


def test_exact_samples_have_good_figures(given, targets):
    found = measure(given.sample(COUNT, seeded()), given, targets_of(targets))
    assert found["weights"] == [0.25] * 4
    assert near(found["shares"], 0.25)
    assert found["coverage"][0] > 0.95
    assert found["modes_lost"] == [0, 0, 0]
    # exp(-9/2) where modes do not overlap, less where they do
    assert found["outliers"][1] < math.exp(-4.5) and found["outliers"][0] < 0.02
    assert inside(found["energy truth"], 0) and abs(found["energy truth"][0]) < 0.01
    assert found["w2 truth"][0] < 3 / COUNT**0.5
    assert found["energy tilted"][1] > 0.05  # they are not the tilted target's


def test_collapsed_samples_do_not(given, targets):
    one = gaussian(given.means[3], torch.diag(given.variances[3])).sample(COUNT, seeded())
    found = measure(one, given, targets_of(targets))
    assert found["modes_lost"][0] == 3
    assert found["coverage"] == pytest.approx([0.25] * 3, abs=0.02)
    assert found["energy truth"][1] > 0.5 and found["w2 truth"][1] > 0.5
    point = measure(given.means[3].expand(50, 2), given, targets_of(targets))
    assert point["outliers"] == [0, 0, 0]
    assert point["log_density"][0] > measure(one, given, {})["log_density"][2]  # too good


def test_far_samples_are_outliers(given):
    direction = torch.tensor([0.6, 0.8], dtype=torch.float64)
    single = gaussian([0.0, 0.0], [[0.25, 0.0], [0.0, 0.25]])
    points = torch.stack([direction * 0.5 * d for d in (0.0, 2.9, 3.1, 9.0)])
    found = measure(points, single, {})
    assert found["outliers"][0] == found["coverage"][0] == 0.5
    assert measure(points[3:].expand(2, 2), single, {})["modes_lost"][0] == 1


def test_distances_of_a_shift_in_closed_form(given, targets):
    """A shift by d has the sliced distance |d| / sqrt(2); far away the energy distance is
    2 |d| - 2 E|X - X'|."""
    d = torch.tensor([30.0, 40.0], dtype=torch.float64)
    found = measure(given.sample(COUNT, seeded()) + d, given, {"truth": targets[1.0]})
    assert found["w2 truth"][0] == pytest.approx(50 / math.sqrt(2), rel=2e-3)
    x, y = given.sample(4000, seeded(1)), given.sample(4000, seeded(2))
    between = float((x - y).norm(dim=1).mean())
    assert found["energy truth"][0] == pytest.approx(2 * 50 - 2 * between, rel=2e-3)


def test_the_energy_distance_is_unbiased(given, targets):
    """Of sets as small as four points it is 0 on average, were they exact samples."""
    found = [
        measure(given.sample(4, seeded(seed)), given, {"truth": targets[1.0]}, resamples=2)
        for seed in range(100)
    ]
    values = torch.tensor([each["energy truth"][0] for each in found])
    assert abs(float(values.mean())) < 3 * float(values.std()) / 100**0.5


def test_intervals_hold_the_truth_as_often_as_they_say(given, targets):
    """Known values: shares, outliers, log density, the energy distance between two densities."""
    truth, tilted = targets[1.0], targets[3.0]
    grid = truth.grid.flatten(0, 1)
    close = given.distances(grid).amin(1) <= lab.OUTLYING
    shares = (truth.mass.flatten() * close) @ given.shares(grid)
    level = float((truth.mass.flatten() * given.log_density(grid)).sum())
    points, mass = truth._cells
    apart = 2 * float(mass @ tilted.mean_distance(points))
    apart -= truth.self_distance + tilted.self_distance
    held = []
    for seed in range(60):
        found = measure(given.sample(300, seeded(seed)), given, {"tilted": tilted}, resamples=100)
        figures = [*zip(found["shares"], shares.tolist(), strict=True)]
        figures += [(found["energy tilted"], apart), (found["log_density"], level)]
        figures += [(found["outliers"], 1 - float(shares.sum()))]
        held.append([inside(*figure) for figure in figures])
    rates = torch.tensor(held).double().mean(0)
    # 95 %, and 3 deviations of 60 draws; few of 300 points are outliers, which is far from normal
    assert (rates[:-1] > 0.95 - 3 * (0.05 * 0.95 / 60) ** 0.5).all(), rates
    assert rates[-1] > 0.75


def test_the_same_points_have_the_same_figures(given, targets):
    points = given.sample(100, seeded())
    assert measure(points, given, targets_of(targets)) == measure(
        points, given, targets_of(targets)
    )


# --- what guidance does ---------------------------------------------------------------------------


@pytest.mark.parametrize("model", lab.MODELS)
def test_without_guidance_the_condition_is_sampled(world, given, targets, model):
    points, guidance, evaluations = lab.sample(pipeline(world, model), "cfg", 1.0, COUNT, STEPS)
    assert (guidance, evaluations) == ("CFG()", STEPS)  # the unconditional branch is skipped
    found = measure(points, given, {"truth": targets[1.0]})
    assert near(found["shares"], 0.25)
    assert inside(found["energy truth"], 0)
    grid, mass = targets[1.0].grid.flatten(0, 1), targets[1.0].mass.flatten()
    assert inside(found["log_density"], float(mass @ given.log_density(grid)))


@pytest.mark.parametrize("model", lab.MODELS)
def test_cfg_does_not_reach_the_tilted_target(world, given, targets, model):
    """Known theory (arXiv:2408.09000), whatever the number of steps: CFG loses modes that the
    tilted target keeps. Langevin corrections at every level, which PCG makes, come much closer:
    PCG's w means the power 2 w - 1.
    """
    pipe, found = pipeline(world, model), {}
    for method, w, steps in (("cfg", 3.0, 100), ("cfg", 3.0, 500), ("pcg", 2.0, 200)):
        points, _, _ = lab.sample(pipe, method, w, COUNT, steps)
        found[method, steps] = measure(points, given, targets_of(targets))
    coarse, fine, corrected = found.values()
    best = measure(targets[3.0].sample(COUNT, seeded()), given, targets_of(targets))
    assert inside(best["energy tilted"], 0)
    assert min(coarse["energy tilted"][1], fine["energy tilted"][1]) > 0.3
    assert corrected["energy tilted"][2] < fine["energy tilted"][1] / 4
    assert fine["coverage"][2] < best["coverage"][1]


@pytest.mark.parametrize("model", lab.MODELS)
def test_of_two_equal_gaussians_cfg_does_reach_it(model):
    """The control: where theory says that it is exact, it is, and the figures say so."""
    means, covariances = [[0.4, 0.0], [-0.4, 0.2]], 0.09 * torch.eye(2).expand(2, 2, 2)
    pair = Labelled.of(torch.eye(2), means, covariances)
    points = pipeline(pair, model)(
        0, COUNT, negative=1, guidance_scale=3.0, num_inference_steps=STEPS, generator=seeded(1)
    )
    tilted = Tilted(pair.given(0), pair.given(1), 3.0)
    found = measure(points.flatten(1), pair.given(0), {"tilted": tilted})
    assert inside(found["energy tilted"], 0)
    assert found["w2 tilted"][0] < 3 / COUNT**0.5


@pytest.mark.parametrize("model", lab.MODELS)
@pytest.mark.parametrize("method", list(methods()))
def test_every_method_runs_or_says_why_not(world, model, method):
    pipe = pipeline(world, model)
    try:
        points, _, evaluations = lab.sample(pipe, method, 3.0, 5, 6)
    except GuidanceError as error:
        assert method not in lab.METHODS or method == "fdg", error
    else:
        assert points.shape == (5, 2) and points.isfinite().all() and evaluations >= 6


def test_a_study_is_plain_records():
    found = lab.study(
        ("cfg", "fdg", "cfg(3)"), (1.0, 4.0), count=200, steps=10, seeds=(0, 5), models=("flow",)
    )
    assert json.loads(json.dumps(found)) == found
    assert len(found) == 2 * (2 * 2 + 2 + 2 + 1)
    of = {(each["method"], each["scale"], each["seed"]): each for each in found}
    assert len(of) == len(found)
    assert "3 x 3" in of["fdg", 4.0, 0]["refused"]
    assert "energy truth" in of["cfg(3)", None, 0] and "energy tilted" not in of["cfg(3)", None, 0]
    assert of["cfg", 4.0, 5]["evaluations"] == 20 and of["cfg", 4.0, 5]["guidance"] == "CFG()"
    assert of["cfg", 4.0, 0]["coverage"] != of["cfg", 4.0, 5]["coverage"]
    assert of["cfg", 4.0, 0]["coverage"][2] < of["cfg", 1.0, 0]["coverage"][1]
    for seed in (0, 5):
        assert inside(of["tilted target", 4.0, seed]["energy tilted"], 0)
        assert inside(of["p(x|c)", 4.0, seed]["energy truth"], 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(methods=("cgf",)), "there is no method"),
        (dict(count=1), "at least 2 points"),
        (dict(scales=(0.5,)), "at least 1"),
        (dict(condition=7), "expected one of 0 to 2"),
        (dict(models=("sd",)), "expected one of vp, flow"),
    ],
)
def test_a_study_refuses_what_it_cannot_do(arguments, message):
    with pytest.raises(GuidanceError, match=message):
        lab.study(**arguments)


def test_the_picture_has_a_panel_per_method_and_scale():
    figure = lab.draw(("cfg", "fdg", "apg"), (1.0, 4.0), count=50, steps=5)
    titles = [axes.get_title() for axes in figure.axes]
    assert len(titles) == 2 * 3  # exact samples, cfg, apg; fdg is named instead
    assert [title for title in titles if title][1:] == ["cfg", "apg"]
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["w = 1", "w = 4"]
    assert "fdg is left out: FDG(levels=2)" in figure.get_suptitle()
    assert figure.axes[1].get_xlabel().startswith("covers ")


def test_the_picture_needs_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(GuidanceError, match=r'pip install "guidancekit\[lab\]"'):
        lab.draw()
