"""What the page shows, as HTML. Whatever a visitor wrote is escaped."""

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
#verb .wrap { gap: 6px; }
#verb label { border-radius: 999px; padding: 5px 14px; box-shadow: none; }
#verb label.selected { background: var(--color-accent); color: white; border-color: transparent; }
#verb input { display: none; }
#verb label span { margin: 0; }
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
.sorry { width: 100%; box-sizing: border-box; border-left: 4px solid #d9480f; border-radius: 6px; padding: 10px 14px;
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
NOTHING = '<div class="panel"><p class="hint">Choose what to make, say it in words, and press Make.</p></div>'
ON_EXAMPLES = """
element.addEventListener('click', e => {
  const button = e.target.closest('button[data-number]');
  if (button) trigger('select', {number: Number(button.dataset.number)});
});
"""
ON_GALLERY = """
element.addEventListener('click', e => {
  const button = e.target.closest('button[data-again]');
  if (button) trigger('select', {name: button.dataset.again});
});
"""


def escape(text: str) -> str:
    """Also of what Gradio reads as a template."""
    return html.escape(text).translate({ord(c): f"&#{ord(c)};" for c in "${}`"})


def sorry(words: str) -> str:
    return f'<div class="panel">{_sorry(words)}</div>'


def _sorry(words: str) -> str:
    if "." not in words.split(" ", 1)[0]:  # not a file's name
        words = words[:1].upper() + words[1:]
    return f'<div class="sorry" role="alert">{escape(words.rstrip("."))}.</div>'


def examples(prompts: list[str]) -> str:
    buttons = (f'<button data-number="{i}">{escape(prompt)}</button>' for i, prompt in enumerate(prompts))
    return f'<p class="hint">Examples</p>{"".join(buttons)}'


def upload(found: Upload | str) -> str:
    """A file that was let in, or why it was not."""
    if isinstance(found, str):
        return _sorry(found)
    return f'<div class="file"><img alt="" src="{_data(found.thumbnail)}"><span>{escape(found.words)}</span></div>'


def ticket(it: Ticket, before: int) -> str:
    """Where a job is: in the line, at work, made."""
    if it.state == "failed":
        return sorry(it.words)
    if it.state == "stopped":
        return '<div class="panel"><p class="hint">Stopped.</p></div>'
    if it.state == "made":
        return made(it.file, it.record, it.words)
    said = f'<p class="caption">{escape(it.spec.job.prompt)}</p>'
    if it.state == "waiting":
        words = f"{before} before you" if before else "you are next"
        return f'<div class="panel" data-state="waiting">{said}<p class="hint">In the line: {words}.</p></div>'
    preview = f'<img class="soft" alt="as it seems so far" src="{_data(it.preview)}">' if it.preview else ""
    percent = round(100 * it.done)
    return (
        f'<div class="panel" data-state="running">{preview}{said}<div class="bar"><div style="width:{percent}%"></div>'
        f'</div><p class="hint">{_pace(it)}</p></div>'
    )


def _pace(it: Ticket) -> str:
    words = [f"{round(100 * it.done)} %"]
    if it.first_step:
        steps = it.spec.sampling["sampler"].steps
        spent = time.monotonic() - it.first_step
        rate = (it.done * it.spec.rounds * steps - 1) / spent if spent > 0 else 0
        words += [f"{rate:.3g} steps/s"] if rate > 0 else []
        left = it.seconds_left()
        words += [f"about {left:.0f} s left" if left < 90 else f"about {left / 60:.0f} min left"] if left else []
        words += ["decoding"] if it.share >= 1 and it.done >= 1 else []
    else:
        words = [f"preparing for {time.monotonic() - it.started:.0f} s (a new size is compiled for once)"]
    if it.spec.rounds > 1:
        words.append(f"part {min(it.round + 1, it.spec.rounds)} of about {it.spec.rounds}")
    if it.company > 1:
        words.append(f"together with {it.company - 1} other{'s' if it.company > 2 else ''}")
    return ", ".join(words)


def made(file: str, record: dict, words: str = "") -> str:
    """A result, its downloads and its record."""
    picture = f'<img alt="" class="result soft" src="made/{file}">'
    if file.endswith(".mp4"):
        picture = f'<video class="result" src="made/{file}" controls autoplay loop muted playsinline></video>'
    job = record["job"]
    return (
        f'<div class="panel" data-state="made">{picture}<p class="caption">{escape(job["prompt"])}</p>'
        f'{f"<p class=hint>{escape(words)}</p>" if words else ""}<div class="links">{_links(file)}</div>'
        f"<details><summary>How it was made</summary><pre>{escape(json.dumps(record, indent=1))}</pre></details></div>"
    )


def _links(file: str) -> str:
    name, _, kind = file.partition(".")
    kinds = {"mp4": "mp4", "webm": "webm", "gif": "gif", "zip": "png frames"} if kind == "mp4" else {"png": "png"}
    links = [f'<a href="made/{name}.{k}" download>{words}</a>' for k, words in kinds.items()]
    return " ".join([*links, f'<a href="made/{file}.json" target="_blank">record</a>'])


def gallery(items: list[Item]) -> str:
    if not items:
        return '<p class="hint">Nothing has been made yet.</p>'
    return f'<div class="gallery">{"".join(map(_tile, items))}</div>'


def _tile(item: Item) -> str:
    source = f'src="made/{item.file}"'
    picture = f"<img alt='' loading='lazy' {source}>"
    if item.suffix == ".mp4":
        hover = 'onmouseenter="this.play()" onmouseleave="this.pause()"'
        picture = f'<video {source} muted loop playsinline preload="metadata" {hover}></video>'
    job = item.record["job"]
    return (
        f'<div class="tile">{picture}<p title="{escape(str(job["prompt"]))}">{escape(str(job["prompt"]))}</p>'
        f'<div><a href="made/{item.file}" download>{item.suffix[1:]}</a>'
        f'<a href="made/{item.file}.json" target="_blank">record</a>'
        f'<button data-again="{item.file}">make again</button></div></div>'
    )


def _data(picture: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(picture).decode()}"
