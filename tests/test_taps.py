"""The attention tap on transformers of every family: what it sees, where, and what it leaves."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import tiny_transformers as families
import torch
from diffusers.models.attention_processor import Attention
from tiny import tiny_sd
from tiny_transformers import FRAMES, HEIGHT, IMAGE_ALONE, JOINT, WIDTH, moved, noise

from guidancekit import GuidanceError
from guidancekit.engine.layers import around, tapped
from guidancekit.methods.slg import bypass, is_block

BRANCHES = ("cond",)
REFINED = [families.lumina2, families.z_image]  # the image has attended to itself before the text
TEXT_BEHIND = [families.sd3, families.hunyuan_video, families.z_image]


def name_of(value):
    return getattr(value, "__name__", None)


def tapping(tiny, layers, tap, text=False):
    return tapped(tiny.network, tiny.grid, lambda: BRANCHES, layers, tap, text)


def unchanged(q, k, v, attend, place):
    return attend(q, k, v)


def seen(tiny, layers, **changes):
    """The values and the place of the one attention call of a layer."""
    found = []

    def tap(q, k, v, attend, place):
        found.append((v, place))
        return attend(q, k, v)

    with tapping(tiny, layers, tap):
        tiny(**changes)
    assert len(found) == 1
    return found[0]


def tokens_that_differ(v, w):
    """Which tokens of two [rows, heads, tokens, width] are not the same."""
    return torch.nonzero((v - w).abs().amax(dim=(0, 1, 3)) > 1e-6).flatten().tolist()


# --- where the image is --------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*IMAGE_ALONE, *JOINT], ids=name_of)
def test_place_holds_the_image_and_nothing_else(family):
    tiny = family()
    v, place = seen(tiny, tiny.first)
    assert place.grid == tiny.tokens
    image = range(v.shape[2])[place.image]
    assert len(image) == torch.tensor(tiny.tokens).prod()
    assert place.tokens == v.shape[2] and place.joint == (family in JOINT)
    if family is families.dit:
        return  # its condition is no text
    by_text = tokens_that_differ(v, seen(tiny, tiny.first, **tiny.other_text())[0])
    assert not set(by_text) & set(image) and bool(by_text) == place.joint
    if place.joint:
        assert (max(by_text) < image[0]) == (family not in TEXT_BEHIND)


@pytest.mark.parametrize("family", [*IMAGE_ALONE, *JOINT], ids=name_of)
def test_an_image_token_lies_at_its_row_and_column(family):
    tiny = family()
    layer = tiny.first.replace("layers", "noise_refiner") if family in REFINED else tiny.first
    v, place = seen(tiny, layer)
    height, width = place.grid[-2:]
    for row, column, frame in ((0, 1, 0), (2, 0, 0), (3, 3, FRAMES - 1)):
        frame = frame if len(place.grid) == 3 else 0
        moved_v, _ = seen(tiny, layer, **moved(tiny, row, column, frame))
        at = place.image.start + (frame * height + row) * width + column
        assert tokens_that_differ(v, moved_v) == [at]


@pytest.mark.parametrize(
    ("family", "singles"),
    [
        (families.flux, "single_transformer_blocks"),
        (families.flux2, "single_transformer_blocks"),
        (families.chroma, "single_transformer_blocks"),
        (families.hunyuan_video, "single_transformer_blocks"),
        (families.auraflow, "single_transformer_blocks"),
    ],
    ids=name_of,
)
def test_single_stream_blocks_hold_both(family, singles):
    """With the double-stream blocks taken out, a token enters the first single one untouched."""
    tiny = family()
    doubles = tiny.first.rpartition(".")[0].rpartition(".")[0]
    layer = f"{singles}.0.attn"
    with around(tiny.network, is_block, bypass, layers=doubles):
        v, place = seen(tiny, layer)
        moved_v, _ = seen(tiny, layer, **moved(tiny, 2, 3))
    assert place.joint and place.grid == tiny.tokens
    assert tokens_that_differ(v, moved_v) == [place.image.start + 2 * WIDTH + 3]
    assert seen(tiny, layer)[1] == place


@pytest.mark.parametrize("family", [families.flux, families.flux2, families.qwen], ids=name_of)
def test_reference_images_are_not_the_image(family):
    plain, edit = family(), family(references=True)
    layers = [plain.first]
    if hasattr(plain.network, "single_transformer_blocks"):
        layers.append("single_transformer_blocks.1.attn")
    for layer in layers:
        place, with_references = seen(plain, layer)[1], seen(edit, layer)[1]
        assert with_references.image == place.image and with_references.grid == place.grid
        assert with_references.tokens > place.tokens


def test_a_unet_has_another_grid_in_each_layer():
    pipe, grids = tiny_sd(), {}
    x, text = noise(2, 4, 8, 12), noise(2, 5, 16)

    def tap(q, k, v, attend, place):
        grids[place.tokens] = place.grid
        assert not place.joint
        return attend(q, k, v)

    with tapped(pipe.unet, (8, 12), lambda: BRANCHES, "", tap):
        pipe.unet(x, 500, text)
    assert grids == {24: (4, 6)}
    more = tiny_sd()
    more.unet.config["patch_size"] = None  # a UNet's configuration may name one
    with tapped(more.unet, (8, 12), lambda: BRANCHES, "mid", tap):
        more.unet(x, 500, text)


def test_an_unknown_network_with_joint_attention_is_refused():
    tiny = families.flux()
    known = type(tiny.network)
    tiny.network.__class__ = type("Heir", (known,), {})
    assert seen(tiny, tiny.first)[1].image.start == families.TEXTS  # known by its base class
    known.__name__ = "Stranger"
    try:
        with pytest.raises(GuidanceError, match="does not know where"):
            seen(tiny, tiny.first)
    finally:
        known.__name__ = "FluxTransformer2DModel"


def test_several_images_between_texts_are_refused():
    """As Z-Image Omni has them, with the same class of network."""
    tiny = families.z_image()
    tiny.network.register_to_config(siglip_feat_dim=8)
    with pytest.raises(GuidanceError, match="does not know where"):
        seen(tiny, tiny.first)


def test_a_grid_that_does_not_fit_is_an_error():
    tiny = families.pixart()
    with (
        pytest.raises(GuidanceError, match="24 tokens"),
        tapped(tiny.network, (16, 16), lambda: BRANCHES, "mid", unchanged),
    ):
        tiny()


def test_texts_of_different_lengths_in_one_batch():
    """Lumina 2 puts the image right behind each row's own text."""
    seen(families.lumina2(lengths=(3, 3)), "layers.0")
    with pytest.raises(GuidanceError, match="different lengths"):
        seen(families.lumina2(lengths=(3, 5)), "layers.0")


