"""A method's card: controls built from its signature, around the text that says it all.

The text, such as ``APG(scale=12) + SAG()``, is the one source of truth: the controls edit it, it is
what is run and copied, and who knows the notation types it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import gradio as gr

from .. import bundled
from ..describe import paragraphs
from ..editing import changed, joined, settings, terms_of, with_schedule
from ..errors import GuidanceError
from ..guidance import Guidance
from ..parameters import Parameter, parameters
from ..registry import create, methods, parse, schedules
from ..schedules import Schedule
from .show import escaped

NUMBER = "a number"  # in the menu of schedules
AUTO = "automatic"
QUIET: dict[str, Any] = {
    "concurrency_limit": None,  # beside any run; without a queue, states would not tell of changes
    "show_progress": "hidden",
    "api_visibility": "private",
}
Path = tuple[int | str, ...]
Allow = Callable[[str], None]


class Card:
    """One method: `text` says it, and `drawn` is the text that the controls were drawn for.

    Whoever sets the first from outside sets the second as well, and the controls follow.
    """

    def __init__(self, title: str, text: str) -> None:
        self.title = title
        self.drawn = gr.State(text)
        self.text = gr.Textbox(text, label=title, max_lines=1, elem_id=f"guidance-{title.lower()}")
        listen = [self.text.submit, self.text.blur]
        gr.on(listen, lambda text: text, self.text, self.drawn, **QUIET)

    def controls(self, app: gr.Blocks, model: gr.State, allow: Allow) -> None:
        """The controls, drawn anew whenever `drawn` changes; `allow` refuses texts."""
        draw = functools.partial(_draw, guidance=self.text, drawn=self.drawn, allow=allow)
        triggers = [app.load, self.drawn.change, model.change]
        given = [self.drawn, model]
        gr.render(given, triggers, queue=False, show_progress="hidden")(draw)


# --- edits: text in, text out ---------------------------------------------------------------------


def edit(text: str, path: Path, value: Any) -> str:
    """The guidance `text` with one parameter set to `value`; see `guidancekit.editing.changed`."""
    return repr(changed(parse(text), path, value))


def set_schedule(text: str, path: Path, name: str, family: str | None) -> str:
    """The guidance `text` with the scale at `path` under another schedule, or a plain number."""
    guidance = parse(text)
    owner: Any = terms_of(guidance)[int(path[0])]
    for step in path[1:]:
        owner = settings(owner)[str(step)]
    scale = with_schedule(owner, None if name == NUMBER else name, family)
    return repr(changed(guidance, path, scale))


def set_method(text: str, term: int, name: str, family: str | None) -> str:
    """The guidance `text` with another method in the place of a term, or after the last one."""
    terms = list(terms_of(parse(text)))
    terms[term : term + 1] = [create(name, family)]
    return repr(joined(terms))


def set_preset(text: str, term: int, name: str) -> str:
    """The guidance `text` with the published settings `name` of a term."""
    terms = list(terms_of(parse(text)))
    terms[term] = type(terms[term]).preset(name)
    return repr(joined(terms))


def remove(text: str, term: int) -> str:
    """The guidance `text` without one of its terms."""
    terms = list(terms_of(parse(text)))
    return repr(joined(terms[:term] + terms[term + 1 :]))


# --- controls -------------------------------------------------------------------------------------


def _draw(text: str, model: str, *, guidance: gr.Textbox, drawn: gr.State, allow: Allow) -> None:
    """The controls for `text`."""
    family = bundled.family(model)
    try:
        allow(text)
        terms = terms_of(parse(text))
    except GuidanceError as error:
        gr.Markdown(f"**This is no method:** {escaped(str(error))}")
        return

    def on(control: Any, event: str, change: Callable[..., str], redraw: bool = True) -> None:
        """Let an event of a control change the text: ``change(text, value)``.

        Controls are drawn anew if there will be others.
        """

        def handler(text: str, value: Any) -> Any:
            try:
                allow(f"{text} {value!r}")
                new = change(text, value)
            except (GuidanceError, TypeError) as error:
                gr.Warning(str(error))
                new = text
            return (new, new) if redraw else new

        control.interactive = True  # Gradio takes what has a value for a display
        outputs = [guidance, drawn] if redraw else guidance
        getattr(control, event)(handler, [guidance, control], outputs, **QUIET)

    for number, term in enumerate(terms):
        _draw_term(number, term, len(terms), family, on)
    more = gr.Dropdown(
        list(methods()), value=None, label="add a term", info="strategies add up", scale=1
    )
    on(more, "input", lambda text, name: set_method(text, len(terms), name, family))


def _draw_term(number: int, term: Guidance, of: int, family: str | None, on: Any) -> None:
    cls = type(term)
    with gr.Row():
        choice = gr.Dropdown(list(methods()), value=cls.name, label="method", min_width=140)
        on(choice, "input", lambda text, name: set_method(text, number, name, family))
        if cls.presets:
            preset = gr.Dropdown(
                list(cls.presets), value=None, label="published settings", min_width=140
            )
            on(preset, "input", lambda text, name: set_preset(text, number, name))
    gr.Markdown(_about(cls), elem_classes="about")
    for parameter in parameters(cls):
        path = (number, parameter.name)
        _draw_parameter(parameter, settings(term)[parameter.name], path, family, on)
    if of > 1:
        button = gr.Button(f"remove {cls.name}", size="sm", variant="secondary")
        on(button, "click", lambda text, _: remove(text, number))


def _draw_parameter(p: Parameter, value: Any, path: Path, family: str | None, on: Any) -> None:
    """The control for one parameter, and those of the schedule that stands for a scale."""
    set_value = functools.partial(_edited, path=path)
    if p.kind == "scale":
        kind = value.name if isinstance(value, Schedule) else NUMBER
        names = [NUMBER, *schedules()]
        menu = gr.Dropdown(names, value=kind, label=p.name, info=p.doc)
        on(menu, "input", lambda text, name: set_schedule(text, path, name, family))
        if isinstance(value, Schedule):
            inner = settings(value)
            for each in parameters(type(value)):
                _draw_parameter(each, inner[each.name], (*path, each.name), family, on)
            return
    if p.kind in ("float", "int", "scale"):
        _draw_number(p, value, path, on)
    elif p.kind == "bool":
        box = gr.Checkbox(value, label=p.name, info=p.doc)
        on(box, "input", set_value, redraw=False)
    elif p.kind == "choice":
        menu = gr.Dropdown(list(p.choices), value=value, label=p.name, info=p.doc)
        on(menu, "input", set_value, redraw=False)
    elif p.kind == "floats":
        shown = "" if value is None else ", ".join(f"{each:g}" for each in value)
        box = gr.Textbox(shown, label=p.name, info=f"{p.doc} (numbers between commas)")
        on(box, "submit", lambda text, line: edit(text, path, _numbers(line)), redraw=False)
        on(box, "blur", lambda text, line: edit(text, path, _numbers(line)), redraw=False)
    elif p.kind == "str" or value is None or isinstance(value, str):
        box = gr.Textbox(value or "", label=p.name, info=p.doc)
        on(box, "submit", lambda text, line: edit(text, path, line or None), redraw=False)
        on(box, "blur", lambda text, line: edit(text, path, line or None), redraw=False)
    else:
        gr.Markdown(f"`{p.name}`: {escaped(repr(value))}")


def _draw_number(p: Parameter, value: Any, path: Path, on: Any) -> None:
    set_value = functools.partial(_edited, path=path)
    whole = p.kind == "int"
    if p.optional:
        what = "the scale of the run" if p.kind == "scale" else AUTO
        about = None if p.kind == "scale" else p.doc
        box = gr.Checkbox(value is None, label=f"{p.name}: {what}", info=about)
        start = _start(p)
        on(box, "input", lambda text, auto: edit(text, path, None if auto else start))
        if value is None:
            return
    low, high = p.slider or (p.low, p.high)
    if math.isfinite(low) and math.isfinite(high):
        low, high = min(low, value), max(high, value)
        step = 1 if whole else 0.01 if high - low <= 5 else 0.1
        slider = gr.Slider(low, high, value, step=step, label=p.name, info=p.doc)
        on(slider, "input", set_value, redraw=False)
    else:
        number = gr.Number(value, precision=0 if whole else None, label=p.name, info=p.doc)
        on(number, "input", set_value, redraw=False)


def _edited(text: str, value: Any, path: Path) -> str:
    return edit(text, path, value)


def _start(p: Parameter) -> float:
    """What an automatic parameter is set to when it is taken in hand."""
    if p.kind == "scale":
        return 5.0
    low, high = p.slider or (p.low, p.high)
    middle = (low + high) / 2 if math.isfinite(low + high) else max(low, min(high, 1.0))
    return round(middle) if p.kind == "int" else round(middle, 2)


def _numbers(line: str) -> list[float] | None:
    try:
        return [float(part) for part in line.split(",") if part.strip()]
    except ValueError:
        raise GuidanceError(f"found {line!r}, expected numbers between commas.") from None


def _about(cls: type[Guidance]) -> str:
    """The first sentence of a method, and its paper."""
    summary = paragraphs(cls)[0]
    link = cls.paper.removeprefix("arXiv:")
    paper = f" [{cls.paper}](https://arxiv.org/abs/{link})" if link != cls.paper else ""
    return escaped(summary) + paper
