"""Laws that every method obeys, from one table; then what is each method's own."""

from __future__ import annotations

import copy
import functools
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from compatibility import insert
from hypothesis import given
from hypothesis import strategies as st
from steps import KINDS, guide, make_step, random_triple
from tiny import sd3_prompt, tiny_sd, tiny_sd3, tiny_sdxl
from tiny_families import FAMILIES, final_latents, fresh, pipeline

from guidancekit import (
    APG,
    CFG,
    FDG,
    ICG,
    NAG,
    NASA,
    PAG,
    SAG,
    CFGPlusPlus,
    Guidance,
    GuidanceError,
    InternalHead,
    Interval,
    Linear,
    SideBySide,
    parse,
)
from guidancekit.cli import main
from guidancekit.describe import cost, evaluations, oracle
from guidancekit.engine.run import Run
from guidancekit.guidance import State
from guidancekit.parameters import parameters
from guidancekit.registry import create, methods


def contrast(x0, *_):
    """A scorer for `feedback`."""
    return x0.flatten(1).std(1)


def three_classes(x0):
    """A classifier for `gfcg`."""
    return torch.stack([f(x0.flatten(1), 1) for f in (torch.mean, torch.std, torch.amax)], dim=1)


# A row per method: typical settings, and the settings at which it is CFG at scale w
# (None: there are none, and the method has an oracle of its own).
LAWS = {
    "cfg": (dict(scale=6.0, rescale=0.5), lambda w: dict(scale=w)),
    "apg": (
        dict(scale=12.0),
        lambda w: dict(scale=w, eta=1.0, norm_threshold=0.0, momentum=0.0),
    ),
    "fdg": (
        dict(scale_low=3.0, scale_high=9.0, parallel_weights=[0.2, 0.6]),
        lambda w: dict(scale_low=w, scale_high=w),
    ),
    "cfg++": (dict(scale=0.8), None),
    "cfg-zero*": (
        dict(scale=6.0, zero_init=1),
        lambda w: dict(scale=w, zero_init=0, optimize=False),
    ),
    "tcfg": (dict(scale=6.0), None),
    "rescaled-cfg": (dict(scale=8.0, phi=0.6), lambda w: dict(scale=w, phi=0.0)),
    "dynamic-thresholding": (
        dict(scale=8.0, quantile=0.9, data_range=5.0),
        lambda w: dict(scale=w, data_range=1e6),
    ),
    "beta-cfg": (dict(scale=6.0, b=3.0), lambda w: dict(scale=w, a=1.0, b=1.0, gamma=0.0)),
    "mambo-g": (dict(scale=6.0), lambda w: dict(scale=w, damping=0.0)),
    "adaptive": (dict(scale=6.0, threshold=0.9), lambda w: dict(scale=w, threshold=2.0)),
    "linear-ag": (
        dict(scale=6.0, table=[[], [0.0, 0.3, 0.1, 0.6], [], None]),
        lambda w: dict(scale=w, table=[[]] * 4),
    ),
    "rectified-cfg++": (dict(scale=6.0), lambda w: dict(scale=w, predictor_fraction=0.0)),
    "cfg-mp": (dict(scale=6.0, iterations=0), lambda w: dict(scale=w, iterations=0)),
    "pcg": (dict(scale=6.0, corrections=2), None),
    "icg": (dict(scale=6.0), lambda w: dict(scale=w)),
    "tsg": (dict(scale=6.0), lambda w: dict(scale=w)),
    "autoguidance": (
        dict(scale=6.0, network="a folder"),
        lambda w: dict(scale=w, network="a folder"),
    ),
    "internal": (dict(scale=1.0, cfg=6.0), lambda w: dict(scale=1.0, cfg=w)),
    "perp-neg": (dict(negatives=["a blue ring"], scale=6.0), lambda w: dict(scale=w)),
    "embedded": (dict(scale=3.0), None),
    "cads": (dict(scale=6.0), lambda w: dict(scale=w)),
    "nlg": (dict(scale=6.0, refinements=3), lambda w: dict(scale=w)),
    "feedback": (
        dict(scorers={"contrast": contrast}, scale=6.0, candidates=[2.0, 4.0]),
        lambda w: dict(scorers={"contrast": contrast}, candidates=[w]),
    ),
    "fbg": (dict(pi=0.9, base_scale=1.5), None),
    "gfcg": (
        dict(classifier=three_classes, target=1, scale=6.0, references=["a", "b", "c"]),
        None,
    ),
    "annealing": (dict(alignment=0.7), None),
}
HOLD_FUNCTIONS = {"feedback", "gfcg"}  # these cannot be saved or written as text
TYPICAL = [pytest.param(methods()[name](**row[0]), id=name) for name, row in LAWS.items()]
FLOW_ONLY = {"rectified-cfg++"}
# Defined on the network's own output or on the velocity, so the kind of the network matters.
OWN_SPACE = {"cfg-zero*", "tcfg", "rescaled-cfg", "beta-cfg", "mambo-g", *FLOW_ONLY}
REDUCIBLE = {name: row[1] for name, row in LAWS.items() if row[1] is not None}


