"""Whole samplings by diffusers' pipelines, for tests/test_parity_trajectories.py; made by make.py.

Small models with weights drawn by name. Each result holds the latents after every step. The noise is drawn by name too.
"""

import diffusers
import numpy as np
import torch
from make_dit import IMAGE, SMALL, tensor
from reference import fill, save

STEPS = 10
SD_VAE = dict(
    down_block_types=["DownEncoderBlock2D"] * 3,
    up_block_types=["UpDecoderBlock2D"] * 3,
    block_out_channels=[32, 64, 64],
    layers_per_block=2,
    latent_channels=4,
    scaling_factor=0.18215,
)


class WanSigmas(diffusers.UniPCMultistepScheduler):
    """With the sigmas of Wan's authors, before the shift. diffusers' own go from 1 to 1 / 1000."""

    def set_timesteps(self, num_inference_steps=None, device=None, **options):
        sigmas = np.linspace(np.float64(np.float32(0.999)), 0.0, num_inference_steps + 1)[:-1]
        super().set_timesteps(device=device, sigmas=sigmas)


def recorded(scheduler):
    """(the scheduler, a list to which it adds the state after each step)."""
    states, step = [], scheduler.step

    def recording(*args, **options):
        result = step(*args, **options)
        states.append((result.prev_sample if hasattr(result, "prev_sample") else result[0]).clone())
        return result

    scheduler.step = recording
    return scheduler, states


def small_dit(classes: int) -> torch.nn.Module:
    """DiT with its authors' frequencies; see make_dit.py."""
    model = fill(diffusers.DiTTransformer2DModel(**SMALL, **IMAGE, num_embeds_ada_norm=classes))
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb = first
        first.time_proj.downscale_freq_shift = 0
    return model


def dit_pipeline() -> dict[str, torch.Tensor]:
    """DDIM from a class to a picture, guidance on all channels."""
    from diffusers.pipelines.dit import pipeline_dit

    vae = fill(diffusers.AutoencoderKL(**SD_VAE))
    scheduler, states = recorded(diffusers.DDIMScheduler(clip_sample=False))
    pipeline = diffusers.DiTPipeline(small_dit(1000), vae, scheduler)
    pipeline_dit.randn_tensor = lambda **_: tensor("dit noise", (1, 4, 16, 16))
    picture = pipeline([207], guidance_scale=1.5, num_inference_steps=STEPS, output_type="np").images
    return {"dit": torch.stack([x[0] for x in states]), "dit picture": torch.from_numpy(picture[0])}


def dit_ddpm() -> dict[str, torch.Tensor]:
    """DDPM with the learned variance, guidance on three channels: the loop of DiT's authors with diffusers' DDPM."""
    from diffusers.schedulers import scheduling_ddpm

    model = small_dit(1000)
    scheduler, states = recorded(
        diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="leading")
    )
    scheduler.set_timesteps(STEPS)
    x, labels = tensor("dit noise", (1, 4, 16, 16)), torch.tensor([207, 1000])
    for i, t in enumerate(scheduler.timesteps):
        scheduling_ddpm.randn_tensor = lambda *_, i=i, **__: tensor(f"dit noise {i}", (1, 4, 16, 16))
        with torch.no_grad():
            out = model(torch.cat([x, x]), t.expand(2), labels).sample
        guided = out[1:, :3] + 4.0 * (out[:1, :3] - out[1:, :3])
        x = scheduler.step(torch.cat([guided, out[:1, 3:]], dim=1), t, x).prev_sample
    return {"dit ddpm": torch.stack([x[0] for x in states])}


def sit_ode() -> dict[str, torch.Tensor]:
    """SiT's ODE by Euler's steps, from noise at 0 to data at 1, guidance on three channels; diffusers has no SiT."""
    model, states = small_dit(1000), []
    x, labels = tensor("dit noise", (1, 4, 16, 16)), torch.tensor([207, 1000])
    for i in range(STEPS):
        time = torch.full((2,), i / STEPS)
        with torch.no_grad():
            out = model(torch.cat([x, x]), time, labels).sample[:, :4]
        guided = out[1:, :3] + 1.5 * (out[:1, :3] - out[1:, :3])
        x = x + torch.cat([guided, out[:1, 3:]], dim=1) / STEPS
        states.append(x)
    return {"sit": torch.stack([x[0] for x in states])}


