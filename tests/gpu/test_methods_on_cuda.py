"""The laws of every method in half precision on CUDA, against float32 on the CPU."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("these tests compare CUDA with the CPU: no CUDA device", allow_module_level=True)

from steps import guide, random_triple
from test_methods import FLOW_ONLY, LAWS, TYPICAL, acting, distilled_flux, step_of
from tiny import latents_of, sd3_prompt, tiny_sd, tiny_sd3
from tiny_families import FAMILIES, final_latents
from waiting import watch_steps

from guidancekit import APG, CFG, ICG, NAG, PAG, TSG, Prediction, SideBySide
from guidancekit.registry import methods
from guidancekit.tensors import Noise
from guidancekit.trace import Trace

DTYPES = [torch.float16, torch.bfloat16]
STEPS = 4
DIFFERENT_BATCH = 16
"""In units of eps, how far runs are apart whose networks round differently, in another batch: 3 to
4 on a CPU whose networks' outputs were changed at random by one."""
READ_THE_DEVICE = {"adaptive"}  # a latch decides what is evaluated next


def steps_on_both(guidance, dtype, triple):
    """The same outputs of a network in half precision, on the CPU and on CUDA."""
    cpu = step_of(guidance, *triple)
    outputs = {branch: cpu.evaluated[branch].out.to(dtype) for branch in ("cond", "uncond")}
    x = cpu.x.to(dtype)

    def on(device):
        step = step_of(guidance, *(tensor.to(device) for tensor in triple))
        seen = x.to(device)
        evaluated = {
            branch: Prediction(out.to(device), seen, step.level, step.kind)
            for branch, out in outputs.items()
        }
        return replace(step, x=seen.float(), evaluated=evaluated)

    return on("cpu"), on("cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guidance", TYPICAL)
def test_the_mathematics_are_those_of_the_cpu(guidance, dtype):
    """Both start from the same half-precision numbers and compute in float32."""
    on_cpu, on_cuda = steps_on_both(guidance, dtype, random_triple(2, 4, 16, 16))
    expected, found = guide(guidance, on_cpu).out, guide(guidance, on_cuda).out
    assert found.device.type == "cuda" and found.dtype == torch.float32
    size = float(expected.abs().max())
    torch.testing.assert_close(found.cpu(), expected, atol=1e-5 * max(size, 1), rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guidance", TYPICAL)
def test_batch_of_two_equals_two_of_one(guidance, dtype):
    triple = [tensor.to("cuda", dtype).float() for tensor in random_triple(2, 4, 8, 8)]
    triple[0][1] *= 30
    together = guide(guidance, step_of(guidance, *triple)).out
    for row in range(2):
        one = (tensor[row : row + 1] for tensor in triple)
        alone = guide(guidance, step_of(guidance, *one)).out
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guidance", TYPICAL)
def test_finite_where_the_predictions_agree(guidance, dtype):
    cond, uncond, x = (2e3 * t.to("cuda", dtype) for t in random_triple(1, 4, 16, 16))
    for first, second in ((cond, uncond), (cond, cond), (0 * cond, 0 * cond)):
        assert torch.isfinite(guide(guidance, step_of(guidance, first, second, x)).out).all()


@functools.cache
def pipeline(name, device, dtype):
    make = {"embedded": distilled_flux}.get(name, tiny_sd3 if name in FLOW_ONLY else tiny_sd)
    return make().to(device, dtype)


def draw(name, device, dtype):
    """The latents of a method's run, always from the same noise, as float32 on the CPU."""
    pipe = pipeline(name if name in {"embedded", *FLOW_ONLY} else "", device, dtype)
    weaker = tiny_sd(seed=1).unet.to(device, dtype) if name == "autoguidance" else None
    with acting(name, weaker).attach(pipe):
        if name == "embedded":
            given = FAMILIES["flux-distilled"].call((0,))
            call = {key: value.to(device, dtype) for key, value in given.items()}
            latents = final_latents(
                "flux-distilled", pipe, 1.0, (0,), num_inference_steps=STEPS, **call
            )
        else:
            noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
            prompt = {"prompt": "a red star"}
            if name in FLOW_ONLY:
                prompt = {key: value.to(device, dtype) for key, value in sd3_prompt().items()}
            latents = pipe(
                **prompt,
                latents=noise.to(device, dtype),
                guidance_scale=5.0,
                num_inference_steps=STEPS,
                height=32,
                width=32,
                output_type="latent",
            ).images
    return latents.float().cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", methods())
def test_runs_are_as_exact_as_on_the_cpu(name, dtype):
    """The network rounds in half precision, and guidance magnifies that: as much as on the CPU."""
    exact = draw(name, "cpu", torch.float32)
    on_cpu, on_cuda = (draw(name, device, dtype) for device in ("cpu", "cuda"))
    assert torch.isfinite(on_cuda).all()
    usual = float((on_cpu - exact).norm() / exact.norm())
    assert float((on_cuda - exact).norm() / exact.norm()) <= 4 * usual + 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (3, 77, 16), (2, 9)], ids=str)
