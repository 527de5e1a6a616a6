"""A laboratory on paper: Gaussian mixtures, where every density is known exactly.

`Mixture` is one at any noise level, `Labelled` one whose conditions select weighted subsets of its
components, `Tilted` the density p(x|c)^w p(x)^(1-w) that a guidance scale w is commonly said to
sample from (it does not: arXiv:2408.09000). `pipeline` makes a network of a mixture, and a
Diffusers pipeline of that, on which every method runs through the ordinary engine; `measure` holds
its samples against the truth, `study` does so for methods and scales, and `draw` shows it.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    SchedulerMixin,
)
from torch import Tensor

from ..errors import GuidanceError
from ..generate import follows_pipeline
from ..registry import parse

Level = Tensor | float
"""A factor of a noise level: one for all, or one per row [B]."""

# --- densities ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """A mixture of K Gaussians in D dimensions, float64; make it with `Mixture.of`.

    `weights` [K] or, one mixture per row, [B, K]; `means` [K, D]; `variances` [K, D] along `axes`
    [K, D, D], the orthonormal columns of each component. In these axes the noise of every level
    only adds to the variances, so that nothing is ever inverted.
    """

    weights: Tensor
    means: Tensor
    variances: Tensor
    axes: Tensor

    @classmethod
    def of(cls, weights: Any, means: Any, covariances: Any) -> Mixture:
        """From `weights` [K], which need not sum to 1, `means` [K, D], `covariances` [K, D, D]."""
        weights, means, covariances = (
            torch.as_tensor(each, dtype=torch.float64) for each in (weights, means, covariances)
        )
        sizes = [list(each.shape) for each in (weights, means, covariances)]
        count, size = (*means.shape, 0, 0)[:2]
        if sizes != [[count], [count, size], [count, size, size]] or not count:
            raise GuidanceError(
                f"Mixture.of(weights, means, covariances): found shapes {sizes}, expected [K], "
                "[K, D] and [K, D, D]."
            )
        variances, axes = torch.linalg.eigh(covariances)
        if bool((weights < 0).any()) or float(weights.sum()) <= 0 or float(variances.min()) <= 0:
            raise GuidanceError(
                "Mixture.of(...): weights must not be negative, nor all 0, and covariances must be "
                f"positive definite: found weights {weights.tolist()}, variances from "
                f"{float(variances.min()):g}."
            )
        return cls(weights / weights.sum(), means, variances, axes)

    def noised(self, alpha: Level, sigma: Level) -> Mixture:
        """The distribution of alpha x0 + sigma eps, which is a mixture again."""
        alpha, sigma = (
            torch.as_tensor(each, dtype=torch.float64)[..., None, None] for each in (alpha, sigma)
        )
        variances = alpha**2 * self.variances + sigma**2
        return replace(self, means=alpha * self.means, variances=variances)

    def log_components(self, x: Tensor) -> Tensor:
        """log weight_k + log N_k(x) of points [..., D], shape [..., K]."""
        squares = self._inside(x).square() / self.variances
        log_normal = -0.5 * (squares + (2 * math.pi * self.variances).log()).sum(-1)
        return log_normal + self.weights.log()

    def log_density(self, x: Tensor) -> Tensor:
        """log p(x) of points [..., D], shape [...]."""
        return self.log_components(x).logsumexp(-1)

    def shares(self, x: Tensor) -> Tensor:
        """How far each component accounts for points [..., D]: posteriors [..., K]."""
        return self.log_components(x).softmax(-1)

    def score(self, x: Tensor) -> Tensor:
        """The gradient of log p at points [..., D]."""
        return self._outside(self.shares(x), -self._inside(x) / self.variances)

    def clean(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """E[x0 | x] of points [..., D] that are alpha x0 + sigma eps; also where alpha is 0."""
        noised = self.noised(alpha, sigma)
        gain = torch.as_tensor(alpha)[..., None, None] * self.variances / noised.variances
        shares = noised.shares(x)
        return shares @ self.means + self._outside(shares, gain * noised._inside(x))

    def distances(self, x: Tensor) -> Tensor:
        """Standard deviations from points [..., D] to each component, [..., K] (Mahalanobis)."""
        return (self._inside(x).square() / self.variances).sum(-1).sqrt()

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Independent points [count, D]."""
        picked = self.weights.multinomial(count, replacement=True, generator=generator)
        noise = torch.randn(
            count, self.means.shape[-1], dtype=torch.float64, generator=generator
        ).mul_(self.variances[picked].sqrt())
        return self.means[picked] + torch.einsum("nd,ned->ne", noise, self.axes[picked])

    def _inside(self, x: Tensor) -> Tensor:
        """Points [..., D] in the axes of each component, [..., K, D]."""
        means = torch.einsum("...kd,kde->...ke", self.means, self.axes)
        return (x @ self._flat).unflatten(-1, means.shape[-2:]) - means

    def _outside(self, shares: Tensor, inside: Tensor) -> Tensor:
        """The sum over components of vectors in their axes, [..., D]."""
        return (shares[..., None] * inside).flatten(-2) @ self._flat.T

    @property
    def _flat(self) -> Tensor:
        """All axes as columns, [D, K D]: one product with them is faster than K."""
        return self.axes.transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class Labelled:
    """A mixture whose conditions select weighted subsets of its components.

    `shares` [C, K] are the components' weights under each condition, `prior` [C] the conditions'
    own, so that p(x) = sum_c p(c) p(x|c); the weights of `components` do not count. Components may
    belong to several conditions.
    """

    components: Mixture
    shares: Tensor
    prior: Tensor

    @classmethod
    def of(cls, shares: Any, means: Any, covariances: Any, prior: Any = None) -> Labelled:
        """As `Mixture.of`; rows of `shares` [C, K] need not sum to 1, `prior` None is uniform."""
        shares = torch.as_tensor(shares, dtype=torch.float64)
        prior = torch.ones(len(shares)) if prior is None else torch.as_tensor(prior)
        if shares.ndim != 2 or prior.shape != shares.shape[:1] or bool((shares.sum(1) <= 0).any()):
            raise GuidanceError(
                f"Labelled.of(...): found shares {list(shares.shape)} and prior "
                f"{list(prior.shape)}, expected [C, K] without empty rows, and [C]."
            )
        shares, prior = shares / shares.sum(1, keepdim=True), prior.double() / prior.sum()
        return cls(Mixture.of(prior @ shares, means, covariances), shares, prior)

    def given(self, condition: int | None = None) -> Mixture:
        """p(x|c), of its own components only, or p(x)."""
        if condition is None:
            return self.components
        check_condition(condition, len(self.prior))
        own, every = self.shares[condition], self.components
        kept = own > 0
        return Mixture(own[kept], every.means[kept], every.variances[kept], every.axes[kept])