def step_of(guidance, *triple, kind="epsilon"):
    """A step by hand, of a kind of network that the method works on."""
    return make_step(*triple, "flow" if guidance.name in FLOW_ONLY else kind)


# These reach into the network: their laws run on real pipelines, in test_attention_methods.py.
IN_THE_NETWORK = ("blur", "nag", "nasa", "pag", "sag", "seg", "slg")


def test_every_method_has_a_row_of_laws():
    assert set(LAWS) | set(IN_THE_NETWORK) == set(methods())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REDUCIBLE)
@given(w=st.floats(0, 20), seed=st.integers(0, 9))
def test_reduces_to_cfg(name, kind, w, seed):
    if name in FLOW_ONLY:
        kind = "flow"
    step = make_step(*random_triple(2, 4, 8, 7, seed=seed), kind, nsr=0.9)
    guided = guide(methods()[name](**REDUCIBLE[name](w)), step)
    torch.testing.assert_close(guided.x0, step.cfg(w).x0, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("guidance", TYPICAL)
def test_batch_of_two_equals_two_of_one(guidance):
    triple = random_triple(2, 4, 8, 8)
    triple[0][1] *= 30  # a batch mate of another size must not matter
    together = guide(guidance, step_of(guidance, *triple)).out
    for row in range(2):
        one = (tensor[row : row + 1] for tensor in triple)
        alone = guide(guidance, step_of(guidance, *one)).out
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", TYPICAL)
def test_space_does_not_matter(guidance, kind):
    """The same clean predictions give the same guided one, whatever the network predicts."""
    if guidance.name in OWN_SPACE:
        return
    if isinstance(guidance, CFG):
        guidance = CFG(guidance.scale)  # rescaling is defined on the network's own output
    triple = random_triple(1, 4, 8, 8)
    reference = guide(guidance, make_step(*triple, "sample")).x0
    torch.testing.assert_close(
        guide(guidance, make_step(*triple, kind)).x0, reference, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("guidance", TYPICAL)
def test_finite_in_half_precision(guidance, dtype):
    cond, uncond, x = (2e3 * t.to(dtype) for t in random_triple(1, 4, 16, 16))
    for first, second in ((cond, uncond), (cond, cond), (0 * cond, 0 * cond)):
        guided = guide(guidance, step_of(guidance, first, second, x))
        assert guided.out.dtype == torch.float32
        assert torch.isfinite(guided.out).all()


@pytest.mark.parametrize("name", LAWS)
def test_finite_at_extreme_scales(name):
    """Also where the predictions agree, or are nothing at all."""
    scales = [p.name for p in parameters(methods()[name]) if p.kind == "scale"]
    if name == "internal":
        scales = ["cfg"]  # its other scale takes a head inside a network
    guidance = methods()[name](**{**LAWS[name][0], **dict.fromkeys(scales, 1e3)})
    cond, uncond, x = (t.half() for t in random_triple(1, 4, 16, 16))
    for first, second in ((cond, uncond), (cond, cond), (0 * cond, 0 * cond)):
        assert torch.isfinite(guide(guidance, step_of(guidance, first, second, x)).out).all()


@pytest.mark.parametrize("guidance", TYPICAL)
def test_packed_equals_unpacked(guidance):
    """Rules that do not care about space may be given tokens [B, N, C]; FDG refuses them."""

    def pack(t):
        return t.flatten(2).transpose(1, 2)

    triple = random_triple(2, 4, 6, 8)
    packed = step_of(guidance, *map(pack, triple))
    if guidance.name == "fdg":
        with pytest.raises(GuidanceError, match="spatial grid"):
            guide(guidance, packed)
        return
    expected = guide(guidance, step_of(guidance, *triple)).out
    torch.testing.assert_close(guide(guidance, packed).out, pack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance", TYPICAL)
def test_equal_predictions_stay_as_they_are(guidance):
    cond, _, x = random_triple(1, 4, 8, 8)
    step = step_of(guidance, cond, cond, x)
    torch.testing.assert_close(guide(guidance, step).x0, cond, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 4, 3, 6, 5), (2, 4, 13, 21)])
@pytest.mark.parametrize("guidance", TYPICAL)
def test_shapes_are_kept(guidance, shape):
    assert guide(guidance, step_of(guidance, *random_triple(*shape))).out.shape == shape


@pytest.mark.parametrize(
    "guidance", TYPICAL + [pytest.param(methods()[name](), id=name) for name in IN_THE_NETWORK]
)
def test_config_and_text_round_trips(guidance, tmp_path):
    if guidance.name in HOLD_FUNCTIONS:
        with pytest.raises(GuidanceError, match="a file cannot"):
            guidance.save_config(tmp_path)
        return
    guidance.save_config(tmp_path)
    again = type(guidance).from_config(type(guidance).load_config(tmp_path))
    assert again == guidance == parse(repr(guidance))
    assert Guidance.from_config(json.loads(guidance.to_json_string())) == guidance


@pytest.mark.parametrize("name", methods())
def test_documented_and_preset(name):
    cls = methods()[name]
    assert cls.paper.startswith("arXiv:") and cls.__doc__ and cls.paper in cls.__doc__
    assert "network evaluation" in cost(cls) and oracle(cls)
    for family, preset in cls.presets.items():
        assert cls.preset(family) == cls(**preset.values)
        assert preset.source
    with pytest.raises(GuidanceError, match="no published settings"):
        cls.preset("a model nobody published settings for")


# --- laws of whole runs --------------------------------------------------------------------------

STEPS = 4
PROMPTS = ("a red star", "a blue ring")
# Rows per step of methods that do not cost the same in every one of the four.
UNEVEN = {
    "adaptive": [2, 2, 1, 1],
    "beta-cfg": [1, 2, 2, 1],
    "cfg-mp": [6, 6, 2, 2],
    "cfg-zero*": [0, 2, 2, 2],
    "linear-ag": [2, 1, 2, 1],
    "nlg": [8, 2, 2, 2],
    "pcg": [5, 5, 5, 1],
    "slg": [1, 2, 2, 2],
}


def acting(name, weaker=None, head=None):
    """A method that acts in a run; its row of laws, and what only a run needs."""
    more = {
        "autoguidance": dict(network=weaker or tiny_sd(seed=1).unet),
        "internal": dict(scale=2.0, head=head or InternalHead("mid_block", 16, 4, 2)),
        "annealing": dict(weights="scenes:annealing"),
        "cfg-mp": dict(iterations=2),
        "tsg": dict(low=0.0),
        "nag": dict(negative_prompt="a green heart"),
        "nasa": dict(negative_prompt="a green heart"),
        "slg": dict(start=0.0, end=1.0),
    }
    return create(name, **{**LAWS.get(name, ({},))[0], **more.get(name, {})})


@functools.cache
def shared(make, dtype=torch.float32):
    return make().to(dtype)


distilled_flux = functools.partial(fresh, "flux-distilled")


def run(guidance, rows=(0, 1), dtype=torch.float32, make=tiny_sd):
    """The latents of two prompts, or of one of them, each always from the same noise."""
    if guidance.name == "embedded":
        call = {
            name: given.to(dtype) for name, given in FAMILIES["flux-distilled"].call(rows).items()
        }
        pipe = shared(distilled_flux, dtype)
        with guidance.attach(pipe):
            return final_latents(
                "flux-distilled", pipe, 1.0, rows, num_inference_steps=STEPS, **call
            )
    make = tiny_sd3 if guidance.name in FLOW_ONLY else make
    pipe = shared(make, dtype)
    if make is tiny_sd3:
        call = {key: value[list(rows)].to(dtype) for key, value in sd3_prompt(2).items()}
    else:
        call = {"prompt": [PROMPTS[row] for row in rows]}
    noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(row)) for row in rows]
    with guidance.attach(pipe):
        return pipe(
            **call,
            latents=torch.stack(noise).to(dtype),
            guidance_scale=5.0,
            num_inference_steps=STEPS,
            height=32,
            width=32,
            output_type="latent",
        ).images


