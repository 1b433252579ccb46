"""A page in the browser: everything that `minisora generate` can do, for as many people as open it.

examples:
  minisora ui                                   # the bundled model, on http://localhost:7860
  minisora ui --model=runs/model/export --codec=runs/codec/export --port 8000
  minisora ui --host 0.0.0.0                    # for everybody who can reach this machine: there is no password

Jobs wait in one line; those that go together are made together. What was made lies in --out, each with its record,
which `minisora generate --remake` takes; the newest 200 are kept.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path


def add_arguments(parser):
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="(default 7860)")
    parser.add_argument("--model", default=None, help="an exported model (default: the bundled one)")
    parser.add_argument("--codec", default=None, help="its codec (default: the bundled one)")
    parser.add_argument("--out", default="minisora-ui", help="directory for what is made (default minisora-ui)")


def run(args, _):
    if not importlib.util.find_spec("gradio"):
        raise ImportError("the page needs gradio: pip install 'minisora_jax[ui]'")
    from minisora_jax.commands.generate import load, model_of
    from minisora_jax.ui.server import serve

    said = argparse.Namespace(**vars(args), guide_model=None, text_encoder=None, window=None, mesh=None)
    generator = load(said)
    serve(generator, Path(args.out), model_of(said, generator), args.host, args.port)