def check_condition(condition: int, count: int) -> None:
    """Raise `GuidanceError` for a condition that does not exist."""
    if not 0 <= condition < count:
        raise GuidanceError(f"found condition {condition}, expected one of 0 to {count - 1}.")


_ISLANDS = (  # x, y, deviations along and across, turn; weights under the three conditions
    ((0.35, -0.35, 0.24, 0.20, 0.0), (0.25, 0.25, 0.25)),  # belongs to all of them
    ((0.05, 1.15, 0.24, 0.16, 1.2), (0.25, 0.0, 0.0)),  # its neighbour is another condition's
    ((-1.00, -0.55, 0.26, 0.18, -0.5), (0.25, 0.0, 0.0)),  # likewise, a little further off
    ((-1.35, 1.05, 0.30, 0.18, 0.6), (0.25, 0.0, 0.0)),  # on its own
    ((0.60, 1.25, 0.24, 0.16, 1.2), (0.0, 0.35, 0.0)),
    ((1.55, 0.40, 0.28, 0.20, 0.9), (0.0, 0.40, 0.0)),
    ((-1.35, -1.15, 0.28, 0.18, -0.5), (0.0, 0.0, 0.35)),
    ((0.55, -1.45, 0.28, 0.20, 0.3), (0.0, 0.0, 0.40)),
)


