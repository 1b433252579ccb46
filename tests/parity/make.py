"""Every fixture of tests/test_parity_*.py from the PyTorch references, in an environment of its own (Python 3.11):

    uv venv --no-project --python 3.11 /tmp/reference
    uv --directory /tmp pip install --python /tmp/reference --no-deps -r $PWD/tests/parity/requirements.txt
    /tmp/reference/bin/python tests/parity/make.py                # tests/parity/fixtures, all of them
    /tmp/reference/bin/python tests/parity/make.py wan t5 --out DIR

`.ci/remake` does so into a scratch folder and compares (compare.py).
"""

import argparse
from pathlib import Path

import reference
import torch
from make_codecs import sd_vae, wan22_vae, wan_original, wan_vae
from make_dit import dit, latte, pixart, wan
from make_image_to_video import clip_vision, image_to_video
from make_lora import lora
from make_losses import codec_losses, lpips
from make_schedulers import schedulers
from make_text import clip, t5
from make_torch_file import nested
from make_trajectories import trajectories

MAKERS = (wan_vae, wan22_vae, wan_original, sd_vae, t5, clip, wan, dit, pixart, latte, schedulers, nested, trajectories)
MAKERS += (lpips, codec_losses, lora, clip_vision, image_to_video)

if __name__ == "__main__":
    makers = {make.__name__: make for make in MAKERS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", metavar="NAME", help=f"of {', '.join(makers)}; all by default")
    parser.add_argument("--out", type=Path, default=reference.OUT, help="the folder to write to")
    args = parser.parse_args()
    if unknown := set(args.only) - set(makers):
        parser.error(f"no fixture {', '.join(sorted(unknown))}; there are {', '.join(makers)}")
    reference.OUT = args.out
    torch.set_num_threads(1)  # sums in one order
    for name in args.only or makers:
        makers[name]()