def pixart_pipeline() -> dict[str, torch.Tensor]:
    """DPM-Solver++(2M) from the features of two captions, of which the negative one is shorter."""
    model = fill(diffusers.PixArtTransformer2DModel(**SMALL, **IMAGE, cross_attention_dim=24, caption_channels=10))
    scheduler, states = recorded(diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing"))
    pipeline = diffusers.PixArtAlphaPipeline(None, None, None, model, scheduler)
    longer, shorter = tensor("text 7", (2, 7, 10))[:1], tensor("text 3", (2, 3, 10))[:1]
    padded = torch.cat([shorter, torch.full((1, 4, 10), 9.0)], dim=1)  # the mask hides what is padding
    pipeline(
        prompt=None,
        negative_prompt=None,
        prompt_embeds=longer,
        prompt_attention_mask=torch.ones(1, 7),
        negative_prompt_embeds=padded,
        negative_prompt_attention_mask=torch.tensor([[1.0] * 3 + [0.0] * 4]),
        latents=tensor("pixart noise", (1, 4, 16, 16)),
        height=128,
        width=128,
        guidance_scale=4.5,
        num_inference_steps=STEPS,
        use_resolution_binning=False,
        output_type="latent",
    )
    return {"pixart": torch.stack([x[0] for x in states])}


def latte_pipeline() -> dict[str, torch.Tensor]:
    """DDIM of a video of three latent frames."""
    norms = dict(norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, num_embeds_ada_norm=1000)
    shape = dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, cross_attention_dim=24)
    model = diffusers.LatteTransformer3DModel(
        **IMAGE | norms | shape, attention_bias=True, caption_channels=10, video_length=3
    )
    scheduler, states = recorded(diffusers.DDIMScheduler(clip_sample=False))
    pipeline = diffusers.LattePipeline(None, None, None, fill(model), scheduler)
    pipeline(
        prompt=None,
        negative_prompt=None,
        prompt_embeds=tensor("text 7", (2, 7, 10))[:1],
        negative_prompt_embeds=tensor("text 7", (2, 7, 10))[1:],
        latents=tensor("latte noise", (1, 4, 3, 16, 16)),
        video_length=3,
        height=128,
        width=128,
        guidance_scale=7.5,
        num_inference_steps=STEPS,
        output_type="latent",
    )
    return {"latte": torch.stack([x[0] for x in states])}


def wan_model() -> torch.nn.Module:
    small = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2)
    return fill(diffusers.WanTransformer3DModel(**small, text_dim=10, ffn_dim=40))


def wan_scheduler(shift: float):
    """UniPC with whole timesteps, `recorded`."""
    return recorded(WanSigmas(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift))


def wan_video(pipeline, **options) -> torch.Tensor:
    """The latents of a video of 9 frames, from captions padded with zeros to 512 tokens."""
    padded = [torch.cat([text, torch.zeros(512 - len(text), 10)])[None] for text in tensor("text 7", (2, 7, 10))]
    options |= dict(prompt_embeds=padded[0], negative_prompt_embeds=padded[1], num_inference_steps=STEPS)
    options |= dict(latents=tensor("wan noise", (1, 4, 3, 4, 6)), num_frames=9, height=32, width=48)
    return pipeline(**options, output_type="latent").frames


def wan_pipeline() -> dict[str, torch.Tensor]:
    """UniPC with shift 5."""
    scheduler, states = wan_scheduler(5.0)
    wan_video(diffusers.WanPipeline(None, None, None, scheduler, wan_model()), guidance_scale=5.0)
    return {"wan": torch.stack([x[0] for x in states])}


def wan_first_frame() -> dict[str, torch.Tensor]:
    """Wan 2.2's TI2V-5B from a picture: the first latent frame is given, and its tokens are told time 0."""
    statistics = dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    vae = fill(diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1, **statistics))
    scheduler, states = wan_scheduler(5.0)
    parts = None, None, vae, scheduler, None, None, wan_model()
    picture = torch.tanh(tensor("wan picture", (1, 3, 32, 48))) / 2 + 0.5
    pipeline = diffusers.WanImageToVideoPipeline(*parts, expand_timesteps=True)
    given = wan_video(pipeline, image=picture, guidance_scale=5.0)[:, :, :1]
    states = [torch.cat([given, x[:, :, 1:]], dim=2) for x in states]  # the scheduler moves the given frame, unused
    return {"wan first frame": torch.stack([x[0] for x in states]), "wan first frame given": given[0]}


def wan_experts() -> dict[str, torch.Tensor]:
    """Wan 2.2's A14B: two models, of which the second takes over below time 0.875, each with its own guidance."""
    high, low = wan_model(), wan_model()
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.mul_(0.8)
    scheduler, states = wan_scheduler(12.0)
    pipeline = diffusers.WanPipeline(None, None, None, scheduler, high, low, boundary_ratio=0.875)
    wan_video(pipeline, guidance_scale=4.0, guidance_scale_2=3.0)
    return {"wan experts": torch.stack([x[0] for x in states])}


def trajectories() -> None:
    results = {}
    makes = (dit_pipeline, dit_ddpm, sit_ode, pixart_pipeline, latte_pipeline)
    for make in (*makes, wan_pipeline, wan_first_frame, wan_experts):
        results |= make()
    save("trajectories", {k: v.numpy() for k, v in results.items()}, diffusers=diffusers.__version__)
