"""A page in the browser: everything that `minisora generate` can do, for as many people as open it.

examples:
  minisora ui                                   # the bundled model, on http://localhost:7860
  minisora ui --model=runs/model/export --codec=runs/codec/export --port 8000
  minisora ui --host 0.0.0.0                    # for everybody who can reach this machine: there is no password
  minisora ui --allow-host videos.example.org   # behind a proxy of that name

The page answers to localhost, and with --host 0.0.0.0 to this machine's addresses and name too. Other names, and pages
of other sites, are refused unless --allow-host names them.

Jobs wait in one queue; jobs with the same sampling options are packed together. Results go to --out, each with its
record, which `minisora generate --reproduce` reads; the newest 200 are kept.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from minisora_jax.commands import options
from minisora_jax.config import how_to_install


def add_arguments(parser):
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="(default 7860)")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a further name of the page")
    options.add_model(parser)
    parser.add_argument("--out", default="minisora-ui", help="directory for what is made (default minisora-ui)")


def run(args, _):
    if not importlib.util.find_spec("gradio"):
        raise ImportError(f"the page needs gradio: {how_to_install('ui')}")
    from minisora_jax.commands.generate import model_record
    from minisora_jax.ui.server import serve

    pipeline = options.pipeline_of(args)
    serve(pipeline, Path(args.out), model_record(args, pipeline), args.host, args.port, args.allow_host)
