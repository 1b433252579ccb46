"""The page: one form, which changes with what is to be made, the result beside it, and what was made below."""

import asyncio
import functools
import os
from pathlib import Path

from minisora_jax.diffusion.sampler import SAMPLER_NAMES
from minisora_jax.jobs.job import SIDES
from minisora_jax.ui import examples, show
from minisora_jax.ui.forms import FILES, FORMS, GROWN, spec
from minisora_jax.ui.gallery import Gallery
from minisora_jax.ui.job_queue import JobQueue
from minisora_jax.ui.uploads import InvalidInput, called, validate_upload

SIZES = ("auto", "32x32", "48x48", "48x64", "64x64", "64x96", "256x256", "480x832", "1024x1024", "2048x2048")
LOOK_EVERY = 0.4  # seconds, at a ticket
SHOWN = 24  # results below
TASKS = [(form.title, name) for name, form in FORMS.items()]


def build(line: JobQueue, gallery: Gallery, incoming: Path):
    """The gradio.Blocks. incoming: the folder into which Gradio puts what browsers send."""
    import gradio as gr

    examples.draw(incoming / "examples")
    validate = functools.partial(validate_upload, come_from=incoming, folder=gallery.uploads)

    with gr.Blocks(title="minisora", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        ticket = gr.State(None)
        gr.HTML(
            "<div id='title'><h1>minisora</h1><p>Videos and images from words, pictures and other videos.</p></div>"
        )
        task = gr.Radio(TASKS, value="words", show_label=False, container=False, elem_id="verb")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=340):
                hint = gr.HTML(_hint("words"))
                inputs = {"prompt": gr.Textbox(label="What is to be seen", lines=2, value=FORMS["words"].examples[0][0],
                                               elem_id="prompt")}  # fmt: skip
                tries = gr.HTML(_examples("words"), elem_id="examples", js_on_load=show.ON_EXAMPLES)
                seen = {}
                for name, (_, label) in FILES.items():
                    inputs[name] = gr.File(label=label, height=110, visible=False, elem_id=name)
                    _only_sent(inputs[name], incoming)
                    seen[name] = gr.HTML("", elem_id=f"{name}-seen", visible=False)
                inputs["strength"] = gr.Slider(0.05, 1, 0.6, step=0.05, label="Strength", visible=False)
                inputs["side"] = gr.Radio(SIDES, value="forward", label="Which side", visible=False, elem_id="side")
                inputs["grow"] = gr.Dropdown(list(GROWN), value="half as large again", label="Frame", visible=False)
                with gr.Row():
                    inputs["length"] = gr.Textbox(
                        label="How long", value="17 frames", placeholder="2 s, or 17 frames", elem_id="length"
                    )
                    inputs["size"] = gr.Dropdown(
                        SIZES, value="auto", label="Size", allow_custom_value=True, elem_id="size"
                    )
                    inputs["seed"] = gr.Number(0, precision=0, label="Seed", elem_id="seed", minimum=0)
                with gr.Accordion("More", open=False, elem_id="more"):
                    inputs["negative"] = gr.Textbox(label="What it should not be", placeholder="none")
                    with gr.Row():
                        inputs["steps"] = gr.Number(20, precision=0, label="Steps", elem_id="steps")
                        inputs["guidance"] = gr.Number(3.0, label="Guidance")
                        inputs["fps"] = gr.Textbox(
                            label="Frames a second", max_lines=1, placeholder="as the input, or 8"
                        )
                        inputs["sampler"] = gr.Dropdown(list(SAMPLER_NAMES), value="heun", label="Sampler")
                with gr.Row():
                    make = gr.Button("Make", variant="primary", elem_id="make", scale=3)
                    stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=80)
            with gr.Column(scale=6, min_width=360, elem_id="right"):
                result = gr.HTML(show.NOTHING, elem_id="result")
        gr.Markdown("### Made here")
        shelf = gr.HTML(show.gallery([]), elem_id="gallery", js_on_load=show.ON_GALLERY)
        gr.HTML("<p class='foot'>Everybody who can open this page sees what was made, with its words and its record."
                "</p>")  # fmt: skip

        def changed(task, prompt):
            """Another thing is to be made: its inputs, its length, its examples."""
            form = FORMS[task]
            shown = [gr.update(visible=name in form.needs) for name in (*FILES, *FILES, "strength", "side", "grow")]
            length = gr.update(value=form.length, placeholder="all of it" if not form.length else "2 s, or 17 frames",
                               visible=task != "image")  # fmt: skip
            untouched = any(prompt == words for form in FORMS.values() for words, _ in form.examples)
            return [_hint(task), _examples(task), *shown, length, form.examples[0][0] if untouched else gr.skip()]

        def chosen(task, index):
            """An example: its words, and its files."""
            prompt, files = FORMS[task].examples[index]
            paths = examples.draw(incoming / "examples").get(files, {})  # Gradio clears that folder now and then
            return [prompt, *(paths.get(name) for name in FILES)]

        def tried(task, event: gr.EventData):
            number = event._data.get("number")
            return chosen(task, number if number in range(len(FORMS[task].examples)) else 0)

        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        needs = [*(inputs[n] for n in FILES), *seen.values(), *(inputs[n] for n in ("strength", "side", "grow"))]
        filled = [inputs["prompt"], *(inputs[name] for name in FILES)]
        changes = [hint, tries, *needs, inputs["length"], inputs["prompt"]]
        task.change(changed, [task, inputs["prompt"]], changes, **quiet)
        tries.select(tried, [task], filled, **quiet)

        def look_at(kind, path):
            if not path:
                return ""
            try:
                return show.upload(validate(path, kind))
            except InvalidInput as error:
                return show.upload(str(error))

        for name, (kind, _) in FILES.items():
            inputs[name].change(functools.partial(look_at, kind), [inputs[name]], [seen[name]],
                                concurrency_limit=2, **quiet)  # fmt: skip

        names = list(inputs)

        async def go(request: gr.Request, task, *values):
            async for shown in served(request, spec, line.pipeline, task, dict(zip(names, values)), validate):
                yield shown

        async def again(event: gr.EventData, request: gr.Request):
            async for shown in served(request, line.spec_again, str(event._data.get("name"))):
                yield shown

        async def served(request, ask, *about):
            """A ticket for what ask(*about) says is wanted, and how it fares, until it is over."""
            try:
                mine = line.join(await asyncio.to_thread(ask, *about), request.session_hash or "")
            except InvalidInput as error:
                yield show.sorry(str(error)), gr.skip(), gr.skip()
                return
            yield show.ticket(mine, line.before(mine)), mine.name, gr.skip()
            last = ""
            while not mine.over:
                await asyncio.sleep(LOOK_EVERY)
                now = show.ticket(mine, line.before(mine))
                if now != last and not mine.over:
                    last = now
                    yield now, gr.skip(), gr.skip()
            yield show.ticket(mine, 0), None, show.gallery(gallery.items(SHOWN))

        outputs = [result, ticket, shelf]
        asked = [task, *inputs.values()]
        make.click(go, asked, outputs, api_name="make", concurrency_limit=None, show_progress="hidden")
        inputs["prompt"].submit(go, asked, outputs, concurrency_limit=None, **quiet)
        shelf.select(again, None, outputs, concurrency_limit=None, **quiet)
        stop.click(line.stop_named, [ticket], None, **quiet)
        page.load(lambda: show.gallery(gallery.items(SHOWN)), None, shelf, **quiet)

        def left(request: gr.Request):
            line.leave(request.session_hash or "")

        page.unload(left)
    return page


def _hint(task: str) -> str:
    return f"<p class='hint'>{FORMS[task].hint}</p>"


def _examples(task: str) -> str:
    return show.examples([prompt for prompt, _ in FORMS[task].examples])


def _only_sent(file, incoming: Path) -> None:
    """Gradio is not to fetch what a request names, neither from this machine nor from another."""
    fetch = file.async_move_resource_to_block_cache

    async def checked(path):
        if path is not None and not Path(os.path.realpath(path)).is_relative_to(incoming):
            raise ValueError(f"{called(str(path))} was not uploaded here: choose it again")
        return await fetch(path)

    file.async_move_resource_to_block_cache = checked