@functools.cache
def first_run(name):
    """A method, the latents of its first run, and the network rows of a sample in each step."""
    guidance = acting(name)
    latents = run(guidance)
    return guidance, latents, [rows / 2 for rows in guidance.report().rows_per_step]


@pytest.mark.parametrize("name", methods())
def test_the_documented_cost_is_that_of_a_run(name):
    guidance, _, counted = first_run(name)
    documented = evaluations(guidance, STEPS)
    assert counted == UNEVEN.get(name, [documented] * STEPS)
    assert sum(counted) <= STEPS * documented <= STEPS * evaluations(guidance)


@pytest.mark.parametrize(
    ("guidance", "counted"),
    [
        (CFG() + SAG() + PAG(), 4),
        (CFG() + NAG(), 2),
        (CFG(3.0) + ICG(2.0), 3),
        (CFG(3.0) + APG(2.0), 2),  # they share the unconditional prediction, the estimate does not
        (SideBySide([CFG(), CFG() + SAG()]), 2.5),
    ],
    ids=repr,
)
def test_the_cost_of_several_is_estimated_from_above(guidance, counted):
    run(guidance)
    assert guidance.report().rows_per_step == [2 * counted] * STEPS
    assert counted <= evaluations(guidance) <= counted + 1


def test_an_undocumented_cost_is_taken_for_that_of_cfg():
    class Mine(CFG):
        """My rule."""

    assert evaluations(Mine()) == 2


