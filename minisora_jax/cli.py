"""`minisora VERB`: the command line. Verbs live in commands/, each imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import keyword
import os
import sys

VERBS = {
    "demo": "make clips from a few prompts with the bundled model",
    "prepare": "check, cut, filter and caption clips, and write them as one data set",
    "train-vae": "train the video codec on a data set",
    "encode": "turn a data set into a latent cache with a trained codec",
    "train": "train the diffusion transformer on a latent cache",
    "generate": "make videos and images from prompts",
    "ui": "a web page for generating",
    "play": "walk through a world in the browser, or by a script",
    "import": "turn published weights into a model of this project",
    "export": "write a model in the published layout",
    "merge": "fold adapters (LoRA) into their model",
    "inspect": "look into a data set, a latent cache, a run, a model, or how clips are packed",
    "calibrate": "measure which model calls of a sampling may reuse the one before (generate --step-cache)",
    "plan": "what a run needs on a TPU pod, compiled for it on any machine",
    "study": "measure train steps over contexts, meshes and ways to batch",
    "eval": "score a codec (PSNR, SSIM) or a model (does the video show what its caption says?)",
}

EXAMPLE = """\
examples:
  minisora demo
  minisora generate "a large red circle moves left slowly on a black background" --size 48x64 --frames 17
  minisora VERB --help        what a verb does, its flags, and an example

from your own clips to your own model:
  minisora prepare my_clips/ data/clips
  minisora train-vae --config=vae_tiny:data=data/clips --workdir=runs/codec
  minisora encode data/clips data/latents --codec=runs/codec/export
  minisora train --config=dit_tiny:data=data/latents --codec=runs/codec/export --workdir=runs/model
  minisora generate "what your captions say" --model=runs/model/export --codec=runs/codec/export
"""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    verbs = "\n".join(f"  {verb:<11}{what}" for verb, what in VERBS.items())
    top = argparse.ArgumentParser(
        prog="minisora",
        usage="minisora VERB [flags]",
        description=f"An open Sora in JAX, from a laptop CPU to TPU pods.\n\nverbs:\n{verbs}",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if not argv or argv[0] in ("-h", "--help"):
        top.print_help()
        return 0
    if argv[0] == "--version":
        from minisora_jax import __version__

        print(f"minisora {__version__}")
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        top.error(f"unknown verb {verb!r}; the verbs are {', '.join(VERBS)}")
    module = verb.replace("-", "_") + ("_" if keyword.iskeyword(verb) else "")
    command = importlib.import_module(f"minisora_jax.commands.{module}")
    parser = argparse.ArgumentParser(
        prog=f"minisora {verb}", description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_arguments(parser)
    takes_config = getattr(command, "TAKES_CONFIG", False)
    args, config_flags = parser.parse_known_args(rest)
    if config_flags and not takes_config:
        parser.error(f"unrecognised arguments: {' '.join(config_flags)}")
    return _run(command, args, config_flags)


def _run(command, args: argparse.Namespace, config_flags: list[str]) -> int:
    import contextlib
    import logging

    from minisora_jax.io.filesystem import printable
    from minisora_jax.parallel.programs import keep_compiled_programs

    class Printable(logging.Formatter):
        """Messages name files, whose names may hold control codes of the terminal."""

        def format(self, record: logging.LogRecord) -> str:
            return printable(super().format(record), keep="\n\t")

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Printable("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("minisora").setLevel(logging.INFO)
    if getattr(command, "KEEPS_PROGRAMS", True):
        keep_compiled_programs()
    try:
        with contextlib.ExitStack() as stack:
            if getattr(command, "ON_SEVERAL_PROCESSES", False):
                from minisora_jax.parallel.processes import started

                stack.enter_context(started())
            for name, value in vars(args).items():
                if isinstance(value, str) and value.startswith("hf://"):
                    from minisora_jax.io.hub import local_folder

                    setattr(args, name, str(local_folder(value)))
            return command.run(args, config_flags) or 0
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\nminisora: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        # What a user can mend is said in a sentence; MINISORA_TRACEBACK=1 shows where it came from.
        if os.environ.get("MINISORA_TRACEBACK") and not hasattr(error, "exit_code"):
            raise
        message = out_of_memory(error) or f"{type(error).__name__}: {_words(error)}"
        print(printable(f"minisora: {message}", keep="\n\t"), file=sys.stderr)
        return getattr(error, "exit_code", 2)


def _words(error: BaseException) -> str:
    """What an error says, without the operating system's number."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


def out_of_memory(error: BaseException) -> str:
    """A sentence about an error of memory, of the host or of a device; "" for other errors."""
    import re

    text = str(error)
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in text:
        return ""
    asked = re.search(r"(?:allocate|allocating|[Uu]sed) ([\d.]+ ?(?:bytes|[KMGT]?i?B?))", text)
    size = f", which asked for {asked[1].strip()}" if asked else ""
    return (
        f"out of memory{size}. Sampling: fewer --frames, a smaller --size or --batch-size. Training: fewer pack.rows "
        "or pack.tokens, dit.remat=full, more devices in run.mesh; `minisora plan` shows what a step needs"
    )


if __name__ == "__main__":
    sys.exit(main())
