"""The HTML of the page. All text from visitors is escaped."""

from __future__ import annotations

import base64
import html
import json
import time

from minisora_jax.ui.gallery import Item
from minisora_jax.ui.job_queue import Ticket
from minisora_jax.ui.uploads import Upload

CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto; }
.gradio-container main { width: 100%; }
footer { display: none !important; }
#title h1 { font-size: 1.5rem; font-weight: 650; margin: 0; letter-spacing: -0.01em; }
#title p { margin: 2px 0 0; color: var(--neutral-500); }
#task .wrap { gap: 6px; }
#task label { border-radius: 999px; padding: 5px 14px; box-shadow: none; }
#task label.selected { background: var(--color-accent); color: white; border-color: transparent; }
#task input { display: none; }
#task label span { margin: 0; }
#examples button { display: block; width: 100%; text-align: left; padding: 6px 10px; margin-top: 5px; cursor: pointer;
  font-size: 0.85rem; font-weight: 400; border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: none; color: var(--body-text-color); }
#examples button:hover { border-color: var(--color-accent); }
#right { position: sticky; top: 12px; align-self: flex-start; }
.hint, .foot { color: var(--neutral-500); font-size: 0.9rem; }
.panel { min-height: 380px; border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 16px;
  background: var(--background-fill-primary); display: flex; flex-direction: column; justify-content: center; gap: 12px;
  align-items: center; text-align: center; }
