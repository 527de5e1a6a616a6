"""The settings of a run that belong to no method, the model, and recipes to load."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ..errors import GuidanceError
from ..loading import SCHEDULERS, default_scale
from ..recipe import Recipe
from ..studio import Studio
from . import checks
from .controls import Card
from .show import status

MODEL_OWN = "the model's own"


class Settings:
    """The left column; `recipe` makes a checked recipe of what it says."""

    def __init__(self, studio: Studio, prompt: str, scale: float) -> None:
        self.studio = studio
        self.model = gr.State(studio.model)
        self.prompt = gr.Textbox(
            prompt,
            label="Prompt",
            max_length=checks.MAX_PROMPT,
            lines=1,
            max_lines=1,
            elem_id="prompt",
            placeholder="what to draw; Enter generates",
        )
        with gr.Row(elem_classes="actions"):
            self.go = gr.Button("Generate", variant="primary", elem_id="generate", min_width=120)
            self.halt = gr.Button("Stop", interactive=False, elem_id="stop", min_width=80)
        self.negative = gr.Textbox(
            label="Negative prompt",
            max_length=checks.MAX_PROMPT,
            lines=1,
            placeholder="what to guide away from",
        )
        self.scale = gr.Slider(
            1,
            20,
            scale,
            step=0.1,
            label="Scale of the run",
            info="for methods that have none of their own; 1 is no guidance",
            elem_id="scale",
        )
        self.steps = gr.Slider(1, checks.MAX_STEPS, 30, step=1, label="Steps", elem_id="steps")
        with gr.Row():
            self.seed = gr.Number(
                0, label="Seed", precision=0, minimum=0, min_width=100, elem_id="seed"
            )
            self.lock = gr.Checkbox(True, label="keep the seed", min_width=100)
        with gr.Accordion("Scheduler and size", open=False):
            self.scheduler = gr.Dropdown(
                [MODEL_OWN, *SCHEDULERS], value=MODEL_OWN, label="Scheduler"
            )
            with gr.Row():
                self.width = gr.Number(None, label="Width", precision=0, min_width=100)
                self.height = gr.Number(None, label="Height", precision=0, min_width=100)
            gr.Markdown("Empty: the size that the model was made for.", elem_classes="about")
        with gr.Accordion("Model", open=False):
            self.name = gr.Dropdown(
                studio.models,
                value=studio.model,
                label="Model",
                info="embedded, or a Diffusers folder or Hub id with safetensors weights",
                allow_custom_value=not studio.public,
                elem_id="model",
            )
            self.load = gr.Button("Load", size="sm", elem_id="load")
            self.loaded = gr.HTML(status(f"{studio.model} is in use."), elem_id="loaded")
        with gr.Accordion("Load a recipe", open=False):
            self.file = gr.File(
                label="a picture made here, or its JSON",
                file_types=[".png", ".json"],
                height=120,
                elem_id="recipe",
            )
        self.load.click(
            checks.readable(self._load),
            self.name,
            [self.model, self.scale, self.loaded],
            concurrency_id="model",
            concurrency_limit=1,
            show_progress="hidden",
            api_name="load",
        )

    @property
    def inputs(self) -> list[Any]:
        """What `recipe` takes after the guidance, in its order."""
        return [
            self.model,
            self.prompt,
            self.negative,
            self.scale,
            self.seed,
            self.steps,
            self.scheduler,
            self.width,
            self.height,
        ]

    def recipe(self, guidance: str, *values: Any) -> Recipe:
        """The recipe of a method and the values of `inputs`, all of them checked."""
        model, prompt, negative, scale, seed, steps, scheduler, width, height = values
        size = None
        if width or height:
            size = (
                checks.whole("width", width, 8, checks.MAX_SIDE),
                checks.whole("height", height, 8, checks.MAX_SIDE),
            )
        if not checks.text("prompt", prompt, checks.MAX_PROMPT).strip():
            raise GuidanceError("the prompt is empty: say what to draw.")
        own = scheduler in (None, "", MODEL_OWN)
        return self.studio.recipe(
            model=checks.text("model", model, checks.MAX_NAME),
            prompt=prompt,
            negative=checks.text("negative prompt", negative or "", checks.MAX_PROMPT),
            guidance=checks.text("method", guidance, checks.MAX_METHOD),
            guidance_scale=checks.number("scale", scale, 0, checks.MAX_SCALE),
            seed=checks.whole("seed", seed, 0, checks.MAX_SEED),
            steps=checks.whole("steps", steps, 1, checks.MAX_STEPS),
            scheduler=None if own else checks.text("scheduler", scheduler, checks.MAX_NAME),
            size=size,
        )

    def connect(self, card: Card, told: gr.HTML) -> None:
        """Let a recipe that is loaded set all controls, and a method's card."""
        self.file.upload(
            checks.readable(self._read),
            self.file,
            [*self.inputs, self.name, card.text, card.drawn, told],
            show_progress="hidden",
            api_name="load_recipe",
        )

    def _read(self, path: str | None) -> list[Any]:
        recipe = checks.recipe_in(path)
        if self.studio.public and recipe.model not in self.studio.models:
            raise GuidanceError(f"the recipe is for {recipe.model!r}, which is not served here.")
        scale = recipe.guidance_scale
        return [
            recipe.model,
            recipe.prompt,
            recipe.negative,
            _scale_of(recipe.model) if scale is None else scale,
            recipe.seed,
            recipe.steps,
            recipe.scheduler or MODEL_OWN,
            *(recipe.size or (None, None)),
            recipe.model,
            recipe.guidance,
            recipe.guidance,
            status("The recipe is loaded; its method is A. Press Generate."),
        ]

    def _load(self, name: Any) -> Iterator[Any]:
        name = checks.text("model", name, checks.MAX_NAME).strip()
        yield gr.skip(), gr.skip(), status(f"Loading {name} ...", busy=True)
        try:
            self.studio.load(name)
        except GuidanceError as error:
            yield (
                gr.skip(),
                gr.skip(),
                status(f"{error} The model before stays in use.", alert=True),
            )
            return
        yield name, _scale_of(name), status(f"{name} is in use.")


def _scale_of(model: str) -> float:
    return default_scale(model) or 7.5