# --- the tap leaves things as they are -----------------------------------------------------------


@pytest.mark.parametrize("family", [*IMAGE_ALONE, *JOINT], ids=name_of)
def test_a_tap_that_attends_changes_nothing(family):
    tiny = family()
    plain, calls = tiny(), 0

    def tap(q, k, v, attend, place):
        nonlocal calls
        calls += 1
        return attend(q, k, v)

    before = [dict(vars(module)) for module in tiny.network.modules()]
    with tapping(tiny, "", tap):
        assert torch.equal(tiny(), plain)
    blocks = sum(is_block("", module) for module in tiny.network.modules())
    context = sum(
        "context_refiner" in name for name, m in tiny.network.named_modules() if is_block("", m)
    )
    dual = sum(
        getattr(m, "attn2", None) is not None
        for m in tiny.network.modules()
        if family is families.sd3
    )
    assert calls == blocks - context + dual
    assert [dict(vars(module)) for module in tiny.network.modules()] == before
    assert torch.equal(tiny(), plain)


CROSS = [f for f in IMAGE_ALONE if f is not families.dit] + [families.sana]


@pytest.mark.parametrize("family", CROSS, ids=name_of)
def test_cross_attention_to_the_text_is_seen_apart(family):
    tiny = family()
    plain, keys = tiny(), []

    def tap(q, k, v, attend, place):
        keys.append((q.shape[2], k.shape[2]))
        assert not place.joint
        return attend(q, k, v)

    with tapping(tiny, "", tap, text=True):
        assert torch.equal(tiny(), plain)
    texts = 2 * families.TEXTS if family is families.hunyuan_dit else families.TEXTS  # and T5's
    blocks = 4 if family is families.hunyuan_dit else 2
    assert keys == [(int(torch.tensor(tiny.tokens).prod()), texts)] * blocks


def test_cross_attention_to_the_image_of_an_adapter_is_not_the_texts():
    tiny, keys = families.wan(from_image=True), []

    def tap(q, k, v, attend, place):
        keys.append(k.shape[2])
        return attend(q, k, v)

    with tapping(tiny, "", tap, text=True):
        tiny()
    assert keys == [512, 512]


def test_layout_and_scale_are_the_same_for_both_kinds_of_processors():
    """[rows, heads, tokens, width], whichever function the processor calls, in which order."""
    for tiny in (families.sd3(), families.flux()):

        def by_hand(q, k, v, attend, place):
            assert q.shape == (2, 2, HEIGHT * WIDTH + families.TEXTS, 8)
            assert attend.mask is None
            scores = torch.softmax(q @ k.transpose(-1, -2) * attend.scale, dim=-1)
            torch.testing.assert_close(scores @ v, attend(q, k, v), atol=1e-5, rtol=1e-4)
            return scores @ v

        plain = tiny()
        with tapping(tiny, tiny.first, by_hand):
            torch.testing.assert_close(tiny(), plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [families.flux, families.wan, families.sd3], ids=name_of)