def archipelago() -> Labelled:
    """Three conditions of about unit variance in the plane; condition 0 has four equal modes.

    One of them it shares with all conditions, two lie beside a mode of another one, one is on its
    own: guidance away from the others costs it the first, and then the next.
    """
    means, covariances = [], []
    for (x, y, along, across, turn), _ in _ISLANDS:
        cos, sin = math.cos(turn), math.sin(turn)
        axes = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
        covariances.append(axes * torch.tensor([along**2, across**2]) @ axes.T)
        means.append((x, y))
    shares = torch.tensor([weights for _, weights in _ISLANDS]).T
    return Labelled.of(shares, means, torch.stack(covariances))


class Tilted:
    """The density p(x|c)^w p(x)^(1-w) / Z in two dimensions, Z by quadrature.

    At w = 1 it is p(x|c) itself. Since p(x) >= p(c) p(x|c) it is finite for every w >= 1; of two
    mixtures that have nothing to do with each other it need not be: then this raises
    `GuidanceError`. The grid has `cells`^2 cells; on its border the density is negligible.
    """

    def __init__(self, given: Mixture, whole: Mixture, w: float, cells: int = 256) -> None:
        if given.means.shape[-1] != 2:
            raise GuidanceError(f"Tilted: found {given.means.shape[-1]} dimensions, expected 2.")
        if w < 1:
            raise GuidanceError(f"Tilted: found a scale of {w:g}, expected at least 1.")
        self.given, self.whole, self.w = given, whole, float(w)
        self.log_z = 0.0
        reach = 8 * float(given.variances.max()) ** 0.5
        low, high = given.means.amin(0) - reach, given.means.amax(0) + reach
        for _ in range(6):
            cell = (high - low) / cells
            self.x, self.y = (
                low[i] + cell[i] * (torch.arange(cells, dtype=torch.float64) + 0.5) for i in (0, 1)
            )
            log_mass = self.log_density(self.grid) + cell.log().sum()
            border = torch.cat([log_mass[:, [0, -1]].flatten(), log_mass[[0, -1]].flatten()])
            if float(border.max() - log_mass.max()) < math.log(1e-12):
                break
            low, high = low - (high - low) / 2, high + (high - low) / 2
        else:
            raise GuidanceError(
                f"p(x|c)^{w:g} p(x)^{1 - w:g} has no finite mass, or lies far from both: it does "
                "not fall off towards infinity. Use a smaller scale w, or a p(x) that contains "
                "p(x|c)."
            )
        self.cell = cell
        self.log_z = float(log_mass.logsumexp((0, 1)))
        self.mass = (log_mass - self.log_z).exp()
        """Of every cell, [cells, cells]; the first dimension is x."""

    @property
    def grid(self) -> Tensor:
        """The middles of the cells, [cells, cells, 2]."""
        return torch.stack(torch.meshgrid(self.x, self.y, indexing="ij"), dim=-1)

    def log_density(self, x: Tensor) -> Tensor:
        """log of the normalised density at points [..., 2]."""
        tilted = self.w * self.given.log_density(x) + (1 - self.w) * self.whole.log_density(x)
        return tilted - self.log_z

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Independent points [count, 2], exact up to the density's change within a cell."""
        cells = self.mass.flatten().multinomial(count, replacement=True, generator=generator)
        inside = torch.rand(count, 2, dtype=torch.float64, generator=generator) - 0.5
        return self.grid.flatten(0, 1)[cells] + inside * self.cell

    def level(self, share: float) -> float:
        """The density whose contour encloses this share of the mass."""
        mass = self.mass.flatten().sort(descending=True).values
        last = int((mass.cumsum(0) < share).sum())
        return float(mass[last] / self.cell.prod())

    # what distances to this density are made of: integrals over the cells, no random draws

    @cached_property
    def _cells(self) -> tuple[Tensor, Tensor]:
        """The cells that hold all but a 1e-6th of the mass: middles [n, 2] and masses [n]."""
        mass, order = self.mass.flatten().sort(descending=True)
        count = int((mass.cumsum(0) < 1 - 1e-6).sum()) + 1
        mass, order = mass[:count], order[:count]
        return self.grid.flatten(0, 1)[order], mass / mass.sum()

    def mean_distance(self, x: Tensor) -> Tensor:
        """E |x - Y| over this density, of points [n, 2], shape [n]."""
        points, mass = self._cells
        return torch.cat([torch.cdist(part, points) @ mass for part in x.split(512)])

    @cached_property
    def self_distance(self) -> float:
        """E |Y - Y'| over this density."""
        points, mass = self._cells
        return float(self.mean_distance(points) @ mass)

    def quantiles(self, direction: Tensor, count: int) -> Tensor:
        """The quantiles (i + 1/2) / count of <direction, Y>, [count]."""
        points, mass = self._cells
        place, order = (points @ direction).sort()
        below = mass[order].cumsum(0) - mass[order] / 2
        levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        i = torch.searchsorted(below, levels).clamp(1, len(below) - 1)
        share = (levels - below[i - 1]) / (below[i] - below[i - 1])
        return place[i - 1].lerp(place[i], share.clamp(0, 1))