def test_draws_are_those_of_the_cpu(shape, dtype):
    here, there = Noise(5, "a"), Noise(5, "a")
    for _ in range(3):  # one after the other, while copies are under way
        drawn = there(torch.empty(shape, device="cuda", dtype=dtype))
        assert drawn.device.type == "cuda" and drawn.dtype == torch.float32
        assert torch.equal(drawn.cpu(), here(torch.empty(shape)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guidance", [CFG() + PAG(), CFG() + ICG(2.0), CFG() + TSG(low=0.0)])
def test_joined_passes_predict_the_same(guidance, dtype):
    pipe = pipeline("", "cuda", dtype)
    found = []
    for joined in (False, True):
        with guidance.attach(pipe, joined=joined):
            latents = latents_of(pipe, steps=STEPS, num_images_per_prompt=2)
            found.append(latents.float())
            assert {step.calls for step in guidance.report().steps} == {1 if joined else 2}
    apart, together = found
    assert (together - apart).norm() <= DIFFERENT_BATCH * torch.finfo(dtype).eps * apart.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_side_by_side_is_each_alone(dtype):
    pipe, terms = pipeline("", "cuda", dtype), [CFG(6.0), APG(9.0), CFG(1.0)]
    prompts = ["a red star", "a blue ring"]

    def noise(count):
        drawn = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        return drawn.repeat_interleave(count, dim=0).to("cuda", dtype)

    with SideBySide(terms).attach(pipe):
        together = latents_of(
            pipe, steps=STEPS, prompt=prompts, latents=noise(3), num_images_per_prompt=3
        ).float()
    for i, term in enumerate(terms):
        with term.attach(pipe):
            alone = latents_of(pipe, steps=STEPS, prompt=prompts, latents=noise(1)).float()
        away = (together[i::3] - alone).norm()
        assert away <= DIFFERENT_BATCH * torch.finfo(dtype).eps * alone.norm(), term


# --- the step path does not wait for the device --------------------------------------------------


@contextmanager
def waiting_is_an(outcome):
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(outcome)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.fixture
def no_waiting(monkeypatch):
    """In the steps of a run, after the first, what guidancekit does must not wait for the device,
    the network's evaluations included."""
    strict, lax = (functools.partial(waiting_is_an, outcome) for outcome in ("error", "default"))
    watch_steps(monkeypatch, strict, lax)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted({*methods()} - READ_THE_DEVICE))
def test_steps_do_not_wait(name, dtype):
    assert torch.isfinite(draw(name, "cuda", dtype)).all()


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(
    "guidance",
    [
        CFG() + PAG(),
        SideBySide([CFG(), CFG() + PAG()]),
        SideBySide([CFG(), CFG(1.0), APG(8.0), NAG(), ICG(3.0), CFG() + TSG(low=0.0)]),
    ],
    ids=repr,
)
def test_compositions_do_not_wait(guidance, joined):
    pipe = pipeline("", "cuda", torch.float16)
    options = {"prompt": ["a red star", "a blue ring"], "num_images_per_prompt": 6}
    with guidance.attach(pipe, watch=Trace(), joined=joined):
        latents = latents_of(pipe, steps=STEPS, height=32, width=32, **options)
    assert torch.isfinite(latents).all()


def test_the_guard_notices_what_waits(no_waiting):
    class Waiting(CFG):
        def guide(self, step, state):
            assert float(step.x.sum()) < 1e9
            return super().guide(step, state)

    pipe = pipeline("", "cuda", torch.float16)
    with Waiting().attach(pipe), pytest.raises(RuntimeError, match="synchroniz"):
        latents_of(pipe, steps=STEPS)


def test_every_method_is_here():
    assert {*LAWS} <= {*methods()} and {*methods()} >= READ_THE_DEVICE
