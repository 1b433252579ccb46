"""The page: one form, which changes with the task, the result beside it, and earlier results below."""

# Without `from __future__ import annotations`: Gradio reads the annotations of the functions below.

import asyncio
import functools
import logging
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisora_jax.diffusion.sampler import SAMPLER_NAMES
from minisora_jax.jobs.job import SIDES
from minisora_jax.ui import examples, show
from minisora_jax.ui.form_fields import FILES, FORMS, GROWN
from minisora_jax.ui.forms import JobSpec, job_spec
from minisora_jax.ui.gallery import Gallery
from minisora_jax.ui.job_queue import JobQueue
from minisora_jax.ui.uploads import InvalidInput, display_name, validate_upload

log = logging.getLogger("minisora")

if TYPE_CHECKING:
    import gradio

SIZES = ("auto", "32x32", "48x48", "48x64", "64x64", "64x96", "256x256", "480x832", "1024x1024", "2048x2048")
REFRESH_EVERY = 0.4  # seconds between two looks at a ticket
SHOWN = 24  # results in the gallery
TASKS = [(form.title, name) for name, form in FORMS.items()]


def build(queue: JobQueue, gallery: Gallery, incoming: Path, drawn: Path) -> "gradio.Blocks":
    """The page.

    Args:
        incoming: the folder in which Gradio stores uploads.
        drawn: a folder within it for the files of examples.
    """
    import gradio as gr

    examples.draw(drawn)
    validate = functools.partial(validate_upload, come_from=incoming, folder=gallery.uploads)

    with gr.Blocks(title="minisora", analytics_enabled=False) as page:
        ticket = gr.State(None)
        gr.HTML(
            "<div id='title'><h1>minisora</h1><p>Videos and images from prompts, pictures and other videos.</p></div>"
        )
        task = gr.Radio(TASKS, value="text_to_video", show_label=False, container=False, elem_id="task")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=340):
                hint = gr.HTML(_hint("text_to_video"))
                prompt = FORMS["text_to_video"].examples[0][0]
                inputs: dict[str, Any] = {"prompt": gr.Textbox(label="Prompt", lines=2, value=prompt, elem_id="prompt")}
                prompts = gr.HTML(_examples("text_to_video"), elem_id="examples", js_on_load=show.ON_EXAMPLES)
                checks = {}
                for name, (_, label) in FILES.items():
                    inputs[name] = gr.File(label=label, height=110, visible=False, elem_id=name)
                    _require_uploaded(inputs[name], incoming)
                    checks[name] = gr.HTML("", elem_id=f"{name}-check", visible=False)
                inputs["strength"] = gr.Slider(0.05, 1, 0.6, step=0.05, label="Strength", visible=False)
                inputs["side"] = gr.Radio(SIDES, value="forward", label="Direction", visible=False, elem_id="side")
                inputs["grow"] = gr.Dropdown(list(GROWN), value="1.5 times", label="Frame size", visible=False)
                with gr.Row():
                    inputs["length"] = gr.Textbox(
                        label="Length", value="17 frames", placeholder="2 s, or 17 frames", elem_id="length"
                    )
                    inputs["size"] = gr.Dropdown(
                        SIZES, value="auto", label="Size", allow_custom_value=True, elem_id="size"
                    )
                    inputs["seed"] = gr.Number(0, precision=0, label="Seed", elem_id="seed", minimum=0)
                with gr.Accordion("More", open=False, elem_id="more"):
                    inputs["negative"] = gr.Textbox(label="Negative prompt", placeholder="none")
                    with gr.Row():
                        inputs["steps"] = gr.Number(20, precision=0, label="Steps", elem_id="steps")
                        inputs["guidance"] = gr.Number(3.0, label="Guidance")
                        inputs["fps"] = gr.Textbox(
                            label="Frames per second", max_lines=1, placeholder="as the input, or 8"
                        )
                        inputs["sampler"] = gr.Dropdown(list(SAMPLER_NAMES), value="heun", label="Sampler")
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", elem_id="generate", scale=3)
                    stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=80)
            with gr.Column(scale=6, min_width=360, elem_id="right"):
                result = gr.HTML(show.EMPTY, elem_id="result")
        gr.Markdown("### Results")
        shelf = gr.HTML(show.gallery([]), elem_id="gallery", js_on_load=show.ON_GALLERY)
        gr.HTML("<p class='foot'>Everyone who can open this page sees all results, with their prompts and records."
                "</p>")  # fmt: skip

        def on_task(task: str, prompt: str) -> list[Any]:
            """Show the inputs, the default length and the examples of a task."""
            form = FORMS[task]
            shown = [gr.update(visible=name in form.needs) for name in (*FILES, *FILES, "strength", "side", "grow")]
            placeholder = "2 s, or 17 frames" if form.length else "the whole video"
            length = gr.update(value=form.length, placeholder=placeholder, visible=task != "text_to_image")
            untouched = any(prompt == example for form in FORMS.values() for example, _ in form.examples)
            return [_hint(task), _examples(task), *shown, length, form.examples[0][0] if untouched else gr.skip()]

        def on_example(task: str, event: gr.EventData) -> list[Any]:
            """Fill in the prompt and the files of an example."""
            number = event._data.get("number")
            prompt, files = FORMS[task].examples[number if number in range(len(FORMS[task].examples)) else 0]
            paths = examples.draw(drawn).get(files, {})
            return [prompt, *(paths.get(name) for name in FILES)]

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        needs = [*(inputs[n] for n in FILES), *checks.values(), *(inputs[n] for n in ("strength", "side", "grow"))]
        filled = [inputs["prompt"], *(inputs[name] for name in FILES)]
        changes = [hint, prompts, *needs, inputs["length"], inputs["prompt"]]
        task.change(on_task, [task, inputs["prompt"]], changes, **quiet)
        prompts.select(on_example, [task], filled, **quiet)

        def on_file(kind: str, path: str | None) -> str:
            """Check an uploaded file, and show it or what is wrong with it."""
            if not path:
                return ""
            try:
                return show.upload(validate(path, kind))
            except Exception as error:
                return show.upload(_sentence(error))

        for name, (kind, _) in FILES.items():
            inputs[name].change(functools.partial(on_file, kind), [inputs[name]], [checks[name]],
                                concurrency_limit=2, **quiet)  # fmt: skip

        names = list(inputs)

        async def on_generate(request: gr.Request, task: str, *values: Any):
            make_spec = functools.partial(job_spec, queue.pipeline, task, dict(zip(names, values)), validate)
            async for shown in follow(request, make_spec):
                yield shown

        async def on_reproduce(event: gr.EventData, request: gr.Request):
            make_spec = functools.partial(queue.reproduction, str(event._data.get("name")))
            async for shown in follow(request, make_spec):
                yield shown

        async def follow(request: gr.Request, make_spec: Callable[[], JobSpec]) -> AsyncIterator[tuple[Any, Any, Any]]:
            """Submit a job, and show its progress until it is over."""
            try:
                mine = queue.submit(await asyncio.to_thread(make_spec), request.session_hash or "")
            except Exception as error:
                yield show.error(_sentence(error)), gr.skip(), gr.skip()
                return
            yield show.ticket(mine, queue.jobs_ahead(mine)), mine.name, gr.skip()
            last = ""
            while not mine.over:
                await asyncio.sleep(REFRESH_EVERY)
                now = show.ticket(mine, queue.jobs_ahead(mine))
                if now != last and not mine.over:
                    last = now
                    yield now, gr.skip(), gr.skip()
            yield show.ticket(mine, 0), None, show.gallery(gallery.items(SHOWN))

        outputs = [result, ticket, shelf]
        fields = [task, *inputs.values()]
        generate.click(
            on_generate, fields, outputs, api_name="generate", concurrency_limit=None, show_progress="hidden"
        )
        inputs["prompt"].submit(on_generate, fields, outputs, concurrency_limit=None, **quiet)
        shelf.select(on_reproduce, None, outputs, concurrency_limit=None, **quiet)
        stop.click(queue.stop_named, [ticket], None, **quiet)
        page.load(lambda: show.gallery(gallery.items(SHOWN)), None, shelf, **quiet)

        def on_leave(request: gr.Request) -> None:
            queue.leave(request.session_hash or "")

        page.unload(on_leave)
    return page


def _sentence(error: Exception) -> str:
    """The sentence for a visitor; what is the server's own fault goes to its log."""
    if isinstance(error, InvalidInput):
        return str(error)
    log.error("a form could not be read", exc_info=error)
    return f"the server had an error ({type(error).__name__}), which is in its log: try another file or prompt"


def _hint(task: str) -> str:
    return f"<p class='hint'>{FORMS[task].hint}</p>"


def _examples(task: str) -> str:
    return show.examples([prompt for prompt, _ in FORMS[task].examples])


def _require_uploaded(file: "gradio.File", incoming: Path) -> None:
    """Keep Gradio from fetching a file or URL that a request names and that was not uploaded."""
    fetch = file.async_move_resource_to_block_cache

    async def checked(url_or_file_path: str | Path | None) -> str | None:
        path = url_or_file_path
        uploaded = path is None or Path(os.path.realpath(path)).is_relative_to(incoming)
        if path is not None and not (uploaded and os.path.isfile(path)):
            raise ValueError(f"{display_name(str(path))} was not uploaded here: choose it again")
        return await fetch(path)

    file.async_move_resource_to_block_cache = checked