@pytest.mark.parametrize("name", methods())
def test_runs_repeat_and_copies_do_the_same(name):
    """Nothing is left to chance, of a run before, or behind by a pickle."""
    guidance, first, _ = first_run(name)
    assert torch.isfinite(first).all()
    assert torch.equal(run(guidance), first)
    assert torch.equal(run(pickle.loads(pickle.dumps(guidance))), first)


@pytest.mark.parametrize("name", methods())
def test_a_sample_of_a_batch_is_that_of_a_run_alone(name):
    """Sample i of a batch with seed s is the only sample of a batch with seed s + i."""
    guidance, together, _ = first_run(name)
    for row in (0, 1):
        own = copy.deepcopy(guidance)
        if hasattr(own, "seed"):
            own.seed += row
        alone = run(own, rows=(row,))
        torch.testing.assert_close(together[row : row + 1], alone, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", methods())
def test_runs_in_half_precision(name, dtype):
    weaker = tiny_sd(seed=1).unet.to(dtype) if name == "autoguidance" else None
    latents = run(acting(name, weaker), (0,), dtype)
    assert latents.dtype == dtype and torch.isfinite(latents).all()


@pytest.mark.parametrize("name", sorted({*methods()} - {*FLOW_ONLY, "embedded"}))
def test_all_work_on_stable_diffusion_xl(name):
    weaker = tiny_sdxl(seed=1).unet if name == "autoguidance" else None
    latents = run(acting(name, weaker), make=tiny_sdxl)
    assert torch.isfinite(latents).all()
    assert not torch.allclose(latents, unguided_sdxl(), atol=1e-4)


@pytest.mark.parametrize("guidance", [NAG(), NASA()], ids=repr)
def test_sdxls_empty_negative_prompt_says_nothing(guidance):
    with pytest.warns(UserWarning, match="Give a negative prompt"):
        run(guidance, make=tiny_sdxl)
    assert len(guidance.report().warnings) == 1


@functools.cache
def unguided_sdxl():
    return run(CFG(1.0), make=tiny_sdxl)


# Those that test_families.py and test_attention_families.py run in every family are left out.
IN_FAMILIES = {
    "cfg",
    "fdg",
    "cfg++",
    "cfg-zero*",
    "cfg-mp",
    "pcg",
    "icg",
    "tsg",
    "cads",
    "embedded",
}
NOT_FOR_DIT = {"perp-neg": "cannot encode", "rectified-cfg++": "for flow models"}


@pytest.mark.parametrize("family", ["dit", "sd3", "flux"])
@pytest.mark.parametrize("name", [name for name in LAWS if name not in IN_FAMILIES])
def test_the_others_work_on_transformers(name, family, monkeypatch):
    pipe, labelled = pipeline(family), family == "dit"
    weaker = copy.deepcopy(pipe.transformer)
    for parameter in weaker.parameters():
        parameter.data *= 0.9
    guidance = acting(name, weaker, head=InternalHead("transformer_blocks.0", 16, 4, 2))
    if name == "gfcg" and labelled:
        guidance.references = None  # classes are its references
    if not labelled:  # there are no text encoders: another text is the opposite of the prompt

        def encode(run, prompt):
            return {name: -given[:1] for name, given in run.passes.conditions("cond").items()}

        monkeypatch.setattr(Run, "_encode", encode)

    def draw(guidance):
        with guidance.attach(pipe):
            return final_latents(family, pipe, 5.0, num_inference_steps=STEPS)

    if labelled and name in NOT_FOR_DIT:
        with pytest.raises(GuidanceError, match=NOT_FOR_DIT[name]):
            draw(guidance)
        return
    latents = draw(guidance)
    assert torch.isfinite(latents).all()
    assert not torch.allclose(latents, draw(CFG(1.0)), atol=1e-4)


# --- the table of methods ------------------------------------------------------------------------


def test_the_readme_holds_the_table_of_methods(capsys):
    assert main(["methods", "--markdown"]) == 0
    table = capsys.readouterr().out.strip()
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == [f"| `{name}`" for name in methods()]
    assert all(len(row) == 6 and all(row) for row in rows)
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert readme == insert(readme, table, "methods"), "run: make methods"


def test_the_table_is_of_all_methods(capsys):
    assert main(["methods", "apg", "--markdown"]) == 2
    assert "leave out 'apg'" in capsys.readouterr().err


# --- terms and schedules inside a method ---------------------------------------------------------


def test_terms_add_up_on_the_conditional_prediction():
    step = make_step(*random_triple(1, 4, 8, 8))
    both = guide(CFG(4.0) + CFG(3.0), step)
    torch.testing.assert_close(both.x0, step.cfg(4.0 + 3.0 - 1.0).x0, atol=1e-5, rtol=1e-5)


def test_sums_are_flat_and_round_trip(tmp_path):
    total = CFG(scale=Interval(Linear(8.0), 0.3, 5.0)) + APG(2.0) + FDG(1.0, 3.0)
    assert len(total.terms) == 3
    total.save_config(tmp_path)
    assert type(total).from_config(type(total).load_config(tmp_path)) == total
    assert parse(repr(total)) == total


def test_scale_none_is_the_pipelines():
    step = make_step(*random_triple(1, 4, 8, 8), guidance_scale=3.5)
    torch.testing.assert_close(guide(CFG(), step).out, step.cfg(3.5).out)
    homeless = make_step(*random_triple(1, 4, 8, 8), guidance_scale=None)
    with pytest.raises(GuidanceError, match="give the scale"):
        guide(CFG(), homeless)


@pytest.mark.parametrize("cls", [CFG, APG])
def test_scale_one_is_the_conditional_prediction_itself(cls):
    step = make_step(*random_triple(1, 4, 8, 8))
    assert guide(cls(1.0), step) is step.cond
    assert cls(1.0).needs(step, State()) == ("cond",)
    if cls is CFG:
        assert cls(0.0).needs(step, State()) == ("uncond",)


def test_rescale_brings_back_the_standard_deviation():
    step = make_step(*random_triple(2, 4, 8, 8))
    out = guide(CFG(8.0, rescale=1.0), step).out
    for row in range(2):
        torch.testing.assert_close(out[row].std(), step.cond.out[row].std())


# --- APG -----------------------------------------------------------------------------------------


def apg_by_hand(cond, uncond, w, eta, radius, beta, buffer):
    """Algorithm 1 of arXiv:2410.02416 for one flattened sample, in float64."""
    d = cond - uncond + beta * buffer
    new_buffer = d
    length = torch.sqrt((d**2).sum())
    if radius > 0 and length > radius:
        d = d / length * radius
    direction = cond / torch.sqrt((cond**2).sum())
    along = torch.sum(d * direction) * direction
    return cond + (w - 1) * (d - along + eta * along), new_buffer


@given(
    w=st.floats(0, 20),
    eta=st.floats(0, 1),
    radius=st.floats(0, 20),
    beta=st.floats(-0.9, 0.5),
    kind=st.sampled_from(KINDS),
)
def test_apg_equals_its_algorithm_over_a_run(w, eta, radius, beta, kind):
    guidance, state = APG(w, eta, radius, beta), State()
    buffer = torch.zeros(4 * 8 * 8, dtype=torch.float64)
    for index in range(3):
        cond, uncond, x = random_triple(1, 4, 8, 8, seed=index)
        step = make_step(cond, uncond, x, kind, index=index)
        if w == 1:
            return
        guided = guide(guidance, step, state).x0
        flat = (cond.flatten().double(), uncond.flatten().double())
        expected, buffer = apg_by_hand(*flat, w, eta, radius, beta, buffer)
        torch.testing.assert_close(guided.flatten().double(), expected, atol=2e-4, rtol=1e-4)


def test_apg_without_eta_adds_nothing_along_the_prediction():
    step = make_step(*random_triple(1, 4, 8, 8))
    update = guide(APG(10.0), step).x0 - step.cond.x0
    cosine = torch.nn.functional.cosine_similarity(update.flatten(), step.cond.x0.flatten(), dim=0)
    assert abs(cosine) < 1e-5


def test_apg_caps_the_update():
    step = make_step(*random_triple(3, 4, 8, 8))
    update = guide(APG(2.0, eta=1.0, norm_threshold=0.7, momentum=0.0), step).x0 - step.cond.x0
    assert (update.flatten(1).norm(dim=1) <= 0.7 * (1 + 1e-4)).all()


def test_apg_default_cap_scales_with_the_latent():
    small, large = (APG()._threshold(torch.zeros(1, 4, side, side)) for side in (16, 64))
    assert large == pytest.approx(4 * small) and large == pytest.approx(0.06 * 128)


def test_apg_momentum_of_a_constant_difference():
    state, lengths = State(), []
    cond, uncond, x = random_triple(1, 4, 8, 8)
    guidance = APG(2.0, eta=1.0, norm_threshold=0.0, momentum=-0.5)
    for index in range(4):
        step = make_step(cond, uncond, x, index=index)
        update = guide(guidance, step, state).x0 - step.cond.x0
        lengths.append(float(update.norm() / (cond - uncond).norm()))
    assert lengths == pytest.approx([1, 0.5, 0.75, 0.625], rel=1e-4)


def test_apg_momentum_advances_once_per_solver_step():
    cond, uncond, x = random_triple(1, 4, 8, 8)
    one, two = State(), State()
    guidance = APG(6.0)
    for index in range(3):
        guide(guidance, make_step(cond, uncond, x, index=index), one)
        guide(guidance, make_step(cond, uncond, x, index=index), two)
        second = guide(guidance, make_step(cond, uncond, x, index=index, stage=1), two)
    torch.testing.assert_close(one.sum, two.sum)
    assert torch.isfinite(second.x0).all()


# --- FDG -----------------------------------------------------------------------------------------


def blur_by_hand(x):
    """The binomial blur of [H, W] with reflected borders, pixel by pixel, in float64."""
    weights = [1, 4, 6, 4, 1]
    height, width = x.shape
    reflect = lambda i, n: -i if i < 0 else 2 * (n - 1) - i if i >= n else i  # noqa: E731
    out = torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            out[i, j] = sum(
                weights[a]
                * weights[b]
                * x[reflect(i + a - 2, height), reflect(j + b - 2, width)]
                / 256
                for a in range(5)
                for b in range(5)
            )
    return out


def resize_by_hand(x, height, width):
    """Bilinear resize of [H, W] with pixel centres aligned (align_corners=False)."""

    def sample(position, n):
        position = min(max(position, 0.0), n - 1.0)
        low = min(int(position), n - 1)
        return low, min(low + 1, n - 1), position - low

    out = torch.zeros(height, width, dtype=x.dtype)
    for i in range(height):
        top, bottom, v = sample((i + 0.5) * x.shape[0] / height - 0.5, x.shape[0])
        for j in range(width):
            left, right, h = sample((j + 0.5) * x.shape[1] / width - 0.5, x.shape[1])
            upper = (1 - h) * x[top, left] + h * x[top, right]
            lower = (1 - h) * x[bottom, left] + h * x[bottom, right]
            out[i, j] = (1 - v) * upper + v * lower
    return out


def low_by_hand(x):
    small = resize_by_hand(blur_by_hand(x), x.shape[0] // 2, x.shape[1] // 2)
    return blur_by_hand(resize_by_hand(small, *x.shape))


@pytest.mark.parametrize("size", [(8, 8), (13, 21)])
def test_fdg_equals_two_pyramids_by_hand(size):
    """The paper builds both pyramids and guides band by band: c + (w - 1)(c - u) in each."""
    cond, uncond, x = random_triple(1, 1, *size)
    c, u = cond[0, 0].double(), uncond[0, 0].double()
    c_low, u_low = low_by_hand(c), low_by_hand(u)
    # The low band is stored at half size and enlarged on collapse, which is linear.
    guided_low = c_low + (2.0 - 1) * (c_low - u_low)
    c_high, u_high = c - c_low, u - u_low
    expected = guided_low + c_high + (9.0 - 1) * (c_high - u_high)
    guided = guide(FDG(2.0, 9.0), make_step(cond, uncond, x)).x0[0, 0].double()
    torch.testing.assert_close(guided, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "levels"), [((104, 152), 4), ((96, 96), 4), ((13, 21), 3), ((3, 5), 2), ((8, 8), 1)]
)
def test_fdg_pyramid_reconstructs_any_size(size, levels):
    from guidancekit.methods.fdg import collapse, pyramid

    x, _, _ = random_triple(1, 3, *size)
    torch.testing.assert_close(collapse(pyramid(x, levels)), x, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [(96, 96), (104, 152), (13, 21)])
@pytest.mark.parametrize("scales", [(1.0, 7.0), (7.0, 1.0), (5.0, 5.0)])
def test_fdg_runs_on_any_latent_and_at_neutral_bands(size, scales):
    step = make_step(*random_triple(1, 4, *size))
    guided = guide(FDG(*scales), step).x0
    assert guided.shape == step.x.shape and torch.isfinite(guided).all()
    assert not torch.allclose(guided, step.cond.x0)


def test_fdg_low_band_guides_the_mean_and_high_band_does_not():
    cond, uncond, x = random_triple(1, 4, 32, 32)
    step = make_step(cond + 1.0, uncond, x)
    d = (step.cond.x0 - step.uncond.x0).mean()
    high_only = guide(FDG(1.0, 8.0), step).x0 - step.cond.x0
    low_only = guide(FDG(8.0, 1.0), step).x0 - step.cond.x0
    assert abs(high_only.mean()) < 0.02 * abs(7 * d)
    assert low_only.mean() == pytest.approx(float(7 * d), rel=0.02)


def test_fdg_projection_removes_what_is_along_each_clean_band():
    cond, _, x = random_triple(1, 4, 16, 16)
    step = make_step(cond, 0.5 * cond, x, "epsilon", nsr=2.0)
    projected = guide(FDG(6.0, 6.0, parallel_weights=[0.0, 0.0]), step).x0
    torch.testing.assert_close(projected, cond, atol=1e-4, rtol=1e-4)
    halved = guide(FDG(6.0, 6.0, parallel_weights=[0.5, 0.5]), step).x0
    torch.testing.assert_close(halved, cond + 0.5 * 5 * 0.5 * cond, atol=1e-4, rtol=1e-4)


def test_fdg_too_many_levels_or_no_grid():
    with pytest.raises(GuidanceError, match="fewer levels"):
        guide(FDG(2.0, 5.0, levels=5), make_step(*random_triple(1, 4, 8, 8)))
    with pytest.raises(GuidanceError, match="spatial grid"):
        guide(FDG(2.0, 5.0), make_step(*random_triple(1, 64, 16)))
    with pytest.raises(GuidanceError, match="one for each of the 3 levels"):
        FDG(2.0, 5.0, levels=3, parallel_weights=[0.5])


def test_fdg_defaults_follow_the_pipeline():
    step = make_step(*random_triple(1, 4, 8, 8), guidance_scale=8.0)
    assert FDG().scales(step) == [8.0, 4.0]
    assert FDG(2.0, 8.0, levels=3).scales(step) == [8.0, 5.0, 2.0]


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CFG(math.nan), "scale"),
        (lambda: CFG(math.inf), "scale"),
        (lambda: CFG(-1), "at least 0"),
        (lambda: CFG("7"), "expected a number or a schedule"),
        (lambda: CFG(True), "expected a number"),
        (lambda: CFG(5, rescale=1.5), "from 0 to 1"),
        (lambda: APG(5, eta=-0.1), "eta"),
        (lambda: APG(5, momentum=-1.0), "momentum"),
        (lambda: FDG(levels=0), "levels"),
        (lambda: FDG(levels=2.0), "whole number"),
        (lambda: CFGPlusPlus(strength="much"), "lambda"),
        (lambda: Interval(5, low=3, high=1), "empty"),
        (lambda: Interval(5, low=math.nan), "low"),
        (lambda: parse("apgg(3)"), "did you mean apg"),
        (lambda: parse("apg(scal=3)"), "did you mean scale"),
        (lambda: parse("__import__('os')"), "no method"),
        (lambda: parse("apg(3"), "expected a method"),
        (lambda: parse("1 + 2"), "cannot read"),
        (lambda: parse("apg.scale"), "cannot read"),
        (lambda: parse("cfg(1, 2, 3)"), "takes 2 values"),
    ],
)
def test_bad_input_is_refused_with_a_clear_message(make, message):
    with pytest.raises(GuidanceError, match=message):
        make()
