"""CLIP's vision encoder, and samplings of Wan from images, for tests/test_parity_image_to_video.py; made by make.py.

The models and the codec are small, with weights drawn by name. The video has 9 frames of 32 x 48.
"""

import diffusers
import numpy as np
import torch
from make_dit import collapsed
from make_trajectories import WanSigmas, recorded
from PIL import Image
from random_weights import draw_ids, draw_input
from reference import fill, names_and_shapes, save
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

STEPS = 3
CLIP = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, hidden_act="gelu")
CLIP |= dict(image_size=28, patch_size=14)  # 5 tokens
CLIP_H = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, hidden_act="gelu")
CLIP_H |= dict(image_size=224, patch_size=14)
STATISTICS = dict(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.9, 1.1, 1.2, 0.8])


def image_encoder() -> tuple[CLIPVisionModel, CLIPImageProcessor]:
    processor = CLIPImageProcessor(size={"shortest_edge": CLIP["image_size"]}, crop_size=CLIP["image_size"])
    return fill(CLIPVisionModel(CLIPVisionConfig(**CLIP))), processor


def picture(name: str, height: int, width: int) -> Image.Image:
    """Random colours in cells of 4 pixels."""
    cells = draw_ids(name, (height // 4, width // 4, 3), 256).astype(np.uint8)
    return Image.fromarray(cells.repeat(4, axis=0).repeat(4, axis=1))


def clip_vision() -> None:
    (model, processor), results = image_encoder(), {}
    for height, width in ((32, 48), (60, 28), (28, 28)):
        pixels = processor(images=picture(f"picture {height}x{width}", height, width), return_tensors="pt")
        results[f"pixels {height}x{width}"] = pixels["pixel_values"][0]
        with torch.no_grad():
            out = model(**pixels, output_hidden_states=True)
        results[f"features {height}x{width}"] = out.hidden_states[-2][0]
        results[f"pooled {height}x{width}"] = out.pooler_output[0]
    full = collapsed(names_and_shapes(lambda: CLIPVisionModel(CLIPVisionConfig(**CLIP_H))))
    save("clip_vision", {k: v.numpy() for k, v in results.items()}, published={"clip-vision-h": full})


def sampled(scale: float, shift: float, last: bool, experts: bool = False, **condition) -> torch.Tensor:
    """The latents after each step (steps, c, t, h, w) of WanImageToVideoPipeline."""
    small = dict(num_attention_heads=2, attention_head_dim=16, in_channels=12, out_channels=4, num_layers=2)
    make = lambda: fill(diffusers.WanTransformer3DModel(**small, text_dim=10, ffn_dim=40, **condition))
    models = [make() for _ in range(1 + experts)]
    with torch.no_grad():
        for parameter in models[1].parameters() if experts else ():
            parameter.mul_(0.8)
    vae = fill(diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1, **STATISTICS))
    scheduler, states = recorded(WanSigmas(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift))
    model, processor = image_encoder() if condition else (None, None)
    pipeline = diffusers.WanImageToVideoPipeline(
        None, None, vae, scheduler, processor, model, *models, boundary_ratio=0.9 if experts else None
    )
    texts = torch.from_numpy(draw_input("text 7", (2, 7, 10)))
    padded = [torch.cat([text, torch.zeros(512 - len(text), 10)])[None] for text in texts]
    pipeline(
        image=picture("first picture", 32, 48),
        last_image=picture("last picture", 32, 48) if last else None,
        prompt_embeds=padded[0],
        negative_prompt_embeds=padded[1],
        latents=torch.from_numpy(draw_input("wan noise", (1, 4, 3, 4, 6))),
        num_frames=9,
        height=32,
        width=48,
        guidance_scale=scale,
        num_inference_steps=STEPS,
        output_type="latent",
    )
    return torch.stack([x[0] for x in states])


def image_to_video() -> None:
    image = dict(image_dim=CLIP["hidden_size"], added_kv_proj_dim=32)
    results = {
        "wan2.1-i2v-14b": sampled(5.0, 5.0, False, **image),
        "wan2.1-flf2v-14b": sampled(5.0, 16.0, True, **image, pos_embed_seq_len=10),
        "wan2.2-i2v-a14b": sampled(3.5, 5.0, False, experts=True),
        "wan2.2-i2v-a14b, two images": sampled(3.5, 5.0, True, experts=True),
    }
    save("image_to_video", {k: v.numpy() for k, v in results.items()}, diffusers=diffusers.__version__)
