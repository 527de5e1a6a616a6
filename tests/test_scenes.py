"""Laws of the scenes sample: its captions, its renderer, its recogniser, the bundled pipeline."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samples.scenes.render import render, render_batch
from samples.scenes.world import (
    ATTRIBUTES,
    BACKGROUNDS,
    RELATIONS,
    Scene,
    Thing,
    caption,
    fits,
    held_out,
    parse,
    sample_scene,
    write,
)

ROOT = Path(__file__).parents[1]
PIPELINE = ROOT / "guidancekit" / "bundled" / "scenes-unet"

seeds = st.integers(0, 2**32 - 1)


def things(optional: bool) -> st.SearchStrategy[Thing]:
    """Things with every attribute set, or with any of them left free."""
    free = [st.none()] if optional else []
    return st.builds(
        Thing, **{name: st.one_of(*free, st.sampled_from(w)) for name, w in ATTRIBUTES.items()}
    )


@st.composite
def scenes(draw: st.DrawFn, optional: bool = False) -> Scene:
    objects = tuple(draw(st.lists(things(optional), min_size=1, max_size=2)))
    free = [st.none()] if optional else []
    relation = draw(st.one_of(*free, st.sampled_from(RELATIONS))) if len(objects) == 2 else None
    return Scene(objects, relation, draw(st.one_of(*free, st.sampled_from(tuple(BACKGROUNDS)))))


# --- captions -------------------------------------------------------------------------------------


@given(scenes(), seeds)
def test_a_caption_is_true_of_its_scene(scene: Scene, seed: int) -> None:
    text = caption(scene, np.random.default_rng(seed))
    assert fits(scene, parse(text))
    assert text == text.lower()


@given(scenes(optional=True))
def test_parse_inverts_write(partial: Scene) -> None:
    assert parse(write(partial)) == partial


@given(scenes())
def test_case_and_punctuation_do_not_matter(scene: Scene) -> None:
    text = write(scene)
    assert parse(text.upper().replace(" AND ", ", AND ") + ".") == parse(text)


@given(scenes(), scenes())
def test_a_full_caption_fits_only_its_scene(scene: Scene, other: Scene) -> None:
    assert fits(other, parse(write(scene))) == (other == scene)


@given(scenes(), seeds)
def test_splits_follow_the_text(scene: Scene, seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert not held_out(caption(scene, rng, "train"))
    try:
        assert held_out(caption(scene, rng, "held-out"))
    except ValueError as error:  # scenes of one thing have few captions, perhaps none held out
        assert len(scene.objects) == 1 and "no held-out caption" in str(error)


def test_one_caption_in_sixteen_is_held_out() -> None:
    rng = np.random.default_rng(0)
    texts = {caption(sample_scene(rng), rng) for _ in range(4000)}
    assert np.mean([held_out(text) for text in texts]) == pytest.approx(1 / 16, abs=0.015)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "the end"),
        ("a red", "the end"),
        ("a red dog", "'dog' (word 3)"),
        ("red star", "'red' (word 1)"),
        ("a star left a ring", "'left' (word 3)"),
        ("a star on a red background", "'red' (word 5)"),
        ("a star on a navy background and a ring", "'and' (word 7)"),
        ("a star and a ring and a moon", "'and' (word 6)"),
    ],
)
def test_parse_says_what_it_found(text: str, found: str) -> None:
    with pytest.raises(ValueError, match=r"expected .*, found ") as error:
        parse(text)
    assert str(error.value).endswith(f"found {found}")


# --- pictures -------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.lists(scenes(), min_size=1, max_size=10), seeds)
def test_pictures_depend_on_scenes_and_seed_alone(batch: list[Scene], seed: int) -> None:
    pictures = render_batch(batch, np.random.default_rng(seed))
    assert pictures.shape == (len(batch), 64, 64, 3)
    assert pictures.dtype == np.uint8
    rng = np.random.default_rng(seed)
    assert np.array_equal(pictures, [render(scene, rng) for scene in batch])


@settings(max_examples=20)
@given(scenes(), seeds)
def test_every_object_is_inside_the_picture_and_visible(scene: Scene, seed: int) -> None:
    """The border shows the background, smooth and shaded only a little; the middle does not."""
    picture = render(scene, np.random.default_rng(seed)).astype(int)
    corner = picture[0, 0]
    assert np.abs(picture[[0, 0, -1, -1], [0, -1, 0, -1]] - corner).max() <= 60
    assert (np.abs(picture - corner).max(axis=2) > 60).sum() > 20


# --- recogniser -----------------------------------------------------------------------------------


@given(scenes(), seeds)
def test_a_scene_earns_every_mark_of_its_captions(scene: Scene, seed: int) -> None:
    from samples.scenes.recogniser import marks

    assert all(marks(scene, parse(caption(scene, np.random.default_rng(seed)))).values())


@given(scenes(), scenes(optional=True))
def test_full_marks_are_a_fit(scene: Scene, partial: Scene) -> None:
    from samples.scenes.recogniser import marks

    assert marks(scene, partial)["all"] == fits(scene, partial)


def test_the_reverse_order_is_a_wrong_relation_of_the_right_things() -> None:
    from samples.scenes.recogniser import marks

    seen = Scene((Thing("ring", "blue", "large", "plain"), Thing("star", "red", "small", "plain")),
                 "left of", "navy")  # fmt: skip
    assert marks(seen, parse("a red star left of a blue ring")) == {
        "count": True, "colour": True, "shape": True, "relation": False, "all": False,
    }  # fmt: skip


def test_the_recogniser_reads_fresh_renders() -> None:
    from samples.scenes.recogniser import load

    rng = np.random.default_rng(99)
    fresh = [sample_scene(rng) for _ in range(400)]
    seen = load().recognise(render_batch(fresh, rng))
    both = list(zip(seen, fresh, strict=True))
    for name in ("relation", "background"):
        assert np.mean([getattr(a, name) == getattr(b, name) for a, b in both]) > 0.97, name
    pairs = [
        pair
        for a, b in both
        if len(a.objects) == len(b.objects)
        for pair in zip(a.objects, b.objects, strict=True)
    ]
    assert len(pairs) > 580
    for name in ATTRIBUTES:
        assert np.mean([getattr(a, name) == getattr(b, name) for a, b in pairs]) > 0.97, name


# --- the bundled pipeline -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_pipeline_is_small_and_has_no_stray_files() -> None:
    files = [path for path in PIPELINE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_the_pipeline_draws_64_pixel_pictures(pipe) -> None:
    import torch

    def draw() -> np.ndarray:
        return pipe(
            ["a red star", "A large zebra!"],
            num_inference_steps=2,
            output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images

    pictures = draw()
    assert pictures.shape == (2, 64, 64, 3)
    assert np.isfinite(pictures).all()
    assert np.array_equal(pictures, draw())


def test_a_named_colour_and_background_are_drawn(pipe) -> None:
    import torch

    from samples.scenes.recogniser import load

    text = "a large red circle on a navy background"
    pictures = pipe(
        [text] * 4,
        num_inference_steps=12,
        guidance_scale=3.0,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert sum(mark["all"] for mark in load().score(pictures, [text] * 4)) >= 3


def test_every_word_of_the_grammar_has_a_token(pipe) -> None:
    rng = np.random.default_rng(0)
    texts = [caption(sample_scene(rng), rng) for _ in range(500)]
    ids = pipe.tokenizer([*texts, ""]).input_ids
    assert pipe.tokenizer.unk_token_id not in {token for row in ids for token in row}
    assert max(map(len, ids)) <= pipe.tokenizer.model_max_length
    assert pipe.tokenizer("A Red, STAR.").input_ids == pipe.tokenizer("a red star").input_ids
    assert pipe.tokenizer.unk_token_id in pipe.tokenizer("a red dog").input_ids


def test_latents_have_unit_deviation_per_channel(pipe) -> None:
    import torch

    from samples.scenes.train import to_tensor

    rng = np.random.default_rng(7)
    pictures = to_tensor(render_batch([sample_scene(rng) for _ in range(400)], rng))
    with torch.no_grad():
        latents = pipe.vae.encode(pictures).latents
    assert pipe.vae.config.scaling_factor == 1.0
    assert latents.shape == (400, 8, 16, 16)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1


def test_importing_the_world_needs_no_torch() -> None:
    code = "import sys, samples.scenes.render; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
