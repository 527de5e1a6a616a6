"""Recipes survive the trip through a PNG; damaged, foreign and forged files are refused."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import asdict, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from guidancekit import GuidanceError
from guidancekit.files import check_writable, free_path, written_whole
from guidancekit.recipe import CHUNK, DTYPES, MAX_CHUNK, Recipe, read_recipe, save_picture

RECIPE = Recipe(prompt="a red circle", model="scenes-unet", size=(64, 64))

texts = st.text(min_size=1, max_size=60).filter(str.strip)
recipes = st.builds(
    Recipe,
    prompt=texts,
    model=texts,
    negative=st.text(max_size=30),
    guidance=texts,
    guidance_scale=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    steps=st.integers(1, 1000),
    seed=st.integers(0, 2**63 - 1),
    scheduler=st.none() | texts,
    size=st.none() | st.tuples(st.integers(8, 16384), st.integers(8, 16384)),
    dtype=st.sampled_from(DTYPES),
    device=texts,
    versions=st.dictionaries(st.text(max_size=10), st.text(max_size=10), max_size=3),
)


@given(recipes)
def test_json_round_trip(recipe):
    assert Recipe.from_json(recipe.to_json()) == recipe


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(recipe=recipes)
def test_png_round_trip(recipe, tmp_path):
    path = tmp_path / "picture.png"
    save_picture(Image.new("RGB", (8, 8), "red"), recipe, path)
    assert read_recipe(path) == recipe
    assert Image.open(path).getpixel((3, 3)) == (255, 0, 0)


@given(st.text(max_size=200))
def test_any_text_is_a_recipe_or_a_guidance_error(text):
    try:
        Recipe.from_json(text)
    except GuidanceError as error:
        assert "\n" not in str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(st.sampled_from(sorted(asdict(RECIPE))), json_values)
def test_any_json_value_in_any_entry_is_valid_or_a_guidance_error(name, value):
    values = asdict(RECIPE) | {name: value}
    try:
        recipe = Recipe.from_json(json.dumps(values))
    except GuidanceError as error:
        assert "\n" not in str(error)
    else:
        assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " \n"}, "prompt: found ' \\\\n', expected text that is not blank"),
        ({"prompt": 7}, "prompt: found 7, expected text"),
        ({"prompt": "a" * 8001}, "prompt: found '8001 characters', expected at most 8000"),
        ({"prompt": "\ud800"}, "prompt: .* expected valid Unicode"),
        ({"negative": None}, "negative: found None, expected text"),
        ({"steps": 0}, "steps: found 0, expected a whole number from 1 to 1000"),
        ({"steps": 30.0}, "steps: found 30.0"),
        ({"steps": True}, "steps: found True"),
        ({"seed": -1}, "seed: found -1"),
        ({"seed": 2**63}, "seed: found 9223372036854775808"),
        ({"guidance_scale": float("nan")}, "guidance_scale: found nan, expected a finite number"),
        ({"guidance_scale": "4"}, "guidance_scale: found '4'"),
        ({"size": (64,)}, "size: found"),
        ({"size": (64, 10**9)}, "height: found 1000000000"),
        ({"dtype": "int8"}, "dtype: found 'int8', expected one of float32, float16, bfloat16"),
        ({"versions": {"torch": 2}}, "versions: found"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(GuidanceError, match=message):
        replace(RECIPE, **changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "JSON list, expected an object"),
        ("{}", r"lacks \['model', 'prompt'\]"),
        ('{"prompt": "a", "model": "b", "colour": 1}', r"unknown entries \['colour'\]"),
        ('{"prompt": "a", "model": "b", "guidance_scale": NaN}', "expected a finite number"),
        ('{"prompt": "a", "model": "b", "guidance_scale": 1e999}', "expected a finite number"),
        ('{"prompt": "a", "model": "b", "seed": ' + "9" * 5000 + "}", "seed|JSON"),
        ("[" * 60_000, "not valid JSON"),
        ('{"prompt": "' + "a" * MAX_CHUNK + '"}', f"expected at most {MAX_CHUNK}"),
    ],
)
def test_forged_json_is_refused(text, message):
    with pytest.raises(GuidanceError, match=message):
        Recipe.from_json(text)


def _png(path, text=None, **options):
    chunks = PngInfo()
    if text is not None:
        chunks.add_text(CHUNK, text, **options)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return path


def _chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_a_foreign_png_is_refused(tmp_path):
    with pytest.raises(GuidanceError, match="carries no guidancekit recipe"):
        read_recipe(_png(tmp_path / "foreign.png"))


def test_other_files_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.jpg")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("picture.jpg", "text.png", "empty.png"):
        with pytest.raises(GuidanceError, match=f"{name} is not a PNG"):
            read_recipe(tmp_path / name)
    with pytest.raises(GuidanceError, match="no such file"):
        read_recipe(tmp_path / "missing.png")
    with pytest.raises(GuidanceError, match="cannot be read"):
        read_recipe(tmp_path)


def test_every_truncation_of_a_png_is_refused(tmp_path):
    path = tmp_path / "whole.png"
    save_picture(Image.effect_noise((16, 16), 50).convert("RGB"), RECIPE, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(GuidanceError):
            read_recipe(path)


def test_every_flipped_byte_of_a_png_is_refused_or_harmless(tmp_path):
    path = tmp_path / "whole.png"
    save_picture(Image.new("RGB", (16, 16)), RECIPE, path)
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        try:
            assert read_recipe(path) == RECIPE  # a flipped bit behind the checksums' reach
        except GuidanceError as error:
            assert "whole.png" in str(error)


def test_a_decompression_bomb_is_refused(tmp_path):
    text = json.dumps(asdict(RECIPE) | {"prompt": "a" * 5_000_000})
    path = _png(tmp_path / "bomb.png", text, zip=True)
    assert path.stat().st_size < 10_000
    with pytest.raises(GuidanceError):
        read_recipe(path)


def test_a_huge_declared_size_is_not_allocated(tmp_path):
    header = struct.pack(">IIBBBBB", 2**30, 2**30, 8, 2, 0, 0, 0)
    text = CHUNK.encode() + b"\0" + RECIPE.to_json().encode()
    path = tmp_path / "huge.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"tEXt", text)
        + _chunk(b"IDAT", zlib.compress(b"\0"))
        + _chunk(b"IEND", b"")
    )
    with pytest.raises(GuidanceError, match="cannot be read"):
        read_recipe(path)


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as file:
        file.write(b"half of the new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_write_replaces_the_file(tmp_path):
    path = tmp_path / "new" / "picture.png"
    for content in (b"one", b"two"):
        with written_whole(path) as file:
            file.write(content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_free_path_never_names_an_existing_file(tmp_path):
    names = []
    for _ in range(3):
        path = free_path(tmp_path / "a.png")
        path.touch()
        names.append(path.name)
    assert names == ["a.png", "a-2.png", "a-3.png"]


def test_check_writable_makes_nothing_and_sees_a_file_in_the_way(tmp_path):
    check_writable(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(GuidanceError, match="is a file, expected a folder"):
        check_writable(tmp_path / "file" / "folder")
