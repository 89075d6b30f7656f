"""Step 3 of the drawn world: the base, a text-to-image latent diffusion model with SD v1.5's parts and layout.

Trained as Stable Diffusion was: noise prediction on latents, conditioned on a CLIP text encoder; here the text encoder
learns along, since there is no CLIP for this world. Writes a complete diffusers folder.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from autoencoder import LATENT_CHANNELS
from common import Average, Clock, Log, parser, scenes, to_unit
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rlfseg.datasets.shapes import COLOURS, PLACES, RADII, SHAPES, TEXTURES, Scene

WIDTH, TOKENS = 96, 32


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges for this world's words alone; any other text falls apart into bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte = {b: chr(b) for b in printable} | {
        b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in printable)
    }
    words = [*COLOURS, *SHAPES, *TEXTURES, *RADII, "and", *sorted({w for p in PLACES for w in p.split()})]
    merges: list[tuple[str, str]] = []
    for word in words:
        while len(symbols := apply_merges(word, merges)) > 1:
            merges.append((symbols[0], symbols[1]))
    vocab = [*byte.values(), *(c + "</w>" for c in byte.values()), *dict.fromkeys(a + b for a, b in merges)]
    vocab = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: n for n, token in enumerate(vocab)},
        merges=merges,
        model_max_length=TOKENS,
    )


def apply_merges(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of one word: merges in their order, as the tokenizer will apply them."""
    symbols = [*word[:-1], word[-1] + "</w>"]
    for a, b in merges:
        n = 0
        while n < len(symbols) - 1:
            if (symbols[n], symbols[n + 1]) == (a, b):
                symbols[n : n + 2] = [a + b]
            n += 1
    return symbols


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A small CLIP text encoder."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """An untrained UNet for 16 x 16 x 8 latents, of SD v1.5's kinds of blocks."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def schedule() -> dict[str, object]:
    """SD v1.5's noise schedule."""
    return {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "steps_offset": 1,
    }


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids [B, 32]."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids


@torch.no_grad()
def latents_of(vae: AutoencoderKL, items: list[Scene]) -> torch.Tensor:
    """Scaled latents [N, 8, 16, 16] of scenes."""
    parts = [to_unit(np.stack([s.image for s in items[i : i + 64]])) for i in range(0, len(items), 64)]
    return torch.cat([vae.encode(x).latent_dist.mode() for x in parts]) * vae.config.scaling_factor


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """The scene in full, or some of its objects, or nothing (so that guidance works)."""
    if rng.random() < 0.1:
        return ""
    parts = re.split(" and ", scene.text)
    rng.shuffle(parts)
    return " and ".join(parts[: int(rng.integers(1, len(parts) + 1))] if rng.random() < 0.4 else parts)


def write(
    out: Path,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
) -> None:
    """Writes the diffusers folder, with pictures of four prompts to look at."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**schedule()),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(out)
    prompts = ["large red ring", "small blue star and large white square", "large striped green circle on the left", ""]
    pictures = pipe(prompts, num_inference_steps=30, guidance_scale=3.0, height=64, width=64,
                    generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    sheet = Image.new("RGB", (4 * 256, 256))
    for n, picture in enumerate(pictures):
        sheet.paste(picture.resize((256, 256)), (n * 256, 0))
    sheet.save(out / "prompts.png")


def main() -> None:
    """Trains and writes the base."""
    p = parser(__doc__ or "", 25, "runs/tiny_world/base")
    p.add_argument("--vae", type=Path, default=Path("runs/tiny_world/vae"), help="folder of step 1")
    p.add_argument("--batch", type=int, default=24, help="scenes a step")
    p.add_argument("--resume", type=Path, help="folder of an earlier step 3 to go on from")
    args = p.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    log, rng = Log(args.out), np.random.default_rng(args.seed)
    train, held_out = scenes(args.scenes), scenes(96, held_out=True)
    vae = AutoencoderKL.from_pretrained(args.vae).eval()
    latents, unseen = latents_of(vae, train), latents_of(vae, held_out)

    tokenizer = build_tokenizer()
    text_encoder, unet = build_text_encoder(tokenizer), build_unet()
    if args.resume:
        text_encoder = CLIPTextModel.from_pretrained(args.resume / "text_encoder", dtype=torch.float32)
        unet = UNet2DConditionModel.from_pretrained(args.resume / "unet", torch_dtype=torch.float32)
    text_encoder.train(), unet.train()
    log(unet=sum(w.numel() for w in unet.parameters()), text_encoder=sum(w.numel() for w in text_encoder.parameters()))
    noise_schedule = DDPMScheduler(**schedule())
    both = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    optimizer = torch.optim.AdamW(both.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.99))
    average, clock = Average(both, 0.998), Clock(optimizer, 1e-3, args.minutes)

    def error(z: torch.Tensor, ids: torch.Tensor, t: torch.Tensor, seed: int | None = None) -> torch.Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        noise = torch.randn(z.shape, generator=generator)
        out = unet(noise_schedule.add_noise(z, noise, t), t, text_encoder(ids).last_hidden_state).sample
        return functional.mse_loss(out, noise)

    unseen_ids = tokenize(tokenizer, [s.text for s in held_out])
    wrong_ids = unseen_ids.roll(1, 0)
    every_time = torch.linspace(0, 999, len(held_out)).long()
    for step in clock:
        picked = rng.integers(len(train), size=args.batch)
        # Density rising with t: the text is needed where little else is left, and time is short
        t = (1000 * torch.rand(args.batch).sqrt()).long()
        loss = error(latents[picked], tokenize(tokenizer, [caption(train[i], rng) for i in picked]), t)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        average.update(step)
        if step % 250 == 0:
            with torch.no_grad():
                right = error(unseen, unseen_ids, every_time, seed=0).item()
                wrong = error(unseen, wrong_ids, every_time, seed=0).item()
            log(step=step, seconds=clock.elapsed, loss=loss.item(), held_out=right, held_out_wrong_text=wrong)
    average.copy_to(both)
    write(args.out, vae, text_encoder, tokenizer, unet)
    log(step=step, seconds=clock.elapsed, held_out=error(unseen, unseen_ids, every_time, seed=0).item())


if __name__ == "__main__":
    main()
