"""What users load on top, or in place of a part: LoRA, textual inversion, IP-Adapter, other VAEs."""

import numpy as np
import pytest
import tiny
import torch
from subjects import SUBJECTS, mask, picture, same
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection


def random(generator, *shape):
    return 0.3 * torch.randn(*shape, generator=generator)


def lora(unet) -> dict:
    """LoRA weights of rank 2 for every attention's q, k, v projections."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, layer in unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v")):
            state[f"unet.{name}.lora_A.weight"] = random(generator, 2, layer.in_features)
            state[f"unet.{name}.lora_B.weight"] = random(generator, layer.out_features, 2)
    return state


def test_lora(subject, pipe):
    """LoRA weights act, by their scale, and are fused, unfused and unloaded"""
    pytest.importorskip("peft")
    images = subject.images(pipe)
    pipe.load_lora_weights(lora(pipe.unet), adapter_name="style")
    styled = subject.images(pipe)
    assert not same(styled, images) and pipe.get_active_adapters() == ["style"]
    assert same(subject.images(pipe, cross_attention_kwargs={"scale": 0.0}), images)
    pipe.fuse_lora()
    assert same(subject.images(pipe), styled, 1e-3)
    pipe.unfuse_lora()
    assert same(subject.images(pipe), styled, 1e-3)
    pipe.unload_lora_weights()
    assert same(subject.images(pipe), images)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_lora_scale_and_checkpointing(subject, pipe, scale):
    """a LoRA's scale holds where parts run again, and its layers are as they were after the call"""
    pytest.importorskip("peft")
    pipe.load_lora_weights(lora(pipe.unet), adapter_name="style")
    pipe.set_adapters("style", 0.7)
    styled, plain = subject.images(pipe), subject.images(pipe, cross_attention_kwargs={"scale": 1.0})
    scaled = subject.images(pipe, cross_attention_kwargs={"scale": scale})
    pipe.set_adapters("style", 0.7)
    pipe.unet.enable_gradient_checkpointing()
    assert same(subject.images(pipe, cross_attention_kwargs={"scale": scale}), scaled, 1e-3)
    assert same(styled, plain) and not same(scaled, plain, 1e-3)
    pipe.set_adapters("style", 0.7 * scale)
    assert same(subject.images(pipe), scaled, 1e-3)


def test_textual_inversion(subject, parts):
    """a learned word acts in the prompt, and is unloaded"""
    pipe = subject.make({**parts, "tokenizer": tiny.tokenizer()})
    images = subject.images(pipe, prompt="a <thing>")
    vectors = 5 * torch.randn(2, pipe.text_encoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    pipe.load_textual_inversion(vectors, token="<thing>")
    assert pipe.maybe_convert_prompt("a <thing>", pipe.tokenizer) == "a <thing> <thing>_1"
    assert not same(subject.images(pipe, prompt="a <thing>"), images, 1e-5)
    pipe.unload_textual_inversion()
    assert same(subject.images(pipe, prompt="a <thing>"), images)


def ip_adapter(unet, width: int) -> dict:
    """An IP-Adapter of four tokens with random weights, in the layout of its files."""
    generator, n = torch.Generator().manual_seed(0), unet.config.cross_attention_dim
    crossing = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    attention = {}
    for i, name in enumerate(crossing):
        inner = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for kind in ("k", "v"):
            attention[f"{2 * i + 1}.to_{kind}_ip.weight"] = random(generator, inner, n)
    image = {"proj.weight": random(generator, 4 * n, width), "proj.bias": torch.zeros(4 * n)}
    return {"image_proj": {**image, "norm.weight": torch.ones(n), "norm.bias": torch.zeros(n)}, "ip_adapter": attention}


def test_ip_adapter(subject, parts):
    """an IP-Adapter's image acts, by its scale, as an image and as embeddings"""
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**tower, image_size=32, patch_size=16, projection_dim=8)
    ).eval()
    size = {"height": 32, "width": 32}
    extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    pipe = subject.make({**parts, "image_encoder": encoder, "feature_extractor": extractor})
    images = subject.images(pipe)
    pipe.load_ip_adapter(ip_adapter(pipe.unet, 8), subfolder="", weight_name="")
    pipe.set_ip_adapter_scale(0.0)
    shown = picture(3)
    assert same(subject.images(pipe, ip_adapter_image=shown), images)
    pipe.set_ip_adapter_scale(1.0)
    acting = subject.images(pipe, ip_adapter_image=shown)
    assert not same(acting, images) and np.isfinite(acting).all()
    embeds = pipe.prepare_ip_adapter_image_embeds(shown, None, "cpu", 1, True)
    assert same(subject.images(pipe, ip_adapter_image_embeds=embeds), acting)
    pipe.unload_ip_adapter()
    assert same(subject.images(pipe), images)


@pytest.mark.parametrize("vae", [tiny.gradient_vae, tiny.asymmetric_vae], ids=["tiny", "asymmetric"])
def test_other_vaes(subject, parts, vae):
    """AutoencoderTiny and AsymmetricAutoencoderKL stand in for the VAE"""
    images = subject.images(subject.make({**parts, "vae": vae()}))
    assert np.isfinite(images).all() and not same(images, subject.images(subject.make(parts)))


def test_a_decoder_that_is_told_what_is_known(parts):
    """The solver on: it is told so at every pass, those too that run again; image and mask are as stock hands them."""
    vml, told = SUBJECTS[2], {}
    for subject in SUBJECTS[1:]:
        seen, pipe = [], subject.make({**parts, "vae": tiny.asymmetric_vae()})
        pipe.vae.decoder.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[1:]))
        subject.images(pipe)
        told[subject.name] = seen
    ((image, painted),) = told["none"]
    for ours in told["vml"]:
        assert torch.allclose(ours[0], image, atol=1e-6) and torch.equal(ours[1], painted)
    batch = {"image": [picture(0), picture(1)], "mask_image": [mask()] * 2, "prompt": ["a hat"] * 2}
    assert same(*(vml.images(pipe, **batch, memory=memory) for memory in ("fast", "low")), 1e-3)


def test_a_decoder_with_noise_of_its_own_is_refused(parts):
    """The solver on: a ConsistencyDecoderVAE has no gradient to follow."""
    vml = SUBJECTS[2]
    with pytest.raises(ValueError, match="`vae` is a ConsistencyDecoderVAE"):
        vml.images(vml.make({**parts, "vae": tiny.consistency_vae()}))