def test_fused_projections_and_lora(family):
    from peft import LoraConfig

    # Diffusers' fused processor does not serve the dual blocks of SD3.5.
    options = {"dual": False} if family is families.sd3 else {}
    tiny = family(**options)
    tiny.network.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    with_lora, values = tiny(), []

    def tap(q, k, v, attend, place):
        values.append(v)
        return attend(q, k, v)

    with tapping(tiny, tiny.first, tap):
        assert torch.equal(tiny(), with_lora)
    tiny.network.disable_adapters()
    assert not torch.allclose(values[0], seen(tiny, tiny.first)[0])
    plain = family(**options)
    plain.network.fuse_qkv_projections()
    fused = plain()
    with tapping(plain, plain.first, unchanged):
        assert torch.equal(plain(), fused)


def test_taps_stack_the_first_one_next_to_the_layer():
    for tiny in (families.flux(), families.sd3()):
        order = []

        def tap(name, order=order):
            def look(q, k, v, attend, place):
                order.append(name)
                return attend(q, k, v)

            return look

        with tapping(tiny, tiny.first, tap("one")), tapping(tiny, tiny.first, tap("two")):
            tiny()
        assert order == ["one", "two"]


def test_an_exception_takes_the_tap_off():
    for tiny in (families.flux(), families.sd3()):
        plain = tiny()

        def fail(*args):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), tapping(tiny, "", fail):
            tiny()
        assert torch.equal(tiny(), plain)
        with tapping(tiny, "", unchanged):  # and none is left running
            assert torch.equal(tiny(), plain)


# --- layers by name ------------------------------------------------------------------------------


def layers_seen(tiny, layers):
    found = []

    def wrapper(layer, *args, **kwargs):
        found.append(layer.module)
        return layer(*args, **kwargs)

    with around(tiny.network, lambda name, m: isinstance(m, Attention), wrapper, layers):
        tiny()
    names = {module: name for name, module in tiny.network.named_modules()}
    return [names[module] for module in found]


def test_a_name_is_one_block_and_not_its_namesakes():
    tiny = families.sd3(dual=False, layers=12)
    assert layers_seen(tiny, "transformer_blocks.1") == ["transformer_blocks.1.attn"]
    assert layers_seen(tiny, "transformer_blocks.11, transformer_blocks.1") == [
        "transformer_blocks.1.attn",
        "transformer_blocks.11.attn",
    ]
    assert layers_seen(tiny, "mid") == ["transformer_blocks.6.attn"]


@pytest.mark.parametrize("layers", ["blocks.1", "transformer_blocks.99", "attn7"])
def test_names_without_a_layer_are_an_error(layers):
    tiny = families.sd3()
    for names in (layers, f"transformer_blocks.0, {layers}"):
        with (
            pytest.raises(GuidanceError, match=f"no layer '{layers}'"),
            tapping(tiny, names, unchanged),
        ):
            tiny()


@pytest.mark.parametrize("family", [families.wan, families.pixart], ids=name_of)
def test_cross_attention_is_no_self_attention(family):
    tiny = family()
    block = tiny.first.rpartition(".")[0]
    with pytest.raises(GuidanceError, match="no layer"), tapping(tiny, f"{block}.attn2", unchanged):
        tiny()


def test_attention_that_cannot_be_seen_is_an_error():
    tiny = families.sana()  # linear attention
    with pytest.raises(GuidanceError, match="linear attention"), tapping(tiny, "mid", unchanged):
        tiny()


# --- torch.compile -------------------------------------------------------------------------------


class Counting:
    """A backend that runs the graphs as they are, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def identity_and_text(q, k, v, attend, place):
    """A tap that needs the place and changes the result."""
    out = attend(q, k, v)
    return torch.cat(
        [out[:, :, : place.image.start], v[:, :, place.image], out[:, :, place.image.stop :]], dim=2
    )


@pytest.mark.parametrize(
    ("family", "whole"),
    [(families.flux, True), (families.sd3, True), (families.wan, False)],
    ids=["flux", "sd3", "wan, by its repeated blocks"],
)
def test_compiled_networks(family, whole):
    """Full graphs, equal to eager ones, compiled once with the tap and once without."""
    tiny, backend = family(), Counting()
    plain = tiny()
    with tapping(tiny, "mid", identity_and_text):
        expected = tiny()
    assert not torch.allclose(plain, expected, atol=1e-4)
    torch.compiler.reset()
    compiled = tiny.network
    if whole:
        compiled = torch.compile(tiny.network, backend=backend, fullgraph=True)
    else:
        for module in tiny.network.modules():
            if is_block("", module):
                module.compile(backend=backend, fullgraph=True)
    counts = []
    with ExitStack() as stack:
        stack.callback(torch.compiler.reset)
        for _ in range(3):
            with torch.no_grad(), tapping(tiny, "mid", identity_and_text):
                out = compiled(**tiny.inputs, return_dict=False)[0]
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
            with torch.no_grad():
                out = compiled(**tiny.inputs, return_dict=False)[0]
            torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-4)
            counts.append(backend.graphs)
    assert counts[0] == counts[1] == counts[2], "compiled again in every step"