# --- the network and its pipeline -----------------------------------------------------------------

LABEL_NOISE = 0.03
"""The condition is told to the network as a one-hot vector, with noise of this deviation.

Small enough that e^(-1/noise^2), a one-hot vector's odds for another condition, is 0 in float64:
far from its modes a condition's density is so small that the least of such odds would decide.
"""

Model = Literal["vp", "flow"]
"""A variance-preserving model that predicts the noise, or a flow model that predicts eps - x0."""

MODELS: tuple[Model, ...] = ("vp", "flow")


class MixtureNetwork(ModelMixin):
    """The exact network of a mixture, in float64 inside: what training would converge to.

    Latents [B, *shape] of D elements. The condition is an embedding [B, 1, C], one-hot, that is
    known through normal noise of deviation `LABEL_NOISE`: so other embeddings mean something too
    (CADS and ICG reach for them: usually the nearest condition), and zeros nothing, which is p(x).
    """

    def __init__(self, mixture: Labelled, shape: Sequence[int], model: Model) -> None:
        super().__init__()
        size = mixture.components.means.shape[1]
        if math.prod(shape) != size:
            raise GuidanceError(f"found latents {list(shape)} for {size} dimensions.")
        self.shape, self.model = tuple(shape), model
        every = mixture.components
        tensors = {"means": every.means, "variances": every.variances, "axes": every.axes}
        tensors |= {"shares": mixture.shares, "log_prior": mixture.prior.log()}
        tensors["noise"] = (1 / scheduler("vp").alphas_cumprod.double() - 1).sqrt()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def embed(self, condition: int | None, count: int) -> Tensor:
        """The condition as embeddings [count, 1, C]; None is no condition."""
        embeds = torch.zeros(count, 1, len(self.log_prior), device=self.log_prior.device)
        if condition is not None:
            check_condition(condition, len(self.log_prior))
            embeds[..., condition] = 1
        return embeds

    def level(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma; sigma / alpha is interpolated between timesteps, as schedulers do."""
        time = timestep.double()
        if self.model == "flow":
            return 1 - time / 1000, time / 1000
        below = time.floor().long().clamp(0, len(self.noise) - 1)
        above = (below + 1).clamp_max(len(self.noise) - 1)
        nsr = self.noise[below].lerp(self.noise[above], time - below)
        alpha = (1 + nsr**2).rsqrt()
        return alpha, nsr * alpha

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor]:
        told = encoder_hidden_states[:, 0].double() / LABEL_NOISE**2
        weights = (told + self.log_prior).softmax(-1) @ self.shares
        mixture = Mixture(weights, self.means, self.variances, self.axes)
        x, (alpha, sigma) = sample.double().flatten(1), self.level(timestep)
        out = -sigma[..., None] * mixture.noised(alpha, sigma).score(x)  # E[eps | x]
        if self.model == "flow":
            out = out - mixture.clean(x, alpha, sigma)
        return (out.reshape(sample.shape).to(sample.dtype),)


def scheduler(model: Model = "vp") -> SchedulerMixin:
    """DDIM on a schedule that ends in nearly pure noise, or flow matching with Euler steps."""
    if model == "flow":
        return FlowMatchEulerDiscreteScheduler()
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="trailing",
    )


class MixturePipeline(DiffusionPipeline):
    """The sampling loop that pipelines of images have, around the exact network of a mixture."""

    unet: MixtureNetwork
    scheduler: Any

    def __init__(self, unet: MixtureNetwork, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        condition: int | None,
        count: int = 1,
        negative: int | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> Tensor:
        """Samples [count, *shape] of a condition, away from the condition `negative`.

        None is no condition, all of the mixture. Both branches are evaluated at every scale.
        """
        network, solver = self.unet, self.scheduler
        embeds = torch.cat([network.embed(each, count) for each in (negative, condition)])
        solver.set_timesteps(num_inference_steps)
        if latents is None:
            latents = torch.randn(count, *network.shape, generator=generator)
        latents = latents * getattr(solver, "init_noise_sigma", 1.0)
        takes_noise = "generator" in inspect.signature(solver.step).parameters
        options = {"generator": generator} if takes_noise else {}
        for i, t in enumerate(solver.timesteps):
            both = torch.cat([latents, latents])
            if hasattr(solver, "scale_model_input"):
                both = solver.scale_model_input(both, t)
            uncond, cond = network(both, t, encoder_hidden_states=embeds)[0].chunk(2)
            guided = uncond + guidance_scale * (cond - uncond)
            latents = solver.step(guided, t, latents, **options, return_dict=False)[0]
            if callback_on_step_end is not None:
                callback_on_step_end(self, i, t, {})
        return latents


def pipeline(
    mixture: Labelled, model: Model = "vp", shape: Sequence[int] | None = None
) -> MixturePipeline:
    """A Diffusers pipeline of the mixture; its latents are [count, *shape], or [count, D, 1, 1]."""
    if model not in MODELS:
        raise GuidanceError(f"found the model {model!r}, expected one of {', '.join(MODELS)}.")
    shape = shape or (mixture.components.means.shape[1], 1, 1)
    return MixturePipeline(MixtureNetwork(mixture, shape, model), scheduler(model))


# --- figures --------------------------------------------------------------------------------------

OUTLYING = 3.0
"""Standard deviations from every mode beyond which a sample is an outlier."""

LOST = 0.1
"""A mode is lost that gets less than this share of its weight."""

DIRECTIONS = 16  # of the sliced distance, evenly spread over the half circle

Estimate = list[float]
"""A figure and its 95 % interval: value, low, high."""


def measure(
    points: Tensor, given: Mixture, targets: Mapping[str, Tilted], resamples: int = 200
) -> dict[str, Any]:
    """Figures of samples [n, 2] that should be of `given`, p(x|c), with bootstrap intervals.

    - `outliers`: the share beyond `OUTLYING` standard deviations of every mode; up to 1 % of exact
      samples are;
    - `shares`: of each mode in the others, by the modes' posteriors: those of exact samples are
      `weights`, but for the outliers; `coverage`: sum_k min(share_k, weight_k); `modes_lost`;
    - `log_density`: mean log p(x|c); too high is as wrong as too low, see exact samples;
    - for every target `energy NAME`, the (squared) energy distance 2 E|X-Y| - E|X-X'| - E|Y-Y'|,
      unbiased, so that it may fall below 0 where the distributions are equal, and `w2 NAME`, the
      2-Wasserstein distance, its square averaged over directions, which of n exact samples is about
      n^(-1/2), not 0. The targets' side has no randomness: it is integrated.

    Intervals are the value and 1.96 standard deviations of `resamples` resamples of the points.
    """
    n, points = len(points), points.double()
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(n, (resamples, n), generator=generator)
    picks = torch.cat([torch.arange(n)[None], picks])  # the first are the points as they are
    rows = torch.arange(resamples + 1)[:, None].expand_as(picks)
    counts = torch.zeros(resamples + 1, n, dtype=torch.float64)
    counts.index_put_((rows, picks), torch.ones((), dtype=torch.float64), accumulate=True)
    mean = counts / n

    belonging = _belonging(points, given)
    shares = mean @ belonging
    found = {
        "coverage": shares.minimum(given.weights).sum(1),
        "modes_lost": (shares < LOST * given.weights).double().sum(1),
        "outliers": mean @ (belonging.sum(1) == 0).double(),
        "log_density": mean @ given.log_density(points),
    }
    between = (mean @ torch.cdist(points, points) * mean).sum(1)
    between *= n / (n - 1)  # pairs of different points
    between[1:] *= n / (n - 1)  # resamples hold some of them twice
    for name, target in targets.items():
        distance = 2 * mean @ target.mean_distance(points) - between - target.self_distance
        found[f"energy {name}"] = distance
    found |= {f"w2 {name}": each for name, each in _sliced(points, picks, targets).items()}
    return {
        "shares": [_estimate(each, 0, 1) for each in shares.T],
        "weights": given.weights.tolist(),
        **{name: _estimate(values, *_RANGES[name.split()[0]]) for name, values in found.items()},
    }


_RANGES = {
    "coverage": (0, 1),
    "modes_lost": (0, math.inf),
    "outliers": (0, 1),
    "log_density": (-math.inf, math.inf),
    "energy": (-math.inf, math.inf),
    "w2": (0, math.inf),
}
"""What a figure can be, and so its interval."""


def _belonging(points: Tensor, given: Mixture) -> Tensor:
    """Which modes points belong to, [n, K]: their posteriors, or none for outliers."""
    near = given.distances(points).amin(1, keepdim=True) <= OUTLYING
    return given.shares(points) * near


def _sliced(points: Tensor, picks: Tensor, targets: Mapping[str, Tilted]) -> dict[str, Tensor]:
    """The sliced 2-Wasserstein distances of each resample."""
    squares = {name: torch.zeros(len(picks), dtype=torch.float64) for name in targets}
    for i in range(DIRECTIONS):
        angle = math.pi * (i + 0.5) / DIRECTIONS
        direction = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        place, order = (points @ direction).sort()
        ranks = order.argsort().int()  # whole numbers sort faster
        resampled = place[ranks[picks].sort(1).values.long()]
        for name, target in targets.items():
            gap = resampled - target.quantiles(direction, len(points))
            squares[name] += gap.square().mean(1) / DIRECTIONS
    return {name: each.sqrt() for name, each in squares.items()}


def _estimate(values: Tensor, least: float, most: float) -> Estimate:
    """From a figure of the points as they are, and those of their resamples."""
    value, error = float(values[0]), 1.96 * float(values[1:].std())
    return [min(max(each, least), most) for each in (value, value - error, value + error)]


# --- the experiment -------------------------------------------------------------------------------

METHODS = (
    "cfg",
    "interval",
    "apg(norm_threshold=0)",
    "cfg++",
    "rescaled-cfg",
    "cfg-zero*",
    "cfg-mp",
    "cfg-mp(anderson=False)",
    "cads",
    "fdg",
)
"""What `study` compares. APG without its cap, whose default is made for many elements; CFG-MP also
without its Anderson mixing, which extrapolates far out here; FDG needs a larger grid, and says so.
Two coordinates have hardly a standard deviation: rescaled CFG flings single points far away.
"""

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)

EXACT = {"p(x|c)": 1.0, "tilted target": None}
"""Exact samples that are measured too, and their w; None is the scale that is asked for."""


def sample(
    pipe: MixturePipeline,
    method: str,
    scale: float | None,
    count: int,
    steps: int,
    seed: int = 0,
    condition: int = 0,
) -> tuple[Tensor, str, int]:
    """Points [count, D] of a condition under `method` at a CFG scale, None for its own.

    The second value is the guidance as it was run, the third the network evaluations per point.
    Raises `GuidanceError` for what cannot work here.
    """
    with warnings.catch_warnings(), parse(method).attach(pipe) as guidance:
        warnings.simplefilter("ignore")  # a scale of 1 guides no step
        points = pipe(
            condition,
            count,
            guidance_scale=1.0 if scale is None else scale,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
        ).flatten(1)
        if not bool(points.isfinite().all()):
            raise GuidanceError(f"{guidance!r} at a scale of {scale} diverges here.")
        return points.double(), repr(guidance), guidance.report().rows // count


def study(
    methods: Iterable[str] = METHODS,
    scales: Sequence[float] = SCALES,
    count: int = 1000,
    steps: int = 50,
    seeds: Iterable[int] = (0,),
    *,
    models: Iterable[Model] = MODELS,
    condition: int = 0,
    mixture: Labelled | None = None,
) -> list[dict[str, Any]]:
    """Samples of every method at every scale against the truth, as records of plain values.

    A record says `model`, `method`, `scale`, `seed`, `count` and `steps`, the `guidance` as run and
    its `evaluations` per point, and all figures of `measure`: to the condition's distribution
    ("truth") and to the tilted one at its scale ("tilted"). Methods that take no scale from outside
    run once, at a scale of None, without the latter. Where a method refuses, `refused` is the
    reason, in the place of figures. Records of the model "exact" measure exact samples in the same
    way: what a figure is at best, and what the tilted target itself loses. Every seed is a run of
    its own, and all methods of a seed start from the same noise. DDIM, of the model "vp", walks
    whole training steps: take `steps` that divide 1000, if there are many.
    Raises `GuidanceError` for unknown methods, models and conditions, and scales below 1.
    """
    if count < 2:
        raise GuidanceError(f"count: found {count}, expected at least 2 points.")
    mixture, scales = mixture or archipelago(), [float(w) for w in scales]
    given, whole = mixture.given(condition), mixture.given()
    targets = {w: Tilted(given, whole, w) for w in (1.0, *scales)}
    pipes = {model: pipeline(mixture, model) for model in models}
    asked = [(method, w) for method in methods for w in _scales(method, scales)]

    def figures(points: Tensor, scale: float | None) -> dict[str, Any]:
        tilted = {} if scale is None else {"tilted": targets[scale]}
        return measure(points, given, {"truth": targets[1.0], **tilted})

    def exact(w: float, scale: float, seed: int) -> dict[str, Any]:
        points = targets[w].sample(count, torch.Generator().manual_seed(seed))
        return {"guidance": None, "evaluations": 0, **figures(points, scale)}

    def run(model: Model, method: str, scale: float | None, seed: int) -> dict[str, Any]:
        try:
            found = sample(pipes[model], method, scale, count, steps, seed, condition)
        except GuidanceError as error:
            return {"refused": str(error)}
        points, guidance, evaluations = found
        return {"guidance": guidance, "evaluations": evaluations, **figures(points, scale)}

    records = []
    for seed in seeds:
        about = {"seed": seed, "count": count, "steps": steps}
        for method, at in EXACT.items():
            for w in scales:
                names = {"model": "exact", "method": method, "scale": w}
                records.append({**names, **about, **exact(at or w, w, seed)})
        for model in pipes:
            for method, scale in asked:
                names = {"model": model, "method": method, "scale": scale}
                records.append({**names, **about, **run(model, method, scale, seed)})
    return records


def _scales(method: str, scales: Sequence[float]) -> Sequence[float | None]:
    """The scales at which a method is run: once, where it takes none from outside."""
    return scales if follows_pipeline(parse(method)) else [None]


# --- pictures -------------------------------------------------------------------------------------

_INK, _SAMPLE, _OUTLIER, _TARGET = "#30343b", "#1f5fa8", "#d1352b", "#e08a00"
_LAND = ("#eceef0", "#d8dbdf", "#bcc1c8")  # p(x|c): 99, 90 and 50 % of its mass
_OTHERS = "#c9cdd3"


def draw(
    methods: Iterable[str] = METHODS,
    scales: Sequence[float] = (1.0, 2.0, 4.0, 8.0),
    count: int = 1000,
    steps: int = 50,
    seed: int = 0,
    *,
    model: Model = "vp",
    condition: int = 0,
    mixture: Labelled | None = None,
) -> Any:
    """A Matplotlib figure: samples over the condition's density, a panel per method and scale.

    The first column are exact samples of the tilted target. Methods that refuse are named under the
    title, with the reason. Needs Matplotlib, which the extra `lab` brings.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise GuidanceError(
            'draw needs Matplotlib, which is not installed: pip install "guidancekit[lab]"'
        ) from error
    mixture = mixture or archipelago()
    given, whole = mixture.given(condition), mixture.given()
    view = _View(given, whole)
    targets = {float(w): Tilted(given, whole, w) for w in scales}
    generator = torch.Generator().manual_seed(seed)
    exact = [target.sample(count, generator) for target in targets.values()]
    columns = {"exact samples of\nthe tilted target": exact}
    pipe, refused = pipeline(mixture, model), []
    for method in methods:
        try:
            found = [sample(pipe, method, w, count, steps, seed, condition)[0] for w in targets]
        except GuidanceError as error:
            refused.append(f"{method} is left out: {error}")
        else:
            columns[method.replace("(", "\n(")] = found

    width, height = 1.75 * len(columns) + 0.4, 1.85 * len(targets) + 0.25 * len(refused) + 1.1
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white", layout="constrained")
    panels = figure.subplots(len(targets), len(columns), squeeze=False)
    for column, (method, found) in zip(panels.T, columns.items(), strict=True):
        column[0].set_title(method, fontsize=10, color=_INK, fontweight="bold")
        for axes, target, points in zip(column, targets.values(), found, strict=True):
            view.show(axes, target, points)
    for axes, w in zip(panels[:, 0], targets, strict=True):
        axes.set_ylabel(f"w = {w:g}", fontsize=12, color=_INK, fontweight="bold")

    def dot(colour: str, label: str, marker: str = "o", size: float = 5) -> Any:
        return Line2D(
            [], [], ls="", marker=marker, ms=size, mec=colour, mfc=colour, mew=2, label=label
        )

    figure.legend(
        handles=[
            dot(_LAND[-1], "p(x|c): 50, 90, 99 % of its mass", "s", 9),
            Line2D([], [], color=_OTHERS, label="p(x), 90 %"),
            Line2D([], [], color=_TARGET, label="tilted target p(x|c)ʷ p(x)¹⁻ʷ, 90 %"),
            dot(_SAMPLE, "sample", size=3),
            dot(
                _OUTLIER,
                f"beyond {OUTLYING:g} std. deviations of every mode (on the edge: off the map)",
                size=3,
            ),
            dot(_INK, f"mode lost: under {LOST:.0%} of its share", "x", 7),
        ],
        loc="outside lower center",
        ncols=6,
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
    )
    names = {"vp": "variance-preserving model, DDIM", "flow": "flow model, Euler"}
    title = f"Guidance on an exact Gaussian mixture: {names[model]}, {steps} steps"
    figure.suptitle("\n".join([title, *refused]), fontsize=11, color=_INK)
    return figure


class _View:
    """What all panels share: the map of the mixture under the samples."""

    def __init__(self, given: Mixture, whole: Mixture) -> None:
        self.given = given
        self.truth, self.everything = (Tilted(each, each, 1) for each in (given, whole))
        points, margin = self.everything.grid[self.everything.mass > 1e-6], 0.15
        self.low, self.high = points.amin(0) - margin, points.amax(0) + margin

    def show(self, axes: Any, target: Tilted, points: Tensor) -> None:
        """One panel; points that lie off the map are drawn on its edge."""
        levels = [self.truth.level(share) for share in (0.99, 0.9, 0.5)]
        axes.contourf(*_surface(self.truth), levels, colors=_LAND, extend="max")
        for density, colour in ((self.everything, _OTHERS), (target, _TARGET)):
            axes.contour(*_surface(density), [density.level(0.9)], colors=colour, linewidths=1.1)
        belonging, weights = _belonging(points, self.given), self.given.weights
        shares, near = belonging.mean(0), belonging.sum(1) > 0
        covered, outliers = float(shares.minimum(weights).sum()), float((~near).double().mean())
        seen = points.clamp(self.low + 0.03, self.high - 0.03)
        for chosen, colour in ((near, _SAMPLE), (~near, _OUTLIER)):
            axes.scatter(*seen[chosen].T.tolist(), s=1.5, color=colour, lw=0, alpha=0.8, zorder=3)
        lost = self.given.means[shares < LOST * weights]
        axes.scatter(*lost.T.tolist(), s=60, marker="x", color=_INK, lw=2, zorder=4)
        label = f"covers {covered:.0%}, outliers {outliers:.0%}"
        axes.set_xlabel(label, fontsize=8.5, color=_INK, labelpad=2)
        (left, bottom), (right, top) = self.low.tolist(), self.high.tolist()
        axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], aspect="equal")
        for spine in axes.spines.values():
            spine.set_color(_OTHERS)


def _surface(density: Tilted) -> tuple[Tensor, Tensor, Tensor]:
    """A density as Matplotlib takes it: x, y, and values whose rows are those of y."""
    return density.x, density.y, (density.mass / density.cell.prod()).T