.panel video, .panel img { width: 100%; max-height: 460px; object-fit: contain; border-radius: 8px; background: #111; }
.panel img.soft, .tile img, .tile video, .file img { image-rendering: pixelated; }
.bar { width: 100%; height: 8px; border-radius: 4px; overflow: hidden; background: var(--border-color-primary); }
.bar div { height: 100%; background: var(--color-accent); transition: width 0.4s; }
.error { width: 100%; box-sizing: border-box; border-left: 4px solid #d9480f; border-radius: 6px; padding: 10px 14px;
  text-align: left; background: color-mix(in srgb, #d9480f 9%, transparent); overflow-wrap: anywhere; }
.links a, .tile a { margin: 0 4px; font-size: 0.85rem; }
.panel .caption { font-size: 0.95rem; overflow-wrap: anywhere; }
.file { display: flex; gap: 10px; align-items: center; font-size: 0.85rem; }
.file img { height: 56px; border-radius: 6px; background: #111; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 14px; }
.tile { border: 1px solid var(--border-color-primary); border-radius: 10px; overflow: hidden; font-size: 0.82rem;
  background: var(--background-fill-primary); }
.tile img, .tile video { display: block; width: 100%; height: 130px; object-fit: contain; background: #111; }
.tile p { margin: 8px 10px 4px; overflow-wrap: anywhere; display: -webkit-box; -webkit-line-clamp: 3;
  -webkit-box-orient: vertical; overflow: hidden; }
.tile div { margin: 0 6px 8px; }
.tile button { font-size: 0.85rem; color: var(--link-text-color); cursor: pointer; margin: 0 4px; background: none; }
details { text-align: left; width: 100%; font-size: 0.85rem; }
details pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 260px; overflow: auto; font-size: 0.75rem; }
"""
EMPTY = '<div class="panel"><p class="hint">Choose a task, write a prompt, and press Generate.</p></div>'
ON_EXAMPLES = """
element.addEventListener('click', e => {
  const button = e.target.closest('button[data-number]');
  if (button) trigger('select', {number: Number(button.dataset.number)});
});
"""
ON_GALLERY = """
element.addEventListener('click', e => {
  const button = e.target.closest('button[data-reproduce]');
  if (button) trigger('select', {name: button.dataset.reproduce});
});
"""


def escape(text: str) -> str:
    """The text as HTML, without the characters that Gradio reads as a template."""
    return html.escape(text).translate({ord(c): f"&#{ord(c)};" for c in "${}`"})


def error(message: str) -> str:
    """The panel of an error."""
    return f'<div class="panel">{_error(message)}</div>'


def _error(message: str) -> str:
    if "." not in message.split(" ", 1)[0]:  # a file's name keeps its first letter
        message = message[:1].upper() + message[1:]
    return f'<div class="error" role="alert">{escape(message.rstrip("."))}.</div>'


def examples(prompts: list[str]) -> str:
    """The buttons of example prompts."""
    buttons = (f'<button data-number="{i}">{escape(prompt)}</button>' for i, prompt in enumerate(prompts))
    return f'<p class="hint">Examples</p>{"".join(buttons)}'


def upload(checked: Upload | str) -> str:
    """A checked file, or the message of its error."""
    if isinstance(checked, str):
        return _error(checked)
    thumbnail, description = _data(checked.thumbnail), escape(checked.description)
    return f'<div class="file"><img alt="" src="{thumbnail}"><span>{description}</span></div>'


def ticket(job: Ticket, jobs_ahead: int) -> str:
    """The panel of a job: its place in the queue, its progress, its result or its error."""
    if job.state == "failed":
        return error(job.message)
    if job.state == "stopped":
        return '<div class="panel"><p class="hint">Stopped.</p></div>'
    if job.state == "finished":
        return result(job.file, job.record or {}, job.message, job.spec.hint)
    caption = f'<p class="caption">{escape(job.spec.job.prompt)}</p>{_hint(job.spec.hint)}'
    if job.state == "waiting":
        place = f"{jobs_ahead} job{'s' if jobs_ahead > 1 else ''} ahead of yours" if jobs_ahead else "yours is next"
        return f'<div class="panel" data-state="waiting">{caption}{_hint(f"Waiting: {place}.")}</div>'
    preview = f'<img class="soft" alt="preview" src="{_data(job.preview)}">' if job.preview else ""
    percent = round(100 * job.progress)
    return (
        f'<div class="panel" data-state="running">{preview}{caption}'
        f'<div class="bar"><div style="width:{percent}%"></div></div>{_hint(_pace(job))}</div>'
    )


def _hint(text: str) -> str:
    return f'<p class="hint">{escape(text)}</p>' if text else ""


def _pace(job: Ticket) -> str:
    """The progress in words, such as "40 %, 12 steps/s, about 3 s left"."""
    parts = [f"{round(100 * job.progress)} %"]
    if job.first_step:
        steps = job.spec.sampling["sampler"].steps
        spent = time.monotonic() - job.first_step
        rate = (job.progress * job.spec.rounds * steps - 1) / spent if spent > 0 else 0
        parts += [f"{rate:.3g} steps/s"] if rate > 0 else []
        left = job.seconds_left()
        parts += [f"about {left:.0f} s left" if left < 90 else f"about {left / 60:.0f} min left"] if left else []
        parts += ["decoding"] if job.share >= 1 and job.progress >= 1 else []
    else:
        parts = [f"compiling for {time.monotonic() - job.started:.0f} s (once for each new size)"]
    if job.spec.rounds > 1:
        parts.append(f"part {min(job.round + 1, job.spec.rounds)} of about {job.spec.rounds}")
    if job.group_size > 1:
        parts.append(f"with {job.group_size - 1} other job{'s' if job.group_size > 2 else ''}")
    return ", ".join(parts)


def result(file: str, record: dict, message: str = "", hint: str = "") -> str:
    """The panel of a result, with its downloads and its record."""
    picture = f'<img alt="" class="result soft" src="results/{file}">'
    if file.endswith(".mp4"):
        picture = f'<video class="result" src="results/{file}" controls autoplay loop muted playsinline></video>'
    return (
        f'<div class="panel" data-state="finished">{picture}<p class="caption">{escape(record["job"]["prompt"])}</p>'
        f'{_hint(hint)}{_hint(message)}<div class="links">{_links(file)}</div>'
        f"<details><summary>Record</summary><pre>{escape(json.dumps(record, indent=1))}</pre></details></div>"
    )


def _links(file: str) -> str:
    name, _, kind = file.partition(".")
    kinds = {"mp4": "mp4", "webm": "webm", "gif": "gif", "zip": "png frames"} if kind == "mp4" else {"png": "png"}
    links = [f'<a href="results/{name}.{k}" download>{label}</a>' for k, label in kinds.items()]
    return " ".join([*links, f'<a href="results/{file}.json" target="_blank">record</a>'])


def gallery(items: list[Item]) -> str:
    """The tiles of earlier results."""
    if not items:
        return '<p class="hint">There are no results yet.</p>'
    return f'<div class="gallery">{"".join(map(_tile, items))}</div>'


def _tile(item: Item) -> str:
    source = f'src="results/{item.file}"'
    picture = f"<img alt='' loading='lazy' {source}>"
    if item.suffix == ".mp4":
        hover = 'onmouseenter="this.play()" onmouseleave="this.pause()"'
        picture = f'<video {source} muted loop playsinline preload="metadata" {hover}></video>'
    job = item.record["job"]
    return (
        f'<div class="tile">{picture}<p title="{escape(str(job["prompt"]))}">{escape(str(job["prompt"]))}</p>'
        f'<div><a href="results/{item.file}" download>{item.suffix[1:]}</a>'
        f'<a href="results/{item.file}.json" target="_blank">record</a>'
        f'<button data-reproduce="{item.file}">Reproduce</button></div></div>'
    )


def _data(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"
