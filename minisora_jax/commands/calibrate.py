"""Calibrate the step cache: sampling that reuses a part of its model calls, for `minisora generate --step-cache`.

examples:
  minisora calibrate                                    # the bundled model, with the sampler's default settings
  minisora calibrate --sampler unipc --steps 12 --shares 0.25
  minisora calibrate "a cat on a skateboard" "rain on a lake" --model=models/wan --codec=models/wan-vae \\
      --text-encoder=models/umt5 --size 480x832 --frames 81 --fps 16 \\
      --sampler unipc --schedule wan --steps 50 --guidance 5
  minisora generate "a red circle grows on a black background" --step-cache 0.5

From one model call to the next the transformer's blocks add nearly the same. A run of this command measures by how much
that changes, over whole samplings of a few prompts. For each of --shares it then chooses the calls that reuse what the
blocks added before, makes the videos again so, and prints how far they are from those of full sampling. Schedules and
errors are written to step_cache.json in the model's folder. They are for these weights, this sampler and this guidance;
`generate --step-cache` refuses others. Take prompts, --size and --frames as you will use the model.
"""

from __future__ import annotations

from minisora_jax.commands import options


def add_arguments(parser):
    parser.add_argument("prompts", nargs="*", help="a few of the kind you will use (default: of the bundled model)")
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=[0.25, 0.5, 0.65],
        help="shares of the model calls that reuse, each up to 0.75 (default 0.25 0.5 0.65)",
    )
    parser.add_argument("--size", default="48x48", help="HEIGHTxWIDTH in pixels (default 48x48)")
    parser.add_argument("--frames", type=int, default=17, help="frames of each video (default 17)")
    parser.add_argument("--fps", type=float, default=8.0, help="frames per second (default 8)")
    options.add_model(parser)
    options.add_sampling(parser)


def run(args, _):
    from minisora_jax.bundled import folder
    from minisora_jax.commands.demo import held_out_prompts
    from minisora_jax.evaluation.calibration import calibrate, save
    from minisora_jax.generate import Request

    size = options.parse_size(args.size)
    if args.model and not args.prompts:
        raise ValueError('give a few prompts of the kind you will use: minisora calibrate "..." "..." --model=DIR')
    pipeline, sampling = options.pipeline_and_sampling(args)
    prompts = args.prompts or held_out_prompts(8, 0)
    requests = [Request(prompt, (args.frames, *size), i, args.fps) for i, prompt in enumerate(prompts)]
    calibration = calibrate(pipeline, requests, **sampling, shares=args.shares)
    path = save(folder(args.model), calibration)
    print("share  calls  error of latents  PSNR of frames")
    for schedule in calibration["schedules"]:
        calls = f"{schedule['reuse'].count('0')}/{len(schedule['reuse'])}"
        print(f"{schedule['share']:5.2f}  {calls:>5}  {schedule['error']:16.4f}  {schedule['psnr']:11.1f} dB")
    print(f"{path}\nnext: minisora generate ... --step-cache SHARE, with the same sampling flags")
